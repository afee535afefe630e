"""KTOModule: a policy, its reference and a loss of unpaired feedback as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dpo.losses import KTOLoss, UnpairedLoss
from lightning_dpo.scoring.graphs import outside_of_graphs
from lightning_dpo.training.callbacks.startup_check import StartupCheck
from lightning_dpo.training.metrics.data_sets import DataSetMeans
from lightning_dpo.training.metrics.feedback import (
    CLASS_METRICS,
    FeedbackMeans,
    FeedbackStatistics,
    class_metrics,
)
from lightning_dpo.training.referenced import ReferencedModule
from lightning_dpo.training.step_output import StepOutput
from lightning_dpo.types import CompletionBatch, CompletionLogps, FeedbackBatch
from lightning_dpo.types.devices import send

__all__ = ["KTOModule"]


class KTOModule(ReferencedModule):
    """Aligns a causal language model to completions that were judged one by one.

    With `KTOLoss` it is KTO (https://arxiv.org/abs/2402.01306). Batches are `FeedbackBatch`. Trials of
    a sweep do not share a cached reference, since mismatched completions differ with the batch size.

    Attributes:
        loss: The loss of unpaired feedback.
    """

    batch_type = FeedbackBatch
    metric_names = ("loss", "z0")
    in_progress_bar = ("loss", "z0", "rewards/margin", "rewards/auc")
    shares_reference = False

    def __init__(
        self,
        policy: str | nn.Module,
        *,
        loss: UnpairedLoss | None = None,
        startup_check: bool = True,
        **kwargs: Any,
    ) -> None:
        """Say what to train; nothing is loaded before `configure_model`.

        Args:
            policy: A folder, a hub id, a .gguf file, ``package:NAME/FILE``, a PreTrainedModel, or any module
                that maps (input_ids, attention_mask) to logits.
            loss: A loss of `lightning_dpo.losses.unpaired`; `KTOLoss(beta=0.1)` by default.
            startup_check: Stop if the first batch shows that policy and reference disagree at the start.
            kwargs: Arguments of `ReferencedModule`: `reference`, `reference_cache`, `optimizer`, `lora` and
                the others. A cached reference holds the mismatched completions of one epoch, or of batches
                that are the same in every epoch.

        Raises:
            ValueError: If arguments contradict each other.
        """
        super().__init__(policy, **kwargs)
        self.loss = KTOLoss() if loss is None else loss
        if not isinstance(self.loss, UnpairedLoss):
            raise ValueError(
                f"`loss` must be one of unpaired feedback, such as KTOLoss or UnpairedAPOZeroLoss, got "
                f"{type(loss).__name__}; losses of pairs belong to DPOModule"
            )
        if self.spec.kind == "none":
            raise ValueError(
                f'`reference="none"` does not go with {type(self.loss).__name__}, which compares with a '
                'reference; use reference="frozen"'
            )
        self._startup_check = startup_check
        self.val_classes = FeedbackMeans()
        self.val_class_data_sets = DataSetMeans(make=FeedbackMeans)

    @classmethod
    def logged_metrics(cls) -> tuple[str, ...]:
        """Names that a validation logs, without those of callbacks."""
        return tuple(f"val/{name}" for name in (*cls.metric_names, *CLASS_METRICS))

    @classmethod
    def incomparable_metrics(cls) -> tuple[str, ...]:
        """Losses and rewards, which are in units of the loss and of its beta."""
        scaled = ("loss", "rewards/desirable", "rewards/undesirable", "rewards/margin")
        return tuple(f"val/{name}" for name in scaled)

    @classmethod
    def cli_defaults(cls) -> dict[str, Any]:
        """The default loss, so that ``--model.init_args.loss.beta`` alone works."""
        return {"loss": {"class_path": "lightning_dpo.losses.KTOLoss"}}

    def setup(self, stage: str) -> None:
        """Refuse data that the loss cannot do with, before a model is loaded.

        Raises:
            ValueError: If it has one example in a batch, or other mismatched completions in every epoch than
                a cached reference holds.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "validation_sets", ())
        self.val_class_data_sets = DataSetMeans(names, make=FeedbackMeans)
        if not self.loss.needs_z0 or data is None:
            return
        name = type(self.loss).__name__
        if getattr(data, "batch_size", None) == 1:
            raise ValueError(
                f"`batch_size` must be at least 2 for {name}, which puts each prompt to another example's "
                "completion, got 1; 8 or more are advisable. Or use UnpairedAPOZeroLoss"
            )
        is_fixed = self.trainer.max_epochs in (0, 1) or not getattr(data, "shuffle", False)
        if stage == "fit" and self.spec.is_cached and not is_fixed:
            raise ValueError(
                f'`reference="cached"` does not go with {name} and shuffled batches over several epochs, '
                "whose mismatched completions are others in each; train one epoch (`max_epochs: 1`), set "
                '`shuffle: false`, use reference="frozen", or use UnpairedAPOZeroLoss'
            )

    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of every run, and the start-up check if it is wanted."""
        return [*super().configure_callbacks(), *([StartupCheck()] if self._startup_check else [])]

    def reference_completions(self, batch: FeedbackBatch) -> CompletionBatch:
        """The judged completions, then the mismatched ones if the loss needs them."""
        return batch.all_completions() if self.loss.needs_z0 else batch.completions()

    def score(self, batch: FeedbackBatch) -> tuple[CompletionLogps, CompletionLogps, Tensor, int]:
        """Score a batch under policy and reference; what takes no gradient first, while nothing is held.

        Returns:
            The policy's log-probabilities, the reference's, z0 (0 where the loss needs none), and the tokens
            that the policy computed.
        """
        reference = self.reference.logps(self.reference_completions(batch), plan=self.plan())
        assert reference is not None, "there is a reference"
        judged = batch.completions()
        num_tokens = self.num_tokens(judged)
        z0 = torch.zeros((), device=reference.logps.device)
        if self.loss.needs_z0:
            mismatched = batch.mismatched_completions()
            with torch.no_grad():
                policy = self.logps(mismatched)
            reference, other = _halves(reference)
            z0 = self.loss.estimate_z0(
                policy, other, weights=send(batch.mismatch_weights, policy.logps.device)
            )
            num_tokens += self.num_tokens(mismatched)
        return self.logps(judged), reference, z0, num_tokens

    def step(self, batch: FeedbackBatch) -> StepOutput:
        """The loss of judged completions, and what `metric_names` and `FeedbackStatistics` list."""
        if not isinstance(batch, FeedbackBatch):
            raise ValueError(
                f"`batch` must be a FeedbackBatch for KTOModule, got {type(batch).__name__}; collate with "
                "FeedbackBatch.from_examples, or read pairs with FeedbackDataModule and "
                "`unpaired_from_pairs: true`"
            )
        policy, reference, z0, num_tokens = self.score(batch)
        labels = send(batch.labels, policy.logps.device)
        losses: Tensor = self.loss(policy, reference, labels=labels, z0=z0)
        reward = self.loss.rewards(policy, reference)
        statistics = FeedbackStatistics.of(policy, reference, reward=reward, labels=labels)
        return StepOutput.of(
            losses,
            batch,
            statistics={"loss": losses, "z0": z0.expand(len(batch)), **statistics._asdict()},
            num_tokens=num_tokens,
            policy=policy,
            reference=reference,
        )

    def log_training(self, statistics: dict[str, Tensor], weights: Tensor) -> None:
        """Log the means of a batch and those of each class under train/."""
        super().log_training(statistics, weights)
        self._log_classes("train/", class_metrics(statistics, weights), batch_size=len(weights))

    @outside_of_graphs
    def validation_step(self, batch: FeedbackBatch, batch_idx: int) -> None:
        """Collect the batch's numbers."""
        super().validation_step(batch, batch_idx)
        assert self.latest is not None
        self.val_classes.update(self.latest.statistics, self.latest.weights)
        self.val_class_data_sets.update(batch, self.latest)

    def on_validation_epoch_end(self) -> None:
        """Log means over all examples of all ranks, and the AUC of their rewards."""
        super().on_validation_epoch_end()
        self._log_classes("val/", self.val_classes.compute())
        self.val_classes.reset()
        self.log_dict(dict(self.val_class_data_sets.compute()))
        self.val_class_data_sets.reset()

    def _log_classes(self, prefix: str, values: dict[str, Tensor], **options: Any) -> None:
        for name, value in values.items():
            # A batch may hold examples of one label only.
            if not (prefix == "train/" and value.isnan()):
                self.log(f"{prefix}{name}", value, prog_bar=name in self.in_progress_bar, **options)


def _halves(logps: CompletionLogps) -> tuple[CompletionLogps, CompletionLogps]:
    """The judged and the mismatched completions, in the order of `FeedbackBatch.all_completions`."""
    (judged, mismatched), lengths = logps.logps.chunk(2), logps.lengths.chunk(2)
    return CompletionLogps(judged, lengths[0]), CompletionLogps(mismatched, lengths[1])
