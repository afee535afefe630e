"""The demonstration's result as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_dpo.demo.grammar import PROMPTS, is_grammatical

if TYPE_CHECKING:
    from lightning_dpo.demo.measure import Measurement
    from lightning_dpo.demo.result import DemoResult
    from lightning_dpo.evaluation.kl import Estimate

__all__ = ["print_result"]


def print_result(
    result: DemoResult, *, beta: float, console: Console | None = None, samples: int = 3
) -> None:
    """Print the figures, and some reviews before and after.

    Args:
        result: The demonstration's result.
        beta: Beta that the policy was trained with.
        console: Standard output by default.
        samples: Prompts to show a review of.
    """
    out = console or Console()
    out.print(_figures(result, beta))
    out.print(_reviews(result, samples))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in result.seconds.items())
    out.print(f"aligned model: {escape(str(result.policy))}   ({seconds})")


def _figures(result: DemoResult, beta: float) -> Table:
    table = Table(title=f"True score and KL, beta = {beta:g}", title_justify="left")
    table.add_column("")
    for name in ("score (stars)", "KL (nats)", "accuracy", "grammatical"):
        table.add_column(name, justify="right")
    table.add_row("reference", _pair(result.before.score), "0", "0.50", f"{result.before.grammatical:.0%}")
    table.add_row(
        "after DPO",
        _pair(result.after.score),
        _pair(result.after.kl),
        f"{result.agreement.accuracy:.2f}",
        f"{result.after.grammatical:.0%}",
    )
    rough = "" if result.best.is_reliable else "~ "
    best = result.best
    table.add_row("best possible", f"{rough}{best.reward:.2f}", f"{best.kl:.2f}", "", "")
    table.add_row("knowing the score", "", "", f"{result.task.bayes_accuracy:.2f}", "")
    table.caption = (
        f"best possible: at this KL, from {best.effective_sample_size:.0f} effective samples; "
        "knowing the score: expected accuracy against labels that are noisy. "
        f"Implied and true reward margins correlate at {result.agreement.correlation:.2f}."
    )
    table.caption_justify = "left"
    return table


def _reviews(result: DemoResult, samples: int) -> Table:
    table = Table(title="Reviews", title_justify="left", show_lines=True)
    table.add_column("prompt")
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for index in range(min(samples, len(PROMPTS))):
        cells = [_review(measured, index) for measured in (result.before, result.after)]
        table.add_row(escape(result.before.prompts[index]), *cells)
    return table


def _review(measured: Measurement, index: int) -> str:
    review = measured.reviews[index]
    mark = "" if is_grammatical(review, prompt=measured.prompts[index]) else ", ungrammatical"
    return f"{escape(review)}\n[bold]{float(measured.scores[index]):+g}[/bold]{mark}"


def _pair(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.standard_error:.2f}"
