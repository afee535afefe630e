"""The command `lightning-dpo plan`: a table of what each strategy takes, and the first that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

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
    gpus: int = 8,
    gpu_memory: float = 80.0,
    tokens_per_device: int = 8192,
    completion_tokens: int | None = None,
    pair_tokens: int = 1024,
    strategy: str = "auto",
    precision: PrecisionName = "bf16-mixed",
    reference: ReferenceName = "frozen",
    lora: LoraSettings | None = None,
    gradient_checkpointing: bool = False,
    flops: float = 400e12,
    table: bool = False,
) -> None:
    """Print a run's memory on each device, and the first strategy that fits; loads and downloads nothing.

    Args:
        model: 8b or 70b, the shapes of Llama 3; in place of `config_json`.
        config_json: A model's config.json, or the folder that holds it.
        gpus: Devices in all.
        gpu_memory: Of one device, GiB.
        tokens_per_device: Positions of a device's batch: each pair's prompt and both completions.
        completion_tokens: How many of them are the completions'; all of them if not given.
        pair_tokens: Positions of one pair.
        strategy: ddp, fsdp2, fsdp2+checkpointing, fsdp2+offload, or auto for all of them.
        precision: The trainer's: 32-true, bf16-mixed or bf16-true.
        reference: frozen, adapter, cached or none.
        lora: Train adapters of the rank `--lora.r`; by default all weights train.
        gradient_checkpointing: Compute activations anew whatever the strategy.
        flops: Operations a second that one device reaches.
        table: Print the first fit for 8 to 1024 devices; of 8b and 70b where no model is given.
    """
    options: dict[str, Any] = {
        "gpu_memory": gpu_memory,
        "tokens": tokens_per_device,
        "completion_tokens": completion_tokens,
        "pair_tokens": pair_tokens,
        "precision": precision,
        "reference": reference,
        "lora_r": None if lora is None else lora.r,
        "gradient_checkpointing": gradient_checkpointing,
        "flops": flops,
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
        names = [source] if source is not None else list(KNOWN_MODELS)
        print_overview({str(name): model_shape(load_config(name)) for name in names}, **options)
        return
    if source is None:
        raise ValueError("`config_json` must name a model's config.json; or set `model` or `table`")
    shape = model_shape(load_config(source))
    wanted = STRATEGIES if strategy == "auto" else (strategy,)
    print_plans([plan_memory(shape, strategy=name, gpus=gpus, **options) for name in wanted], shape=shape)


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


def _console() -> Console:
    """As wide as a table needs where nobody looks at it."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)
