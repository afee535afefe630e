"""A sweep of 8 trials beside TRL's DPOTrainer in a plain Ray Tune function, alternating on the same rows.

``python -m benchmarks.trl_sweep`` prints wall times, of whole processes, and reference passes. Both search
the same 4 values of beta and 2 learning rates, each trial one epoch and a validation at its end.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.process import run_child
from benchmarks.sweep_child import VARIANTS, Outcome, Settings
from benchmarks.trl_throughput import DATA
from benchmarks.works import DEFAULT_MODEL
from lightning_dpo.demo.task import prepare_task
from lightning_dpo.models.load import load_model, load_tokenizer


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", choices=("small", "smollm2"), default="small", help="the embedded task, or SmolLM2-135M"
    )
    parser.add_argument("--rounds", type=int, default=3, help="sweeps of each kind")
    parser.add_argument("--train", type=int, help="pairs to train on")
    parser.add_argument("--validation", type=int, help="held-out pairs")
    parser.add_argument("--output", type=Path, default=Path("outputs/trl_sweep.json"), help="all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        make = small if options.work == "small" else smollm2
        settings = make(Path(folder), options.train, options.validation)
        rounds: list[dict[str, tuple[float, Outcome]]] = []
        for number in range(options.rounds):
            order = list(VARIANTS) if number % 2 == 0 else list(VARIANTS)[::-1]
            rounds.append({variant: run(variant, settings) for variant in order})
            print(f"round {number + 1}: {brief(rounds[-1])}", flush=True)
    print(report(rounds))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = [{name: {"seconds": s, **o._asdict()} for name, (s, o) in each.items()} for each in rounds]
    options.output.write_text(json.dumps({"settings": settings._asdict(), "rounds": record}, indent=1))
    print(f"\nall numbers: {options.output}")


def small(folder: Path, train: int | None, validation: int | None) -> Settings:
    """The embedded task's model and pairs."""
    task = prepare_task(folder / "task", progress=False)
    files = [
        cut(path, folder / f"{name}.jsonl", count)
        for name, path, count in (("train", task.train, train), ("validation", task.validation, validation))
    ]
    return Settings(str(task.model), *files, batch_size=16, cpus=1, bf16=False, rates=(1e-4, 1e-3))


def smollm2(folder: Path, train: int | None, validation: int | None) -> Settings:
    """SmolLM2-135M and short rows of hh-rlhf, as plain text."""
    load_model(DEFAULT_MODEL).save_pretrained(folder / "model")
    load_tokenizer(DEFAULT_MODEL).save_pretrained(folder / "model")
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    count = (train or 8) + (validation or 8)
    texts = list(itertools.islice(filter(None, map(as_text, rows)), count))
    files = []
    for name, part in (("train", texts[: train or 8]), ("validation", texts[train or 8 :])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        files.append(str(path))
    return Settings(str(folder / "model"), *files, batch_size=4, cpus=2, bf16=True, rates=(5e-6, 5e-5))


def as_text(row: dict[str, str]) -> dict[str, str] | None:
    """Prompt and completions of a row of hh-rlhf; None where they are empty, or too long for a short run."""
    turn = "\n\nAssistant:"
    prompt, _, chosen = row["chosen"].rpartition(turn)
    other, _, rejected = row["rejected"].rpartition(turn)
    if prompt != other or not chosen.strip() or not rejected.strip() or len(row["chosen"]) > 1200:
        return None
    return {"prompt": prompt + turn, "chosen": chosen, "rejected": rejected}


def cut(source: Path, target: Path, count: int | None) -> str:
    """The first lines of a file, with nothing but the texts."""
    rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
    kept = ("prompt", "chosen", "rejected")
    target.write_text("".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows))
    return str(target)


def run(variant: str, settings: Settings) -> tuple[float, Outcome]:
    """A sweep in a process of its own; seconds from the process's start to its end."""
    began = time.perf_counter()
    found = run_child("benchmarks.sweep_child", variant, settings, threads=settings.cpus)
    return time.perf_counter() - began, Outcome(**found)


def report(rounds: list[dict[str, tuple[float, Outcome]]]) -> str:
    lines = ["", f"{'':8}{'wall time, s':>24}{'reference passes':>18}{'best accuracy':>15}"]
    for variant in VARIANTS:
        seconds = [each[variant][0] for each in rounds]
        outcome = rounds[0][variant][1]
        span = f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f})"
        passes = outcome.reference_pairs / outcome.pairs
        lines.append(f"{variant:8}{span:>24}{passes:>18.2f}{max(outcome.accuracies.values()):>15.3f}")
    ratios = [each["trl"][0] / each["ours"][0] for each in rounds]
    lines.append(f"\ntrl / ours: {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
    return "\n".join(lines)


def brief(measured: dict[str, tuple[float, Outcome]]) -> str:
    return ", ".join(f"{name} {seconds:.1f} s" for name, (seconds, _) in measured.items())


if __name__ == "__main__":
    main()
