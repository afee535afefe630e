"""The files of a sweep that has ended: what an older version wrote is read and shown."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sweep_results import ACCURACY, KL, made_up

from lightning_dpo.cli import main
from lightning_dpo.tuning.results.folder import load_result, save_result

OLDER = Path(__file__).parents[2] / "support" / "older_sweep"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "older"))


def test_the_folder_of_an_older_version_is_read(older: Path) -> None:
    result = load_result(str(older))
    assert [(goal.metric, goal.mode) for goal in result.objective.goals] == [(ACCURACY, "max"), (KL, "min")]
    statuses = ["finished", "finished", "finished", "stopped", "stopped", "failed"]
    assert [trial.status for trial in result.trials] == statuses
    assert result.best.metrics[ACCURACY] == max(
        trial.metrics[ACCURACY] for trial in result.trials if trial.is_ranked
    )
    assert "RuntimeError" in result.trials[-1].reason
    assert result.recipe == (older / "best" / "config.yaml").read_text()
    assert (result.reference_passes, result.seconds) == (1, 276.0)


def test_the_report_of_an_older_version_is_written_anew(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = load_result(str(older)).best
    main(["report", str(older)])
    assert capsys.readouterr().out == f"report: {older}/report.html\n"
    page = (older / "report.html").read_text()
    assert f"{best.metrics[ACCURACY]:.4f}" in page
    assert "6 trials in 5 min: 3 finished, 2 stopped early by asha, 1 went wrong" in page


def test_what_is_saved_is_what_older_versions_saved(older: Path, tmp_path: Path) -> None:
    """The files keep their form: those of an older sweep are written again byte by byte, table included."""
    again = tmp_path / "again"
    save_result(replace(load_result(str(older)), location=str(again)))
    assert (again / "sweep.json").read_bytes() == (older / "sweep.json").read_bytes()
    assert (again / "best" / "config.yaml").read_bytes() == (older / "best" / "config.yaml").read_bytes()
    assert pq.read_table(again / "results.parquet").equals(pq.read_table(older / "results.parquet"))
    assert {path.name for path in again.iterdir()} == {"best", "results.parquet", "sweep.json"}


def test_a_folder_without_a_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` must be that of a sweep, with sweep\.json in it"):
        load_result(str(tmp_path))


def test_a_choice_of_numbers_and_texts_is_a_column_of_texts(tmp_path: Path) -> None:
    result = made_up(str(tmp_path), trials=2, wide=False)
    mixed = [
        replace(trial, overrides={"model.x": value})
        for trial, value in zip(result.trials, ("auto", 1), strict=True)
    ]
    save_result(replace(result, trials=tuple(mixed)))
    assert set(pq.read_table(tmp_path / "results.parquet")["config/model.x"].to_pylist()) == {"auto", "1"}


def test_a_sweep_that_has_not_ended_is_told_from_a_folder_without_one(older: Path) -> None:
    (older / "sweep.json").unlink()
    with pytest.raises(ValueError, match=r"has ended, got .* 6 trials have begun .* --resume"):
        load_result(str(older))


def test_a_file_is_no_sweep(older: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` must be that of a sweep, with sweep.json in it"):
        load_result(str(older / "results.parquet"))
