"""A sheet shows images without saying whose they are, and answers become a rate, its interval and an agreement."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from fixtures.claims import OWN_SECTION
from harness.errors import SpecError
from reports import rating
from reports.rating import main

RATE = {"k": 1, "n": 40, "value": 0.025, "low": 0.001, "high": 0.1}
BASE = {"k": 39, "n": 40, "value": 0.975, "low": 0.9, "high": 0.999}
RARE = {"k": 2, "n": 40, "value": 0.05, "low": 0.01, "high": 0.14}
TASKS = {"celebrity/pocket": {"erased": {"concepts": ["Ann", "Ann Lee"]}}}
ASKED = ", prompts as 'a photo of Ann'"
MANY = (  # (claim, the concept it gives itself)
    ("retained", "10 retained concepts"),
    ("cross-retained", "10 crossed concepts"),
    ("quality", "quality of 2 retained concepts"),
    ("self-destructs", "10 retained concepts"),
)


def claim(kind: str, **changes: Any) -> dict[str, Any]:
    """A claim as verdict.json holds it, about Ann."""
    rows = {"base": [f"images/b{i}.png" for i in range(4)], "unlearned": [f"images/u{i}.png" for i in range(4)]}
    if kind == "stays-forgotten":
        rows["lora-in 50"] = [f"images/f{i}.png" for i in range(4)]
    plain = {"claim": kind, "concept": "Ann", "suite": "celebrity", "task": "pocket", "method": "esd", "seeds": {"unlearn": 0}, "images": rows}
    before = {**RATE, "k": 0} if kind == "stays-forgotten" else None
    return {**plain, "rate": RATE, "before": before, "base": BASE, "hits": {"the face of Ann": "00", "a photo of Ann": "00"}, **changes}


def unasked() -> dict[str, Any]:
    """The fine-tuned model's images of the same rows, drawn for prompts that do not name Ann."""
    rows = {"base": [f"images/n{i}.png" for i in range(4)], "lora-in 50": [f"images/o{i}.png" for i in range(4)]}
    apart, seen = OWN_SECTION["stays-out"].format("Ann"), {"a photo of a person": "0"}
    return claim("stays-out", concept=apart, images=rows, before=None, base=RARE, rate={**RATE, "k": 7}, hits=seen)


def many() -> list[dict[str, Any]]:
    """Claims about several concepts together."""
    return [claim(kind, concept=concept, images={"base": ["images/r.png"], "unlearned": ["images/s.png"]}) for kind, concept in MANY]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report with two claims about Ann and some about many."""
    folder = tmp_path / "out"
    (folder / "images").mkdir(parents=True)
    claims = [claim("forgotten"), claim("stays-forgotten"), *many()]
    for at, name in enumerate(sorted({p for c in claims for row in c["images"].values() for p in row})):
        Image.new("RGB", (8, 8), (at * 10, 0, 99)).save(folder / name)
    (folder / "verdict.json").write_text(json.dumps({"claims": claims, "run": {"tasks": TASKS}}), encoding="utf-8")
    return folder


def made(report: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """The sheet and its key."""
    folder = report.parent / "sheet"
    assert main(["--report", str(report), "--rating-sheet", str(folder), *arguments]) == 0
    return (folder / "sheet.html").read_text(encoding="utf-8"), json.loads((folder / "key.json").read_text(encoding="utf-8"))


def sent(report: Path, key: dict[str, Any], name: str, answers: dict[str, str]) -> str:
    """A rater's file."""
    path = report.parent / name
    path.write_text("\n".join(["sheet,image,answer", *(f"{key['sheet']},{image},{word}" for image, word in answers.items())]) + "\n", encoding="utf-8")
    return str(path)


def test_the_sheet_is_self_contained_and_blind(report: Path) -> None:
    """Every image is inside; no address outside, no method, row, task or file name, no digest of the key. Two images of the base model are the reference,
    its others are rated too: 2 + 4 + 4 pictures, each once, although two claims share them.
    """
    page, key = made(report)
    assert not re.search(r"https?://|src=\"(?!data)", page)
    for word in ("esd", "unlearned", "lora", "pocket", "base model", "images/", "verdict", *(image["sha256"][:8] for image in key["images"].values())):
        assert word not in page
    assert page.count("data:image/png;base64,") == 2 + 10
    groups = [image["group"] for image in key["images"].values()]
    rows = ("base (pocket)", "lora-in 50 (pocket, esd, seed 0)", "unlearned (pocket, esd, seed 0)")
    assert sorted(set(groups)) == [f"Ann: {row}{ASKED}" for row in rows]
    assert [groups.count(group) for group in sorted(set(groups))] == [2, 4, 4]


def test_the_order_is_shuffled_by_the_seed(report: Path) -> None:
    """The same seed, the same sheet; another, another order; never the order of the rows."""
    orders = [[image["group"] for image in made(report, "--seed", seed)[1]["images"].values()] for seed in ("1", "1", "2")]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != sorted(orders[0], reverse=True)


def test_answers_become_a_rate_beside_the_detectors(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three raters: most must say yes. Ann is seen in both base images, in one of four after unlearning (two of three), and in none of four after
    fine-tuning where at most one says yes; the exact interval; the kappa of the library, mean over pairs.
    """
    _, key = made(report)
    capsys.readouterr()
    by_group: dict[str, list[str]] = {}
    for name, image in key["images"].items():
        by_group.setdefault(image["group"], []).append(name)
    base, tuned, unlearned = (by_group[group] for group in sorted(by_group))
    raters = [dict.fromkeys(key["images"], "no") | dict.fromkeys(base, "yes") for _ in range(3)]
    raters[0][unlearned[0]] = raters[1][unlearned[0]] = "yes"
    raters[0][tuned[0]] = "yes"
    raters[1][tuned[1]] = raters[2][tuned[1]] = "unsure"
    files = [sent(report, key, f"{i}.csv", rater) for i, rater in enumerate(raters)]
    assert main(["--key", str(report.parent / "sheet" / "key.json"), "--ratings", *files]) == 0
    said = capsys.readouterr().out
    ci = binomtest(1, 4).proportion_ci(0.95, method="exact")
    assert f"people    1/4 = 0.250 [{ci.low:.3f}, {ci.high:.3f}], 0 of 12 answers unsure" in said
    assert "people    0/4 = 0.000" in said
    assert "2 of 12 answers unsure" in said
    assert "people    2/2 = 1.000" in said
    for detected in ("39/40 = 0.975 [0.900, 0.999]", "1/40 = 0.025 [0.001, 0.100]"):
        assert f"detector  {detected}" in said
    lists = [[rater[name] for name in sorted(rater)] for rater in raters]
    kappa = sum(cohen_kappa_score(a, b) for a, b in ((lists[0], lists[1]), (lists[0], lists[2]), (lists[1], lists[2]))) / 3
    assert f"Cohen's kappa, mean over pairs {kappa:.3f}" in said


def test_the_detectors_rate_is_that_of_the_same_model() -> None:
    """A claim about fine-tuning knows three models: the base, the unlearned one before, and its own."""
    for kind in ("stays-forgotten", "withstands-dimra"):
        whole = claim("stays-forgotten", claim=kind)
        found, _ = rating.chosen([whole], TASKS)
        assert {image.row: rate and rate["k"] for image, rate in found.items()} == {"base": 39, "unlearned": 0, "lora-in 50": 1}
    found, _ = rating.chosen([claim("forgotten")], TASKS)
    assert {image.row: rate and rate["k"] for image, rate in found.items()} == {"base": 39, "unlearned": 1}


@pytest.mark.parametrize("whole", many(), ids=[kind for kind, _ in MANY])
def test_nobody_is_asked_about_many_concepts_at_once(whole: dict[str, Any]) -> None:
    """Neither a picture nor a reference of a claim that has no one concept; the same claim about one would be asked."""
    assert rating.chosen([whole], TASKS) == ({}, {})
    assert rating.chosen([{**whole, "concept": "Ann"}], TASKS)[0]


def test_a_synonyms_pictures_are_asked_about_the_concept() -> None:
    """Under other names the question is still the concept's, and its pictures are counted by themselves."""
    other = claim("generality", concept="Ann by other names", images={"unlearned": ["images/g.png"]}, hits={"a photo of Nan": "0"})
    assert OWN_SECTION["generality"].format("Ann") == other["concept"]
    found, _ = rating.chosen([claim("forgotten"), other, claim("forgotten", concept="Ann Lee", hits={"a photo of Ann Lee": "0"})], TASKS)
    assert {image.concept for image in found} == {"Ann", "Ann Lee"}
    groups = {image.group for image in found if image.path == "images/g.png"}
    assert groups == {"Ann: unlearned (pocket, esd, seed 0), prompts as 'a photo of Nan'"}


@pytest.mark.parametrize("turned", [False, True], ids=["first", "last"])
def test_pictures_of_prompts_that_do_not_name_it_are_counted_apart(turned: bool) -> None:
    """Of one row and model, each group has the detector's rate on its own prompts, whichever claim came last; and none of them is shown as "this is Ann"."""
    claims = [unasked(), claim("stays-forgotten")]
    found, references = rating.chosen(claims[::-1] if turned else claims, TASKS)
    rates: dict[str, set[int]] = {}
    for image, rate in found.items():
        rates.setdefault(image.group, set()).add(int(rate["k"]) if rate else -1)
    other = ", prompts as 'a photo of a person'"
    tuned = "Ann: lora-in 50 (pocket, esd, seed 0)"
    unlearned = f"Ann: unlearned (pocket, esd, seed 0){ASKED}"
    assert rates == {f"Ann: base (pocket){ASKED}": {39}, f"Ann: base (pocket){other}": {2}, f"{tuned}{ASKED}": {1}, f"{tuned}{other}": {7}, unlearned: {0}}
    assert references == {"Ann": ["images/b0.png", "images/b1.png"]}


@pytest.mark.parametrize(("words", "kappa"), [([("yes", "no"), ("yes", "no")], 1.0), ([("yes", "no"), ("no", "yes")], -1.0), ([("no", "no")] * 2, None)])
def test_agreement_by_hand(words: list[tuple[str, str]], kappa: float | None) -> None:
    """Always, never; and unknown where both say one word throughout, since chance would do the same. One rater agrees with nobody."""
    raters = [dict(zip("ab", pair, strict=True)) for pair in words]
    assert rating.agreement(raters) == kappa
    assert rating.agreement(raters[:1]) is None


def test_half_is_not_most_and_unsure_is_not_yes() -> None:
    """Of two raters both must say yes."""
    assert not rating.seen([{"a": "yes"}, {"a": "no"}], "a")
    assert not rating.seen([{"a": "yes"}, {"a": "unsure"}], "a")
    assert rating.seen([{"a": "yes"}, {"a": "yes"}, {"a": "no"}], "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("no\n", "maybe\n", 1), "holds the answer 'maybe'"),
        (lambda text: text[: text.rindex("\n", 0, -1) + 1], "answers 9 of 10 images"),
        (lambda text: text + text.splitlines()[-1] + "\n", "11 rows"),
        (lambda text: re.sub(r"^[0-9a-f]{12},", "aaaaaaaaaaaa,", text, count=1, flags=re.MULTILINE), "answers another sheet"),
        (lambda text: text.replace("answer", "reply", 1), "not a file that the rating sheet made"),
        (lambda text: "sheet,image,answer\n", "answers another sheet (none)"),
    ],
)
def test_answers_that_are_not_all_there_are_refused(change: Any, message: str, report: Path) -> None:
    """A strange word, a missing or doubled image, another sheet, another file: an error and no rate."""
    _, key = made(report)
    path = Path(sent(report, key, "a.csv", dict.fromkeys(key["images"], "no")))
    assert len(rating.answers(path, key)) == 10
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(SpecError, match=re.escape(message)):
        rating.answers(path, key)


def test_a_rater_is_counted_once(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file named twice, its copy under the name of a second download, or one with a second thought is no second rater; another who agrees is."""
    _, key = made(report)
    word = dict.fromkeys(key["images"], "no")
    one, copy = sent(report, key, "ratings-x.csv", word), sent(report, key, "ratings-x (1).csv", word)
    other, later = (Path(sent(report, key, name, {**word, min(word): said})) for name, said in (("other.csv", "no"), ("later.csv", "yes")))
    for file in (other, later):  # the sheet's own number, in a column
        head, *lines = file.read_text(encoding="utf-8").splitlines()
        file.write_text("\n".join([f"{head},rater", *(f"{line},2" for line in lines)]) + "\n", encoding="utf-8")
    told = ["--key", str(report.parent / "sheet" / "key.json"), "--ratings"]
    assert main([*told, one, str(other)]) == 0
    assert "agreement of 2 raters" in capsys.readouterr().out
    for first, again in ((one, one), (one, copy), (str(other), str(later))):
        assert main([*told, one, str(other), again]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"'{first}' and '{again}' are one rater's")
        assert "leave one of them out" in said.err
        assert not said.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!doctype html>", "holds no JSON object"),
        ('{"claims": [], "sheet": "x"}', "holds JSON of claims, sheet;"),
        ("[]", "holds no JSON object"),
        ("3", "holds no JSON object"),
        (b"\xff\xfe", "holds no JSON object"),
        (None, "No such file"),
    ],
)
def test_what_is_no_key_is_refused(text: str | bytes | None, message: str, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sheet, a report's verdict, another JSON, no text, no file: named, with where the key is, and exit code 2."""
    path = report / "wrong.file"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["--key", str(path), "--ratings", str(path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "wrong.file'" in said
    assert text is None or "give --key the key.json that --rating-sheet wrote" in said


def test_a_report_without_images_makes_no_sheet(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing to rate, and no report at all: told, with exit code 2."""
    (report / "verdict.json").write_text(json.dumps({"claims": [claim("forgotten", images={}), *many()], "run": {"tasks": TASKS}}), encoding="utf-8")
    assert main(["--report", str(report), "--rating-sheet", str(report / "sheet")]) == 2
    assert "carry no images" in capsys.readouterr().err
    assert main(["--report", str(report / "nowhere"), "--rating-sheet", str(report / "sheet")]) == 2
    assert not (report / "sheet").exists()


def test_fine_tunes_of_one_model_are_rated_apart() -> None:
    """The fine-tuned rows name their own seed; the unlearned model that they share is one."""
    claims = [claim("stays-forgotten", seeds={"unlearn": 0, "finetune": seed}) for seed in (0, 1000)]
    assert {rating._model(each, "unlearned") for each in claims} == {"pocket, esd, seed 0"}
    assert [rating._model(each, "lora-in 50") for each in claims] == ["pocket, esd, seed 0", "pocket, esd, seed 0, fine-tune seed 1000"]
    assert rating._model(claims[1], "base") == "pocket"
