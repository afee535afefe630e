"""The table of expected step times that `lightning-dpo plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_dpo.parallel.memory.estimate import GIB, Plan, plan_memory
from lightning_dpo.parallel.memory.shapes import ModelShape
from lightning_dpo.parallel.speed import Cluster, StepTime, plan_step

__all__ = ["explain_times", "meshes", "print_times"]

_SHARDED = ("fsdp2", "fsdp2+checkpointing")
_TIMED = (
    "tokens",
    "completion_tokens",
    "pair_tokens",
    "precision",
    "reference",
    "lora_r",
    "gradient_checkpointing",
)


def meshes(
    shape: ModelShape, gpus: int, *, cluster: Cluster, options: dict[str, Any]
) -> list[tuple[int, int]]:
    """Plain FSDP2 over all devices, and with replicas of the fewest whole machines that hold one.

    Args:
        shape: The model's.
        gpus: Devices in all.
        cluster: Says how many a machine has.
        options: For `plan_memory`.

    Returns:
        (replicas, shards) each; the second is missing where nothing smaller than all devices holds a copy.
    """
    found = [(1, gpus)]
    for shards in range(cluster.gpus_per_node, gpus, cluster.gpus_per_node):
        if gpus % shards == 0 and _fit(shape, (gpus // shards, shards), options).fits:
            return [*found, (gpus // shards, shards)]
    return found


def print_times(
    console: Console,
    shape: ModelShape,
    wanted: Sequence[tuple[int, int]],
    *,
    cluster: Cluster,
    options: dict[str, Any],
) -> None:
    """Print a row for each mesh.

    Args:
        console: Where to.
        shape: The model's.
        wanted: (replicas, shards) each.
        cluster: What it runs on.
        options: For `plan_memory`.
    """
    rows = Table(title=f"{shape.parameters / 1e9:.2f}B parameters: expected step under FSDP2, seconds")
    for name in ("GPUs", "mesh", "GiB", "compute", "transfer", "latency", "step", "pairs/s"):
        rows.add_column(name, justify="right")
    for mesh in wanted:
        plan = _fit(shape, mesh, options)
        again = plan.strategy == "fsdp2+checkpointing" or options["gradient_checkpointing"]
        cells = [f"{plan.gpus}", f"{mesh[0]} x {mesh[1]}", f"{plan.peak / GIB:.1f}{'*' if again else ''}"]
        if plan.fits:
            timed = {name: options[name] for name in _TIMED} | {"gradient_checkpointing": again}
            cells += _cells(plan_step(shape, cluster, replicas=mesh[0], shards=mesh[1], **timed))
        else:
            cells += ["", "", "", "no fit", ""]
        rows.add_row(*cells)
    console.print(rows)


def explain_times(console: Console, *, gpu: str, cluster: Cluster, options: dict[str, Any]) -> None:
    """Print what the table says, and that no GPU has confirmed it.

    Args:
        console: Where to.
        gpu: The name of the GPU.
        cluster: What it runs on.
        options: For `plan_memory`.
    """
    tokens, completions = options["tokens"], options["completion_tokens"] or options["tokens"]
    lines = [
        f"times are estimates from {gpu.upper()} data sheets at {cluster.efficiency:.0%} of peak and "
        f"{cluster.network_efficiency:.0%} of the links; no GPU has confirmed them",
        "mesh is FSDP2Strategy's device_mesh, replicas x shards; * computes activations anew",
        "step is less than the sum: transfer and latency go beside compute where they can",
    ]
    if completions < tokens:
        without = 2 * tokens - completions
        lines.append(
            f"prompts are computed once: {tokens:,} positions a device do the work of {without:,} in "
            "separate rows"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _cells(time: StepTime) -> list[str]:
    numbers = (time.compute, time.transfer, time.latency, time.step)
    return [*(f"{number:.2f}" for number in numbers), f"{time.pairs_per_second:,.0f}"]


def _fit(shape: ModelShape, mesh: tuple[int, int], options: dict[str, Any]) -> Plan:
    """The fastest way of sharding over a mesh that fits, or else the one that needs least."""
    replicas, shards = mesh
    plans = [
        plan_memory(shape, strategy=name, gpus=replicas * shards, replicas=replicas, **options)
        for name in _SHARDED
    ]
    return next((plan for plan in plans if plan.fits), plans[-1])
