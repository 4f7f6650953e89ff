"""The page in a browser: nothing is reported on the console, everything loads, and everybody can use it.

Needs a Chromium on this machine (`chromium`, or its path in CHROMIUM) and the `browser` extra; skipped with the reason otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.errors import SpecError
from reports import rating
from reports.files import write
from reports.verdict import Report
from tests.reports.samples import NASTY, claim, forgotten, png, rate, resurged, retained

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
METHODS = ("esd", "uce", "dimum")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    path = os.environ.get("CHROMIUM") or next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium, or name it in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages on disk: three methods on a person and on an unsafe concept, names that want to break it, a hundred concepts, nothing at all."""
    folder = tmp_path_factory.mktemp("pages")
    pictures = {
        title: tuple(png(folder / f"{row}{i}.png", 40 * row + i) for i in range(6)) for row, title in enumerate(("base", "unlearned", "after 200 steps"))
    }

    def cells(name: str, methods: tuple[str, ...] = METHODS, **more: Any) -> list[Any]:
        both: dict[str, Any] = {"images": pictures, "hits": {f"a portrait of {name}": "0101", f"a sketch of {name}": "0000"}, **more}
        unclear = {"rate": rate(4), "verdict": "inconclusive", "word": "inconclusive"}
        later = {"esd": resurged(name, **both), "uce": claim(name, method="uce", **both), "dimum": claim(name, method="dimum", **unclear, **both)}
        return [cell for m in methods for cell in (forgotten(name, method=m, **both), later[m])]

    made = {"base": "b" * 32, "stages": [{"class": "harness.unlearning.esd.Method", "version": 1}], "seconds": [1.0]}
    more: dict[str, Any] = {"run": {"versions": {"torch": "2"}}, "lineages": {"ab" * 16: made}, "subjects": {"unet.safetensors": "c" * 64}}
    several = Report((*cells("Ada"), *cells("Blood", suite="unsafe"), *(retained(method=m) for m in METHODS)), scope="these prompts", **more)
    nasty = Report(tuple(c for name in NASTY for c in cells(name, ("esd",), task=name)), missing=NASTY, deviations=NASTY, notices=NASTY, scope=NASTY[5])
    hundred = Report(tuple(c for i in range(100) for c in cells(f"Person number {i}", images={"base": (png(folder / f"p{i}.png", 100 + i),)})))
    for name, report in (("several", several), ("nasty", nasty), ("hundred", hundred), ("nothing", Report(()))):
        write(report, folder / name)
    return {name: folder / name / "report.html" for name in ("several", "nasty", "hundred", "nothing")}


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose console messages, errors and failed requests are kept in `complaints`; no network is there to be had."""
    context = browser.new_context(viewport=DESK, offline=True)
    opened = context.new_page()
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("requestfailed", lambda request: opened.complaints.append(request.url))
    opened.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
    yield opened
    context.close()


def show(page: Any, path: Path, viewport: dict[str, int] = DESK) -> Any:
    """Open a report from disk and unfold everything."""
    page.set_viewport_size(viewport)
    page.goto(path.as_uri())
    unfold(page)
    return page


def unfold(page: Any) -> None:
    """Open every part of a report that is folded."""
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")


@pytest.mark.parametrize("name", ["several", "nasty", "hundred", "nothing"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_it_opens_quietly_and_fits(page: Any, reports: dict[str, Path], name: str, viewport: dict[str, int]) -> None:
    """No console message, no failed request, no script of a name's own, and nothing to scroll sideways, unfolded or not."""
    page.set_viewport_size(viewport)
    page.goto(reports[name].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    unfold(page)  # not by going there again, which would cut off pictures that are still on their way
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert page.complaints == []


def test_the_verdict_is_the_first_thing_seen(page: Any, reports: dict[str, Path]) -> None:
    """Without scrolling on a telephone: the verdict, whether the gate is shut, and who came back."""
    page.set_viewport_size(PHONE)
    page.goto(reports["several"].as_uri())
    banner = page.locator(".banner")
    assert "the gate is shut" in banner.inner_text()
    assert "Ada" in banner.inner_text()
    assert banner.bounding_box()["height"] < PHONE["height"] / 2


def test_curve_and_images_are_there(page: Any, reports: dict[str, Path]) -> None:
    """The curve has a line and a band per method and the tolerance; each image of the grid is decoded once it is in view."""
    curve = show(page, reports["several"]).locator("svg.curve").first
    assert curve.bounding_box()["height"] > 100
    assert [curve.locator(kind).count() for kind in ("polyline.line", "polygon.band", "path.tolerance", "text.limit")] == [3, 3, 1, 1]
    images = page.locator("#c1 img")
    assert images.count() == 3 * 3 * 6
    for i in range(images.count()):
        images.nth(i).scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('#c1 img')].every((image) => image.complete && image.naturalWidth > 0)")


def test_folded_images_are_not_loaded(page: Any, reports: dict[str, Path]) -> None:
    """A report of a hundred concepts asks for the pictures of the three that are open, and for another's when it is unfolded."""
    asked: set[str] = set()
    page.on("request", lambda request: asked.add(request.url) if request.url.endswith(".png") else None)
    page.goto(reports["hundred"].as_uri())
    page.wait_for_load_state("networkidle")
    assert page.evaluate("new Set([...document.images].map((image) => image.src)).size") == 100
    before = len(asked)
    assert before <= 3
    page.locator("details.concept:not([open]) > summary").first.click()
    page.locator("details.concept[open] img").first.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('details.concept[open] img').naturalWidth > 0")
    assert len(asked) <= before + 3


def test_unsafe_images_are_blurred_until_clicked(page: Any, reports: dict[str, Path]) -> None:
    """A click on a blurred image shows it instead of following its link; the other suite's images were never blurred."""
    show(page, reports["several"])
    blur = "getComputedStyle(document.querySelector('{} img')).filter"
    assert page.evaluate(blur.format("#c1")) == "none"
    assert page.evaluate(blur.format("#c2 .veiled")).startswith("blur")
    page.locator("#c2 .veiled a").first.hover()
    page.locator("#c2 .veiled a").first.focus()
    assert page.evaluate(blur.format("#c2 .veiled")).startswith("blur")
    page.locator("#c2 .veiled a").first.click()
    assert page.evaluate(blur.format("#c2 .veiled")) == "none"
    assert page.url == reports["several"].as_uri()
    assert page.locator("#c2 .unveil input").first.is_checked()


def test_the_keyboard_reaches_every_control(page: Any, reports: dict[str, Path]) -> None:
    """Tab visits every link, summary, field and tick box that is shown, each with a visible outline; space unveils."""
    show(page, reports["several"])
    controls = "[...document.querySelectorAll('a[href], summary, input, select, button')].filter((each) => each.checkVisibility())"
    page.evaluate(f"window.wanted = new Set({controls})")
    count, unmarked = page.evaluate("wanted.size"), 0
    for _ in range(count):
        page.keyboard.press("Tab")
        page.evaluate("wanted.delete(document.activeElement)")
        unmarked += page.evaluate("getComputedStyle(document.activeElement).outlineStyle === 'none'")
    assert count > 60
    assert (page.evaluate("[...wanted].map((each) => each.outerHTML)"), unmarked) == ([], 0)
    page.locator("#c2 .unveil input").first.focus()
    page.keyboard.press("Space")
    assert page.evaluate("getComputedStyle(document.querySelector('#c2 .veiled img')).filter") == "none"


def test_a_concept_is_found_among_a_hundred(page: Any, reports: dict[str, Path]) -> None:
    """Typing a name or choosing a verdict leaves only what was asked for; a link at the top unfolds its concept."""
    page.goto(reports["hundred"].as_uri())
    page.locator("#search").press_sequentially("number 77")
    assert page.locator("details.concept:visible").count() == 1
    assert page.locator("#found").inner_text() == "1 of 100"
    page.locator("#search").fill("")
    page.locator("#pick").select_option("holds")
    assert page.locator("details.concept:visible").count() == 0
    page.locator("#pick").select_option("")
    link = page.locator(".fails a").nth(7)
    link.click()
    assert page.locator(f"details.concept:has({link.get_attribute('href')})").get_attribute("open") is not None


@pytest.mark.parametrize(
    ("name", "scheme", "viewport"), [("several", "light", DESK), ("several", "dark", PHONE), ("nasty", "light", DESK)], ids=["desk", "phone by dark", "names"]
)
def test_axe_finds_nothing_serious(page: Any, reports: dict[str, Path], name: str, scheme: str, viewport: dict[str, int]) -> None:
    """axe-core, by light and by dark, on a desk and on a telephone: no serious or critical finding."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed: pip install -e '.[browser]'")
    page.emulate_media(color_scheme=scheme)
    show(page, reports[name], viewport)
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")] == []


def sheet(folder: Path, suite: str) -> Path:
    """A rating sheet of one concept: two reference images and four to rate."""
    rows = {name: tuple(png(folder / f"{name}{i}.png", 40 * i + at) for i in range(3)) for at, name in enumerate(("base", "unlearned"))}
    made = forgotten("Ada", suite=suite, images=rows)
    write(Report((made,), run={"tasks": {f"{suite}/{made.task}": {"erased": {"concepts": ["Ada"]}}}}), folder / "out")
    rating.sheet(folder / "out", folder / "sheet")
    return folder / "sheet" / "sheet.html"


def test_a_rater_answers_with_keys_and_sends_a_file(page: Any, tmp_path: Path) -> None:
    """y, n, u and the arrows work; saving too early leads to what is missing; the saved file is one that the harness reads."""
    page.goto(sheet(tmp_path, "celebrity").as_uri())
    assert page.locator("#question").inner_text() == "Does this picture show Ada?"
    assert page.locator("#references img").count() == 2
    assert not page.locator("#unveil").is_visible()
    for key in ("y", "n", "ArrowLeft", "u", "y"):
        page.keyboard.press(key)
    page.locator("#save").click()
    assert page.locator("#place").inner_text() == "1 pictures have no answer yet"
    page.locator("[data-answer=no]").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    key = json.loads((tmp_path / "sheet" / "key.json").read_text(encoding="utf-8"))
    assert rating.answers(Path(download.value.path()), key) == dict(zip(sorted(key["images"]), ("yes", "unsure", "yes", "no"), strict=True))
    assert page.complaints == []


def test_only_one_rater_makes_the_same_file_twice(page: Any, tmp_path: Path) -> None:
    """A second download of a page's answers is told from the file of somebody else who answers alike."""
    address, files = sheet(tmp_path, "celebrity").as_uri(), []
    for saves in (2, 1):
        page.goto(address)
        for _ in range(4):
            page.keyboard.press("n")
        for _ in range(saves):
            with page.expect_download() as download:
                page.locator("#save").click()
            files.append(Path(download.value.path()))
    key = rating.opened(tmp_path / "sheet" / "key.json")
    assert len(rating.rated(files[1:], key)) == 2
    with pytest.raises(SpecError, match="are one rater's"):
        rating.rated(files, key)


def test_a_rater_of_the_unsafe_suite_sees_nothing_unasked(page: Any, tmp_path: Path) -> None:
    """References and pictures are blurred, the next ones too, until the button is pressed; then none is."""
    blurred = "Array.from(document.images, image => getComputedStyle(image).filter.startsWith('blur'))"
    page.goto(sheet(tmp_path, "unsafe").as_uri())
    page.keyboard.press("y")
    assert page.evaluate(blurred) == [True] * 3
    page.keyboard.press("v")
    assert page.evaluate(blurred) == [False] * 3
    page.keyboard.press("n")
    assert page.evaluate(blurred) == [False] * 3
    assert not page.locator("#unveil").is_visible()
