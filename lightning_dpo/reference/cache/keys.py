"""What a pair is called in the cache: a hash of its token ids, whatever batch, row or file it came in."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from lightning_dpo.types import PairBatch, TokenPair

__all__ = ["KEY_WORDS", "KeyArray", "pair_keys", "token_pairs"]

KeyArray = npt.NDArray[np.uint64]
"""Keys, (pairs, 2): 128 bits each."""

KEY_WORDS = 2


def pair_keys(batch: PairBatch) -> KeyArray:
    """Key of each pair, (batch, 2), worked out on the CPU; a batch that came from there is not read back."""
    keys = np.empty((len(batch), KEY_WORDS), dtype=np.uint64)
    for row, parts in enumerate(_parts(batch)):
        digest = hashlib.blake2b(digest_size=8 * KEY_WORDS)
        # The lengths come first: the same ids divided differently are another pair.
        digest.update(np.array([len(part) for part in parts], dtype="<i8").tobytes())
        for part in parts:
            digest.update(part.astype("<i8", copy=False).tobytes())
        keys[row] = np.frombuffer(digest.digest(), dtype="<u8")
    return keys


def token_pairs(batch: PairBatch) -> list[TokenPair]:
    """The pairs of a batch, one by one; their ids are arrays."""
    return [TokenPair(*parts) for parts in _parts(batch)]  # type: ignore[arg-type]


def _parts(batch: PairBatch) -> list[tuple[npt.NDArray[np.int64], ...]]:
    batch = batch.host or batch
    columns = []
    for name in ("prompt", "chosen", "rejected"):
        ids = getattr(batch, f"{name}_ids").cpu().numpy()
        ends = getattr(batch, f"{name}_lengths").cumsum(0).tolist()
        columns.append(np.split(ids, ends[:-1]))
    return list(zip(*columns, strict=True))
