"""The reference that is served from the cache, and the model behind it for what is not there yet."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.models.precision import autocast_dtype, has_frequencies, matmul_precision
from lightning_dpo.models.unwrap import is_sharded
from lightning_dpo.reference.base import Reference
from lightning_dpo.reference.cache.keys import KeyArray, batch_keys
from lightning_dpo.reference.cache.shards import Entries
from lightning_dpo.reference.cache.store import Lookup, ReferenceCache, Space
from lightning_dpo.reference.cache.usage import UsageCount
from lightning_dpo.reference.starting_policy import StartingPolicy
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.types import CompletionBatch, CompletionLogps

__all__ = ["CachedReference", "ReferenceSource"]

_log = logging.getLogger(__name__)

_AT_ONCE = 2**16
"""Rows that are looked up at a time."""


class ReferenceSource(NamedTuple):
    """What computes log-probabilities that the cache does not have.

    Attributes:
        name: What errors and the start-up check call it.
        load: Brings the model up; raises ValueError if its weights are gone.
        start: The policy in the place of the model, while it is unchanged; None if the reference is another.
        outlives_start: Whether `load` works in the middle of training, too.
    """

    name: str
    load: Callable[[], Reference]
    start: StartingPolicy | None = None
    outlives_start: bool = True


class CachedReference(Reference):
    """Serves log-probabilities by completion; the model behind them is brought up only if one is missing.

    What is missing of the trainer's data is computed before training begins (`lightning_dpo.reference.fill`),
    by the policy itself while it is unchanged. What is first seen in training is computed then.
    """

    can_update = False

    def __init__(
        self,
        source: ReferenceSource,
        *,
        root: str,
        weights: str,
        settings: PolicySettings,
        policy: nn.Module,
    ) -> None:
        """Describe the reference; nothing is read yet.

        Args:
            source: What computes missing log-probabilities.
            root: Folder or fsspec URL of the cache.
            weights: Identity of the reference's weights.
            settings: How models are loaded.
            policy: The policy; says how the trainer runs models.
        """
        self._source = source
        self._root = root
        self._weights = weights
        self._settings = settings
        self._policy = policy
        self._cache: ReferenceCache | None = None
        self._device: torch.device | None = None
        self._computing: Reference | None = None
        self._is_unwritable = False
        self.usage = UsageCount()

    @property
    def model(self) -> nn.Module | None:
        """The reference's own weights while they are loaded, which they need not be."""
        return None if self._computing is None else self._computing.model

    @property
    def name(self) -> str:
        """What the reference was made from."""
        return self._source.name

    @property
    def identity(self) -> str:
        """Identity of the reference's weights."""
        return self._weights

    @property
    def disagreement(self) -> str:
        """What likely explains that the policy disagrees at the start."""
        return (
            f"the reference ({self.name}) is not what the policy starts from, or the policy was trained "
            f"before this run; if neither is so, remove {self.cache.location}, which holds the cached values"
        )

    @property
    def cache(self) -> ReferenceCache:
        """The cache of this reference; opened the first time."""
        if self._cache is None:
            self.open().load()
        assert self._cache is not None
        return self._cache

    @property
    def is_open(self) -> bool:
        """Whether a run has begun."""
        return self._cache is not None

    @property
    def needs_all(self) -> bool:
        """Whether everything must be computed before training: later the weights would be gone, or sharded.

        Under sharding a forward pass takes all ranks, and only some may miss a completion.
        """
        return self.is_sharded or not self._source.outlives_start

    @property
    def is_sharded(self) -> bool:
        """Whether the policy is divided over processes."""
        return is_sharded(self._policy)

    @property
    def device(self) -> torch.device:
        """Where the policy's inputs go."""
        kept = next(self._policy.parameters()).device
        return self._device if self._device is not None and self.is_sharded else kept

    def open(self, *, device: torch.device | None = None) -> ReferenceCache:
        """Find the cache that belongs to the precision at hand, for a run that begins.

        Call it as the policy is called: on its device, under autocast if the trainer uses that.

        Args:
            device: Where the policy's inputs go; None is where its weights are, which shards that are kept
                in the CPU's memory are not.
        """
        self._device = device
        parameter = next(p for p in self._policy.parameters() if p.is_floating_point())
        autocast = autocast_dtype(self.device)
        space = Space(
            weights=self._weights,
            dtype=f"{self._settings.dtype} as {parameter.dtype}{self._frequencies(parameter.dtype)}",
            # Sharded weights are gathered in autocast's type, all of them; autocast itself leaves some alone.
            precision=f"{autocast}{' gathered' if autocast and self.is_sharded else ''} "
            f"{matmul_precision(self.device)}",
            attention=self._settings.attn_implementation or "default",
        )
        self._cache = ReferenceCache(self._root, space=space)
        self._cache.mention_older()
        self.passes = 0
        self.usage = UsageCount()
        return self._cache

    def logps(self, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps:
        """Look the batch up; what is missing is computed.

        Raises:
            ValueError: If something is missing and the reference's weights are no longer there.
        """
        found = self.look_up(batch)
        if not found.found.all():
            self.check_policy()
            missing = missing_prompts(batch, found)
            if self.needs_all and not self._is_start_at_hand:
                raise ValueError(
                    f'`reference="cached"` has no log-probabilities of {len(missing)} pairs of a batch '
                    f"and the reference ({self.name}) cannot be run in the middle of training; let the data "
                    "loader have a length, so that they are computed before, or give `policy` by name"
                )
            self.compute((batch.host or batch).select(missing), plan=plan)
            if self.cache.is_flush_due:
                self.save()
            found = self.look_up(batch)
            assert found.found.all(), "what was computed is found"
        return _served(found, batch)

    def look_up(self, batch: CompletionBatch) -> Lookup:
        """What the cache has of a batch: its completions, then the first part of each where that is asked.

        Args:
            batch: Prompts and completions; counted as asked for.
        """
        keys, common = batch_keys(batch)
        found = self.cache.find(keys if common is None else np.concatenate([keys, common]))
        count = len(keys)
        fresh = found.fresh.reshape(-1, count).max(axis=0)
        self.usage.note(keys, batch.prompt_of.numpy(), fresh)
        return found

    def look_up_rows(self, keys: KeyArray) -> npt.NDArray[np.bool_]:
        """Whether the cache has all of each row of the data, by keys that lie beside the tokens.

        Args:
            keys: Of each row's completions, then of their first parts where these are asked for,
                (rows, keys of a row, 2); counted as asked for.
        """
        known = np.empty(len(keys), np.bool_)
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            rows, width, words = part.shape
            found = self.cache.find(part.reshape(-1, words))
            known[start : start + rows] = found.found.reshape(rows, width).all(axis=1)
            completions = max(1, width // 2)
            self.usage.note(
                part[:, :completions].reshape(-1, words),
                np.repeat(np.arange(rows, dtype=np.int64), completions),
                np.repeat(found.fresh.reshape(rows, width).any(axis=1), completions),
            )
        return known

    def compute(self, batch: CompletionBatch, *, plan: ScoringPlan) -> None:
        """Run the reference and keep what comes out; writing is left to the cache's `flush`.

        Args:
            batch: Prompts and completions, on the CPU.
            plan: How the policy is scored.

        Raises:
            ValueError: If the reference's weights are gone, or it gives anything but numbers.
        """
        scored = self._run(batch, plan=plan)
        self.passes += 1
        keys, common = batch_keys(batch)
        parts = [(keys, scored.logps, batch.completion_lengths)]
        if common is not None:
            assert scored.common is not None
            assert batch.common_lengths is not None
            parts.append((common, scored.common, batch.common_lengths))
        for names, logps, lengths in parts:
            values = logps.cpu().numpy()
            if not np.isfinite(values).all():
                wrong = np.unique(batch.prompt_of.numpy()[~np.isfinite(values)])
                raise ValueError(
                    f"the reference ({self.name}) gave log-probabilities that are not finite for "
                    f"{len(wrong)} of {len(batch.prompt_lengths)} pairs; "
                    "check its weights and the trainer's precision"
                )
            self.cache.add(Entries(names, values, lengths.numpy().astype(np.int32)))

    def keep_in_step(self, *, plan: ScoringPlan) -> None:
        """Run the reference for the sake of other ranks, which have work left and need this one's shards."""
        self._run(CompletionBatch.from_lists([[0]], [[[0]]]), plan=plan)

    def save(self) -> None:
        """Write what was computed in training, which goes on where that cannot be done."""
        if self._is_unwritable:
            return
        try:
            self.cache.flush()
        except OSError as error:
            self._is_unwritable = True
            _log.warning(
                "%s cannot be written: %d reference log-probabilities last for this run only (%s)",
                self.cache.location,
                self.cache.waiting,
                error,
            )

    def check_policy(self) -> None:
        """Notice if the policy was changed by hand since it was last looked at."""
        if self._source.start is not None:
            self._source.start.check()

    def policy_is_set_up(self) -> None:
        """Whatever was written to the policy until now was the trainer's strategy, not a change."""
        if self._source.start is not None:
            self._source.start.watch()

    def policy_changes(self) -> None:
        """From now on the policy is not the reference any more."""
        if self._source.start is not None:
            self._source.start.leave()

    def release(self) -> None:
        """Drop a model that was brought up; it comes back if it is needed again."""
        if self._computing is None:
            return
        self._computing = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def _is_start_at_hand(self) -> bool:
        return self._source.start is not None and self._source.start.is_unchanged

    def _frequencies(self, kept: torch.dtype) -> str:
        """Sets values of 16-bit weights apart from those of older versions, which rounded frequencies too."""
        has_any = kept.itemsize < 4 and has_frequencies(self._policy)
        return " with float32 frequencies" if has_any else ""

    def _run(self, batch: CompletionBatch, *, plan: ScoringPlan) -> CompletionLogps:
        logps = self._running().logps(batch.to(self.device), plan=plan)
        assert logps is not None, "a source is a model"
        return logps

    def _running(self) -> Reference:
        if self._is_start_at_hand:
            assert self._source.start is not None
            return self._source.start
        if self._computing is None:
            self._computing = self._source.load()
            self._computing.match(self._policy)
        return self._computing


def missing_prompts(batch: CompletionBatch, found: Lookup) -> Tensor:
    """Numbers of the prompts of which a log-probability is missing, in order, (missing,)."""
    here = found.found.reshape(-1, len(batch)).min(axis=0)
    return torch.from_numpy(np.unique(batch.prompt_of.numpy()[~here]))


def _served(found: Lookup, batch: CompletionBatch) -> CompletionLogps:
    device, count = batch.prompt_ids.device, len(batch)
    lengths, counted = batch.completion_lengths, batch.counted_lengths
    assert (found.lengths[:count] == lengths.numpy()).all(), "a completion's key says its length"
    logps = torch.from_numpy(found.logps).to(device, non_blocking=True)
    common = None if batch.common_lengths is None else logps[count:]
    return CompletionLogps(logps[:count], counted.to(device, non_blocking=True), common)
