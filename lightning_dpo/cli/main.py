"""The command `lightning-dpo`: which commands there are, and how their errors are told."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from lightning_dpo import __version__
from lightning_dpo.cli.terminal import quiet_libraries

__all__ = ["main"]


class Command(NamedTuple):
    """A command; the module `lightning_dpo.cli.NAME` has its function `run`, imported when it is called.

    Attributes:
        summary: What it does, in one line.
        example: How it is called.
    """

    summary: str
    example: str


_COMMANDS = {
    "fit": Command(
        "train on preference pairs",
        "lightning-dpo fit --config configs/smollm2_dpo.yaml --data.train pairs.jsonl",
    ),
    "validate": Command(
        "accuracy on held-out pairs",
        "lightning-dpo validate --config … --ckpt_path last.ckpt",
    ),
    "precompute": Command(
        "compute what `--model.reference cached` needs, ahead of training",
        "lightning-dpo precompute --config configs/smollm2_dpo.yaml --data.train pairs.jsonl",
    ),
    "tune": Command(
        "search beta, learning rate and loss with Ray Tune",
        "lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl",
    ),
    "frontier": Command(
        "methods beside each other: reward against KL, and the best there is",
        "lightning-dpo frontier --config tuning/frontier.yaml",
    ),
    "report": Command(
        "write the report of a sweep anew",
        "lightning-dpo report outputs/sweeps/beta_lr",
    ),
    "export": Command(
        "from a checkpoint to a model folder",
        "lightning-dpo export --checkpoint last.ckpt --output model/",
    ),
    "compare": Command(
        "win rate of a policy against its reference, before a judge",
        "lightning-dpo compare --checkpoint last.ckpt --data pairs.jsonl --judge my_module.judge",
    ),
    "realign": Command(
        "a trained policy at other KLs, without training again",
        "lightning-dpo realign --checkpoint last.ckpt --data pairs.jsonl --scales 0.5 1 2",
    ),
    "plan": Command(
        "memory of each device under each strategy, and the time of a step",
        "lightning-dpo plan --model 8b --gpus 8 --gpu_memory 80",
    ),
    "demo": Command(
        "a sweep over the embedded task: no download, no GPU",
        "lightning-dpo demo; one training run: lightning-dpo demo --beta 0.1",
    ),
}

_PACKAGE = Path(__file__).parents[1]


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Command line without the program's name; by default the process's.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), end="")
        return
    if arguments[0] == "--version":
        print(f"lightning-dpo {__version__}")
        return
    try:
        _run(arguments[0], arguments[1:])
    except ValueError as error:
        ours = _our_error(error)
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(name: str, arguments: Sequence[str]) -> None:
    if name not in _COMMANDS:
        near = difflib.get_close_matches(name, _COMMANDS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the command must be one of {', '.join(_COMMANDS)}, got {name!r}{meant}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # where a project's own modules are, for `class_path`
    with quiet_libraries():
        command = import_module(f"lightning_dpo.cli.{name}")
    with quiet_libraries():  # anew, since libraries put filters of their own before these when imported
        command.run(arguments)


def _help() -> str:
    lines = [
        f"  {name:<10} {each.summary}\n             {each.example}\n" for name, each in _COMMANDS.items()
    ]
    return (
        "usage: lightning-dpo COMMAND [options]\n\n"
        "Direct Preference Optimization for PyTorch Lightning.\n\n"
        f"commands:\n{''.join(lines)}\n"
        "`lightning-dpo COMMAND --help` lists the options of one; `--print_config` shows the complete\n"
        "configuration of `fit`, `validate` or `precompute`; `--version` says which version this is.\n"
    )


def _our_error(error: BaseException) -> BaseException | None:
    """What this package raised to tell the user something, alone or within the parser's own error.

    Then a traceback only hides it; an error from anywhere else keeps its traceback.
    """
    link: BaseException | None = error
    while link is not None:
        frames = traceback.extract_tb(link.__traceback__)
        if isinstance(link, ValueError) and Path(frames[-1].filename).is_relative_to(_PACKAGE):
            return link
        link = link.__cause__ or link.__context__
    return None
