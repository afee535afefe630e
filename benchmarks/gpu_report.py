"""The figures of `benchmarks.gpu` as rows: rates, use of the device, memory, and ratios within rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from benchmarks.device import Device
from benchmarks.measure import Measurement
from benchmarks.tables import markdown, median, spread
from lightning_dpo import TokenPair
from lightning_dpo.parallel.memory.activations import Workload
from lightning_dpo.parallel.memory.operations import forward_operations
from lightning_dpo.parallel.memory.shapes import ModelShape

__all__ = ["Found", "Report", "Row", "Work", "rows"]

BACKWARD = 2
"""Passes that gradients of inputs and of weights cost; what is computed anew is not counted."""


class Work(NamedTuple):
    """What a pair takes, on average.

    Attributes:
        sequences: Tokens of prompt and chosen, and of prompt and rejected.
        unique: Tokens with the prompt once.
        completions: Tokens of both completions.
        body: Operations of one forward pass for a token in all blocks, attention over half a pair included.
        head: Operations of one forward pass of the head for a pair.
    """

    sequences: float
    unique: float
    completions: float
    body: float
    head: float

    @classmethod
    def of(cls, pairs: Sequence[TokenPair], shape: ModelShape) -> Work:
        prompts, chosen, rejected = (sum(map(len, part)) / len(pairs) for part in zip(*pairs, strict=True))
        unique, completions = prompts + chosen + rejected, chosen + rejected
        work = Workload(
            tokens=round(unique),
            completion_tokens=round(completions),
            pairs=1,
            stream=4,
            compute=2,
            by_completion=False,
        )
        body, head = forward_operations(shape, work, pair_tokens=round(unique))
        return cls(prompts + unique, unique, completions, body, head * unique)


class Row(NamedTuple):
    """One variant's medians over its rounds.

    Attributes:
        variant: Its name.
        pairs_per_second: Of the timed steps.
        tokens_per_second: The same in tokens of both sequences of a pair, without padding.
        seconds_per_step: Of the timed steps.
        mfu: Operations that the pairs need, with every prompt once, as a share of the device's products.
        busy: Operations for all positions that were computed, padding included, as that share.
        peak_gib: Largest memory while training.
        positions: Of the policy's forward pass, per pair.
        graphs: Graphs compiled before the timed steps of its first round.
        graphs_in_timed_steps: Graphs compiled within timed steps, of all rounds.
        waits_per_step: How often the host waited for the device in a step; None where it cannot be told.
        precompute_seconds_per_pair: Of the round that took longest: later ones may find it done.
        loss_difference: Largest difference of a step's loss from that of "ours".
        rounds: How many there are.
        note: What the run said of how it scores.
    """

    variant: str
    pairs_per_second: float
    tokens_per_second: float
    seconds_per_step: float
    mfu: float
    busy: float
    peak_gib: float
    positions: float
    graphs: int
    graphs_in_timed_steps: int
    waits_per_step: float | None
    precompute_seconds_per_pair: float
    loss_difference: float | None
    rounds: int
    note: str


@dataclass
class Found:
    """What was found with one model.

    Attributes:
        model: Its name.
        description: Its size, and what it was trained on.
        work: What a pair takes.
        rounds: Measurements of each round by variant.
        failures: Why a variant has none, or no more.
    """

    model: str
    description: str = ""
    work: Work | None = None
    rounds: list[dict[str, Measurement]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """All that was found.

    Attributes:
        options: What was asked for.
        tests: What pytest said in the end.
        device: None as long as it was not measured.
        models: What was found with each.
    """

    options: dict[str, str]
    tests: str = "not run"
    device: Device | None = None
    models: list[Found] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "options": self.options,
            "tests": self.tests,
            "device": None if self.device is None else self.device._asdict(),
            "models": [
                {
                    **asdict(found),
                    "work": None if found.work is None else found.work._asdict(),
                    "rounds": [{name: m._asdict() for name, m in each.items()} for each in found.rounds],
                    "rows": [row._asdict() for row in rows(found, self.device)],
                    "ratios": ratios(found),
                }
                for found in self.models
            ],
        }

    def text(self) -> str:
        """Everything but single rounds, as Markdown."""
        lines = ["# Training on a GPU", "", f"GPU tests: {self.tests}"]
        if self.device is not None:
            lines += ["", describe(self.device)]
        for found in self.models:
            lines += ["", f"## {found.model}", "", found.description, ""]
            lines += markdown([HEAD, *(cells(row) for row in rows(found, self.device))])
            lines += ["", *(f"- {name}: {why}" for name, why in found.failures.items())]
            lines += [f"- ours / {peer}: {ratio}" for peer, ratio in ratios(found).items()]
            lines += [f"- {row.variant}: {row.note}" for row in rows(found, self.device)]
        return "\n".join([*lines, "", *LEGEND, ""])


HEAD = (
    *("", "pairs/s", "tokens/s", "s/step", "MFU", "busy", "peak GiB", "positions/pair", "graphs"),
    *("waits/step", "precompute s/pair", "loss off by", "rounds"),
)

LEGEND = (
    "Medians over rounds; ratios are taken within rounds. Tokens are those of both sequences of a pair,",
    "each with its prompt. MFU counts the operations that pairs need, every prompt once; busy counts those",
    "for all positions that were computed. Both are counted, not measured, and are shares of the measured",
    "rate of bfloat16 matrix products. Graphs are those compiled before the timed steps of the first round",
    "+ within the timed steps of all rounds. A loss is off by its largest difference from ours in any step.",
)


def rows(found: Found, device: Device | None) -> list[Row]:
    """A row for each variant that has a measurement."""
    if found.work is None or device is None:
        return []
    names = dict.fromkeys(name for each in found.rounds for name in each)
    ours = next((each["ours"] for each in found.rounds if "ours" in each), None)
    return [_row(name, found, found.work, device, ours) for name in names]


def _row(name: str, found: Found, work: Work, device: Device, ours: Measurement | None) -> Row:
    runs = [each[name] for each in found.rounds if name in each]
    first = runs[0]
    references = int(first.reference_positions > 0)
    passes = 1 + BACKWARD + references
    head = work.head * passes
    needed = work.unique * work.body * passes + head
    policy = first.policy_positions * (1 + BACKWARD)
    computed = (policy + first.reference_positions) * work.body + head
    pairs = median(m.pairs_per_second for m in runs)
    waits = [m.waits_per_step for m in runs if m.waits_per_step is not None]
    return Row(
        variant=name,
        pairs_per_second=pairs,
        tokens_per_second=pairs * work.sequences,
        seconds_per_step=median(m.seconds_per_step for m in runs),
        mfu=pairs * needed / device.matrix_flops,
        busy=pairs * computed / device.matrix_flops,
        peak_gib=median(m.peak_mib for m in runs) / 1024,
        positions=first.policy_positions,
        graphs=first.graphs,
        graphs_in_timed_steps=sum(m.graphs_in_timed_steps for m in runs),
        waits_per_step=median(waits) if waits else None,
        precompute_seconds_per_pair=max(m.precompute_seconds_per_pair for m in runs),
        loss_difference=None
        if ours is None
        else max(abs(a - b) for a, b in zip(first.losses, ours.losses, strict=True)),
        rounds=len(runs),
        note=first.note,
    )


def ratios(found: Found) -> dict[str, str]:
    """The speed and memory of "ours" over those of each other variant, within rounds."""
    result = {}
    for peer in dict.fromkeys(name for each in found.rounds for name in each if name != "ours"):
        both = [each for each in found.rounds if "ours" in each and peer in each]
        if both:
            speed = spread(both, lambda r, p=peer: r["ours"].pairs_per_second / r[p].pairs_per_second)
            memory = spread(both, lambda r, p=peer: r["ours"].peak_mib / r[p].peak_mib)
            result[peer] = f"pairs/s {speed}, peak memory {memory}"
    return result


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.variant,
        f"{row.pairs_per_second:.2f}",
        f"{row.tokens_per_second:.0f}",
        f"{row.seconds_per_step:.3f}",
        f"{row.mfu:.1%}",
        f"{row.busy:.1%}",
        f"{row.peak_gib:.2f}",
        f"{row.positions:.0f}",
        f"{row.graphs} + {row.graphs_in_timed_steps}",
        "-" if row.waits_per_step is None else f"{row.waits_per_step:.1f}",
        f"{row.precompute_seconds_per_pair:.3f}" if row.precompute_seconds_per_pair else "-",
        "-" if row.loss_difference is None else f"{row.loss_difference:.1g}",
        str(row.rounds),
    )


def describe(device: Device) -> str:
    where = f", capability {device.capability}, {device.memory_gib:.0f} GiB" if device.capability else ""
    cuda = f", CUDA {device.cuda}" if device.cuda else ""
    return (
        f"{device.name}{where}; torch {device.torch}{cuda}; bfloat16 products of {device.matrix_size} x "
        f"{device.matrix_size}: {device.matrix_flops / 1e12:.3g} TFLOP/s"
    )
