"""How near a sweep's winner is to the truly best trial: by its last value, and as recommended.

    python -m benchmarks.winners --folder outputs/winners

Points of the demonstration's space are trained on the embedded task once for each seed, which changes the
order of the data, and validated on many pairs: the mean over all of these and over all seeds is taken for the
truth of a point. A sweep then is a draw of 400 of these pairs, the same for all trials, and of a seed for
each trial; nothing is trained anew. `repeats` takes all seeds of each point, and `confirm` the top three of
the last values with the seeds that they did not have. The KL is the drawn run's, on 64 completions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dpo.tuning.objective import KL, Goal
from lightning_dpo.tuning.results.comparison import compare
from lightning_dpo.tuning.results.recommendation import recommend
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.outcomes import OutcomeRecorder, PairOutcomes, load_outcomes
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.status import TrialStatus

METRIC = "val/rewards/accuracy"
PAIRS, HELD_OUT, STEPS = 400, 8192, 64


@dataclass(frozen=True)
class Choice:
    """What a way of choosing took in one sweep: its true accuracy below the best one's, and its KL."""

    shortfall: float
    kl: float


def main() -> None:
    """Train what is missing, then draw sweeps and print what each way of choosing would have taken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/winners"), help="keeps what was trained")
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--true-pairs", type=int, default=4096, help="pairs that the truth is measured on")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--sweeps", type=int, default=20)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    _train_missing(arguments.folder, arguments.points, arguments.seeds, pairs=arguments.true_pairs)
    _report(
        arguments.folder,
        arguments.points,
        arguments.seeds,
        sweeps=arguments.sweeps,
        confidence=arguments.confidence,
    )


def _train_missing(folder: Path, points: int, seeds: int, *, pairs: int) -> None:
    """Train runs that are not there yet."""
    from lightning_dpo.demo.task import TaskConfig, prepare_task

    task = prepare_task(folder / "task", config=TaskConfig(validation_pairs=HELD_OUT), progress=False)
    draw = np.random.default_rng(0)
    betas = np.exp(draw.uniform(np.log(0.03), np.log(1.0), 64))
    rates = np.exp(draw.uniform(np.log(0.002), np.log(0.05), 64))
    (folder / "runs").mkdir(exist_ok=True)
    for seed in range(seeds):
        for point in range(points):
            name = f"{point}_{seed}"
            place = folder / "runs" / f"{name}.json"
            if not place.is_file():
                beta, lr = float(betas[point]), float(rates[point])
                place.write_text(json.dumps(_train(folder, task, beta=beta, lr=lr, name=name, pairs=pairs)))
                print(name, place.read_text(), flush=True)


def _train(folder: Path, task: Any, *, beta: float, lr: float, name: str, pairs: int) -> dict[str, float]:
    import lightning.pytorch as pl
    import torch

    from lightning_dpo import DPOModule, PreferenceDataModule
    from lightning_dpo.demo.context import quiet, single_thread
    from lightning_dpo.evaluation import CompletionMonitor
    from lightning_dpo.losses import DPOLoss

    seed = int(name.rpartition("_")[2])
    with quiet(), single_thread():
        pl.seed_everything(seed, verbose=False)
        module = DPOModule(
            str(task.model),
            reference="frozen",
            loss=DPOLoss(beta=beta),
            optimizer=lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9),
        )
        data = PreferenceDataModule(
            str(task.train),
            validation=str(task.validation),
            validation_limit=pairs,
            tokenizer=str(task.model),
            max_length=128,
            batch_size=64,
            validation_batch_size=128,
            cache_dir=str(folder / "cache"),
            num_processes=1,
            seed=seed,
        )
        recorder = OutcomeRecorder(Storage(folder / "outcomes"), trial=name, metric=METRIC)
        trainer = pl.Trainer(
            max_epochs=2,
            check_val_every_n_epoch=2,
            callbacks=[CompletionMonitor(64, max_new_tokens=40), recorder],
            accelerator="cpu",
            default_root_dir=str(folder / "lightning"),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == STEPS
    values = {metric: float(trainer.callback_metrics[metric]) for metric in (METRIC, KL)}
    return {"beta": beta, "lr": lr, **values}


def _report(folder: Path, points: int, seeds: int, *, sweeps: int, confidence: float) -> None:
    runs = {}
    records = {}
    for point in range(points):
        for seed in range(seeds):
            found = load_outcomes(Storage(folder / "outcomes"), f"{point}_{seed}", step=STEPS)
            assert found is not None
            runs[point, seed] = found
            records[point, seed] = json.loads((folder / "runs" / f"{point}_{seed}.json").read_text())
    truth = np.array([np.mean([runs[p, s].mean for s in range(seeds)]) for p in range(points)])
    print(f"truth of {points} points: {np.sort(truth)[::-1].round(4).tolist()}")
    if seeds > 1:
        deviations = [np.std([runs[p, s].mean for s in range(seeds)], ddof=1) for p in range(points)]
        print(f"standard deviation between seeds: {np.sqrt(np.mean(np.square(deviations))):.4f}")
    choices: dict[str, list[Choice]] = {}
    kept = 0
    for number in range(sweeps):
        draw = np.random.default_rng(number)
        pairs = np.sort(draw.choice(len(runs[0, 0].keys), PAIRS, replace=False))
        drawn = draw.integers(0, seeds, points)
        one = {p: [_subset(runs[p, drawn[p]], pairs)] for p in range(points)}
        every = {
            p: [_subset(runs[p, (drawn[p] + k) % seeds], pairs) for k in range(seeds)] for p in range(points)
        }
        last = {p: one[p][0].mean for p in one}
        top = sorted(one, key=lambda p: -last[p])[:3]
        confirmed = {p: every[p][1:] for p in top}
        kls = {p: records[p, drawn[p]][KL] for p in range(points)}
        ways: dict[str, tuple[dict[int, list[PairOutcomes]], float | None]] = {
            "last value": (one, None),
            "recommended": (one, confidence),
        }
        if seeds > 1:
            ways |= {
                "repeats, mean": (every, None),
                "repeats, recommended": (every, confidence),
                "confirm: 3, mean": (confirmed, None),
                "confirm: 3, recommended": (confirmed, confidence),
            }
        for name, (outcomes, level) in ways.items():
            taken, marked = _choose(outcomes, kls=kls, confidence=level)
            choices.setdefault(name, []).append(Choice(float(truth.max() - truth[taken]), kls[taken]))
            if name == "recommended":
                kept += int(np.argmax(truth)) in marked
    for name, found in choices.items():
        shortfalls = np.array([choice.shortfall for choice in found])
        print(
            f"{name:24} within 1 point in {(shortfalls <= 0.01).sum()} of {sweeps}, "
            f"{100 * shortfalls.mean():.2f} points below the best on average (at most "
            f"{100 * shortfalls.max():.2f}), KL {np.mean([choice.kl for choice in found]):.2f}"
        )
    print(f"the truly best one cannot be told from the winner in {kept} of {sweeps}")


def _choose(
    outcomes: dict[int, list[PairOutcomes]], *, kls: dict[int, float], confidence: float | None
) -> tuple[int, set[int]]:
    """The point that is taken, by the mean alone where there is no confidence; and the points marked."""
    means = {point: float(np.mean([run.mean for run in runs])) for point, runs in outcomes.items()}
    order = sorted(outcomes, key=lambda point: (-means[point], kls[point]))
    if confidence is None:
        return order[0], set()
    named = {str(point): outcomes[point] for point in order}
    compared = compare(named, goal=Goal(METRIC, "max"), confidence=confidence)
    trials = [
        TrialRecord(str(p), {}, TrialStatus.FINISHED, history=({METRIC: means[p], KL: kls[p]},))
        for p in order
    ]
    chosen = recommend(trials, compared, confidence=confidence).trial
    return int(chosen.id), {int(name) for name, one in compared.items() if one.is_level}


def _subset(outcomes: PairOutcomes, pairs: Any) -> PairOutcomes:
    return outcomes._replace(
        keys=outcomes.keys[pairs], values=outcomes.values[pairs], weights=outcomes.weights[pairs]
    )


if __name__ == "__main__":
    main()
