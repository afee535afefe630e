"""Callbacks that average weights, and would average none."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["check_averaging"]


def check_averaging(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse a StochasticWeightAveraging that has copied a module without its policy.

    It copies the module in its `setup`, before the trainer lets the policy be built, and then averages the
    copy's weights, of which there are none.

    Args:
        trainer: The module's.
        module: One that builds its `policy` in `configure_model`.

    Raises:
        ValueError: If a fit begins with such a callback and the policy is not there yet.
    """
    if trainer.state.fn != TrainerFn.FITTING or "policy" in module._modules:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks):
        raise ValueError(
            "`callbacks` must not have StochasticWeightAveraging while the policy is not built, since it "
            "copies the module before that and would average nothing: call `module.configure_model()` before "
            "`fit`, or use Lightning's WeightAveraging or EMAWeightAveraging, which do so by themselves"
        )
