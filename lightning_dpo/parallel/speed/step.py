"""The time of a training step under FSDP2, from operations, bytes on the wire and latencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_dpo.parallel.memory.activations import Workload
from lightning_dpo.parallel.memory.estimate import PrecisionName, ReferenceName
from lightning_dpo.parallel.memory.operations import forward_operations, passes
from lightning_dpo.parallel.memory.shapes import ModelShape
from lightning_dpo.parallel.speed.cluster import Cluster
from lightning_dpo.types.choices import Recomputation

__all__ = ["StepTime", "plan_step"]

_ADAMW = 7
"""Numbers that AdamW moves for each weight: it reads weight, gradient and two moments, and writes all but
one."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, an estimate that no GPU has confirmed.

    Attributes:
        replicas: Copies of the weights.
        shards: Devices that share each.
        compute: Matrix products and attention.
        transfer: Bytes on the wire, those included that go while something is computed.
        latency: Start and steps of collectives, likewise.
        optimizer: The update.
        step: All of it; less than the sum where communication is hidden behind computation.
        received: Bytes that each device is sent.
        pairs_per_second: Of all devices.
    """

    replicas: int
    shards: int
    compute: float
    transfer: float
    latency: float
    optimizer: float
    step: float
    received: float
    pairs_per_second: float

    @property
    def exposed(self) -> float:
        """Seconds in which a device waits for others."""
        return self.step - self.compute - self.optimizer


class _Exchange(NamedTuple):
    """Seconds of collectives within a replica and between replicas, of bytes and in all."""

    within: float = 0.0
    between: float = 0.0
    transfer: float = 0.0
    received: float = 0.0

    def __add__(self, other: tuple[object, ...]) -> _Exchange:
        assert isinstance(other, _Exchange)
        return _Exchange(*(one + another for one, another in zip(self, other, strict=True)))

    @property
    def seconds(self) -> float:
        return self.within + self.between


class _Part(NamedTuple):
    """What is gathered, computed and reduced together in one direction of a pass."""

    compute: float
    gather: _Exchange
    reduce: _Exchange = _Exchange()


def plan_step(
    shape: ModelShape,
    cluster: Cluster,
    *,
    replicas: int,
    shards: int,
    tokens: int = 8192,
    completion_tokens: int | None = None,
    pair_tokens: int = 1024,
    precision: PrecisionName = "bf16-mixed",
    reference: ReferenceName = "frozen",
    lora_r: int | None = None,
    gradient_checkpointing: Recomputation = False,
) -> StepTime:
    """Work out a step's time.

    Blocks, embedding and head are gathered one ahead of what is computed, and gradients are reduced one
    behind: a part of a pass takes the longer of its computation and of these. Reducing between replicas goes
        beside the
    rest where it uses the network and the rest does not. What is left is the first gathering and the last
    reduction. A mixture of experts gathers all experts and computes with those that a token goes to, in equal
    shares.

    Args:
        shape: The model's.
        cluster: What it runs on.
        replicas: Copies of the weights; 1 is plain FSDP2.
        shards: Devices that share each copy.
        tokens: Positions of a device's batch: each pair's prompt once, and both completions.
        completion_tokens: How many of them are the completions'; all of them if not given.
        pair_tokens: Positions of one pair.
        precision: The trainer's.
        reference: DPOModule's.
        lora_r: Rank of adapters on all linear layers but the head; None trains all weights.
        gradient_checkpointing: What is computed again in the backward pass, as PolicyModule takes it.

    Raises:
        ValueError: If replicas or shards are no positive numbers.
    """
    if min(replicas, shards) < 1:
        raise ValueError(f"`replicas` and `shards` must be at least 1, got {replicas} and {shards}")
    wide = precision == "32-true"
    work = Workload(
        tokens=tokens,
        completion_tokens=tokens if completion_tokens is None else completion_tokens,
        pairs=max(1, tokens // pair_tokens),
        stream=4 if wide else 2,
        compute=4 if wide else 2,
        by_completion=False,
    )
    speed = cluster.flops(wide=wide)
    body, head = (
        count * tokens / speed for count in forward_operations(shape, work, pair_tokens=pair_tokens)
    )
    block = body / shape.layers
    times = passes(reference=reference, lora=lora_r is not None, checkpointing=gradient_checkpointing)
    compute = body * (1 + times.reference + times.body) + head * (1 + times.reference + times.head)

    tied = shape.embedding_parameters == 0
    mean_block = shape.blocks_parameters / shape.layers
    end = shape.head_parameters if tied else shape.embedding_parameters
    trained = 1.0 if lora_r is None else lora_r * shape.adapter_width / shape.blocks_parameters
    wires = _Wires(
        cluster, replicas, shards, gather_size=work.compute, reduce_size=2 if precision == "bf16-true" else 4
    )
    nothing = _Exchange()
    of_block = wires.reduce(trained * mean_block)
    of_head, of_embedding = (
        wires.reduce(count) if lora_r is None else nothing for count in (shape.head_parameters, end)
    )
    gather_block, gather_head, gather_end = (
        wires.gather(count) for count in (mean_block, shape.head_parameters, end)
    )
    forward = [
        _Part(0.0, gather_end),
        *[_Part(block, gather_block)] * shape.layers,
        _Part(head, gather_head),
    ]
    backward = [
        _Part(head * times.head, gather_head if tied else nothing, of_head),
        *[_Part(block * times.body, gather_block, of_block)] * shape.layers,
        _Part(0.0, gather_end if tied and lora_r is None else nothing, of_embedding),
    ]
    shared = shards > cluster.gpus_per_node
    optimizer = _ADAMW * (2 if precision == "bf16-true" else 4) * trained * shape.parameters / shards
    optimizer /= cluster.gpu.memory_bandwidth
    step = _duration(forward, shared=shared) * (1 + times.reference) + _duration(backward, shared=shared)
    exchanges = [part.gather for part in forward] * (1 + times.reference)
    exchanges += [exchange for part in backward for exchange in (part.gather, part.reduce)]
    total = sum(exchanges, start=nothing)
    return StepTime(
        replicas=replicas,
        shards=shards,
        compute=compute,
        transfer=total.transfer,
        latency=total.seconds - total.transfer,
        optimizer=optimizer,
        step=step + optimizer,
        received=total.received,
        pairs_per_second=replicas * shards * tokens / pair_tokens / (step + optimizer),
    )


def _duration(parts: list[_Part], *, shared: bool) -> float:
    """Seconds of one direction of a pass.

    Args:
        parts: In the order in which they are computed.
        shared: Whether collectives within a replica and between replicas use the same wires.
    """
    total, behind = parts[0].gather.seconds, _Exchange()
    for part, following in zip(parts, [*parts[1:], _Part(0.0, _Exchange())], strict=True):
        meanwhile = following.gather + behind
        exchange = meanwhile.seconds if shared else max(meanwhile.within, meanwhile.between)
        total += max(part.compute, exchange)
        behind = part.reduce
    return total + behind.seconds


class _Wires(NamedTuple):
    """Collectives of a mesh."""

    cluster: Cluster
    replicas: int
    shards: int
    gather_size: int
    reduce_size: int

    def gather(self, parameters: float) -> _Exchange:
        """All-gather weights."""
        size = self.gather_size * parameters
        transfer, latency = self.cluster.gather(size, self.shards)
        return _Exchange(transfer + latency, 0.0, transfer, size * (self.shards - 1) / self.shards)

    def reduce(self, parameters: float) -> _Exchange:
        """Reduce-scatter gradients within a replica, then all-reduce the shards between replicas."""
        size, shards, replicas = self.reduce_size * parameters, self.shards, self.replicas
        transfer, latency = self.cluster.gather(size, shards)
        between, waiting = self.cluster.average(size / shards, replicas, shards)
        received = size * (shards - 1) / shards + 2 * size / shards * (replicas - 1) / replicas
        return _Exchange(transfer + latency, between + waiting, transfer + between, received)
