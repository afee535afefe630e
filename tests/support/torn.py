"""Processes that die in the middle of writing a checkpoint; importable by another process."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import model_parallel
from resume_jobs import train

from lightning_dpo.training.saving import checkpoint_io as saving


def last(folder: Path) -> ModelCheckpoint:
    """One checkpoint that each next one takes the place of."""
    return ModelCheckpoint(folder, "last", every_n_train_steps=2, enable_version_counter=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_tear(model: str, folder: Path, *, moment: str) -> None:
    """Die while the second checkpoint is written: of its bytes half are there, or all but not the name."""
    save, put_in_place, written = torch.save, saving.put_in_place, []

    def half(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        written.append(file)
        if len(written) < 2:
            save(content, file, *arguments, **options)
            return
        buffer = io.BytesIO()
        save(content, buffer)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        die()

    def not_renamed(scratch: Path, target: Path) -> None:
        if target.exists():
            die()
        put_in_place(scratch, target)

    if moment == "half":
        torch.save = half
    else:
        saving.put_in_place = not_renamed
    train(model, callbacks=[last(folder)], trainer_options={"enable_checkpointing": True})


def tear_folder(*, moment: str, **options: Any) -> None:
    """Every rank dies: as it has written half of its part of the second checkpoint, or in the renaming."""
    from checkpoint_jobs import run

    write, rename, written = model_parallel._distributed_checkpoint_save, Path.rename, []

    def half(state: Any, path: Path) -> None:
        write(state, path)
        written.append(path)
        if len(written) == 2:
            rank = os.environ["RANK"]
            (part,) = path.glob(f"__{rank}_*.distcp")
            os.truncate(part, part.stat().st_size // 2)
            die()

    def one_rename(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial") and list(path.parent.glob("*.being-replaced*")):
            die()
        return rename(path, target)

    if moment == "half":
        model_parallel._distributed_checkpoint_save = half
    else:
        sys.platform = "another"  # one that cannot change two names at once
        Path.rename = one_rename  # type: ignore[assignment,method-assign]
    run(**options)
