"""What the comparison of methods on the embedded task starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_dpo.demo.frontier import prepare_frontier
from lightning_dpo.demo.grammar import PROMPTS
from lightning_dpo.demo.task import TaskConfig, load_pairs
from lightning_dpo.evaluation import load_judge


@pytest.mark.slow
def test_each_seed_has_pairs_and_a_reward_model_of_its_own(
    tiny_config: TaskConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    prepare_frontier(tmp_path, [0, 1], task=tiny_config)
    first, second = (load_pairs(tmp_path / "pairs" / f"{seed}.jsonl") for seed in (0, 1))
    assert len(first) == len(second) == 128
    assert not set(first) & set(second)
    assert not set(first) & set(load_pairs(tmp_path / "task" / "validation.jsonl"))
    judge = load_judge(str(tmp_path / "reward" / "0"))
    scores = torch.as_tensor(judge([PROMPTS[0]] * 2, [pair.chosen for pair in first[:2]]))
    assert scores.isfinite().all()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    prepare_frontier(tmp_path, [1, 0], task=tiny_config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before
