"""Conversations as files for people and programs, and the code in a message."""

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime

from markdown_it import MarkdownIt

from .conversation import Conversation, Message

_NAMES = {"user": "You", "assistant": "Model", "system": "Instructions"}


def to_markdown(conversation: Conversation) -> str:
    """The chosen branch as Markdown; thinking is folded away, in a code block, so that it cannot break the page."""
    parts = [f"# {conversation.title or 'Conversation'}", f"{_date(conversation.created)}, {conversation.model}"]
    for message in conversation.path():
        parts.append(f"## {_NAMES.get(message.role, message.role)}")
        if message.thinking.strip():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", message.thinking)), default=0))
            thinking = message.thinking.strip("\n")
            parts.append(
                f"<details>\n<summary>{_thinking(message)}</summary>\n\n{fence}text\n{thinking}\n{fence}\n\n</details>"
            )
        if message.content.strip():
            parts.append(message.content.strip("\n"))
        if message.state != "done":
            parts.append("*stopped before its end*")
    return "\n\n".join(parts) + "\n"


def to_json(conversation: Conversation) -> str:
    """Everything that is kept of a conversation, all branches; `path` names the messages of the chosen one."""
    row = {
        "title": conversation.title,
        "model": conversation.model,
        "created": _date(conversation.created),
        "path": [message.id for message in conversation.path()],
        "messages": [{**asdict(message), "created": _date(message.created)} for message in conversation.messages],
    }
    return json.dumps(row, indent=2, ensure_ascii=False) + "\n"


def copy_blocks(text: str) -> list[str]:
    """The code blocks of a Markdown text in their order, fenced and indented ones, those in lists and quotes too."""
    tokens = MarkdownIt("commonmark").parse(text)
    return [token.content for token in tokens if token.type in ("fence", "code_block")]


def _thinking(message: Message) -> str:
    if message.stats is None:
        return "Thinking"
    return f"Thinking, {message.stats.n_thinking} tokens in {message.stats.thinking_seconds:.0f} s"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
