"""The recipe of the full CIFAR-10 model: what it reads, what it builds, and that it refuses what is not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.controller import _resolved
from fixtures.keys import fits
from harness import catalogue, pipeline, pocket
from harness.catalogue import Spec
from harness.errors import SpecError
from harness.pocket import ddpm
from harness.spec import Task
from suites.cifar10 import train, tune
from tests.test_options import parsed

SUITE = Path(__file__).parents[1] / "suites" / "cifar10"
PUBLISHED = ("airplane", "bird", "cat", "deer", "full")


def batches(folder: Path, each: int = 3) -> np.ndarray:
    """The binary version with a few rows a file: labels in turn, pixels by row."""
    rows = np.zeros((5 * each, train.ROW), dtype=np.uint8)
    rows[:, 0] = np.arange(len(rows)) % 10
    rows[:, 1:] = np.random.default_rng(0).integers(0, 256, (len(rows), train.ROW - 1))
    for name, part in zip(train.FILES, np.split(rows, 5), strict=True):
        part.tofile(folder / name)
    (folder / train.NAMES).write_text("\n".join(ddpm.CLASSES) + "\n\n")
    return rows


def test_the_binary_version_is_read_as_it_is_written(tmp_path: Path) -> None:
    """A label, then red, green and blue row by row, over all five files in order."""
    rows = batches(tmp_path)
    images, truth = train.read(tmp_path)
    assert (images.shape, images.dtype) == ((15, 3, 32, 32), torch.uint8)
    assert truth.tolist() == rows[:, 0].tolist()
    assert images[4, 1, 2, 3] == rows[4, 1 + 1024 + 2 * 32 + 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "data_batch_3.bin").unlink(), r"no data_batch_3\.bin in .*cifar-10-binary\.tar\.gz"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(b"12"), "holds 2 bytes that are no rows"),
        (lambda folder: (folder / "data_batch_3.bin").write_bytes(bytes([10]) * train.ROW), "no rows of a label below 10"),
        (lambda folder: (folder / train.NAMES).write_text("apple"), "names apple; CIFAR-10's classes are airplane"),
    ],
)
def test_data_that_is_not_there_or_not_it(tmp_path: Path, damage: object, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The error says what is missing and where it comes from; the command ends with 2 and trains nothing."""
    batches(tmp_path)
    damage(tmp_path)  # type: ignore[operator]  # one of the above
    with pytest.raises(SpecError, match=message):
        train.read(tmp_path)
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_network_is_the_published_one() -> None:
    """36 to 39 million parameters, attention at 16 pixels and in the middle, dropout, one label more than classes."""
    with torch.device("meta"):
        unet = train.build()
    assert 35e6 < sum(p.numel() for p in unet.parameters()) < 40e6
    assert [hasattr(block, "attentions") for block in unet.down_blocks] == [False, True, False, False]
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == [False, False, True, False]
    assert (unet.config.dropout, unet.config.num_class_embeds, unet.down_blocks[1].attentions[0].heads) == (0.1, 11, 1)


def test_the_command_trains_and_saves_what_the_harness_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps with a small network: a folder in float32 that draws the ten classes."""
    batches(tmp_path)
    monkeypatch.setattr(train, "build", lambda: ddpm.build((8, 8, 16)))
    monkeypatch.setattr(train, "RECIPE", ddpm.Recipe(9, 4, 2e-4, 1, 0.5, False, torch.optim.Adam))
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "2"]) == 0
    assert "ddpm 1/2 " in capsys.readouterr().out
    pipe = pipeline.load(pipeline.identify(str(tmp_path / "out")))
    assert pipe.family == "class-conditional"
    assert pipe.encode(["automobile", ""]).tolist() == [1, 10]


def test_the_command_writes_real_pictures_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each class, in the order of the files, in a folder of its name; nothing is trained."""
    rows = batches(tmp_path)
    monkeypatch.setattr(train, "EACH", 1)
    out = tmp_path / "pictures"
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--pictures", str(out)]) == 0
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*.png")) == [f"{name}/000.png" for name in ddpm.CLASSES]
    seen = np.asarray(Image.open(out / "bird" / "000.png"))
    assert (seen.transpose(2, 0, 1).ravel() == rows[2, 1:]).all()
    assert not (tmp_path / "out").exists()


def test_the_rate_rises_and_falls_or_stays() -> None:
    """The tiny model's is a warm-up and a cosine to 0; the full recipe's is constant, as published."""
    tiny = ddpm.Recipe(100, 8, 1.0, 10, 0.9, True, torch.optim.AdamW)
    assert [round(tiny.share(at), 3) for at in (0, 4, 50, 100)] == [0.1, 0.498, 0.5, 0.0]
    assert {train.RECIPE.share(at) for at in (0, 1, 999_999)} == {1.0}
    assert (train.RECIPE.steps, train.RECIPE.batch, train.RECIPE.rate, train.RECIPE.decay) == (1_000_000, 128, 2e-4, 0.9999)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_task_says_that_it_was_not_run_and_what_it_lacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first lines; without its model, or real pictures of every class that is kept, it is refused before anything is drawn, with the command."""
    text = (SUITE / f"{name}.toml").read_text()
    assert "Not yet run with real data" in text.partition("\n\n")[0].partition("suite =")[0]
    task = Task.load(SUITE / f"{name}.toml")
    with pytest.raises(SpecError, match=r"made for the model in '\.weights/cifar10-ddpm', which is not there .*suites\.cifar10\.train.*give --model"):
        fits(task, task.model)
    monkeypatch.chdir(tmp_path)
    assert task.quality
    for concept in task.retained.concepts:
        with pytest.raises(SpecError, match=rf"no PNG or JPEG in '\.weights/cifar10-pictures/{concept}'.*suites\.cifar10\.train.*--pictures"):
            fits(task, "owner/name")
        folder = Path(task.quality.reference.replace("{}", concept))
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.png").touch()
    fits(task, "owner/name")
    assert not Path(task.quality.reference.replace("{}", task.erased.concepts[0])).exists()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_tasks_are_the_publications(name: str) -> None:
    """A class becomes the one that follows it; all others are known to the method and looked at."""
    task = Task.load(SUITE / f"{name}.toml")
    (erased,), (anchor,) = task.erased.concepts, task.anchor.concepts
    at = ddpm.CLASSES.index(erased)
    assert (anchor, task.alternative) == (ddpm.CLASSES[at + 1],) * 2
    assert set(task.retain.concepts) == set(task.retained.concepts) == set(ddpm.CLASSES) - {erased}
    assert task.overlap
    steps = {Spec.parse(method).name: dict(Spec.parse(method).fields)["steps"] for method in task.methods}
    assert steps == {"dimum": "20000", "salun": "20000", "sfron": "2000"}
    assert task.control in task.methods
    for method in task.methods:
        assert catalogue.runs_on(type(catalogue.make("unlearning", Spec.parse(method), {})), "class-conditional")


def test_the_pocket_task_reports_another_class_than_the_development_one() -> None:
    """Ten classes, each with one part; the class that is reported has none where hyper-parameters are looked for."""
    task, development = (Task.load(SUITE / f"{name}.toml") for name in ("pocket", "pocket-development"))
    parts = [task.erased, task.anchor, task.retain, task.retained, *task.finetune.values()]
    assert sorted(concept for part in parts for concept in part.concepts) == sorted(ddpm.CLASSES)
    used = [development.erased, development.anchor, development.retain, development.retained, *development.finetune.values()]
    assert not {concept for part in used for concept in part.concepts} & set(task.erased.concepts)
    assert development.erased != task.erased
    assert not task.overlap
    assert (task.sampler.steps, task.sampler.guidance) == (ddpm.SETTINGS.steps, ddpm.SETTINGS.guidance)


def test_presets_and_trials_are_for_methods_that_run_here() -> None:
    """Every preset and every trial makes a stage of the class-conditional family; the suite's methods have presets."""
    presets = pocket.presets("pocket-ddpm")
    assert set(Task.load(SUITE / "pocket.toml").methods) <= set(presets["unlearning"])
    stages = [catalogue.make(kind, Spec(name), presets) for kind, named in presets.items() for name in named]
    stages += [catalogue.make("unlearning", Spec.parse(text), {}) for texts in tune.TRIALS.values() for text in texts]
    assert all(catalogue.runs_on(type(stage), "class-conditional") for stage in stages)
    assert pocket.presets("owner/name") == {}


def test_a_verdict_names_the_model_and_methods_that_the_task_decided() -> None:
    """Where the command line leaves them to the task, `run.options` still says what ran; what it names stands."""
    found = Task.load(Path(__file__).parents[1] / "suites" / "cifar10" / "pocket.toml")
    assert _resolved(parsed(), [found]) == {"model": "pocket-ddpm", "methods": ["dimum", "salun", "sfron"]}
    assert _resolved(parsed("--method", "ga"), [found])["methods"] == ["ga"]
