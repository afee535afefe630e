"""The command `lightning-dpo precompute`: fill the reference cache from a recipe, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_dpo.reference.spec import ReferenceSpec
from lightning_dpo.training.cli import DPOCLI, class_arguments

__all__ = ["PrecomputeCLI", "PrecomputeTrainer", "run"]

_WITHOUT_TRAINING: dict[str, Any] = {
    "max_epochs": 0,
    "max_steps": -1,
    "num_sanity_val_steps": 0,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "overfit_batches": 0.0,
    "fast_dev_run": False,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "callbacks": None,
}
"""What a recipe's trainer gets in place of its own settings; devices, strategy and precision stay."""


class PrecomputeTrainer(pl.Trainer):
    """A trainer that starts up as for training, whatever the strategy, and stops before the first step."""

    def precompute(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> None:
        """Computes the reference log-probabilities that the cache lacks.

        Args:
            model: A DPOModule whose reference is cached.
            datamodule: Its data.
            ckpt_path: Of the recipe; not used, since the reference is what training starts from.
            weights_only: Of the recipe; not used.
        """
        self.fit(model, datamodule=datamodule)


class PrecomputeCLI(DPOCLI):
    """The recipe of `fit`, read the same way; its reference is cached and its trainer takes no step."""

    def __init__(self, *, args: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Parse and run.

        Args:
            args: Command line without the program's name; by default the process's.
            kwargs: For DPOCLI.

        Raises:
            ValueError: If the recipe has no reference that could be cached, or filling the cache fails.
        """
        super().__init__(args=args, trainer_class=PrecomputeTrainer, save_config_callback=None, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one command."""
        return {"precompute": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        """Turn the recipe into one that fills the cache.

        Raises:
            ValueError: If the module has no reference, or one without a name.
        """
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        model = class_arguments(config.model)
        if "reference" not in model:
            raise ValueError(
                "`precompute` needs a module with the argument `reference`, such as DPOModule; "
                f"got {config.model.get('class_path') or 'a module without it'}"
            )
        model["reference"] = str(ReferenceSpec.parse(model["reference"]).cached())
        for name, value in _WITHOUT_TRAINING.items():
            config.trainer[name] = value
        self.trainer_defaults.pop("callbacks", None)


def run(arguments: Sequence[str]) -> None:
    """Fill the cache.

    Args:
        arguments: What follows `lightning-dpo precompute`.
    """
    PrecomputeCLI(args=["precompute", *arguments])
