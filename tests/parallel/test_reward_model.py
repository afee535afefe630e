"""A reward model on two processes: its head is trained, saved, resumed and exported as in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import together_jobs
import torch
from checkpoint_jobs import run
from resume_jobs import source
from step_jobs import fit
from transformers import AutoModelForSequenceClassification

from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.training.saving.export import export_checkpoint

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 20)[None]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_same_steps(ranks: Any, strategy: str, lora: bool) -> None:
    first, second = ranks.run(fit, method=RewardModule, strategy=strategy, lora=lora)
    expected = fit(method=RewardModule, lora=lora)
    assert first.losses == second.losses == pytest.approx(expected.losses, abs=1e-5)
    assert first.norms == pytest.approx(expected.norms, rel=1e-3)
    assert first.weights.keys() == expected.weights.keys()
    assert "reward_head" in expected.weights
    torch.testing.assert_close(first.weights, expected.weights, atol=1e-4, rtol=1e-3)


def test_mixed_precision_keeps_the_head_whole(ranks: Any) -> None:
    first = ranks.run(fit, method=RewardModule, strategy="fsdp2", precision="bf16-mixed")[0]
    exact = fit(method=RewardModule)
    assert first.losses[:3] == pytest.approx(exact.losses[:3], abs=3e-2)
    assert {value.dtype for value in first.weights.values()} == {torch.float32}


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_saved_in_parts_resumed_and_exported(ranks: Any, tmp_path: Path, lora: bool) -> None:
    model, out = source(tmp_path / "model"), tmp_path / "out"
    options = {"method": RewardModule, "strategy": "fsdp2", "lora": lora, "data_options": {"batch_size": 2}}
    whole = ranks.run(run, model=model, folder=tmp_path / "run", export_to=out, **options)[0]
    checkpoint = tmp_path / "run" / "step=4.ckpt"
    assert checkpoint.is_dir()
    resumed = ranks.run(run, model=model, ckpt_path=checkpoint, **options)[0]
    assert resumed.steps == whole.steps > 4
    torch.testing.assert_close(resumed.weights, whole.weights, rtol=0, atol=0)
    assert resumed.metrics == whole.metrics
    last = tmp_path / "run" / f"step={whole.steps}.ckpt"
    again = export_checkpoint(last, tmp_path / "again")
    with torch.no_grad():
        models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in (out, again)]
        one, other = (m(IDS).logits for m in models)
    assert torch.equal(one, other)
    torch.testing.assert_close(models[0].score.weight.detach(), whole.weights["reward_head"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_validation_is_exact_per_pair(ranks: Any, tmp_path: Path, strategy: str) -> None:
    options = {"model": source(tmp_path / "model"), "method": together_jobs.SameHead, "rows": 5}
    expected, _ = together_jobs.validate(**options, batch_size=5)
    assert set(expected) == set(RewardModule.logged_metrics())
    assert abs(expected["val/rewards/length_correlation"]) > 1e-3
    results = ranks.run(together_jobs.validate, **options, strategy=strategy, batch_size=2)
    for metrics, _ in results:
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sum(given for _, given in results) == 6  # one of them a filler
