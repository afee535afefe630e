"""What makes a resumed run the one that was stopped: random numbers, the reference, the place in the data."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_dpo.models.weight_sums import same_weights

__all__ = ["MOVING", "ExactResume", "mend_progress", "rescale_progress"]

MOVING = "moving"
"""Identity of a reference that follows the policy: its weights are in the checkpoint."""

_SEEDS = 2**32


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
        """Keep in a checkpoint what a resumed run needs."""
        return {"seed": self._seed, "ranks": self._ranks, "reference": self._reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take seed and reference from a checkpoint; the number of ranks is this run's own."""
        self._seed, self._reference = state_dict["seed"], state_dict["reference"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct the place in the data, and convert it to this run's number of ranks."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("ranks")
        ranks = _ranks(trainer)
        if saved is None or "loops" not in checkpoint:
            return
        if getattr(trainer.datamodule, "streaming", False):  # type: ignore[attr-defined]
            # A stream's epoch is as long as the run: one that goes on for longer goes on within it.
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
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
        identify = getattr(pl_module, "reference_identity", None)
        found = None if identify is None else identify()
        saved, self._reference = self._reference, found
        moving = MOVING in (saved, found) and saved != found
        if saved is not None and found is not None and (moving or not same_weights(saved, found)):
            raise ValueError(
                "`reference` must be the one that the checkpoint was trained against, got another: rewards "
                "would be measured from somewhere else. Pass the same reference (and the same `policy`, if "
                "the reference is its copy), or begin a new run from the exported policy"
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
