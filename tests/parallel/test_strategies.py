"""What can be known about strategies without several processes or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DeepSpeedStrategy
from tiny_models import CONFIGS, OwnNetwork, random_batch, tiny_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from training import loader, sgd, trainer

from lightning_dpo import DPOModule
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel import FSDP1Strategy, FSDP2Strategy, sharding_for
from lightning_dpo.parallel import strategies as module_under_test
from lightning_dpo.parallel.sharding import block_classes, blocks
from lightning_dpo.parallel.strategies import check_strategy, wrap_policy
from lightning_dpo.scoring.forward import ScoringPlan, score

CONFIG_FOLDER = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_the_models_layers(name: str) -> None:
    model = tiny_model(name)
    assert len(blocks(model)) == model.config.num_hidden_layers
    held = sum(p.numel() for block in blocks(model) for p in block.parameters())
    assert 0 < held < sum(p.numel() for p in model.parameters())


def test_blocks_are_found_within_an_adapter_wrapper() -> None:
    module = DPOModule(tiny_model(), lora=LoraSettings(r=2))
    module.configure_model()
    assert len(blocks(module.policy)) == 2


def test_blocks_of_other_modules() -> None:
    assert blocks(OwnNetwork()) == []
    layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
    assert blocks(nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})) == list(layers)


def test_blocks_by_name() -> None:
    model = tiny_model()
    assert {type(part).__name__ for part in blocks(model, ["LlamaMLP", "LlamaAttention"])} == {
        "LlamaMLP",
        "LlamaAttention",
    }
    with pytest.raises(
        ValueError, match=r"`block_classes` must name parts of LlamaForCausalLM, got \['Layer'\]"
    ):
        block_classes(model, ["Layer"])


def deepspeed(stage: int) -> Any:
    strategy = object.__new__(DeepSpeedStrategy)  # the package itself need not be installed
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


def test_deepspeed_stage_3_is_refused_and_the_others_are_not() -> None:
    check_strategy(deepspeed(1), adapter=False)
    check_strategy(deepspeed(2), adapter=True)
    with pytest.raises(
        ValueError, match="`strategy` must leave weights readable, got DeepSpeed ZeRO stage 3"
    ):
        check_strategy(deepspeed(3), adapter=False)


def test_an_adapter_under_fsdp1_is_saved_in_one_file() -> None:
    check_strategy(FSDP1Strategy(state_dict_type="sharded"), adapter=False)
    check_strategy(FSDP1Strategy(state_dict_type="full"), adapter=True)
    with pytest.raises(ValueError, match='`lora` under FSDP1 needs state_dict_type="full"'):
        check_strategy(FSDP1Strategy(state_dict_type="sharded"), adapter=True)


def test_offloading_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="`cpu_offload` moves weights from a GPU"):
        trainer(strategy=FSDP2Strategy(cpu_offload=True)).fit(DPOModule(tiny_model()), loader())


def test_other_strategies_shard_nothing() -> None:
    assert sharding_for(None, adapter=False) is None
    assert sharding_for(trainer(), adapter=False) is None


def test_fsdp1_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="`FSDP1Strategy` needs GPUs"):
        trainer(strategy=FSDP1Strategy()).fit(DPOModule(tiny_model()), loader())


def test_the_wrap_policy_of_fsdp1_is_the_models_blocks() -> None:
    policy, model = wrap_policy(tiny_model()), tiny_model()
    wrapped = [
        part
        for part in model.modules()
        if policy._module_classes and isinstance(part, tuple(policy._module_classes))
    ]
    assert wrapped == list(model.model.layers)


def test_fsdp1_wraps_policy_and_reference_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for torch's and Lightning's own part, which need a GPU."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module, **options: Any) -> None:
            super().__init__()
            self.module = module
            calls.append((module, options))

        def forward(self, *arguments: Any) -> Any:
            return self.module(*arguments)

    def wrap(strategy: Any, model: nn.Module) -> nn.Module:
        return Wrapped(model, **strategy.kwargs)

    monkeypatch.setattr(module_under_test, "FullyShardedDataParallel", Wrapped)
    monkeypatch.setattr(module_under_test.FSDPStrategy, "_setup_model", wrap)
    strategy = FSDP1Strategy(parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = type("Local", (), {"local_rank": lambda self: 0})()
    module = DPOModule(tiny_model(), optimizer=sgd)
    module.configure_model()
    strategy._lightning_module = module
    plan = ScoringPlan("shared", chunked_head=True)
    assert module.reference_model is not None
    before = score(module.reference_model, random_batch(3).completions(), plan=plan)
    strategy._setup_model(module)
    (reference, first), (policy, second) = calls
    assert policy is module
    assert reference.model is module.reference_model
    for options in (first, second):
        assert {kind.__name__ for kind in options["auto_wrap_policy"]._module_classes} == {
            "LlamaDecoderLayer"
        }
        assert options["use_orig_params"]
    after = score(module.reference_model, random_batch(3).completions(), plan=plan)
    assert torch.equal(before.logps, after.logps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP1 refuses the CPU: needs a CUDA GPU")
@pytest.mark.parametrize("lora", [False, True])
def test_fsdp1_trains(tmp_path: Path, lora: bool) -> None:
    losses = []
    for strategy in ("auto", FSDP1Strategy()):
        module = DPOModule(tiny_model(), optimizer=sgd, lora=LoraSettings(r=2) if lora else None)
        run = trainer(accelerator="gpu", strategy=strategy, gradient_clip_val=1.0)
        run.fit(module, loader())
        assert isinstance(run.strategy.model, FullyShardedDataParallel) == (strategy != "auto")
        losses.append(float(run.callback_metrics["train/loss"]))
        run.save_checkpoint(tmp_path / "run.ckpt")
        keys = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"].keys()
        assert all(key.startswith("policy.") and ("lora_" in key) == lora for key in keys)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a CUDA GPU")
def test_fsdp2_offloads(tmp_path: Path) -> None:
    losses = []
    for strategy in ("auto", FSDP2Strategy(cpu_offload=True)):
        module = DPOModule(tiny_model(), optimizer=sgd)
        run = trainer(accelerator="gpu", strategy=strategy, gradient_clip_val=1.0)
        run.fit(module, loader())
        losses.append(float(run.callback_metrics["train/loss"]))
        if strategy != "auto":
            assert {p.device.type for p in module.policy.parameters()} == {"cpu"}
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("fsdp1", FSDP1Strategy), ("fsdp2", FSDP2Strategy)])
def test_the_overlays_name_strategies_and_their_options(name: str, kind: type) -> None:
    parser = LightningArgumentParser(parser_mode="omegaconf+")
    parser.add_subclass_arguments(kind, "strategy")
    content = yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text())
    config = parser.parse_object({"strategy": content["trainer"]["strategy"]})
    strategy = parser.instantiate_classes(config)["strategy"]
    assert type(strategy) is kind
    if name == "fsdp2":
        content["trainer"]["strategy"]["init_args"]["device_mesh"] = [4, 8]
        config = parser.parse_object({"strategy": content["trainer"]["strategy"]})
        assert config.strategy.init_args.device_mesh == (4, 8)
    assert content["model"] == {"gradient_checkpointing": True}
