"""KTO on two ranks: one z0 for both, metrics of every example, and the step that one process takes."""

from __future__ import annotations

from typing import Any

import kto_jobs
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_have_the_numbers_and_take_the_step_of_one(ranks: Any, strategy: str) -> None:
    expected, policy = kto_jobs.by_hand()
    z0, _, auc = expected
    assert z0 > 0.01
    assert 0 < auc < 1
    for measured, state in ranks.run(kto_jobs.validate_and_step, strategy=strategy):
        assert measured == pytest.approx(expected, rel=1e-5)
        if state:
            torch.testing.assert_close(state, policy, rtol=1e-4, atol=1e-5)
