from __future__ import annotations

from typing import Any

import pytest

from lightning_dpo.tuning.frontier.methods import folder_name, parse_methods, pick_methods

BETA = {"model.loss.beta": [0.1, 0.4]}
DPO: dict[str, Any] = {"strength": BETA}


def test_the_three_kinds() -> None:
    methods = parse_methods(
        {
            "DPO": {**DPO, "overrides": {"model.loss.label_smoothing": 0.1}},
            "best-of-N": {"best_of": [2, 8]},
            "family": {"realign": "DPO", "at": 0.4, "scales": [0.5, 2]},
        }
    )
    dpo, best, family = methods.values()
    assert (dpo.values, dpo.label) == ((0.1, 0.4), "β")
    assert (best.values, best.label) == ((2, 8), "N")
    assert best.samples_per_prompt == 16
    assert (family.of, family.values, family.label) == ("DPO", (0.5, 2), "λ")


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({}, "`methods`"),
        ({"DPO": {}}, "strength, best_of, realign"),
        ({"DPO": "dpo"}, "strength, best_of, realign"),
        ({"DPO": {"strength": BETA, "best_of": [2]}}, "one of"),
        ({"DPO": {"strength": {}}}, "must be a config path with its values"),
        ({"DPO": {"strength": {"a": [1, 2], "b": [2]}}}, "`b` of 'DPO' must be a list of 2 values"),
        ({"DPO": {"strength": {"a": [1, 2], "b": 0.1}}}, "`b` of 'DPO' must be a list of 2 values"),
        ({"DPO": {"strength": {"model.loss.beta": 0.1}}}, "list of different numbers"),
        ({"DPO": {"strength": {"model.loss.beta": [0.1, 0.1]}}}, "list of different numbers"),
        ({"DPO": {**DPO, "overides": {}}}, "did you mean 'overrides'"),
        ({"b": {"best_of": [1]}}, "from 2 to"),
        ({"b": {"best_of": [8], "samples_per_prompt": 4}}, "from 2 to"),
        ({"DPO": DPO, "f": {"realign": "IPO", "at": 0.1, "scales": [1]}}, "one of DPO, got 'IPO'"),
        ({"DPO": DPO, "f": {"realign": "DPO", "at": 3, "scales": [1]}}, "0.1, 0.4, got 3"),
        ({"DPO": DPO, "f": {"realign": "DPO", "at": 0.1, "scales": [0]}}, "above 0"),
        ({"DPO": DPO, "f": {"realign": "DPO", "at": 0.1}}, "got no scales"),
        ({"DPO": DPO, "dpo": DPO}, "differ in more than signs"),
    ],
)
def test_a_wrong_entry_is_named(entries: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_methods(entries)


def test_n_may_be_larger_where_the_samples_of_the_limit_tell_it() -> None:
    entries = {"b": {"best_of": [4, 2000], "samples_per_prompt": 8}}
    with pytest.raises(ValueError, match="with `limit_fits` or `limit_policies`"):
        parse_methods(entries)
    assert parse_methods(entries, any_n=True)["b"].values == (4, 2000)


def test_some_of_the_methods() -> None:
    methods = parse_methods({"DPO": DPO, "IPO": DPO, "f": {"realign": "DPO", "at": 0.1, "scales": [0.5]}})
    assert list(pick_methods(methods, ["f", "DPO"])) == ["DPO", "f"]
    with pytest.raises(ValueError, match="did you mean 'IPO'"):
        pick_methods(methods, ["IPPO"])
    with pytest.raises(ValueError, match="must name 'DPO' too"):
        pick_methods(methods, ["f"])


def test_names_of_folders() -> None:
    assert folder_name("PPO (learned reward)") == "ppo-learned-reward"
    assert folder_name("χPO") == "χpo"
