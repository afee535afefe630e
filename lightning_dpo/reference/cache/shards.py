"""Log-probabilities of some completions as one file, whose name is the checksum of its content."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from lightning_dpo.reference.cache.keys import KEY_WORDS, KeyArray

__all__ = ["DamagedShardError", "Entries", "decode", "encode", "join"]

_SUFFIX = ".safetensors"


class DamagedShardError(Exception):
    """A file is not what was written: torn, altered, or of another reference."""


class Entries(NamedTuple):
    """Log-probabilities of completions, by key.

    Attributes:
        keys: (completions, 2).
        logps: Sums over completion tokens, natural log, (completions,).
        lengths: Tokens of each completion, (completions,).
    """

    keys: KeyArray
    logps: npt.NDArray[np.floating]
    lengths: npt.NDArray[np.int32]

    @classmethod
    def empty(cls) -> Entries:
        """No completions."""
        return cls(np.empty((0, KEY_WORDS), np.uint64), np.empty(0, np.float32), np.empty(0, np.int32))

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Entries:
        """The completions of a mask or of these numbers."""
        return Entries(self.keys[rows], self.logps[rows], self.lengths[rows])


def join(parts: list[Entries]) -> Entries:
    """All completions of several, in order."""
    if not parts:
        return Entries.empty()
    return Entries(*map(np.concatenate, zip(*parts, strict=True)))


def encode(entries: Entries, *, space: str) -> tuple[str, bytes]:
    """A file's name and content.

    Args:
        entries: What to write.
        space: Which reference it is of; kept in the file, so that a file that is moved is not believed.
    """
    # One entry of metadata only: several are written in any order, and the name would depend on it.
    data = safetensors.save(entries._asdict(), metadata={"space": space})
    return _checksum(data) + _SUFFIX, data


def decode(name: str, data: bytes, *, space: str) -> Entries:
    """Read a file back.

    Raises:
        DamagedShardError: If the content is not what was written under this name, saying how.
    """
    if _checksum(data) + _SUFFIX != name:
        raise DamagedShardError(f"its {len(data)} bytes do not have the checksum in its name")
    try:
        tensors = safetensors.load(data)
        size = int.from_bytes(data[:8], "little")
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedShardError(f"it cannot be read: {error}") from error
    if f'"space":"{space}"'.encode() not in data[8 : 8 + size]:
        raise DamagedShardError("it is of another reference")
    return Entries(**tensors)


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()
