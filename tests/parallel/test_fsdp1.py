"""Runs under FSDP1, on the CPU with its refusal put aside, beside runs in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsdp1_jobs as jobs
import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from ranks import Ranks
from step_jobs import assert_same, fit, in_one_process
from torch.distributed.fsdp import MixedPrecision


@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_train_as_one_process_does(ranks: Ranks, lora: bool) -> None:
    for run in ranks.run(jobs.fit, lora=lora):
        assert_same(run, in_one_process("llama", lora))


def test_half_precision_loses_no_gradient(ranks: Ranks) -> None:
    """Of the ends above all, whose hooks the passes before the first step must leave alone."""
    run, exact = ranks.run(jobs.fit, precision="bf16-mixed")[0], in_one_process("llama", False)
    assert run.losses[0] == pytest.approx(exact.losses[0], abs=1e-3)
    assert run.losses[:5] == pytest.approx(exact.losses[:5], abs=3e-2)
    assert run.norms[0] == pytest.approx(exact.norms[0], rel=3e-2)


def test_the_reference_is_computed_before_training(ranks: Ranks, tmp_path: Path) -> None:
    runs = ranks.run(jobs.fit, reference="cached", cache=str(tmp_path))
    assert_same(runs[0], in_one_process("llama", False))


def test_a_network_that_shows_nothing_but_logits_trains(ranks: Ranks, own_network: Any) -> None:
    run = ranks.run(jobs.fit, model="own")[0]
    assert_same(run, own_network)


@pytest.fixture
def own_network(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("step_jobs.tiny_model", jobs.own_network)
    return fit()


def test_a_module_is_wrapped_once_for_all_of_its_runs(ranks: Ranks) -> None:
    expected = jobs.validated(strategy="auto")
    for losses in ranks.run(jobs.validated):
        assert losses == pytest.approx(expected, abs=1e-5)


def test_nothing_but_weights_and_layers_is_computed_in_half_precision() -> None:
    """FSDP1 would round rotary frequencies, and the weights of a batch."""
    strategy = jobs.OnCPU()
    strategy.precision_plugin = FSDPPrecision("bf16-mixed")
    found = strategy.mixed_precision_config
    assert found is not None
    assert (found.param_dtype, found.buffer_dtype) == (torch.bfloat16, None)
    assert not found.cast_root_forward_inputs
    own = MixedPrecision(buffer_dtype=torch.float16)
    assert jobs.OnCPU(mixed_precision=own).mixed_precision_config == own
