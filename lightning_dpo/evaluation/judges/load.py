"""Judges by name: what a recipe or a command line says, as something to call."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from lightning_dpo.evaluation.judges.base import AnyJudge, is_pairwise
from lightning_dpo.evaluation.judges.classifier import ClassifierJudge

__all__ = ["load_judge"]


def load_judge(judge: str | AnyJudge) -> AnyJudge:
    """Find the judge that a name stands for; a callable is returned as it is.

    Args:
        judge: A callable; the dotted path of one, such as ``lightning_dpo.demo.grammar.true_score``, or of a
            class of judges that needs no arguments; or the folder or hub id (``org/name``) of a sequence
            classification model.

    Raises:
        ValueError: If there is nothing of that name, or it cannot judge.
    """
    found: Any = judge
    if isinstance(judge, str):
        is_model = "/" in judge or Path(judge).expanduser().is_dir()
        found = ClassifierJudge(judge) if is_model else _imported(judge)
    is_pairwise(found)  # raises where it cannot be called as a judge is
    checked: AnyJudge = found
    return checked


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    expected = (
        "`judge` must be the dotted path of a callable, such as lightning_dpo.demo.grammar.true_score, or "
        f"the folder or hub id of a sequence classification model, got {path!r}"
    )
    if not module:
        raise ValueError(f"{expected}: there is no such folder, and no module is named")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{expected}: {error}") from error
    except AttributeError:
        raise ValueError(f"{expected}: {module} has no {name!r}") from None
    if not inspect.isclass(found):
        return found
    try:
        return found()
    except TypeError as error:
        raise ValueError(
            f"`judge` must be given its arguments, {{class_path: {path}, init_args: {{…}}}}, got its name "
            f"alone: {error}"
        ) from None
