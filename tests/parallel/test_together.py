"""What two ranks must agree on, beyond their steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import together_jobs
import torch
from pair_rows import jsonl
from resume_jobs import ROWS, source
from tiny_models import tiny_model
from tiny_tokenizers import byte_level

from lightning_dpo.training.saving.export import export_checkpoint

pytestmark = pytest.mark.slow

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("rows", "batch_size", "fillers"), [(7, 2, 0), (5, 2, 1), (1, 4, 1)])
def test_validation_is_exact_per_pair(
    ranks: Any, tmp_path: Path, strategy: str, rows: int, batch_size: int, fillers: int
) -> None:
    models = {"model": source(tmp_path / "policy"), "reference": source(tmp_path / "reference", seed=1)}
    expected, pairs = together_jobs.validate(**models, rows=rows, batch_size=rows)
    assert pairs == rows
    assert abs(expected["val/logratio/margin"]) > 1e-3
    results = ranks.run(together_jobs.validate, **models, strategy=strategy, rows=rows, batch_size=batch_size)
    for metrics, _ in results:
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert sum(given for _, given in results) == rows + fillers


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_reference_follows(ranks: Any, strategy: str, alpha: float) -> None:
    expected = together_jobs.sync_reference(alpha=alpha)
    policy, reference = ranks.run(together_jobs.sync_reference, strategy=strategy, alpha=alpha)[0]
    for ours, theirs in zip((policy, reference), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if alpha == 1:  # six steps, the last of which updates
        assert all(torch.equal(value, policy[name]) for name, value in reference.items())


def test_the_reference_is_no_part_of_what_ddp_reduces(ranks: Any) -> None:
    policy, reference, wrapped = ranks.run(together_jobs.wrapped_by_ddp)[0]
    assert policy == reference == wrapped


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_users_own_network(ranks: Any, strategy: str) -> None:
    single = together_jobs.own_network()
    assert ranks.run(together_jobs.own_network, strategy=strategy)[0] == pytest.approx(single, abs=1e-5)


def test_lightnings_own_strategy_shards_by_default(ranks: Any) -> None:
    losses = ranks.run(together_jobs.lightnings_own_strategy, tensor_parallel_size=1)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)


def test_layers_are_not_split(ranks: Any) -> None:
    with pytest.raises(RuntimeError, match="`strategy` must share whole weights"):
        ranks.run(together_jobs.lightnings_own_strategy, tensor_parallel_size=2)


def test_a_sharded_run_is_resumed_against_its_own_reference(ranks: Any, tmp_path: Path) -> None:
    names = ("policy", "first", "second")
    for seed, name in enumerate(names):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    model, *others = (str(tmp_path / name) for name in names)
    for second, error in ((others[0], ""), (others[1], "`reference` must be the one")):
        folder = str(tmp_path / f"run-{error[:4]}")
        found = ranks.run(
            together_jobs.another_reference, model=model, references=(others[0], second), folder=folder
        )[0]
        assert found.startswith(error)
        assert bool(found) == bool(error)


MONITOR = [
    "--trainer.callbacks+=lightning_dpo.evaluation.CompletionMonitor",
    "--trainer.callbacks.num_prompts=3",
    "--trainer.callbacks.max_new_tokens=5",
    "--trainer.callbacks.judge=lightning_dpo.demo.grammar.true_score",
]
CACHED = ["--model.reference=cached"]


@pytest.mark.parametrize(
    ("overlays", "extra"),
    [
        pytest.param(["fsdp2"], [], id="full-plain"),
        pytest.param(["fsdp2"], MONITOR, id="full-monitor"),
        pytest.param(["lora", "fsdp2"], CACHED, id="lora-cached"),
        pytest.param(["fsdp2"], CACHED, id="full-cached", marks=pytest.mark.heavy),
        pytest.param(["lora", "fsdp2"], [], id="lora-plain", marks=pytest.mark.heavy),
        pytest.param(["lora", "fsdp2"], MONITOR, id="lora-monitor", marks=pytest.mark.heavy),
    ],
)
def test_the_recipes_with_the_overlay(
    ranks: Any, tmp_path: Path, overlays: list[str], extra: list[str]
) -> None:
    model = source(tmp_path / "model")
    byte_level().save_pretrained(model)
    jsonl(tmp_path / "pairs.jsonl", ROWS)
    configs = [f"--config={CONFIG_FOLDER / name}.yaml" for name in ("smollm2_dpo", *overlays)]
    options = [
        f"--model.policy={model}",
        "--data.train=pairs.jsonl",
        "--data.validation_split=0.2",
        "--data.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.logger=false",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
    ]
    arguments = ["fit", *configs, *options, *extra]
    results = ranks.run(together_jobs.command_line, arguments=arguments, folder=str(tmp_path))
    for steps, loss, strategy in results:
        assert (steps, strategy) == (2, "FSDP2Strategy")
        assert loss == pytest.approx(math.log(2), abs=0.1)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert export_checkpoint(checkpoint, tmp_path / "exported").is_dir()
