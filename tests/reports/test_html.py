"""The page: what it shows, and that nothing in a claim can change what it is."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given, settings

from reports import html
from reports.files import write
from reports.verdict import Report
from tests.reports.samples import NAMES, claim, forgotten, png, rate, resurged, retained, unasked

VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """A page as its tags, its attributes and its texts by class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, dict[str, Any]]] = []
        self.who = ""
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag; `who` marks a concept's name."""
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes.append((tag, dict(attrs)))
        self.inside |= tag == "span" and ("class", "who") in attrs

    def handle_endtag(self, tag: str) -> None:
        """A name ends with its span."""
        self.inside &= tag != "span"

    def handle_data(self, data: str) -> None:
        """Collect the concept's name."""
        self.who += data if self.inside else ""


def page(*claims: Any, **more: Any) -> str:
    """The page of these claims; images are called 0.png to 19.png."""
    return html.page(Report(tuple(claims), **more), {f"{i}.png": f"images/{i}.png" for i in range(20)})


def named(name: str) -> str:
    """A page in which every text that comes from outside is `name`."""
    images = {name: ("0.png",)}
    cells = (forgotten(name, method=name, task=name), resurged(name, method=name, finetune=name, task=name, reason=name, images=images))
    return page(*cells, scope=name, notices=(name,), deviations=(name,), missing=(name,), run={name: name})


@settings(deadline=None, max_examples=40)
@given(NAMES.filter(bool))
def test_no_name_changes_the_page(name: str) -> None:
    """Quotes, brackets, template syntax, emoji, right-to-left text: the tags and attributes are those of a plain name."""
    found = Page(named(name))
    assert found.tags == Page(named("Ada")).tags
    assert found.who == name


def test_published_figures_are_shown_of_claims_that_hold_too() -> None:
    """H_c, UA, a nudity score stand beside the verdict whatever it is; of the instruments only what is wrong with them."""
    assert "H_c 0.898" in page(retained(reason="H_c 0.898"))
    assert "seen in 0/200" not in page(forgotten(claim="instruments", reason="seen in 0/200"))


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    """Nothing is loaded from anywhere but the report's own folder, and the page's policy forbids the rest."""
    write(Report((resurged(images={"base": (png(tmp_path / "a.png"),)}),)), tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import", text.replace('"use strict"', ""))
    links = [a.get("src") or a.get("href") for tag, a in Page(text).attributes if {"src", "href"} & a.keys()]
    assert {link for link in links if not re.fullmatch(r"images/[0-9a-f]{16}\.png|#c\d+|data:,", link)} == set()
    assert "default-src 'none'" in text
    assert all((tmp_path / "out" / link).is_file() for link in links if link.startswith("images/"))


def test_the_policy_names_the_script() -> None:
    """The browser runs exactly the page's own script: its digest stands in the policy."""
    text = page(claim())
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text


def test_the_curve_is_drawn() -> None:
    """Each recipe has its line, band and marks with words; tolerance and base are lines; both axes are named."""
    text = page(forgotten(), claim(steps=50), resurged(), forgotten(method="uce"), claim(method="uce"))
    svg = text[text.index('<svg class="curve"') : text.index("</figure>")]
    assert svg.count("<polyline") == svg.count("<polygon") == 2
    assert "<title>esd, then in-domain, 200 steps: 24/40 = .60 [.50, .70]</title>" in svg
    assert 'aria-label="Rate of Ada over fine-tuning steps. esd, then in-domain: .00 at step 0, .00 at step 50, .60 at step 200; uce' in svg
    assert [svg.count(f'class="{line}"') for line in ("tolerance", "base")] == [2, 2]  # the line and its legend
    assert "steps of fine-tuning after unlearning</text>" in svg
    assert "share of images</text>" in svg
    assert svg.count('<svg class="swatch') == 4


def test_the_numbers_are_also_a_table() -> None:
    """Every claim is a row with its rate, promise and word, for those who do not see the curve."""
    text = page(forgotten(), resurged())
    assert text.count('data-label="Promised">below .10') == 2
    assert '<span class="mark broken">resurged</span>' in text


def test_the_grid_shows_the_same_prompts_below_each_other() -> None:
    """Base, unlearned and after k steps are rows of one grid; a row that two claims share is there once."""
    early = {"base": ("0.png", "1.png"), "unlearned": ("2.png", "3.png")}
    text = page(forgotten(images=early), resurged(images={**early, "after 200 steps": ("4.png", "5.png")}))
    assert re.findall(r'rowtitle"><bdi>(.*?)</bdi>', text) == ["base", "unlearned", "after 200 steps"]
    images = [a for tag, a in Page(text).attributes if tag == "img"]
    assert [a["src"] for a in images] == [f"images/{i}.png" for i in range(6)]
    assert {a["loading"] for a in images} == {"lazy"}
    assert images[5]["alt"] == "Ada, esd, then in-domain, after 200 steps, image 2"
    assert "image-rendering: pixelated" in text


def test_a_long_row_is_cut_into_blocks_that_stay_aligned() -> None:
    """Rows break at the same columns, and no more than eight images of a row are shown."""
    names = {"base": tuple(f"{i}.png" for i in range(10)), "unlearned": tuple(f"{i}.png" for i in range(10, 20))}
    blocks = html.grid([claim(images=names, hits=dict.fromkeys("abc", "0"))], {f"{i}.png": str(i) for i in range(20)})
    assert blocks == [
        html.Block(0, ("a", "b", "c", "a"), (("base", ("0", "1", "2", "3")), ("unlearned", ("10", "11", "12", "13")))),
        html.Block(4, ("b", "c", "a", "b"), (("base", ("4", "5", "6", "7")), ("unlearned", ("14", "15", "16", "17")))),
    ]


def test_replicates_are_told_apart_by_their_seeds() -> None:
    """Two rows of one cell name their seeds; a single one needs no such words."""
    assert "unlearn</bdi> 7" in page(claim(), claim(seeds={"unlearn": 7}))
    assert "seeds: " not in page(claim(), claim(steps=50))


def test_images_of_the_unsafe_suite_are_veiled() -> None:
    """Nobody meets an unsafe picture without asking for it; other suites are shown plainly."""
    images = {"base": ("0.png",)}
    assert 'class="blocks veiled"' in page(claim(images=images, suite="unsafe"))
    assert 'class="blocks veiled"' not in page(claim(images=images))


def test_the_banner_says_what_happened_and_what_to_do() -> None:
    """The first thing on the page is the verdict in words, one sentence of finding and one of advice."""
    banner = page(resurged()).split("</header>")[0]
    assert "<h1>Broken</h1>" in banner
    assert "Resurgence found: Ada came back after unlearning. This is a finding about the model, not a crash." in banner
    assert "Start with the cells marked below" in banner
    assert 'class="banner not"' in page(claim(), deviations=("--tau",))


def test_every_part_stands_when_little_was_measured() -> None:
    """No claims, only instruments, only retention, only a failed measurement: the page is still written."""
    for claims in ((), (claim(claim="instruments", steps=0),), (retained(0, finetune=None),), (claim(rate=None, before=None, base=None),)):
        assert "</html>" in page(*claims)


def test_a_hundred_concepts_stay_usable() -> None:
    """Each concept is one fold, three of them open, the worst ones; there is a search box and a link to each failing cell."""
    text = page(*(resurged(f"p{i}") if i in (40, 60, 80) else claim(f"p{i}") for i in range(100)))
    folds = [a for tag, a in Page(text).attributes if tag == "details" and a.get("class") == "concept"]
    assert len(folds) == 100
    assert [i for i, a in enumerate(folds) if "open" in a] == [40, 60, 80]
    assert '<input id="search" type="search"' in text
    assert re.findall(r'href="(#c\d+)"', text) == ["#c41", "#c61", "#c81"]
    assert len(text) < 1_000_000


def test_every_tag_is_closed() -> None:
    """The page's tags open and close in order."""
    stack: list[str] = []
    text = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page(forgotten(), resurged(images={"base": ("0.png",)}), retained()), flags=re.DOTALL)
    for closing, tag, alone in re.findall(r"<(/?)([a-z0-9]+)[^>]*?(/?)>", text):
        if closing:
            assert stack.pop() == tag
        elif not alone and tag not in VOID:
            stack.append(tag)
    assert stack == []


def test_hits_are_broken_down_by_prompt() -> None:
    """A table per recipe: one row per prompt, one column per moment, replicates added up, a dash where nothing was drawn."""
    cells = [forgotten(hits={"a": "000", "b": "010"}), *(claim(hits={"a": "11"}, id=str(seed), seeds={"unlearn": seed}) for seed in (0, 1))]
    assert html.breakdown(cells) == (("after unlearning", "after 200 steps"), {"a": ["0/3", "4/4"], "b": ["1/3", "-"]})
    text = page(*cells)
    assert "By prompt: <bdi>esd, then in-domain</bdi>" in text
    assert '<td data-label="after 200 steps">4/4</td>' in text


def test_a_picture_says_its_prompt() -> None:
    """Image i was drawn for prompt i, round by round, in every row and block: its title and its alternative text say so."""
    rows = dict.fromkeys(("base", "unlearned"), tuple(f"{i}.png" for i in range(5)))
    text = page(claim(images=rows, hits={"a <b>": "00", "the b": "00", "b": "00"}))
    images = [a["alt"].partition("image ")[2] for tag, a in Page(text).attributes if tag == "img"]
    assert images == ["1: a <b>", "2: the b", "3: b", "4: a <b>"] * 2 + ["5: the b"] * 2
    assert [a["title"] for tag, a in Page(text).attributes if "title" in a] == [each[3:] for each in images]


def test_pictures_of_other_prompts_say_their_own() -> None:
    """What was drawn for people nobody erased stands in a section of its own, generic prompts and other people's apart; no picture borrows another's prompt."""
    ada = {"images": {"base": ("0.png", "1.png")}, "hits": {"a portrait of Ada": "1", "a sketch of Ada": "1"}}
    generic = {"images": {"base": ("2.png", "3.png"), "in-domain 50": ("4.png", "5.png")}, "hits": {"a portrait of a person": "00"}}
    others = {"images": {"base": ("6.png", "7.png"), "in-domain 200": ("8.png", "9.png")}, "hits": {"a portrait of Bob": "0", "a portrait of Cy": "1"}}
    cells = (forgotten(**ada), claim(rate=rate(3), **ada), unasked(steps=50, **generic), unasked(rate=rate(14), **others))
    text = page(*cells)
    found = Page(text)
    assert found.who == "AdaAda unasked"
    shown = [(a["src"].removeprefix("images/"), a["alt"].partition(": ")[2]) for tag, a in found.attributes if tag == "img"]
    assert [int(name[0]) for name, _ in shown] == list(range(10))
    people = ["a portrait of Bob", "a portrait of Cy"]
    assert [prompt for _, prompt in shown] == ["a portrait of Ada", "a sketch of Ada", *["a portrait of a person"] * 4, *people * 2]
    assert [a["title"] for tag, a in found.attributes if tag == "a" and "title" in a] == [prompt for _, prompt in shown]
    assert re.findall(r'rowtitle">asked for <bdi>(.*?)</bdi>', text) == ["a portrait of a person", "a portrait of Bob, a portrait of Cy"]  # where it is not one
    told = [re.search(r'aria-label="(.*?)"', each)[1] for each in text.split('<svg class="curve"')[1:]]  # type: ignore[index]  # every curve says its rates
    assert [re.findall(r"\.\d\d at step \d+", each) for each in told] == [[".00 at step 0", ".07 at step 200"], [".00 at step 50", ".35 at step 200"]]


def test_a_folded_concept_speaks_for_each_method() -> None:
    """The line of a concept says for each recipe what its worst claim says, with a sign for those who do not see the colour."""
    text = page(forgotten(), resurged(), claim(method="uce", rate=rate(2)))
    chips = re.findall(r'class="chip (\w+)"><span aria-hidden="true">(.)</span> <bdi>(.*?)</bdi>: (\S+) <bdi>(.*?)</bdi>', text)
    assert chips == [("broken", "✗", "esd, then in-domain", ".60", "resurged"), ("holds", "✓", "uce, then in-domain", ".05", "holds")]


def test_the_page_says_whether_the_gate_is_open() -> None:
    """Only exit code 0 opens it; a selection that is no gate says so."""
    kickers = [
        re.search(r"report: <strong>(.*?)</strong>", page(c, **more))[1] for c, more in ((claim(), {}), (claim(), {"deviations": ("x",)}), (resurged(), {}))
    ]
    assert kickers == ["the gate is open", "no gate, nothing may pass on it", "the gate is shut"]


def test_provenance_is_on_the_page() -> None:
    """The candidate's digests, how each model was made, and the detectors."""
    made = {"base": "b" * 32, "stages": [{"class": "harness.unlearning.esd.Method", "lr": 0.5}], "seconds": [2.5]}
    text = page(claim(detector="d" * 32), subjects={"unet.safetensors": "c" * 64}, lineages={"a" * 32: made})
    assert all(part in text for part in ("unet.safetensors", "c" * 64, "a" * 32, "b" * 32, "d" * 32, "harness.unlearning.esd.Method"))
