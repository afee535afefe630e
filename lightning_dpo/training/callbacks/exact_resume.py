"""What makes a resumed run the one that was stopped: random numbers, the reference, the place in the data."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dpo.reference.base import AdapterReference

if TYPE_CHECKING:
    from lightning_dpo.training.dpo import DPOModule

__all__ = ["ExactResume", "mend_progress", "rescale_progress", "same_weights", "weight_sums"]

_MOVING = "moving"
_SEEDS = 2**32
_ROUNDING = 1e-9
"""Relative difference of two float64 sums of the same numbers in another order."""


class ExactResume(pl.Callback):
    """Lets a run that was stopped at any step go on as if it had not been.

    Random numbers (dropout, above all) are seeded at each batch by its place in the run and by the rank, so
    none depends on what happened before. The checkpoint says what the reference was, without its weights, and
    going on with another one is an error. On another number of ranks, the place in the epoch is converted.
    """

    def __init__(self) -> None:
        self._seed: int | None = None
        self._ranks: int | None = None
        self._reference: list[float] | str | None = None
        self._checked = False

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"seed": self._seed, "ranks": self._ranks, "reference": self._reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint; the number of ranks is this run's own."""
        self._seed, self._reference = state_dict["seed"], state_dict["reference"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the place in the data, and convert it to this run's number of ranks."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("ranks")
        ranks = _ranks(trainer)
        if saved is None or "loops" not in checkpoint:
            return
        mend_progress(checkpoint["loops"]["fit_loop"], by_steps=trainer.max_steps != -1)
        if saved == ranks:
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        ready = progress["current"]["ready"]
        # Batches filled by tokens are dealt out to ranks in an order that depends on how many there are.
        by_tokens = getattr(trainer.datamodule, "tokens_per_batch", None) is not None  # type: ignore[attr-defined]
        if ready and (by_tokens or ready * saved % ranks):
            rank_zero_warn(
                f"the run was saved on {saved} ranks within an epoch and goes on with {ranks}: "
                "some pairs of this epoch may be seen twice or not at all"
            )
        rescale_progress(progress, saved=saved, ranks=ranks)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the seed from what `seed_everything` set, if anything."""
        self._ranks = _ranks(trainer)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % _SEEDS)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed every generator by the place in the run."""
        place = [self._seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        seeds = np.random.SeedSequence([value or 0 for value in place]).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        random.seed(int(seeds[1]))
        np.random.seed(int(seeds[2]))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Compare the reference with the checkpoint's, before the first weight changes.

        Raises:
            ValueError: If it is another one.
        """
        if self._checked:
            return
        self._checked = True
        found = _reference_identity(pl_module)  # type: ignore[arg-type]
        saved, self._reference = self._reference, found
        if saved is not None and found is not None and not same_weights(saved, found):
            raise ValueError(
                "`reference` must be the one that the checkpoint was trained against, got another: rewards "
                "would be measured from somewhere else. Pass the same reference (and the same `policy`, if "
                "the reference is its copy), or begin a new run from the exported policy"
            )


def weight_sums(tensors: Iterator[tuple[str, Tensor]]) -> list[float]:
    """A few numbers that tell one set of weights from another, the same however weights are sharded.

    Args:
        tensors: Weights by name.

    Returns:
        How many elements there are, their sum and their sum of squares, both with tensors weighted by their
        place in the order of names.
    """
    count, total, squares = 0.0, 0.0, 0.0
    for place, (_, tensor) in enumerate(sorted(tensors, key=lambda item: item[0]), start=1):
        values = tensor.detach()
        if values.device.type == "mps":
            values = values.cpu()  # Apple's GPUs have no float64
        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
        count += values.numel()
        total += place * float(_whole(values.sum(dtype=torch.float64)))
        squares += place * float(_whole(norm)) ** 2
    return [count, total, squares]


def same_weights(one: list[float] | str, other: list[float] | str) -> bool:
    """Whether two identities are of the same weights, up to the order of summation."""
    if _MOVING in (one, other):
        return one == other
    if isinstance(one, str) or isinstance(other, str):
        # An identity of another kind says nothing: the same reference may be cached in one run only.
        return one == other or type(one) is not type(other)
    count, total, squares = one
    return (
        count == other[0]
        and abs(total - other[1]) <= _ROUNDING * math.sqrt(count * squares)
        and abs(squares - other[2]) <= _ROUNDING * squares
    )


def rescale_progress(progress: dict[str, Any], *, saved: int, ranks: int) -> None:
    """Convert Lightning's count of batches, in place, from one number of ranks to another."""
    for counts in (progress["current"], progress["total"]):
        ready = counts["ready"]
        scaled = ready * saved // ranks
        for key, value in counts.items():
            counts[key] = scaled - (ready - value)  # a batch that had not ended still has not


def mend_progress(loop: dict[str, Any], *, by_steps: bool) -> None:
    """Correct the place in the data that Lightning notes as an epoch or the run ends; changes `loop`.

    An epoch that `max_steps` or a callback cut short counts as done: a run that goes on would leave out the
    rest of it. After a whole epoch, one with `max_steps` would leave out the next epoch's number.

    Args:
        loop: The state of the fit loop.
        by_steps: Whether the run that goes on has a limit of steps.
    """
    epoch, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if not 0 < epoch["current"]["ready"] == epoch["current"]["processed"]:
        return
    if batches["current"]["ready"] and not batches["is_last_batch"]:
        for counts in (epoch["current"], epoch["total"]):
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]
    elif by_steps:
        for counts in (epoch["current"], epoch["total"]):
            counts["completed"] = counts["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)


def _ranks(trainer: pl.Trainer) -> int:
    sharing = trainer.distributed_sampler_kwargs
    return 1 if sharing is None else int(sharing["num_replicas"])


def _reference_identity(module: DPOModule) -> list[float] | str | None:
    reference = module.reference
    if module.reference_follows:
        return _MOVING  # and in the checkpoint
    if reference.identity is not None:
        return reference.identity
    if isinstance(reference, AdapterReference):
        return weight_sums(_base_weights(module.policy))
    if reference.model is None:
        return None
    return weight_sums(reference.model.named_parameters())


def _base_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in policy.named_parameters() if "lora_" not in name)


def _whole(total: Tensor) -> Tensor:
    return total.full_tensor() if isinstance(total, DTensor) else total
