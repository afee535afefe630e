"""Peak memory of reading, tokenising and batching preference pairs, as their number grows.

Each size runs in a process of its own, whose memory and that of its workers is sampled from outside:

    python benchmarks/data_memory.py            # 10,000, 100,000 and 1,000,000 pairs
    python benchmarks/data_memory.py 5000 50000

Private memory is what the processes hold themselves; the total adds pages of files that are mapped, which the
system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

WORDS = (Path(__file__).read_text(encoding="utf-8")).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=2, help="processes that tokenise")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments.processes)
        return
    print(f"{'pairs':>10} {'phase':>9} {'seconds':>8} {'private MiB':>12} {'total MiB':>10} {'file MiB':>9}")
    for size in arguments.sizes:
        measure(size, arguments.processes)


def measure(size: int, processes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", size)
        command = [sys.executable, __file__, "--run", str(folder), "--processes", str(processes)]
        peaks: dict[str, tuple[float, float]] = {}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                phase = read(folder / "phase")
                private, total = usage(watched)
                before = peaks.get(phase, (0.0, 0.0))
                peaks[phase] = (max(before[0], private), max(before[1], total))
                time.sleep(0.05)
            assert process.stdout is not None
            seconds = json.loads(process.stdout.read().splitlines()[-1])
        [arrow] = folder.rglob("pairs.arrow")
        file = {
            "import": 0,
            "tokenise": (folder / "pairs.jsonl").stat().st_size,
            "epoch": arrow.stat().st_size,
        }
        for phase, taken in seconds.items():
            private, total = (amount / 2**20 for amount in peaks[phase])
            print(
                f"{size:>10} {phase:>9} {taken:>8.1f} {private:>12.0f} {total:>10.0f} "
                f"{file[phase] / 2**20:>9.0f}",
                flush=True,
            )


def usage(process: psutil.Process) -> tuple[float, float]:
    """Private and proportional memory of a process and its workers, in bytes.

    Proportional memory counts a page that several processes share once; private memory leaves out the part
    of it that mapped files make up.
    """
    private = total = 0.0
    try:
        for each in (process, *process.children(recursive=True)):
            rollup = Path(f"/proc/{each.pid}/smaps_rollup").read_text()
            fields = {line.split(":")[0]: line.split()[1] for line in rollup.splitlines()[1:]}
            total += 1024 * int(fields["Pss"])
            private += 1024 * int(fields["Pss_Anon"])
    except (psutil.Error, OSError):
        pass  # a process has just ended
    return private, total


def read(path: Path) -> str:
    return path.read_text() if path.exists() else "import"


def write_pairs(path: Path, size: int) -> None:
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(size):
            prompt, chosen, rejected = (" ".join(generator.choices(WORDS, k=20)) for _ in range(3))
            row = {"prompt": f"{number} {prompt}", "chosen": f" {chosen} yes", "rejected": f" {rejected} no"}
            file.write(json.dumps(row) + "\n")


def run(folder: Path, processes: int) -> None:
    """What is measured: tokenise, then go through one epoch."""
    seconds: dict[str, float] = {}

    def enter(phase: str) -> None:
        (folder / "phase").write_text(phase)

    start = time.perf_counter()
    from lightning_dpo.data.datamodule import PreferenceDataModule

    data = PreferenceDataModule(
        str(folder / "pairs.jsonl"),
        tokenizer=tokenizer(),
        tokens_per_batch=16384,
        num_processes=processes,
        cache_dir=str(folder),
    )
    seconds["import"] = time.perf_counter() - start
    enter("tokenise")
    start = time.perf_counter()
    data.prepare_data()
    seconds["tokenise"] = time.perf_counter() - start
    enter("epoch")
    start = time.perf_counter()
    data.setup()
    pairs = sum(len(batch) for batch in data.train_dataloader())
    seconds["epoch"] = time.perf_counter() - start
    assert pairs == data.report.kept
    print(json.dumps(seconds))


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


if __name__ == "__main__":
    main()
