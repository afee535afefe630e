from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dpo.training.callbacks.progress_bar import ShortProgressBar, short_values

LOGGED = {
    "train/loss": 0.69149,
    "train/rewards/margin": 0.00512,
    "train/rewards/accuracy": 0.75,
    "train/tokens_per_second": 81_234.0,
    "val/loss": 0.6931,
    "val/rewards/accuracy": 0.5,
    "val/kl": 0.0213,
}


def test_logged_names_become_short_ones() -> None:
    text = short_values(LOGGED)
    assert text == "loss 0.691/0.693 margin 0.005 acc 0.75/0.50 KL 0.02 tok/s 81k"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("train/loss", 25.08, "loss 25.1"),
        ("train/rewards/margin", -123.4, "margin -123"),
        ("train/tokens_per_second", 8123.0, "tok/s 8.1k"),
        ("train/loss", float("nan"), "loss nan"),
        ("val/rewards/accuracy", 1, "val acc 1.00"),
        ("val/error", 0.5, "val error 0.50"),
        ("fit/reward", 2, "reward 2.00"),
        ("temperature", 0.7, "temperature 0.70"),
    ],
)
def test_a_single_value(name: str, value: float, shown: str) -> None:
    assert short_values({name: value}) == shown


@pytest.fixture
def terminal() -> Iterator[dict[str, Any]]:
    """Options of a console of 80 columns that is written down."""
    yield {"file": io.StringIO(), "width": 80, "force_terminal": True}
    rich.reconfigure()


class Logging(pl.LightningModule):
    """Logs what DPOModule and the completion monitor show in the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def _log(self, stage: str) -> None:
        for name, value in LOGGED.items():
            if name.startswith(stage):
                self.log(name, value, prog_bar=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._log("train")
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._log("val")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters())


def lines_of_a_run(terminal: dict[str, Any], *, epochs: int, batches: int) -> list[str]:
    data = DataLoader(torch.ones(batches, 1), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_val_batches=2,
        max_steps=-1 if batches < 10 else 6,  # of the many batches few are computed, but all are shown
        val_check_interval=3,
        callbacks=[ShortProgressBar(console_kwargs=terminal)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Logging(), data, data)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal["file"].getvalue()))


@pytest.mark.parametrize("batches", [9, 1234])
@pytest.mark.parametrize("epochs", [1, 3])
def test_one_line_of_80_columns_holds_every_value(
    epochs: int, batches: int, terminal: dict[str, Any]
) -> None:
    lines = lines_of_a_run(terminal, epochs=epochs, batches=batches)
    assert max(map(len, lines)) <= 80
    last = lines[-2]
    assert all(f"{name} " in last for name in ("loss", "margin", "acc", "KL"))
    assert last.rstrip().endswith("tok/s 81k")
    assert last.startswith("fit " if epochs == 1 else "epoch ")
    # Three decimals and the time are there until the KL and validation's values need their place.
    assert any(re.search(r"\d\d:\d\d loss 0.691 margin 0.005 acc 0.75 tok/s 81k", line) for line in lines)


def test_a_wide_terminal_has_room_for_a_bar(terminal: dict[str, Any]) -> None:
    lines = lines_of_a_run({**terminal, "width": 120}, epochs=1, batches=9)
    assert max(map(len, lines)) <= 120
    line = r"fit ━{20} 9/9 \d\d:\d\d loss 0.691/0.693 margin 0.005 acc 0.75/0.50 KL 0.02 tok/s 81k"
    assert re.fullmatch(line, lines[-2].strip())
