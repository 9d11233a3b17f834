"""The page in a real browser: headless Chromium, without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import made_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CELLS = "#run0 [data-map=modules] svg"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="the Python package playwright drives the browser")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"there is no Chromium here: none of {', '.join(NAMES)}")
    with sync.sync_playwright() as driver:
        # without a sandbox, because it cannot start as root
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(page_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page_text, encoding="utf-8")
    return path


@pytest.fixture
def open_page(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page; after the test, nothing may have been said on the console or asked of a network."""
    said: list[str] = []
    asked: list[str] = []
    contexts: list[Any] = []

    def opened(**settings: Any) -> Any:
        context = browser.new_context(offline=True, **{"viewport": {"width": 1200, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=30_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) == {file.as_uri()}


def texts(page: Any) -> list[str]:
    """The numbers in the cells of the first heat map."""
    found: list[str] = page.eval_on_selector_all(
        f"{CELLS} .mark-text.role-mark text",
        "all => all.map(one => one.textContent).filter(text => /^[+−]?[0-9]+$/.test(text))",
    )
    return found


def test_every_picture_is_drawn_and_only_in_open_parts(open_page: Any) -> None:
    page = open_page()
    drawn = page.eval_on_selector_all(
        ".chart", "all => all.filter(one => one.offsetParent !== null).map(one => one.querySelectorAll('svg').length)"
    )
    assert len(drawn) >= 7
    assert set(drawn) == {1}
    clipped = page.evaluate(
        """() => [...document.querySelectorAll('.chart svg')].flatMap(svg => {
            const outer = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text')].filter(text => {
                const inner = text.getBoundingClientRect();
                return inner.left < outer.left - 1 || inner.bottom > outer.bottom + 1 || inner.right > outer.right + 1;
            }).map(text => text.textContent);
        })"""
    )
    assert clipped == []  # every label is inside its picture
    page.locator("#run2 > summary").click()  # with names that are markup
    page.wait_for_selector("#run2 [data-map=modules] svg")
    assert page.locator("b").count() == 0
    page.locator("#run0 .heads > summary").click()
    page.wait_for_selector("#run0 [data-map=heads] svg")


def test_the_keyboard_moves_the_slider_and_with_it_the_picture(open_page: Any) -> None:
    page = open_page()
    run = made_run()
    assert sorted(map(int, texts(page))) == sorted(run.last.ranks.values())
    page.locator("#run0-slider").focus()
    page.keyboard.press("Home")
    page.wait_for_selector("#run0 [data-map=modules][data-drawn='0']")
    assert set(texts(page)) == {"4"}
    assert page.locator("#run0-slider").get_attribute("aria-valuetext") == "step 0: 48 ranks, 4,800 LoRA parameters"
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#run0 [data-map=modules][data-drawn='1']")
    assert sorted(map(int, texts(page))) == sorted(run.frames[1].ranks.values())
    # the loss beside it marks the step
    assert page.locator("#run0 [data-spec=loss][data-drawn='1']").count() == 1


def test_the_keyboard_chooses_between_rank_and_change(open_page: Any) -> None:
    page = open_page()
    page.locator("#run0 input[value=rank]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"document.querySelector('{CELLS}')?.textContent.includes('+3')")
    assert sorted(texts(page)) == sorted(
        f"{change:+d}".replace("-", "−") if change else "0" for change in made_run().changes.values()
    )
    outline = page.eval_on_selector("#run0 input[value=change]", "one => getComputedStyle(one).outlineStyle")
    assert outline == "solid"  # the focus is visible


def test_heads_of_another_projection_are_shown_on_demand(open_page: Any) -> None:
    page = open_page()
    page.locator("#run0 .heads > summary").click()
    first = page.locator("#run0 [data-map=heads] svg").inner_html()
    page.locator("#run0-projection").select_option("v_proj")
    page.wait_for_function(
        "before => document.querySelector('#run0 [data-map=heads] svg')?.innerHTML !== before", arg=first
    )


def test_dark_follows_the_system_and_the_button(open_page: Any) -> None:
    def colours(page: Any) -> tuple[str, str]:
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        fills = "all => all.map(one => one.getAttribute('fill')).join()"
        return body, page.eval_on_selector_all(f"{CELLS} .mark-rect.role-mark path", fills)

    light = colours(open_page(color_scheme="light"))
    page = open_page(color_scheme="dark")
    dark = colours(page)
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] == "rgb(18, 24, 31)"
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-theme=light]")
    page.wait_for_selector("html[data-ready]")
    assert colours(page) == light


@pytest.mark.parametrize("width", [390, 1200])
def test_no_width_needs_a_horizontal_scroll(open_page: Any, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    page.wait_for_selector("#run2 [data-map=modules] svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.eval_on_selector_all(
        ".chart svg", "all => all.filter(one => one.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0


def test_on_paper_everything_is_light_and_every_run_is_there(open_page: Any) -> None:
    page = open_page(color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_selector("#run1 [data-map=modules] svg")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#run0 .controls").is_visible()
    assert page.locator("#run1 .lead").is_visible()
