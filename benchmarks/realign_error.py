"""How well a realigned family stands in for training at other betas, on the embedded task.

``python -m benchmarks.realign_error`` trains policies by DPO at several betas, realigns one of them, by its
predictions and by its weights, and prints two tables: KL and true score of each member beside the policy that
was trained at beta / lambda, and the score at the KL of each trained policy.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_dpo.demo.context import quiet, single_thread
from lightning_dpo.demo.grammar import PROMPTS, score
from lightning_dpo.demo.model import MAX_NEW_TOKENS
from lightning_dpo.demo.pairs import completion_text
from lightning_dpo.demo.run import run_demo
from lightning_dpo.demo.task import TaskConfig
from lightning_dpo.evaluation.realign import WeightFamily, realigned_samples
from lightning_dpo.models.load import load_model, load_tokenizer


class Point(NamedTuple):
    """KL in nats a completion, and mean true score in stars."""

    kl: float
    score: float


class Run(NamedTuple):
    """One seed: trained policies by beta, and the families of one of them by lambda."""

    trained: dict[float, Point]
    limit: dict[float, float]
    decoded: dict[float, Point]
    weights: dict[float, Point]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beta", type=float, default=0.4, help="of the policy that is realigned")
    parser.add_argument(
        "--lr", type=float, default=0.015, help="highest learning rate; that of the figures in README"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="lambda")
    parser.add_argument(
        "--between", type=float, nargs="*", default=[0.3, 0.7, 1.25, 1.5], help="more of the families alone"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and samples")
    parser.add_argument("--samples-per-prompt", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("outputs/realign_error"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    runs = [measure(options, seed) for seed in options.seeds]
    print_forecast(runs, options)
    print_at_equal_kl(runs, options)
    found = [{name: _plain(value) for name, value in run._asdict().items()} for run in runs]
    path = options.output / "realign_error.json"
    path.write_text(json.dumps({"beta": options.beta, "seeds": options.seeds, "runs": found}, indent=1))
    print(f"all numbers: {path}")


@quiet()
@single_thread()
def measure(options: argparse.Namespace, seed: int) -> Run:
    root, config = options.output, TaskConfig()
    trained, limit = {}, {}
    for scale in sorted({*options.scales, 1.0}):
        print(f"seed {seed}: training at beta {options.beta / scale:.3g} ...", flush=True)
        result = run_demo(
            output=root,
            beta=options.beta / scale,
            lr=options.lr,
            seed=seed,
            task=config,
            samples_per_prompt=options.samples_per_prompt,
            verbose=False,
        )
        trained[scale] = Point(result.after.kl.mean, result.after.score.mean)
        limit[scale] = result.best.reward
        if scale == 1:
            base = root / f"base-{seed}"
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(result.policy, base)
    policy, reference = load_model(str(base)), load_model(str(root / "task" / "model"))
    tokenizer: Any = load_tokenizer(str(base))
    prompts = tokenizer(list(PROMPTS))["input_ids"] * options.samples_per_prompt

    def draw(model: nn.Module, scale: float) -> Point:
        drawn = realigned_samples(
            model,
            reference=reference,
            prompts=prompts,
            scale=scale,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            batch_size=256,
        )
        scores = [score(completion_text(sample, tokenizer=tokenizer)) for sample in drawn.samples]
        return Point(drawn.estimate.mean, mean(scores))

    members = sorted({*options.scales, *options.between})
    print(f"seed {seed}: sampling {len(members)} members of each family ...", flush=True)
    family = WeightFamily(policy, reference=reference)
    decoded = {scale: draw(policy, scale) for scale in members}
    return Run(trained, limit, decoded, {scale: draw(family.at(scale), 1.0) for scale in members})


def print_forecast(runs: Sequence[Run], options: argparse.Namespace) -> None:
    table = Table(title="beta / lambda as a forecast (means over seeds)")
    for name in ("λ", "β/λ", "trained KL", "score", "decoded KL", "score", "weights KL", "score"):
        table.add_column(name, justify="right")
    for scale in sorted(options.scales):
        cells = [f"{scale:g}", f"{options.beta / scale:.3g}"]
        for of in ("trained", "decoded", "weights"):
            points = [getattr(run, of)[scale] for run in runs]
            cells += [f"{mean(p.kl for p in points):.2f}", f"{mean(p.score for p in points):.2f}"]
        table.add_row(*cells)
    Console().print(table)


def print_at_equal_kl(runs: Sequence[Run], options: argparse.Namespace) -> None:
    table = Table(title="score at the KL of each trained policy (means over seeds)")
    for name in ("β", "KL", "trained", "decoded", "weights", "best reachable"):
        table.add_column(name, justify="right")
    for scale in sorted(options.scales):
        kls = [run.trained[scale].kl for run in runs]
        cells = [f"{options.beta / scale:.3g}", f"{mean(kls):.2f}"]
        cells.append(f"{mean(run.trained[scale].score for run in runs):.2f}")
        for of in ("decoded", "weights"):
            found = [at_kl(getattr(run, of).values(), kl) for run, kl in zip(runs, kls, strict=True)]
            cells.append("beyond" if None in found else f"{mean(v for v in found if v is not None):.2f}")
        cells.append(f"{mean(run.limit[scale] for run in runs):.2f}")
        table.add_row(*cells)
    Console().print(table)


def at_kl(points: Iterable[Point], kl: float) -> float | None:
    """The score at a KL, between the two members whose KLs enclose it; None beyond the last one."""
    ordered = sorted(points)
    for low, high in pairwise(ordered):
        if low.kl <= kl <= high.kl:
            share = (kl - low.kl) / (high.kl - low.kl)
            return float(low.score + share * (high.score - low.score))
    return None


def _plain(values: dict[float, Any]) -> dict[str, Any]:
    return {f"{k:g}": v._asdict() if isinstance(v, Point) else v for k, v in values.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
