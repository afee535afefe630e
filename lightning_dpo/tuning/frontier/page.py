"""The page of a frontier: one HTML file that needs nothing else, in the style of a sweep's report."""

from __future__ import annotations

import math

from markupsafe import Markup

from lightning_dpo.tuning.frontier.chart import reward_chart
from lightning_dpo.tuning.frontier.result import FrontierResult, MethodShares
from lightning_dpo.tuning.frontier.table import NOTE, best_text, share_text
from lightning_dpo.tuning.report.formatting import format_duration, format_number
from lightning_dpo.tuning.report.page import fill_template
from lightning_dpo.tuning.storage import Storage

__all__ = ["render", "write_page"]

_Table = tuple[list[tuple[str, str, str]], list[list[str]]]


def write_page(result: FrontierResult) -> None:
    """Write `frontier.html` into the comparison's folder."""
    Storage(result.location).write("frontier.html", render(result))


def render(result: FrontierResult) -> str:
    """The page as HTML, plotly's script included."""
    return fill_template(
        "frontier.html",
        charts=[reward_chart(result)],
        result=result,
        headline=_headline(result),
        lead=_lead(result),
        facts=_facts(result),
        note=NOTE,
        comparison=_comparison(result),
        policies=_policies(result),
    )


def _headline(result: FrontierResult) -> Markup:
    """Which method is nearest to the limit, at the KL that most methods reach."""
    compared = result.compare()
    reached = [sum(each.shares[place] is not None for each in compared) for place in range(len(result.kls))]
    if not any(reached):
        return Markup("No method reaches a KL of the comparison")
    place = reached.index(max(reached))

    def share(each: MethodShares) -> float:
        found = each.shares[place]
        return -math.inf if found is None else found.mean

    best = max(compared, key=share)
    return Markup("<b>{}</b> comes nearest to the best at KL\u00a0{:g}: {:.0%} of what can be gained").format(
        best.method, result.kls[place], share(best)
    )


def _lead(result: FrontierResult) -> str:
    text = (
        f"{len(result.points)} policies of {len(result.methods)} methods, {result.seeds} seed"
        f"{'s' if result.seeds != 1 else ''} each, in {format_duration(result.seconds)}. "
        f"The reference's mean reward is {format_number(result.limit.reference)}. "
    )
    known = result.limit.curve(up_to=math.inf)
    if known:
        text += (
            f"The best reachable reward at each KL is the reference reweighted by its reward, estimated from "
            f"samples of the reference{_others_sampled(result)}; they tell it up to "
            f"KL {max(point.kl for point in known):.1f}."
        )
    return text


def _others_sampled(result: FrontierResult) -> str:
    """What else was sampled for the limit."""
    limit = result.limit
    trained = "" if limit.fitted and not limit.policies else f" and of {limit.policies} trained policies"
    if limit.fitted is None:
        return trained
    kl, reward = limit.fitted
    share = limit.share(reward, kl=kl)
    of_best = "" if math.isnan(share) else f", {share:.0%} of the gain"
    return (
        f"{trained} and of a policy fitted to the best one at KL {max(result.kls):g}, which itself has "
        f"{format_number(reward)} at KL {kl:.1f}{of_best}"
    )


def _facts(result: FrontierResult) -> dict[str, str]:
    return {
        "methods": str(len(result.methods)),
        "policies": str(len(result.points)),
        "seeds": str(result.seeds),
        "wall time": format_duration(result.seconds),
    }


def _comparison(result: FrontierResult) -> _Table:
    """The methods at equal KL: columns as the template's table takes them, and cells."""
    best = result.best_at()
    columns = [
        ("method", "", ""),
        *(
            (f"KL {kl:g}", f"{point.effective_sample_size:.0f} effective samples", "right")
            for kl, point in zip(result.kls, best, strict=True)
        ),
        ("furthest KL", "mean over the seeds of the largest KL", "right"),
    ]
    lines = [["best reward", *(best_text(point) for point in best), ""]]
    for each in result.compare():
        shares = (share_text(share, seeds=result.seeds) for share in each.shares)
        lines.append([each.method, *shares, format_number(each.furthest, pad=True)])
    return columns, lines


def _policies(result: FrontierResult) -> _Table:
    """All policies: columns as the template's table takes them, and cells."""
    columns = [
        *(("method", "", ""), ("strength", "", ""), ("seed", "", "right"), ("KL, nats", "", "right")),
        *(("±", "standard error", "right"), ("reward", "", "right"), ("±", "standard error", "right")),
        ("share of limit", "of what can be gained at its KL", "right"),
    ]
    lines = [
        [
            point.method,
            f"{result.strengths.get(point.method, 'strength')} = {format_number(point.strength)}",
            str(point.seed),
            *(format_number(value, pad=True) for value in (point.kl,)),
            format_number(point.kl_error, 1),
            format_number(point.reward, pad=True),
            format_number(point.reward_error, 1),
            "" if math.isnan(point.share_of_limit) else f"{point.share_of_limit:.0%}",
        ]
        for point in result.points
    ]
    return columns, lines
