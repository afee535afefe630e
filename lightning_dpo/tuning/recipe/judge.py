"""The judge of sampled completions that a configuration names, and what a validation logs of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dpo.evaluation.judges import AnyJudge, is_pairwise, load_judge
from lightning_dpo.tuning.config_paths import class_and_arguments, import_object
from lightning_dpo.tuning.objective import SCORE, WIN_RATE

__all__ = ["judged_metrics", "make_judge"]


def make_judge(judge: str | Mapping[str, Any]) -> AnyJudge:
    """The judge that a configuration names; a model is not loaded yet.

    Args:
        judge: The import path of a function of (prompts, completions) or of (prompts, first, second), the
            folder or hub id of a reward model, or ``{class_path: ..., init_args: {...}}`` of a class of
            judges.

    Raises:
        ValueError: If it cannot be imported or called.
    """
    if isinstance(judge, str):
        return load_judge(judge)
    name, arguments = class_and_arguments(judge)
    try:
        made = import_object(name)(**arguments)
    except TypeError as error:
        raise ValueError(f"`judge` {name} does not take {arguments}: {error}") from error
    return load_judge(made)


def judged_metrics(judge: str | Mapping[str, Any] | None) -> tuple[str, ...]:
    """Names that a validation logs of completions that are judged; a judge of two gives no score.

    Args:
        judge: What a configuration names; None where none judges.

    Raises:
        ValueError: If it cannot be imported or called.
    """
    if judge is None:
        return ()
    return (WIN_RATE,) if is_pairwise(make_judge(judge)) else (SCORE, f"{SCORE}_error", WIN_RATE)
