"""A grammar that the answer has to follow: llama.cpp's, asked before it is told, for it ends the process otherwise."""

import codecs
import ctypes
import re
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Row
from .errors import InputError
from .native import cause, forget_messages, library

_CANDIDATES = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama.cpp's llama_token_data."""
_N_LIKELIEST = 1024
_HALF_SURROGATE = re.compile(rb"\xed[\xa0-\xbf]")
"""Bytes that Python's decoder waits behind for a third one, and then refuses whatever comes."""


class Grammar:
    """Where one text stands in a grammar in GBNF, whose root is `root`. Raises InputError for what is no grammar.

    `vocabulary` is llama.cpp's pointer, which has to outlive this object's use; `piece` gives a token's bytes.
    """

    def __init__(self, vocabulary: Any, n_vocab: int, piece: Callable[[int], bytes], rules: str) -> None:
        self._lib = library()
        forget_messages()
        self._sampler = self._lib.llama_sampler_init_grammar(vocabulary, rules.encode(), b"root")
        if not self._sampler:
            raise InputError(f"llama.cpp cannot read the grammar: {cause()}; simplify it")
        weakref.finalize(self, self._lib.llama_sampler_free, self._sampler)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._piece = piece
        # llama.cpp takes bytes that are no UTF-8 for characters; a reader would get several in the place of one.
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")

    def take(self, token: int) -> bool:
        """Go on behind a token; False, and nothing changes, where the grammar does not allow it."""
        if self._apply(np.array([token]), np.zeros(1, np.float32))[0] < 0:
            return False
        before = self._decoder.getstate()
        try:
            self._decoder.decode(self._piece(token))
            can_end = not _HALF_SURROGATE.match(self._decoder.getstate()[0])
        except UnicodeDecodeError:
            can_end = False
        if not can_end:
            self._decoder.setstate(before)
            return False
        self._lib.llama_sampler_accept(self._sampler, token)
        return True

    def mask(self, row: Row) -> Row:
        """A copy of a row of logits, -inf for every token that is not allowed next, and for those beyond the likeliest
        1024 where one of these is: to look at a whole vocabulary takes longer than a step of a small model."""
        masked = np.full_like(row, -np.inf)
        n = min(_N_LIKELIEST, len(row))
        ids = np.argpartition(row, -n)[-n:]
        masked[ids] = self._apply(ids, row[ids])
        return masked if masked.max() > -np.inf else self._apply(self._ids, row)

    def _apply(self, ids: NDArray[Any], logits: Row) -> Row:
        """The logits of some tokens with -inf for those that are not allowed next."""
        candidates = np.zeros(len(ids), _CANDIDATES)
        candidates["id"], candidates["logit"] = ids, logits
        data = candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data))
        array = self._lib.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        self._lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return candidates["logit"].copy()
