"""Compile FlexAttention's kernels with this package's mask for a GPU that is not there.

``python -m benchmarks.flex_kernels --capability 9.0`` prints each kernel's target and size; triton must be
installed (``pip install triton==3.7.0`` goes with torch 2.13). The graphs are traced on the CPU, moved to
fake CUDA tensors and lowered by inductor, which is told of a device with the maker's figures. Nothing runs:
that kernels compile says nothing of their numbers. It reaches into torch, and was tried with 2.13 alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from benchmarks.workload import synthetic_pairs
from lightning_dpo import PairBatch
from lightning_dpo.scoring.layout import single_row
from lightning_dpo.scoring.masks import FLEX_BLOCK, block_mask

CUDA = torch.device("cuda:0")

PROPERTIES = {
    "9.0": {"name": "H100", "multi_processor_count": 132, "threads": 2048, "shared": 232448},
    "8.9": {"name": "L4", "multi_processor_count": 58, "threads": 1536, "shared": 101376},
}
"""Multiprocessors, threads of each and bytes of shared memory that a block may have: the table of compute
capabilities in CUDA's programming guide, and the data sheets of H100 SXM and L4."""


class Graph(NamedTuple):
    """A graph of one direction, and its inputs."""

    direction: str
    module: torch.fx.GraphModule
    inputs: list[Any]


def trace(*, heads: int, key_heads: int, head_dim: int) -> list[Graph]:
    """FlexAttention's forward and backward over a row of pairs, traced on the CPU."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch.nn.attention import flex_attention

    graphs: list[Graph] = []

    def keep(direction: str) -> Callable[..., Any]:
        def compiler(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(Graph(direction, module, inputs))
            return make_boxed_func(module.forward)

        return compiler

    flex_attention._validate_device = lambda *_: None  # it refuses gradients on a CPU, which has no kernel
    rows = single_row(
        PairBatch.from_pairs(synthetic_pairs(2, vocab=512, max_length=256)).completions(),
        multiple=FLEX_BLOCK,
    )
    length = rows.input_ids.shape[1]
    query, key, value = (
        torch.randn(1, count, length, head_dim, dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"))
    attend: Any = torch.compile(flex_attention.flex_attention, backend=backend)
    attend(query, key, value, block_mask=block_mask(rows), enable_gqa=heads != key_heads).sum().backward()
    return graphs


def pretend(capability: str) -> None:
    """Have torch, inductor and triton believe that there is a GPU; this process is good for nothing else."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    figures: dict[str, Any] = PROPERTIES[capability]
    major, minor = map(int, capability.split("."))
    properties = SimpleNamespace(
        name=figures["name"],
        major=major,
        minor=minor,
        multi_processor_count=figures["multi_processor_count"],
        max_threads_per_multi_processor=figures["threads"],
        max_threads_per_block=1024,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=figures["shared"],
        shared_memory_per_multiprocessor=figures["shared"] + 1024,
        total_memory=24 << 30,
        gcnArchName="",
    )
    answers: dict[str, Any] = {
        "get_device_properties": properties,
        "get_compute_capability": 10 * major + minor,
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_raw_stream": 0,
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, found=answer: found))
    for name in ("get_device_properties", "current_device"):
        setattr(CudaInterface.Worker, name, staticmethod(lambda *_, found=answers[name]: found))
    for name in ("get_device_properties", "is_available", "current_device", "device_count"):
        setattr(torch.cuda, name, lambda *_, found=answers[name]: found)
    torch.cuda.get_device_capability = lambda *_: (major, minor)  # type: ignore[assignment]
    torch.version.cuda = "12.8"
    target = GPUTarget("cuda", 10 * major + minor, 32)
    limits = {"max_shared_mem": figures["shared"], "multiprocessor_count": 132, "warpSize": 32}
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda *_: 0,
            get_active_torch_device=lambda: CUDA,
            utils=SimpleNamespace(get_device_properties=lambda *_: {**limits, "max_num_regs": 65536}),
        )
    )
    triton_helpers.set_driver_to_gpu = lambda: None
    for value in vars(_triton).values():  # what was found out before
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    config.compile_threads = 1
    config.use_static_cuda_launcher = False
    if hasattr(config, "use_static_triton_launcher"):
        config.use_static_triton_launcher = False


def lower(graph: Graph) -> str:
    """The Python that inductor makes of a graph, once its tensors are on a GPU."""
    from torch._guards import detect_fake_mode
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(graph.inputs) or FakeTensorMode(allow_non_fake_inputs=True)

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            size, stride = tuple(value.size()), value.stride()
            return FakeTensor(mode, torch.empty_strided(size, stride, dtype=value.dtype, device="meta"), CUDA)
        return CUDA if isinstance(value, torch.device) else value

    def move(module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            node.meta.update(
                {k: tree_map(moved, node.meta[k]) for k in ("val", "example_value") if k in node.meta}
            )
            node.args = tuple(CUDA if isinstance(a, torch.device) else a for a in node.args)
            node.kwargs = {k: CUDA if isinstance(a, torch.device) else a for k, a in node.kwargs.items()}
        for child in module.children():
            if isinstance(child, torch.fx.GraphModule):
                move(child)
        module.recompile()

    with mode:
        move(graph.module)
        inputs = [moved(value) for value in graph.inputs]
    backward = graph.direction == "backward"
    lowering = GraphLowering(
        graph.module, example_inputs=inputs, shape_env=mode.shape_env, is_backward=backward
    )
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), DebugContext():  # noqa: SIM117
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code: Any = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def kernels(code: str) -> Iterator[tuple[str, Any]]:
    """Each of its kernels' names with what triton compiled for it."""
    from torch._inductor.codecache import PyCodeCache

    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, flags=re.S):
        kernel = getattr(PyCodeCache.load(source.replace("\\'\\'\\'", "'''")), name)
        kernel.precompile(warm_cache_only=True)
        for result in kernel.compile_results:
            yield name, result.kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", choices=sorted(PROPERTIES), default="9.0")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    options = parser.parse_args()
    graphs = trace(heads=options.heads, key_heads=options.key_heads, head_dim=options.head_dim)
    pretend(options.capability)
    for graph in graphs:
        for name, compiled in kernels(lower(graph)):
            (target,) = re.findall(r"\.target (\w+)", compiled.asm["ptx"])
            size, shared = len(compiled.asm["cubin"]), compiled.metadata.shared
            print(f"{graph.direction}: {name}: {target}, {size} bytes, {shared} of shared memory", flush=True)


if __name__ == "__main__":
    main()
