"""Judges of completions: what they are asked, and what becomes of answers that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_dpo.demo.grammar import true_score
from lightning_dpo.evaluation import ClassifierJudge, judge_pairs, judge_texts, load_judge
from lightning_dpo.evaluation.judges import AnyJudge, is_pairwise


def by_length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_scores_come_in_the_order_of_the_completions() -> None:
    assert judge_texts(by_length, prompts=["a", "b"], completions=["xy", "xyz"]).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("answer", [[1.0], torch.zeros(2, 1), 1.0])
def test_a_judge_of_another_shape_is_one_error(answer: object) -> None:
    with pytest.raises(ValueError, match="`judge` must give one score for each of 2 completions"):
        judge_texts(lambda prompts, completions: answer, prompts=["a", "b"], completions=["x", "y"])  # type: ignore[arg-type,return-value]


def test_a_judge_that_gives_nan_is_one_error_naming_the_completion() -> None:
    with pytest.raises(ValueError, match=r"finite scores, got nan from .* 1 of 2 completions.*'y'"):
        judge_texts(lambda prompts, completions: [1.0, math.nan], prompts=["a", "b"], completions=["x", "y"])


def test_the_true_score_of_the_embedded_task_is_a_judge() -> None:
    reviews = ["the plot felt superb .", "the plot was not very good ."]
    assert judge_texts(true_score, prompts=["", ""], completions=reviews).tolist() == [3.0, -0.75]


def prefers_first(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [1.0] * len(prompts)


def prefers_longer(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    return [float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


class ByLength:
    """A judge that needs no arguments."""

    def __call__(self, prompts: list[str], completions: list[str], scale: float = 1.0) -> list[float]:
        return [scale * each for each in by_length(prompts, completions)]


def test_pairs_are_judged_in_both_orders() -> None:
    pairs: Any = {"prompts": ["a", "b"], "first": ["xx", "x"], "second": ["x", "xx"]}
    assert judge_pairs(prefers_longer, **pairs).tolist() == [1.0, 0.0]
    assert judge_pairs(prefers_first, **pairs).tolist() == [0.5, 0.5]


def test_judges_are_told_apart_by_what_they_are_called_with() -> None:
    assert is_pairwise(prefers_first)
    assert not is_pairwise(by_length)
    assert not is_pairwise(ByLength())
    assert not is_pairwise(lambda *texts: [0.0])
    with pytest.raises(
        ValueError, match=r"`judge` must be called with \(prompts, completions\).*lambda>\(x\)"
    ):
        is_pairwise(lambda x: [0.0])
    with pytest.raises(ValueError, match="`judge` must be callable, got int"):
        is_pairwise(3)


@pytest.mark.parametrize("answer", [[1.5], [-0.1]])
def test_a_preference_that_is_no_probability_is_one_error(answer: list[float]) -> None:
    with pytest.raises(ValueError, match="`judge` must say how likely the first answer is better"):
        judge_pairs(lambda prompts, first, second: answer, prompts=["a"], first=["x"], second=["y"])


def test_what_is_no_list_of_numbers_is_one_error() -> None:
    with pytest.raises(ValueError, match="`judge` must give one score for each of 1 completions, got str"):
        judge_texts(lambda prompts, completions: "good", prompts=["a"], completions=["x"])  # type: ignore[arg-type,return-value]


def test_judges_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_judge("lightning_dpo.demo.grammar.true_score") is true_score
    assert load_judge(by_length) is by_length
    (tmp_path / "my_judges.py").write_text(
        "class NoArguments:\n    def __call__(self, prompts, completions):\n        return [0.0, 0.0]\n"
        "class Arguments(NoArguments):\n    def __init__(self, model):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_pairwise(load_judge("my_judges.NoArguments"))
    with pytest.raises(ValueError, match=r"`judge` must be given its arguments, \{class_path: my_judges.Arg"):
        load_judge("my_judges.Arguments")
    with pytest.raises(ValueError, match=r"got 'my_judges\.Nope': my_judges has no 'Nope'"):
        load_judge("my_judges.Nope")
    with pytest.raises(ValueError, match=r"got 'not_there\.judge': No module named 'not_there'"):
        load_judge("not_there.judge")
    with pytest.raises(ValueError, match="got 'judge': there is no such folder, and no module is named"):
        load_judge("judge")


def test_folders_and_hub_ids_are_models() -> None:
    judge = load_judge("some-org/some-reward-model")
    assert isinstance(judge, ClassifierJudge)
    assert judge.model == "some-org/some-reward-model"


class Monitored:
    def __init__(self, judge: str | AnyJudge | None = None) -> None:
        self.judge = judge


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("lightning_dpo.demo.grammar.true_score", str),
        ("org/name", str),
        ("lightning_dpo.evaluation.ClassifierJudge", ClassifierJudge),
    ],
)
def test_a_recipe_can_name_them(given: str, kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Monitored, "monitor")
    more = ["--monitor.judge.model=org/name"] if kind is ClassifierJudge else []
    config = parser.parse_args([f"--monitor.judge={given}", *more])
    assert isinstance(parser.instantiate(config).monitor.judge, kind)
    assert given in parser.dump(config)
