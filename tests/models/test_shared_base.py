"""One copy of a base model's weights under several adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_dpo.models import build
from lightning_dpo.models.build import PolicySettings, build_policy
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.models.shared_base import sharing_bases

IDS = torch.tensor([[3, 4, 5, 6]])


def _settings(folder: Path, **changes: Any) -> PolicySettings:
    settings = PolicySettings(str(folder), LoraSettings(r=2), torch.float32, None, False, True, False)
    return settings._replace(**changes)


def _storages(*models: nn.Module) -> set[int]:
    return {p.data_ptr() for model in models for n, p in model.named_parameters() if "lora_" not in n}


@pytest.fixture(params=["llama", "llama-tied", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(CONFIGS[request.param]).save_pretrained(tmp_path)
    return tmp_path


def test_adapted_models_share_their_base_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = build.load_model
    monkeypatch.setattr(build, "load_model", lambda name, **kw: loaded.append(name) or load(name, **kw))
    torch.manual_seed(1)
    alone = build_policy(_settings(folder))
    with sharing_bases() as bases:
        models = []
        for _ in range(3):
            torch.manual_seed(1)
            models.append(build_policy(_settings(folder)))
        wider = build_policy(_settings(folder, lora=LoraSettings(r=4)))
        build_policy(_settings(folder, lora=None))  # trains all of its weights: loaded for it alone
        assert bases.loads == 1
    assert len(loaded) == 3
    assert len(_storages(*models, wider)) == len(_storages(alone))
    assert not _storages(alone) & _storages(models[0])
    expected = dict(alone.named_parameters())
    for model in models:
        names = dict(model.named_parameters())
        assert names.keys() == expected.keys()
        for name, value in names.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
            assert value.requires_grad == ("lora_" in name)
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=0, atol=0)

    # What one trains leaves the others as they are.
    first, second = models[:2]
    before = second(IDS).logits.detach()
    optimizer = torch.optim.SGD([p for p in first.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # of the two factors, one is zero at first
        optimizer.zero_grad()
        first(IDS).logits.square().mean().backward()
        optimizer.step()
    assert not torch.equal(first(IDS).logits, before)
    torch.testing.assert_close(second(IDS).logits, before, rtol=0, atol=0)
    with first.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(first(IDS).logits, before, rtol=0, atol=0)
    first.config.use_cache = not second.config.use_cache
    assert second.config.use_cache == alone.config.use_cache


def test_weights_that_were_written_to_are_not_shared(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).save_pretrained(tmp_path)
    with sharing_bases():
        model = build_policy(_settings(tmp_path))
        model.double().float()  # what a trainer's precision does is no change
        build_policy(_settings(tmp_path))
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(2)
        with pytest.raises(RuntimeError, match="must not change"):
            build_policy(_settings(tmp_path))
