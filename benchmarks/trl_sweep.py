"""A sweep of 8 trials beside TRL's DPOTrainer in a plain Ray Tune function, as it is and at its best.

``python -m benchmarks.trl_sweep`` prints wall times of whole processes, reference passes, and where the
seconds of a trial go. All search the same 4 values of beta and 2 learning rates, each trial one epoch, a
validation and a checkpoint at its end. They take turns, in an order that rotates, so that a busy machine
slows all of them; ratios are taken within a round. Whatever is measured is written at once: ``--resume`` goes
on with what is missing.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.process import run_child
from benchmarks.sweep_settings import VARIANTS, Settings
from benchmarks.sweep_timeline import SWEEP_PHASES, TRIAL_PHASES
from benchmarks.trl_throughput import DATA
from benchmarks.works import DEFAULT_MODEL
from lightning_dpo.demo.task import prepare_task
from lightning_dpo.files import write_file
from lightning_dpo.models.load import load_model, load_tokenizer

BETAS = (0.05, 0.1, 0.2, 0.4)
REPORTS = 4
"""Validations of an epoch where trials may be stopped early."""

PAIRS = {"small": (1024, 512), "smollm2": (64, 32)}
"""To train on and held out, where the command line names no others."""

Measured = dict[str, Any]
"""An `Outcome` as JSON has it, with the wall time of its process in "seconds"."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        choices=("small", "smollm2", "all"),
        default="small",
        help="the embedded task, SmolLM2-135M on rows of hh-rlhf, or both",
    )
    parser.add_argument(
        "--scheduler", choices=("none", "asha"), default="none", help=f"asha: {REPORTS} validations an epoch"
    )
    parser.add_argument("--rounds", type=int, default=3, help="sweeps of each kind")
    parser.add_argument("--trials", type=int, default=8, choices=(2, 4, 6, 8), help="points of the grid")
    parser.add_argument("--train", type=int, help="pairs to train on")
    parser.add_argument("--validation", type=int, help="held-out pairs")
    parser.add_argument("--longest", type=int, default=2000, help="characters of a row of hh-rlhf")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="hh-rlhf's harmless-base/train.jsonl.gz, for --work smollm2"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("outputs/trl_sweep.json"), help="all numbers")
    parser.add_argument("--resume", action="store_true", help="keep the rounds that the output has")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    works = tuple(PAIRS) if options.work == "all" else (options.work,)
    if "smollm2" in works and not options.data.is_file():
        missing = (
            f"`--data` must be rows of hh-rlhf, got {str(options.data)!r}, which is no file: take "
            "harmless-base/train.jsonl.gz of https://huggingface.co/datasets/Anthropic/hh-rlhf"
        )
        if options.work != "all":
            raise SystemExit(missing)
        print(f"SmolLM2 is left out. {missing}", flush=True)
        works = ("small",)
    for work in works:
        with tempfile.TemporaryDirectory() as folder:
            measure(work, options, Path(folder))
    print(f"\nall numbers: {options.output}")


def measure(work: str, options: argparse.Namespace, folder: Path) -> None:
    """Run the rounds that are missing, writing what each sweep gave, and print the tables."""
    train, validation = (
        given or usual for given, usual in zip((options.train, options.validation), PAIRS[work], strict=True)
    )
    chosen = {"train": train, "validation": validation, "trials": options.trials}
    if work == "smollm2":
        chosen["longest"] = options.longest
    name = work if options.scheduler == "none" else f"{work}, {options.scheduler}"
    record = Record(options.output, name, chosen, keep=options.resume)
    if record.missing(options.variants, rounds=options.rounds):
        make = small if work == "small" else partial(smollm2, data=options.data)
        settings = make(folder, **chosen)
        if options.scheduler == "asha":
            every = max(train // settings.batch_size // REPORTS, 1)
            asha = {"max_t": REPORTS, "grace_period": 1, "reduction_factor": 2}
            settings = settings._replace(report_every=every, asha=asha)
        for number, variant in record.missing(options.variants, rounds=options.rounds):
            found = run(variant, settings)
            record.add(number, variant, found)
            print(f"{name}, round {number + 1}: {variant} {found['seconds']:.1f} s", flush=True)
    print(f"\n{name}: {', '.join(f'{value} {key}' for key, value in chosen.items())}")
    print(report(record.rounds[: options.rounds], options.variants))


class Record:
    """What was measured of one kind of work, in a file that has others' too."""

    def __init__(self, path: Path, name: str, chosen: Mapping[str, int], *, keep: bool) -> None:
        self._path, self._name, self._chosen = path, name, dict(chosen)
        known = self._all().get(name, {})
        if keep and known and known["options"] != self._chosen:
            raise SystemExit(
                f"--resume: {path} has {name} with {known['options']}, not {self._chosen}; "
                "leave --resume out to measure anew, or name another --output"
            )
        self.rounds: list[dict[str, Measured]] = known["rounds"] if keep and known else []

    def missing(self, variants: Sequence[str], *, rounds: int) -> list[tuple[int, str]]:
        """Which variants of which round are to run, in their order: each round begins with another one."""
        turns = [
            (number, [*variants[number % len(variants) :], *variants[: number % len(variants)]])
            for number in range(rounds)
        ]
        return [
            (number, variant)
            for number, order in turns
            for variant in order
            if number >= len(self.rounds) or variant not in self.rounds[number]
        ]

    def add(self, number: int, variant: str, found: Measured) -> None:
        """Write what a sweep gave."""
        self.rounds += [{} for _ in range(number + 1 - len(self.rounds))]
        self.rounds[number][variant] = found
        entry = {"options": self._chosen, "rounds": self.rounds}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self._path, json.dumps({**self._all(), self._name: entry}, indent=1))

    def _all(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        return found


def small(folder: Path, *, train: int, validation: int, trials: int) -> Settings:
    """The embedded task's model and pairs."""
    task = prepare_task(folder / "task", progress=False)
    files = [
        cut(path, folder / f"{name}.jsonl", count)
        for name, path, count in (("train", task.train, train), ("validation", task.validation, validation))
    ]
    betas = BETAS[: trials // 2]
    return Settings(
        str(task.model), *files, batch_size=16, cpus=1, bf16=False, betas=betas, rates=(1e-4, 1e-3)
    )


def smollm2(folder: Path, *, data: Path, train: int, validation: int, trials: int, longest: int) -> Settings:
    """SmolLM2-135M and rows of hh-rlhf, as plain text."""
    load_model(DEFAULT_MODEL).save_pretrained(folder / "model")
    load_tokenizer(DEFAULT_MODEL).save_pretrained(folder / "model")
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    shuffled = (rows[index] for index in np.random.default_rng(0).permutation(len(rows)))
    found = (as_text(row, longest=longest) for row in shuffled)
    texts = list(itertools.islice(filter(None, found), train + validation))
    files = []
    for name, part in (("train", texts[:train]), ("validation", texts[train:])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        files.append(str(path))
    betas = BETAS[: trials // 2]
    return Settings(
        str(folder / "model"), *files, batch_size=4, cpus=2, bf16=True, betas=betas, rates=(5e-6, 5e-5)
    )


def as_text(row: Mapping[str, str], *, longest: int) -> dict[str, str] | None:
    """Prompt and completions of a row of hh-rlhf; None where they are empty, or a text is too long."""
    turn = "\n\nAssistant:"
    prompt, _, chosen = row["chosen"].rpartition(turn)
    other, _, rejected = row["rejected"].rpartition(turn)
    if prompt != other or not chosen.strip() or not rejected.strip():
        return None
    if max(len(row["chosen"]), len(row["rejected"])) > longest:
        return None
    return {"prompt": prompt + turn, "chosen": chosen, "rejected": rejected}


def cut(source: Path, target: Path, count: int) -> str:
    """The first lines of a file, with nothing but the texts."""
    rows = [json.loads(line) for line in source.read_text().splitlines()[:count]]
    kept = ("prompt", "chosen", "rejected")
    target.write_text("".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows))
    return str(target)


def run(variant: str, settings: Settings) -> Measured:
    """A sweep in a process of its own; seconds from the process's start to its end."""
    began = time.perf_counter()
    found = run_child("benchmarks.sweep_child", variant, settings, threads=settings.cpus)
    return {"seconds": time.perf_counter() - began, **found}


def report(rounds: Sequence[Mapping[str, Measured]], variants: Sequence[str]) -> str:
    """The tables of a kind of work."""
    runs = {variant: [each[variant] for each in rounds if variant in each] for variant in variants}
    width = max(map(len, VARIANTS)) + 2
    lines = [f"{'':{width}}{'wall time, s':>24}{'reference passes':>18}{'steps':>8}{'best accuracy':>15}"]
    for variant, found in runs.items():
        span = spread([one["seconds"] for one in found], ".1f")
        first = found[0]
        passes = first["reference_pairs"] / first["pairs"]
        best = max(first["accuracies"].values())
        lines.append(f"{variant:{width}}{span:>24}{passes:>18.2f}{first['steps']:>8}{best:>15.3f}")
    for variant in variants:
        both = [each for each in rounds if variant in each and "ours" in each and variant != "ours"]
        if both:
            ratios = [each[variant]["seconds"] / each["ours"]["seconds"] for each in both]
            lines.append(f"{variant} / ours: {spread(ratios, '.2f')}")
    for title, key, names in (
        ("seconds of a trial", "trial_seconds", TRIAL_PHASES),
        ("seconds of a sweep", "sweep_seconds", SWEEP_PHASES),
    ):
        lines += ["", f"{title:24}" + "".join(f"{variant:>12}" for variant in variants)]
        lines += [row(name, [[one[key][name] for one in found] for found in runs.values()]) for name in names]
        lines.append(row("all", [[sum(one[key].values()) for one in found] for found in runs.values()]))
    return "\n".join(lines)


def row(name: str, values: Sequence[Sequence[float]]) -> str:
    """A line of medians."""
    return f"  {name:22}" + "".join(f"{statistics.median(one):>12.2f}" for one in values)


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


if __name__ == "__main__":
    main()
