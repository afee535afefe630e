"""Clock, peak memory and token counts of one training run, measured alike for every variant."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.process import resident_mib
from lightning_dpo.models.unwrap import causal_lm

__all__ = ["Measurement", "Meter"]

SYNCHRONISES = "called a synchronizing CUDA operation"
"""What torch warns of, where it is asked to, when the host waits for the device."""


class Measurement(NamedTuple):
    """One run.

    Attributes:
        seconds_per_step: Mean over the timed steps, loading of batches included.
        cpu_seconds_per_step: Processor time of all threads, which other processes disturb less.
        pairs_per_second: Of the timed steps.
        peak_mib: Largest memory while training, warm-up step included, loading not: on the CPU the resident
            set of the process, on a GPU what tensors took there.
        start_mib: The same just before training: policy, reference, on the CPU imports too.
        imports_mib: Resident set after imports.
        policy_positions: Token positions in the policy's forward passes, per pair, padding included.
        reference_positions: Likewise for the reference.
        precompute_seconds_per_pair: What a pair cost before training, where log-probs were precomputed.
        losses: Loss of every step, the warm-up step too.
        graphs: Graphs that Dynamo compiled before the timed steps.
        graphs_in_timed_steps: And within them.
        waits_per_step: How often the host waited for the GPU, of the steps that were watched for that; None
            where none were, and on the CPU.
        note: What the run says of how it scores.
    """

    seconds_per_step: float
    cpu_seconds_per_step: float
    pairs_per_second: float
    peak_mib: float
    start_mib: float
    imports_mib: float
    policy_positions: float
    reference_positions: float
    precompute_seconds_per_pair: float
    losses: list[float]
    graphs: int = 0
    graphs_in_timed_steps: int = 0
    waits_per_step: float | None = None
    note: str = ""

    @property
    def epoch_pairs_per_second(self) -> float:
        """Pairs per second of one epoch that pays for its own precomputation."""
        return 1 / (1 / self.pairs_per_second + self.precompute_seconds_per_pair)


class Meter:
    """Told of every step's end by a trainer's callback.

    The first `warmup` steps are not timed. After the timed ones come those that are watched: each wait for
    the GPU makes a warning there, which takes time of its own.
    """

    def __init__(
        self, *, steps: int, warmup: int, batch_size: int, device: str = "cpu", watched: int = 0
    ) -> None:
        self.steps = steps
        self.warmup = warmup
        self.watched = watched
        self.batch_size = batch_size
        self.precompute_seconds = 0.0
        self.losses: list[Tensor] = []
        self.note = ""
        self._on_gpu = torch.device(device).type == "cuda"
        self._imports = resident_mib("VmRSS")
        self._start = 0.0
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []
        self._positions = {"policy": 0, "reference": 0}
        self._graphs: list[int] = []
        self._watching = contextlib.ExitStack()
        self._warnings: list[warnings.WarningMessage] = []

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps + self.watched

    def count(self, model: nn.Module, role: str) -> None:
        """Count the positions of a model's forward passes from now on."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            if self.warmup <= len(self._ends) < self.warmup + self.steps:
                self._positions[role] += ids.numel()

        # What an adapter wraps: scoring goes around the wrapper.
        causal_lm(model).base_model.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[union-attr]

    def training_starts(self) -> None:
        """Everything is loaded: forget the peak of loading."""
        self._graphs = [_graphs()]
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated() / 2**20
        else:
            self._start = resident_mib("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")

    def step_ends(self) -> None:
        done = len(self._ends) + 1
        is_edge = done in (self.warmup, self.warmup + self.steps)
        if self._on_gpu and is_edge:
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())
        if is_edge:
            self._graphs.append(_graphs())
        if self._on_gpu and self.watched and done == self.warmup + self.steps:
            self._warnings = self._watching.enter_context(waits_recorded())
        if done == self.all_steps:
            self._watching.close()

    def result(self) -> Measurement:
        assert len(self._ends) == self.all_steps
        last = self.warmup + self.steps - 1
        elapsed = self._ends[last] - self._ends[self.warmup - 1]
        pairs = self.steps * self.batch_size
        before, start, end = self._graphs
        watched = self._on_gpu and self.watched
        return Measurement(
            seconds_per_step=elapsed / self.steps,
            cpu_seconds_per_step=(self._cpu_ends[last] - self._cpu_ends[self.warmup - 1]) / self.steps,
            pairs_per_second=pairs / elapsed,
            peak_mib=torch.cuda.max_memory_allocated() / 2**20 if self._on_gpu else resident_mib("VmHWM"),
            start_mib=self._start,
            imports_mib=self._imports,
            policy_positions=self._positions["policy"] / pairs,
            reference_positions=self._positions["reference"] / pairs,
            precompute_seconds_per_pair=self.precompute_seconds / (self.all_steps * self.batch_size),
            losses=[float(loss) for loss in self.losses],
            graphs=start - before,
            graphs_in_timed_steps=end - start,
            waits_per_step=count_waits(self._warnings) / self.watched if watched else None,
            note=self.note,
        )


@contextlib.contextmanager
def waits_recorded() -> Iterator[list[warnings.WarningMessage]]:
    """Have torch warn of each operation for which the host waits for the GPU, and keep the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count_waits(found: Iterable[warnings.WarningMessage]) -> int:
    return sum(SYNCHRONISES in str(each.message) for each in found)


def _graphs() -> int:
    """Graphs that Dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
