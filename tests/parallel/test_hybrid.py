"""Weights split within replicas (HSDP): four ranks, two by two, train as one process does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import run
from ranks import Ranks
from resume_jobs import source
from step_jobs import assert_same, averages_of_replicas, fit, in_one_process, reductions
from tiny_models import tiny_model
from training import loader, trainer

from lightning_dpo import DPOModule
from lightning_dpo.parallel import FSDP2Strategy

pytestmark = pytest.mark.slow

TWO_BY_TWO: dict[str, Any] = {"device_mesh": (2, 2)}


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    pool = Ranks(4)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("llama-tied", False),
        pytest.param("llama", False, marks=pytest.mark.heavy),
        pytest.param("llama", True, marks=pytest.mark.heavy),
        pytest.param("llama-tied", True, marks=pytest.mark.heavy),
    ],
)
def test_the_same_steps_as_one_process(four: Any, model: str, lora: bool) -> None:
    runs = four.run(fit, strategy="fsdp2", model=model, lora=lora, sharding=TWO_BY_TWO)
    assert_same(runs[0], in_one_process(model, lora))
    half = pytest.approx(0.5, abs=0.02)  # of the weights, not a quarter
    for one in runs:
        assert one.losses == runs[0].losses
        assert one.held == (half, None if lora else half)


@pytest.mark.heavy
@pytest.mark.parametrize("shape", [(4, 1), (1, 4)])
def test_meshes_with_one_row_or_one_column(four: Any, shape: tuple[int, int]) -> None:
    runs = four.run(fit, strategy="fsdp2", sharding={"device_mesh": shape})
    assert_same(runs[0], in_one_process("llama", False))
    assert runs[3].held[0] == pytest.approx(1 / shape[1], abs=0.02)


@pytest.mark.heavy
@pytest.mark.parametrize("each", [False, True])
def test_replicas_are_averaged_once_a_step(four: Any, each: bool) -> None:
    """Twenty batches, four a step: within a replica after each batch if asked, between replicas never so."""
    options: dict[str, Any] = {"accumulate": 4, "sharding": {**TWO_BY_TWO, "reduce_each_batch": each}}
    within, run = four.run(reductions, **options)[0]
    between, _ = four.run(averages_of_replicas, **options)[0]
    groups = within // (20 if each else 5)
    assert groups * (20 if each else 5) == within
    assert between == 5 * groups
    whole = fit(accumulate=4)
    torch.testing.assert_close(run.weights, whole.weights, atol=1e-4, rtol=1e-3)


@pytest.mark.heavy
def test_each_rank_reads_its_shard_from_files(four: Any, tmp_path: Path) -> None:
    tiny_model("llama-tied").save_pretrained(tmp_path)
    runs = four.run(fit, strategy="fsdp2", source=str(tmp_path), sharding=TWO_BY_TWO)
    assert_same(runs[0], fit(source=str(tmp_path)))
    assert runs[3].held[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.heavy
def test_sharded_checkpoints_resume(
    four: Any, ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same replicas bit for bit, and split over all ranks as well."""
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))
    model = source(tmp_path / "model")
    options: dict[str, Any] = {"model": model, "strategy": "fsdp2", "steps_of": 1, "disable_dropout": True}
    whole = four.run(run, mesh=(2, 2), folder=tmp_path, every=2, **options)
    checkpoint = tmp_path / "step=2.ckpt"
    assert checkpoint.is_dir()
    for mesh in ((2, 2), None):
        resumed = four.run(run, mesh=mesh, ckpt_path=checkpoint, **options)
        assert resumed[0].steps == whole[0].steps > 2
        for name, value in whole[0].weights.items():
            bound = {"atol": 0.0, "rtol": 0.0} if mesh else {"atol": 1e-5, "rtol": 1e-4}
            torch.testing.assert_close(resumed[0].weights[name], value, msg=name, **bound)


def test_a_mesh_must_have_as_many_ranks_as_there_are() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 2\) with 1 processes; \(1, 1\) would fit"):
        trainer(strategy=FSDP2Strategy(device_mesh=(2, 2))).fit(DPOModule("no/such/model"), loader())
    for shape in ((2,), (0, 4), (2, -1)):
        with pytest.raises(ValueError, match=r"`device_mesh` must be \(replicas, shards\)"):
            FSDP2Strategy(device_mesh=shape)  # type: ignore[arg-type]


def test_a_mesh_that_does_not_divide_the_ranks_names_one_that_does(four: Any) -> None:
    with pytest.raises(RuntimeError, match=r"got \(3, 2\) with 4 processes; \(2, 2\) would fit"):
        four.run(fit, strategy="fsdp2", source="no/such/model", sharding={"device_mesh": (3, 2)})
