"""The same four changes between runs, here and in TRL: who computes the reference again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cache_jobs import used_by
from pair_rows import COLOURS, jsonl
from tiny_folder import save_tiny
from torch.optim import SGD
from training import sgd, trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.losses import DPOLoss, IPOLoss


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model")
    jsonl(tmp_path / "pairs.jsonl", COLOURS)
    return tmp_path


def ours(place: Path, name: str, **settings: Any) -> int:
    module = DPOModule(str(place / "model"), reference="cached", **{"optimizer": sgd, **settings})
    data = PreferenceDataModule(
        str(place / "pairs.jsonl"), tokenizer=str(place / "model"), batch_size=2, num_processes=1
    )
    run = trainer(default_root_dir=place / name)
    run.fit(module, data)
    return used_by(run).passes


def theirs(place: Path, name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    passes = []
    compute = DPOTrainer.compute_ref_log_probs

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        passes.append(1)
        return compute(self, *args, **options)

    rows = load_dataset(
        "json", data_files=str(place / "pairs.jsonl"), split="train", cache_dir=str(place / "datasets")
    )
    config = DPOConfig(
        **{
            "output_dir": str(place / name),
            "per_device_train_batch_size": 2,
            "precompute_ref_log_probs": True,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        }
    )
    with monkeypatch.context() as patch:
        patch.setattr(DPOTrainer, "compute_ref_log_probs", counting)
        DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(place / "model"),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(place / "model"),
        )
    return len(passes)


@pytest.mark.slow
def test_four_changes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    here = {
        "first": ours(place, "a"),
        "same again": ours(place, "a"),
        "beta": ours(place, "a", loss=DPOLoss(beta=0.5)),
        "learning rate": ours(place, "a", optimizer=lambda params: SGD(params, lr=1e-3)),
        "loss": ours(place, "a", loss=IPOLoss(beta=0.1)),
        "output folder": ours(place, "b"),
    }
    assert here == {
        "first": 4,
        "same again": 0,
        "beta": 0,
        "learning rate": 0,
        "loss": 0,
        "output folder": 0,
    }
    there = {
        "first": theirs(place, "a", monkeypatch),
        "same again": theirs(place, "a", monkeypatch),
        "beta": theirs(place, "a", monkeypatch, beta=0.5),
        "learning rate": theirs(place, "a", monkeypatch, learning_rate=1e-3),
        "loss": theirs(place, "a", monkeypatch, loss_type=["ipo"]),
        "output folder": theirs(place, "b", monkeypatch),
    }
    assert there["first"] == 4
    # What TRL 1.16 does. Should a later version keep them too, this comparison is out of date, not wrong.
    if all(there[change] == 4 for change in ("beta", "learning rate", "loss", "output folder")):
        assert there["same again"] == 0
    else:
        pytest.skip(f"this TRL does not compute all of them again: {there}")
