"""What the server says: updates of a job to the JSON bodies and stream chunks of OpenAI's API."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..runtime.controls.budget import BudgetParameters
from ..runtime.tokenizer import Tokenizer
from .server_job import Chance, Job, Outcome, Update, piece_text

DONE = b"data: [DONE]\n\n"
PAUSE = b": still working\n\n"
"""A comment of the event stream, which readers pass over."""
_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def encode_event(body: Mapping[str, Any]) -> bytes:
    """One event of the stream."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class Reply:
    """Turns a job's updates into the body, or the chunks, that its reader gets."""

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer) -> None:
        self._job = job
        self._model_name = model_name
        self._tokenizer = tokenizer
        self._is_chat = job.wanted.is_chat
        self._updates: list[Update] = []
        self.outcomes: dict[int, Outcome] = {}
        self.problem: str | None = None

    @property
    def is_done(self) -> bool:
        return self.problem is not None or len(self.outcomes) == self._job.wanted.n

    def add(self, updates: Iterable[Update]) -> None:
        """Take in what is new, for `body`."""
        for update in updates:
            self._note(update)
            self._updates.append(update)

    def body(self) -> dict[str, Any]:
        """The whole reply, once it is done."""
        return {
            **self._head("chat.completion" if self._is_chat else "text_completion"),
            "choices": [self._choice(i) for i in range(self._job.wanted.n)],
            "usage": self._usage(),
            "localreason": self._report(),
        }

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks, which name the role and the id before anything is decoded."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": i, "delta": delta, **_OPEN}]) for i in range(self._job.wanted.n)]

    def chunks(self, updates: Iterable[Update]) -> list[dict[str, Any]]:
        """The chunks of what is new; pieces that came together are joined."""
        chunks: list[dict[str, Any]] = []
        for (index, kind), group in groupby(updates, lambda update: (update.index, update.kind)):
            pieces = list(group)
            for update in pieces:
                self._note(update)
            outcome = pieces[-1].outcome
            if outcome is not None:
                empty = {"delta": {}} if self._is_chat else {"text": ""}
                end = {"index": index, **empty, "logprobs": None, "finish_reason": _finish_reason(outcome)}
                chunks.append(self._chunk([end], {"localreason": self._report()} if self.is_done else {}))
            elif kind != "error":
                text = "".join(update.text for update in pieces)
                chances = [chance for update in pieces for chance in update.chances]
                chunks.append(self._chunk([self._piece(index, kind, text, chances)]))
        if self.is_done and self.problem is None and self._job.wanted.has_usage:
            chunks.append({**self._chunk([]), "usage": self._usage()})
        return chunks

    def _note(self, update: Update) -> None:
        if update.outcome is not None:
            self.outcomes[update.index] = update.outcome
        elif update.kind == "error":
            self.problem = update.text

    def _piece(self, index: int, kind: str, text: str, chances: list[Chance]) -> dict[str, Any]:
        if not self._is_chat:
            return {"index": index, "text": text, "logprobs": self._logprobs(chances), "finish_reason": None}
        delta = {"reasoning_content" if kind == "think" else "content": text}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(chances), "finish_reason": None}

    def _choice(self, index: int) -> dict[str, Any]:
        mine = [update for update in self._updates if update.index == index]
        texts = {kind: "".join(u.text for u in mine if u.kind == kind) for kind in ("think", "answer")}
        ends = {
            "logprobs": self._logprobs([chance for update in mine for chance in update.chances], is_whole=True),
            "finish_reason": _finish_reason(self.outcomes[index]),
        }
        if not self._is_chat:
            return {"index": index, "text": texts["think"] + texts["answer"], **ends}
        message = {"role": "assistant", "content": texts["answer"], "reasoning_content": texts["think"] or None}
        return {"index": index, "message": {**message, "refusal": None}, **ends}

    def _logprobs(self, chances: list[Chance], is_whole: bool = False) -> dict[str, Any] | None:
        if self._job.wanted.n_top is None or not (chances or is_whole):
            return None
        if self._is_chat:
            return {"content": [self._entry(chance) for chance in chances], "refusal": None}
        return {
            "tokens": [piece_text(self._tokenizer, chance.token) for chance in chances],
            "token_logprobs": [max(chance.logprob, _LEAST_LOGPROB) for chance in chances],
            "top_logprobs": [
                {piece_text(self._tokenizer, token): max(value, _LEAST_LOGPROB) for token, value in chance.top}
                for chance in chances
            ],
            "text_offset": [chance.start for chance in chances],
        }

    def _entry(self, chance: Chance) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            piece = self._tokenizer.piece(token)
            text = piece.decode("utf-8", "replace")
            return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(piece)}

        return {**entry(chance.token, chance.logprob), "top_logprobs": [entry(*other) for other in chance.top]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._job.created, "model": self._model_name}

    def _chunk(self, choices: list[dict[str, Any]], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage = {"usage": None} if self._job.wanted.has_usage else {}
        return {**self._head(kind), "choices": choices, **usage, **(more or {})}

    def _usage(self) -> dict[str, Any]:
        """Prompt tokens once, and of each choice the tokens of the sample that is shown, those of controls included.

        How much of the prompt was in the cache can turn a near tie: a seed gives the same reply where that is equal.
        """
        outcomes, first = self.outcomes.values(), self._job.sequences[0]
        n_reply = sum(outcome.n_reply for outcome in outcomes)
        n_thinking = sum(min(outcome.counts.thinking, outcome.n_reply) for outcome in outcomes)
        return {
            "prompt_tokens": first.n_prompt,
            "completion_tokens": n_reply,
            "total_tokens": first.n_prompt + n_reply,
            "prompt_tokens_details": {"cached_tokens": first.n_reused},
            "completion_tokens_details": {"reasoning_tokens": n_thinking},
        }

    def _report(self) -> dict[str, Any]:
        """What the controls did, and what was granted."""
        job, recipe = self._job, self._job.wanted.recipe
        budget = recipe.get("budget")
        ended, begun = job.ended or 0.0, job.begun or job.ended or 0.0
        return {
            "seed": recipe.seed,
            "budget": budget.max if isinstance(budget, BudgetParameters) else None,
            "max_tokens": recipe.limit,
            "controls": [parameters.control for parameters in recipe.controls],
            "ignored": list(job.wanted.ignored),
            "queue_seconds": round(begun - job.submitted, 4),
            "seconds": round(ended - begun, 4),
            "choices": [
                {
                    "index": i,
                    "stop": outcome.stop,
                    "sample": outcome.sample,
                    "tokens": asdict(outcome.counts),
                    "counters": outcome.counters,
                }
                for i, outcome in sorted(self.outcomes.items())
            ],
        }


_OPEN: Mapping[str, Any] = {"logprobs": None, "finish_reason": None}


def _finish_reason(outcome: Outcome) -> str:
    """OpenAI's word. A reply that was cancelled, by a client or a shutdown, ends with `length` as one that met a limit
    does: typed clients know no other word but `stop`, which would say that it is whole. The cause itself stands in the
    report's `stop`."""
    return "stop" if outcome.stop in ("end", "stop") else "length"
