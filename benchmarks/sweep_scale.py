"""What a sweep of 1,000 trials costs the process that drives it, and how that grows.

``python -m benchmarks.sweep_scale`` runs sweeps of 10, 100 and 1,000 trials with a searcher and early
stopping, each in a process of its own, on as many simulated GPUs as are named (64 machines of 8), and prints
peak memory, the time of each decision, what is written, and the report's size and rendering. Everything runs
as in any sweep but the trials, see `benchmarks.simulated_trials`. With Chromium it also opens the reports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.process import resident_mib, run_child
from benchmarks.simulated_trials import Simulation, ThinModule, simulated

_WATCH_FRAMES = """() => {
  window.frames_taken = [];
  let last = performance.now();
  const next = (now) => { frames_taken.push(now - last); last = now; requestAnimationFrame(next); };
  requestAnimationFrame(next);
}"""
"""Keeps the milliseconds between frames."""

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Settings(NamedTuple):
    """A sweep.

    Attributes:
        trials: How many.
        gpus: Trials at once.
        search: "random" or "optuna".
        scheduler: "asha" or "none".
        reports: Validations of a whole trial.
        folder: Where the sweep's folder is left.
    """

    trials: int
    gpus: int
    search: str
    scheduler: str
    reports: int
    folder: str


class Clock:
    """Adds up what functions take while it runs, by label; what they call is within."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.last: dict[str, float] = {}

    @contextlib.contextmanager
    def watching(self, functions: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Watch functions, given as label, owner and name."""
        with contextlib.ExitStack() as stack:
            for label, owner, name in functions:
                stack.enter_context(patch.object(owner, name, self._watched(label, getattr(owner, name))))
            yield

    def _watched(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.last[label] = time.perf_counter() - began
                self.seconds[label] += self.last[label]
                self.calls[label] += 1

        return watched


def run_sweep(settings: Settings) -> dict[str, Any]:
    """Run one sweep in this process, and say what it took."""
    from ray.tune.callback import CallbackList
    from ray.tune.execution.experiment_state import _ExperimentCheckpointManager
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.search.search_generator import SearchGenerator

    from lightning_dpo.tuning import SweepConfig
    from lightning_dpo.tuning import run as sweeping
    from lightning_dpo.tuning.report.live_table import LiveTable
    from lightning_dpo.tuning.rounds import search as searching
    from lightning_dpo.tuning.search.plain import PlainSearch
    from lightning_dpo.tuning.search.schedulers import scheduler_class
    from lightning_dpo.tuning.search.stops import SweepStopper

    searcher: Any = PlainSearch if settings.search == "random" else SearchGenerator
    choose = "next_trial" if settings.search == "random" else "create_trial_if_possible"
    clock, simulation = Clock(), Simulation(reports=settings.reports)
    scheduler: Any = scheduler_class(settings.scheduler)
    functions = [
        ("all of Tune", searching, "fit_with_retries"),
        ("choose values", searcher, choose),
        ("scheduler", scheduler, "on_trial_result"),
        ("stop rules", SweepStopper, "__call__"),
        ("callbacks", CallbackList, "on_trial_result"),
        ("live table", LiveTable, "update"),
        ("state: written", TuneController, "save_to_dir"),
        ("state: written and copied", _ExperimentCheckpointManager, "sync_up_experiment_state"),
        ("gather trials", searching, "completed_trials"),
        ("gather result", sweeping, "gather"),
        ("save result", sweeping, "save_result"),
        ("report", sweeping, "write_report"),
    ]
    if settings.search == "optuna":
        functions.append(("searcher's results", SearchGenerator, "on_trial_complete"))
    config = SweepConfig(
        recipe=[],
        space={"model.beta": {"loguniform": [0.01, 0.5]}, "model.lr": {"loguniform": [1e-6, 1e-4]}},
        samples=settings.trials,
        search=settings.search,
        scheduler=settings.scheduler,
        concurrency=settings.gpus,
        storage=settings.folder,
        name=f"trials{settings.trials}",
    )
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    with simulated(simulation), clock.watching(functions):
        result = sweeping.sweep(config, module=ThinModule, verbose=False)
    seconds = time.perf_counter() - began
    files, sizes = _sizes(Path(result.location))
    table = _table_seconds(settings.trials)
    return {
        "trials": len(result.trials),
        "reports": sum(len(trial.history) for trial in result.trials),
        "events": simulation.events,
        "sweep_seconds": seconds,
        "trials_own_seconds": simulation.seconds,
        "before_mib": before,
        "peak_mib": resident_mib("VmHWM"),
        "seconds": dict(clock.seconds),
        "calls": dict(clock.calls),
        "last_seconds": clock.last,
        "files": files,
        "bytes": sizes,
        "table_seconds": table,
        "report": result.report_path,
    }


def _table_seconds(trials: int) -> float:
    """Median seconds to draw the live table on a terminal of 120 x 40, with so many trials in it."""
    from rich.console import Console

    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from sweep_results import ACCURACY, made_up

    from lightning_dpo.tuning.objective import Goal
    from lightning_dpo.tuning.report.trial_table import TrialLine, progress_notice, trial_table

    lines = []
    for place, record in enumerate(sorted(made_up("/x", trials=trials).trials, key=lambda one: one.id)):
        line = TrialLine(record.id, record.overrides)
        if record.history:
            line.report(record.last)
        line.status = str(record.status) if place < trials - 8 else "running"
        lines.append(line)
    goals = [Goal(ACCURACY, "max")]
    taken = []
    for _ in range(5):
        console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True)
        began = time.perf_counter()
        title = progress_notice(lines, samples=trials, began=time.time() - 60)
        console.print(trial_table(lines, goals=goals, title=title, count=34, width=120))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _sizes(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Files and bytes by what stands first in the sweep's folder."""
    files: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).parts[0]
            files[name] += 1
            sizes[name] += path.stat().st_size
    return dict(files), dict(sizes)


def open_report(path: str) -> dict[str, float] | None:
    """Seconds until a report has loaded with its first chart, until its last is drawn, and of frames while it
    is scrolled; None without Chromium."""
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if executable is None:
        return None
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = chromium.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(Path(path).as_uri(), wait_until="load")
        charts = page.locator(".chart").count()
        page.wait_for_function(f"document.querySelectorAll('.chart .main-svg').length >= {charts}")
        drawn = page.evaluate("performance.now()")
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        elements = page.evaluate("document.querySelectorAll('*').length")
        page.evaluate(_WATCH_FRAMES)
        page.mouse.move(200, 400)
        for _ in range(60):
            page.mouse.wheel(0, 300)
            page.wait_for_timeout(30)
        frames = page.evaluate("frames_taken.slice(1)")
        chromium.close()
    return {
        "load": timing["loadEventEnd"] / 1000,
        "drawn": drawn / 1000,
        "frame": statistics.median(frames) / 1000,
        "longest_frame": max(frames) / 1000,
        "elements": elements,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000], help="of each sweep")
    parser.add_argument("--machines", type=int, default=64)
    parser.add_argument("--gpus", type=int, default=8, help="of each machine; a trial takes one")
    parser.add_argument("--reports", type=int, default=8, help="validations of a whole trial")
    parser.add_argument("--search", choices=("random", "optuna"), default="optuna")
    parser.add_argument("--scheduler", choices=("asha", "none"), default="asha")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep_scale.json"), help="all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for trials in options.trials:
            gpus = options.machines * options.gpus
            settings = Settings(trials, gpus, options.search, options.scheduler, options.reports, folder)
            found.append(run_child("benchmarks.sweep_scale", "child", settings, threads=1))
            found[-1]["opened"] = open_report(found[-1]["report"])
            record = {"options": {**vars(options), "output": ""}, "sweeps": found}
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(record, indent=1))
            print(f"{trials} trials in {found[-1]['sweep_seconds']:.0f} s", flush=True)
    print(table(found))
    print(f"\nall numbers: {options.output}")


def table(found: Sequence[dict[str, Any]]) -> str:
    """One column for each sweep."""
    lines: list[tuple[str, list[str]]] = []

    def add(name: str, value: Callable[[dict[str, Any]], float | None], form: str = ",.0f") -> None:
        values = [value(one) for one in found]
        lines.append((name, ["" if one is None else f"{one:{form}}" for one in values]))

    add("trials", lambda one: one["trials"])
    add("reports", lambda one: one["reports"])
    add("memory before, MiB", lambda one: one["before_mib"])
    add("peak memory, MiB", lambda one: one["peak_mib"])
    add(
        "the sweep without its trials, s", lambda one: one["sweep_seconds"] - one["trials_own_seconds"], ".1f"
    )
    for label in ("choose values", "scheduler", "stop rules", "callbacks", "live table"):
        add(f"{label}, ms a call", lambda one, label=label: 1000 * _mean(one, label), ".2f")  # type: ignore[misc]
    add("writes of Tune's state", lambda one: one["calls"]["state: written"])
    add("... the last one, ms", lambda one: 1000 * one["last_seconds"]["state: written"], ".1f")
    add("draw the live table, ms", lambda one: 1000 * one["table_seconds"], ".1f")
    for label in ("gather trials", "gather result", "save result", "report"):
        add(f"{label}, s", lambda one, label=label: one["seconds"].get(label), ".2f")  # type: ignore[misc]
    names = sorted({name for one in found for name in one["bytes"]})
    for name in names:
        add(f"{name}, kB", lambda one, name=name: one["bytes"].get(name, 0) / 1000)  # type: ignore[misc]
        add(f"{name}, files", lambda one, name=name: one["files"].get(name, 0))  # type: ignore[misc]
    for key in ("load", "drawn", "frame", "longest_frame"):
        add(f"report {key}, s", lambda one, key=key: (one["opened"] or {}).get(key), ".3f")  # type: ignore[misc]
    add("report's elements", lambda one: (one["opened"] or {}).get("elements"))
    return "\n".join(f"{name:36}" + "".join(f"{value:>12}" for value in values) for name, values in lines)


def _mean(one: dict[str, Any], label: str) -> float:
    calls = one["calls"].get(label, 0)
    return float(one["seconds"][label] / calls) if calls else 0.0


def child() -> None:
    _, settings_file, result_file = sys.argv[1:]
    settings = Settings(**json.loads(Path(settings_file).read_text()))
    Path(result_file).write_text(json.dumps(run_sweep(settings)))


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["child"] else main()
