from __future__ import annotations

import io
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweep_results import ACCURACY, made_up

from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.report import live_table as table_module
from lightning_dpo.tuning.report.live_table import LiveTable


@dataclass
class FakeTrial:
    """What the table looks at in Ray's trial: here its config is what it sets."""

    trial_id: str
    config: dict[str, Any]


def make_table(*, width: int = 80, height: int = 24, terminal: bool = True) -> tuple[LiveTable, Console]:
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=terminal, color_system=None
    )
    plan: Any = SimpleNamespace(
        space=SimpleNamespace(overrides=lambda config: config),
        objective=Objective((Goal(ACCURACY, "max"),)),
        keeps_best=False,
    )
    return LiveTable(plan, samples=60, console=console), console


def lines_of(table: LiveTable, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table.render())
    return file.getvalue().splitlines()


def fill(table: LiveTable, *, running: int = 2) -> None:
    """The trials of a made-up sweep, in the order in which they began; the last ones still run."""
    records = sorted(made_up("/sweeps/x").trials, key=lambda trial: trial.id)
    for place, record in enumerate(records):
        trial = FakeTrial(record.id, dict(record.overrides))
        table.update(trial)
        if record.history:
            table.update(trial, metrics=record.metrics)
        if not record.is_ranked:
            table.update(trial, metrics={ACCURACY: 0.0, "step": record.step, "status": record.status})
        if place < len(records) - running:
            table.update(trial, status="ended")


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal_or_wrapped(width: int) -> None:
    table, _ = make_table(width=width)
    fill(table)
    lines = lines_of(table, width)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    heads = next(line for line in lines if "trial " in line and "steps" in line).split()
    assert heads[:3] == ["trial", "β", "lr"]
    assert heads[-5:] == ["steps", "accuracy", "KL", "ETA", "status"]
    rows = [line for line in lines if line.strip().startswith("000")]
    assert all(
        line.split()[-1] in ("running", "finished", "stopped", "diverged", "memory", "failed")
        for line in rows
    )
    assert not any("…" in line for line in rows)
    assert sum("running" in line for line in rows) == 2
    assert "more trials" in lines[-1]


def test_the_best_trial_stays_in_sight() -> None:
    table, _ = make_table()
    fill(table)
    best = made_up("/sweeps/x").best
    assert any(best.id[-5:] in line for line in lines_of(table, 80))


def test_a_trial_that_went_wrong_shows_no_result() -> None:
    table, _ = make_table(width=120, height=90)
    fill(table)
    lost = [line for line in lines_of(table, 120) if line.rstrip().endswith(("diverged", "failed"))]
    assert lost
    assert not any(" 0.0000 " in line for line in lost)


def test_the_last_table_stays_with_the_best_first() -> None:
    table, console = make_table()
    with table:
        fill(table, running=0)
    last = console.file.getvalue().split("60 of 60 trials have ended")[-1]
    rows = [line.split() for line in last.splitlines() if line.strip().startswith("000")]
    assert len(rows) == 40
    assert rows[0][0] == made_up("/sweeps/x").best.id[-5:]
    assert "20 more trials" in last


def test_without_a_terminal_each_trial_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    table, console = make_table(terminal=False)
    with table:
        fill(table)
        lines = console.file.getvalue().splitlines()
        assert len(lines) == 58
        assert lines[0].startswith("trial 79493_00000 finished at step 320: accuracy 0.7")
        assert "\x1b" not in console.file.getvalue()
        # Long trials: nothing for a while, then how far the sweep is.
        trial = FakeTrial("79493_00059", {})
        table.update(trial, metrics={"step": 1})
        assert len(console.file.getvalue().splitlines()) == 58
        monkeypatch.setattr(table_module, "QUIET_SECONDS", 0.0)
        table.update(trial, metrics={"step": 2})
        assert "58 of 60 trials have ended, 2 running" in console.file.getvalue().splitlines()[-1]


def test_without_a_terminal_the_line_of_a_trial_says_why_it_failed() -> None:
    table, console = make_table(terminal=False)
    reason = "`beta` must be above 0, got -0.1"
    trial = FakeTrial("79493_00000", {"model.loss.beta": -0.1})
    table.update(trial, metrics={ACCURACY: 0.0, "status": "failed", "reason": reason})
    table.update(trial, status="ended")
    expected = f"trial 79493_00000 failed at step 0 (β -0.1): {reason}"
    assert console.file.getvalue().splitlines() == [expected]
