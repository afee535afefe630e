"""DPOModule: a policy, its reference and a preference loss as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_dpo.losses import DPOLoss, PreferenceLoss, UnpairedLoss
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.training.callbacks.startup_check import StartupCheck
from lightning_dpo.training.metrics import METRIC_NAMES, pair_statistics
from lightning_dpo.training.referenced import ReferencedModule
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import PairBatch, PairLogps

__all__ = ["DPOModule"]


class DPOModule(ReferencedModule):
    """Aligns a causal language model to preference pairs (https://arxiv.org/abs/2305.18290).

    Batches are `PairBatch`.

    Attributes:
        loss: The preference loss.
    """

    batch_type = PairBatch
    metric_names = tuple(METRIC_NAMES.values())
    in_progress_bar = ("loss", "rewards/margin", "rewards/accuracy")
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

    def plan(self) -> ScoringPlan:
        """How the policy is scored, with the confidences that the loss may need."""
        return super().plan()._replace(confidences=self.loss.needs_confidence)

    def score(self, batch: PairBatch) -> tuple[PairLogps, PairLogps | None, int]:
        """Score a batch under policy and reference; the reference first, while no activations are held.

        Returns:
            The policy's log-probabilities, with the pairs' margins where they have some, the reference's or
            None, and the tokens computed for each.
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
            policy = policy._replace(margins=batch.margins.to(policy.chosen.device, non_blocking=True))
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
            weights, indices = weights[real], real.to(policy.chosen.device)
            policy = policy.select(indices)
            reference = None if reference is None else reference.select(indices)
        if self.loss.mixes_pairs and len(weights) and not weights.eq(weights[0]).all():
            raise ValueError(
                f"`loss` must give each pair a loss of its own to be weighted, got "
                f"{type(self.loss).__name__}, which compares pairs across the batch; leave the column "
                "`weight` out, or choose another loss"
            )
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
