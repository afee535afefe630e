from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_folder import tiny_lm
from tiny_models import tiny_model
from tiny_tokenizers import byte_level
from training import loader, sgd, trainer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import largest_of_ranks

ROWS = [{"prompt": f"is it {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(12)]


def fit(tmp_path: Path, *, judge: Any = None, samples_per_prompt: int = 1, **options: Any) -> Any:
    tokenizer = byte_level()
    data = PreferenceDataModule(
        ROWS, validation=ROWS[:6], tokenizer=tokenizer, batch_size=4, cache_dir=str(tmp_path), num_processes=1
    )
    run = trainer(
        callbacks=[
            CompletionMonitor(5, max_new_tokens=7, judge=judge, samples_per_prompt=samples_per_prompt)
        ],
        logger=CSVLogger(tmp_path),
        num_sanity_val_steps=1,
    )
    module = DPOModule(tiny_lm(tokenizer), **options)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    return run, before


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_the_kl_starts_at_zero_and_grows(tmp_path: Path, lora: Any) -> None:
    run, before = fit(tmp_path, optimizer=sgd, lora=lora)
    assert before["val/kl"] == pytest.approx(0, abs=1e-6)
    after = run.callback_metrics
    assert float(after["val/kl"]) > 1e-3
    assert math.isfinite(float(after["val/kl_error"]))
    (path,) = Path(run.log_dir).rglob("step-3.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [row["prompt"] for row in ROWS[:5]]
    assert all(1 <= record["tokens"] <= 7 for record in records)
    tokens = [record["tokens"] for record in records]
    assert float(after["val/samples/tokens"]) == pytest.approx(sum(tokens) / 5)
    assert float(after["val/samples/entropy"]) > 0
    assert sum(record["kl"] for record in records) / 5 == pytest.approx(float(after["val/kl"]), rel=1e-5)


def by_length(prompts: list[str], completions: list[str]) -> list[float]:
    assert [prompt[:5] for prompt in prompts] == ["is it"] * len(prompts)
    return [float(len(text)) for text in completions]


def longer(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [0.5 * (1 + (len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_a_judge_scores_and_compares_what_is_said(tmp_path: Path, lora: Any) -> None:
    run, before = fit(tmp_path, judge=by_length, samples_per_prompt=3, optimizer=sgd, lora=lora)
    after = run.callback_metrics
    (path,) = Path(run.log_dir).rglob("step-3.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 15
    mean = sum(len(record["completion"]) for record in records) / 15
    assert float(after["val/score"]) == pytest.approx(mean, rel=1e-5)
    wins = []
    for start in range(0, 15, 3):  # every answer to a prompt against every one of the reference
        group = records[start : start + 3]
        pairs = [(a["policy_score"], b["reference_score"]) for a in group for b in group]
        wins += [0.5 * (1 + (ours > theirs) - (ours < theirs)) for ours, theirs in pairs]
    assert float(after["val/win_rate"]) == pytest.approx(sum(wins) / len(wins), rel=1e-5)
    assert all(len(record["reference"]) == record["reference_score"] for record in records)
    # The reference says the same at every validation.
    (first,) = Path(run.log_dir).parent.rglob("step-0.jsonl")
    earlier = [json.loads(line)["reference"] for line in first.read_text().splitlines()]
    assert earlier == [record["reference"] for record in records]
    assert 0 <= before["val/win_rate"] <= 1


def test_what_the_reference_said_in_another_run_is_forgotten(tmp_path: Path) -> None:
    tokenizer = byte_level()
    used = CompletionMonitor(5, max_new_tokens=7, judge=by_length)
    said = []
    for seed, monitor in ((0, used), (1, used), (1, CompletionMonitor(5, max_new_tokens=7, judge=by_length))):
        torch.manual_seed(seed)
        model = tiny_lm(tokenizer)
        torch.nn.init.normal_(model.lm_head.weight)
        data = PreferenceDataModule(
            ROWS, validation=ROWS[:6], tokenizer=tokenizer, cache_dir=str(tmp_path), num_processes=1
        )
        run = trainer(callbacks=[monitor], default_root_dir=tmp_path)
        run.validate(DPOModule(model), data, verbose=False)
        said.append([verdict["reference"] for _, verdict in monitor.verdicts])
    assert said[1] == said[2] != said[0]


def test_a_judge_of_pairs_gives_a_win_rate_alone(tmp_path: Path) -> None:
    run, _ = fit(tmp_path, judge=longer, optimizer=sgd)
    assert 0 <= float(run.callback_metrics["val/win_rate"]) <= 1
    assert "val/score" not in run.callback_metrics


def test_without_the_references_weights_only_scores_are_logged(tmp_path: Path) -> None:
    cached = {"reference": "cached", "reference_cache": str(tmp_path / "reference"), "optimizer": sgd}
    run, _ = fit(tmp_path, judge=by_length, **cached)
    assert "val/score" in run.callback_metrics
    assert "val/win_rate" not in run.callback_metrics
    with pytest.raises(ValueError, match="`judge` must score completions one by one where the reference's"):
        fit(tmp_path, judge=longer, **cached)


def test_judges_that_cannot_judge_are_found_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`judge` must be the dotted path of a callable"):
        CompletionMonitor(judge="nowhere.judge")
    with pytest.raises(ValueError, match="`judge` must give finite scores, got nan from <lambda>"):
        fit(tmp_path, judge=lambda prompts, completions: [math.nan] * len(prompts), optimizer=sgd)
    with pytest.raises(
        ValueError, match=r"a model source must be a folder.* no such folder: '\./no-such-model'"
    ):
        fit(tmp_path, judge="./no-such-model", optimizer=sgd)


def test_without_a_tokenizer_it_says_what_it_needs() -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    with pytest.raises(ValueError, match="data module with a `tokenizer`"):
        trainer(callbacks=[CompletionMonitor()]).validate(module, loader())


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="`num_prompts` must be at least 1, got 0"):
        CompletionMonitor(0)


def test_ranks_are_asked_from_their_device() -> None:
    """NCCL refuses tensors of the CPU."""
    asked = []

    class Strategy:
        def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            asked.append((tensor.device.type, reduce_op))
            return torch.tensor(-3.0)

    agree = largest_of_ranks(Strategy(), device=torch.device("meta"))
    assert -agree(-5) == 3
    assert asked == [("meta", "max")]
