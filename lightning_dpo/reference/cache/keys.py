"""What a completion is called in the cache: a hash of its prompt's ids and its own, wherever it came from."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dpo.types import CompletionBatch

__all__ = ["KEY_WORDS", "KeyArray", "batch_keys", "completion_key"]

KeyArray = npt.NDArray[np.uint64]
"""Keys, (completions, 2): 128 bits each."""

KEY_WORDS = 2

_Ids = npt.NDArray[np.int64]


def completion_key(
    prompt: _Ids, completion: _Ids, counted: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint64]:
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
