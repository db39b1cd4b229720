"""What is asked. Text that is made of drawn words is written when it is asked for, and not kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .words import Words

# A message of a chat: role, content, and what else a dataset gives it.
Message = dict[str, Any]


class Prompt(Protocol):
    """One prompt, for any route."""

    def text(self) -> str:
        """The prompt as one text, for ``/generate`` and ``/v1/completions``."""

    def messages(self) -> list[Message]:
        """The prompt as the messages of a chat."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text of a file. In a chat it is one message of the user."""

    content: str

    def text(self) -> str:
        """The text as it is."""
        return self.content

    def messages(self) -> list[Message]:
        """One message of the user."""
        return [{"role": "user", "content": self.content}]


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of a chat, whose contents are text."""

    turns: tuple[Message, ...]

    def text(self) -> str:
        """The contents, without the roles, with a blank line between two."""
        return "\n\n".join(turn["content"] for turn in self.turns)

    def messages(self) -> list[Message]:
        """The messages as they are."""
        return [dict(turn) for turn in self.turns]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Blocks of words: each a number and a length in tokens. In a chat they are one message of the user."""

    words: Words
    blocks: tuple[tuple[int, int], ...]

    def text(self) -> str:
        """The blocks one after the other."""
        return self.words.write(self.blocks)

    def messages(self) -> list[Message]:
        """One message of the user."""
        return [{"role": "user", "content": self.text()}]
