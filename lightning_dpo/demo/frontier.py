"""The embedded task for `lightning-dpo frontier`: a reference, and pairs and a reward model of each seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_dpo.data.datamodule import PreferenceDataModule
from lightning_dpo.demo.context import quiet, quiet_trainer, single_thread
from lightning_dpo.demo.pairs import sample_pairs
from lightning_dpo.demo.task import Task, TaskConfig, prepare_task
from lightning_dpo.files import write_file
from lightning_dpo.models.load import load_model, load_tokenizer
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.tuning.cluster.task import run_side_by_side

__all__ = ["prepare_frontier"]

_REWARD_EPOCHS = 3


@quiet()
def prepare_frontier(folder: str | Path, seeds: Sequence[int], *, task: TaskConfig | None = None) -> None:
    """Make what tuning/frontier.yaml names, two minutes on two cores; what is there already is kept.

    Where this process is connected to Ray on this machine alone, the seeds share its CPUs.

    Args:
        folder: Gets `task/`, see `prepare_task`, and for each seed `pairs/SEED.jsonl`, sampled from the
            reference and labelled anew, and `reward/SEED`, a reward model trained on these pairs.
        seeds: Of pairs and reward models.
        task: Parameters of the task.
    """
    root = Path(folder)
    with single_thread():
        made = prepare_task(root / "task", config=task, progress=False)
    missing = [seed for seed in seeds if not _reward_model(root, seed).is_file()]
    run_side_by_side(_prepare_seed, [(made, root, seed) for seed in missing])


@quiet()
@single_thread()
def _prepare_seed(task: Task, root: Path, seed: int) -> None:
    pairs = root / "pairs" / f"{seed}.jsonl"
    if not pairs.is_file():
        write_file(pairs, _pairs(task, seed))
    _train_reward_model(task, pairs, _reward_model(root, seed).parent, seed=seed)


def _reward_model(root: Path, seed: int) -> Path:
    """What is written last of a seed."""
    return root / "reward" / str(seed) / "config.json"


def _pairs(task: Task, seed: int) -> str:
    pairs = sample_pairs(
        load_model(str(task.model)),
        tokenizer=load_tokenizer(str(task.model)),
        count=task.config.train_pairs,
        scale=task.config.label_scale,
        seed=task.config.seed + seed + 1,  # the task's own pairs, of which some are held out, are of its seed
    )
    return "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs)


def _train_reward_model(task: Task, pairs: Path, folder: Path, *, seed: int) -> None:
    pl.seed_everything(seed, verbose=False)
    module: RewardModule = RewardModule(
        str(task.model),
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.05, total_iters=int(module.trainer.estimated_stepping_batches)
        ),
    )
    data = PreferenceDataModule(
        str(pairs), tokenizer=str(task.model), max_length=128, batch_size=32, num_processes=1, seed=seed
    )
    quiet_trainer(max_epochs=_REWARD_EPOCHS, accelerator="cpu").fit(module, data)
    module.export(folder)
