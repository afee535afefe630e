"""Embedding and head are gathered where they are used, and not while blocks are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gathering_jobs import Gathered, watch_gathering
from step_jobs import fit, in_one_process
from tiny_models import CONFIGS

pytestmark = pytest.mark.slow

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WIDTH = CONFIGS["llama"].hidden_size


def check(seen: Gathered) -> None:
    """Beside a block there is the final norm, and the block that is gathered ahead."""
    assert set(seen.beside) >= {("policy", "forward"), ("policy", "backward")}
    for names in seen.beside.values():
        assert names == {NORM}
    for bytes_held in seen.peak.values():
        assert bytes_held <= 2 * seen.blocks + 4 * WIDTH


@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_nothing_of_the_vocabularys_size_is_held_beside_blocks(ranks: Any, model: str) -> None:
    seen = ranks.run(watch_gathering, model=model)[1]
    check(seen)
    assert ("reference", "forward") in seen.beside
    whole = in_one_process(model, False)
    assert seen.run.losses == pytest.approx(whole.losses, abs=1e-5)
    both = 2  # policy and reference
    if model == "llama":
        # The policy's head stays from its forward pass to its backward pass, whatever the chunks.
        assert seen.gathers[HEAD] == both
        assert seen.gathers[EMBEDDING] == both
    else:
        # Once for each use: two in a forward pass, two in a backward pass.
        assert seen.gathers[EMBEDDING] == 2 * both + 2


def test_an_adapters_model_holds_as_little(ranks: Any) -> None:
    seen = ranks.run(watch_gathering, lora=True)[1]
    assert seen.beside
    for names in seen.beside.values():
        assert all("norm" in name for name in names)


@pytest.mark.parametrize(
    "model",
    ["gpt2", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("gemma2", "cohere", "gpt-neox"))],
)
def test_other_architectures_train_as_in_one_process(ranks: Any, model: str) -> None:
    """Tied and not, with factors and caps on logits, with position embeddings beside those of tokens."""
    run, whole = ranks.run(fit, strategy="fsdp2", model=model)[0], in_one_process(model, False)
    assert run.losses == pytest.approx(whole.losses, abs=1e-5)
    assert run.norms == pytest.approx(whole.norms, rel=1e-3)
    for name, value in whole.weights.items():
        # Attention's biases include the keys', whose gradient is nothing but rounding; AdamW makes it large.
        if not name.endswith(("attn.c_attn.bias", "query_key_value.bias")):
            torch.testing.assert_close(run.weights[name], value, atol=1e-4, rtol=1e-3, msg=name)
