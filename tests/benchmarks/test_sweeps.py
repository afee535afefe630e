"""What the timing of sweeps keeps and adds up; the sweeps themselves are run by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.sweep_timeline import phases
from benchmarks.trl_sweep import Record

ARMS = ("a", "b", "c")


def test_rounds_that_were_cut_short_go_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    first = Record(path, "small", {"train": 8}, keep=False)
    assert first.missing(ARMS, rounds=2) == [(0, arm) for arm in "abc"] + [(1, arm) for arm in "bca"]
    for arm in "ab":
        first.add(0, arm, {"seconds": 1.0})
    Record(path, "other", {"train": 1}, keep=False).add(0, "a", {"seconds": 2.0})

    again = Record(path, "small", {"train": 8}, keep=True)
    assert again.missing(ARMS, rounds=2) == [(0, "c"), (1, "b"), (1, "c"), (1, "a")]
    with pytest.raises(SystemExit, match=r"has small with \{'train': 8\}, not \{'train': 9\}"):
        Record(path, "small", {"train": 9}, keep=True)
    assert Record(path, "small", {"train": 9}, keep=False).missing(["a"], rounds=1) == [(0, "a")]
    assert sorted(json.loads(path.read_text())) == ["other", "small"]


def test_the_phases_of_processes_fill_the_time_without_gaps(tmp_path: Path) -> None:
    def write(pid: int, *marks: tuple[float, str, str]) -> None:
        (tmp_path / f"{pid}.marks").write_text("".join(json.dumps(one) + "\n" for one in marks))

    write(
        os.getpid(),
        (0.0, "", "start and imports"),
        (2.0, "", "Ray starts"),
        (6.0, "", "trials"),
        (9.0, "t1", "start of a trial"),
        (20.0, "t1", "between trials"),
        (21.0, "t2", "start of a trial"),
        (29.0, "t2", "between trials"),
    )
    # A process that prepared something before trials began, and then ran both.
    write(
        7,
        (3.0, "", "start and imports"),
        (4.0, "", "data"),
        (10.0, "t1", "data"),
        (12.0, "t1", "steps"),
        (18.0, "t1", "end of a trial"),
        (22.0, "t2", "steps"),
        (28.0, "t2", "end of a trial"),
    )
    trial, sweep = phases(tmp_path)
    assert {name: seconds for name, seconds in trial.items() if seconds} == {
        "process and imports": 1.5,
        "start of a trial": 1.0,
        "data": 1.0,
        "steps": 6.0,
        "end of a trial": 1.5,
        "between trials": 0.5,
    }
    assert sum(trial.values()) * 2 == 29 - 6
    assert sweep.pop("end") > 0
    assert sweep == {"start and imports": 2.0, "Ray starts": 2.0, "preparation": 2.0, "trials": 23.0}
