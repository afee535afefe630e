"""The report as a browser shows it, without a network.

Chromium is looked for in the environment variable CHROMIUM, then on the path.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from sweep_results import RECIPE, made_up

from lightning_dpo.tuning.report.formatting import format_number
from lightning_dpo.tuning.report.page import write_report
from lightning_dpo.tuning.results.result import SweepResult

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
DESKTOP = {"viewport": {"width": 1440, "height": 900}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install the package chromium, or set CHROMIUM to its path"
)


@dataclass
class Opened:
    """A page, and what went on behind it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    """Opens reports. Plotly takes seconds to draw one: tests that only look at a page, or that leave it as it
    was, look at the same one.
    """

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium
        self._opened: dict[tuple[str, str], Opened] = {}

    def open(self, result: SweepResult, **window: Any) -> Opened:
        """A report in a window, which is opened if it is not open yet."""
        key = (result.report_path, repr(sorted(window.items())))
        if key not in self._opened:
            self._opened[key] = self._draw(result, window)
        return self._opened[key]

    def _draw(self, result: SweepResult, window: dict[str, Any]) -> Opened:
        page = self._chromium.new_context(offline=True, **window).new_page()
        page.set_default_timeout(90_000)  # milliseconds; a busy machine takes long to draw a first page
        opened = Opened(page)
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("console", lambda text: opened.errors.append(text.text) if text.type == "error" else None)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(Path(result.report_path).as_uri())
        # The last chart is drawn after the others.
        charts = page.locator(".chart").count()
        page.wait_for_function(f"document.querySelectorAll('.chart .main-svg').length >= {charts}")
        return opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        # Containers run as root, where Chromium has no sandbox, and have little shared memory.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield Browser(launched)
        launched.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    result = made_up(str(tmp_path_factory.mktemp("sweeps") / "wide"))
    write_report(result)
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    result = made_up(str(tmp_path_factory.mktemp("sweeps") / "plain"), trials=8, kl=False, wide=False)
    write_report(result)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("window", [DESKTOP, PHONE, DESKTOP | {"color_scheme": "dark"}])
@pytest.mark.parametrize("sweep", ["wide", "plain"])
def test_it_opens_without_errors_and_asks_for_nothing(
    browser: Browser, request: pytest.FixtureRequest, sweep: str, window: dict[str, Any]
) -> None:
    result = request.getfixturevalue(sweep)
    opened = browser.open(result, **window)
    opened.page.mouse.wheel(0, 3000)
    opened.page.wait_for_timeout(200)
    assert opened.errors == []
    # A browser may name the page's own data: and blob: resources.
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [
        Path(result.report_path).as_uri()
    ]
    assert opened.page.locator(".chart").count() == (6 if sweep == "wide" else 4)
    assert opened.page.title() == f"Sweep {sweep}"


@pytest.mark.slow
def test_pointing_at_a_trial_shows_all_of_it(browser: Browser, wide: SweepResult) -> None:
    page = browser.open(wide, **DESKTOP).page
    # The best trial's star lies above all other marks.
    star = page.locator("#chart0 .scatterlayer .trace").last.locator(".point")
    star.scroll_into_view_if_needed()
    box = star.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = page.locator("#chart0 .hoverlayer .hovertext").text_content()
    best = wide.best
    assert f"trial {best.id}" in text
    assert f"β = {format_number(best.overrides['model.loss.beta'])}" in text
    assert f"lr = {format_number(best.overrides['model.optimizer.lr'])}" in text
    assert f"accuracy {format_number(best.metrics['val/rewards/accuracy'])}" in text
    assert f"KL {format_number(best.metrics['val/kl'])} ±" in text
    assert f"step {best.step} of {best.total_steps}, finished" in text


@pytest.mark.slow
def test_no_button_sends_anything_away(browser: Browser, plain: SweepResult) -> None:
    page = browser.open(plain, **DESKTOP).page
    page.locator("#chart0").hover()
    titles = page.locator("#chart0 .modebar-btn").evaluate_all("all => all.map(one => one.dataset.title)")
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]
    assert page.locator(".modebar-btn[data-title*='hare'], .modebar-btn[data-title*='dit in']").count() == 0


@pytest.mark.slow
def test_the_button_copies_the_recipe(browser: Browser, plain: SweepResult) -> None:
    opened = browser.open(plain, **DESKTOP)
    page = opened.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("button.copy").click()
    page.wait_for_function("document.querySelector('button.copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == RECIPE
    page.wait_for_function("document.querySelector('button.copy').textContent === 'Copy the recipe'")


@pytest.mark.slow
def test_each_recipe_has_a_button_that_copies_it(
    browser: Browser, plain: SweepResult, tmp_path: Path
) -> None:
    both = replace(plain, location=str(tmp_path), recommended_recipe="model: recommended\n")
    write_report(both)
    page = browser.open(both, **DESKTOP).page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#recommended button").click()
    page.wait_for_function("document.querySelector('#recommended button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == both.recommended_recipe
    assert page.locator("#winner button").inner_text() == "Copy the recipe"


@pytest.mark.slow
def test_an_axis_stands_out_in_the_dark(browser: Browser, wide: SweepResult) -> None:
    page = browser.open(wide, **DESKTOP, color_scheme="dark").page
    page.wait_for_selector(".parcoords .axis .domain", state="attached")
    strokes = page.locator(".parcoords .axis .domain").evaluate_all(
        "all => [...new Set(all.map(one => getComputedStyle(one).stroke))]"
    )
    assert strokes == ["rgb(163, 173, 186)"]  # --muted


@pytest.mark.slow
def test_the_button_copies_where_the_clipboard_is_kept_from_files(
    browser: Browser, plain: SweepResult
) -> None:
    page = browser.open(plain, **DESKTOP).page
    page.context.grant_permissions(["clipboard-read"])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    try:
        page.locator("button.copy").click()
        page.wait_for_function("document.querySelector('button.copy').textContent === 'Copied'")
        # What is selected ends before the last line's end.
        assert page.evaluate("navigator.clipboard.readText()") == RECIPE.rstrip()
    finally:
        page.evaluate("() => { delete navigator.clipboard.writeText; }")


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["wide", "plain"])
def test_a_phone_scrolls_down_only(browser: Browser, request: pytest.FixtureRequest, sweep: str) -> None:
    page = browser.open(request.getfixturevalue(sweep), **PHONE).page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # Nothing within a chart is cut at its edges: titles and ticks lie inside.
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.chart:not([style])')].flatMap(chart => {
             const frame = chart.getBoundingClientRect();
             return [...chart.querySelectorAll('.xtitle, .ytitle, .xtick text, .ytick text, .legendtext')]
               .filter(text => { const box = text.getBoundingClientRect();
                 return box.left < frame.left - 1 || box.right > frame.right + 1; })
               .map(text => text.textContent); })"""
    )
    assert cut == []


@pytest.mark.slow
def test_texts_of_trials_are_text(browser: Browser, wide: SweepResult) -> None:
    page = browser.open(wide, **DESKTOP).page
    assert page.locator(".failures li").count() == sum(not trial.is_ranked for trial in wide.trials)
    assert "<script>alert('a mistake of one's own')</script>" in page.locator(".failures").inner_text()
