"""What a completion is called in the cache: a hash of its prompt's ids and its own, wherever it came from."""

from __future__ import annotations

from lightning_dpo.types.completion_keys import KEY_WORDS, KeyArray, batch_keys, completion_key

__all__ = ["KEY_WORDS", "KeyArray", "batch_keys", "completion_key"]
