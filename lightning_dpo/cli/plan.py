"""The command `lightning-dpo plan`: what each strategy takes, the first that fits, and the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from lightning_dpo.cli.plan_speed import explain_times, meshes, print_times
from lightning_dpo.models.lora import LoraSettings
from lightning_dpo.parallel.memory.estimate import (
    GIB,
    HEADROOM,
    STRATEGIES,
    Plan,
    PrecisionName,
    ReferenceName,
    first_fit,
    plan_memory,
)
from lightning_dpo.parallel.memory.shapes import KNOWN_MODELS, ModelShape, load_config, model_shape
from lightning_dpo.parallel.speed import GPUS, Cluster
from lightning_dpo.types.choices import Recomputation

__all__ = ["plan", "print_overview", "print_plans", "run"]

_COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "working",
    "activations",
    "logits",
    "update",
    "peak",
    "host",
)
_OVERVIEW_GPUS = tuple(2**power for power in range(3, 11))


def plan(
    *,
    model: str | None = None,
    config_json: Path | None = None,
    gpus: int | None = None,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    gpus_per_node: int = 8,
    device_mesh: tuple[int, int] | None = None,
    tokens_per_device: int = 8192,
    completion_tokens: int | None = None,
    pair_tokens: int = 1024,
    strategy: str = "auto",
    precision: PrecisionName = "bf16-mixed",
    reference: ReferenceName = "frozen",
    lora: LoraSettings | None = None,
    gradient_checkpointing: Recomputation = False,
    efficiency: float = 0.4,
    network_efficiency: float = 0.8,
    flops: float | None = None,
    table: bool = False,
) -> None:
    """Print a run's memory on each device, the first strategy that fits, and the expected time of a step.

    Loads and downloads nothing. Times are estimates that no GPU has confirmed: operations at a share of the
    GPU's peak, bytes on the wire and NCCL's latencies, each behind the other where FSDP2 lets them be.

    Args:
        model: 8b or 70b, the shapes of Llama 3; in place of `config_json`.
        config_json: A model's config.json, or the folder that holds it.
        gpus: Devices in all; 8 if not given.
        gpu: Of which kind: h100, h200, a100 or l4.
        gpu_memory: Of one device, GiB; that of the kind if not given.
        gpus_per_node: Devices of one machine.
        device_mesh: Replicas and shards, as FSDP2Strategy takes them, such as `[4,8]`. By default plain FSDP2
            is put beside replicas of the fewest machines that hold one.
        tokens_per_device: Positions of a device's batch: each pair's prompt and both completions.
        completion_tokens: How many of them are the completions'; all of them if not given.
        pair_tokens: Positions of one pair.
        strategy: ddp, fsdp2, fsdp2+checkpointing, fsdp2+offload, or auto for all of them.
        precision: The trainer's: 32-true, bf16-mixed or bf16-true.
        reference: frozen, adapter, cached or none.
        lora: Train adapters of the rank `--lora.r`; by default all weights train.
        gradient_checkpointing: Compute activations anew whatever the strategy: true, or selective for all but
            the results of products and attention.
        efficiency: Share of the GPU's peak that training reaches, from 0 to 1.
        network_efficiency: Share of its links' bandwidth that collectives reach, from 0 to 1.
        flops: Operations a second that one device reaches, in place of `efficiency`.
        table: Print the first fit and times for 8 to 1024 devices; of 8b and 70b where no model is given.
    """
    gpus, replicas = _devices(gpus, device_mesh)
    cluster = _cluster(
        gpu.lower(),
        flops=flops,
        wide=precision == "32-true",
        gpus_per_node=gpus_per_node,
        efficiency=efficiency,
        network_efficiency=network_efficiency,
    )
    options: dict[str, Any] = {
        "gpu_memory": cluster.gpu.memory if gpu_memory is None else gpu_memory,
        "tokens": tokens_per_device,
        "completion_tokens": completion_tokens,
        "pair_tokens": pair_tokens,
        "precision": precision,
        "reference": reference,
        "lora_r": None if lora is None else lora.r,
        "gradient_checkpointing": gradient_checkpointing,
        "flops": cluster.flops(wide=precision == "32-true"),
    }
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"`strategy` must be one of auto, {', '.join(STRATEGIES)}, got {strategy!r}")
    if lora is not None and lora.target_modules != "all-linear":
        raise ValueError(
            '`lora.target_modules` must be "all-linear" in a plan, which counts all linear layers'
        )
    if model is not None and config_json is not None:
        raise ValueError("`model` and `config_json` both name a model; give one of them")
    if model is not None and model not in KNOWN_MODELS:
        raise ValueError(
            f"`model` must be one of {', '.join(KNOWN_MODELS)}, got {model!r}; or set `config_json`"
        )
    source = model or config_json
    if table:
        if device_mesh is not None:
            raise ValueError("`device_mesh` is of one number of devices; leave it out with `table`")
        names = [source] if source is not None else list(KNOWN_MODELS)
        shapes = {str(name): model_shape(load_config(name)) for name in names}
        print_overview(shapes, **options)
        explain_times(_console(), gpu=gpu, cluster=cluster, options=options)
        for shape in shapes.values():
            wanted_meshes = [
                mesh
                for count in _OVERVIEW_GPUS
                for mesh in meshes(shape, count, cluster=cluster, options=options)
            ]
            print_times(_console(), shape, wanted_meshes, cluster=cluster, options=options)
        return
    if source is None:
        raise ValueError("`config_json` must name a model's config.json; or set `model` or `table`")
    shape = model_shape(load_config(source))
    wanted = STRATEGIES if strategy == "auto" else (strategy,)
    plans = [plan_memory(shape, strategy=name, gpus=gpus, replicas=replicas, **options) for name in wanted]
    print_plans(plans, shape=shape)
    chosen = (
        meshes(shape, gpus, cluster=cluster, options=options)
        if device_mesh is None
        else [(device_mesh[0], device_mesh[1])]
    )
    print_times(_console(), shape, chosen, cluster=cluster, options=options)
    explain_times(_console(), gpu=gpu, cluster=cluster, options=options)


def print_plans(plans: Sequence[Plan], *, shape: ModelShape) -> None:
    """Print a column for each plan and name the first that fits.

    Args:
        plans: Of one model, in order of preference.
        shape: The model's.
    """
    first = plans[0]
    memory = first.gpu_memory / GIB
    title = f"{shape.parameters / 1e9:.2f}B parameters, {first.gpus} x {memory:g} GiB, GiB per device"
    rows = Table(title=title)
    rows.add_column("")
    for each in plans:
        rows.add_column(each.strategy, justify="right")
    for name in _COLUMNS:
        rows.add_row(name, *(f"{getattr(each, name) / GIB:.2f}" for each in plans))
    rows.add_row("fits", *("yes" if each.fits else "no" for each in plans))
    rows.add_row("tokens/s, all", *(f"{each.tokens_per_second:,.0f}" for each in plans))
    console = _console()
    console.print(rows)
    fitting = next((each for each in plans if each.fits), None)
    if fitting is None:
        _say(
            console, f"none fits with {HEADROOM:.0%} left free; more devices, fewer tokens or LoRA take less"
        )
    else:
        _say(console, f"first that fits with {HEADROOM:.0%} left free: {fitting.strategy}")
    _say(console, "the peak is not the sum: not all is held at once; tokens/s take communication as free")


def print_overview(shapes: dict[str, ModelShape], **options: Any) -> None:
    """Print the first strategy that fits for 8 to 1024 devices.

    Args:
        shapes: Models by name.
        options: For `first_fit`.
    """
    rows = Table(title=f"first strategy that fits {options['gpu_memory']:g} GiB, GiB per device")
    rows.add_column("model")
    rows.add_column("devices", justify="right")
    rows.add_column("strategy")
    for name in ("peak", "host", "tokens/s"):
        rows.add_column(name, justify="right")
    for model, shape in shapes.items():
        for gpus in _OVERVIEW_GPUS:
            found = first_fit(shape, gpus=gpus, **options)
            if found is None:
                rows.add_row(model, str(gpus), "none", "", "", "")
                continue
            numbers = (
                f"{found.peak / GIB:.1f}",
                f"{found.host / GIB:.1f}",
                f"{found.tokens_per_second:,.0f}",
            )
            rows.add_row(model, str(gpus), found.strategy, *numbers)
    _console().print(rows)


def run(arguments: Sequence[str]) -> None:
    """Print a plan.

    Args:
        arguments: What follows `lightning-dpo plan`.
    """
    auto_cli(plan, args=list(arguments), as_positional=False, prog="lightning-dpo plan")


def _devices(gpus: int | None, mesh: tuple[int, int] | None) -> tuple[int, int]:
    """How many devices there are, and how many copies of the weights they hold."""
    if mesh is None:
        return 8 if gpus is None else gpus, 1
    if min(mesh) < 1 or gpus not in (None, mesh[0] * mesh[1]):
        raise ValueError(
            f"`device_mesh` must be (replicas, shards) whose product is `gpus`, got {tuple(mesh)} and {gpus=}"
        )
    return mesh[0] * mesh[1], mesh[0]


def _cluster(name: str, *, flops: float | None, wide: bool, **options: Any) -> Cluster:
    if name not in GPUS:
        raise ValueError(
            f"`gpu` must be one of {', '.join(GPUS)}, got {name!r}; for another, take the nearest and set "
            "`gpu_memory` and `flops`"
        )
    gpu = GPUS[name]
    if flops is None:
        return Cluster(gpu, **options)
    if flops <= 0:
        raise ValueError(f"`flops` must be above 0, got {flops}")
    # Another kind of GPU: what it reaches is known, its peak is not.
    return Cluster(replace(gpu, flops=flops, float32_flops=flops), **{**options, "efficiency": 1.0})


def _console() -> Console:
    """As wide as a table needs where nobody looks at it."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
