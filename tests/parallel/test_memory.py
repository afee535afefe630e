from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import CONFIGS, random_batch, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from lightning_dpo.cli.main import main
from lightning_dpo.models.lora import LoraSettings, apply_lora
from lightning_dpo.parallel.memory import (
    KNOWN_MODELS,
    STRATEGIES,
    first_fit,
    load_config,
    model_shape,
    plan_memory,
)
from lightning_dpo.parallel.memory.activations import Workload, activation_bytes, layer_bytes, product_bytes
from lightning_dpo.scoring.forward import score
from lightning_dpo.scoring.select import select_plan

MILLION: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma2", "mistral", "gpt2"])
def test_parameters_are_those_of_a_real_model(name: str) -> None:
    model = tiny_model(name)
    shape = model_shape(CONFIGS[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.largest_parameter == max(p.numel() for p in model.parameters())
    assert shape.head_parameters == model.get_output_embeddings().weight.numel()


def test_known_models_are_the_published_ones() -> None:
    assert model_shape(load_config("8b")).parameters == 8_030_261_248
    assert model_shape(load_config("70b")).parameters == 70_553_706_496


@pytest.mark.parametrize(
    ("kind", "changes", "total", "active"),
    [
        # Billions in all and for a token, as their authors give them; DeepSeek's leave the embedding out.
        ("mixtral", {}, 46.7, 12.9),  # https://arxiv.org/abs/2401.04088: 47B and 13B
        ("deepseek_v3", {}, 671.0, 37.6),  # https://arxiv.org/abs/2412.19437: 671B and 37B
        (  # https://arxiv.org/abs/2505.09388: 30.5B and 3.3B
            "qwen3_moe",
            {
                "vocab_size": 151936,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "head_dim": 128,
            },
            30.5,
            3.35,
        ),
    ],
)
def test_experts_that_a_token_goes_to(
    kind: str, changes: dict[str, Any], total: float, active: float
) -> None:
    shape = model_shape(load_config({"model_type": kind, **changes}))
    assert shape.parameters / 1e9 == pytest.approx(total, abs=0.05)
    assert shape.active_parameters / 1e9 == pytest.approx(active, abs=0.05)
    assert shape.rest_parameters > 0
    plan = plan_memory(shape, strategy="fsdp2", gpus=64)
    assert plan.weights == -(-shape.parameters * 4 // 64)


@pytest.mark.parametrize("name", ["gpt-oss", "qwen3-next"])
def test_idle_parameters_are_the_other_experts(name: str) -> None:
    """Counted on the model, expert by expert; two of four see a token."""
    experts = [
        parameter.numel()
        for part in tiny_model(name).modules()
        if type(part).__name__.endswith("Experts")
        for parameter in part.parameters()
    ]
    assert model_shape(CONFIGS[name]).idle_parameters == sum(experts) // 2 > 0


def test_replicas_hold_more() -> None:
    shape = model_shape(load_config("8b"))
    one, four = (plan_memory(shape, strategy="fsdp2", gpus=32, replicas=copies) for copies in (1, 4))
    assert four.weights == 4 * one.weights
    assert four.working == one.working
    with pytest.raises(ValueError, match="`replicas` must divide `gpus`"):
        plan_memory(shape, strategy="fsdp2", gpus=32, replicas=3)


def test_adapter_parameters_are_those_of_a_real_adapter() -> None:
    pytest.importorskip("peft")
    model = apply_lora(tiny_model(), LoraSettings(r=3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = plan_memory(CONFIGS["llama"], strategy="ddp", lora_r=3, precision="32-true")
    assert plan.gradients == 4 * trained
    assert plan.optimizer == 8 * trained
    assert plan.weights == 4 * sum(p.numel() for p in model.parameters())
    assert plan.reference == 0


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_activations_are_what_autograd_keeps(key_heads: int, mixed: bool) -> None:
    config = load_config({**MILLION, "num_key_value_heads": key_heads})
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).train()
    plan = select_plan(model, may_switch_attention=True).plan
    batch = random_batch(1, longest=200)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        score(model, batch.completions(), plan=plan)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    shape = model_shape(config)
    if mixed:  # autocast's copies of weights are counted apart
        measured -= 2 * shape.layers * shape.block_parameters
    prompt, *completions = (len(part) for part in (batch.prompt_ids, batch.chosen_ids, batch.rejected_ids))
    work = Workload(
        tokens=prompt + sum(completions),
        completion_tokens=sum(completions),
        pairs=1,
        stream=4,
        compute=2 if mixed else 4,
        by_completion=True,
    )
    assert activation_bytes(shape, work, checkpointing=False) == pytest.approx(measured, rel=0.1)


def test_float32_without_sharding_by_hand() -> None:
    shape = model_shape(load_config(MILLION))
    count = shape.parameters
    plan = plan_memory(shape, strategy="ddp", precision="32-true", tokens=100, completion_tokens=40)
    assert (plan.weights, plan.gradients, plan.optimizer, plan.reference) == (
        4 * count,
        4 * count,
        8 * count,
        4 * count,
    )
    assert plan.logits == 2 * 4 * 40 * 1000
    assert plan.peak >= 20 * count
    assert plan.peak >= 16 * count + plan.activations + plan.logits  # gradients come as activations go
    several = plan_memory(shape, strategy="ddp", gpus=2, precision="32-true", tokens=100)
    assert several.gradients == 2 * plan.gradients


def test_checkpointing_keeps_the_inputs_of_layers() -> None:
    shape = model_shape(load_config(MILLION))
    work = Workload(tokens=64, completion_tokens=32, pairs=1, stream=2, compute=2, by_completion=False)
    full = activation_bytes(shape, work, checkpointing=False)
    less = activation_bytes(shape, work, checkpointing=True)
    assert full - less == 3 * layer_bytes(shape, work) - 4 * 64 * 128 * 2
    selective = activation_bytes(shape, work, checkpointing="selective")
    assert less < selective < full
    assert selective - less == 4 * product_bytes(shape, work)


def test_sharding_divides_the_weights_and_nothing_else() -> None:
    shape = model_shape(load_config(MILLION))
    one, eight = (plan_memory(shape, strategy="fsdp2", gpus=gpus) for gpus in (1, 8))
    for name in ("weights", "gradients", "optimizer", "reference"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8, abs=8)
    for name in ("working", "activations", "logits"):
        assert getattr(eight, name) == getattr(one, name)
    assert eight.tokens_per_second == 8 * one.tokens_per_second
    host = plan_memory(shape, strategy="fsdp2+offload", gpus=8)
    assert host.weights == host.optimizer == host.reference == 0
    assert host.host == eight.weights + eight.gradients + eight.optimizer + eight.reference


def test_chunked_logits_do_not_grow_with_tokens() -> None:
    shape = model_shape(load_config("8b"))
    small, large = (plan_memory(shape, strategy="fsdp2", tokens=tokens) for tokens in (1024, 65536))
    assert small.logits == large.logits


def test_operations_by_hand() -> None:
    shape = replace(model_shape(load_config(MILLION)), query=0)
    body = shape.parameters - shape.embedding_parameters - shape.head_parameters
    plan = plan_memory(shape, strategy="ddp", reference="none", flops=1e12, gpus=2)
    assert plan.tokens_per_second == pytest.approx(2e12 / (6 * body + 8 * shape.head_parameters))


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_more_memory_never_takes_a_later_strategy(gpus: int) -> None:
    shape = model_shape(load_config("8b"))
    ranks = []
    for memory in (8, 16, 24, 40, 80, 141, 192, 400):
        found = first_fit(shape, gpus=gpus, gpu_memory=memory)
        ranks.append(len(STRATEGIES) if found is None else STRATEGIES.index(found.strategy))
        if found is not None:
            assert found.fits
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0


def test_a_wider_run_never_needs_more_on_a_device() -> None:
    shape = model_shape(load_config("70b"))
    peaks = [plan_memory(shape, strategy="fsdp2", gpus=2**power).peak for power in range(11)]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config_json=missing.json"], "`config_json` must be a model's config.json"),
        (["--model=9b"], "`model` must be one of 8b, 70b"),
        (["--model=8b", "--strategy=zero"], "`strategy` must be one of"),
        (["--model=8b", "--gpus=0"], "`gpus` must be above 0"),
        (["--model=8b", "--completion_tokens=9000"], "`completion_tokens` must be from 1"),
        ([], "`config_json` must name"),
        (["--model=8b", "--config_json=x"], "both name a model"),
        (["--model=8b", "--gpu=h900"], "`gpu` must be one of h100, h200, a100, l4, got 'h900'"),
        (["--model=8b", "--efficiency=40"], "`efficiency` must be above 0 and at most 1, got 40"),
        (["--model=8b", "--gpus_per_node=0"], "`gpus_per_node` must be at least 1"),
        (["--model=8b", "--gpus=64", "--device_mesh=[3,8]"], "`device_mesh` must be (replicas, shards)"),
        (["--model=8b", "--flops=0"], "`flops` must be above 0"),
        (["--table=true", "--device_mesh=[2,8]"], "`device_mesh` is of one number of devices"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err


def test_content_that_is_no_model() -> None:
    with pytest.raises(ValueError, match="`model_type`"):
        load_config({"hidden_size": 3})
    with pytest.raises(ValueError, match="does not know: 'nonesuch'"):
        load_config({"model_type": "nonesuch"})
    with pytest.raises(ValueError, match=r"how many a token goes to .* 4 experts, 0 a token, 8 weights"):
        model_shape(hf.GptOssConfig(**{**CONFIGS["gpt-oss"].to_dict(), "num_experts_per_tok": 0}))
    with pytest.raises(ValueError, match="`strategy` must be one of"):
        plan_memory(MILLION, strategy="auto")


def test_command_prints_each_strategy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS["8b"]))
    main(["plan", f"--config_json={tmp_path}", "--gpus=8", "--gpu_memory=80", "--tokens_per_device=8192"])
    shown = capsys.readouterr().out
    for word in (*STRATEGIES, "8.03B", "reference", "logits", "tokens/s", "first that fits"):
        assert word in shown
    main(["plan", "--model=8b", "--strategy=fsdp2", "--lora.r=16"])
    shown = capsys.readouterr().out
    assert "fsdp2" in shown
    assert "offload" not in shown


def test_command_prints_times(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model=8b", "--gpus=64", "--gpu=H200", "--completion_tokens=4096"])
    shown = capsys.readouterr().out
    for word in ("64 x 141 GiB", "1 x 64", "8 x 8", "no GPU has confirmed", "12,288 in separate rows"):
        assert word in shown
    main(["plan", "--model=70b", "--device_mesh=[4,16]"])
    shown = capsys.readouterr().out
    assert "64 x 80 GiB" in shown
    assert "4 x 16" in shown
    assert "no fit" in shown  # 16 shards of 70b leave no room
    main(["plan", "--model=8b", "--flops=200e12"])
    slow = capsys.readouterr().out
    main(["plan", "--model=8b", "--flops=400e12"])
    fast = capsys.readouterr().out
    assert "2.55" in slow
    assert "1.27" in fast


def test_tables_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--table=true", "--gpu=l4"])
    main(["plan", "--model=70b", "--gpus=1024", "--gpu=l4"])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    assert len(tables) > 40
    assert max(len(line) for line in tables) <= 80


def test_command_prints_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--table=true"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("8b" in line for line in lines) == 8
    assert sum("70b" in line for line in lines) == 8
    assert "1024" in lines[-2]


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from /proc, as Linux has")
@pytest.mark.parametrize(
    ("size", "checkpointing"),
    [
        ("20m", False),
        ("60m", False),
        ("150m", False),
        ("20m", True),
        ("20m", "selective"),
        ("60m", "selective"),
    ],
)
def test_peak_is_what_training_takes(size: str, checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    from benchmarks.plan_memory import compare

    assert abs(compare(size, gradient_checkpointing=checkpointing).error) <= 0.15
