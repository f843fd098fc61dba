"""The page in a real browser: no error, no request, sorting, plots, nothing wider than the screen, day and night."""

import os
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SYSTEM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Start playwright's own Chromium, or the system's."""
    with playwright.sync_playwright() as engine:
        own = engine.chromium.executable_path
        path = own if os.path.exists(own) else next(filter(None, map(shutil.which, SYSTEM)), None)
        if path is None:
            pytest.skip("no Chromium: neither playwright's (`playwright install chromium`) nor one on the PATH")
        try:
            started = engine.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{path} does not start: {error.message.splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(
    scope="module",
    params=[(400, "light"), (1400, "light"), (400, "dark")],
    ids=lambda given: f"{given[0]}-{given[1]}",
)
def tab(request, browser, page):
    """Open the report and gather what goes wrong."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    opened.wrong = []
    opened.on("console", lambda message: opened.wrong.append(message.text))
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("request", lambda asked: opened.wrong.append(asked.url) if asked.url.startswith("http") else None)
    opened.goto(page.as_uri())
    opened.wait_for_function("[...document.querySelectorAll('.canvas')].every(one => one.querySelector('.main-svg'))")
    yield opened
    assert not opened.wrong
    context.close()


def test_it_fits_and_every_plot_has_marks(tab):
    width = tab.viewport_size["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("window.alert.name") == "alert"
    marks = tab.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.canvas')].map(one => [one.id, one.querySelectorAll("
        "'.scatterlayer .point, .barlayer .point path, .heatmaplayer image').length]))"
    )
    assert len(marks) == 8
    assert all(marks.values()), marks
    wider = tab.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, pre, .skip, .unseen, svg')"
        " && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.className)"
    )
    assert not wider


def test_headings_sort_by_click_and_by_key(tab):
    def column():
        return tab.evaluate(
            "[...document.querySelectorAll('#cells tbody tr')].map(row => row.querySelectorAll('td')[3].dataset.value)"
        )

    heading = tab.locator("#cells thead th", has_text="removed")
    heading.locator("button").click()
    shown = [float(value) for value in column() if value is not None]
    assert shown == sorted(shown)
    assert column()[-1] is None, "the failed cell stays last"
    assert heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert [float(value) for value in column() if value is not None] == shown[::-1]
    assert column()[-1] is None
    assert heading.get_attribute("aria-sort") == "descending"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "parameters"


def test_plots_change_with_day_and_night(tab):
    def colors():
        return tab.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " document.querySelector('#plot-influence .barlayer path').style.fill]"
        )

    first = colors()
    dark = tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    tab.emulate_media(color_scheme="light" if dark else "dark")
    tab.wait_for_function(
        "fill => document.querySelector('#plot-influence .barlayer path').style.fill !== fill", arg=first[1]
    )
    assert colors()[0] != first[0]
