"""What ranks sample and measure together; a module of its own so that ranks can import it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from judges import vowels
from resume_jobs import ROWS
from step_jobs import rank_and_count
from tiny_tokenizers import byte_level
from together_jobs import strategy_of
from training import trainer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.evaluation import CompletionMonitor, completion_kl


class Monitored(NamedTuple):
    """What a rank measured.

    Attributes:
        metrics: What was logged.
        kl: Divergence of each of its own completions.
        scores: The judge's score of each of them.
    """

    metrics: dict[str, float]
    kl: torch.Tensor
    scores: torch.Tensor


def monitored(model: str, *, reference: str, folder: Path, strategy: str) -> Monitored:
    """Validate once, and write what was sampled to a folder."""
    module = DPOModule(model, reference=reference, startup_check=False)
    data = PreferenceDataModule(
        ROWS, validation=ROWS[:12], tokenizer=byte_level(), batch_size=3, num_processes=1
    )
    monitor = CompletionMonitor(6, max_new_tokens=8, judge=vowels)
    run = trainer(
        devices=rank_and_count()[1],
        strategy=strategy_of(strategy),
        callbacks=[monitor],
        default_root_dir=folder,
    )
    run.validate(module, data, verbose=False)
    samples = [sample for sample, _ in monitor.verdicts]
    scores = torch.tensor([verdict["policy_score"] for _, verdict in monitor.verdicts])
    assert module.reference_model is not None
    kl = completion_kl(module.policy, reference=module.reference_model, samples=samples).kl
    return Monitored({name: float(value) for name, value in run.callback_metrics.items()}, kl, scores)
