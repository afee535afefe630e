"""Networks of the user's own: how they are called, and what they gain by offering their hidden states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from tiny_models import OwnNetwork, random_batch, random_pairs
from torch import Tensor, nn
from training import History, loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.evaluation import completion_kl, sample_completions
from lightning_dpo.models.own import HiddenStateNetwork, model_logits
from lightning_dpo.scoring.forward import ScoringPlan, lay_out, score
from lightning_dpo.scoring.select import select_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "litgpt"
IDS = torch.tensor([[3, 4, 5], [6, 7, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


class Recorder(nn.Module):
    """Remembers how its `forward`, which subclasses write, was called."""

    def answer(self, *arguments: Any) -> Tensor:
        self.seen = arguments
        return torch.zeros(2, 3, 8)


class ByPosition(Recorder):
    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        return self.answer(idx, input_pos)


class TwoByPosition(Recorder):
    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.answer(tokens, padding)


class NamedMask(Recorder):
    def forward(self, tokens: Tensor, *, attention_mask: Tensor) -> Tensor:
        return self.answer(tokens, attention_mask)


class OnlyIds(Recorder):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.answer(input_ids, None)


class Anything(Recorder):
    def forward(self, input_ids: Tensor, **options: Any) -> Tensor:
        return self.answer(input_ids, options["attention_mask"])


@pytest.mark.parametrize(
    ("network", "gets_mask"),
    [(ByPosition, False), (TwoByPosition, True), (NamedMask, True), (OnlyIds, False), (Anything, True)],
)
def test_a_network_is_called_as_its_signature_says(network: type[Recorder], gets_mask: bool) -> None:
    model = network()
    assert model_logits(model, IDS, MASK).shape == (2, 3, 8)
    ids, mask = model.seen
    assert torch.equal(ids, IDS)
    assert mask is None or torch.equal(mask, MASK)
    assert (mask is not None) == gets_mask


def gpt(kind: Any) -> Any:
    from litgpt import Config

    seed_everything(0, verbose=False)
    model = kind(
        Config(
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_query_groups=2,
            block_size=64,
            vocab_size=97,
            padded_vocab_size=97,
            rotary_percentage=1.0,
            parallel_residual=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=48,
            bias=False,
        )
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """litgpt's GPT as it is, and with the example's adapter."""
    model = pytest.importorskip("litgpt.model", reason="litgpt is not installed")
    monkeypatch.syspath_prepend(EXAMPLE)
    from shared_prompts import SharedPromptsGPT

    return model.GPT, SharedPromptsGPT


def test_the_adapter_is_short() -> None:
    assert len((EXAMPLE / "shared_prompts.py").read_text().splitlines()) < 40


def test_an_adapter_gives_litgpt_shared_prompts_and_a_chunked_head(kinds: tuple[Any, Any]) -> None:
    plain, adapted = (gpt(kind) for kind in kinds)
    assert not isinstance(plain, HiddenStateNetwork)
    assert select_plan(plain).plan == ScoringPlan()
    assert select_plan(adapted).plan == ScoringPlan("shared", chunked_head=True)
    batch = random_batch(6, longest=9)
    results = []
    for model, plan in ((plain, ScoringPlan()), (adapted, ScoringPlan("shared", chunked_head=True))):
        scored = score(model, batch.completions(), plan=plan)
        gradients = torch.autograd.grad(scored.logps.sum(), list(model.parameters()))
        results.append((scored.logps, scored.common, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    tokens = [
        lay_out(batch.completions(), model=m, plan=select_plan(m).plan).num_tokens for m in (plain, adapted)
    ]
    assert tokens[0] - tokens[1] == int(batch.prompt_lengths.sum())


@pytest.mark.parametrize("adapted", [False, True])
def test_litgpt_trains(kinds: tuple[Any, Any], adapted: bool) -> None:
    history = History()
    module = DPOModule(gpt(kinds[adapted]), optimizer=sgd)
    trainer(max_epochs=3, callbacks=[history]).fit(module, loader(random_pairs(16, longest=9)))
    assert history.values["train/loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert history.values["train/loss"][-1] < 0.6
    assert (module.plan().layout == "shared") == adapted
    prompts = [[5, 6], [7]]
    samples = sample_completions(module.policy, prompts=prompts, eos_token_id=2, max_new_tokens=5)
    assert module.reference_model is not None
    assert (completion_kl(module.policy, reference=module.reference_model, samples=samples).kl >= 0).all()


def test_a_head_that_does_more_is_not_taken(kinds: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A network may name a head that is not all it does with its states: then its own logits count."""

    class Capped(kinds[1]):  # type: ignore[misc]
        def forward(self, idx: Tensor) -> Tensor:
            return torch.tanh(super().forward(idx))

    model = gpt(Capped)
    assert select_plan(model).plan == ScoringPlan()
    assert "head" in caplog.text


def test_a_module_that_hydra_instantiates_trains() -> None:
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    written = OmegaConf.create(
        {
            "_target_": "lightning_dpo.DPOModule",
            "loss": {"_target_": "lightning_dpo.losses.IPOLoss", "beta": 0.5},
            "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-2},
            "lr_scheduler": {
                "_target_": "torch.optim.lr_scheduler.ConstantLR",
                "_partial_": True,
                "factor": 1.0,
            },
        }
    )
    module = instantiate(written, policy=OwnNetwork())
    before = [parameter.clone() for parameter in module.settings.policy.parameters()]
    trainer(max_epochs=1).fit(module, loader())
    assert any(not torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))
    assert "hydra" in sys.modules
