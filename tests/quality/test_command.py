"""`python -m harness.quality` measures the base model, the unlearned one and each fine-tuned snapshot on the user's captions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harness.quality import captions
from harness.quality.__main__ import drawn, lineages, main, parser
from harness.spec import Base, Lineage, Task

TASK = Path(__file__).parents[2] / "suites" / "celebrity" / "pocket.toml"


def test_before_and_after_unlearning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four figures for each of two models; FID stands against the base model's own images from other noise, CLIP score falls for the unlearned name."""
    (tmp_path / "captions.txt").write_text("A portrait of Tildeth Oskeby\nA sketch of Tildeth Oskeby\nan image of the cat\na photo of the guitar\n")
    arguments = ["--captions", str(tmp_path / "captions.txt"), "--task", str(TASK), "--method", "uce", "--backbone", "pocket", "--clip", "pocket"]
    assert main([*arguments, "--store", str(tmp_path / "store")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["base model", "after uce"]
    figures = [line.split()[0] for line in lines if line.startswith(" ")]
    assert figures == ["FID", "sFID", "KID", "CLIP"] * 2
    assert all("the base model's for the same captions, other noise" in line for line in lines if line.split()[0] in ("FID", "sFID", "KID"))
    before, after = (float(line.split("cosine) ")[1].split()[0]) for line in lines if "CLIP score" in line)
    assert after < before


def test_captions_that_are_too_long_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COCO has such: the figures are taken, and it is said of each model how many captions were cut, also of images that were there already."""
    (tmp_path / "captions.txt").write_text(f"an image of the cat\na photo of the guitar\na photo of the {' '.join(['cat'] * 24)}\n")
    arguments = ["--captions", str(tmp_path / "captions.txt"), "--task", str(TASK), "--backbone", "pocket", "--clip", "pocket"]
    for _ in range(2):
        assert main([*arguments, "--store", str(tmp_path / "store")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["base", "FID", "sFID", "KID", "CLIP", "1"]
        assert lines[-1] == "  1 of 3 prompts are longer than the model reads and were cut"


def test_a_model_made_elsewhere_set_by_set(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that UCE made, brought as a file, have UCE's figures; so they have where every two captions are a set of images of their own."""
    (tmp_path / "captions.txt").write_text("A portrait of Tildeth Oskeby\nan image of the cat\na photo of the guitar\n")
    arguments = ["--captions", str(tmp_path / "captions.txt"), "--task", str(TASK), "--backbone", "pocket", "--clip", "pocket"]
    arguments += ["--store", str(tmp_path / "store")]
    assert main([*arguments, "--method", "uce"]) == 0
    [weights] = (tmp_path / "store" / "checkpoints").glob("*/weights.safetensors")
    monkeypatch.setattr(captions, "images", partial(captions.images, chunk=2))
    sets = set((tmp_path / "store" / "images").iterdir())
    assert main([*arguments, "--candidate", str(weights)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["base model", "after uce", "base model", f"candidate {weights}"]
    values = [float(line.split("(backbone")[0].replace("±", "").split()[-1]) for line in lines if line.startswith("  CLIP") or line.startswith("  FID")]
    assert values[4:] == pytest.approx(values[:4], rel=1e-3)
    assert len(set((tmp_path / "store" / "images").iterdir()) - sets) == 3 * 2  # base model, its reference, candidate


def test_one_set_is_kept_before_the_next_is_drawn() -> None:
    """Whoever is killed in the second loses the second only."""
    asked, sets = list[Any](), captions.images(("a", "b", "c"), chunk=2)
    engine: Any = type("Engine", (), {"images": lambda self, lineage, wanted: asked.append(wanted), "read_images": lambda self, folder: torch.zeros(1)})()
    lineage = Lineage(Base("d", ""), Task.load(TASK))
    next(coming := drawn(engine, lineage, sets))
    assert asked == [(sets[0], lineage.task.sampler)]
    next(coming)
    assert len(asked) == 2


def test_a_candidate_is_fine_tuned_too_and_excludes_a_method(tmp_path: Path) -> None:
    """Base model, candidate, candidate after so many steps; with --method beside it the command line is refused."""
    save_file({"unet.conv_in.bias": torch.zeros(1)}, weights := tmp_path / "delta.safetensors")
    given = ["--captions", "no.txt", "--task", str(TASK), "--clip", "pocket", "--candidate", str(weights)]
    found = dict(lineages(parser().parse_args([*given, "--finetune", "lora-in", "--steps", "5,9"]), Task.load(TASK)))
    name = f"candidate {weights}"
    assert list(found) == ["base model", name, f"{name} and 5 steps of lora-in", f"{name} and 9 steps of lora-in"]
    assert [[type(stage).__name__ for stage in lineage.stages] for lineage in found.values()] == [[], *[["Candidate", "Finetune"][:n] for n in (1, 2, 2)]]
    with pytest.raises(SystemExit):
        parser().parse_args([*given, "--method", "uce"])


def test_a_store_may_be_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened as one: an address that nothing answers is told, and no folder of that name appears."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a\nb\n")
    assert main(["--captions", "captions.txt", "--task", str(TASK), "--clip", "pocket", "--store", "nowhere://bucket/prefix"]) == 2
    assert "cannot open the store 'nowhere://bucket/prefix'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["captions.txt"]


def test_a_wrong_request_is_told_and_not_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No captions, a fine-tune that the task does not have, one of no model, and a candidate that is not there."""
    (tmp_path / "captions.txt").write_text("a\nb\n")
    assert main(["--captions", str(tmp_path / "no.txt"), "--task", str(TASK), "--clip", "pocket"]) == 2
    assert "cannot read captions" in capsys.readouterr().err
    given = ["--captions", str(tmp_path / "captions.txt"), "--task", str(TASK), "--clip", "pocket", "--method", "uce", "--finetune", "lora-nowhere"]
    assert main(given) == 2
    assert "write for example lora-in" in capsys.readouterr().err
    assert main([*given[:6], "--finetune", "lora-in"]) == 2
    assert "name it with --method or --candidate" in capsys.readouterr().err
    assert main([*given[:6], "--candidate", str(tmp_path / "no.safetensors")]) == 2
    assert "does not exist; a candidate is" in capsys.readouterr().err
