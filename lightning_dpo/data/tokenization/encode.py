"""Texts -> token ids, by the tokenizer's own call or, where both give the same, by its faster core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextEncoder"]

_TRIED = 64
"""Texts that both ways are tried on."""

_CALLS = ("__call__", "_encode_plus", "_batch_encode_plus")
"""Methods by which a tokenizer class may change texts before its core sees them."""


class TextEncoder:
    """Gives the ids of many texts at once, without special tokens.

    `tokenizer(texts)` also works out where each token stands in its text, and wraps each of them; the core
    of a fast tokenizer does neither in `encode_batch_fast`, which takes a quarter less time. It is used where
    the class leaves texts to the core, and gives what the call does on the first texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take any Hugging Face tokenizer, with a fast core or without."""
        self._tokenizer = tokenizer
        self._is_core_usable: bool | None = None if _leaves_texts_to_core(tokenizer) else False

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        if not texts:
            return []
        if self._is_core_usable is None:
            first = list(texts[:_TRIED])
            expected = self._by_call(first)  # which also sets the core's switches
            self._is_core_usable = self._is_core_set() and self._by_core(first) == expected
        if self._is_core_usable and self._is_core_set():
            return self._by_core(texts)
        return self._by_call(texts)

    def _by_call(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return cast("list[list[int]]", encoded["input_ids"])

    def _by_core(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _is_core_set(self) -> bool:
        """Whether the core's switches, which others may have turned, are as the call has them."""
        core = self._core
        splits = getattr(self._tokenizer, "split_special_tokens", False)
        return core.truncation is None and core.padding is None and core.encode_special_tokens == splits

    @property
    def _core(self) -> Any:
        return self._tokenizer.backend_tokenizer


def _leaves_texts_to_core(tokenizer: PreTrainedTokenizerBase) -> bool:
    methods = [method for name in _CALLS if (method := getattr(type(tokenizer), name, None)) is not None]
    own = [m for m in methods if not m.__module__.startswith("transformers.tokenization_utils")]
    core = getattr(tokenizer, "backend_tokenizer", None)
    return not own and hasattr(core, "encode_batch_fast") and hasattr(core, "encode_special_tokens")
