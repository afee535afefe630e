"""Where the time and the memory of a training step go, and how near it comes to the cores' limit.

``python -m benchmarks.step_profile`` trains on the rows of `benchmarks.trl_throughput` and prints operators
by kind with their share of a step, the rate of its products beside what products of these sizes reach alone,
and what lies in memory at the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.process import resident_mib
from benchmarks.trl_throughput import DATA
from benchmarks.workload import prepare
from benchmarks.works import DEFAULT_MODEL
from lightning_dpo import DPOModule, PairBatch
from lightning_dpo.losses import DPOLoss

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn_linear"),
    "attention": ("flash_attention", "scaled_dot_product"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::_index_put_impl_"),
    "soft-max of the head": ("softmax", "logsumexp", "aten::gather", "aten::scatter"),
    "optimizer and clipping": (
        "_fused_adamw_",
        "aten::linalg_vector_norm",
        "aten::_foreach_norm",
        "aten::stack",
    ),
    "gradients added up": ("aten::add_",),
    "fresh memory": ("aten::empty", "aten::fill_", "aten::zero_", "aten::resize_"),
}
"""Kinds of operators, by parts of their names; what is in none is element-wise: norms, rotary embedding,
SwiGLU, residuals, and the loss."""


def _visible(query: Sequence[int], key: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees, over rows and heads: the last queries of causal attention."""
    rows, heads, queries = query[:3]
    return rows * heads * (queries * (key[2] - queries) + queries * (queries + 1) // 2)


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Operations of attention of the CPU, of which torch counts none; what is masked is not counted."""
    return 4 * query[3] * _visible(query, key)


def _attention_backward(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Of its gradients: twice as many products; what is computed again is not counted."""
    return 2 * _attention(query, key)


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Step(NamedTuple):
    """A run of timed steps.

    Attributes:
        seconds: Of each.
        flops: Floating-point operations of the products in each, forward and backward, reference included.
        kinds: Seconds in each kind of operator in a step, the mean over the same batches, profiled.
        operators: The costliest operators, seconds a step.
        peak_mib: Largest resident set of the timed steps.
        parts: What lies in memory at the peak, MiB; the last is what is left.
    """

    seconds: list[float]
    flops: list[float]
    kinds: dict[str, float]
    operators: list[tuple[str, float]]
    peak_mib: float
    parts: dict[str, float]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="anything `load_model` takes")
    parser.add_argument("--data", type=Path, default=DATA, help="preference rows")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=6, help="different batches, each timed once")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="bf16 is autocast")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--reference-dtype", choices=("float32", "bfloat16"), help="of the frozen reference")
    parser.add_argument(
        "--gradient-checkpointing",
        nargs="?",
        const=True,
        default=False,
        choices=["selective"],
        help="recompute activations, those of whole blocks or selectively",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/step_profile.json"), help="all numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        workload = prepare(
            Path(folder),
            model=options.model,
            data=options.data,
            count=options.steps * options.batch_size,
            max_length=512,
        )
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        before = product_rate(dtype)
        step = measure(str(workload.model), workload.pairs(), options)
        limit = max(before, product_rate(dtype))
    print(report(step, limit))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"options": {k: str(v) for k, v in vars(options).items()}, "limit": limit, **step._asdict()}
    options.output.write_text(json.dumps(record, indent=1))
    print(f"\nall numbers: {options.output}")


class Measuring(pl.Callback):
    """Four epochs over the same batches: untimed, timed, profiled, and one that counts.

    Counted are operations and what is kept for the backward pass. There a compiled model runs uncompiled.
    """

    EPOCHS = 4

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.flops: list[float] = []
        self.peak_mib = 0.0
        self.kept: dict[tuple[int, torch.dtype], int] = {}
        self.operators: Counter[str] = Counter()
        self._began = 0.0
        self._within = ExitStack()
        self._mode: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 2:
            self._mode = self._within.enter_context(profile(activities=[ProfilerActivity.CPU]))
        elif trainer.current_epoch == 3:
            own = {tensor.untyped_storage().data_ptr() for tensor in pl_module.policy.parameters()}
            kept: dict[tuple[int, torch.dtype], int] = {}

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr(), tensor.dtype] = storage.nbytes()
                return tensor

            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            self._within.enter_context(hooks)
            self._within.callback(self._largest, kept)
            mode = FlopCounterMode(display=False, custom_mapping=COUNTED)
            self._mode = self._within.enter_context(mode)
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._began
        self._within.close()
        if trainer.current_epoch == 0 and batch_idx == 0:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
        elif trainer.current_epoch == 1:
            self.seconds.append(seconds)
            self.peak_mib = resident_mib("VmHWM")
        elif trainer.current_epoch == 2:
            for event in self._mode.key_averages():
                self.operators[event.key] += event.self_cpu_time_total / 1e6
        elif trainer.current_epoch == 3:
            self.flops.append(float(self._mode.get_total_flops()))

    def _largest(self, kept: dict[tuple[int, torch.dtype], int]) -> None:
        self.kept = max(self.kept, kept, key=lambda one: sum(one.values()))


def measure(model: str, pairs: list[Any], options: argparse.Namespace) -> Step:
    """Train, and look."""
    imports = resident_mib("VmRSS")
    module = DPOModule(
        model,
        loss=DPOLoss(beta=0.1),
        optimizer=lambda params: AdamW(params, lr=1e-6, weight_decay=0.0, fused=True),
        warmup_ratio=0.0,
        compile_model=options.compile,
        reference_dtype=options.reference_dtype,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    measuring = Measuring()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=Measuring.EPOCHS,
            accelerator="cpu",
            precision="bf16-mixed" if options.precision == "bf16" else "32-true",
            callbacks=[measuring],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(pairs, batch_size=options.batch_size, collate_fn=PairBatch.from_pairs)
        trainer.fit(module, loader)
    weights = mib(module.policy.parameters())
    reference = mib(module.reference_model.parameters()) if module.reference_model is not None else 0.0
    by_type: Counter[str] = Counter()
    for (_, dtype), size in measuring.kept.items():
        by_type[str(dtype).removeprefix("torch.")] += size / 2**20
    parts = {
        "imports, tokenizer, rows": imports,
        "policy": weights,
        "reference": reference,
        "Adam's two moments": 2 * weights,
    }
    if not options.compile and not options.gradient_checkpointing:  # what such blocks keep is in the rest
        parts |= {f"kept for the backward pass, {name}": size for name, size in by_type.most_common()}
    parts["the rest: chunks of the head, gradients on their way, allocator"] = measuring.peak_mib - sum(
        parts.values()
    )
    kinds: Counter[str] = Counter()
    operators = Counter({name: total / options.steps for name, total in measuring.operators.items()})
    for name, seconds in operators.items():
        kinds[kind_of(name)] += seconds
    return Step(
        measuring.seconds,
        measuring.flops,
        dict(kinds.most_common()),
        operators.most_common(25),
        measuring.peak_mib,
        parts,
    )


def kind_of(operator: str) -> str:
    for kind, names in KINDS.items():
        if any(name in operator for name in names):
            return kind
    return "element-wise" if operator.startswith("aten::") else "around the operators"


def mib(tensors: Any) -> float:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors) / 2**20


def product_rate(dtype: torch.dtype, tokens: int = 1024, width: int = 576, inner: int = 1536) -> float:
    """FLOP/s of products of SmolLM2's sizes alone, the best of several tries."""
    left, right = torch.randn(tokens, width, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    rates = []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(20):
            torch.nn.functional.linear(left, right)
        rates.append(20 * 2 * tokens * width * inner / (time.perf_counter() - began))
    return max(rates)


def report(step: Step, limit: float) -> str:
    seconds = statistics.median(step.seconds)
    rate = sum(step.flops) / sum(step.seconds)
    rates = [flops / one for flops, one in zip(step.flops, step.seconds, strict=True)]
    profiled = sum(step.kinds.values())
    lines = [
        "",
        f"{seconds:.2f} s a step ({min(step.seconds):.2f}-{max(step.seconds):.2f}), "
        f"{sum(step.flops) / len(step.flops) / 1e12:.2f} TFLOP in its products",
        f"{rate / 1e9:.0f} GFLOP/s over all of them ({min(rates) / 1e9:.0f}-{max(rates) / 1e9:.0f}), "
        f"{rate / limit:.0%} of the {limit / 1e9:.0f} that such products reach alone",
        "",
        "| where the time goes | s | share |",
        "|---|---|---|",
        *(f"| {kind} | {value:.2f} | {value / profiled:.0%} |" for kind, value in step.kinds.items()),
        "",
        "| operator | s |",
        "|---|---|",
        *(f"| `{name}` | {value:.2f} |" for name, value in step.operators),
        "",
        f"| memory at the peak, {step.peak_mib:.0f} MiB | MiB |",
        "|---|---|",
        *(f"| {name} | {value:.0f} |" for name, value in step.parts.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
