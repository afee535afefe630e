"""A step never waits for its device: shown on `meta`, a device that has nothing to read back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.losses import IPOLoss, SimPOLoss
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.select import Selection, register_attention
from lightning_dpo.scoring.varlen_attention import VARLEN_ATTENTION
from lightning_dpo.training.base import PolicyModule
from lightning_dpo.training.kto import KTOModule
from lightning_dpo.training.reward_model import RewardModule
from lightning_dpo.types import FeedbackBatch, TokenExample

READ_BACKS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.equal,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_dim,
)


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device.

    Attributes:
        read_backs: Copies from the device, and operations that need its numbers.
        blocking_copies: Copies to the device that the host waits for.
        called: Operators that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read_backs: list[str] = []
        self.blocking_copies: list[str] = []
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.called.add(str(func))
        devices = {a.device.type for a in args if isinstance(a, Tensor)}
        if func.overloadpacket in READ_BACKS and "meta" in devices:
            self.read_backs.append(str(func))
        target, source = kwargs.get("device"), None
        if func.overloadpacket is torch.ops.aten._to_copy:
            source = args[0].device.type
        elif func.overloadpacket is torch.ops.aten.copy_:
            target, source = args[0].device, args[1].device.type
            kwargs = {"non_blocking": args[2]} if len(args) > 2 else kwargs
        if source is not None and target is not None and source != torch.device(target).type:
            if source == "meta":
                self.read_backs.append(str(func))
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
            if not kwargs.get("non_blocking"):
                self.blocking_copies.append(str(func))
        return func(*args, **kwargs)


def on_meta(module: PolicyModule, *, step: int) -> PolicyModule:
    """A module in the middle of a run whose device is `meta`."""
    module.configure_model()
    module.to("meta")
    module._selection = Selection(ScoringPlan("shared", chunked_head=True), None, None, "")
    module._trainer = SimpleNamespace(global_step=step, log_every_n_steps=50)  # type: ignore[assignment]
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    reference = getattr(module, "reference", None)
    if reference is not None:
        reference.match(module.policy)
    return module


def ragged_model() -> Any:
    """A model that runs the attention of GPUs."""
    register_attention()
    model = tiny_model("qwen3")
    model.set_attn_implementation(VARLEN_ATTENTION)
    return model


def pairs(*, fillers: bool = False) -> PairBatch:
    batch = random_batch(6)
    batch.margins = torch.rand(6)
    if fillers:
        batch.weights[2] = 0.0
    return batch


def feedback() -> FeedbackBatch:
    rows = [TokenExample([5, i + 3], [7, 8, i + 3], i % 2 == 0) for i in range(6)]
    return FeedbackBatch.from_examples(rows)


CASES: dict[str, tuple[Any, Any]] = {
    "dpo": (lambda: DPOModule(tiny_model()), pairs),
    "dpo, window": (lambda: DPOModule(tiny_model("gemma3")), pairs),
    "dpo, ragged": (lambda: DPOModule(ragged_model()), pairs),
    "dpo, fillers": (lambda: DPOModule(tiny_model()), lambda: pairs(fillers=True)),
    "ipo": (lambda: DPOModule(tiny_model(), loss=IPOLoss()), pairs),
    "simpo": (lambda: DPOModule(tiny_model(), loss=SimPOLoss(), reference="none"), pairs),
    "kto": (lambda: KTOModule(tiny_model()), feedback),
    "reward": (lambda: RewardModule(tiny_model()), pairs),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_without_logging_never_waits(case: str) -> None:
    make, data = CASES[case]
    module, batch = on_meta(make(), step=7), data()
    with Waits() as waits:
        module.training_step(batch.to(torch.device("meta")), 7).backward()
    assert waits.read_backs == []
    assert waits.blocking_copies == []
    assert any(parameter.grad is not None for parameter in module.policy.parameters())


@pytest.mark.parametrize("case", ["dpo", "kto", "reward"])
def test_a_step_with_logging_reads_once(case: str) -> None:
    make, data = CASES[case]
    module, batch = on_meta(make(), step=49), data()
    with Waits() as waits:
        module.training_step(batch.to(torch.device("meta")), 49)
    assert len(waits.read_backs) == 1
    assert waits.blocking_copies == []


def test_a_step_in_bfloat16_goes_by_the_kernels_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, where tensors say that they are on a GPU."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    module = on_meta(DPOModule(ragged_model().to(torch.bfloat16)), step=7)
    with Waits() as waits:
        module.training_step(pairs().to(torch.device("meta")), 7).backward()
    assert waits.read_backs == waits.blocking_copies == []
    ran = ("_varlen_attn.default", "_varlen_attn_backward.default", "aten.mm.dtype")
    assert all(any(name in called for called in waits.called) for name in ran)
    for name, parameter in module.policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16


def test_the_count_sees_what_it_should() -> None:
    with Waits() as waits:
        values = torch.arange(3).to("meta")
        values.to("meta", non_blocking=True)
        torch.arange(3).to("meta", non_blocking=True)
        values.cpu()
    assert len(waits.blocking_copies) == 1
    assert len(waits.read_backs) == 1
