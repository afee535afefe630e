"""Attention of a single row on the CPU: small pieces in one call, others one by one, all in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dpo.scoring.padded_pieces import MOST_NUMBERS
from lightning_dpo.scoring.prefix_attention import prefix_attention

HEADS, SIZE = 4, 8
SMALL = [[2, 1, 2, 4], [1, 1, 0, 0], [2, 0, 0, 0], [3, 5, 2, 0], [4, 1, 1, 1]]
"""Lengths of prompts and of their completions, 0 where a prompt has fewer."""
LARGE = [[300, 10, 20, 5], [2, 1, 0, 0], [5, 30, 3, 0]]


class Calls(TorchDispatchMode):
    """Counts calls of SDPA, and says in which types they ran; it is below autocast and its casts."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in func.name():
            assert {states.dtype for states in args[:3]} == {args[0].dtype}
            self.types.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def layer(groups: int = 1) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups = groups
    return module


def states(
    spans: list[list[int]], *, key_heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, spans))
    return [
        torch.randn(1, heads, tokens, SIZE, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, key_heads, key_heads)
    ]


def visible(spans: list[list[int]]) -> Tensor:
    """True where a token sees another, (seq_len, seq_len), from the definition."""
    owner = [(p, c) for p, sizes in enumerate(spans) for c, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(
        [
            [k <= q and own[0] == other[0] and other[1] in (0, own[1]) for k, other in enumerate(owner)]
            for q, own in enumerate(owner)
        ]
    )


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("spans", [SMALL, LARGE])
def test_it_is_attention_under_the_mask_of_what_is_seen(spans: list[list[int]], key_heads: int) -> None:
    query, key, value = states(spans, key_heads=key_heads)
    wanted = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=visible(spans), enable_gqa=True
    )
    weights = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((wanted * weights).sum(), (query, key, value))
    output, _ = prefix_attention(
        layer(HEADS // key_heads), query, key, value, torch.tensor(spans)[None, None], scaling=SIZE**-0.5
    )
    torch.testing.assert_close(output, wanted.transpose(1, 2).float())
    found = torch.autograd.grad((output.transpose(1, 2) * weights).sum(), (query, key, value))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mixed", ["", "value", "query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spans", "calls"), [(SMALL, 1), (LARGE, 6)])
def test_small_pieces_go_in_one_call_and_all_in_float32(
    spans: list[list[int]], calls: int, dtype: torch.dtype, mixed: str
) -> None:
    longest = max(prompt + max(completions) for prompt, *completions in spans)
    assert (longest * HEADS * SIZE <= MOST_NUMBERS) is (calls == 1)
    query, key, value = states(spans, dtype=dtype)
    if mixed == "value":  # rotary embeddings leave queries and keys in float32
        query, key, value = query.float(), key.float(), value.bfloat16()
    elif mixed == "query":
        query, key, value = query.bfloat16(), key.float(), value.float()
    with Calls() as seen, torch.autocast("cpu", torch.bfloat16, enabled=bool(mixed)):
        output, _ = prefix_attention(layer(), query, key, value, torch.tensor(spans)[None, None])
    assert seen.types == [torch.float32] * calls
    assert output.dtype == value.dtype
