"""What to run on the first GPU: the tests that need one, then training beside TRL and beside packing.

``python -m benchmarks.gpu`` takes 10 minutes at most and writes ``outputs/gpu.json`` and ``outputs/gpu.md``,
whole after every turn. What fails is a line there, and the rest goes on. ``--dry-run`` goes the same way
on the CPU with a tiny model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.child import VARIANTS, Settings, run_variant
from benchmarks.device import measure_device
from benchmarks.gpu_report import Found, Report, Work
from benchmarks.process import ROOT
from benchmarks.worker import FailedTurnError, Worker
from benchmarks.workload import prepare
from benchmarks.works import DEFAULT_MODEL, LLAMA_1B, TINY
from lightning_dpo.files import write_file
from lightning_dpo.parallel.memory.shapes import load_config, model_shape

ARMS = ("ours", "packed", "trl", "trl-liger", "trl-precomputed")
NEEDS = {"trl": "trl", "trl-liger": "liger_kernel", "trl-precomputed": "trl"}

MODELS: dict[str, str | dict[str, Any]] = {
    "smollm2-135m": DEFAULT_MODEL,
    "llama-1b": LLAMA_1B,
    "tiny": TINY,
}

DRY_RUN = {
    **{"device": "cpu", "models": ["tiny"], "batch_size": 2, "max_length": 256},
    **{"steps": 2, "warmup": 1, "watched": 1, "rounds": 2},
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model and short rows")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["smollm2-135m", "llama-1b"])
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(ARMS))
    parser.add_argument("--batch-size", type=int, default=16, help="pairs of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and one completion")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--watched", type=int, default=2, help="steps after them, for waits of the host")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant, as time allows")
    parser.add_argument(
        "--tests", nargs="*", help="test files to run; by default those with a test that needs a GPU"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="without its suffixes")
    parser.set_defaults(**(DRY_RUN if "--dry-run" in (sys.argv if argv is None else argv) else {}))
    options = parser.parse_args(argv)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch finds none; `--dry-run` goes the same way on the CPU")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the tests passed and "ours" ran with every model."""
    options = parse(argv)
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    return Run(options).all()


class Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.report = Report({name: str(value) for name, value in vars(options).items()})
        self.missing = {
            name: f"{NEEDS[name]} is not installed"
            for name in options.variants
            if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None
        }
        self.workers: dict[str, Worker] = {}

    def all(self) -> int:
        try:
            for name in self.options.variants:
                if name not in self.missing:
                    self.worker(name)  # they import while the tests run
            passed = self.run_tests()
            self.report.device = self.worker(self.options.variants[0]).ask(
                measure_device, self.options.device, timeout=self.left()
            )
            for number, model in enumerate(self.options.models):
                share = self.left() / (len(self.options.models) - number)
                self.run_model(model, until=time.monotonic() + share)
        finally:
            for worker in self.workers.values():
                worker.close()
            self.write()
        print(self.report.text(), flush=True)
        return int(not passed or any("ours" in found.failures for found in self.report.models))

    def run_tests(self) -> bool:
        """Run the tests that need a GPU, in a quarter of the time at most; without one they skip."""
        files = self.options.tests
        if files == []:
            return True
        if files is None:
            files = sorted(
                str(path) for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()
            )
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=self.left() / 4
            )
        except subprocess.TimeoutExpired:
            self.report.tests = "took more than a quarter of the time"
            return False
        self.log("tests").write_text(done.stdout + done.stderr)
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        self.report.tests = "; ".join([lines[-1].strip("= "), *failed])
        self.write()
        return done.returncode == 0

    def run_model(self, model: str, *, until: float) -> None:
        found = Found(model, failures=dict(self.missing))
        self.report.models.append(found)
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            count = (options.warmup + options.steps + options.watched) * options.batch_size
            try:
                workload = prepare(
                    Path(folder), model=MODELS[model], count=count, max_length=options.max_length
                )
            except Exception as error:
                found.failures.update(dict.fromkeys(options.variants, f"no model: {error}"))
                return
            shape = model_shape(load_config(workload.model))
            timed = workload.pairs()[options.warmup * options.batch_size :]
            found.work = Work.of(timed[: options.steps * options.batch_size], shape)
            found.description = (
                f"{shape.parameters / 1e6:.1f} million weights in float32, bf16 autocast; "
                f"{workload.description} of at most {options.max_length} tokens, batches of "
                f"{options.batch_size} pairs, {options.steps} timed steps"
            )
            settings = Settings(
                workload=folder,
                steps=options.steps,
                warmup=options.warmup,
                batch_size=options.batch_size,
                threads=torch.get_num_threads(),
                gradient_checkpointing=False,
                device=options.device,
                watched=options.watched,
            )
            self.run_rounds(found, settings, until=until)

    def run_rounds(self, found: Found, settings: Settings, *, until: float) -> None:
        """Turns of all variants, in the other order every other round; what failed has no further turn."""
        seconds: dict[str, float] = {}
        for number in range(self.options.rounds):
            found.rounds.append({})
            order = self.options.variants[:: -1 if number % 2 else 1]
            for name in order:
                if name in found.failures:
                    continue
                left = until - time.monotonic()
                if left < seconds.get(name, 1):
                    found.failures[name] = f"no time for round {number + 1}" + " and on" * (number > 0)
                    continue
                started = time.monotonic()
                try:
                    # A turn that hangs must leave time for the others.
                    result = self.worker(name).ask(run_variant, name, settings, timeout=max(left / 2, 1))
                    found.rounds[-1][name] = result
                except FailedTurnError as error:
                    found.failures[name] = str(error)
                    self.workers.pop(name).close()
                seconds[name] = time.monotonic() - started
                self.write()
                print(f"{found.model}, round {number + 1}, {name}: {self.outcome(found, name)}", flush=True)

    def outcome(self, found: Found, name: str) -> str:
        run = found.rounds[-1].get(name)
        return found.failures[name] if run is None else f"{run.pairs_per_second:.2f} pairs/s"

    def worker(self, name: str) -> Worker:
        if name not in self.workers:
            peers, own = ("trl", "datasets"), ("lightning.pytorch", "lightning_dpo")
            modules = peers if name.startswith("trl") else own
            self.workers[name] = Worker(log=self.log(name), modules=modules)
        return self.workers[name]

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def log(self, name: str) -> Path:
        """Where what was printed goes."""
        folder = self.options.output.with_suffix(".logs")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def write(self) -> None:
        output: Path = self.options.output
        write_file(output.with_suffix(".json"), json.dumps(self.report.record(), indent=1))
        write_file(output.with_suffix(".md"), self.report.text())


if __name__ == "__main__":
    sys.exit(main())
