"""Grid and random search, asked for trials as Tune asks, without a cluster."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import pytest
from ray.tune.experiment import Experiment
from ray.tune.search import BasicVariantGenerator

from lightning_dpo.tuning import Objective, SearchSpace
from lightning_dpo.tuning.search.searchers import make_searcher, ray_space, trials_of
from lightning_dpo.tuning.search.starting_points import Start, StartingPoint

BETA, LR = "model.loss.beta", "model.optimizer.lr"
DRAWN = SearchSpace.parse({BETA: {"loguniform": [0.01, 0.5]}, LR: {"loguniform": [1e-6, 1e-4]}})
GRID = SearchSpace.parse({BETA: {"grid": [0.1, 0.2, 0.3]}, LR: {"grid": [1e-6, 1e-5]}})
MIXED = SearchSpace.parse({BETA: {"grid": [0.1, 0.2]}, LR: {"loguniform": [1e-6, 1e-4]}})
ONE = Objective.parse("m")


def train(config: dict[str, Any]) -> None:
    """Is never run."""


def asked(searcher: BasicVariantGenerator, space: dict[str, Any], samples: int) -> list[Any]:
    """The trials that Tune would run, one after the other."""
    trials = []
    with TemporaryDirectory() as folder:
        experiment = Experiment("x", train, config=space, num_samples=samples, storage_path=folder)
        searcher.add_configurations([experiment])
        while (trial := searcher.next_trial()) is not None:
            trials.append(trial)
            searcher.on_trial_complete(trial.trial_id)
    assert searcher.is_finished()
    return trials


def values(
    space: SearchSpace, *, samples: int, choice: str = "random", start: Start | None = None, **options: Any
) -> list[dict[str, Any]]:
    start = start or Start()
    searcher = make_searcher(choice, space=space, objective=ONE, seed=3, start=start, **options)
    return [space.overrides(t.config) for t in asked(searcher, ray_space(choice, space, start), samples)]


def test_draws_are_those_of_rays_own_generator() -> None:
    expected = asked(BasicVariantGenerator(random_state=3), DRAWN.ray_config(), 6)
    assert values(DRAWN, samples=6) == [DRAWN.overrides(trial.config) for trial in expected]


@pytest.mark.parametrize(("space", "samples"), [(DRAWN, 6), (GRID, 2), (MIXED, 3)])
def test_what_goes_on_is_what_would_have_run_at_once(space: SearchSpace, samples: int) -> None:
    at_once = values(space, samples=samples)
    total = trials_of("random", space, samples=samples, start=Start())
    assert len(at_once) == total
    for had in (1, total // 2, total):
        rest = values(space, samples=samples, done=at_once[:had], limit=total - had)
        assert rest == at_once[had:]


def test_names_go_on_counting() -> None:
    first = make_searcher("random", space=DRAWN, objective=ONE, seed=3)
    had = asked(first, DRAWN.ray_config(), 3)
    done = [DRAWN.overrides(trial.config) for trial in had]
    more = make_searcher("random", space=DRAWN, objective=ONE, seed=3, done=done, limit=2)
    rest = asked(more, DRAWN.ray_config(), 5)
    assert [t.trial_id[-5:] for t in (*had, *rest)] == ["00000", "00001", "00002", "00003", "00004"]


def test_with_another_seed_no_more_run_than_are_missing() -> None:
    done = values(DRAWN, samples=4)
    searcher = make_searcher("random", space=DRAWN, objective=ONE, seed=4, done=done, limit=2)
    rest = [DRAWN.overrides(trial.config) for trial in asked(searcher, DRAWN.ray_config(), 6)]
    assert len(rest) == 2
    assert all(one not in done for one in rest)


def test_points_take_the_place_of_the_first_draws() -> None:
    points = [{BETA: 0.1, LR: 1e-5}, {BETA: 0.2, LR: 2e-5}]
    start = Start(tuple(StartingPoint(point) for point in points))
    found = values(DRAWN, samples=5, start=start)
    assert found[:2] == points
    assert found[2:] == values(DRAWN, samples=3)
    assert trials_of("random", DRAWN, samples=5, start=start) == len(found) == 5
    rest = values(DRAWN, samples=7, start=start, done=found, limit=2)
    assert rest == values(DRAWN, samples=5)[3:]


def test_points_of_a_grid_come_first_and_once() -> None:
    point = {BETA: 0.3, LR: 1e-6}
    start = Start((StartingPoint(point),))
    found = values(GRID, samples=1, choice="grid", start=start)
    assert found[0] == point
    assert sorted(map(repr, found)) == sorted(map(repr, values(GRID, samples=1, choice="grid")))
    assert trials_of("grid", GRID, samples=1, start=start) == 6


def test_a_point_beside_a_grid_that_is_partly_drawn_is_one_more() -> None:
    point = {BETA: 0.2, LR: 5e-5}
    start = Start((StartingPoint(point),))
    found = values(MIXED, samples=1, start=start)
    assert found[0] == point
    assert [one[BETA] for one in found] == [0.2, 0.1, 0.2]
    assert trials_of("random", MIXED, samples=1, start=start) == 3


def test_what_tune_saves_goes_on(tmp_path: Any) -> None:
    at_once = values(DRAWN, samples=6)
    first = make_searcher("random", space=DRAWN, objective=ONE, seed=3, done=at_once[:2], limit=4)
    space, folder = DRAWN.ray_config(), str(tmp_path / "ray")
    first.add_configurations([Experiment("x", train, config=space, num_samples=6, storage_path=folder)])
    assert DRAWN.overrides(first.next_trial().config) == at_once[2]
    first.save_to_dir(str(tmp_path), "now")
    again = make_searcher("random", space=DRAWN, objective=ONE, seed=3)
    again.restore_from_dir(str(tmp_path))
    rest = []
    while (trial := again.next_trial()) is not None:
        rest.append(DRAWN.overrides(trial.config))
    assert rest == at_once[3:]
