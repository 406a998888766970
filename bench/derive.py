"""Rows of `localreason eval` that follow from rows already run, with the project's own decode loop and controls.

    localreason eval gsm8k -p safe -m MODEL.gguf -o out
    python bench/derive.py out/safe.jsonl none b256=safe+budget:max=256 --model MODEL.gguf
    localreason eval gsm8k -p parallel --trace -m MODEL.gguf -o vote
    python bench/derive.py vote/parallel.jsonl ffs=safe+search:n=4 short2=safe+search:n=4,rule=short,m=2

Two cases. A configuration that differs from SOURCE in its budget alone gets SOURCE's row where the budget changes
nothing. Elsewhere the model is run with the thinking that SOURCE sampled, until the budget acts, and samples from there
on. To run only those rows anew would not do: the last bits of the logits hang on what else is in the batch, so that a
second run is a second draw, and drawing again where thinking was long makes it shorter by itself.

A search gets every row: the samples that SOURCE recorded are decoded again by `runtime/decode.py`, with what was
sampled then in the place of a model, under the other rule; as short-m@k and first-finish search are evaluated in their
papers. SOURCE's own rule is replayed too and has to come to the recorded reply. A row that would need more of a sample
than was recorded, since it was stopped then, is left to `localreason eval` with the same folder, which goes on behind
them. Seconds are those of SOURCE, and mean nothing here.
"""

import argparse
import contextlib
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from localreason.cli.config import Config, Settings
from localreason.cli.evaluation.configuration import Configuration, make_configurations
from localreason.cli.evaluation.graders import Reply
from localreason.cli.evaluation.judge import Judge
from localreason.cli.problems import Problem
from localreason.cli.row import Row, make_row, read_rows, to_line
from localreason.runtime.controls.control import Control, Force
from localreason.runtime.decode import Request
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Answered, Model, Question
from localreason.runtime.prompt import Prompter
from localreason.runtime.recipe import Recipe
from localreason.runtime.sequence import Origin, Sequence


class Pieces:
    """The tokens of one recorded question: an id for each text, and runs of forced texts as they were cut then."""

    def __init__(self, trace, ends) -> None:
        self.prefix, self.control_texts, self.chat_template = [], [], "{{ messages | map(attribute='content') | join }}"
        self.metadata, self.template_tokens = {}, {}
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
    can_rewind, n_in_flight, n_spread = True, 1, 1

    def __init__(self) -> None:
        self.n_rows = 0

    def submit(self, batch) -> None:
        self.n_rows = sum(span.n_logits for span in batch)

    def collect(self):
        return np.zeros((self.n_rows, 1), np.float32)

    def discard(self) -> None: ...
    def fork(self, source: int, target: int, n_tokens: int) -> int:
        return n_tokens

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        return n_tokens

    def close(self) -> None: ...


class Recorded(Model):
    """A model that samples what it sampled when one question was recorded."""

    def __init__(self, row: Row, ends) -> None:
        self.engine, self.tokenizer, self._memo = Blank(), Pieces(row.trace, ends), {}
        self._prompter = Prompter(self.tokenizer, self.tokenizer)
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


def is_untouched(row: Row, one: Configuration) -> bool:
    """Whether the configuration's budget, or its lack, does what SOURCE's did."""
    did, wanted = row.counters["budget"], one.recipe.get("budget")
    assert not did["ignored"]
    if wanted is None:
        return not did["closed_at_end"]
    return row.tokens["thinking"] < min(wanted.max, wanted.total or wanted.max) - min(wanted.slack, wanted.max // 8)


class Recall(Control):
    """Puts what was sampled once into a sequence, as if it were sampled again; a control that cuts it discards the
    rest."""

    name = "recall"

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.counters = {}

    def begin(self, sequence: Sequence):
        return (Force(tuple(self.tokens), Origin.SAMPLED),)


class Continued(Model):
    """A model that thinks what rows say until a control acts, and what it samples from there on."""

    def know(self, rows: list[Row]) -> None:
        # A budget may leave one alone that ends close to it; then the end that was sampled counts.
        end = next(token for token in range(self.tokenizer.n_vocab) if self.tokenizer.is_end(token))
        self.recorded = {
            row.id: self.tokenizer.encode(row.thinking) + [end] * row.counters["budget"]["closed_at_end"]
            for row in rows
        }

    def samples(self, prompt, recipe: Recipe, id: str = "") -> list[Request]:
        requests = super().samples(prompt, recipe, id)
        for request in requests:
            request.controls.append(Recall(self.recorded[id]))
        return requests


def continue_rows(rows: list[Row], one: Configuration, model: Continued, judge: Judge) -> Iterator[Row]:
    """The rows as the configuration's budget would have had them."""
    model.know(rows)
    by_id = {row.id: row for row in rows}
    recipe = one.repeat(rows[0].repeat)
    for event in model.solve([Question(row.id, row.problem) for row in rows], recipe, model.engine.n_sequences - 1):
        if not isinstance(event, Answered):
            continue
        assert event.result.error is None, event.result.error
        row = by_id[event.result.id]
        new = make_row(event.result, Problem(row.id, row.problem), row.model, one.recipe.describe())
        del new.counters["recall"]
        verdict = judge.grade(Reply(row.problem, new.text, row.gold or ""))
        yield replace(
            new,
            **{name: getattr(row, name) for name in ("repeat", "gold", "seconds", "wall_seconds", "peak_bytes")},
            answer=verdict.answer,
            correct=verdict.is_correct,
        )


def derive_budget(
    rows: list[Row], one: Configuration, source: Recipe, model: Continued, judge: Judge
) -> Iterator[Row | None]:
    others = [parameters.control for parameters in one.recipe.controls if parameters.control != "budget"]
    wanted = one.recipe.get("budget")
    assert not others, f"{one.name} differs in more than its budget"
    assert wanted is None or not (wanted.ignore or wanted.repeat or wanted.min), f"{one.name} is no cap"
    assert wanted is None or one.recipe.max_thinking <= source.max_thinking, f"{one.name} thinks longer than SOURCE"
    touched: dict[int, list[Row]] = {}
    for row in rows:
        if wanted is None and row.counters["budget"]["cuts"]:
            yield None  # nobody knows how its thinking would have gone on: it is left to `localreason eval`
        elif is_untouched(row, one):
            counters = row.counters if wanted is not None else {}
            yield replace(row, counters=counters, recipe=one.recipe.describe(), trace=None)
        elif wanted is None:  # it ended inside the thinking, and nothing leads it to an answer
            nothing = {"text": "", "answer": None, "correct": False, "stop": "end", "is_unclosed": True}
            tokens = {**row.tokens, "answer": 0, "forced": 0}
            yield replace(row, **nothing, tokens=tokens, counters={}, recipe=one.recipe.describe(), trace=None)
        else:
            touched.setdefault(row.repeat, []).append(row)
    for each in touched.values():
        yield from continue_rows(each, one, model, judge)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("configurations", nargs="+", metavar="PRESET or NAME=PRESET+CONTROL:KEY=VALUE")
    parser.add_argument("--model", type=Path, help="the model file, for budgets")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--context", type=int, default=24576)
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
        n, left = 0, [row for row in rows if row.key not in done and row.error is None]
        with path.open("a") as file, Judge(header["grader"]) as judge, contextlib.ExitStack() as stack:
            if one.recipe.get("search") is not None:
                ends = options.ends.split(",")
                derived = (derive_search(row, one, source, judge, ends, options.format) for row in left)
            else:
                loading = EngineOptions(options.context, options.parallel + 1, n_threads=options.threads)
                model = stack.enter_context(Continued.open(options.model, loading))
                derived = derive_budget(left, one, source, model, judge)
            for new in filter(None, derived):
                file.write(to_line(new))
                file.flush()
                n += 1
        print(f"{one.name}: {n} of {len(rows)} rows derived", flush=True)


if __name__ == "__main__":
    main()
