"""Speed and memory beside TRL's DPOTrainer, default and precomputed, alternating on the same rows.

``python -m benchmarks.trl_throughput`` measures every kind of work and prints a table; ``--works hh`` one of
them. Every run is a process of its own, so that its peak of memory is its own; variants take turns, so that a
busy machine slows all of them, and ratios are taken within a turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import VARIANTS, Settings
from benchmarks.measure import Measurement
from benchmarks.process import ROOT, run_child
from benchmarks.tables import aligned, median, spread
from benchmarks.workload import Tokens, prepare, tokens_per_pair
from benchmarks.works import DEFAULT_MODEL, WORKS, Work

DATA = ROOT.parent / "shared" / "data" / "hh-harmless" / "train.jsonl.gz"
WARMUP = 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--works", nargs="+", choices=list(WORKS), default=list(WORKS), help="what to measure"
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="anything lightning_dpo.models.load.load_model takes"
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="preference rows; synthetic ones of like lengths if absent"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and one completion")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed steps of a run, after one that is not timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a run")
    parser.add_argument(
        "--variants", nargs="+", choices=sorted(VARIANTS), help="in this order; default: those of the work"
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations, in every variant"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/trl_throughput.json"), help="all numbers"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
    rows: list[str] = []
    for name in options.works:
        print(f"\n{WORKS[name].title}", flush=True)
        measured, tokens, description = measure(WORKS[name], options)
        print(report(measured, tokens, description=description), flush=True)
        rows.append(markdown_row(WORKS[name], measured, are_synthetic="synthetic" in description))
        record[name] = {
            "rows": description,
            "tokens_per_pair": tokens._asdict(),
            "rounds": [{variant: m._asdict() for variant, m in each.items()} for each in measured],
        }
        options.output.write_text(json.dumps(record, indent=1))
    print("\n" + "\n".join([*MARKDOWN_HEAD, *rows]))
    print(f"\nall numbers: {options.output}")


def measure(work: Work, options: argparse.Namespace) -> tuple[list[dict[str, Measurement]], Tokens, str]:
    """What each variant did in each round, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        workload = prepare(
            Path(folder),
            model=work.model or options.model,
            data=options.data,
            count=(WARMUP + options.steps) * options.batch_size,
            max_length=options.max_length,
            lengths=work.lengths,
        )
        timed = workload.pairs()[WARMUP * options.batch_size :]
        settings = Settings(
            workload=folder,
            steps=options.steps,
            warmup=WARMUP,
            batch_size=options.batch_size,
            threads=options.threads,
            gradient_checkpointing=options.gradient_checkpointing,
            loss=work.loss,
            precision=work.precision,
            lora_rank=work.lora_rank,
        )
        rounds: list[dict[str, Measurement]] = []
        for index in range(options.rounds):
            variants = options.variants or work.variants
            order = variants if index % 2 == 0 else variants[::-1]
            found = {variant: run(variant, settings) for variant in order}
            rounds.append({variant: found[variant] for variant in variants})
            print(f"round {index + 1}: {brief(rounds[-1])}", flush=True)
    return (
        rounds,
        tokens_per_pair(timed, batch_size=options.batch_size),
        f"{workload.description}; {describe(work, options)}",
    )


def run(variant: str, settings: Settings) -> Measurement:
    """Train in a process of its own."""
    return Measurement(**run_child("benchmarks.child", variant, settings, threads=settings.threads))


def report(rounds: list[dict[str, Measurement]], tokens: Tokens, *, description: str) -> str:
    """Medians over the rounds; ratios within each round, then their median and range."""
    variants = list(rounds[0])
    head = [
        "",
        "s/step",
        "CPU s/step",
        "pairs/s",
        "peak MiB",
        "loaded MiB",
        "imports MiB",
        "positions/pair",
        "precompute s/pair",
    ]
    table = [head]
    for variant in variants:
        runs = [each[variant] for each in rounds]
        table.append(
            [
                variant,
                f"{median(m.seconds_per_step for m in runs):.2f}",
                f"{median(m.cpu_seconds_per_step for m in runs):.2f}",
                f"{median(m.pairs_per_second for m in runs):.3f}",
                f"{median(m.peak_mib for m in runs):.0f}",
                f"{median(m.start_mib for m in runs):.0f}",
                f"{median(m.imports_mib for m in runs):.0f}",
                f"{runs[0].policy_positions:.0f} + {runs[0].reference_positions:.0f}",
                f"{median(m.precompute_seconds_per_pair for m in runs):.2f}"
                if "precomputed" in variant or "cached" in variant
                else "-",
            ]
        )
    lines = ["", description, "", *aligned(table), ""]
    for own, peer in itertools.product(variants, variants):
        if own.startswith("ours") and peer.startswith("trl"):
            work = spread(
                rounds, lambda r, o=own, p=peer: r[p].cpu_seconds_per_step / r[o].cpu_seconds_per_step
            )
            lines.append(
                f"{own} / {peer}: pairs/s {speed(rounds, own, peer)}, by processor time {work}; "
                f"peak memory {memory(rounds, own, peer)}"
            )
    if "ours" in variants and "trl-precomputed" in variants:
        whole = spread(
            rounds, lambda r: r["ours"].pairs_per_second / r["trl-precomputed"].epoch_pairs_per_second
        )
        lines.append(f"ours / trl-precomputed, one epoch with its precomputation: pairs/s {whole}")
    lines += [
        "",
        f"token positions of one forward pass, per pair: unique {tokens.unique:.0f}, ours shared "
        f"{tokens.shared:.0f} ({tokens.shared / tokens.unique:.2f}x), ours concatenated and TRL "
        f"{tokens.concatenated:.0f} ({tokens.concatenated / tokens.unique:.2f}x)",
    ]
    return "\n".join(lines)


MARKDOWN_HEAD = (
    "| | beside TRL | memory | beside precomputed | cached beside precomputed | lean beside TRL | memory |",
    "|---|---|---|---|---|---|---|",
)


def markdown_row(work: Work, rounds: list[dict[str, Measurement]], *, are_synthetic: bool) -> str:
    """A row of the README's table, which says so where there was no data."""

    def cell(ratio: Callable[..., str], own: str, peer: str) -> str:
        return ratio(rounds, own, peer) if own in rounds[0] and peer in rounds[0] else ""

    cells = (
        work.title.replace("hh-rlhf rows", "synthetic rows") if are_synthetic else work.title,
        cell(speed, "ours", "trl"),
        cell(memory, "ours", "trl"),
        cell(speed, "ours", "trl-precomputed"),
        cell(speed, "ours-cached", "trl-precomputed"),
        cell(speed, "ours-lean", "trl"),
        cell(memory, "ours-lean", "trl"),
    )
    return "| " + " | ".join(cells) + " |"


def speed(rounds: list[dict[str, Measurement]], own: str, peer: str) -> str:
    return spread(rounds, lambda r: r[own].pairs_per_second / r[peer].pairs_per_second)


def memory(rounds: list[dict[str, Measurement]], own: str, peer: str) -> str:
    return spread(rounds, lambda r: r[own].peak_mib / r[peer].peak_mib)


def brief(measurements: dict[str, Measurement]) -> str:
    return ", ".join(
        f"{name} {m.seconds_per_step:.2f} s/step {m.peak_mib:.0f} MiB" for name, m in measurements.items()
    )


def describe(work: Work, options: argparse.Namespace) -> str:
    return (
        f"batches of {options.batch_size} pairs, at most {options.max_length} tokens; "
        f"{'bf16 autocast' if work.precision == 'bf16' else 'float32'}, "
        f"gradient checkpointing {'on' if options.gradient_checkpointing else 'off'}; {options.steps} steps "
        f"x {options.rounds} rounds on {options.threads} threads"
    )


if __name__ == "__main__":
    main()
