"""Texts that llama.cpp's tokenizers cannot cut into words.

For some families of vocabularies it matches words by a regular expression that calls itself for each character: 40,000
letters without a space end the process by an overflow of its stack. Which families was tried out.
"""

import re
import unicodedata
from itertools import groupby

from .errors import PromptError

_LONGEST = 2000
_SAFE = frozenset({"gpt-2", "llama-bpe", "qwen2", "qwen35", "smollm", "glm4", "gemma4"})
"""Values of `tokenizer.ggml.pre` whose words llama.cpp finds by code of its own."""
_NAMES = {"L": "letters", "N": "digits", "Z": "spaces or line ends", "P": "signs"}
_LONG = re.compile(rf"\S{{{_LONGEST + 1}}}|\s{{{_LONGEST + 1}}}")


def is_recursive(metadata: dict[str, str]) -> bool:
    """True where a model's words may be found by recursion."""
    return metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") not in _SAFE


def check_runs(text: str) -> None:
    """Raises PromptError for a run of letters, digits, signs or white space that is too long for such a model."""
    if _LONG.search(text) is None:
        return
    for kind, run in groupby(text, _kind):
        n = sum(1 for _ in run)
        if n > _LONGEST:
            raise PromptError(
                f"{n} {_NAMES[kind]} in a row cannot be read by this model's tokenizer, "
                f"at most {_LONGEST} can; put spaces or other characters between them"
            )


def _kind(character: str) -> str:
    """The class of a character as words are made of: marks belong to letters, and what is neither is one class."""
    if character.isspace():
        return "Z"
    kind = unicodedata.category(character)[0]
    return "L" if kind in "LM" else "N" if kind == "N" else "P"
