"""Clock, peak memory and token counts of one training run, measured alike for every variant."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Measurement", "Meter", "resident_mib"]


class Measurement(NamedTuple):
    """One run in a process of its own.

    Attributes:
        seconds_per_step: Mean over the timed steps, loading of batches included.
        cpu_seconds_per_step: Processor time of all threads, which other processes disturb less.
        pairs_per_second: Of the timed steps.
        peak_mib: Largest resident set while training, warm-up step included, loading not.
        start_mib: Resident set just before training: imports, policy, reference.
        imports_mib: Resident set after imports.
        policy_positions: Token positions in the policy's forward passes, per pair, padding included.
        reference_positions: Likewise for the reference.
        precompute_seconds_per_pair: What a pair cost before training, where log-probs were precomputed.
        losses: Loss of every step, the warm-up step too.
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


class Meter:
    """Told of every step's end by a trainer's callback; the first `warmup` steps are not timed."""

    def __init__(self, *, steps: int, warmup: int, batch_size: int) -> None:
        self.steps = steps
        self.warmup = warmup
        self.batch_size = batch_size
        self.precompute_seconds = 0.0
        self.losses: list[float] = []
        self._imports = resident_mib("VmRSS")
        self._start = 0.0
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []
        self._positions = {"policy": 0, "reference": 0}

    def count(self, model: nn.Module, role: str) -> None:
        """Count the positions of a model's forward passes from now on."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            if len(self._ends) >= self.warmup:
                self._positions[role] += ids.numel()

        model.base_model.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[union-attr]

    def training_starts(self) -> None:
        """Everything is loaded: forget the peak of loading."""
        self._start = resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def step_ends(self) -> None:
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())

    def result(self) -> Measurement:
        assert len(self._ends) == self.warmup + self.steps
        elapsed = self._ends[-1] - self._ends[self.warmup - 1]
        pairs = self.steps * self.batch_size
        return Measurement(
            seconds_per_step=elapsed / self.steps,
            cpu_seconds_per_step=(self._cpu_ends[-1] - self._cpu_ends[self.warmup - 1]) / self.steps,
            pairs_per_second=pairs / elapsed,
            peak_mib=resident_mib("VmHWM"),
            start_mib=self._start,
            imports_mib=self._imports,
            policy_positions=self._positions["policy"] / pairs,
            reference_positions=self._positions["reference"] / pairs,
            precompute_seconds_per_pair=self.precompute_seconds / (pairs + self.warmup * self.batch_size),
            losses=self.losses,
        )


def resident_mib(field: str) -> float:
    """A line of this process's status, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
