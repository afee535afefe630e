"""Completions of trials: their KL, also where the reference is a cache without a model, and their judge."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.evaluation.judges import ModelJudge
from lightning_dpo.tuning.objective import SCORE, WIN_RATE
from lightning_dpo.tuning.recipe.judge import make_judge
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder, completion_keys, drawn_prompts
from lightning_dpo.tuning.trial.spec import TrialSpec

__all__ = ["KLMonitor", "load_judge_model"]


class KLMonitor(CompletionMonitor):
    """A `CompletionMonitor` that keeps a reference model of its own where the module has none.

    Completions of the policy are new in every trial: no cache can hold their log-probabilities. The prompts
    are distinct ones of the whole validation, drawn by their keys: those that come first are the shortest
    where batches are filled by length. Where there are fewer than are asked for, each is completed again.
    """

    def __init__(self, num_prompts: int, *, outcomes: OutcomeRecorder | None = None, **kwargs: Any) -> None:
        """Say how much to sample.

        Args:
            num_prompts: Validation prompts, of each rank.
            outcomes: Keeps what the judge says of each prompt, if that is what trials are ranked by.
            kwargs: For `CompletionMonitor`.
        """
        super().__init__(num_prompts, **kwargs)
        self._outcomes = outcomes
        self._own: nn.Module | None = None
        self._drawn: list[list[int]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the module for its reference's model, before a checkpoint or a step changes the policy."""
        super().setup(trainer, pl_module, stage)
        start: Any = getattr(pl_module, "start_reference", None)
        if stage == "fit" and start is not None:
            self._own = start()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the prompts of the last validation."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._drawn = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the prompts with the smallest keys: the same ones in every trial, whatever its batches."""
        host = getattr(batch, "host", None) or batch
        parts = torch.split(host.prompt_ids.cpu(), host.prompt_lengths.tolist())
        self._drawn = drawn_prompts([*self._drawn, *(part.tolist() for part in parts)], self.num_prompts)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample, measure and log, and hand on what the judge said."""
        self._prompts = list(itertools.islice(itertools.cycle(self._drawn), self.num_prompts))
        super().on_validation_epoch_end(trainer, pl_module)
        if self._outcomes is None:
            return
        for metric, name in ((SCORE, "policy_score"), (WIN_RATE, "win")):
            values = [verdict.get(name) for _, verdict in self.verdicts]
            if values and None not in values:
                keys = completion_keys([sample.prompt_ids for sample, _ in self.verdicts])
                self._outcomes.take(metric, keys=keys, values=torch.tensor(values, dtype=torch.float64))

    def reference(self, module: Any) -> nn.Module | None:
        """The model that the KL is measured to."""
        return super().reference(module) if self._own is None else self._own.to(module.device)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the model go."""
        self._own = None


def load_judge_model(spec: TrialSpec) -> None:
    """Load the judge of a sweep, to see that it can be.

    Args:
        spec: What the sweep's trials have in common; its judge is a model.

    Raises:
        ValueError: If it cannot.
    """
    assert spec.judge is not None
    with spec.user_environment():
        judge = make_judge(spec.judge)
        if isinstance(judge, ModelJudge):
            judge.load()
