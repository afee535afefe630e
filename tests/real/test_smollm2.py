"""A real model on real preferences, by the commands a user types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from smollm2 import FAST_PRECISION, HEAVY_AND_HERE, some_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_dpo.cli.main import main
from lightning_dpo.training.cli import DPOCLI

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"

pytestmark = HEAVY_AND_HERE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> tuple[Path, Any]:
    """SmolLM2 after three steps of two pairs, from the GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    cli = DPOCLI(
        args=[
            "fit",
            f"--config={CONFIG_FOLDER / 'smollm2_dpo.yaml'}",
            f"--trainer.precision={FAST_PRECISION}",
            *some_rows(shared_data, max_length=256),
            f"--data.cache_dir={folder / 'cache'}",
            "--trainer.max_steps=3",
            "--trainer.limit_val_batches=1",
            "--trainer.val_check_interval=3",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            f"--trainer.default_root_dir={folder}",
            "--model.optimizer.lr=1e-5",
        ]
    )
    return folder, cli


def test_training_starts_at_ln_2_and_falls(trained: tuple[Path, Any]) -> None:
    import csv

    folder, cli = trained
    with next(folder.rglob("metrics.csv")).open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 3
    assert all(abs(loss - math.log(2)) < 0.3 for loss in losses)
    assert cli.model.plan().layout == "shared"
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_the_exported_folder_generates_as_the_module_does(trained: tuple[Path, Any]) -> None:
    folder, cli = trained
    (checkpoint,) = folder.rglob("*.ckpt")
    main(["export", f"--checkpoint={checkpoint}", f"--output={folder / 'exported'}"])
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    options = {"max_new_tokens": 12, "do_sample": False}
    answer = model.generate(**inputs, **options)
    assert torch.equal(answer, cli.model.policy.eval().generate(**inputs, **options))
    assert "Paris" in tokenizer.decode(answer[0])
