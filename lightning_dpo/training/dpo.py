"""DPOModule: a policy, its reference and a preference loss as a LightningModule."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dpo.losses import DPOLoss, PreferenceLoss, UnpairedLoss
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.training.callbacks.startup_check import StartupCheck
from lightning_dpo.training.metrics import METRIC_NAMES, pair_statistics
from lightning_dpo.training.metrics.trouble_signs import TROUBLE_SIGNS, TroubleSigns, logratio_signs
from lightning_dpo.training.referenced import ReferencedModule
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import PairBatch, PairLogps
from lightning_dpo.types.devices import send

__all__ = ["DPOModule"]


class DPOModule(ReferencedModule):
    """Aligns a causal language model to preference pairs (https://arxiv.org/abs/2305.18290).

    Batches are `PairBatch`.

    Attributes:
        loss: The preference loss.
        trains_on_data: Whether training compares the completions of its data, whose margins it then needs.
    """

    batch_type = PairBatch
    metric_names = tuple(METRIC_NAMES.values())
    in_progress_bar = ("loss", "rewards/margin", "rewards/accuracy")
    trains_on_data: ClassVar[bool] = True
    shown_after_validation = ("loss", "rewards/accuracy")

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        loss: PreferenceLoss | None = None,
        startup_check: bool = True,
        **kwargs: Any,
    ) -> None:
        """Say what to train; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            loss: Any loss of `lightning_dpo.losses`; `DPOLoss(beta=0.1)` by default.
            startup_check: Stop if the first batch shows that policy and reference disagree at the start.
            kwargs: Arguments of `ReferencedModule`: `reference`, `reference_cache`, `optimizer`, `lora` and
                the others.

        Raises:
            ValueError: If arguments contradict each other.
        """
        super().__init__(policy, **kwargs)
        self.loss = DPOLoss() if loss is None else loss
        if isinstance(loss, UnpairedLoss):
            raise ValueError(
                f"`loss` must be a loss of pairs, such as DPOLoss, got {type(loss).__name__}; losses of "
                "judged completions belong to KTOModule"
            )
        if self.spec.kind == "none" and self.loss.needs_reference:
            raise ValueError(
                f'`reference="none"` does not go with {type(self.loss).__name__}, which compares with a '
                'reference; use reference="frozen" or a loss without one, such as SimPOLoss'
            )
        self._startup_check = startup_check
        self.val_signs = TroubleSigns()

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        """Names that a validation logs; the warning signs need a reference, and pairs that they are about."""
        return (*super().logged_metrics(), *(f"val/{name}" for name in TROUBLE_SIGNS))

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """Losses and rewards, which are in units of the loss and of its beta."""
        scaled = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin")
        return tuple(f"val/{name}" for name in scaled)

    @classmethod
    def cli_defaults(cls) -> dict[str, Any]:
        """The default loss, so that ``--model.loss.beta`` alone works."""
        return {"loss": {"class_path": "lightning_dpo.losses.DPOLoss"}}

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probabilities are computed: if the loss asks, or the user named one."""
        named = self.spec.is_cached or self.spec.kind in ("adapter", "model")
        return self.loss.needs_reference or named

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of every run, and the start-up check if it is wanted."""
        return [*super().configure_callbacks(), *([StartupCheck()] if self._startup_check else [])]

    def setup(self, stage: str) -> None:
        """Look at the data module, and refuse data that the loss cannot use, before a model is loaded.

        Raises:
            ValueError: If its batches are no pairs, or have no margins and the loss needs them, or weights
                and the loss compares pairs across the batch.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        for name in ("train", "validation"):
            pairs = getattr(data, f"{name}_pairs", None)
            if pairs is not None:
                asked = self.trains_on_data or name == "validation"
                _check_columns(pairs.store, loss=self.loss, margins=asked, argument=name)

    @outside_of_graphs
    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch's pairs; logs their means under train/, and how far they have moved."""
        loss: Tensor = super().training_step(batch, batch_idx)
        assert self.latest is not None
        policy, reference, weights = self.latest.policy, self.latest.reference, self.latest.weights
        if not self.is_logging_due:
            return loss
        if isinstance(policy, PairLogps) and isinstance(reference, PairLogps) and len(weights):
            for name, values in logratio_signs(policy, reference).items():
                mean = (values * weights).sum() / weights.sum()
                self.log(f"train/{name}", mean, batch_size=len(weights))
        return loss

    @outside_of_graphs
    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collect the batch's numbers."""
        super().validation_step(batch, batch_idx)
        assert self.latest is not None
        self.val_signs.update(self.latest)

    def on_validation_epoch_end(self) -> None:
        """Log means over all pairs of all ranks, and by which it shows that training goes wrong."""
        super().on_validation_epoch_end()
        self.log_dict({f"val/{name}": value for name, value in self.val_signs.compute().items()})
        self.val_signs.reset()

    def plan(self) -> ScoringPlan:
        """How the policy is scored, with the confidences that the loss may need."""
        return super().plan()._replace(confidences=self.loss.needs_confidence)

    def score(self, batch: PairBatch) -> tuple[PairLogps, PairLogps | None, int]:
        """Score a batch under policy and reference; the reference first, while no activations are held.

        Returns:
            The policy's log-probabilities, with the pairs' margins and weights where they have some, the
            reference's or None, and the tokens computed for each.
        """
        if not isinstance(batch, PairBatch):
            raise ValueError(
                f"`batch` must be a PairBatch for DPOModule, got {type(batch).__name__}; collate pairs with "
                "PairBatch.from_pairs, or train on judged completions with KTOModule"
            )
        completions = batch.completions()
        reference = self.reference.logps(completions, plan=self.plan())
        policy = PairLogps.of(self.logps(completions))
        if batch.margins is not None:
            policy = policy._replace(margins=send(batch.margins, policy.chosen.device))
        if not batch.weights.eq(1).all():
            policy = policy._replace(weights=send(batch.weights, policy.chosen.device))
        return (
            policy,
            None if reference is None else PairLogps.of(reference),
            self.num_tokens(completions),
        )

    def step(self, batch: PairBatch) -> StepOutput:
        """The preference loss of a batch of pairs, and what `lightning_dpo.training.metrics` names.

        Raises:
            ValueError: If pairs differ in weight and the loss compares pairs across the batch.
        """
        policy, reference, num_tokens = self.score(batch)
        weights = batch.weights
        if not weights.all():
            # Fillers were scored so that ranks stay in step; nothing else may see them.
            real = weights.nonzero().squeeze(1)
            weights, indices = weights[real], send(real, policy.chosen.device)
            policy = policy.select(indices)
            reference = None if reference is None else reference.select(indices)
        if self.loss.mixes_pairs and len(weights) and not weights.eq(weights[0]).all():
            raise ValueError(_weights_do_not_fit(self.loss))
        losses = self.loss(policy, reference)
        rewards = self.loss.rewards(policy.detach(), reference)
        statistics = pair_statistics(losses, policy, reference, rewards=rewards)
        return StepOutput.of(
            losses,
            batch,
            weights=weights,
            statistics=dict(zip(self.metric_names, statistics, strict=True)),
            num_tokens=num_tokens,
            policy=policy,
            reference=reference,
        )


def _check_columns(store: Any, *, loss: PreferenceLoss, margins: bool, argument: str) -> None:
    """Check that rows have the numbers that a loss needs, and none that it cannot use."""
    if margins and loss.needs_margins and store.margins is None:
        raise ValueError(
            f"`{argument}` must have a column `margin` in every row for {type(loss).__name__}, by how much "
            "the chosen completion's score is above the rejected one's, got none; name it with "
            '`columns={"margin": "your_column"}`, or choose DPOLoss'
        )
    if loss.mixes_pairs and store.weights is not None and (store.weights != store.weights[0]).any():
        raise ValueError(_weights_do_not_fit(loss))


def _weights_do_not_fit(loss: PreferenceLoss) -> str:
    return (
        f"`loss` must give each pair a loss of its own to be weighted, got {type(loss).__name__}, which "
        "compares pairs across the batch; leave the column `weight` out, or choose another loss"
    )
