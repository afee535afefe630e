"""GPUs by their makers' figures, and how long ranks take to exchange tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

__all__ = ["GPUS", "Cluster", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """What a GPU could do at best.

    Attributes:
        flops: Operations a second of bfloat16 matrix products, dense.
        float32_flops: The same of float32 ones, without TF32.
        memory: GiB.
        memory_bandwidth: Bytes a second.
        link: Bytes a second in one direction to the other GPUs of its machine.
        has_nvlink: Whether that is NVLink; PCIe otherwise.
        network: Bytes a second in one direction, its share of what its machine has to other machines.
    """

    flops: float
    float32_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    has_nvlink: bool
    network: float


GPUS = {
    "h100": Gpu(989e12, 67e12, 80, 3.35e12, 450e9, True, 50e9),
    "h200": Gpu(989e12, 67e12, 141, 4.8e12, 450e9, True, 50e9),
    "a100": Gpu(312e12, 19.5e12, 80, 2.039e12, 300e9, True, 25e9),
    "l4": Gpu(121e12, 30.3e12, 24, 300e9, 32e9, False, 1.5625e9),
}
"""H100 and H200 SXM, A100 SXM 80GB and L4, from NVIDIA's data sheets: dense figures, half of those "with
sparsity"; NVLink's and PCIe's are of both directions there. The network is that of a DGX H100 or H200 (eight
ports of 400 Gb/s), of a DGX A100 (eight of 200 Gb/s), and of eight L4 that share 100 Gb/s (AWS g6.48xlarge,
Google g2-standard-96)."""

_BASE, _NVLINK, _PCIE, _NETWORK, _TREE_NVLINK = 8.4e-6, 3.4e-6, 5.7e-6, 14.0e-6, 4.0e-6
"""Seconds that NCCL's own tuning counts for a collective, and for each of its steps over a kind of link:
protocol Simple, which large messages use; `baseLat` and `hwLat` in src/graph/tuning.cc of
https://github.com/NVIDIA/nccl."""


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs, numbered machine by machine.

    Attributes:
        gpu: Of which kind.
        gpus_per_node: How many a machine has.
        efficiency: Share of `Gpu.flops` that training reaches.
        network_efficiency: Share of the links' bandwidths that collectives reach.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    efficiency: float = 0.4
    network_efficiency: float = 0.8

    def __post_init__(self) -> None:
        """Refuse what no cluster has.

        Raises:
            ValueError: If a number is out of its range.
        """
        if self.gpus_per_node < 1:
            raise ValueError(f"`gpus_per_node` must be at least 1, got {self.gpus_per_node}")
        for name in ("efficiency", "network_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {getattr(self, name)}")

    def flops(self, *, wide: bool) -> float:
        """Operations a second that one GPU reaches.

        Args:
            wide: Whether matrix products are of float32, not of bfloat16.
        """
        return self.efficiency * (self.gpu.float32_flops if wide else self.gpu.flops)

    def gather(self, size: float, ranks: int) -> tuple[float, float]:
        """An all-gather, or a reduce-scatter, over ranks that follow each other.

        A ring of n ranks passes n - 1 of n parts on in n - 1 steps
        (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Where it runs through several
        machines each of its n - 1 steps but one a machine stays within one, and a machine's GPUs use all of
        its ports together.

        Args:
            size: Bytes of the whole tensor.
            ranks: n.

        Returns:
            Seconds for bytes, and seconds for latencies.
        """
        if ranks == 1:
            return 0.0, 0.0
        nodes = ceil(ranks / self.gpus_per_node)
        speed = self.gpu.link
        if nodes > 1:
            speed = min(speed, self.gpu.network * min(ranks, self.gpus_per_node))
        latency = _BASE + (ranks - nodes) * self._hop + (nodes - 1) * _NETWORK
        return size * (ranks - 1) / ranks / (speed * self.network_efficiency), latency

    def average(self, size: float, replicas: int, shards: int) -> tuple[float, float]:
        """An all-reduce between ranks that hold the same shard, all shards at once.

        2 (r - 1) / r of the bytes in a ring or in NCCL's double binary trees, which have log2 of the machines
        for their latency
        (https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4/): the faster of
        the two. Shards of one machine share its ports.

        Args:
            size: Bytes of the shard.
            replicas: r.
            shards: Of a replica.

        Returns:
            Seconds for bytes, and seconds for latencies.
        """
        if replicas == 1:
            return 0.0, 0.0
        nodes = ceil(replicas * shards / self.gpus_per_node) if shards < self.gpus_per_node else replicas
        within = ceil(replicas / nodes)
        speed = self.gpu.link
        if nodes > 1:
            sharing = min(shards, self.gpus_per_node)
            speed = min(speed, self.gpu.network * self.gpus_per_node / sharing)
        ring = 2 * ((replicas - nodes) * self._hop + (nodes - 1) * _NETWORK)
        hop = _TREE_NVLINK if self.gpu.has_nvlink else _PCIE
        tree = 2 * ((within - 1) * hop + log2(nodes) * _NETWORK)
        bytes_moved = 2 * (replicas - 1) / replicas * size
        return bytes_moved / (speed * self.network_efficiency), _BASE + min(ring, tree)

    @property
    def _hop(self) -> float:
        return _NVLINK if self.gpu.has_nvlink else _PCIE
