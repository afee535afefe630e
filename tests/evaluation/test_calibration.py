from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lightning_dpo.evaluation.calibration import RewardCalibration


def collected(*batches: tuple[list[float], list[float]]) -> RewardCalibration:
    metric = RewardCalibration()
    for chosen, rejected in batches:
        count = torch.arange(len(chosen))
        metric.update(
            torch.tensor(chosen),
            torch.tensor(rejected),
            lengths=(count + 3, 2 * count + 5),
            weights=torch.ones(len(chosen)),
        )
    return metric


def logit(p: float) -> float:
    return float(torch.logit(torch.tensor(p, dtype=torch.float64)))


def test_by_hand() -> None:
    # Confident in the right side at 0.55 and 0.95, in the wrong one at 0.95, and a tie.
    result = collected(([logit(0.55), logit(0.95), 0.0, 1.0], [0.0, 0.0, logit(0.95), 1.0])).compute()
    assert result.share.tolist() == [0.5, 0, 0, 0, 0.5]
    torch.testing.assert_close(result.predicted, torch.tensor([0.525, 0.65, 0.75, 0.85, 0.95]))
    assert result.observed[[0, 4]].tolist() == [0.75, 0.5]
    assert result.observed[1:4].isnan().all()
    assert float(result.error) == pytest.approx(0.5 * 0.225 + 0.5 * 0.45)
    assert [entry["observed"] for entry in result.curve()] == [0.75, None, None, None, 0.5]


def test_both_orders_in_ten_bins_are_what_it_computes() -> None:
    chosen, rejected = 2 * torch.randn(500), 2 * torch.randn(500)
    p = (chosen - rejected).sigmoid()
    both = torch.cat([p, 1 - p])
    labels = torch.cat([torch.ones(500), torch.zeros(500)]).long()
    expected = binary_calibration_error(both, labels, n_bins=10, norm="l1")
    result = collected((chosen.tolist(), rejected.tolist())).compute()
    assert float(result.error) == pytest.approx(float(expected), abs=1e-6)


def test_batches_and_weights_do_not_matter_beyond_their_sums() -> None:
    chosen, rejected = torch.randn(20), torch.randn(20)
    lengths = torch.randint(1, 90, (2, 20))
    weights = torch.ones(20)
    weights[15:] = 0
    at_once, in_parts = RewardCalibration(), RewardCalibration()
    first = slice(0, 15)
    at_once.update(
        chosen[first], rejected[first], lengths=(lengths[0, first], lengths[1, first]), weights=weights[first]
    )
    for part in (slice(0, 3), slice(3, 18), slice(18, 20)):
        pair = (lengths[0, part], lengths[1, part])
        in_parts.update(chosen[part], rejected[part], lengths=pair, weights=weights[part])
    for one, other in zip(at_once.compute(), in_parts.compute(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    rewards, sizes = torch.cat([chosen[:15], rejected[:15]]), lengths[:, :15].flatten().float()
    expected = torch.corrcoef(torch.stack([rewards, sizes]))[0, 1]
    torch.testing.assert_close(at_once.compute().length_correlation, expected)


def test_the_correlation_survives_a_large_offset_and_is_0_where_nothing_varies() -> None:
    rewards = torch.randn(40)
    plain = collected((rewards[:20].tolist(), rewards[20:].tolist())).compute()
    moved = collected(((rewards[:20] + 100).tolist(), (rewards[20:] + 100).tolist())).compute()
    assert float(moved.length_correlation) == pytest.approx(float(plain.length_correlation), abs=1e-4)
    assert float(collected(([0.1] * 9, [0.1] * 9)).compute().length_correlation) == 0


def test_sums_are_exact_in_a_module_of_half_precision() -> None:
    metric = torch.nn.ModuleList([RewardCalibration()]).to(torch.bfloat16)[0]
    for _ in range(3000):
        metric.update(
            torch.ones(1), torch.zeros(1), lengths=(torch.ones(1), torch.ones(1)), weights=torch.ones(1)
        )
    assert float(metric.bins[0].sum()) == 3000
