"""A process that is asked again and again: its imports are paid for once, and its end is nobody else's."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = ["FailedTurnError", "Worker"]


class FailedTurnError(Exception):
    """What was asked of a worker did not come to an end; its text is one line."""


class Worker:
    """A fresh Python process that calls functions, one at a time, and keeps what they print in a file.

    Between calls it holds nothing on a GPU but CUDA's own context.
    """

    def __init__(self, *, log: Path, modules: Sequence[str] = (), threads: int | None = None) -> None:
        """Start it; it goes on importing while nothing is asked.

        Args:
            log: Where what it prints goes, behind what is there.
            modules: What to import before anything is asked; what is missing is passed over.
            threads: Of torch on the CPU; None is torch's own number.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log), tuple(modules), threads))
        self._process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """Call a function there.

        Args:
            function: One that can be imported.
            arguments: Its arguments, which must pickle, as must what it returns.
            timeout: Seconds to wait.

        Raises:
            FailedTurnError: If it raised, took too long, or its process came to an end.
        """
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(timeout):
                raise FailedTurnError(f"no answer within {timeout:.0f} s")
            answer, problem = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise FailedTurnError(f"its process ended with code {self._process.exitcode}") from error
        if problem:
            raise FailedTurnError(problem)
        return answer

    def close(self) -> None:
        """Let it end by itself, which it does between calls; one that hangs is killed."""
        self._connection.close()
        self._process.join(2)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, log: str, modules: tuple[str, ...], threads: int | None) -> None:
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if threads is not None:
        torch.set_num_threads(threads)
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        answer, problem = None, ""
        try:
            answer = function(*arguments)
        except BaseException as error:
            traceback.print_exc()
            first = str(error).strip().splitlines()
            problem = f"{type(error).__name__}: {first[0] if first else 'no message'}"
        sys.stdout.flush()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        connection.send((answer, problem))
