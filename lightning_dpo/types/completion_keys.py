"""What a completion is called where things are kept by it: a hash of its prompt's ids and its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lightning_dpo.types.completions import CompletionBatch

__all__ = ["KEY_WORDS", "KeyArray", "batch_keys", "completion_key", "keys_of_row"]

KeyArray: TypeAlias = npt.NDArray[np.uint64]
"""Keys, (completions, 2): 128 bits each."""

KEY_WORDS = 2

_Ids = npt.NDArray[np.int64]
_Mask = npt.NDArray[np.bool_]


def completion_key(prompt: _Ids, completion: _Ids, counted: _Mask | None = None) -> npt.NDArray[np.uint64]:
    """Key of a completion of a prompt, (2,).

    Args:
        prompt: Ids of the prompt.
        completion: Ids of the completion.
        counted: Whether each of the completion's tokens counts in what is kept; None where all do.
    """
    digest = hashlib.blake2b(digest_size=8 * KEY_WORDS)
    # The lengths come first: the same ids divided differently are another completion.
    digest.update(np.array([len(prompt), len(completion)], dtype="<i8").tobytes())
    digest.update(prompt.astype("<i8", copy=False).tobytes())
    digest.update(completion.astype("<i8", copy=False).tobytes())
    if counted is not None and not counted.all():
        digest.update(counted.astype("<u1").tobytes())
    return np.frombuffer(digest.digest(), dtype="<u8")


def keys_of_row(
    prompt: _Ids, completions: Sequence[_Ids], counted: Sequence[_Mask | None] | None = None
) -> KeyArray:
    """Keys of a row of the data: those that `batch_keys` gives for it in a batch of its kind.

    Args:
        prompt: Ids of the prompt.
        completions: Ids of both completions of a pair, or of the one that was judged.
        counted: For each completion whether each of its tokens counts; None where all do.

    Returns:
        For a pair the keys of both completions and then of the first part of each, (4, 2); else (1, 2).
    """
    masks = [None] * len(completions) if counted is None else list(counted)
    keys = [completion_key(prompt, ids, mask) for ids, mask in zip(completions, masks, strict=True)]
    if len(completions) == 1:
        return np.stack(keys)
    common = min(
        len(ids) if mask is None else int(mask.sum()) for ids, mask in zip(completions, masks, strict=True)
    )
    for place, (ids, mask) in enumerate(zip(completions, masks, strict=True)):
        length = common if mask is None else int(np.flatnonzero(mask)[common - 1]) + 1
        part = None if mask is None else mask[:length]
        keys.append(completion_key(prompt, ids[:length], part) if length < len(ids) else keys[place])
    return np.stack(keys)


def batch_keys(batch: CompletionBatch) -> tuple[KeyArray, KeyArray | None]:
    """Keys of a batch, worked out on the CPU; a batch that came from there is not read back.

    A completion's first tokens are a completion of the same prompt, and are kept as one.

    Returns:
        Key of each completion, (completions, 2); and of its first `common_lengths` tokens, or None.
    """
    batch = batch.host or batch
    prompts = _parts(batch.prompt_ids.cpu().numpy(), batch.prompt_lengths.tolist())
    completions = _parts(batch.completion_ids.cpu().numpy(), batch.completion_lengths.tolist())
    masks: list[Any] = [None] * len(batch)
    if batch.counted is not None:
        masks = _parts(batch.counted.numpy(), batch.completion_lengths.tolist())
    keys = np.empty((len(batch), KEY_WORDS), dtype=np.uint64)
    owners = batch.prompt_of.tolist()
    for row, (owner, completion) in enumerate(zip(owners, completions, strict=True)):
        keys[row] = completion_key(prompts[owner], completion, masks[row])
    if batch.common_lengths is None:
        return keys, None
    common = keys.copy()
    for row, length in enumerate(batch.common_lengths.tolist()):
        if length < len(completions[row]):
            mask = None if masks[row] is None else masks[row][:length]
            common[row] = completion_key(prompts[owners[row]], completions[row][:length], mask)
    return keys, common


def _parts(ids: npt.NDArray[Any], lengths: list[int]) -> list[npt.NDArray[Any]]:
    return np.split(ids, np.cumsum(lengths)[:-1])
