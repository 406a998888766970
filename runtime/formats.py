"""How model families mark their thinking, and how a format is recognised. A new family is one entry in `FORMATS`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from .errors import InputError

_CHATML_HINT = "-<|im_start|>user\n{hint}<|im_end|>-"
_PLAIN_HINT = "\n({hint})\n"


@dataclass(frozen=True, slots=True)
class ThinkingFormat:
    """The texts around thinking. `open` and `close` are what the runtime writes, `opens` and `closes` what it looks
    for in decoded text. No tags at all mean no thinking."""

    name: str
    open: str = ""
    close: str = ""
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    lead: str = "Final Answer:"
    """Written behind the closing tag after a cut (s1)."""
    user_hint: str = _PLAIN_HINT
    """How a user's remark is put into the thinking; `{hint}` stands for its text."""
    is_prompted: bool = False
    """True where a prompt asks for the format, because the model has none of its own."""
    is_prefilled: bool = False
    """True where the runtime writes `open` behind the generation prompt if the template has not."""


FORMATS: Mapping[str, ThinkingFormat] = MappingProxyType(
    {
        format.name: format
        for format in (
            ThinkingFormat("none"),
            ThinkingFormat("think", "<think>\n", "\n</think>\n\n", ("<think>",), ("</think>",), user_hint=_CHATML_HINT),
            # R1's vocabulary has no ChatML marks; as plain characters they would only puzzle the model.
            ThinkingFormat("deepseek", "<think>\n", "\n</think>\n\n", ("<think>",), ("</think>",)),
            ThinkingFormat(
                "harmony",
                "<|channel|>analysis<|message|>",
                "<|end|><|start|>assistant<|channel|>final<|message|>",
                ("<|channel|>analysis<|message|>",),
                (
                    "<|end|><|start|>assistant<|channel|>final<|message|>",
                    "<|start|>assistant<|channel|>final<|message|>",
                    "<|channel|>final<|message|>",
                ),
                user_hint="<|end|><|start|>user<|message|>{hint}<|end|><|start|>assistant<|channel|>analysis<|message|>",
            ),
            ThinkingFormat("bracket", "[THINK]", "[/THINK]", ("[THINK]",), ("[/THINK]",)),
            ThinkingFormat(
                "gemma4",
                "<|channel>thought\n",
                "<channel|>",
                ("<|channel>thought\n", "<|channel>thought"),
                ("<channel|>",),
            ),
            ThinkingFormat(
                "s1",
                "<|im_start|>think\n",
                "\n<|im_start|>answer\n",
                ("<|im_start|>think",),
                ("<|im_start|>answer",),
                user_hint=_CHATML_HINT,
                is_prefilled=True,
            ),
            ThinkingFormat(
                "prompted",
                "<think>\n",
                "\n</think>\n\n",
                ("<think>",),
                ("</think>",),
                user_hint=_CHATML_HINT,
                is_prompted=True,
                is_prefilled=True,
            ),
        )
    }
)


def detect(template: str | None, metadata: Mapping[str, str]) -> ThinkingFormat:
    """The format of a model by its chat template and name; the prompted one where nothing is recognised."""
    text = template or ""
    name = metadata.get("general.name", "").lower()
    if name.startswith(("s1-", "s1.1-", "s1 ", "s1.1 ")) or name in ("s1", "s1.1"):
        return FORMATS["s1"]
    if "<|channel|>" in text and "analysis" in text:
        return FORMATS["harmony"]
    if "<|channel>thought" in text or "<channel|>" in text:
        return FORMATS["gemma4"]
    if "[THINK]" in text:
        return FORMATS["bracket"]
    if "think>" in text:
        return FORMATS["think" if "<|im_start|>" in text else "deepseek"]
    prompted = FORMATS["prompted"]
    return prompted if "<|im_start|>" in text else replace(prompted, user_hint=_PLAIN_HINT)


def find_format(name: str) -> ThinkingFormat:
    """A format by name. Raises InputError naming those that exist."""
    if name not in FORMATS:
        raise InputError(f"there is no thinking format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def strip_thinking(text: str, format: ThinkingFormat) -> str:
    """An earlier reply without its thinking: what stands behind its last closing tag, or before a block that was
    never closed."""
    ends = [text.rfind(tag) + len(tag) for tag in format.closes if tag in text]
    if ends:
        text = text[max(ends) :].lstrip()
    starts = [text.find(tag) for tag in format.opens if tag in text]
    return text[: min(starts)].rstrip() if starts else text
