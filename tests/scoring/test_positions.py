from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from pair_rows import jsonl
from tiny_models import VOCAB, OwnNetwork, tiny_model
from tiny_tokenizers import byte_level
from torch import nn
from training import sgd, trainer

from lightning_dpo import DPOModule, PairBatch, PreferenceDataModule, TokenPair
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.scoring.forward import ScoringPlan, score
from lightning_dpo.scoring.positions import check_positions
from lightning_dpo.scoring.select import select_plan
from lightning_dpo.scoring.trial import Trial

LIMIT = 256
"""Positions of the tiny models."""

LONG = {"prompt": "how long? " * 8, "chosen": " very long indeed", "rejected": " short"}


def opt() -> Any:
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    return hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=VOCAB, num_attention_heads=2, max_position_embeddings=LIMIT, **sizes)
    )


@pytest.mark.parametrize("make", [lambda: tiny_model("gpt2"), opt])
def test_rows_that_a_model_has_no_positions_for_are_refused(make: Any) -> None:
    model = make()
    check_positions(model, longest=LIMIT)
    with pytest.raises(ValueError, match=rf"fit into .* {LIMIT} positions .* got one of {LIMIT + 1} tokens"):
        check_positions(model, longest=LIMIT + 1)


@pytest.mark.parametrize("lora", [False, True])
def test_rows_that_are_longer_than_a_model_was_made_for_are_told(lora: bool) -> None:
    model = tiny_model("llama")
    if lora:
        model = apply_lora(model, LoraSettings(r=2))
    with pytest.warns(UserWarning, match=rf"has {LIMIT + 1} tokens, more than .*--data.max_length {LIMIT}"):
        check_positions(model, longest=LIMIT + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_positions(model, longest=LIMIT)


@pytest.mark.parametrize("make", [OwnNetwork, lambda: tiny_model("bloom"), lambda: tiny_model("mamba")])
def test_models_without_a_number_of_positions_take_any(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_positions(make(), longest=10**6)


def test_it_is_found_before_the_first_step_and_max_length_mends_it(tmp_path: Path) -> None:
    tokenizer = byte_level()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}

    def fit(**options: Any) -> DPOModule:
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(tokenizer), **sizes))
        data = PreferenceDataModule(
            jsonl(tmp_path / "pairs.jsonl", [LONG, LONG]), tokenizer=tokenizer, num_processes=1, **options
        )
        module = DPOModule(model, optimizer=sgd)
        trainer(max_steps=1).fit(module, datamodule=data)
        return module

    with pytest.raises(ValueError, match="got one of 88 tokens; `max_length=64` of the data"):
        fit()
    assert fit(max_length=64).latest is not None


def gpt_neo(**options: Any) -> Any:
    """A model whose layers mask by columns: its own window, in a buffer as wide as its positions."""
    settings = {"max_position_embeddings": LIMIT, "window_size": 32, **options}
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, attention_types=[[["local"], 2]], **settings))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_layers_with_a_mask_of_their_own_get_rows_of_one_completion() -> None:
    model = gpt_neo()
    plan = select_plan(model).plan
    assert plan == ScoringPlan("concatenated", chunked_head=True)
    # Beyond the window, and with both completions in a row beyond the positions.
    rows = [TokenPair([*range(3, 90)] * 2, [*range(5, 75)], [*range(9, 49)])]
    completions = PairBatch.from_pairs(rows).completions()
    with torch.no_grad():
        found, plain = (score(model, completions, plan=each).logps for each in (plan, ScoringPlan()))
    torch.testing.assert_close(found, plain, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=rf"GPTNeoForCausalLM has a mask of its own, of {LIMIT} columns"):
        select_plan(model, layout="shared")


def test_a_window_by_another_name_is_crossed_where_there_are_positions_for_it() -> None:
    assert len(Trial(gpt_neo(), device=torch.device("cpu")).batch.prompt_ids) == 32 + 8 + 5 + 3
    assert len(Trial(gpt_neo(window_size=LIMIT), device=torch.device("cpu")).batch.prompt_ids) == 24


def test_a_buffer_that_no_layer_holds_changes_nothing() -> None:
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
    torch.manual_seed(0)
    model = hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**sizes)).eval()
    assert select_plan(model).plan == ScoringPlan("shared", chunked_head=True)
