"""Peak memory of each process: one process, then FSDP2 over two, with the same model and batch.

    python -m benchmarks.fsdp_memory [--hidden 1024] [--layers 12] [--vocabulary 8000]

Prints each rank's memory after loading, and its peaks while loading and over the run, beyond what imports
take. Counted is memory of the process's own, sampled; pages of the model file are not, of which one process
alone keeps its policy in until the first step changes it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_GIB = 2**30


def run(folder: str, *, processes: int) -> None:
    """Train a few steps in this process and print its memory."""
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader

    from lightning_dpo import DPOModule, PairBatch
    from lightning_dpo.parallel import FSDP2Strategy
    from lightning_dpo.types import TokenPair

    torch.set_num_threads(1)
    marks = {"imports": _own_memory()}
    peak = _Peak()

    class Marking(pl.Callback):
        def on_train_start(self, *_: object) -> None:
            marks["loaded"] = _own_memory()
            marks["loaded_peak"] = peak.bytes

    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 1000, (length,), generator=generator).tolist()

    batches = [PairBatch.from_pairs([TokenPair(ids(24), ids(12), ids(12))]) for _ in range(3)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=FSDP2Strategy() if processes > 1 else "auto",
        callbacks=[Marking()],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(DPOModule(folder), DataLoader(batches, batch_size=None))
    marks["peak"] = peak.bytes
    print("MEMORY " + json.dumps({"rank": trainer.global_rank, **marks}), flush=True)


def launch(folder: str, *, processes: int) -> list[dict[str, float]]:
    """Measure in fresh processes; one line of numbers for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        if processes > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "memory",
            }
        command = [sys.executable, __file__, "--run", folder, "--processes", str(processes)]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [child.communicate(timeout=600)[0] for child in children]
    lines = [line for text in outputs for line in text.splitlines() if line.startswith("MEMORY ")]
    return [json.loads(line.removeprefix("MEMORY ")) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--run")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.run:
        run(options.run, processes=options.processes)
        return
    with tempfile.TemporaryDirectory() as folder:
        size = _make_model(folder, options)
        print(f"{size / 1e6:.0f}M parameters, {4 * size / _GIB:.2f} GiB in float32")
        for processes in (1, 2):
            began = time.perf_counter()
            for marks in launch(folder, processes=processes):
                own = {k: (v - marks["imports"]) / _GIB for k, v in marks.items() if k != "rank"}
                print(
                    f"{processes} processes, rank {marks['rank']:.0f}: after loading {own['loaded']:.2f} GiB "
                    f"(peak {own['loaded_peak']:.2f}), peak of the run {own['peak']:.2f} GiB"
                )
            print(f"  {time.perf_counter() - began:.0f} s")


def _make_model(folder: str, options: argparse.Namespace) -> int:
    import transformers as hf

    hidden, layers = options.hidden, options.layers
    config = hf.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
    )
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this benchmark reads /proc, which Linux has")


class _Peak:
    """The most memory seen, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, _own_memory())
            time.sleep(0.005)


if __name__ == "__main__":
    main()
