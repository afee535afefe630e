"""BCO's running mean over two processes."""

import pytest
import torch
from processes import process_context
from torch import distributed

from lightning_dpo.losses import BCOLoss
from lightning_dpo.types import PairLogps


def _rank(rank, store, results):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # rank 0 has one pair with rewards 1 and 3; rank 1 has two with rewards 10, 10 and 20, 20
    chosen = torch.tensor([[1.0], [10.0, 20.0]][rank])
    rejected = torch.tensor([[3.0], [10.0, 20.0]][rank])
    ones = torch.ones_like(chosen)
    loss = BCOLoss(beta=1.0)
    loss(PairLogps(chosen, rejected, ones, ones), PairLogps(0 * ones, 0 * ones, ones, ones))
    results[rank] = loss.delta
    distributed.destroy_process_group()


@pytest.mark.slow
def test_bco_mean_is_over_all_pairs_of_all_ranks(tmp_path):
    results = torch.zeros(2).share_memory_()
    context = process_context()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert results.tolist() == pytest.approx([(2 + 10 + 20) / 3] * 2)
