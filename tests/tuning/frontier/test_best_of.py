from __future__ import annotations

from typing import Any

import pytest
import torch
from frontier_results import limit

from lightning_dpo.evaluation import Sample, best_of_n
from lightning_dpo.tuning.frontier.measure import Measured
from lightning_dpo.tuning.frontier.methods import BestOfMethod
from lightning_dpo.tuning.frontier.result import Failure, PolicyPoint
from lightning_dpo.tuning.frontier.sampling import Sampler


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Of one prompt, whose completions have standard normal rewards."""

    def reference(self: Sampler, seeds: list[int], *, samples_per_prompt: int) -> list[Measured]:
        del self
        drawn = [torch.randn(samples_per_prompt, generator=torch.Generator().manual_seed(s)) for s in seeds]
        sample = Sample((1,), (2,))
        return [Measured([sample] * samples_per_prompt, rewards, torch.zeros(1)) for rewards in drawn]

    class Measuring:
        prompts = ((1,),)

    monkeypatch.setattr(Sampler, "reference", reference)
    unused: Any = None
    measuring: Any = Measuring()
    return Sampler(unused, measuring, unused)


def test_a_small_n_comes_from_the_reference_and_a_large_one_from_the_limit(sampler: Sampler) -> None:
    method = BestOfMethod("best", (4, 100), samples_per_prompt=64)
    points = list(sampler.best_of(method, [3, 5], limit()))
    assert [(point.strength, point.seed) for point in points if isinstance(point, PolicyPoint)] == [
        (4, 3),
        (100, 3),
        (4, 5),
        (100, 5),
    ]
    (first,) = sampler.reference([3], samples_per_prompt=64)
    half = limit().part(0, of=2)
    small, large = points[0], points[1]
    assert isinstance(small, PolicyPoint)
    assert isinstance(large, PolicyPoint)
    assert small.reward == best_of_n(first.rewards, 4).reward
    assert large.reward == best_of_n(half.rewards, 100, log_weights=half.log_weights).reward
    assert large.reward == pytest.approx(2.508, abs=4 * large.reward_error)  # of 100 normal draws
    assert large.kl == pytest.approx(3.62, abs=0.01)  # log 100 - 99 / 100


def test_an_n_that_too_few_samples_tell_is_left_out_with_the_reason(sampler: Sampler) -> None:
    method = BestOfMethod("best", (4, 10**9), samples_per_prompt=64)
    point, failure = sampler.best_of(method, [0], limit())
    assert isinstance(point, PolicyPoint)
    assert isinstance(failure, Failure)
    assert failure.what == "N 1000000000, seed 0"
    assert "effective samples" in failure.reason
    assert "`limit_samples_per_prompt`" in failure.reason
