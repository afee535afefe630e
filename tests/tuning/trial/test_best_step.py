"""The best step of a trial: chosen on one half of the pairs, and not praised for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trial_jobs
from numpy.typing import NDArray
from sweep_project import make_project
from trial_jobs import run_in, share, spec_of

from lightning_dpo.tuning.objective import Goal
from lightning_dpo.tuning.storage import Storage
from lightning_dpo.tuning.trial.best_step import BestStep, KeptStep, chooses, ranking_half
from lightning_dpo.tuning.trial.checkpoints import CHECKPOINT, CheckpointPlan
from lightning_dpo.tuning.trial.outcomes import PairOutcomes, kept_outcomes, load_outcomes
from lightning_dpo.tuning.trial.record import TrialRecord
from lightning_dpo.tuning.trial.report_callback import DivergedError

METRIC = "val/rewards/accuracy"
UP = Goal(METRIC, "max")


def _keys(random: np.random.Generator, pairs: int) -> NDArray[np.uint64]:
    return random.integers(0, 2**64, pairs, dtype=np.uint64)


def _followed(keys: NDArray[np.uint64], validations: NDArray[np.float64]) -> KeptStep:
    """The step that is kept of a trial with these outcomes, (validations, pairs)."""
    best = BestStep(UP)
    for step, values in enumerate(validations):
        best.consider(PairOutcomes(keys, values, np.ones(len(keys)), step), {"step": step})
    assert best.kept is not None
    return best.kept


MEAN_OF_LARGEST = {4: 1.02938, 8: 1.42360, 16: 1.76599}
"""The mean of the largest of so many standard normal numbers (https://doi.org/10.1093/biomet/48.1-2.151)."""


class TestBias:
    """Trials whose true accuracies are known, with an outcome for each pair drawn from them."""

    SWEEPS, PAIRS = 3000, 400

    def _errors(self, truths: NDArray[np.float64], *, shared: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """Estimate less truth, of the naive best validation and of the kept step, each (sweeps,).

        Args:
            truths: The true accuracy at each validation.
            shared: Share of pairs whose outcome a trial decides once for all its validations.
        """
        random = np.random.default_rng(0)
        naive, kept = [], []
        for _ in range(self.SWEEPS):
            keys = _keys(random, self.PAIRS)
            luck = random.uniform(size=(len(truths), self.PAIRS))
            luck = np.where(random.uniform(size=self.PAIRS) < shared, luck[:1], luck)
            outcomes = (luck < truths[:, None]).astype(float)
            means = outcomes.mean(axis=1)
            naive.append(means.max() - truths[means.argmax()])
            found = _followed(keys, outcomes)
            kept.append(found.ranking - truths[found.step])
        return np.array(naive), np.array(kept)

    @pytest.mark.parametrize(
        ("count", "shared"),
        [
            (4, 0.0),
            (4, 0.75),
            (8, 0.75),
            (16, 0.0),
            pytest.param(8, 0.0, marks=pytest.mark.heavy),
            pytest.param(16, 0.75, marks=pytest.mark.heavy),
        ],
    )
    def test_equally_good_steps(self, count: int, shared: float) -> None:
        truth = 0.7
        naive, kept = self._errors(np.full(count, truth), shared=shared)
        # What all validations share moves them together, and so does not help to choose.
        spread = math.sqrt(truth * (1 - truth) * (1 - shared) / self.PAIRS)
        expected = MEAN_OF_LARGEST[count] * spread
        assert naive.mean() == pytest.approx(expected, rel=0.08)
        error = kept.std() / math.sqrt(self.SWEEPS)
        assert abs(kept.mean()) < 4 * error < expected / 4

    def test_a_trial_that_peaks_in_the_middle(self) -> None:
        truths = np.array([0.55, 0.62, 0.68, 0.71, 0.72, 0.71, 0.68, 0.64])
        naive, kept = self._errors(truths, shared=0.5)
        error = kept.std() / math.sqrt(self.SWEEPS)
        assert naive.mean() > 8 * error
        assert abs(kept.mean()) < 4 * error

    def test_the_choice_is_worth_having(self) -> None:
        """What is kept is better, in truth, than the last step of a trial that peaked."""
        truths = np.array([0.55, 0.68, 0.72, 0.68, 0.60])
        random = np.random.default_rng(1)
        chosen = []
        for _ in range(300):
            outcomes = (random.uniform(size=(5, self.PAIRS)) < truths[:, None]).astype(float)
            chosen.append(truths[_followed(_keys(random, self.PAIRS), outcomes).step])
        assert np.mean(chosen) > 0.7


def test_halves_are_halves_by_chance_and_the_same_in_any_order() -> None:
    keys = _keys(np.random.default_rng(0), 10_000)
    chosen = chooses(keys)
    assert abs(chosen.mean() - 0.5) < 0.02
    assert (chooses(keys[::-1]) == chosen[::-1]).all()
    outcomes = PairOutcomes(keys, np.arange(10_000.0), np.ones(10_000), 3)
    half = ranking_half(outcomes)
    assert set(half.keys.tolist()) == set(keys[~chosen].tolist())
    assert half.step == 3


def test_ranks_add_up_and_weights_count() -> None:
    keys = np.array([0, 1, 2, 3, 4, 5], np.uint64)  # even ones choose
    values, weights = np.array([1.0, 0, 0, 1, 1, 1]), np.array([1.0, 2, 2, 1, 1, 1])
    shares = [PairOutcomes(keys[part], values[part], weights[part]) for part in (slice(0, 2), slice(2, 6))]
    sums: list[torch.Tensor] = []
    BestStep(UP).consider(shares[1], {"step": 1}, total=lambda tensor: sums.append(tensor) or torch.ones(6))
    best = BestStep(UP)
    assert best.consider(shares[0], {"step": 4, "val/kl": 2.0}, total=lambda tensor: tensor + sums[0])
    assert best.kept == KeptStep(4, METRIC, 0.5, 0.5, 3, 3, report={"step": 4, "val/kl": 2.0})
    assert best.kept.metrics == {"step": 4, "val/kl": 2.0, METRIC: 0.5}


def test_of_equal_steps_the_first_is_kept_and_less_may_be_better() -> None:
    keys = np.array([0, 1], np.uint64)
    best = BestStep(Goal("val/loss", "min"))
    losses = [3.0, 2.0, 2.0, 2.5]
    found = [
        best.consider(PairOutcomes(keys, np.array([v, 9.0]), np.ones(2)), {"step": s})
        for s, v in enumerate(losses)
    ]
    assert found == [True, True, False, False]
    assert best.kept is not None
    assert (best.kept.step, best.kept.ranking) == (1, 9.0)


@pytest.mark.parametrize("keys", [None, [2, 4, 6]])
def test_a_half_without_pairs_is_refused(keys: list[int] | None) -> None:
    outcomes = None if keys is None else PairOutcomes(np.array(keys, np.uint64), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=f"each of some validation pairs, got {0 if keys is None else 3}"):
        BestStep(UP).consider(outcomes, {"step": 2})


def test_a_record_with_a_kept_step_is_read_again(tmp_path: Path) -> None:
    totals = {"total_steps": 6, "startup_seconds": 0.1, "reference_passes": 0}
    kept = KeptStep(2, METRIC, 0.9, 0.7, 10, 12, "1_000002.weights", {METRIC: 0.8, "step": 2, "val/kl": 1.0})
    record = TrialRecord("a", {}).restarted().reported({METRIC: 0.8, "step": 2, **totals}, kept=kept)
    record = record.reported({METRIC: 0.6, "step": 4, **totals})
    record.save(Storage(tmp_path))
    assert TrialRecord.load(Storage(tmp_path), "a") == record
    assert (record.step, record.model_step, record.last[METRIC]) == (4, 2, 0.6)
    assert record.metrics == {METRIC: 0.7, "step": 2, "val/kl": 1.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


def _spec(project: Path, location: Path, **fields: Any) -> Any:
    """A trial of eight reports, of the pairs that it trains on; it learns until step 9, then forgets all."""
    witness = {"class_path": "trial_jobs.Witness", "init_args": {"forget_at": 9}}
    overrides = {
        "trainer.max_epochs": 1,
        "data.validation": str(project / "pairs.jsonl"),
        "data.validation_split": None,
        "model.optimizer.lr": 3e-3,
    }
    spec = spec_of(
        project, location, callbacks=(witness,), overrides={**overrides, "data.batch_size": 2}, **fields
    )
    return replace(spec, keeps_best=True)


@pytest.mark.slow
def test_a_trial_that_peaks_keeps_that_step(project: Path, tmp_path: Path) -> None:
    trial_jobs.validated.clear()
    plan = CheckpointPlan(full_state_every=0)
    outcome, record = run_in(_spec(project, tmp_path, checkpoint_plan=plan))
    assert outcome.status == "finished", outcome
    assert record.kept is not None
    # The same choice, from what was seen of each pair.
    choosing = {step: share(found, half=0) for step, _, found in trial_jobs.validated}
    expected = max(choosing, key=lambda step: (choosing[step], -step))
    assert record.model_step == expected < 9 < record.step
    assert choosing[expected] > choosing[record.step] == 0.5
    weights, found = next((w, f) for step, w, f in trial_jobs.validated if step == expected)
    assert record.kept.choosing == choosing[expected]
    assert record.metrics[METRIC] == share(found, half=1)
    assert record.kept.choosing_pairs + record.kept.ranking_pairs == len(found) == 32
    # Its weights are there, and those of the last report.
    names = sorted(path.name for path in (tmp_path / "checkpoints/t").iterdir())
    assert names == [f"1_{expected:06d}.weights", f"1_{record.step:06d}.weights"]
    assert record.checkpoint == str(tmp_path / "checkpoints/t" / names[0])
    saved = torch.load(Path(record.checkpoint) / CHECKPOINT, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"policy.{name}"], value) for name, value in weights.items())
    outcomes = load_outcomes(Storage(tmp_path / "outcomes"), kept_outcomes("t", expected), step=expected)
    assert outcomes is not None
    assert dict(zip(outcomes.keys.tolist(), outcomes.values, strict=True)) == {
        key: value for key, value in found.items() if key % 2
    }


@pytest.mark.slow
def test_a_trial_that_goes_on_still_knows_its_best_step(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = CheckpointPlan(full_state_every=2)
    _, whole = run_in(_spec(project, tmp_path / "whole", checkpoint_plan=plan))
    assert whole.kept is not None
    own = trial_jobs.Remember.on_train_batch_start

    def fail(self: Any, trainer: Any, *rest: Any) -> None:
        own(self, trainer, *rest)
        if trainer.global_step == 15:
            raise DivergedError("as if killed")

    monkeypatch.setattr(trial_jobs.Remember, "on_train_batch_start", fail)
    _, record = run_in(_spec(project, tmp_path / "cut", checkpoint_plan=plan))
    monkeypatch.undo()
    outcome, record = run_in(_spec(project, tmp_path / "cut", checkpoint_plan=plan), record)
    assert (outcome.status, record.starts) == ("finished", 2)
    assert record.kept is not None
    assert (record.kept.step, record.kept.ranking) == (whole.kept.step, whole.kept.ranking)
    assert Path(str(record.checkpoint), CHECKPOINT).is_file()
