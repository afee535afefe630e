"""Norms and clipping where ranks hold parts of the gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import fsdp1_jobs as jobs
import pytest
import torch
from ranks import Ranks
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_dpo.parallel import clip_gradients, gradient_norm


def test_a_rank_without_gradients_joins_the_sum(ranks: Ranks) -> None:
    assert ranks.run(jobs.norm_of_one_rank) == [5.0, 5.0]
    assert gradient_norm([]) == 0.0


class Wrapped(FullyShardedDataParallel):
    limits: ClassVar[list[float]] = []

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Any:
        self.limits.append(max_norm)


@pytest.mark.parametrize(("limit", "clipped"), [(0, []), (0.0, []), (None, []), (0.5, [0.5])])
def test_a_limit_of_zero_leaves_gradients_alone(limit: float | None, clipped: list[float]) -> None:
    Wrapped.limits.clear()
    model = Wrapped.__new__(Wrapped)
    trainer = SimpleNamespace(model=model, precision_plugin=None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert clip_gradients(trainer, optimizer, limit=limit, algorithm=None) == bool(clipped)
    assert Wrapped.limits == clipped
