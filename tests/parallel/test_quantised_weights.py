"""Weights of quantised repositories, which rank 0 loads and passes on."""

from __future__ import annotations

import pytest
import torch
import weight_jobs as jobs
from ranks import Ranks


def test_weights_in_8_bits_arrive_multiplied_by_their_scales(ranks: Ranks) -> None:
    for found in ranks.run(jobs.read, kind="8 bits"):
        assert torch.equal(found, (jobs.WEIGHT * jobs.SCALE).to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["8 bits for good", "4 bits"])
def test_weights_that_stay_quantised_are_refused_on_every_rank(ranks: Ranks, kind: str) -> None:
    errors = ranks.run(jobs.read, kind=kind)
    assert errors[0] == errors[1]
    assert "'packed', which stay quantised: weight (NotImplementedError: this kind cannot be)" in errors[0]


def test_a_model_that_rank_0_cannot_load_keeps_no_rank_waiting(ranks: Ranks) -> None:
    assert ranks.run(jobs.read, kind="unloadable") == ["the kernels are not installed"] * 2
