"""Several data sets by name, and completions of several turns, as a user's command names them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from pair_rows import jsonl
from tiny_folder import save_tiny
from tiny_tokenizers import TOOLS, byte_level

from lightning_dpo.cli.main import main

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small chat model, rows with tool calls and rows of text."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model", tokenizer=byte_level(template=TOOLS, eos="<|im_end|>"))
    tools = [
        {
            "prompt": [{"role": "user", "content": f"is it green {n}?"}],
            "chosen": [CALL, {"role": "tool", "content": "it is blue"}, said(f"no {n}")],
            "rejected": [said(f"yes {n}")],
        }
        for n in range(12)
    ]
    text = [{"prompt": f"say {n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(20)]
    jsonl(tmp_path / "tools.jsonl", tools)
    jsonl(tmp_path / "text.jsonl", text)
    return tmp_path


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_fit_on_a_mixture_validates_on_each(folder: Path, reference: str) -> None:
    main(
        [
            "fit",
            "--model.policy=model",
            f"--model.reference={reference}",
            "--data.train={tools: {path: tools.jsonl, weight: 0.7}, text: {path: text.jsonl, weight: 0.3}}",
            "--data.validation={tools: tools.jsonl, text: text.jsonl}",
            "--data.completion_turns=last",
            "--data.batch_size=4",
            "--data.num_processes=1",
            "--trainer.accelerator=cpu",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            "--trainer.logger.save_dir=logs",
            "--trainer.enable_checkpointing=false",
            "--trainer.log_every_n_steps=1",
        ]
    )
    [path] = folder.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    values = {name: float(value) for name, value in rows[-1].items() if value and name.startswith("val/")}
    assert {f"val/{name}/rewards/accuracy" for name in ("tools", "text")} <= set(values)
    total = (12 * values["val/tools/loss"] + 20 * values["val/text/loss"]) / 32
    assert values["val/loss"] == pytest.approx(total, abs=1e-5)
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 8
    assert float(steps[0]["train/loss"]) == pytest.approx(0.6931, abs=1e-3)
