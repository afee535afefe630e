from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_models import CONFIGS, tiny_model
from tiny_tokenizers import byte_level
from training import loader, sgd, trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_dpo import DPOModule, PreferenceDataModule
from lightning_dpo.evaluation import CompletionMonitor
from lightning_dpo.models.lora import LoraSettings

ROWS = [{"prompt": f"is it {i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(12)]


def fit(tmp_path: Path, **options: Any) -> Any:
    tokenizer = byte_level()
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(tokenizer)})
    data = PreferenceDataModule(
        ROWS, validation=ROWS[:6], tokenizer=tokenizer, batch_size=4, cache_dir=str(tmp_path), num_processes=1
    )
    run = trainer(
        callbacks=[CompletionMonitor(5, max_new_tokens=7)], logger=CSVLogger(tmp_path), num_sanity_val_steps=1
    )
    module = DPOModule(AutoModelForCausalLM.from_config(config), **options)
    before = run.validate(module, data, verbose=False)[0]
    run.fit(module, data)
    return run, before


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_the_kl_starts_at_zero_and_grows(tmp_path: Path, lora: Any) -> None:
    run, before = fit(tmp_path, optimizer=sgd, lora=lora)
    assert before["val/kl"] == pytest.approx(0, abs=1e-6)
    after = run.callback_metrics
    assert float(after["val/kl"]) > 1e-3
    assert math.isfinite(float(after["val/kl_error"]))
    (path,) = Path(run.log_dir).rglob("step-3.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == [row["prompt"] for row in ROWS[:5]]
    assert all(1 <= record["tokens"] <= 7 for record in records)
    assert sum(record["kl"] for record in records) / 5 == pytest.approx(float(after["val/kl"]), rel=1e-5)


def test_without_a_tokenizer_it_says_what_it_needs() -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    with pytest.raises(ValueError, match="data module with a `tokenizer`"):
        trainer(callbacks=[CompletionMonitor()]).validate(module, loader())


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match="`num_prompts` must be at least 1, got 0"):
        CompletionMonitor(0)
