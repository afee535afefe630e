from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from frontier_results import limit

from lightning_dpo.evaluation import FittedOptimum, FrontierPoint
from lightning_dpo.tuning.frontier.limit import Limit, pick_policies, read_fit, write_fit
from lightning_dpo.tuning.storage import Storage


@pytest.mark.parametrize("kl", [0.5, 1.0, 2.0, 3.0])
def test_the_limit_of_normal_rewards(kl: float) -> None:
    # Tilting N(0, 1) by t gives N(t, 1): reward t at KL t^2 / 2.
    best = limit().at(kl)
    assert best.reward == pytest.approx(math.sqrt(2 * kl), rel=0.02)
    assert limit().share(0.5 * best.reward, kl=kl) == pytest.approx(0.5, abs=0.01)


def test_prompts_keep_their_own_samples() -> None:
    # Two prompts whose rewards differ by a constant have the same limit, shifted by half of it.
    rewards, moved = torch.tensor([0.0, 1.0, 3.0, 4.0]), torch.tensor([1.0, 4.0, 3.0, 3.0])
    ratios = torch.tensor([0.3, -0.2, 0.1, 0.5, 0.2, 0.0, -0.4, 0.6])
    one = Limit.of([rewards, moved], [ratios], prompts=1)
    both = Limit.of(
        [torch.cat([each, each + 10]) for each in (rewards, moved)],
        [torch.cat([ratios[:4], ratios[:4], ratios[4:], ratios[4:]])],
        prompts=2,
    )
    assert both.at(0.3).reward == pytest.approx(one.at(0.3).reward + 5)
    assert both.reference == pytest.approx(one.reference + 5)
    assert both.policies == 1


def test_a_share_is_not_told_where_samples_do_not_tell() -> None:
    assert math.isnan(limit(samples=200).share(1.0, kl=12.0))
    assert math.isnan(limit().share(0.0, kl=0.0))
    curve = limit(samples=200).curve(up_to=50.0)
    assert curve
    assert all(point.is_reliable for point in curve)


def test_policies_are_picked_along_the_pareto_set() -> None:
    points = [(1.0, 1.0), (2.0, 0.5), (3.0, 2.0), (4.0, 3.0), (5.0, 4.0), (9.0, 3.9)]
    assert pick_policies(points, count=4) == [0, 2, 3, 4]
    assert pick_policies(points, count=2) == [0, 4]
    assert pick_policies(points, count=1) == [4]
    assert pick_policies(points, count=0) == []
    assert pick_policies([], count=3) == []


def test_rounds_of_samples_add_up() -> None:
    one, other = limit(samples=200), limit(samples=600)
    both = one.joined(other)
    assert both.rewards.shape == (1, 1600)
    assert both.at(2.0).effective_sample_size == pytest.approx(
        one.at(2.0).effective_sample_size + other.at(2.0).effective_sample_size, rel=0.02
    )
    assert both.at(2.0).reward == pytest.approx(2.0, rel=0.02)
    assert both.reference == pytest.approx(0.0, abs=1e-6)
    assert both.policies == 1
    few = limit(samples=45)
    assert few.at(1.0).effective_sample_size == pytest.approx(71, abs=1)
    assert few.at(1.0).is_reliable
    assert not few.is_known(up_to=1.0)
    assert both.is_known(up_to=2.0)
    assert not both.is_known(up_to=100.0)


def test_a_fit_is_kept_and_tells_the_limit(tmp_path: Path) -> None:
    # Two draws of 4,000: the reference's, and those of a policy that is tilted by 2.
    known = limit()
    rounds = [FrontierPoint(0.5, 2.0, 2.0, 400.0)]
    fit = FittedOptimum(rounds, known.rewards, known.log_weights, kl=2.0, reward=2.0)
    storage = Storage(str(tmp_path))
    assert read_fit(storage, "fit", prompts=1) is None
    write_fit(storage, "fit", fit)
    read = read_fit(storage, "fit", prompts=1)
    assert read is not None
    assert (read.rounds, read.kl, read.reward) == (rounds, 2.0, 2.0)
    assert torch.equal(read.log_weights, known.log_weights)
    told = Limit.of_fit(read)
    assert told.at(1.5) == known.at(1.5)
    assert told.reference == pytest.approx(known.reference)  # of the first draw alone
    assert (told.fitted, told.policies) == ((2.0, 2.0), 0)
    (tmp_path / "fit.json").unlink()  # a kill before all was there
    assert read_fit(storage, "fit", prompts=1) is None


def test_a_limit_in_parts() -> None:
    # Two draws of 4,000, of which each part has as many.
    whole = limit()
    parts = [whole.part(number, of=3) for number in range(3)]
    assert torch.cat([part.rewards for part in parts], dim=1).sort().values.equal(whole.rewards.sort().values)
    assert [part.at(2.0).reward for part in parts] == pytest.approx([2.0] * 3, rel=0.05)
    half = whole.rewards.shape[1] // 2
    assert parts[1].rewards[0, : half // 3].equal(whole.rewards[0, 1:half:3])
