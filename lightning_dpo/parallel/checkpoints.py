"""Whole weights into sharded models, and what goes wrong when checkpoints are written."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

__all__ = [
    "METADATA",
    "load_full",
    "load_full_optimizer",
    "on_rank_zero",
    "unwritable",
]

_Result = TypeVar("_Result")

METADATA = "meta.pt"
"""What Lightning calls the file that holds all but tensors."""


def load_full(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> None:
    """Give each rank its part of whole weights, which every rank can read."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(module, dict(state), options=options)


def load_full_optimizer(module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Give each rank its part of an optimizer's whole state, as any strategy saves it.

    Saved parameters are known by numbers, and which number is whose depends on the strategy: their order in
    the optimizer's groups does not.
    """
    groups = state["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint's optimizer must have as many parameter groups as the one configured, got "
            f"{len(groups)} and {len(optimizer.param_groups)}"
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    name_of: dict[int | str, str] = {}
    named_groups = []
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        own = [names[id(parameter)] for parameter in group["params"]]
        name_of.update(zip(saved["params"], own, strict=True))
        named_groups.append({**saved, "params": own})
        group.update({key: value for key, value in saved.items() if key != "params"})
    if not state["state"]:
        return  # plain SGD keeps nothing
    named: Any = {
        "state": {name_of[key]: value for key, value in state["state"].items()},
        "param_groups": named_groups,
    }
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(module, optimizer, optim_state_dict=named, options=options)


def on_rank_zero(strategy: Any, task: Callable[[], _Result]) -> _Result:
    """What a task gives on rank 0, on every rank; its exception too, so that no rank is left waiting."""
    outcome: Any = None
    if strategy.is_global_zero:
        try:
            outcome = task()
        except Exception as error:
            outcome = error
    outcome = strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    result: _Result = outcome
    return result


def unwritable(target: Path, error: Exception) -> Exception:
    """The error for a checkpoint that cannot be written; the same error where writing is not its cause."""
    reason = _system_error(error)
    if reason is not None:
        number, words = reason.errno, reason.strerror
    elif isinstance(error, RuntimeError):
        # torch's writer speaks of positions in a file, and errors of other ranks come without their causes.
        free = shutil.disk_usage(target.parent).free
        number, words = errno.EIO, f"{error} ({free:,} bytes were free there)"
    else:
        return error
    return OSError(
        number,
        f"the checkpoint could not be written: {words}. Older ones are as they were. Make room, or write "
        "elsewhere (`default_root_dir` of the trainer, `dirpath` of ModelCheckpoint), and resume from the "
        "last one",
        str(target),
    )


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's own error behind one of torch's."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error
