"""How what a sweep writes grows with its trials, counted on trials that take no time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ray.tune.execution.tune_controller import TuneController

from benchmarks.simulated_trials import Simulation, ThinModule, simulated
from lightning_dpo.tuning import SweepConfig, sweep

pytestmark = pytest.mark.slow


class Written(NamedTuple):
    """What a sweep left, and how often Tune wrote the state of all its trials."""

    states: int
    files: Counter[str]
    sizes: Counter[str]


def write(folder: Path, trials: int, monkeypatch: pytest.MonkeyPatch) -> Written:
    # The clock writes no state while this test runs, so that what else makes Tune write can be counted.
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "100000")
    states = 0
    save = TuneController.save_to_dir

    def counted(controller: Any) -> None:
        nonlocal states
        states += 1
        save(controller)

    monkeypatch.setattr(TuneController, "save_to_dir", counted)
    config = SweepConfig(
        recipe=[],
        space={"model.beta": {"loguniform": [0.01, 0.5]}, "model.lr": {"loguniform": [1e-6, 1e-4]}},
        samples=trials,
        concurrency=512,
        storage=str(folder),
        name=f"trials{trials}",
    )
    with simulated(Simulation(reports=8)):
        result = sweep(config, module=ThinModule, verbose=False)
    monkeypatch.undo()
    assert [trial.status for trial in result.trials] == ["finished"] * trials
    assert all(len(trial.history) == 8 for trial in result.trials)
    root = Path(result.location)
    files = [path for path in root.rglob("*") if path.is_file()]
    counts, sizes = Counter[str](), Counter[str]()
    for path in files:
        name = path.relative_to(root).parts[0]
        counts[name] += 1
        sizes[name] += path.stat().st_size
    return Written(states, counts, sizes)


def test_what_is_written_grows_with_the_trials_alone(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (write(tmp_path, trials, monkeypatch) for trials in (6, 24))
    # Each trial gave Tune a pointer to a full state, and none made it write the state of all the others.
    assert many.states == few.states
    # Of each trial there is the pointer alone in Tune's folder, and one file of its own in each of ours.
    added = {name: many.files[name] - few.files[name] for name in many.files}
    of_trials = {name: count for name, count in added.items() if count > 1}
    assert of_trials == dict.fromkeys(("ray", "trials", "outcomes"), 18)
    for name in ("ray", "trials", "outcomes", "results.parquet", "sweep.json"):
        assert many.sizes[name] <= 4.2 * few.sizes[name], name
