"""What a run took from the cache, counted by prompts with their completions: by pairs, usually."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_dpo.reference.cache.keys import KEY_WORDS, KeyArray

__all__ = ["CacheUsage", "UsageCount", "distinct"]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no bit of a key is lost; 2^64 over the golden ratio."""

_Flags = npt.NDArray[np.bool_]


class CacheUsage(NamedTuple):
    """What a run took from the cache.

    Attributes:
        passes: Forward passes of the reference, on all ranks.
        pairs: Different prompts with their completions that were asked for.
        from_cache: Those of them whose log-probabilities were all there when the run began.
        damaged: Shards that were found damaged.
    """

    passes: int
    pairs: int
    from_cache: int
    damaged: int = 0

    def __str__(self) -> str:
        damaged = f"; {self.damaged} damaged shards were set aside" if self.damaged else ""
        return (
            f"reference passes: {self.passes} "
            f"({self.from_cache} of {self.pairs} pairs from the cache{damaged})"
        )


class UsageCount:
    """Which prompts with their completions one process asked for; about 17 bytes each are held."""

    def __init__(self) -> None:
        self._keys: list[KeyArray] = [np.empty((0, KEY_WORDS), np.uint64)]
        self._fresh: list[_Flags] = [np.empty(0, np.bool_)]
        self._added = 0

    def note(self, keys: KeyArray, prompt_of: npt.NDArray[np.int64], fresh: _Flags) -> None:
        """Count a lookup.

        Args:
            keys: Of the completions, (completions, 2).
            prompt_of: The prompt of each, (completions,).
            fresh: Whether each was computed in this run, or is still to be, (completions,).
        """
        prompts = int(prompt_of.max()) + 1
        order = np.argsort(prompt_of, kind="stable")
        owners = prompt_of[order]
        place = np.arange(len(owners)) - np.searchsorted(owners, owners)  # among its prompt's completions
        # Keys are as good as random: sums in which each place has its own factor tell them apart.
        joined = np.zeros((prompts, KEY_WORDS), np.uint64)
        np.add.at(joined, owners, keys[order] * (_FACTOR + 2 * place.astype(np.uint64))[:, None])
        computed = np.zeros(prompts, np.bool_)
        np.logical_or.at(computed, prompt_of, fresh)
        self._keys.append(joined)
        self._fresh.append(computed)
        self._added += prompts
        if self._added > len(self._keys[0]) + 2**16:
            self.counted()

    def counted(self) -> tuple[KeyArray, _Flags]:
        """Each one that was asked for, once, and whether it was computed in this run."""
        keys, fresh = distinct(np.concatenate(self._keys), np.concatenate(self._fresh))
        self._keys, self._fresh, self._added = [keys], [fresh], 0
        return keys, fresh


def distinct(keys: KeyArray, fresh: _Flags) -> tuple[KeyArray, _Flags]:
    """Keys once each, (different, 2), with the flag that each had where it first stands."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable
    ordered = keys[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[is_new], fresh[order[is_new]]
