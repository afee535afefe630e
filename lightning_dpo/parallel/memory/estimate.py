"""Peak memory of one device under each strategy, and the first strategy that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_dpo.parallel.memory.activations import Workload, activation_bytes, backward_bytes, head_bytes
from lightning_dpo.parallel.memory.operations import forward_operations, passes
from lightning_dpo.parallel.memory.shapes import ModelShape, load_config, model_shape
from lightning_dpo.types.choices import Recomputation

__all__ = ["HEADROOM", "STRATEGIES", "Plan", "PrecisionName", "ReferenceName", "first_fit", "plan_memory"]

PrecisionName: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true"]
ReferenceName: TypeAlias = Literal["frozen", "adapter", "cached", "none"]

STRATEGIES = ("ddp", "fsdp2", "fsdp2+checkpointing", "fsdp2+offload")
"""From the fastest to the one that needs least; "ddp" on one device is a plain run.

"fsdp2+checkpointing" computes activations anew in the backward pass; "fsdp2+offload" does so too and keeps
shards, gradients and the optimizer in the CPU's memory.
"""

HEADROOM = 0.1
"""Share of a device's memory left to its context, to communication and to fragmentation."""

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Bytes on one device, and its speed.

    Attributes:
        strategy: Of `STRATEGIES`.
        gpus: Devices in all.
        gpu_memory: Of one device.
        weights: The policy's, as the optimizer sees them.
        gradients: Of what trains, and DDP's buckets.
        optimizer: AdamW's two moments.
        reference: The frozen model's weights.
        working: Weights cast or gathered to compute with, and their gradients before they are reduced.
        activations: Kept for the backward pass.
        logits: A chunk of them and the head's temporaries.
        update: Temporaries of the optimizer's step, when activations are gone.
        peak: The most at any time; not the sum, since not all is held at once.
        host: In the CPU's memory, for each device.
        tokens_per_second: Of all devices, with communication free.
    """

    strategy: str
    gpus: int
    gpu_memory: int
    weights: int
    gradients: int
    optimizer: int
    reference: int
    working: int
    activations: int
    logits: int
    update: int
    peak: int
    host: int
    tokens_per_second: float

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the headroom free."""
        return self.peak <= (1 - HEADROOM) * self.gpu_memory


def plan_memory(
    config: Any,
    *,
    strategy: str,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    tokens: int = 8192,
    completion_tokens: int | None = None,
    pair_tokens: int = 1024,
    precision: PrecisionName = "bf16-mixed",
    reference: ReferenceName = "frozen",
    lora_r: int | None = None,
    gradient_checkpointing: Recomputation = False,
    flops: float = 400e12,
    accelerator: Literal["cuda", "cpu"] = "cuda",
    replicas: int = 1,
) -> Plan:
    """Work out a run's memory, of batches that are not accumulated: gradients are freed before the next one.

    Args:
        config: A `ModelShape`, a transformers configuration, or what `load_config` takes.
        strategy: Of `STRATEGIES`.
        gpus: Devices in all.
        gpu_memory: Of one device, GiB.
        tokens: Positions of a device's batch: each pair's prompt and both completions.
        completion_tokens: How many of them are the completions'; all of them if not given.
        pair_tokens: Positions of one pair, for the cost of attention.
        precision: The trainer's.
        reference: DPOModule's; with LoRA a frozen one is the adapter switched off, which takes nothing.
        lora_r: Rank of adapters on all linear layers but the head; None trains all weights.
        gradient_checkpointing: As PolicyModule takes it; strategies that checkpoint do so in any case.
        flops: Operations a second that one device reaches, not its peak.
        accelerator: What attention and the optimizer do differs.
        replicas: Copies of the weights that the devices hold (HSDP), each split over its share of them.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check(strategy, precision, gpus=gpus, gpu_memory=gpu_memory, tokens=tokens, flops=flops)
    if replicas < 1 or gpus % replicas:
        raise ValueError(f"`replicas` must divide `gpus` ({gpus}), got {replicas}")
    completion_tokens = tokens if completion_tokens is None else completion_tokens
    if not 0 < completion_tokens <= tokens:
        raise ValueError(
            f"`completion_tokens` must be from 1 to `tokens` ({tokens}), got {completion_tokens}"
        )
    shape = config if isinstance(config, ModelShape) else model_shape(_configuration(config))
    sharded, offload = strategy != "ddp", strategy == "fsdp2+offload"
    checkpointing = strategy in STRATEGIES[2:] or gradient_checkpointing
    trained = shape.parameters if lora_r is None else lora_r * shape.adapter_width
    held = shape.parameters + (0 if lora_r is None else trained)
    stored = 2 if precision == "bf16-true" else 4
    compute = 4 if precision == "32-true" else 2
    ranks = gpus // replicas if sharded else 1
    weights = _share(held * stored, ranks)
    gradients = _share(trained * stored, ranks)
    optimizer = 2 * gradients
    if not sharded and gpus > 1:
        gradients *= 2  # gradients are copied into buckets
    frozen = reference == "frozen" and lora_r is None
    kept = _share(shape.parameters * stored, ranks) if frozen else 0
    work = Workload(
        tokens=tokens,
        completion_tokens=completion_tokens,
        pairs=max(1, tokens // pair_tokens),
        # Sharded weights are gathered in the compute type, and so is the residual stream; autocast keeps it.
        stream=compute if sharded else stored,
        compute=compute,
        by_completion=accelerator == "cpu",
    )
    activations = activation_bytes(shape, work, checkpointing=checkpointing)
    if lora_r is not None:
        activations += tokens * 7 * shape.layers * lora_r * compute  # what enters the second factor
    logits = head_bytes(shape, work)
    forward, backward = _working(shape, work, sharded=sharded, stored=stored, trains_all=lora_r is None)
    update = trained * stored // ranks if accelerator == "cuda" else 2 * shape.largest_parameter * stored
    moments = (
        forward + activations + logits,
        backward + activations + logits + backward_bytes(shape, work),
        (gradients + update) * (not offload),
    )
    resident = weights + optimizer + kept
    body, head = forward_operations(shape, work, pair_tokens=pair_tokens)
    step = passes(reference=reference, lora=lora_r is not None, checkpointing=checkpointing)
    return Plan(
        strategy=strategy,
        gpus=gpus,
        gpu_memory=int(gpu_memory * GIB),
        weights=0 if offload else weights,
        gradients=0 if offload else gradients,
        optimizer=0 if offload else optimizer,
        reference=0 if offload else kept,
        working=max(forward, backward),
        activations=activations,
        logits=logits,
        update=0 if offload else update,
        peak=max(moments) + (0 if offload else resident),
        host=resident + gradients if offload else 0,
        tokens_per_second=gpus
        * flops
        / (body * (1 + step.reference + step.body) + head * (1 + step.reference + step.head)),
    )


def first_fit(config: Any, **options: Any) -> Plan | None:
    """The first of `STRATEGIES` whose peak fits; None if none does.

    Args:
        config: See `plan_memory`.
        options: For `plan_memory`.
    """
    shape = config if isinstance(config, ModelShape) else model_shape(_configuration(config))
    plans = (plan_memory(shape, strategy=strategy, **options) for strategy in STRATEGIES)
    return next((plan for plan in plans if plan.fits), None)


def _working(
    shape: ModelShape, work: Workload, *, sharded: bool, stored: int, trains_all: bool
) -> tuple[int, int]:
    """Weights to compute with, in the forward pass and, with their gradients, in the backward pass."""
    if not sharded:
        # Autocast keeps a copy of what matrix products use, and of no embedding; the head's is `logits`'.
        cast = shape.layers * shape.block_parameters * work.compute if work.compute != stored else 0
        head = shape.head_parameters * 4 if trains_all else 0
        return cast, cast + head
    # What is at work and what is gathered ahead: two blocks, or the last block and the head.
    ahead = shape.block_parameters + max(shape.block_parameters, shape.head_parameters)
    forward = (shape.root_parameters + ahead) * work.compute
    if not trains_all:
        return forward, forward
    # Gradients as they are made, and those of one part in float32 while it is reduced.
    part = max(shape.block_parameters, shape.head_parameters)
    return forward, forward + (shape.root_parameters + part) * work.compute + 4 * part


def _configuration(config: Any) -> Any:
    return config if hasattr(config, "get_text_config") else load_config(config)


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)


def _check(strategy: str, precision: str, **positive: float) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if precision not in ("32-true", "bf16-mixed", "bf16-true"):
        raise ValueError(f"`precision` must be 32-true, bf16-mixed or bf16-true, got {precision!r}")
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"`{name}` must be above 0, got {value}")
