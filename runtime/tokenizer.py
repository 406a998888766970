"""What the runtime needs of a vocabulary, and a decoder of token bytes that is safe for split UTF-8."""

import codecs
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back."""

    n_vocab: int

    def encode(self, text: str, special: bool = False, is_first: bool = False) -> list[int]:
        """Token ids of a text that stands behind another one, or with `is_first` begins the context, for some
        vocabularies put a space before that; without BOS. `special` lets the text of control tokens stand for them:
        only for text of our own or of a template, never for a user's."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token; a control token gives its name, such as `<|im_end|>`."""
        ...

    def is_end(self, token: int) -> bool:
        """True for tokens that end a generation."""
        ...


class StreamDecoder:
    """Turns token bytes into text as soon as characters are whole; bytes that never can be become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The replacement for a character that was never finished, or nothing."""
        return self._decoder.decode(b"", final=True)

    @property
    def is_whole(self) -> bool:
        """True where no character is incomplete."""
        return not self._decoder.getstate()[0]
