"""The same steps in one process and on two: the same losses, whatever the strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from step_jobs import assert_same, fit, in_one_process, reductions
from tiny_models import tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("llama", False),
        ("llama-tied", False),
        ("llama-tied", True),
        pytest.param("llama", True, marks=pytest.mark.heavy),
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_same_steps(ranks: Any, strategy: str, model: str, lora: bool) -> None:
    runs = ranks.run(fit, strategy=strategy, model=model, lora=lora)
    assert_same(runs[0], in_one_process(model, lora))
    part = pytest.approx(0.5, abs=0.02) if strategy == "fsdp2" else 1.0
    for run in runs:
        assert run.losses == runs[0].losses
        assert run.held == (part, None if lora else part)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective"},
        {"sharding": {"reshard_after_forward": False}},
        {"sharding": {"block_classes": ["LlamaMLP"]}},
        {"sharding": {"reshard_after_forward": False}, "lora": True},
    ],
    ids=str,
)
def test_options_of_fsdp2_change_no_result(ranks: Any, options: dict[str, Any]) -> None:
    runs = ranks.run(fit, strategy="fsdp2", **options)
    assert_same(runs[0], in_one_process("llama", options.get("lora", False)))


@pytest.mark.parametrize("each", [False, True])
def test_fsdp2_reduces_once_a_step(ranks: Any, each: bool) -> None:
    """Twenty batches, four a step; two blocks, the embedding, the head and the norm are reduced apart."""
    options = {"accumulate": 4, "sharding": {"reduce_each_batch": each}}
    count, run = ranks.run(reductions, **options)[0]
    whole = fit(accumulate=4)
    assert count == (20 if each else 5) * 5
    torch.testing.assert_close(run.weights, whole.weights, atol=1e-4, rtol=1e-3)


def test_mixed_precision(ranks: Any) -> None:
    run, exact = ranks.run(fit, strategy="fsdp2", precision="bf16-mixed")[0], in_one_process("llama", False)
    assert run.losses[0] == pytest.approx(exact.losses[0], abs=1e-3)
    assert run.losses[:5] == pytest.approx(exact.losses[:5], abs=3e-2)
    assert run.norms[0] == pytest.approx(exact.norms[0], rel=3e-2)
    assert {value.dtype for value in run.weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("one file", False),
        ("several files", False),
        ("other names", False),
        ("several files", True),
        pytest.param("one file", True, marks=pytest.mark.heavy),
        pytest.param("other names", True, marks=pytest.mark.heavy),
    ],
)
def test_models_are_loaded_in_parts(ranks: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    """From safetensors by each rank; from anything else by rank 0, for everyone."""
    model = tiny_model("llama-tied")
    model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "several files" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 if kind != "several files" else 2
    if kind == "other names":
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    runs = ranks.run(fit, strategy="fsdp2", source=str(tmp_path), lora=lora)
    assert_same(runs[0], fit(source=str(tmp_path), lora=lora))
    assert runs[1].held[0] == pytest.approx(0.5, abs=0.02)
