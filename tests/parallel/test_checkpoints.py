"""Checkpoints saved on two ranks or one, and resumed on as many or others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_jobs import Trained, run
from ranks import Ranks
from resume_jobs import source
from transformers import AutoModelForCausalLM

from lightning_dpo.training.saving.export import export_checkpoint
from lightning_dpo.training.saving.read import load_trained_pair

pytestmark = pytest.mark.slow

AT = 3
KINDS = {
    "ddp": {"strategy": "ddp"},
    "sharded": {"strategy": "fsdp2"},
    "full": {"strategy": "fsdp2", "full": True},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def assert_same(one: Trained, other: Trained, *, exactly: bool = False) -> None:
    tolerance = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 1e-5, "rtol": 1e-4}
    assert one.steps == other.steps
    torch.testing.assert_close(one.weights, other.weights, **tolerance)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_resume(ranks: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    model = source(tmp_path / "model")
    options = {**KINDS[kind], "lora": lora}
    whole = ranks.run(run, model=model, folder=tmp_path, every=AT, **options)
    checkpoint = tmp_path / f"step={AT}.ckpt"
    assert checkpoint.is_dir() == (kind == "sharded")
    if kind != "sharded":
        keys = torch.load(checkpoint, weights_only=True)["state_dict"].keys()
        assert all(("lora_" in key) == lora and key.startswith("policy.") for key in keys)
    resumed = ranks.run(run, model=model, ckpt_path=checkpoint, **options)
    assert_same(resumed[0], whole[0], exactly=True)
    assert resumed[0].metrics == whole[0].metrics


@pytest.mark.parametrize("kind", ["ddp", "sharded", pytest.param("full", marks=pytest.mark.heavy)])
def test_a_reference_that_follows_is_saved(ranks: Any, tmp_path: Path, kind: str) -> None:
    model = source(tmp_path / "model")
    options = {**KINDS[kind], "sync": True}
    whole = ranks.run(run, model=model, folder=tmp_path, every=AT, **options)
    resumed = ranks.run(run, model=model, ckpt_path=tmp_path / f"step={AT}.ckpt", **options)
    assert_same(resumed[0], whole[0], exactly=True)
    assert resumed[0].metrics == whole[0].metrics
    export_checkpoint(tmp_path / f"step={AT}.ckpt", tmp_path / "exported")


EVEN = {"data_options": {"tokens_per_batch": None, "batch_size": 4}, "disable_dropout": True}
"""The same pairs in each step, whether two ranks share them or one accumulates them."""
ALONE, SHARED = {**EVEN, "steps_of": 2}, {**EVEN, "steps_of": 1}
MOVED = [
    ("ddp", False),
    ("sharded", False),
    ("sharded", True),
    *(
        pytest.param(*one, marks=pytest.mark.heavy)
        for one in (("full", False), ("ddp", True), ("full", True))
    ),
]
"""How runs are saved that go on with another number of ranks, and whether they train an adapter."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(1)
    yield pool
    pool.stop()


@pytest.mark.parametrize(("kind", "lora"), MOVED)
def test_from_two_ranks_to_one(ranks: Any, alone: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    model = source(tmp_path / "model")
    options = {**KINDS[kind], "lora": lora}
    whole = ranks.run(run, model=model, folder=tmp_path, every=AT, **options, **SHARED)
    checkpoint = tmp_path / f"step={AT}.ckpt"
    # A folder is read by the strategy that wrote it, on any number of devices; a file by any strategy.
    own = {"strategy": "fsdp2"} if kind == "sharded" else {}
    resumed = alone.run(run, model=model, ckpt_path=checkpoint, lora=lora, **own, **ALONE)
    assert_same(resumed[0], whole[0])
    assert sorted(resumed[0].seen) == sorted(pair for rank in whole for pair in rank.seen[AT * 4 :])


@pytest.mark.parametrize(("kind", "lora"), MOVED)
def test_from_one_rank_to_two(ranks: Any, alone: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    model = source(tmp_path / "model")
    own = KINDS[kind] if kind == "sharded" else {}
    whole = alone.run(run, model=model, folder=tmp_path, every=AT, lora=lora, **own, **ALONE)
    checkpoint = tmp_path / f"step={AT}.ckpt"
    assert checkpoint.is_dir() == (kind == "sharded")
    resumed = ranks.run(run, model=model, ckpt_path=checkpoint, lora=lora, **KINDS[kind], **SHARED)
    assert_same(resumed[0], whole[0])
    assert sorted(pair for rank in resumed for pair in rank.seen) == sorted(whole[0].seen[AT * 8 :])


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_exports(ranks: Any, tmp_path: Path, kind: str) -> None:
    """From the sharded model and from its checkpoint, merged and as an adapter."""
    model = source(tmp_path / "model")
    options = {**KINDS[kind], "lora": True, "validate": False, **SHARED}
    live = ranks.run(run, model=model, folder=tmp_path, every=5, export_to=tmp_path / "live", **options)
    assert live[0].steps == 10
    merged = export_checkpoint(tmp_path / "step=10.ckpt", tmp_path / "merged")
    adapter = export_checkpoint(tmp_path / "step=10.ckpt", tmp_path / "adapter", merge=False)
    assert not list(adapter.glob("model*"))
    applied = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected = applied.merge_and_unload().state_dict()
    for folder in (merged, tmp_path / "live"):
        written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        torch.testing.assert_close(written, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(
        expected["transformer.h.0.attn.c_attn.weight"],
        AutoModelForCausalLM.from_pretrained(model).state_dict()["transformer.h.0.attn.c_attn.weight"],
    )


def test_full_weights_are_exported_from_a_folder(ranks: Any, tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    whole = ranks.run(run, model=model, folder=tmp_path, every=5, strategy="fsdp2", **SHARED)
    exported = export_checkpoint(tmp_path / "step=10.ckpt", tmp_path / "exported")
    written = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    torch.testing.assert_close(written, whole[0].weights, rtol=0, atol=0)
    pair = load_trained_pair(tmp_path / "step=10.ckpt")
    torch.testing.assert_close(pair.policy.state_dict(), whole[0].weights, rtol=0, atol=0)
    assert pair.reference_name == str(model)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a file or folder that the trainer saved"):
        export_checkpoint(tmp_path, tmp_path / "out")
