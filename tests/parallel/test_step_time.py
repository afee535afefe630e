"""Times by hand, and what no estimate may contradict."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dpo.parallel.memory import load_config, model_shape, plan_memory
from lightning_dpo.parallel.memory.shapes import ModelShape
from lightning_dpo.parallel.speed import GPUS, Cluster, Gpu, StepTime, plan_step

H100 = Cluster(GPUS["h100"])
SHAPE = ModelShape(
    parameters=2 * 1_000_000 + 2 * 300_000,
    block_parameters=1_000_000,
    largest_parameter=300_000,
    head_parameters=300_000,
    embedding_parameters=300_000,
    adapter_width=8_000,
    layers=2,
    hidden=100,
    intermediate=300,
    query=0,
    key=0,
    heads=1,
    vocabulary=3_000,
    blocks_parameters=2_000_000,
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, ModelShape]:
    return {name: model_shape(load_config(name)) for name in ("8b", "70b")}


def test_collectives_by_hand() -> None:
    """One gigabyte; links of 450 GB/s and 8 ports of 50 GB/s, 80 % of each."""
    assert H100.gather(1e9, 1) == (0.0, 0.0)
    seconds, latency = H100.gather(1e9, 8)
    assert seconds == pytest.approx(7 / 8 / 360)
    assert latency == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    seconds, latency = H100.gather(1e9, 16)
    assert seconds == pytest.approx(15 / 16 / 320)
    assert latency == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6)
    # 128 machines, each of whose 8 shards has a port: trees of depth 7.
    seconds, latency = H100.average(1e9, 128, 8)
    assert seconds == pytest.approx(2 * 127 / 128 / 40)
    assert latency == pytest.approx(8.4e-6 + 2 * 7 * 14e-6)
    # Four replicas within one machine.
    seconds, latency = H100.average(1e9, 4, 2)
    assert seconds == pytest.approx(2 * 3 / 4 / 360)
    assert latency == pytest.approx(8.4e-6 + 2 * 3 * 3.4e-6)


def test_computation_alone_by_hand() -> None:
    """Forward, twice as much backward, the head once more; a reference's forward; AdamW's seven numbers."""
    cluster = Cluster(Gpu(2e12, 1e12, 80, 1e9, 1e9, True, 1e9), efficiency=0.5)
    step = plan_step(
        SHAPE, cluster, replicas=1, shards=1, tokens=1000, completion_tokens=400, pair_tokens=500
    )
    operations = 2 * 1000 * 2_000_000 * (1 + 1 + 2) + 2 * 400 * 300_000 * (1 + 1 + 3)
    assert step.compute == pytest.approx(operations / 1e12)
    assert step.optimizer == pytest.approx(7 * 4 * 2_600_000 / 1e9)
    assert step.step == pytest.approx(step.compute + step.optimizer)
    assert step.transfer == step.latency == step.received == step.exposed == 0
    assert step.pairs_per_second == pytest.approx(2 / step.step)
    wide = plan_step(SHAPE, cluster, replicas=1, shards=1, tokens=1000, precision="32-true")
    assert wide.compute > 1.9 * step.compute


def test_communication_alone_by_hand() -> None:
    """Weights of 2 bytes three times, the ends' twice; gradients of 4 bytes; nothing to hide behind."""
    gpu = Gpu(1e30, 1e30, 80, 1e30, 1e6, True, 1e6)
    cluster = Cluster(gpu, gpus_per_node=4, network_efficiency=1.0)
    alone = plan_step(SHAPE, cluster, replicas=1, shards=4)
    collectives = 2 * (1 + 2 + 1) + 2 + (1 + 2 + 1)
    gathered = 2 * (2 * (2_000_000 + 600_000) + 2_000_000) + 4 * 2_600_000
    assert alone.transfer == pytest.approx(gathered * 3 / 4 / 1e6)
    assert alone.received == pytest.approx(gathered * 3 / 4)
    assert alone.latency == pytest.approx(collectives * (8.4e-6 + 3 * 3.4e-6))
    assert alone.step == pytest.approx(alone.transfer + alone.latency)
    cached = plan_step(SHAPE, cluster, replicas=1, shards=4, reference="cached")
    assert alone.received - cached.received == pytest.approx(2 * 2_600_000 * 3 / 4)
    # A second machine holds a copy: a quarter of the gradients, 4 bytes each, is sent and received.
    copied = plan_step(SHAPE, cluster, replicas=2, shards=4)
    assert copied.received - alone.received == pytest.approx(4 * 2_600_000 / 4)
    assert copied.transfer - alone.transfer == pytest.approx(4 * 2_600_000 / 4 / 1e6)
    assert copied.step < copied.transfer + copied.latency  # within a machine and between machines at once


def test_tied_ends_are_one_group() -> None:
    gpu = Gpu(1e30, 1e30, 80, 1e30, 1e6, True, 1e6)
    cluster = Cluster(gpu, gpus_per_node=4, network_efficiency=1.0)
    tied = replace(SHAPE, parameters=2_300_000, embedding_parameters=0)
    step = plan_step(tied, cluster, replicas=1, shards=4, reference="none")
    gathered = 2 * (2 * 2_000_000 + 4 * 300_000) + 4 * (2_000_000 + 2 * 300_000)
    assert step.received == pytest.approx(gathered * 3 / 4)


def test_adapters_reduce_themselves_alone() -> None:
    full, lora = (plan_step(SHAPE, H100, replicas=1, shards=8, lora_r=r) for r in (None, 10))
    reduced = 4 * (2_600_000 - 10 * 8_000) * 7 / 8
    assert full.received - lora.received == pytest.approx(reduced)


def test_operations_are_those_of_the_memory_table(shapes: dict[str, ModelShape]) -> None:
    options: dict[str, Any] = {"tokens": 4096, "completion_tokens": 1000, "pair_tokens": 512}
    for shape in shapes.values():
        for more in ({}, {"gradient_checkpointing": True}, {"lora_r": 16}, {"reference": "cached"}):
            plan = plan_memory(
                shape, strategy="fsdp2", gpus=8, flops=H100.flops(wide=False), **options, **more
            )
            step = plan_step(shape, H100, replicas=1, shards=8, **options, **more)
            assert 8 * 4096 / step.compute == pytest.approx(plan.tokens_per_second)


@pytest.mark.parametrize("name", ["8b", "70b"])
@pytest.mark.parametrize("gpu", GPUS)
def test_limits(shapes: dict[str, ModelShape], name: str, gpu: str) -> None:
    cluster = Cluster(GPUS[gpu])
    before: StepTime | None = None
    for power in range(3, 11):
        flat = plan_step(shapes[name], cluster, replicas=1, shards=2**power)
        hybrid = plan_step(shapes[name], cluster, replicas=2 ** (power - 3), shards=8)
        for step in (flat, hybrid):
            assert step.compute + step.optimizer <= step.step
            assert step.step <= step.compute + step.transfer + step.latency + step.optimizer
        if before is None:
            assert flat == hybrid
        else:
            assert flat.latency > 1.5 * before.latency
            assert flat.transfer > before.transfer
            assert flat.pairs_per_second > before.pairs_per_second
        before = flat


def test_plain_fsdp_waits_for_1024_gpus_and_replicas_do_not(shapes: dict[str, ModelShape]) -> None:
    flat = plan_step(shapes["8b"], H100, replicas=1, shards=1024, tokens=2048)
    hybrid = plan_step(shapes["8b"], H100, replicas=128, shards=8, tokens=2048)
    assert flat.latency > flat.transfer
    assert hybrid.latency < 0.1 * hybrid.transfer
    assert flat.latency > 50 * hybrid.latency
    assert flat.exposed > 2 * hybrid.exposed
    assert flat.pairs_per_second < hybrid.pairs_per_second


def test_more_of_anything_never_hurts(shapes: dict[str, ModelShape]) -> None:
    def seconds(cluster: Cluster = H100, **options: Any) -> float:
        return plan_step(shapes["8b"], cluster, **{"replicas": 4, "shards": 16, **options}).step

    assert seconds(Cluster(GPUS["h100"], efficiency=0.6)) < seconds()
    assert seconds(Cluster(GPUS["h100"], network_efficiency=0.1)) > seconds()
    assert seconds(Cluster(GPUS["a100"])) > seconds()
    assert seconds(tokens=16384) > 1.9 * seconds()
    assert seconds(gradient_checkpointing=True) > seconds()
    assert seconds(gradient_checkpointing="selective") == seconds()
    assert seconds(reference="cached") < seconds()
    assert seconds(completion_tokens=1024) < seconds()


def test_experts_are_sent_whole_and_computed_in_part() -> None:
    mixture = model_shape(load_config({"model_type": "mixtral"}))
    dense = replace(mixture, idle_parameters=0)
    part, whole = (plan_step(shape, H100, replicas=1, shards=64) for shape in (mixture, dense))
    assert part.received == whole.received
    assert part.transfer == whole.transfer
    assert part.compute < 0.3 * whole.compute
    assert part.exposed > whole.exposed


def test_meshes_are_positive() -> None:
    with pytest.raises(ValueError, match="`replicas` and `shards` must be at least 1, got 0 and 8"):
        plan_step(SHAPE, H100, replicas=0, shards=8)
