"""PPO on two ranks: whitened together, and the steps that one process takes."""

from __future__ import annotations

from typing import Any

import ppo_jobs
import pytest
import torch

pytestmark = pytest.mark.slow


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_the_steps_of_one(ranks: Any, strategy: str) -> None:
    options = {"minibatches": 1, "epochs_per_rollout": 3}
    expected, _ = ppo_jobs.train(**options)
    start = ppo_jobs.module().settings.policy.state_dict()
    assert any(not torch.equal(expected[name], value) for name, value in start.items())
    (ours, _), *_ = ranks.run(ppo_jobs.train, strategy=strategy, **options)
    assert_close(ours, expected)


def test_sampling_from_shards(ranks: Any) -> None:
    """Completions end at different lengths on the ranks, which share every forward pass."""
    options = {"sampled": True, "max_new_tokens": 24}
    (whole, _), *_ = ranks.run(ppo_jobs.train, strategy="ddp", **options)
    (sharded, _), *_ = ranks.run(ppo_jobs.train, strategy="fsdp2", **options)
    assert_close(sharded, whole)
