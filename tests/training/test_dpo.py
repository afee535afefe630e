from __future__ import annotations

import copy
import math
from functools import partialmethod
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_models import CONFIGS, OwnNetwork, random_batch, random_pairs, tiny_model
from torch import nn
from torch.utils.data import DataLoader
from training import History, loader, sgd, trainer
from transformers import AutoModelForCausalLM

from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.losses import DPOLoss, IPOLoss, SFTLoss, SimPOLoss
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.models.unwrap import causal_lm
from lightning_dpo.reference.base import NoReference
from lightning_dpo.scoring import padded_pieces
from lightning_dpo.scoring.forward import ScoringPlan
from lightning_dpo.scoring.prefix_attention import PREFIX_ATTENTION
from lightning_dpo.training.metrics.trouble_signs import TROUBLE_SIGNS


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_policy_learns_and_the_reference_stays() -> None:
    policy, history = tiny_model(), History()
    start = weights(policy)
    module = DPOModule(policy, loss=DPOLoss(beta=0.1), optimizer=sgd)
    trainer(max_epochs=6, callbacks=[history]).fit(module, loader())
    assert history.values["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert history.values["train/loss"][-1] < 0.6
    assert history.values["train/rewards/chosen"][0] == 0
    assert history.values["train/rewards/accuracy"][0] == 0.5
    assert history.values["train/rewards/accuracy"][-1] == 1
    assert not same(weights(module.policy), start)
    assert module.reference_model is not None
    assert same(weights(module.reference_model), start)


def test_the_reference_is_no_part_of_the_module() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Watching(DPOModule):
        def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
            reference = self.reference_model
            assert reference is not None
            theirs = {id(p) for p in reference.parameters()}
            optimized = {id(p) for group in self.optimizers().param_groups for p in group["params"]}
            result = super().training_step(batch, batch_idx)
            seen.append(
                (
                    reference.training,
                    bool(theirs & optimized),
                    any(p.requires_grad for p in reference.parameters()),
                )
            )
            return result

    module = Watching(tiny_model(), optimizer=sgd)
    trainer().fit(module, loader())
    assert seen == [(False, False, False)] * 4
    assert module.policy.training
    names = module.state_dict().keys()
    assert all(name.startswith("policy.") for name in names)
    assert len(list(module.parameters())) == len(list(module.policy.parameters()))


@pytest.mark.parametrize("loss", [DPOLoss(beta=0.3), IPOLoss(beta=0.2), SimPOLoss(beta=2.0), SFTLoss()])
def test_accumulated_batches_equal_one_large_batch(loss: Any) -> None:
    pairs = random_pairs(12)
    ends = []
    for batch_size, accumulate in ((12, 1), (4, 3)):
        module = DPOModule(tiny_model(), loss=loss, optimizer=sgd)
        trainer(accumulate_grad_batches=accumulate, max_epochs=2).fit(
            module, loader(pairs, batch_size=batch_size)
        )
        ends.append(weights(module.policy))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-5, rtol=1e-5)


def test_batches_of_unequal_size_accumulate_to_their_pairs_mean() -> None:
    pairs = random_pairs(12)
    sizes = [(0, 5), (5, 7), (7, 12)]
    unequal = [PairBatch.from_pairs(pairs[a:b], denominator=len(pairs) / len(sizes)) for a, b in sizes]
    ends = []
    for batches in ([PairBatch.from_pairs(pairs)], unequal):
        module = DPOModule(tiny_model(), optimizer=sgd)
        trainer(accumulate_grad_batches=len(batches)).fit(module, DataLoader(batches, batch_size=None))
        ends.append(weights(module.policy))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-5, rtol=1e-5)


def test_fillers_change_nothing() -> None:
    pairs = random_pairs(6)
    plain = PairBatch.from_pairs(pairs[:4])
    filled = PairBatch.from_pairs(pairs, weights=[1, 1, 1, 1, 0, 0])
    ends, metrics = [], []
    timed = ("train/tokens_per_second", "train/data_wait")
    for batch in (plain, filled):
        module = DPOModule(tiny_model(), optimizer=sgd)
        run = trainer()
        run.fit(module, DataLoader([batch], batch_size=None), DataLoader([batch], batch_size=None))
        ends.append(weights(module.policy))
        metrics.append({k: float(v) for k, v in run.callback_metrics.items() if k not in timed})
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-6)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-5, abs=1e-6)


def test_validation_is_exact_per_pair_whatever_the_batches() -> None:
    pairs = random_pairs(11)
    module = DPOModule(tiny_model(), optimizer=sgd)
    trainer().fit(module, loader(pairs[:4]))
    results = [
        trainer().validate(module, loader(pairs, batch_size=size), verbose=False)[0] for size in (11, 4, 1)
    ]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-5)
    assert set(results[0]) == {
        "val/loss",
        *(f"val/rewards/{name}" for name in ("chosen", "rejected", "margin", "accuracy")),
        "val/logps/chosen",
        "val/logps/rejected",
        "val/logratio/margin",
        *(f"val/{name}" for name in TROUBLE_SIGNS),
    }


def test_one_module_can_be_validated_then_trained_then_validated() -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    before = trainer().validate(module, loader(), verbose=False)[0]
    trainer(max_epochs=4).fit(module, loader(), loader())
    after = trainer().validate(module, loader(), verbose=False)[0]
    assert before["val/loss"] == pytest.approx(math.log(2))
    assert after["val/loss"] < before["val/loss"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32"])
def test_precisions_start_at_ln_2(precision: Any) -> None:
    history = History()
    module = DPOModule(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer(precision=precision, callbacks=[history], max_epochs=2, gradient_clip_val=1.0).fit(
        module, loader()
    )
    assert history.values["train/loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert history.values["train/loss"][-1] < math.log(2)
    assert module.latest is not None
    assert module.latest.losses.dtype == torch.float32


def test_gradients_are_clipped_with_a_fused_optimizer_too() -> None:
    moved = []
    for limit in (None, 1e-3):
        module = DPOModule(tiny_model(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=True))
        before = weights(tiny_model())
        run = trainer(max_steps=1, precision="bf16-mixed", gradient_clip_val=limit)
        run.fit(module, loader())
        changes = [(value - before[name]).norm() for name, value in weights(module.policy).items()]
        moved.append(float(torch.stack(changes).norm()))
    assert moved[1] <= 1.01e-3 < moved[0]


def test_gradient_checkpointing_changes_memory_not_results() -> None:
    ends = []
    for checkpointing in (False, True, "selective"):
        module = DPOModule(tiny_model(), optimizer=sgd, gradient_checkpointing=checkpointing)
        trainer(max_epochs=2).fit(module, loader())
        assert module.policy.is_gradient_checkpointing == bool(checkpointing)
        ends.append(weights(module.policy))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], atol=1e-6, rtol=1e-6)


def test_a_users_own_network_trains() -> None:
    network, history = OwnNetwork(), History()
    module = DPOModule(network, optimizer=sgd)
    trainer(max_epochs=8, callbacks=[history]).fit(module, loader())
    assert history.values["train/loss"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert history.values["train/loss"][-1] < 0.68


def test_a_loss_without_reference_builds_none() -> None:
    module = DPOModule(tiny_model(), loss=SimPOLoss(beta=2.0), optimizer=sgd)
    trainer().fit(module, loader())
    assert isinstance(module.reference, NoReference)


def test_a_reference_of_ones_own(tmp_path: Any) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path / "reference")
    for reference in (tiny_model(seed=0), str(tmp_path / "reference")):
        module = DPOModule(tiny_model(seed=0), reference=reference, optimizer=sgd)
        trainer().fit(module, loader())
        assert module.reference_model is not None
        assert same(weights(module.reference_model), weights(tiny_model(seed=0)))


def test_a_reference_of_another_architecture_is_refused() -> None:
    module = DPOModule(tiny_model("llama"), reference=tiny_model("qwen3"), optimizer=sgd)
    with pytest.raises(ValueError, match="architecture, LlamaForCausalLM, got Qwen3ForCausalLM"):
        module.configure_model()


def test_configure_model_is_idempotent() -> None:
    module = DPOModule(tiny_model())
    module.configure_model()
    policy, reference = module.policy, module.reference_model
    module.configure_model()
    assert module.policy is policy
    assert module.reference_model is reference


def test_dropout_is_off_unless_asked_for() -> None:
    for disable in (True, False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"]))
        module = DPOModule(model, disable_dropout=disable)
        module.configure_model()
        rates = {part.p for part in model.modules() if isinstance(part, nn.Dropout)}
        assert rates == ({0.0} if disable else {0.1})


def test_a_proof_is_made_once() -> None:
    module = DPOModule(tiny_model(), optimizer=sgd)
    calls = 0
    module.configure_model()
    forward = module.policy.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    module.policy.model.forward = counting
    trainer().fit(module, loader())
    # Four trial passes: full logits with a gradient, the chunked head, shared rows, these with a gradient.
    # Then one for each of the four batches.
    assert calls == 4 + 4
    assert module.plan() == ScoringPlan("shared", chunked_head=True)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "lora"])
def test_what_is_compiled_is_what_is_called(monkeypatch: pytest.MonkeyPatch, lora: Any) -> None:
    """An adapter's wrapper is gone around by scoring: compiled, it would do nothing."""
    called: list[torch.nn.Module] = []

    def compile_(part: torch.nn.Module, **_: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(part)
            return part._call_impl(*args, **kwargs)

        object.__setattr__(part, "_compiled_call_impl", call)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    module = DPOModule(tiny_model(), optimizer=sgd, lora=lora, compile_model=True)
    trainer(max_steps=1).fit(module, loader())
    models = [causal_lm(module.policy)] + ([module.reference_model] if lora is None else [])
    assert {id(part) for part in called} == {id(layer) for model in models for layer in model.model.layers}


@pytest.mark.heavy
def test_what_is_compiled_is_compiled_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is left out of graphs: its cuts, other ones for each batch, make none."""
    monkeypatch.setattr(padded_pieces, "MOST_NUMBERS", 0)  # a call for each piece, as for longer prompts
    # Graphs are counted: code need not be made of them, which takes a minute.
    without_code = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    graphs = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = DPOModule(tiny_model(), optimizer=sgd, compile_model=True)
    batches = [random_batch(4, seed=seed, longest=10 + seed) for seed in range(6)]
    trainer(max_epochs=1, callbacks=[Counting()]).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert module.policy.config._attn_implementation == PREFIX_ATTENTION
    assert len(graphs) == 6
    # What stands around attention, for the plan's trial, the policy and the reference. With attention in them
    # there are some 40 before the first step, at Dynamo's limit, and then nothing is compiled any more.
    assert 0 < graphs[0] <= 20
    assert graphs[-1] == graphs[1]


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["argument", "torch.compile"])
def test_compiled_training_gives_the_same_weights(how: str) -> None:
    ends = []
    for compiled in (False, True):
        module = DPOModule(tiny_model(), optimizer=sgd, compile_model=compiled and how == "argument")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(module) if compiled and how == "torch.compile" else module
        trainer(max_epochs=2).fit(run, loader(), loader())
        assert (torch._dynamo.utils.counters["stats"]["calls_captured"] > 0) == compiled
        # Compiled or not, attention skips what nobody sees.
        assert module.policy.config._attn_implementation == PREFIX_ATTENTION
        assert set(module.state_dict()) == {f"policy.{name}" for name in tiny_model().state_dict()}
        ends.append(weights(module.policy))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=1e-4)
