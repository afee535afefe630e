"""Attention for ragged sequences: its cuts and its gathered keys, with SDPA in place of the GPU's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_batch, tiny_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_dpo.scoring import select, varlen_attention
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
from lightning_dpo.scoring.masks import row_masks
from lightning_dpo.scoring.varlen_attention import VARLEN_ATTENTION, Pieces

SHARED_PLAN = ScoringPlan("shared", chunked_head=True)


def kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, sequence by sequence."""
    assert query.dtype == key.dtype == value.dtype
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert most_queries == int(query_ends.diff().max())
    assert most_keys == int(key_ends.diff().max())
    assert window_size[1] == 0
    outputs = []
    for piece in range(len(query_ends) - 1):
        q = query[query_ends[piece] : query_ends[piece + 1]]
        k, v = (states[key_ends[piece] : key_ends[piece + 1]] for states in (key, value))
        back = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))  # aligned at the end
        seen = back >= 0
        if window_size[0] >= 0:
            seen &= back <= window_size[0]
        output = scaled_dot_product_attention(
            *(states.transpose(0, 1)[None] for states in (q, k, v)),
            attn_mask=seen,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "_kernel", kernel)
    monkeypatch.setattr(select, "FASTEST", {"cpu": (VARLEN_ATTENTION,)})


def test_a_further_completion_has_its_prompts_keys() -> None:
    """Two prompts of 2 and 1 tokens with completions of 1 and 2, and of 1: columns 0 to 6."""
    pieces = Pieces.of(torch.tensor([[2, 1, 2], [1, 1, 0]]), device=torch.device("cpu"))
    assert pieces.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6]
    assert pieces.query_ends.tolist() == [0, 3, 5, 7]
    assert pieces.key_ends.tolist() == [0, 3, 7, 9]
    assert (pieces.most_queries, pieces.most_keys) == (3, 4)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma3", "qwen2-window", "cohere"])
def test_it_is_exact_windows_too(on_cpu: None, name: str, mixed: bool) -> None:
    """The trial compares values and gradients with the model's own logits."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = select.select_plan(tiny_model(name), may_switch_attention=True)
    assert (found.plan, found.attention) == (SHARED_PLAN, VARLEN_ATTENTION)
    if not mixed:
        assert found.gradient_error is not None
        assert found.gradient_error < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_what_it_cannot_do_goes_another_way(on_cpu: None, name: str) -> None:
    """Capped scores and sinks."""
    model = tiny_model(name)
    assert select.select_plan(model, may_switch_attention=True).plan == SHARED_PLAN
    assert model.config._attn_implementation != VARLEN_ATTENTION


def test_a_row_is_cut_once_for_all_layers_and_models(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = tiny_model(), tiny_model()
    for model in (policy, reference):
        select.select_plan(model, may_switch_attention=True)
    cuts = []
    original = Pieces.of
    monkeypatch.setattr(Pieces, "of", lambda *args, **kwargs: cuts.append(1) or original(*args, **kwargs))
    batch = random_batch(5).completions()
    torch.testing.assert_close(
        score(policy, batch, plan=SHARED_PLAN).logps, score(reference, batch, plan=SHARED_PLAN).logps
    )
    assert len(cuts) == 1


def test_the_rest_of_the_model_goes_on_as_before(on_cpu: None) -> None:
    model, plain = tiny_model("qwen3"), tiny_model("qwen3")
    select.select_plan(model, may_switch_attention=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False),
        plain.generate(ids, max_new_tokens=5, do_sample=False),
    )
    assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-6)


def test_torch_has_the_kernel_as_it_is_called() -> None:
    """On meta, which has its shapes but no numbers."""
    pytest.importorskip("torch.nn.attention.varlen")
    query, key = torch.empty(7, 4, 16, device="meta"), torch.empty(9, 2, 16, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    output = varlen_attention._kernel(
        query, key, key, ends, ends, 3, 4, scale=None, window_size=(-1, 0), enable_gqa=True
    )
    assert output.shape == query.shape


def test_flex_attention_is_compiled_for_no_more_than_two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of any length, whatever the batch: eleven compilations where rows differed in number too."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    graphs: list[Any] = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, backend=counting)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda _: compiled)
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    plain = tiny_model()
    for number in range(12):
        batch = random_batch(2 + number % 5, seed=number, longest=20 + 15 * number).completions()
        with torch.no_grad():
            found = score(model, batch, plan=SHARED_PLAN).logps
            rows = lay_out(batch, model=model, plan=SHARED_PLAN)
            assert rows.input_ids.shape[0] == 1
            assert 0 <= rows.input_ids.shape[1] - rows.num_tokens < 128
            torch.testing.assert_close(found, score(plain, batch, plan=SHARED_PLAN).logps)
            config, dtype = model.config, model.dtype
            assert row_masks(rows, config=config, dtype=dtype) is row_masks(rows, config=config, dtype=dtype)
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_what_it_does_not_compute_is_refused(asked: dict[str, Any]) -> None:
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="need another attention"):
        varlen_attention.varlen_attention(torch.nn.Identity(), states, states, states, None, **asked)
