"""Online DPO on two ranks: what they sample, the step they take together, and a run that goes on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import online_jobs
import pytest
import together_jobs
import torch
from pair_rows import jsonl
from resume_jobs import ROWS, source
from tiny_tokenizers import byte_level
from torch.utils.data import DataLoader
from training import sgd, trainer

from lightning_dpo import DPOModule, PairBatch, TokenPair
from lightning_dpo.training.saving.export import export_checkpoint

pytestmark = pytest.mark.slow

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def union(batches: list[PairBatch]) -> PairBatch:
    """The pairs of all ranks as one batch."""
    pairs, weights = [], []
    for batch in batches:
        parts = [
            torch.split(getattr(batch, f"{name}_ids"), getattr(batch, f"{name}_lengths").tolist())
            for name in ("prompt", "chosen", "rejected")
        ]
        pairs += [TokenPair(*(ids.tolist() for ids in pair)) for pair in zip(*parts, strict=True)]
        weights += batch.weights.tolist()
    return PairBatch.from_pairs(pairs, weights=weights, denominator=float(len(pairs)))


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2}], ids=["online", "iterative"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_the_steps_of_one(
    ranks: Any, tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    model = source(tmp_path / "model")
    runs = ranks.run(online_jobs.few_steps, model=model, strategy=strategy, **options)
    assert runs[0].drawn != runs[1].drawn
    assert all(0 < len(ids) <= 6 for run in runs for step in run.drawn for ids in step)
    offline = DPOModule(model, optimizer=sgd, warmup_ratio=0.0)
    steps = [union([run.pairs[step] for run in runs]) for step in range(3)]
    trainer(max_steps=3).fit(offline, DataLoader(steps, batch_size=None))
    torch.testing.assert_close(runs[0].weights, offline.policy.state_dict(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"refresh_every": 2, "lora": True}], ids=["full", "lora"])
def test_shards_sample_what_whole_models_do(ranks: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = source(tmp_path / "model")
    whole, sharded = (
        ranks.run(online_jobs.few_steps, model=model, strategy=strategy, **options)
        for strategy in ("ddp", "fsdp2")
    )
    for one, other in zip(whole, sharded, strict=True):
        assert one.drawn == other.drawn


@pytest.mark.parametrize("own", [False, True], ids=["generate", "loop"])
def test_ranks_with_unequal_work_wait_for_each_other(ranks: Any, tmp_path: Path, own: bool) -> None:
    """Batches of other sizes, prompts of other lengths, completions that end at other places."""
    runs = ranks.run(online_jobs.ending_soon, model=None if own else source(tmp_path / "model"))
    counts = [[len(step) for step in run.drawn] for run in runs]
    assert counts[0] != counts[1]
    longest = [[max(map(len, step)) for step in run.drawn] for run in runs]
    assert longest[0] != longest[1]


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        pytest.param("ddp", False, id="ddp-full"),
        pytest.param("ddp", True, id="ddp-lora"),
        pytest.param("sharded", False, id="sharded-full"),
        pytest.param("sharded", True, id="sharded-lora", marks=pytest.mark.heavy),
        pytest.param("whole", False, id="whole-full", marks=pytest.mark.heavy),
        pytest.param("whole", True, id="whole-lora", marks=pytest.mark.heavy),
    ],
)
def test_a_run_goes_on(ranks: Any, tmp_path: Path, kind: str, lora: bool) -> None:
    model = source(tmp_path / "model")
    options = {
        "strategy": "ddp" if kind == "ddp" else "fsdp2",
        "full": kind == "whole",
        "lora": lora,
        "refresh_every": 2,
        "validate": False,
    }
    whole = ranks.run(online_jobs.resumable, model=model, folder=tmp_path, every=3, **options)
    checkpoint = tmp_path / "step=3.ckpt"
    resumed = ranks.run(online_jobs.resumable, model=model, ckpt_path=checkpoint, **options)
    assert resumed[0].steps == whole[0].steps > 3
    torch.testing.assert_close(whole[0].weights, resumed[0].weights, rtol=0, atol=0)
    export_checkpoint(checkpoint, tmp_path / "exported")


def test_the_recipe_with_the_overlay(ranks: Any, tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    byte_level().save_pretrained(model)
    jsonl(tmp_path / "pairs.jsonl", ROWS[:16])
    arguments = [
        "fit",
        f"--config={CONFIG_FOLDER / 'online_dpo.yaml'}",
        f"--config={CONFIG_FOLDER / 'fsdp2.yaml'}",
        f"--model.policy={model}",
        "--model.judge=online_jobs.vowels",
        "--model.max_new_tokens=5",
        "--data.train=pairs.jsonl",
        "--data.validation_split=0.25",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.logger=false",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
    ]
    results = ranks.run(together_jobs.command_line, arguments=arguments, folder=str(tmp_path))
    for steps, loss, strategy in results:
        assert (steps, strategy) == (2, "FSDP2Strategy")
        assert loss == pytest.approx(math.log(2), abs=0.1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert export_checkpoint(checkpoint, tmp_path / "exported").is_dir()
