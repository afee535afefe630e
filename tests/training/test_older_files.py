"""Checkpoints and caches from before log-probabilities were kept by completion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cache_jobs import used_by
from training import History, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.losses import DPOLoss
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.training.saving.export import export_checkpoint

OLDER = Path(__file__).parents[1] / "support" / "older_run"
ROWS = [
    {"prompt": f"is it {i}?", "chosen": f" yes it is {i}", "rejected": f" no, not {i * i}"} for i in range(16)
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


def run(checkpoint: str | None = None, **options: Any) -> tuple[DPOModule, History]:
    """The run of three steps that was saved, to its eighth step; from the saved one on, or from the start."""
    pl.seed_everything(0, verbose=False)
    policy, history = str(OLDER / "policy"), History()
    module = DPOModule(
        policy,
        loss=DPOLoss(beta=0.2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        warmup_ratio=0.0,
        **options,
    )
    data = PreferenceDataModule(ROWS, tokenizer=policy, max_length=64, batch_size=2, num_processes=1)
    path = None if checkpoint is None else str(OLDER / checkpoint)
    trainer(max_epochs=1, callbacks=[history]).fit(module, data, ckpt_path=path, weights_only=False)
    return module, history


@pytest.mark.parametrize(
    ("checkpoint", "options"), [("full.pt", {}), ("lora.pt", {"lora": LoraSettings(r=2)})]
)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(checkpoint: str, options: dict[str, Any]) -> None:
    resumed, history = run(checkpoint, **options)
    whole, expected = run(**options)
    assert len(history.values["train/loss"]) == 5
    assert history.values["train/loss"] == pytest.approx(expected.values["train/loss"][3:], abs=1e-5)
    torch.testing.assert_close(resumed.policy.state_dict(), whole.policy.state_dict(), atol=1e-4, rtol=1e-3)


def test_an_older_cache_is_found_to_be_older_and_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "reference"
    shutil.copytree(OLDER / "reference", root)
    (older,) = root.iterdir()
    before = {path.name: path.read_bytes() for path in older.iterdir()}
    module, history = run("cached.pt", reference="cached", reference_cache=str(root))
    assert "by pair, as an older version kept them" in caplog.text
    usage = used_by(module.trainer)
    assert (usage.pairs, usage.from_cache) == (16, 0)
    _, expected = run()
    assert history.values["train/loss"] == pytest.approx(expected.values["train/loss"][3:], abs=1e-5)
    assert {path.name: path.read_bytes() for path in older.iterdir()} == before
    caplog.clear()
    module, _ = run("cached.pt", reference="cached", reference_cache=str(root))
    assert "older version" not in caplog.text
    assert used_by(module.trainer).from_cache == 16


def test_an_older_checkpoint_is_exported(tmp_path: Path) -> None:
    export_checkpoint(OLDER / "full.pt", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    saved = torch.load(OLDER / "full.pt", weights_only=False)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[f"policy.{name}"]), name
