"""Results of sweeps that never ran, as a report sees them; the numbers are the same each time."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_dpo.tuning.objective import Goal, Objective
from lightning_dpo.tuning.results.comparison import compare
from lightning_dpo.tuning.results.ranking import rank
from lightning_dpo.tuning.results.result import SweepResult
from lightning_dpo.tuning.trial.outcomes import PairOutcomes
from lightning_dpo.tuning.trial.record import TrialRecord

ACCURACY, KL = "val/rewards/accuracy", "val/kl"
STEPS, EVERY = 320, 40
LOSSES = ("DPOLoss", "IPOLoss", "KTOLoss")
RECIPE = """# The best trial.
model:
  policy: HuggingFaceTB/SmolLM2-135M-Instruct
  loss:
    class_path: lightning_dpo.losses.DPOLoss
    init_args: {beta: 0.1}  # "quoted" <and> & escaped
""" + "".join(f"trainer_option_{number}: {number}\n" for number in range(40))
REASONS = {
    "diverged": "the training loss is not finite at step 40",
    "out of memory": "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total of 79.1 GiB",
    "failed": "RuntimeError: <script>alert('a mistake of one's own')</script> " + "in a long line " * 8,
}


def made_up(location: str, *, trials: int = 60, kl: bool = True, wide: bool = True) -> SweepResult:
    """A sweep over beta and the learning rate.

    Args:
        location: Its folder.
        trials: How many.
        kl: Whether the KL was measured, and minimised.
        wide: Vary the loss and parameters of some losses as well, and let some trials go wrong.
    """
    draw = random.Random(0)
    records = [_trial(number, draw, kl=kl, wide=wide) for number in range(trials)]
    goals = (Goal(ACCURACY, "max"), Goal(KL, "min")) if kl else (Goal(ACCURACY, "max"),)
    objective = Objective(goals)
    return SweepResult(
        location=location,
        objective=objective,
        trials=rank(records, objective),
        reference_passes=1,
        seconds=46.0 * trials,
        settings={"scheduler": "asha", "samples": trials, "objective": [goal.metric for goal in goals]},
        environment={"torch": "2.13.0", "python": "3.11.7", "machines": [{"CPU": 16, "GPU": 1}]},
        recipe=RECIPE,
    )


def _trial(number: int, draw: random.Random, *, kl: bool, wide: bool) -> TrialRecord:
    beta, lr = math.exp(draw.uniform(math.log(0.01), math.log(0.5))), 10 ** draw.uniform(-6, -4)
    overrides: dict[str, Any] = {"model.loss.beta": beta, "model.optimizer.lr": lr}
    if wide:
        loss = draw.choice(LOSSES)
        overrides = {"model.loss.class_path": f"lightning_dpo.losses.{loss}", **overrides}
        if loss == "DPOLoss":
            overrides["model.loss.label_smoothing"] = draw.choice([0.0, 0.1, 0.2])
        if loss == "KTOLoss":
            overrides["model.loss.weight_of_undesirable_completions"] = draw.uniform(0.5, 2)
    quality = 0.78 - 0.06 * (math.log10(lr) + 4.9) ** 2 - 0.05 * (math.log10(beta) + 1) ** 2
    quality += draw.gauss(0, 0.012)
    distance = 40 * (lr / 1e-4) ** 0.8 * (0.05 / beta) ** 0.7 * math.exp(draw.gauss(0, 0.2))
    status, last = "finished", STEPS
    if wide and number % 12 == 5:
        status, last = draw.choice([("diverged", EVERY), ("out of memory", 0), ("failed", EVERY)])
    elif quality < 0.74 and number:
        status, last = "stopped", draw.choice([EVERY, EVERY, 2 * EVERY, 4 * EVERY])
    history = []
    for step in range(EVERY, last + 1, EVERY):
        share = 1 - math.exp(-3 * step / STEPS)
        entry = {
            ACCURACY: 0.5 + (quality - 0.5) * share + draw.gauss(0, 0.004),
            "val/logratio/margin": 3 * share * (quality - 0.5),
            **({KL: distance * share, "val/kl_error": distance * share * 0.04} if kl else {}),
            **{"step": step, "epoch": 0, "total_steps": STEPS, "seconds": step / 8, "startup_seconds": 0.2},
        }
        history.append(entry)
    return TrialRecord(
        id=f"79493_{number:05d}",
        overrides=overrides,
        status=status,
        reason=REASONS.get(status, ""),
        history=tuple(history),
        starts=2 if number == 3 else 1,
        total_steps=STEPS if history else 0,
        startup_seconds=0.15 + 0.01 * number,
    )


def compared(result: SweepResult, *, pairs: int = 400) -> SweepResult:
    """The sweep with comparisons of its trials, each of which finds some pairs more easily than others."""
    draw = np.random.default_rng(0)
    ease = draw.uniform(size=pairs)
    outcomes = {}
    for trial in result.trials:
        if trial.is_ranked:
            values = (trial.metrics[ACCURACY] + draw.normal(0, 0.1, pairs) > ease).astype(float)
            keys = np.arange(pairs, dtype=np.uint64)
            outcomes[trial.id] = [PairOutcomes(keys, values, np.ones(pairs))]
    comparisons = compare(outcomes, goal=result.objective.primary, confidence=0.95)
    return replace(result, comparisons=comparisons)
