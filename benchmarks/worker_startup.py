"""Where the time of trials of several workers goes, from the trial's start to the next one's.

Run `python -m benchmarks.worker_startup` from the repository; it prints a table, seconds since Tune began the
trial, and with `--json FILE` writes the marks. It needs two CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dpo import DPOModule

ROOT = Path(__file__).parents[1]
MARKS = "WORKER_STARTUP_MARKS"
STAGES = {
    "process": "worker process began",
    "imported": "lightning_dpo imported",
    "built": "model built",
    "first_step": "first step",
    "last_report": "last report",
    "ended": "worker left the trainer",
    "complete": "Tune saw the end",
    "next": "next trial began",
}


def mark(name: str, *, at: float | None = None, **more: Any) -> None:
    """Append a mark to the file of this process."""
    folder = os.environ.get(MARKS)
    if folder:
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "at": at or time.time(), **more}) + "\n")


class TimedModule(DPOModule):
    """Marks when it was built, and what came before that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        import psutil

        mark("process", at=psutil.Process().create_time())
        mark("imported", at=_IMPORTED)
        mark("built")


class Timed(pl.Callback):
    """Marks the stages of training."""

    def __init__(self) -> None:
        self._began = False

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._began:
            self._began = True
            mark("first_step")

    def on_validation_end(self, *_: Any) -> None:
        mark("last_report")

    def teardown(self, *_: Any, **__: Any) -> None:
        mark("ended")


_IMPORTED = time.time()


def measure(trials: int, workers: int) -> list[dict[str, float]]:
    """Run a sweep of trials one after another; the stages of each, seconds since it began."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
    import ray
    from ray import tune
    from sweep_project import make_project, settings

    from lightning_dpo.tuning import SweepConfig, sweep
    from lightning_dpo.tuning.cluster import tuner

    class Clock(tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            mark("began", trial=trial.trial_id)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            mark("complete", trial=trial.trial_id)

    def timed_tuner(*args: Any, run_config: Any, **kwargs: Any) -> Any:
        run_config.callbacks.append(Clock())
        return tune.Tuner(*args, run_config=run_config, **kwargs)

    tuner.Tuner = timed_tuner  # type: ignore[assignment,misc]
    with tempfile.TemporaryDirectory() as scratch:
        marks = Path(scratch) / "marks"
        marks.mkdir()
        os.environ[MARKS] = str(marks)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        project = make_project(Path(scratch))
        callback = {"class_path": "benchmarks.worker_startup.Timed"}
        given = settings(project, overrides={"trainer.callbacks": [callback]})
        config = SweepConfig(
            space={"model.optimizer.lr": {"grid": [1e-4 * (n + 1) for n in range(trials)]}},
            samples=1,
            search="grid",
            concurrency=1,
            workers=workers,
            cpus=0.9,
            export=False,
            name="startup",
            module="benchmarks.worker_startup.TimedModule",
            **given,
        )
        sweep(config, verbose=False)
        ray.shutdown()
        found = [json.loads(line) for file in marks.glob("*.jsonl") for line in file.open()]
    return _stages(sorted(found, key=lambda entry: entry["at"]))


def _stages(found: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Marks as stages: of several workers the last one counts, since they wait for each other."""
    starts = [entry["at"] for entry in found if entry["name"] == "began"]
    ends = [entry["at"] for entry in found if entry["name"] == "complete"]
    # What a warm process did before the trial took no time of it.
    stages = []
    for number, began in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else None
        own = {"complete": ends[number] - began}
        if following is not None:
            own["next"] = following - began
        built = [entry for entry in found if entry["name"] == "built" and began < entry["at"] < ends[number]]
        assert built, "no worker of the trial built a module"
        for entry in found:
            name = entry["name"]
            if name in ("process", "imported") and began < entry["at"] < ends[number]:
                own[name] = max(own.get(name, 0.0), entry["at"] - began)
            if name in ("built", "first_step", "last_report", "ended") and began < entry["at"] < ends[number]:
                own[name] = entry["at"] - began
        stages.append(own)
    return stages


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    began = time.time()
    stages = measure(given.trials, given.workers)
    columns = "".join(f"{f'trial {number + 1}':>10}" for number in range(len(stages)))
    print(f"{'seconds since the trial began':32}{columns}")
    for name, words in STAGES.items():
        values = "".join(f"{stage[name]:10.1f}" if name in stage else f"{'-':>10}" for stage in stages)
        print(f"{words:32}{values}")
    ends = [stage.get("next", stage["complete"]) for stage in stages]
    print(
        f"a trial: median {statistics.median(ends):.1f} s ({min(ends):.1f} to {max(ends):.1f}); "
        f"the sweep with its preparation: {time.time() - began:.1f} s"
    )
    if given.json:
        given.json.write_text(json.dumps(stages))


if __name__ == "__main__":
    main()
