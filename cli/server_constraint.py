"""Sampling that follows a grammar in the answer and is free in the thinking."""

import math
from collections import deque
from collections.abc import Sequence

from ..runtime.decode import Request
from ..runtime.engine import Row
from ..runtime.errors import InputError
from ..runtime.formats import find_format
from ..runtime.grammar import Grammar
from ..runtime.model import Model
from ..runtime.recipe import Recipe
from ..runtime.tokenizer import Tokenizer
from .server_field import Refused


def constrain_all(requests: Sequence[Request], rules: str, recipe: Recipe, model: Model) -> None:
    """Let all samples of a reply follow a grammar, each on its own. Raises Refused where it is none."""
    format = find_format(recipe.format) if recipe.format else model.format
    opens = format.opens[:1] if recipe.is_thinking else ()
    opening = model.tokenizer.encode("".join(opens), special=True)
    for request in requests:
        try:
            constrain(request, model.tokenizer.grammar(rules), opening, model.tokenizer)
        except InputError as error:
            raise Refused(f"response_format: {error}", "response_format") from error


def constrain(request: Request, grammar: Grammar, opening: Sequence[int], tokenizer: Tokenizer) -> None:
    """Let a request's sampling follow a grammar in the answer, and not in the thinking. `opening` are the tokens with
    which the model itself may begin to think; a reply that begins with the first of them goes on with the others. A
    token that ends the thinking and begins the answer is cut behind the tag: the grammar sees whole tokens only."""
    draw, sequence = request.sample, request.sequence
    forced: deque[int] = deque()

    def sample(row: Row) -> int:
        if forced:
            return forced.popleft()
        token = draw(row)
        if sequence.is_thinking:
            if rest := request.tracker.rest_of_tag(tokenizer.piece(token)):
                token, *others = tokenizer.encode(rest, special=True)
                forced.extend(others)
            return token
        if opening and not sequence.n_blocks and not sequence.answer.strip() and token == opening[0]:
            forced.extend(opening[1:])
            return token
        if grammar.take(token):
            return token
        allowed = grammar.mask(row)
        while allowed.max() > -math.inf:
            token = draw(allowed)
            if grammar.take(token):
                return token
            allowed[token] = -math.inf
        sequence.cancel("grammar")  # a vocabulary without what has to follow
        return token

    request.sample = sample
