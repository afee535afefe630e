"""Processes that stay, and run a function at once: most of a distributed test would else be imports."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from processes import process_context

__all__ = ["Ranks"]

_PATIENCE = 45.0
"""Seconds that a job may take for each rank: they share a machine's cores."""

_OF_MANY_JOBS = ("peft", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")
"""Imported before ranks are forked, so that not each of them does it."""


class Ranks:
    """A process for each rank, as a launcher such as torchrun would start them."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Callable[..., Any], **arguments: Any) -> list[Any]:
        """Call a function of an importable module on every rank; returns what each returned.

        Raises:
            RuntimeError: With the traceback of the first rank that failed.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((job, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + max(90.0, _PATIENCE * self.count)
        while len(results) + len(failures) < self.count and time.monotonic() < deadline:
            waiting = [r for r in range(self.count) if r not in results and r not in failures]
            for pipe in wait([self._pipes[rank] for rank in waiting], timeout=1.0):
                rank = self._pipes.index(pipe)
                succeeded, result = pipe.recv()
                (results if succeeded else failures)[rank] = result
            if failures:  # the other may wait for this one; give it a moment to fail by itself
                deadline = min(deadline, time.monotonic() + 2.0)
        if failures or len(results) < self.count:
            if len(failures) < self.count:
                self.stop()  # ranks that failed together go on together; these would not
            silent = [rank for rank in range(self.count) if rank not in results and rank not in failures]
            errors = [f"rank {rank}: {error}" for rank, error in failures.items()]
            raise RuntimeError("\n".join([*errors, f"no answer from ranks {silent}"] if silent else errors))
        return [results[rank] for rank in range(self.count)]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = process_context()
        if context.get_start_method() == "fork":
            for name in _OF_MANY_JOBS:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            forked = self._pipes if context.get_start_method() == "fork" else []
            arguments = (theirs, rank, self.count, port, forked)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)


def _serve(pipe: Connection, rank: int, count: int, port: int, forked: Sequence[Connection]) -> None:
    for end in forked:  # while a rank holds the tests' end of its own pipe, it cannot see them go
        end.close()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)  # of the test that first needed ranks; a strategy would go back to it
    before = dict(os.environ)
    while True:
        os.environ.clear()
        os.environ.update(before)  # a job may have left a seed there, which the next one's trainer would take
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            pipe.send((True, job(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
