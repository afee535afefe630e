"""The reference that is served from the cache, and the model behind it for pairs that are not there yet."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_dpo.models.build import PolicySettings
from lightning_dpo.reference.base import Reference, evaluating
from lightning_dpo.reference.cache.keys import KeyArray, pair_keys, token_pairs
from lightning_dpo.reference.cache.shards import SUMS, Entries
from lightning_dpo.reference.cache.store import ReferenceCache, Space
from lightning_dpo.scoring.forward import ScoringPlan, rows_for, score
from lightning_dpo.scoring.layout import Rows
from lightning_dpo.types import PairBatch, PairLogps, TokenPair

__all__ = ["CachedReference", "ReferenceSource", "StartingPolicy"]

_log = logging.getLogger(__name__)


class StartingPolicy(Reference):
    """The policy itself, as long as nothing has changed it: until then it is the reference.

    Attributes:
        is_unchanged: Whether the policy still has the weights it started with.
    """

    def __init__(self, policy: nn.Module) -> None:
        """Watch a policy from now on."""
        self._policy = policy
        self.is_unchanged = True
        self.watch()

    def leave(self) -> None:
        """The policy is about to change."""
        self.is_unchanged = False

    def watch(self) -> None:
        """Take the policy's tensors as they are for unchanged, such as after a strategy has set them up."""
        # By number, not by reference: the memory of tensors that are replaced must go.
        self._versions = {id(p): p._version for p in self._policy.parameters() if not p.is_inference()}

    def check(self) -> None:
        """Notice if a tensor was written to since `watch`."""
        versions = {id(p): p._version for p in self._policy.parameters() if not p.is_inference()}
        if versions != self._versions and not _is_sharded(self._policy):
            self.leave()

    @torch.no_grad()
    def logps(
        self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False
    ) -> PairLogps:
        """One forward pass of the policy, in eval mode."""
        assert self.is_unchanged, "the policy is not what it was at the start"
        with evaluating(self._policy):
            return score(self._policy, batch, plan=plan, rows=rows, confidence=confidence)


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
    """Serves log-probabilities by pair; the model behind them is brought up only if one is missing.

    Missing pairs of the trainer's data are computed before training begins (`lightning_dpo.reference.fill`),
    by the policy itself while it is unchanged. A pair that is first seen in training is computed then.
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
            source: What computes missing pairs.
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
        self._computing: Reference | None = None
        self._is_unwritable = False
        self.passes = 0

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
        """See `Reference`."""
        return self._weights

    @property
    def disagreement(self) -> str:
        """See `Reference`."""
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
        """Whether every pair must be computed before training: later the weights would be gone, or sharded.

        Under sharding a forward pass takes all ranks, and only some may miss a pair.
        """
        return self.is_sharded or not self._source.outlives_start

    @property
    def is_sharded(self) -> bool:
        """Whether the policy is divided over processes."""
        return _is_sharded(self._policy)

    def open(self) -> ReferenceCache:
        """Find the cache that belongs to the precision at hand, for a run that begins.

        Call it as the policy is called: on its device, under autocast if the trainer uses that.
        """
        parameter = next(p for p in self._policy.parameters() if p.is_floating_point())
        kind = parameter.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        space = Space(
            weights=self._weights,
            dtype=f"{self._settings.dtype} as {parameter.dtype}",
            # Sharded weights are gathered in autocast's type, all of them; autocast itself leaves some alone.
            precision=f"{autocast}{' gathered' if autocast and self.is_sharded else ''} "
            f"{torch.get_float32_matmul_precision()}",
            attention=self._settings.attn_implementation or "default",
        )
        self._cache = ReferenceCache(self._root, space=space)
        self.passes = 0
        return self._cache

    def logps(
        self, batch: PairBatch, *, rows: Rows, plan: ScoringPlan, confidence: bool = False
    ) -> PairLogps:
        """Look the batch up; what is missing is computed.

        No loss reads the reference's confidences, so there are none.

        Raises:
            ValueError: If a pair is missing and the reference's weights are no longer there.
        """
        keys = pair_keys(batch)
        entries, here = self.cache.find(keys)
        if not here.all():
            self.check_policy()
            if self.needs_all and not self._is_start_at_hand:
                raise ValueError(
                    f'`reference="cached"` has no log-probabilities of {int((~here).sum())} pairs of a batch '
                    f"and the reference ({self.name}) cannot be run in the middle of training; let the data "
                    "loader have a length, so that they are computed before, or give `policy` by name"
                )
            pairs = token_pairs(batch)
            missing = np.flatnonzero(~here)
            self.compute([pairs[row] for row in missing], keys[missing], plan=plan)
            if self.cache.is_flush_due:
                self.save()
            entries, here = self.cache.find(keys)
            assert here.all(), "what was computed is found"
        return self._served(entries, batch)

    def compute(self, pairs: list[TokenPair], keys: KeyArray, *, plan: ScoringPlan) -> None:
        """Run the reference on pairs and keep what comes out; writing is left to the cache's `flush`.

        Raises:
            ValueError: If the reference's weights are gone, or it gives anything but numbers.
        """
        batch = PairBatch.from_pairs(pairs)
        logps = self._run(batch, plan=plan)
        self.passes += 1
        sums = torch.stack([getattr(logps, name) for name in SUMS], dim=1).cpu().numpy()
        if not np.isfinite(sums).all():
            raise ValueError(
                f"the reference ({self.name}) gave log-probabilities that are not finite for "
                f"{int((~np.isfinite(sums)).any(axis=1).sum())} of {len(pairs)} pairs; "
                "check its weights and the trainer's precision"
            )
        lengths = torch.stack([batch.chosen_lengths, batch.rejected_lengths], dim=1)
        self.cache.add(Entries(keys, sums, lengths.numpy().astype(np.int32)))

    def keep_in_step(self, *, plan: ScoringPlan) -> None:
        """Run the reference for the sake of other ranks, which have pairs left and need this one's shards."""
        self._run(PairBatch.from_pairs([TokenPair([0], [0], [0])]), plan=plan)

    def save(self) -> None:
        """Write what was computed in training, which goes on where that cannot be done."""
        if self._is_unwritable:
            return
        try:
            self.cache.flush()
        except OSError as error:
            self._is_unwritable = True
            _log.warning(
                "%s cannot be written: reference log-probabilities of %d pairs last for this run only (%s)",
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

    def _run(self, batch: PairBatch, *, plan: ScoringPlan) -> PairLogps:
        batch = batch.to(next(self._policy.parameters()).device)
        rows = rows_for(batch, model=self._policy, plan=plan)
        logps = self._running().logps(batch, rows=rows, plan=plan)
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

    def _served(self, entries: Entries, batch: PairBatch) -> PairLogps:
        device = batch.prompt_ids.device
        lengths = torch.stack([batch.chosen_lengths, batch.rejected_lengths], dim=1)
        assert (lengths.numpy() == entries.lengths).all(), "a pair's key says its lengths"
        sums: Tensor = torch.from_numpy(entries.sums).to(device, non_blocking=True)
        values: dict[str, Any] = dict(zip(SUMS, sums.unbind(1), strict=True))
        counts = lengths.to(device, non_blocking=True)
        return PairLogps(**values, chosen_lengths=counts[:, 0], rejected_lengths=counts[:, 1])


def _is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of a model's parameters, under either version of FSDP."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(part, FullyShardedDataParallel) for part in model.modules()
    )
