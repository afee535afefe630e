from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.tune.search.variant_generator import generate_variants

from lightning_dpo.tuning import Objective, SearchSpace, SweepConfig
from lightning_dpo.tuning.search.starting_points import (
    EarlierSweep,
    StartingPoint,
    complete,
    parse_start,
    ray_config_of,
)

DPO, IPO = "lightning_dpo.losses.DPOLoss", "lightning_dpo.losses.IPOLoss"
BETA, LR, LOSS = "model.loss.beta", "model.optimizer.lr", "model.loss.class_path"
PLAIN = SearchSpace.parse({BETA: {"loguniform": [0.01, 0.5]}, LR: {"loguniform": [1e-6, 1e-4]}})
ONE, TWO = Objective.parse("m"), Objective.parse({"maximize": "a", "minimize": "b"})
CONDITIONAL = SearchSpace.parse(
    {
        LR: {"quniform": [0.0, 1.0, 0.25]},
        BETA: [
            {"uniform": [0.0, 1.0], "when": {LOSS: DPO}},
            {"uniform": [2.0, 3.0], "when": {LOSS: IPO}},
        ],
        "model.loss.label_smoothing": {"uniform": [0.0, 0.3], "when": {LOSS: DPO}},
        LOSS: {"choice": [DPO, IPO]},
        "data.batch_size": {"randint": [1, 9]},
        "model.reference": "cached",
    }
)


def parse(text: str, *, space: SearchSpace = PLAIN, objective: Objective = ONE) -> Any:
    return parse_start(yaml.safe_load(text), space=space, objective=objective)


def test_points_results_and_sweeps_stand_in_one_list() -> None:
    found = parse(
        """
        - {model.loss.beta: 0.1, model.optimizer.lr: 1.0e-5}
        - {model.loss.beta: 0.2, model.optimizer.lr: 2.0e-5, result: 0.7}
        - {sweep: outputs/earlier}
        - {sweep: outputs/other, run: 3}
        - outputs/third
        """
    )
    assert found == (
        StartingPoint({BETA: 0.1, LR: 1e-5}, None, "start_from[0]"),
        StartingPoint({BETA: 0.2, LR: 2e-5}, (0.7,), "start_from[1]"),
        EarlierSweep("outputs/earlier", None, "start_from[2]"),
        EarlierSweep("outputs/other", 3, "start_from[3]"),
        EarlierSweep("outputs/third", None, "start_from[4]"),
    )
    assert parse("outputs/earlier") == (EarlierSweep("outputs/earlier"),)
    assert parse("{sweep: outputs/earlier}") == (EarlierSweep("outputs/earlier"),)
    assert parse("null") == ()
    values = "{model.loss.beta: 0.1, model.optimizer.lr: 1.0e-5, result: {b: 3, a: 0.5}}"
    (both,) = parse(values, objective=TWO)
    assert both.result == (0.5, 3.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[{model.loss.betta: 0.1}]",
            r"`start_from\[0\]`.*'model.loss.betta'; did you mean 'model.loss.beta'",
        ),
        ("{model.loss.beta: 0.1}", "`start_from` must set every path of `space`, got none for 'model.opt"),
        ("{model.loss.beta: 0.6, model.optimizer.lr: 1.0e-5}", "beta = 0.6, which is not from 0.01 to 0.5"),
        ("{model.loss.beta: true, model.optimizer.lr: 1.0e-5}", "beta = True, which is no number"),
        ("{model.loss.beta: low, model.optimizer.lr: 1.0e-5}", "beta = 'low', which is no number"),
        ("{model.loss.beta: 0.1, model.optimizer.lr: 1.0e-5, result: good}", "finite numbers, got 'good'"),
        ("{model.loss.beta: 0.1, model.optimizer.lr: 1.0e-5, result: .nan}", "finite numbers"),
        ("{model.loss.beta: 0.1, model.optimizer.lr: 1.0e-5, result: {n: 1}}", "'m'"),
        ("{sweep: a, best: 3}", r"must be \{sweep: FOLDER\}"),
        ("{sweep: a, run: 0}", "`start_from.run` must be how many"),
        ("[3]", r"`start_from\[0\]` must be values by config path"),
    ],
)
def test_mistakes(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_point_of_a_sweep_is_checked_with_its_settings() -> None:
    with pytest.raises(ValueError, match=r"`start_from`.*which is not from 0.01 to 0.5"):
        SweepConfig(space={BETA: {"loguniform": [0.01, 0.5]}}, start_from={BETA: 1.0})
    with pytest.raises(ValueError, match="a value for each goal"):
        SweepConfig(
            space={BETA: {"choice": [1, 2]}},
            start_from={BETA: 1, "result": 0.5},
            objective={"maximize": "a", "minimize": "b"},
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({LOSS: "lightning_dpo.losses.HingeLoss"}, "which is none of"),
        ({LR: 0.3}, "which is no multiple of 0.25"),
        ({BETA: 2.5}, "which is not from 0.0 to 1.0"),
        ({LOSS: IPO, BETA: 2.5}, r"'model.loss.label_smoothing', which is varied only where"),
        ({"data.batch_size": 9}, "which is not from 1 to 8"),
        ({"data.batch_size": 2.5}, "which is no whole number"),
        ({"model.reference": "none"}, "which is none of"),
    ],
)
def test_mistakes_in_a_space_with_conditions(changes: dict[str, Any], words: str) -> None:
    good = {LOSS: DPO, BETA: 0.5, LR: 0.25, "model.loss.label_smoothing": 0.1, "data.batch_size": 8}
    assert complete(good, space=CONDITIONAL, name="p") == {**good, "model.reference": "cached"}
    with pytest.raises(ValueError, match=words):
        complete({**good, **changes}, space=CONDITIONAL, name="p")


@pytest.mark.parametrize("filled", [False, True])
def test_whatever_a_search_draws_is_a_point_and_goes_back_into_its_config(filled: bool) -> None:
    keys = set(CONDITIONAL.ray_config())
    for _ in range(50):
        _, config = next(iter(generate_variants(CONDITIONAL.ray_config())))
        drawn = CONDITIONAL.overrides(config)
        point = complete(drawn, space=CONDITIONAL, name="p")
        assert point == drawn
        again = ray_config_of(point, CONDITIONAL, filled=filled)
        assert CONDITIONAL.overrides(again) == drawn
        assert (set(again) == keys) is filled
