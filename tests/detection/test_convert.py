"""Published pickles become safetensors without anything in them being run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness import catalogue
from harness.detection.__main__ import main
from harness.detection._convert import labels
from tests.detection._eyes_of import celebrities, noise


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["q16", "laion-nsfw", "gcd", "resnet34", "unlearncanvas", "inception"])
def test_what_a_pickle_wants_to_run_is_not_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a torch checkpoint nor a plain pickle with code in it: the command fails, nothing happened, nothing was written."""
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    for name, save in (("plain", lambda thing, path: path.write_bytes(pickle.dumps(thing))), ("torch", torch.save)):
        file = tmp_path / name
        save({"model_state": Bomb(tmp_path / "boom"), "model_state_dict": Bomb(tmp_path / "boom")}, file)
        assert main(["convert", kind, str(file), str(tmp_path / "out"), "--labels", str(labels)]) == 2
        assert "not opened" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gcd", "unlearncanvas", "inception"])
@pytest.mark.parametrize("thing", [torch.zeros(2), [torch.zeros(2)], {"epoch": 3}], ids=["tensor", "list", "no tensors"])
def test_a_checkpoint_is_a_table_of_tensors(kind: str, thing: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bare tensor, a list of them, a table without any: said so, whether the kind looks into an entry of the table or not."""
    (tmp_path / "labels.txt").write_text("a\nb\n")
    torch.save(thing, tmp_path / "w.pt")
    assert main(["convert", kind, str(tmp_path / "w.pt"), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "w.pt' holds no table of tensors" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", [2, 4])
def test_q16s_prompts_come_out_as_they_were(protocol: int, tmp_path: Path) -> None:
    """A pickled float16 array, in an old protocol or a newer one, is (2, width) float32 in the file."""
    values = np.arange(8, dtype=np.float16).reshape(2, 4)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(values, protocol=protocol))
    assert main(["convert", "q16", str(tmp_path / "prompts.p"), str(tmp_path / "out")]) == 0
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["prompts"], torch.from_numpy(values).float())


def test_gcds_checkpoint_becomes_a_detector(tmp_path: Path) -> None:
    """Only the model's tensors are kept; the labels are sorted by folder name, end at `_[` and have spaces; the detector loads it."""
    tensors = load_file(celebrities(tmp_path / "made") / "model.safetensors")
    state = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"center_loss.centers": torch.zeros(3, 4)}
    torch.save({"model_state": state, "epoch": 3}, tmp_path / "best.pkl")
    (tmp_path / "labels.csv").write_text("name,id\nCy_Three_[z],7\nAnn_One_[x],9\nBob_Two_[y],8\n")
    assert main(["convert", "gcd", str(tmp_path / "best.pkl"), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.csv")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"architecture": "resnet50", "width": 4, "labels": ["Ann One", "Bob Two", "Cy Three"]}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tensors)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"architecture": "resnet18"}))  # as small as the test's
    assert catalogue.find("detection", "gcd")(str(tmp_path / "out"), lambda images: [[]] * len(images)).labels[0] == "Ann One"


def test_a_resnet_34_becomes_a_detector(tmp_path: Path) -> None:
    """torchvision's parameter names are timm's; the probabilities are those of torchvision's model at 224 px, bilinear as its papers resize."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet34(num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "r34.pt")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    assert main(["convert", "resnet34", str(tmp_path / "r34.pt"), str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")]) == 0
    detector = catalogue.find("detection", "classifier")(str(tmp_path / "out"))
    images = noise(1, 64)
    with torch.no_grad():
        expected = model(torchvision.transforms.functional.resize(images, [224, 224]) * 2 - 1).softmax(1)
        other = model(torch.nn.functional.interpolate(images, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1).softmax(1)
    assert (detector(images) - expected).abs().max() < 0.1 * (other - expected).abs().max()
    assert (detector.labels, detector.none) == (("a", "b", "c"), None)
    assert "untested with real weights" in detector.description


@pytest.mark.parametrize(("names", "message"), [("a\n", "3 classes, the label file 1"), ("a\nb\nb\n", "3 names of which 2 differ"), (None, "--labels FILE")])
def test_labels_must_fit_the_weights(names: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too few, doubled or none at all: said before anything is written."""
    torch.save({"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}, tmp_path / "r34.pt")
    given = ["convert", "resnet34", str(tmp_path / "r34.pt"), str(tmp_path / "out")]
    if names is not None:
        (tmp_path / "labels.txt").write_text(names)
        given += ["--labels", str(tmp_path / "labels.txt")]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_mark_that_editors_write_is_no_part_of_a_label(tmp_path: Path) -> None:
    """With it the first concept of a task would never be found."""
    (tmp_path / "names.txt").write_text("\ufeffAnn\nBob\n", encoding="utf-8")
    assert labels(tmp_path / "names.txt") == ["Ann", "Bob"]
