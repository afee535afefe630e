"""PPO with the true score on the embedded task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training import trainer

from lightning_dpo import PPOModule, PreferenceDataModule
from lightning_dpo.demo.context import single_thread
from lightning_dpo.demo.grammar import true_score
from lightning_dpo.demo.measure import best_reachable, measure
from lightning_dpo.models.load import load_model, load_tokenizer


@pytest.mark.slow
def test_ppo_raises_the_true_score_at_a_measured_kl(
    tiny_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    model = str(tiny_task.model)
    tokenizer, reference = load_tokenizer(model), load_model(model)
    module = PPOModule(
        model,
        judge=true_score,
        kl_coefficient=0.5,
        max_new_tokens=40,
        epochs_per_rollout=2,
        minibatches=2,
        value_clip_range=10.0,  # stars
        value_coefficient=0.01,
        gae_lambda=1.0,
        optimizer=lambda params: torch.optim.Adam(params, lr=2e-3),
    )
    data = PreferenceDataModule(
        str(tiny_task.train), tokenizer=model, max_length=128, batch_size=64, num_processes=1
    )
    with single_thread():
        trainer(max_epochs=6).fit(module, data)
        options = {"reference": reference, "tokenizer": tokenizer, "samples_per_prompt": 24}
        before = measure(reference, sample_from="reference", **options)
        after = measure(module.policy.eval(), **options)
    rise = after.score.mean - before.score.mean
    assert rise > 4 * math.hypot(before.score.standard_error, after.score.standard_error)
    # What is maximised: the score less the KL, which was 0.
    assert rise > 0.5 * after.kl.mean > 0
    best = best_reachable(before, after)
    assert best.reward > after.score.mean - 3 * after.score.standard_error
