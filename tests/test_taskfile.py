"""Task files: what only some tasks need, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import SpecError
from harness.spec import Group, Lineage, Quality, Task, Verbatim, canonical, key
from harness.taskfile import made, plain, read, real_images
from tests.test_spec import TOML, lineage, task


def written(folder: Path, text: str, **others: str) -> Task:
    """The task in `t.toml`, beside other files."""
    for name, other in others.items():
        (folder / f"{name}.toml").write_text(other)
    (folder / "t.toml").write_text(text)
    return read(folder / "t.toml")


def test_a_file_can_be_like_another(tmp_path: Path) -> None:
    """Keys that are given take the place of whole keys; everything else is the other file's; the id is its own."""
    found = written(tmp_path, 'like = "other"\nerased = { concepts = ["y"], prompts = ["the {}"] }\n', other=TOML)
    assert found == task(erased=Group(("y",), ("the {}",)))
    assert found.id == "t"


QUALITY = '[quality]\nfid = 3.5\ncount = 40\nbackbone = "pocket"\n'


def test_what_quality_and_which_model_and_methods(tmp_path: Path) -> None:
    """A table of its own; without it nothing is asked of quality. Model and methods are the task's, by default the pocket model and its three."""
    found = written(tmp_path, 'model = "m"\nmethods = ["salun"]\nsmoke = ["ga"]\n' + TOML + QUALITY)
    assert (found.quality, found.model, found.methods, found.smoke) == (Quality(3.5, 40, "pocket"), "m", ("salun",), ("ga",))
    assert made(found.id, plain(found)) == found
    assert (task().quality, task().model, task().methods, task().smoke) == (None, "pocket", ("esd", "uce", "dimum"), ())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fid = 3.5\n", "", r"\[quality\] lacks fid"),
        ("fid = 3.5", "fid = 0", "fid must be above 0"),
        ("count = 40", "count = 19", "at least 20, got count 19"),
        ("count", "counts", "unknown key in .quality.*'counts'.*Did you mean 'count'"),
    ],
)
def test_a_quality_that_cannot_be_measured(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Without a tolerance, with one that nothing meets, with too few images, misspelt."""
    with pytest.raises(SpecError, match=message):
        written(tmp_path, TOML + QUALITY.replace(old, new))


def test_real_images_of_a_quality(tmp_path: Path) -> None:
    """A folder with all below it, or one for each retained concept where `{}` stands; too few, or a folder without any, are refused. By default none."""
    found = written(tmp_path, TOML + QUALITY + f'reference = "{tmp_path}/{{}}"\n')
    assert found.quality == Quality(3.5, 40, "pocket", reference=f"{tmp_path}/{{}}")
    assert made(found.id, plain(found)) == found
    assert real_images(found, Quality(3.5)) == []
    with pytest.raises(SpecError, match=r"no PNG or JPEG in '.*/r', a reference of .quality.; put real images there \(made up\), or leave the key out"):
        real_images(found, found.quality)
    for i in range(20):
        folder = tmp_path / ("r" if i < 19 else "x/deep")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.{('png', 'JPG', 'jpeg')[i % 3]}").touch()
    (tmp_path / "r" / "notes.txt").touch()
    with pytest.raises(SpecError, match="at least 20 images on each side, got 19 in"):
        real_images(found, found.quality)
    assert [file.stem for file in real_images(found, Quality(3.5, reference=str(tmp_path)))] == [f"{i:02d}" for i in range(20)]


def test_quality_looks_at_whole_rounds() -> None:
    """Two retained concepts and one prompt: 41 images would hold more of one."""
    with pytest.raises(SpecError, match="41 images, which is no multiple of the 2 prompts"):
        task(retained=Group(("r", "s"), ("a {}",)), quality=Quality(1.0, 41, "pocket"))


@pytest.mark.parametrize("other", ['like = "t"', 'like = "third"'])
def test_likeness_ends_after_one_step(tmp_path: Path, other: str) -> None:
    """A file that is like one that is like one (itself, in the end) is refused, as is one that is like none that is there."""
    with pytest.raises(SpecError, match="like no other"):
        written(tmp_path, 'like = "other"', other=other, third=TOML)
    with pytest.raises(SpecError, match="must name a task file beside this one"):
        written(tmp_path, 'like = "nobody"')


def test_verbatim_prompts_stand_as_they_are(tmp_path: Path) -> None:
    """They speak for one concept and need no place for its name; their address is that of a group with these prompts."""
    found = written(
        tmp_path, TOML.replace('erased = { concepts = ["x"], prompts = ["a {}"] }', 'erased = { concepts = ["x"], verbatim = ["bare", "b {}"] }')
    ).erased
    assert isinstance(found, Verbatim)
    assert (found.asking("x"), found.concepts) == (("bare", "b {}"), ("x",))
    assert canonical(found) == {"concepts": ["x"], "prompts": ["bare", "b {}"]}
    for concepts, prompts in ((("x", "y"), ("bare",)), (("x",), ()), (("x",), (" ",))):
        with pytest.raises(SpecError, match="exactly one concept"):
            Verbatim(concepts, prompts)


def test_new_parts_leave_addresses_alone(tmp_path: Path) -> None:
    """What a stage reads is what it read before there were synonyms, crossed concepts or figures: no address moves."""
    plain = lineage(*(before := task(),)[1:])
    also = task(
        synonyms={"x": ("xx",)},
        crossed=Group(("z",), ("a {}",)),
        figures={"UA": "1 - erased"},
        detectors={"crossed": {"name": "clip"}},
        quality=Quality(1.0),
        methods=(),
    )
    parts = ("erased", "anchor", "retain", "finetune", "retained")
    assert key([getattr(before, name) for name in parts]) == key([getattr(also, name) for name in parts])
    assert Lineage(plain.base, also).key == plain.key


@pytest.mark.parametrize(("line", "message"), [
    ('synonyms = { z = ["zz"] }', "synonyms are given for 'z', which is not erased"),
    ('synonyms = { x = ["f"] }', "finetune.in prompt 'a f' names the erased concept 'f'"),
    ('crossed = { concepts = ["R"], prompts = ["a {}"] }', "both retained and crossed|both crossed and retained"),
    ('crossed = { concepts = ["z"], prompts = ["a"] }', "'a' must contain"),
    ('crossed = { concepts = ["z"], prompts = [] }', r"\[crossed\] a group of concepts needs at least one concept and one prompt"),
    ('figures = { UA = "2 - erased" }', "unknown rate of the figure 'UA' '2 - erased'"),
    ('detectors = { erased = { name = "clip" } }', r"unknown role in \[detectors\] 'erased'"),
    ('overlpa = "none"', "unknown key 'overlpa'.*Did you mean 'overlap'"),
    ('suite = "celebrity"', "Cannot overwrite a value"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, line: str, message: str) -> None:
    """Roles that overlap, names of nothing, prompts without a place, keys given twice."""
    with pytest.raises(SpecError, match=f"(?s)task file t.toml: .*({message})"):
        written(tmp_path, TOML + line + "\n")


DETECTOR, RETAIN = 'detector = { name = "d" }', 'retain = { concepts = ["k"], prompts = ["a {}"] }'


@pytest.mark.parametrize(("old", "new", "message"), [
    ("", 'synonyms = { x = "xx" }', r"synonyms\.x must be a list of texts, such as \[\"cat\"\], got 'xx'"),
    ("", "synonyms = { x = [1] }", r"synonyms\.x\[0\] must be a text in quotes, got 1"),
    ("", 'synonyms = ["x"]', r"\[synonyms\] must be a table, got \['x'\]"),
    ("", 'figures = "UA"', r"\[figures\] must be a table, got 'UA'"),
    ("", "figures = { UA = 1 }", r"figures\.UA must be a text in quotes, got 1"),
    (RETAIN, 'retain = { concepts = ["k"], prompts = ["a {}", 1] }', r"retain\.prompts\[1\] must be a text in quotes, got 1"),
    (RETAIN, 'retain = { concepts = ["k"], verbatim = "the k" }', r"retain\.verbatim must be a list of texts.*, got 'the k'"),
    ("", 'detectors = { retained = "clip" }', r"\[detectors\.retained\] must be a table, got 'clip'"),
    ("", 'detectors = { retained = { rule = "top-1" } }', r"\[detectors\.retained\] lacks name"),
    ("", 'detectors.retained = { name = "d", names = { r = 3 } }', r"detectors\.retained\.names\.r must be a text in quotes, got 3"),
    (DETECTOR, 'detector = "gallery"', r"\[detector\] must be a table, got 'gallery'"),
    (DETECTOR, 'detector = { name = "d", rule = 3 }', r"detector\.rule must be a text in quotes, got 3"),
    (DETECTOR, 'detector = { name = "d", rule = "top" }', "cannot read the detector's rule 'top'; write top-1"),
    (DETECTOR, "detector = {}", r"\[detector\] lacks name"),
    ("", "tolerance = { floor = 40.5 }", r"tolerance\.floor must be a whole number, got 40\.5"),
    ("", 'tolerance = { tau = "0.1" }', r"tolerance\.tau must be a number, got '0\.1'"),
    ("", "tolerance = { cap = true }", r"tolerance\.cap must be a whole number, got True"),
    ("", "quality = 3", r"\[quality\] must be a table, got 3"),
    ("", 'quality = { fid = "3" }', r"quality\.fid must be a number, got '3'"),
    ("", "asked = 3", r"asked must be a text in quotes, got 3"),
    ("", "overlap = true", r"overlap must be a text in quotes, got True"),
])  # fmt: skip
def test_a_value_of_another_shape_is_told_by_its_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A word where a list belongs, a number in quotes, a half image: the file, the key, what it is and what it must be."""
    assert old in TOML
    with pytest.raises(SpecError, match=f"task file t.toml: {message}"):
        written(tmp_path, TOML.replace(old, "") + new + "\n")


def test_a_whole_number_is_a_number_and_stays_as_it_was_written(tmp_path: Path) -> None:
    """Wherever a number is allowed; 3 is not turned into 3.0, which would be another address."""
    found = written(tmp_path, TOML.replace("guidance = 3.0", "guidance = 3"))
    assert (type(found.sampler.guidance), found.sampler.guidance) == (int, 3)


def test_a_file_of_prompts_asks_for_one_concept(tmp_path: Path) -> None:
    """It lies where the task file lies; with two erased concepts nobody knows whom it asks for."""
    assert written(tmp_path, TOML + 'asked = "p.csv"\n').asked == str(tmp_path / "p.csv")
    with pytest.raises(SpecError, match="ask for one concept, and 2 are erased"):
        written(tmp_path, TOML.replace('["x"]', '["x", "y"]') + 'asked = "p.csv"\n')


def test_an_overlap_has_a_reason_and_spares_what_is_erased(tmp_path: Path) -> None:
    """With a reason roles may share concepts, but never the erased ones."""
    shared = TOML.replace('retained = { concepts = ["r"]', 'retained = { concepts = ["k"]')
    with pytest.raises(SpecError, match="roles must be disjoint"):
        written(tmp_path, shared)
    assert written(tmp_path, shared + 'overlap = "one list"\n').retained.concepts == ("k",)
    with pytest.raises(SpecError, match="roles must be disjoint"):
        written(tmp_path, shared.replace('["k"]', '["x"]', 1) + 'overlap = "one list"\n')


def test_fewer_erased_have_fewer_synonyms() -> None:
    """A smaller profile asks about the synonyms of those that are left."""
    many = task(erased=Group(("x", "y"), ("a {}",)), synonyms={"x": ("xx",), "y": ("yy",)})
    assert many.erasing(1).synonyms == {"x": ("xx",)}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("[]", r"methods must be a list of at least one method, such as \[.esd.\], got \[\]"),
        ('"dimum"', r"methods must be a list of texts.*, got 'dimum'"),
        ("[1]", r"methods\[0\] must be a text in quotes, got 1"),
    ],
)
def test_a_task_without_a_method_is_refused(methods: str, message: str, tmp_path: Path) -> None:
    """Nothing would be measured, and a gate on nothing would open; a word is not a list of its letters."""
    text = (Path(__file__).parents[1] / "suites" / "celebrity" / "pocket.toml").read_text(encoding="utf-8")
    (tmp_path / "pocket.toml").write_text(f"methods = {methods}\n{text}", encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        Task.load(tmp_path / "pocket.toml")
