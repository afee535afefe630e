"""Runs in bf16-true, during whose steps torch makes new tensors bfloat16: what is measured stays float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import EOS, PROMPT, samples, tiny_llama
from online_jobs import Recording
from resume_jobs import ROWS
from tiny_folder import save_tiny
from tiny_tokenizers import byte_level
from training import sgd, trainer

from lightning_dpo import PPOModule, PreferenceDataModule
from lightning_dpo.evaluation import ClassifierJudge, ImplicitRewardJudge, judge_samples, realigned_samples
from lightning_dpo.evaluation.kl import sample_logps
from lightning_dpo.training.reward_model import RewardModule


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A policy, another model and a reward model."""
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_tiny(tmp_path / "policy")
    save_tiny(tmp_path / "other")
    reward = RewardModule(str(tmp_path / "policy"))
    reward.configure_model()
    with torch.no_grad():
        reward.reward_head.weight.normal_()
    reward.export(tmp_path / "reward")
    return tmp_path


def data() -> PreferenceDataModule:
    return PreferenceDataModule(ROWS, tokenizer=byte_level(), batch_size=4, num_processes=1)


@pytest.mark.parametrize("kind", ["classifier", "implied reward"])
def test_a_judge_that_is_a_model_scores_as_it_does_elsewhere(folder: Path, kind: str) -> None:
    judge: Any = ClassifierJudge(str(folder / "reward"), device="cpu")
    if kind == "implied reward":
        other = str(folder / "other")
        judge = ImplicitRewardJudge(str(folder / "policy"), reference=other, device="cpu")
    module = Recording(str(folder / "policy"), judge=judge, max_new_tokens=6, optimizer=sgd)
    trainer(precision="bf16-true", max_steps=2).fit(module, data())
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    for judged, drawn in zip(module.judged, module.drawn, strict=True):
        expected = judge_samples(judge, drawn, tokenizer=byte_level())
        torch.testing.assert_close(judged.scores.flatten(), expected, rtol=1e-5, atol=1e-5)


def test_ppo_asks_a_reward_model(folder: Path) -> None:
    module = PPOModule(
        str(folder / "policy"),
        reward_model=str(folder / "reward"),
        max_new_tokens=5,
        minibatches=2,
        epochs_per_rollout=1,
        kl_coefficient=0.123,
    )
    run = trainer(precision="bf16-true", limit_train_batches=2)
    run.fit(module, data())
    assert run.global_step == 4
    assert all(value.isfinite() for value in run.callback_metrics.values())
    assert float(run.callback_metrics["train/ppo/kl_coefficient"]) == pytest.approx(0.123, rel=1e-6)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_log_probabilities_are_float32_whatever_torch_s_default_is() -> None:
    policy, reference = tiny_llama(0), tiny_llama(1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with default(dtype):
            drawn = realigned_samples(
                policy, reference=reference, prompts=[PROMPT] * 5, scale=1.0, eos_token_id=EOS
            )
            logps = sample_logps(policy, samples=samples())
            found.append([logps, drawn.logps, drawn.reference_logps, drawn.kl])
    for whole, half in zip(*found, strict=True):
        assert whole.dtype == half.dtype == torch.float32
        torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-5)
