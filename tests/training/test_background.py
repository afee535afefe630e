from __future__ import annotations

import torch
from torch import nn

from lightning_dpo.training.saving.background import on_host


def test_a_copy_is_that_of_its_moment_and_takes_shared_memory_once() -> None:
    layer, tied = nn.Linear(3, 3), nn.Linear(3, 3)
    tied.weight = layer.weight
    state = {
        "state_dict": {"a": layer.weight, "b": tied.weight, "c": layer.bias},
        "epoch": 2,
        "list": [{"x": 1}],
    }
    copied = on_host(state)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.fill_(7)
    a, b, c = copied["state_dict"].values()
    assert torch.equal(a, before)
    assert a.data_ptr() == b.data_ptr() != layer.weight.data_ptr()
    assert c.data_ptr() not in (a.data_ptr(), layer.bias.data_ptr())
    assert not any(tensor.requires_grad for tensor in (a, b, c))
    assert (copied["epoch"], copied["list"]) == (2, [{"x": 1}])


def test_parts_of_one_tensor_stay_apart() -> None:
    whole = torch.arange(6.0)
    copied = on_host(
        {"first": whole[:3], "second": whole[3:], "turned": whole.view(2, 3).T, "none": whole[:0]}
    )
    assert copied["first"].tolist() == [0, 1, 2]
    assert copied["second"].tolist() == [3, 4, 5]
    assert copied["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["none"].numel() == 0
    assert copied["first"].untyped_storage().nbytes() == 12
