"""What GPUs will run, as far as it shows without one.

FlexAttention is computed plainly by torch, with its gradients, in place of the kernel that a GPU compiles. On
fake CUDA tensors operators check shapes, types, devices and their own arguments; there are no numbers, and no
backward pass, for autograd asks a device for its streams.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.flex_attention import WrappedFlexAttention

from lightning_dpo.scoring import select
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score_rows
from lightning_dpo.scoring.layout import InputRows
from lightning_dpo.scoring.lm_head import _LinearLogps
from lightning_dpo.scoring.masks import row_masks
from lightning_dpo.scoring.varlen_attention import _PIECES, VARLEN_ATTENTION, Pieces

CUDA = torch.device("cuda:0")
SHARED_PLAN = ScoringPlan("shared", chunked_head=True)


class Calls(TorchDispatchMode):
    """Notes which operators ran, and of which types and devices their tensors were."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, list[torch.dtype]] = {}
        self.devices: set[torch.device] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        self.types[str(func)] = [tensor.dtype for tensor in tensors]
        self.devices |= {tensor.device for tensor in tensors}
        return func(*args, **kwargs or {})


@pytest.fixture
def plain_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without a compiler, and with the gradients that it otherwise refuses to take on a CPU."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: flex_attention.flex_attention)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_flex_attention_has_the_gradients_of_plain_logits(
    name: str, plain_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "FASTEST", {"cpu": ("flex_attention",)})
    found = select.select_plan(tiny_model(name), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, "flex_attention")
    assert found.gradient_error is not None
    assert found.gradient_error < 1e-5


def fake_rows(rows: InputRows, mode: FakeTensorMode) -> InputRows:
    """Rows whose tensors are on a GPU that is not there; where the kernel cuts them, that is done already."""
    names = ("input_ids", "position_ids", "sequence", "completion", "predict", "targets", "last")
    return replace(rows, **{name: on_gpu(getattr(rows, name), mode) for name in names}, masks=rows.masks)


def on_gpu(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return mode.from_tensor(tensor).to(CUDA)


def cut_for_the_kernel(rows: InputRows, *, model: Any, mode: FakeTensorMode) -> None:
    spans = row_masks(rows, config=model.config, dtype=model.dtype)
    assert isinstance(spans, Tensor)
    pieces = Pieces.of(spans[0, 0], device=torch.device("cpu"))
    moved = {name: on_gpu(getattr(pieces, name), mode) for name in ("keys", "query_ends", "key_ends")}
    setattr(spans, _PIECES, replace(pieces, **moved))


@pytest.mark.parametrize("attention", [VARLEN_ATTENTION, "flex_attention"])
def test_a_forward_pass_stays_on_the_gpu_and_ends_in_float32(attention: str, plain_flex: None) -> None:
    select.register_attention()
    model = tiny_model("qwen3").to(torch.bfloat16)
    model.set_attn_implementation(attention)
    rows = lay_out(random_batch(5).completions(), model=model, plan=SHARED_PLAN)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        if attention == VARLEN_ATTENTION:
            cut_for_the_kernel(rows, model=model, mode=mode)
        model.to(CUDA)
        rows = fake_rows(rows, mode)
        if attention == VARLEN_ATTENTION:
            with Calls() as calls:
                found = score_rows(model, rows, plan=SHARED_PLAN).logps
            assert calls.types["torch_attn._varlen_attn.default"] == [torch.bfloat16] * 3 + [torch.int32] * 2
            assert calls.types["aten.mm.dtype"] == [torch.bfloat16] * 2, "logits come out in float32 at once"
            assert {device.type for device in calls.devices} == {"cuda"}
        else:
            found = score_rows(model, rows, plan=SHARED_PLAN).logps
    assert (found.device, found.dtype, found.shape) == (CUDA, torch.float32, rows.targets.shape)


def test_the_heads_own_backward_pass_stays_on_the_gpu() -> None:
    context = SimpleNamespace(
        needs_input_grad=(True, True, True, *(False,) * 5),
        save_for_backward=lambda *tensors: setattr(context, "saved_tensors", tensors),
        mark_non_differentiable=lambda *_: None,
    )
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        hidden, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device=CUDA) for n in (7, 97))
        bias, targets = torch.empty(97, device=CUDA), torch.empty(7, dtype=torch.long, device=CUDA)
        logps, _ = _LinearLogps.forward(context, hidden, weight, bias, targets, 1.0, 30.0, 4, False)
        gradients = _LinearLogps.backward(context, torch.empty_like(logps), None)[:3]
    for gradient, tensor in zip(gradients, (hidden, weight, bias), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
        assert gradient.device == CUDA
    assert logps.dtype == torch.float32
    assert {device.type for device in calls.devices} == {"cuda"}
