"""Win rates with their uncertainty: how often one model's answer beats another's, at equal length too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dpo.evaluation.student import student_quantile

__all__ = ["WinRate", "length_controlled_win_rate", "win_rate"]

_LENGTH_PRIOR = 10.0
"""Standard deviation of the prior on the length's coefficient, so that it exists where length decides all."""

_Z = 1.959963984540054
"""Of the normal distribution, 97.5 % lies below it."""


@dataclass(frozen=True, slots=True)
class WinRate:
    """P(win) + P(tie) / 2 of one model's answers against another's.

    Attributes:
        rate: The estimate.
        standard_error: Over prompts, taken as drawn from all there could be; answers to one prompt may
            depend on each other. NaN for a single prompt.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    rate: float
    standard_error: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent, with the interval."""
        return f"{100 * self.rate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def win_rate(outcomes: Tensor) -> WinRate:
    """Mean outcome, with an interval that takes prompts as clusters.

    The standard error is that of the prompts' means, and the interval Wilson's score interval for as many
    independent comparisons as have this standard error, with Student's quantile for the number of prompts:
    it stays within 0 and 1 and keeps a width where one side wins every time.

    Args:
        outcomes: Of each comparison 1 for a win, 0.5 for a tie, 0 for a loss, or how likely a win is;
            (prompts, comparisons).

    Raises:
        ValueError: If the shape is another, or an outcome is not from 0 to 1.
    """
    table = _checked(outcomes)
    prompts = len(table)
    means = table.mean(1)
    rate = float(means.mean())
    if prompts == 1:
        return WinRate(rate, math.nan, *_wilson(rate, 1.0, _Z))
    error = float(means.std()) / math.sqrt(prompts)
    # Without any spread a prompt counts as one comparison; with little, no comparison counts twice.
    effective = min(rate * (1 - rate) / error**2, table.numel()) if error > 0 else prompts
    return WinRate(rate, error, *_wilson(rate, effective, student_quantile(0.95, freedom=prompts - 1)))


def length_controlled_win_rate(outcomes: Tensor, *, length_differences: Tensor) -> WinRate:
    """The win rate there would be if both answers were of one length, https://arxiv.org/abs/2404.04475.

    A logistic regression of the outcome on tanh(difference / its standard deviation), read off at a
    difference of 0. The paper's third term, how hard each instruction is for the baseline, needs many models
    judged on the same prompts and is left out. The interval's standard error takes prompts as clusters.

    Args:
        outcomes: See `win_rate`, (prompts, comparisons).
        length_differences: Length of the answer that wins or loses, less that of the other, in any unit,
            (prompts, comparisons).

    Returns:
        The plain win rate where all lengths are equal or one side wins every time.

    Raises:
        ValueError: See `win_rate`; or if the shapes differ.
    """
    table = _checked(outcomes)
    if length_differences.shape != outcomes.shape:
        raise ValueError(
            f"`length_differences` must have the shape of `outcomes` {tuple(outcomes.shape)}, "
            f"got {tuple(length_differences.shape)}"
        )
    lengths = length_differences.double().cpu()
    spread = float(lengths.std(correction=0))
    if spread == 0 or float(table.mean()) in (0.0, 1.0):
        return win_rate(outcomes)
    features = torch.stack([torch.ones_like(lengths), (lengths / spread).tanh()], dim=-1)
    # The prior on the length's coefficient; none on the intercept, the log-odds at equal length.
    precision = torch.diag(torch.tensor([0.0, _LENGTH_PRIOR**-2], dtype=torch.float64))
    weights = _fit(features.flatten(0, 1), table.flatten(), precision)
    probabilities = (features @ weights).sigmoid()
    rate = float(weights[0].sigmoid())
    prompts = len(table)
    if prompts == 1:
        return WinRate(rate, math.nan, 0.0, 1.0)
    curvature = _curvature(features.flatten(0, 1), probabilities.flatten()) + precision
    # White's sandwich, the scores of a prompt's comparisons summed before they are squared.
    scores = ((table - probabilities)[..., None] * features).sum(1)
    meat = prompts / (prompts - 1) * scores.T @ scores
    inverse = torch.linalg.inv(curvature)
    error = math.sqrt(max(float((inverse @ meat @ inverse)[0, 0]), 0.0))
    reach = student_quantile(0.95, freedom=prompts - 1) * error
    low, high = (float((weights[0] + sign * reach).sigmoid()) for sign in (-1, 1))
    return WinRate(rate, rate * (1 - rate) * error, low, high)


def _checked(outcomes: Tensor) -> Tensor:
    if outcomes.dim() != 2 or not outcomes.numel():
        raise ValueError(
            f"`outcomes` must be (prompts, comparisons), and not empty, got {tuple(outcomes.shape)}"
        )
    table = outcomes.double().cpu()
    wrong = table[~((table >= 0) & (table <= 1))].tolist()
    if wrong:
        raise ValueError(f"`outcomes` must be from 0 to 1, got {wrong[0]:g}")
    return table


def _wilson(rate: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` independent trials."""
    squared = quantile**2 / count
    center = (rate + squared / 2) / (1 + squared)
    reach = quantile * math.sqrt(rate * (1 - rate) / count + squared / (4 * count)) / (1 + squared)
    # At an end the formula gives that end, but for rounding.
    return 0.0 if rate == 0 else max(0.0, center - reach), 1.0 if rate == 1 else min(1.0, center + reach)


def _fit(features: Tensor, targets: Tensor, precision: Tensor) -> Tensor:
    """Weights that maximise the penalised likelihood, by Newton's method, (features,)."""
    weights = torch.zeros(features.shape[-1], dtype=torch.float64)
    for _ in range(100):
        probabilities = (features @ weights).sigmoid()
        gradient = features.T @ (targets - probabilities) - precision @ weights
        step = torch.linalg.solve(_curvature(features, probabilities) + precision, gradient)
        if float(step.abs().max()) < 1e-10:
            break
        value = _objective(features, targets, precision, weights)
        # Far from the optimum a full step can overshoot; a small enough part of it always gains.
        while _objective(features, targets, precision, weights + step) < value and step.abs().max() > 1e-10:
            step = step / 2
        weights = weights + step
    return weights


def _objective(features: Tensor, targets: Tensor, precision: Tensor, weights: Tensor) -> float:
    logits = features @ weights
    likelihood = -torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return float(likelihood - weights @ precision @ weights / 2)


def _curvature(features: Tensor, probabilities: Tensor) -> Tensor:
    weight = probabilities * (1 - probabilities)
    return (features * weight[:, None]).T @ features
