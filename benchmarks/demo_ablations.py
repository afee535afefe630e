"""What keeps DPO from the best score at its KL on the embedded task: one change at a time, and some together.

Run `python -m benchmarks.demo_ablations` from the repository: a line for each change, with the means of
score, KL and share of the limit over the seeds, and the range of the share. `--only pairs noise` takes
some groups of changes, `--betas 0.6 1.6` other strengths, `--json FILE` keeps every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.demo.context import quiet, quiet_trainer, single_thread
from lightning_dpo.demo.measure import best_reachable, measure
from lightning_dpo.demo.task import Task, TaskConfig, prepare_task
from lightning_dpo.losses import BCOLoss, CombinedLoss, DPOLoss, DPOPLoss, IPOLoss, SFTLoss
from lightning_dpo.losses.base import PreferenceLoss
from lightning_dpo.models.load import load_model, load_tokenizer


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to train on one task; the defaults are those of `lightning-dpo demo`."""

    loss: Callable[[float], PreferenceLoss] = lambda beta: DPOLoss(beta=beta)
    epochs: int = 4
    lr: float = 0.01
    adam: bool = False
    constant_lr: bool = False
    clip: float | None = 1.0
    averaged: bool = False
    task: dict[str, Any] = field(default_factory=dict)


BASE = Setting()

GROUPS: dict[str, dict[str, Setting]] = {
    "base": {"as shipped": BASE},
    "optimisation": {
        "2 epochs": replace(BASE, epochs=2),
        "8 epochs": replace(BASE, epochs=8),
        "constant rate": replace(BASE, constant_lr=True),
        "no clipping": replace(BASE, clip=None),
        "half the rate": replace(BASE, lr=0.005),
        "twice the rate": replace(BASE, lr=0.02),
        "AdamW, 3e-4": replace(BASE, adam=True, lr=3e-4),
        "AdamW, 1e-3": replace(BASE, adam=True, lr=1e-3),
        "mean of the last epochs' weights": replace(BASE, averaged=True),
    },
    "pairs": {
        "512 pairs, 16 epochs": replace(BASE, epochs=16, task={"train_pairs": 512}),
        "8192 pairs, 1 epoch": replace(BASE, epochs=1, task={"train_pairs": 8192}),
        "8192 pairs, 4 epochs": replace(BASE, task={"train_pairs": 8192}),
    },
    "noise": {"labels nearly without noise": replace(BASE, task={"label_scale": 5.0})},
    "capacity": {
        "width 192": replace(BASE, task={"hidden_size": 192}),
        "4 layers": replace(BASE, task={"layers": 4}),
        "reference fitted twice as long": replace(BASE, task={"fit_steps": 1000}),
    },
    "together": {
        "16384 pairs, 2 epochs": replace(BASE, epochs=2, task={"train_pairs": 16384}),
        "16384 pairs nearly without noise, 2 epochs": replace(
            BASE, epochs=2, task={"train_pairs": 16384, "label_scale": 5.0}
        ),
        "the same, width 192": replace(
            BASE, epochs=2, task={"train_pairs": 16384, "label_scale": 5.0, "hidden_size": 192}
        ),
    },
    "loss": {
        "IPO, beta / 4": replace(BASE, loss=lambda beta: IPOLoss(beta=beta / 4)),
        "label smoothing 0.1": replace(BASE, loss=lambda beta: DPOLoss(beta=beta, label_smoothing=0.1)),
        "BCO": replace(BASE, loss=lambda beta: BCOLoss(beta=beta)),
        "DPO-Positive": replace(BASE, loss=lambda beta: DPOPLoss(beta=beta)),
        "with 0.3 of the chosen's NLL": replace(
            BASE, loss=lambda beta: CombinedLoss([DPOLoss(beta=beta), SFTLoss()], weights=[1.0, 0.3])
        ),
    },
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run reached; score and limit in stars, KL in nats."""

    group: str
    change: str
    beta: float
    seed: int
    score: float
    kl: float
    limit: float
    effective_samples: float
    grammatical: float
    seconds: float

    @property
    def share(self) -> float:
        """Score as a share of the best reachable at this KL."""
        return self.score / self.limit


def train(task: Task, setting: Setting, *, beta: float, seed: int, cache: Path) -> DPOModule:
    """Train as the demonstration does, with one setting changed."""

    def optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        if setting.adam:
            return torch.optim.AdamW(parameters, lr=setting.lr, weight_decay=0.0)
        return torch.optim.SGD(parameters, lr=setting.lr, momentum=0.9)

    def schedule(built: torch.optim.Optimizer) -> Any:
        if setting.constant_lr:
            return torch.optim.lr_scheduler.ConstantLR(built, factor=1.0)
        return torch.optim.lr_scheduler.OneCycleLR(
            built,
            max_lr=setting.lr,
            total_steps=int(module.trainer.estimated_stepping_batches),
            pct_start=0.1,
            anneal_strategy="linear",
            cycle_momentum=False,
        )

    module = DPOModule(str(task.model), loss=setting.loss(beta), optimizer=optimizer, lr_scheduler=schedule)
    data = PreferenceDataModule(
        str(task.train),
        validation=str(task.validation),
        tokenizer=str(task.model),
        max_length=128,
        batch_size=64,
        cache_dir=str(cache),
        num_processes=1,
        seed=seed,
    )
    callbacks: list[pl.Callback] = []
    if setting.averaged:
        from lightning.pytorch.callbacks import StochasticWeightAveraging

        module.configure_model()  # it copies the module before the trainer does this
        callbacks.append(StochasticWeightAveraging(swa_lrs=setting.lr / 3, swa_epoch_start=0.5))
    trainer = quiet_trainer(
        max_epochs=setting.epochs, gradient_clip_val=setting.clip, limit_val_batches=0, callbacks=callbacks
    )
    trainer.fit(module, data)
    return module


@quiet()
@single_thread()
def run(
    folder: Path, setting: Setting, *, group: str, change: str, beta: float, seed: int, samples: int
) -> Outcome:
    """Train in one way with one seed, and measure."""
    config = TaskConfig(seed=seed, **setting.task)
    name = "-".join(f"{key}{value}" for key, value in sorted(setting.task.items())) or "shipped"
    task = prepare_task(folder / f"{name}-{seed}", config=config, progress=False)
    start = time.perf_counter()
    module = train(task, setting, beta=beta, seed=seed, cache=folder / "cache")
    seconds = time.perf_counter() - start
    policy = load_model(str(module.export(Path(tempfile.mkdtemp(dir=folder)) / "policy")))
    reference, tokenizer = load_model(str(task.model)), load_tokenizer(str(task.model))
    before, after = (
        measure(
            policy,
            reference=reference,
            tokenizer=tokenizer,
            sample_from=source,
            samples_per_prompt=samples,
            seed=seed,
        )
        for source in ("reference", "policy")
    )
    best = best_reachable(before, after)
    return Outcome(
        group,
        change,
        beta,
        seed,
        after.score.mean,
        after.kl.mean,
        best.reward,
        best.effective_sample_size,
        after.grammatical,
        round(seconds, 1),
    )


def main() -> None:
    """Run the changes that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.4])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each change")
    parser.add_argument("--samples", type=int, default=256, help="reviews of each of 8 prompts")
    parser.add_argument("--json", type=Path, help="file for every run's figures")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    print(f"{'change':43} {'beta':>5} {'score':>6} {'KL':>6} {'limit':>6} {'share, range':>18}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for beta in arguments.betas:
            for group in arguments.only:
                for change, setting in GROUPS[group].items():
                    runs = [
                        run(
                            Path(folder),
                            setting,
                            group=group,
                            change=change,
                            beta=beta,
                            seed=seed,
                            samples=arguments.samples,
                        )
                        for seed in range(arguments.seeds)
                    ]
                    outcomes += runs
                    print(_line(runs), flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n")


def _line(runs: list[Outcome]) -> str:
    mean = {
        name: statistics.mean(getattr(r, name) for r in runs) for name in ("score", "kl", "limit", "share")
    }
    shares = [r.share for r in runs]
    thin = min(r.effective_samples for r in runs) < 50
    return (
        f"{runs[0].change:43} {runs[0].beta:5g} {mean['score']:6.2f} {mean['kl']:6.2f} {mean['limit']:6.2f} "
        f"{mean['share']:6.1%} ({min(shares):.0%}-{max(shares):.0%})" + (" few samples" if thin else "")
    )


if __name__ == "__main__":
    main()
