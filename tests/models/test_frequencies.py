"""Rotary frequencies: a model in 16 bits keeps them in float32, wherever it was converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_pairs, tiny_model
from torch import Tensor, nn
from training import loader, sgd, trainer

from lightning_dpo import DPOModule, PairBatch, TokenPair
from lightning_dpo.models.load import load_model
from lightning_dpo.models.precision import move
from lightning_dpo.reference.cache.store import Space
from lightning_dpo.reference.cached import CachedReference
from lightning_dpo.reference.frozen import FrozenReference


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    """Completions far behind the start, where a rounded frequency turns by radians."""
    [first, second] = random_pairs(2, longest=30)
    return PairBatch.from_pairs([TokenPair([3, *first.prompt_ids] * 6, [5, 6, 7, 8], [9, 10, 11]), second])


def frequencies(model: nn.Module) -> Tensor:
    [found] = [b for name, b in model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    return found


def logits(model: Any, batch: PairBatch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.prompt_ids[None]).logits


@pytest.mark.parametrize("reference", ["frozen", "folder"])
def test_a_reference_in_16_bits_is_the_policy_to_the_bit(
    folder: str, reference: str, batch: PairBatch
) -> None:
    module = DPOModule(folder, dtype="bfloat16", reference=folder if reference == "folder" else reference)
    module.configure_model()
    with torch.no_grad():
        policy, other, _ = module.score(batch)
    assert other is not None
    assert frequencies(module.policy).dtype == torch.float32
    assert torch.equal(policy.chosen, other.chosen)
    assert torch.equal(policy.rejected, other.rejected)


def test_a_reference_of_another_type_is_what_loads_in_that_type(folder: str, batch: PairBatch) -> None:
    module = DPOModule(folder, reference_dtype="bfloat16")
    module.configure_model()
    module.plan()
    assert module.reference_model is not None
    expected = load_model(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(module.reference_model, batch), logits(expected, batch))


@pytest.mark.parametrize("reference", ["frozen", "cached"])
def test_a_policy_that_the_trainer_converts_is_what_it_exports(
    folder: str, reference: str, batch: PairBatch, tmp_path: Path
) -> None:
    module = DPOModule(folder, reference=reference, optimizer=sgd)
    trainer(precision="bf16-true", max_steps=2).fit(module, loader())
    assert torch.equal(frequencies(module.policy), frequencies(tiny_model()))
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    module.export(tmp_path / "exported")
    exported = load_model(str(tmp_path / "exported"), dtype=torch.bfloat16)
    assert torch.equal(logits(module.policy.eval(), batch), logits(exported, batch))


def test_a_reference_follows_the_policys_types_tensor_by_tensor() -> None:
    policy = tiny_model().to(torch.bfloat16)
    reference = FrozenReference.copy_of(policy)
    policy.model.norm.float()
    reference.match(policy)
    assert reference.model.model.norm.weight.dtype == torch.float32  # type: ignore[union-attr]


class OwnRotary(nn.Module):
    """A network whose own code knows one type."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.register_buffer("inv_freq", torch.rand(2), persistent=False)


def test_a_network_of_the_users_own_is_converted_whole() -> None:
    network = OwnRotary()
    move(network, dtype=torch.bfloat16)
    assert network.inv_freq.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype", "changed"),
    [("llama", "float32", False), ("gpt2", "bfloat16", False), ("llama", "bfloat16", True)],
)
def test_only_values_that_were_wrong_get_another_key(
    name: str, dtype: Any, changed: bool, tmp_path: Path
) -> None:
    tiny_model(name).save_pretrained(tmp_path / name)
    module = DPOModule(str(tmp_path / name), dtype=dtype, reference="cached")
    module.configure_model()
    assert isinstance(module.reference, CachedReference)
    kept = f"torch.{dtype} as torch.{dtype}"
    older = Space(module.reference.identity, kept, "None highest", "default").key
    assert (Path(module.reference.open().location).name != older) == changed
