from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dpo.scoring.lm_head import LMHead, find_head, head_logps

TOKENS, HIDDEN, VOCAB = 23, 8, 31


def _case(*, bias: bool = False, scale: float = 1.0, softcap: float | None = None) -> tuple[LMHead, Any, Any]:
    head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=torch.float64)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    return LMHead(head, scale=scale, softcap=softcap), hidden, torch.randint(VOCAB, (TOKENS,))


def _naive(spec: LMHead, hidden: Any, targets: Any) -> Any:
    logits = spec.module(hidden) * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return torch.log(torch.softmax(logits, -1))[torch.arange(len(targets)), targets]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 2.0), (1.7, 0.5)])
@pytest.mark.parametrize("chunk", [1, VOCAB * 5, 10**9])
def test_values_and_gradients_are_those_of_full_logits(bias, scale, softcap, chunk) -> None:
    spec, hidden, targets = _case(bias=bias, scale=scale, softcap=softcap)
    weights = torch.randn(TOKENS, dtype=torch.float64)
    inputs = [hidden, *spec.module.parameters()]
    expected = _naive(spec, hidden, targets)
    actual = head_logps(hidden, head=spec, targets=targets, chunk_elements=chunk).logps
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    got = torch.autograd.grad((actual * weights).sum(), inputs)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    spec, hidden, targets = _case(bias=True, scale=1.3, softcap=3.0)

    def run(states: Any, weight: Any, bias: Any) -> Any:
        head = nn.Linear(HIDDEN, VOCAB)
        del head.weight, head.bias
        head.weight, head.bias = weight, bias
        return head_logps(states, head=spec._replace(module=head), targets=targets, chunk_elements=100).logps

    weight, bias = (p.detach().clone().requires_grad_() for p in spec.module.parameters())
    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_a_head_that_is_not_a_plain_matrix_product() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True) * torch.arange(VOCAB) / 7

    spec = LMHead(Adapted(HIDDEN, VOCAB))
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,))
    actual = head_logps(hidden, head=spec, targets=targets, chunk_elements=VOCAB * 4).logps
    expected = _naive(spec, hidden, targets)
    torch.testing.assert_close(actual, expected)
    inputs = [hidden, spec.module.weight]
    for one, other in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [nn.Linear, type("Other", (nn.Linear,), {})])
def test_confidences_are_log_p_minus_log_of_the_collision_probability(kind) -> None:
    spec = LMHead(kind(HIDDEN, VOCAB))
    hidden, targets = torch.randn(TOKENS, HIDDEN), torch.randint(VOCAB, (TOKENS,))
    p = torch.softmax(spec.module(hidden), -1)
    expected = torch.log(p[torch.arange(TOKENS), targets] / (p**2).sum(-1))
    result = head_logps(hidden, head=spec, targets=targets, confidence=True, chunk_elements=VOCAB * 3)
    torch.testing.assert_close(result.confidences, expected)
    assert result.confidences is not None
    assert not result.confidences.requires_grad


def test_half_precision_gives_float32_results_and_float32_weight_gradients() -> None:
    head = nn.Linear(HIDDEN, VOCAB, bias=False)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,))
    with torch.autocast("cpu", torch.bfloat16):
        logps = head_logps(hidden, head=LMHead(head), targets=targets).logps
    logps.sum().backward()
    assert logps.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(logps, _naive(LMHead(head), hidden, targets), atol=0.05, rtol=0)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation produced."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_no_tensor_of_tokens_times_vocabulary_exists() -> None:
    tokens, hidden_size, vocab, chunk = 400, 4, 1000, 20
    head = nn.Linear(hidden_size, vocab, bias=False)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    with _Largest() as largest:
        head_logps(
            hidden, head=LMHead(head), targets=torch.randint(vocab, (tokens,)), chunk_elements=chunk * vocab
        ).logps.sum().backward()
    assert head.weight.grad is not None
    assert largest.numel == chunk * vocab


def test_a_model_without_a_head_has_none() -> None:
    assert find_head(nn.Linear(2, 2)) is None
