"""The first command for a GPU, gone through on the CPU: every arm a row, every failure a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import random_batch, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc, as Linux has")
def test_a_dry_run_has_every_arm_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    arms = ["ours", "packed", "trl", "trl-liger"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", tmp_path / "gpu"]
    options = ["--tests", "tests/scoring/test_forward.py", "--variants", *arms]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "skipped" in found["tests"] or "passed" in found["tests"]
    assert found["device"]["matrix_flops"] > 0
    (model,) = found["models"]
    rows = {row["variant"]: row for row in model["rows"]}
    assert set(rows) | set(model["failures"]) == set(arms)
    assert {"ours", "packed", "trl"} <= set(rows)
    for name, row in rows.items():
        assert row["rounds"] == 2
        assert 0 < row["mfu"] <= row["busy"]
        runs = [each[name] for each in model["rounds"]]
        assert [m["pairs_per_second"] * m["seconds_per_step"] for m in runs] == pytest.approx([2, 2])
        assert min(m["pairs_per_second"] for m in runs) <= row["pairs_per_second"]
        assert row["peak_gib"] > 0
        assert row["graphs_in_timed_steps"] == 0
        assert row["waits_per_step"] is None, "the CPU waits for nothing"
        # They train alike on the same rows.
        assert row["loss_difference"] <= 5e-3, name
        if name != "ours":
            assert model["ratios"][name].startswith("pairs/s ")
    assert rows["ours"]["mfu"] == pytest.approx(rows["ours"]["busy"])
    assert rows["ours"]["positions"] == pytest.approx(model["work"]["unique"])
    assert rows["packed"]["positions"] == pytest.approx(model["work"]["sequences"])
    assert rows["trl"]["positions"] >= rows["packed"]["positions"]
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert all(f"- {name}: " in text for name in arms)
    assert list(tmp_path.glob(".*")) == []


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import parse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse([])
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_fails_is_a_line(tmp_path: Path) -> None:
    from benchmarks.worker import FailedTurnError, Worker

    worker = Worker(log=tmp_path / "log")
    with pytest.raises(FailedTurnError, match=r"ValueError: .*hello"):
        worker.ask(int, "hello", timeout=60)
    assert worker.ask(int, "7", timeout=60) == 7
    with pytest.raises(FailedTurnError, match="no answer within"):
        worker.ask(time.sleep, 60, timeout=0.2)
    worker.close()
    worker = Worker(log=tmp_path / "log")
    with pytest.raises(FailedTurnError, match="ended with code 3"):
        worker.ask(os._exit, 3, timeout=60)
    worker.close()
    assert "ValueError" in (tmp_path / "log").read_text()


def test_packed_sequences_give_what_shared_prompts_give() -> None:
    from benchmarks.packing import with_own_prompts
    from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
    from lightning_dpo.scoring.select import select_plan

    model, batch = tiny_model(), random_batch(5)
    select_plan(model, may_switch_attention=True)
    plan = ScoringPlan("shared", chunked_head=True)
    shared, packed = batch.completions(), with_own_prompts(batch.completions())
    torch.testing.assert_close(
        score(model, packed, plan=plan).logps, score(model, shared, plan=plan).logps, atol=1e-5, rtol=1e-5
    )
    tokens = int(2 * batch.prompt_lengths.sum() + batch.chosen_lengths.sum() + batch.rejected_lengths.sum())
    assert lay_out(packed, model=model, plan=plan).input_ids.shape == (1, tokens)


def test_waits_are_counted_by_what_torch_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.measure import count_waits, waits_recorded

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits_recorded() as found:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert count_waits(found) == 3
    assert modes == ["warn", "default"]
