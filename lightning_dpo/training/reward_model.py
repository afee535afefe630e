"""RewardModule: a reward model fitted to preference pairs, on any causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_dpo.evaluation.calibration import Calibration, RewardCalibration
from lightning_dpo.files import write_file
from lightning_dpo.functional import bradley_terry_loss
from lightning_dpo.models.classifier import has_classifier
from lightning_dpo.models.scalar_head import ScalarHead, freeze_head
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.parallel import Sharding, shard_head
from lightning_dpo.scoring.forward import ScoringPlan, completion_states, lay_out
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.scoring.lm_head import require_head
from lightning_dpo.scoring.select import require_states
from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.saving.model_record import ModelRecord
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import CompletionBatch, PairBatch
from lightning_dpo.types.devices import send

__all__ = ["RewardModule"]

_HEAD = "reward_head"
_CALIBRATION = {"error": "val/calibration/ece", "length_correlation": "val/rewards/length_correlation"}
"""Under which name each number of a `Calibration` is logged."""


class RewardModule(PolicyModule):
    """Fits a Bradley-Terry reward to preference pairs, Eq. 1 and 2 of https://arxiv.org/abs/2305.18290.

    A completion's reward is a linear map of the model's last hidden state at the completion's last token,
    its end-of-sequence token. Batches are `PairBatch`; where they have `margins`, rewards are to differ by
    these at least (https://arxiv.org/abs/2307.09288). Prompts are computed once per pair, as for DPO.

    `export` writes a folder for `AutoModelForSequenceClassification`, whose one logit is the reward.

    Attributes:
        reward_head: The linear map, after `configure_model`.
        calibration: What the last validation found out about the rewards, or None.
    """

    metric_names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
    in_progress_bar = ("loss", "rewards/accuracy")

    def __init__(self, policy: str | nn.Module, **kwargs: Any) -> None:
        """Say what to train; nothing is loaded before `configure_model`.

        Args:
            policy: The causal language model that the reward is put on: a folder, a hub id, a .gguf file,
                ``package:NAME/FILE``, a PreTrainedModel, or a network that offers its hidden states as
                `lightning_dpo.models.own` asks.
            kwargs: Arguments of `PolicyModule`: `optimizer`, `lora`, `layout` and the others.

        Raises:
            ValueError: If the policy shows no hidden states, or arguments contradict each other.
        """
        super().__init__(policy, **kwargs)
        if isinstance(policy, nn.Module):
            require_head(policy, use="rewards")
        self.calibration: Calibration | None = None
        self.val_calibration = RewardCalibration()

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        """Names that a validation logs, without those of callbacks."""
        return (*super().logged_metrics(), *_CALIBRATION.values())

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """Rewards, which pairs leave open by a constant a prompt, and margins: larger is not better."""
        return tuple(f"val/rewards/{name}" for name in ("chosen", "rejected", "margin"))

    def on_policy_built(self, policy: nn.Module, sharding: Sharding | None) -> None:
        """Put the reward's head beside the policy; the policy's own is not trained, since nothing uses it."""
        output_head = require_head(policy, use="rewards")
        if isinstance(causal_lm(policy), PreTrainedModel) and not has_classifier(policy):
            rank_zero_warn(
                "the reward model can be trained but not exported: transformers has no sequence "
                f"classification for {type(causal_lm(policy)).__name__}"
            )
        freeze_head(policy, output_head=output_head)
        self.reward_head = ScalarHead.of(policy, output_head=output_head)
        if sharding is not None:
            shard_head(self.reward_head, sharding)

    def trained_modules(self) -> list[nn.Module]:
        """The policy and the reward's head."""
        return [self.policy, self.reward_head]

    def plan(self) -> ScoringPlan:
        """How hidden states are computed, found out on the policy at hand the first time.

        Raises:
            ValueError: If the hidden states that a user's own network offers are not those of its logits.
        """
        plan = super().plan()
        if not isinstance(causal_lm(self.policy), PreTrainedModel):
            require_states(plan, self.policy)
        return plan

    def rewards(self, batch: CompletionBatch) -> Tensor:
        """Rewards of completions, (completions,), float32.

        Args:
            batch: Prompts with their completions.
        """
        rows = lay_out(batch, model=self.policy, plan=self.plan())
        rewards: Tensor = self.reward_head(completion_states(self.policy, rows, positions=rows.last))
        return rewards

    def step(self, batch: PairBatch) -> StepOutput:
        """The Bradley-Terry loss of a batch of pairs, and what `metric_names` names.

        Raises:
            ValueError: If the batch is not one of pairs, or has a negative margin.
        """
        if not isinstance(batch, PairBatch):
            raise ValueError(
                "a reward model is fitted to pairs: batches must be PairBatch, got "
                f"{type(batch).__name__}; use data with a chosen and a rejected completion for each prompt"
            )
        completions = batch.completions()
        chosen, rejected = self.rewards(completions).chunk(2)
        margin = chosen - rejected
        losses = bradley_terry_loss(margin, least_margin=_least_margin(batch, like=margin))
        numbers = (losses, chosen, rejected, margin, (margin.detach().sign() + 1) / 2)
        return StepOutput.of(
            losses,
            batch,
            statistics=dict(zip(self.metric_names, numbers, strict=True)),
            num_tokens=self.num_tokens(completions),
        )

    @outside_of_graphs
    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collect the batch's numbers."""
        super().validation_step(batch, batch_idx)
        assert self.latest is not None
        numbers = self.latest.statistics
        self.val_calibration.update(
            numbers["rewards/chosen"],
            numbers["rewards/rejected"],
            lengths=(batch.chosen_lengths, batch.rejected_lengths),
            weights=self.latest.weights,
        )

    def on_validation_epoch_end(self) -> None:
        """Log means over all examples of all ranks, and how far the rewards can be trusted.

        The reliability curve is written to reliability/step-N.json in the logger's folder, if there is one.
        """
        super().on_validation_epoch_end()
        self.calibration = self.val_calibration.compute()
        self.val_calibration.reset()
        for field, name in _CALIBRATION.items():
            self.log(name, getattr(self.calibration, field))
        if self.trainer.logger is None or self.trainer.sanity_checking:
            return
        log_dir = self.trainer.log_dir  # rank 0 tells the others, so all must ask
        if self.trainer.is_global_zero and log_dir is not None:
            path = Path(log_dir) / "reliability" / f"step-{self.trainer.global_step}.json"
            write_file(path, json.dumps(self.calibration.curve()))

    def model_record(self) -> ModelRecord:
        """What checkpoints say about the model."""
        return ModelRecord.of(self.policy, self.settings, reward_head=f"{_HEAD}.weight")

    def reward_head_weight(self) -> Tensor | None:
        """The whole map from last hidden states to rewards; every rank must call this."""
        weight: Tensor = self.reward_head.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _least_margin(batch: PairBatch, *, like: Tensor) -> Tensor | float:
    """The margins that a batch asks for; 0 where it does not."""
    margins: Tensor | None = getattr(batch, "margins", None)
    if margins is None:
        return 0.0
    if margins.device.type == "cpu" and not (margins >= 0).all():
        raise ValueError(
            "`margins` must be at least 0, since the chosen completion is the better one, got "
            f"{float(margins.min())}"
        )
    return send(margins.to(like.dtype), like.device)
