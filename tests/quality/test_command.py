"""`python -m harness.quality` measures the base model, the unlearned one and each fine-tuned snapshot on the user's captions."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.quality.__main__ import main

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


def test_a_wrong_request_is_told_and_not_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No captions, and a fine-tune that the task does not have."""
    (tmp_path / "captions.txt").write_text("a\nb\n")
    assert main(["--captions", str(tmp_path / "no.txt"), "--task", str(TASK), "--clip", "pocket"]) == 2
    assert "cannot read captions" in capsys.readouterr().err
    given = ["--captions", str(tmp_path / "captions.txt"), "--task", str(TASK), "--clip", "pocket", "--method", "uce", "--finetune", "lora-nowhere"]
    assert main(given) == 2
    assert "write for example lora-in" in capsys.readouterr().err
