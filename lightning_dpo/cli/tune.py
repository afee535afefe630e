"""The command `lightning-dpo tune`: a sweep over config paths of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

from lightning_dpo.tuning import require_ray

__all__ = ["print_help", "run", "split_arguments", "wants_help"]

_RESUME = (
    "go on with a sweep: one that was interrupted, or one that ended, which then gets more trials: --samples "
    "is the number of all of them, the earlier ones included"
)

_INTERRUPTED = 130
"""What shells call the status of a program that Ctrl-C ended."""

_DESCRIPTION = """Run a sweep over config paths of a recipe.

  lightning-dpo tune --config tuning/beta_lr.yaml --data.train pairs.jsonl
  lightning-dpo tune --config tuning/beta_lr.yaml --samples 32 --gpus 0.5 --ray_address auto
  lightning-dpo tune --config tuning/beta_lr.yaml --resume                  # after an interruption
  lightning-dpo tune --config tuning/beta_lr.yaml --resume --samples 32     # 32 trials in all
  lightning-dpo tune --config tuning/losses.yaml --name again --start_from outputs/sweeps/losses

One path of the space: --space.model.optimizer.lr '{loguniform: [1e-6, 1e-4]}'; all of it: --space '{...}'.

Any option of `lightning-dpo fit` that begins with --model, --data., --trainer or --seed_everything is laid
over the recipe.
"""


class _Formatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows types and defaults, and leaves the lines of the description as they are."""


def run(arguments: Sequence[str]) -> None:
    """Run a sweep.

    Args:
        arguments: What follows `lightning-dpo tune`.

    Raises:
        ValueError: If ray is not installed, or the sweep is not valid.
        SystemExit: With 130 if a user ended the sweep before its end.
    """
    require_ray()
    from lightning_dpo.tuning.config import SweepConfig, sweep_parser
    from lightning_dpo.tuning.results.gather import is_interrupted
    from lightning_dpo.tuning.run import sweep

    if wants_help(arguments):
        print_help(sweep_parser, command="tune", description=_DESCRIPTION, resume=_RESUME)
        return
    file, resume, others = split_arguments(arguments, command="tune")
    result = sweep(SweepConfig.from_yaml(file, arguments=others), resume=resume)
    if is_interrupted([*result.trials, *result.reruns]):
        raise SystemExit(_INTERRUPTED)


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks what there is."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def print_help(
    make_parser: Callable[..., Any],
    *,
    command: str,
    description: str,
    resume: str = "go on with a run that was interrupted",
) -> None:
    """Print the options of a command that runs what a YAML file says, and can go on with it.

    Args:
        make_parser: Of the fields that the file has.
        command: Its name.
        description: What it does, with examples.
        resume: What `--resume` does.
    """
    shown = make_parser(
        prog=f"lightning-dpo {command}",
        description=description,
        formatter_class=_Formatter,
        usage=f"lightning-dpo {command} --config FILE [--resume] [options]",
    )
    shown.add_argument("--resume", action="store_true", help=resume)
    shown.print_help()


def split_arguments(arguments: Sequence[str], *, command: str) -> tuple[str, bool, list[str]]:
    """The YAML file, whether to go on with what was begun, and all other arguments."""
    parser = argparse.ArgumentParser(prog=f"lightning-dpo {command}", allow_abbrev=False, add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--resume", action="store_true")
    known, others = parser.parse_known_args(list(arguments))
    return known.config, known.resume, others
