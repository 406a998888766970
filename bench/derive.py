"""Rows of `localreason eval` that follow from rows already run, with the project's own decode loop and controls.

    localreason eval gsm8k -p safe -m MODEL.gguf -o out
    python bench/derive.py out/safe.jsonl none b256=safe+budget:max=256
    localreason eval gsm8k -p parallel --trace -m MODEL.gguf -o vote
    python bench/derive.py vote/parallel.jsonl ffs=safe+search:n=4 short2=safe+search:n=4,rule=short,m=2

Two cases. A configuration without a search gets the rows of SOURCE in which no limit was reached, if its own budget is
not reached either, and nothing was closed for the model if it has none: with the same seeds it would sample the same
tokens. The others are left to `localreason eval` with the same folder, which goes on behind them. A search gets every
row: the samples that SOURCE recorded are decoded again by `runtime/decode.py`, with what was sampled then in the place
of a model, under the other rule; as short-m@k and first-finish search are evaluated in their papers. SOURCE's own rule
is replayed too and has to come to the recorded reply. A row that would need more of a sample than was recorded, since
it was stopped then, is left to `localreason eval` too. Seconds are those of SOURCE, and mean nothing for a search.
"""

import argparse
import json
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from localreason.cli.config import Config, Settings
from localreason.cli.evaluation.configuration import Configuration, make_configurations
from localreason.cli.evaluation.graders import Reply
from localreason.cli.evaluation.judge import Judge
from localreason.cli.results import Row, read_rows, to_line
from localreason.runtime.decode import Request
from localreason.runtime.model import Answered, Model, Question
from localreason.runtime.prompt import Prompter
from localreason.runtime.recipe import Recipe


class Pieces:
    """The tokens of one recorded question: an id for each text, and runs of forced texts as they were cut then."""

    def __init__(self, trace, ends) -> None:
        self.prefix, self.control_texts, self.chat_template, self.metadata = [], [], None, {}
        self.texts: list[str] = [""]
        self.ends = ends
        self.runs: dict[str, list[int]] = {}
        self.sampled: dict[int, deque[int]] = {}
        forced: dict[int, list[str]] = {}
        for sample, kind, *rest in trace:
            if kind != "token":
                continue
            text, _, origin = rest
            if origin == "forced":
                forced.setdefault(sample, []).append(text)
                continue
            self.close_run(forced.pop(sample, []))
            self.sampled.setdefault(sample, deque()).append(self.id(text))
        for run in forced.values():
            self.close_run(run)

    def close_run(self, texts: list[str]) -> None:
        if texts:
            self.runs["".join(texts)] = [self.id(text) for text in texts]

    def id(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text)

    @property
    def n_vocab(self) -> int:
        return len(self.texts)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return list(self.runs.get(text) or [self.id(text)])

    def piece(self, token: int) -> bytes:
        return self.texts[token].encode()

    def is_end(self, token: int) -> bool:
        return self.texts[token] in self.ends

    def close(self) -> None:
        pass


class Blank:
    """An engine whose logits nobody reads."""

    n_vocab, n_context, n_context_sequence, n_sequences, n_batch = 1, 1 << 20, 1 << 20, 65, 512
    can_rewind, n_in_flight = True, 1

    def __init__(self) -> None:
        self.n_rows = 0

    def submit(self, batch) -> None:
        self.n_rows = sum(span.n_logits for span in batch)

    def collect(self):
        return np.zeros((self.n_rows, 1), np.float32)

    def discard(self) -> None: ...
    def fork(self, source: int, target: int, n_tokens: int) -> None: ...
    def rewind(self, sequence_id: int, n_tokens: int) -> None: ...
    def close(self) -> None: ...


class Recorded(Model):
    """A model that samples what it sampled when one question was recorded."""

    def __init__(self, row: Row, ends) -> None:
        self.engine, self.tokenizer, self._memo = Blank(), Pieces(row.trace, ends), {}
        self._prompter = Prompter(self.tokenizer, self.tokenizer, "chatml")
        self.n_missed = 0

    def samples(self, prompt, recipe: Recipe, id: str = "") -> list[Request]:
        requests = super().samples(prompt, recipe, id)
        for request in requests:
            request.sample = partial(self._next, self.tokenizer.sampled.get(request.sequence.sample, deque()))
        return requests

    def _next(self, recorded: deque[int], row) -> int:
        if recorded:
            return recorded.popleft()
        self.n_missed += 1
        return 0


def replay(row: Row, recipe: Recipe, ends, format: str):
    """What the recorded samples come to under the recipe, and how many tokens were asked for that they do not have."""
    recorded = Recorded(row, ends)
    for event in recorded.solve([Question(row.id, row.problem)], replace(recipe, format=format)):
        if isinstance(event, Answered):
            if event.result.error is not None:
                raise event.result.error
            return event.result, recorded.n_missed
    raise AssertionError("no answer")


def derive_search(row: Row, one: Configuration, source: Recipe, judge: Judge, ends, format: str) -> Row | None:
    again, _ = replay(row, source, ends, format)
    assert (again.text, again.thinking, again.answer) == (row.text, row.thinking, row.answer), f"{row.id} differs"
    result, n_missed = replay(row, one.recipe, ends, format)
    if n_missed:
        return None
    verdict = judge.grade(Reply(row.problem, result.text, row.gold or ""))
    tokens = {**row.tokens, "thinking": result.counts.thinking, "answer": result.counts.answer}
    return replace(
        row,
        **{name: getattr(result, name) for name in ("text", "thinking", "stop", "counters", "is_unclosed")},
        answer=verdict.answer,
        correct=verdict.is_correct,
        tokens={**tokens, "forced": result.counts.forced},
        recipe=one.recipe.describe(),
        trace=None,
    )


def derive_untouched(row: Row, one: Configuration) -> Row | None:
    """The row where the budget that ran and the configuration's own, if it has one, do the same, or nothing."""
    did, wanted = row.counters.get("budget"), one.recipe.get("budget")
    others = {*row.counters, *(parameters.control for parameters in one.recipe.controls)} - {"budget"}
    if others or row.stop != "end" or row.is_unclosed or did is None or did["cuts"] or did["ignored"]:
        return None
    if wanted is None and did["closed_at_end"]:
        return None
    if wanted is not None:
        limit = min(wanted.max, wanted.total or wanted.max) - min(wanted.slack, wanted.max // 8)
        if wanted.ignore or wanted.repeat or not wanted.min <= row.tokens["thinking"] < limit:
            return None
    counters = row.counters if wanted is not None else {}
    return replace(row, counters=counters, recipe=one.recipe.describe(), trace=None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("configurations", nargs="+", metavar="PRESET or NAME=PRESET+CONTROL:KEY=VALUE")
    parser.add_argument("--ends", default="<|im_end|>,<|endoftext|>", help="texts of the tokens that end a reply")
    parser.add_argument("--format", default="prompted", help="the thinking format that the model was run with")
    options = parser.parse_args()
    header, rows, _ = read_rows(options.source.read_bytes(), options.source)
    assert header is not None, "not of an evaluation"
    was = header["recipe"]
    settings = Settings(max_tokens=was["max_tokens"], seed=was["seed"], **was["sampling"])
    config = Config(settings, {})
    presets = [text for text in options.configurations if "=" not in text]
    texts = [text for text in options.configurations if "=" in text]
    source = make_configurations(config, [header["configuration"]], [], False)[0].recipe
    assert json.loads(json.dumps(source.describe())) == was, "the source's recipe is not its preset's"
    for one in make_configurations(config, presets, texts, False):
        path = options.source.with_name(f"{one.name}.jsonl")
        described = json.loads(json.dumps(one.recipe.describe()))
        head = {**header, "configuration": one.name, "recipe": described}
        done: set[tuple[str, int]] = set()
        if path.exists():
            there, found, _ = read_rows(path.read_bytes(), path)
            assert there is not None
            assert there["recipe"] == described, f"{path} has another recipe"
            done = {row.key for row in found}
        else:
            path.write_text(json.dumps({"schema": 1, "header": head}) + "\n")
        n = 0
        with path.open("a") as file, Judge(header["grader"]) as judge:
            for row in rows:
                if row.key in done or row.error is not None:
                    continue
                if one.recipe.get("search") is not None:
                    new = derive_search(row, one, source, judge, options.ends.split(","), options.format)
                else:
                    new = derive_untouched(row, one)
                if new is not None:
                    file.write(to_line(new))
                    n += 1
        print(f"{one.name}: {n} of {len(rows)} rows derived")


if __name__ == "__main__":
    main()
