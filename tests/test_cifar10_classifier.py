"""The recipe of the classifier that looks at the full CIFAR-10 model's images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import catalogue
from harness.errors import StoreError
from harness.pocket import ddpm
from harness.spec import sha256
from suites.cifar10 import classifier, train

SMALL = "test_resnet"  # timm's own for tests


def batches(folder: Path, each: int = 16) -> None:
    """The binary version with a few rows a file: the first four classes, each of a colour of its own in some noise."""
    rng, colours = np.random.default_rng(0), np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 220]])
    for name in (*train.FILES, *train.TEST):
        labels = rng.permutation(np.arange(each) % 4)
        pixels = np.repeat(colours[labels], 32 * 32, axis=1) + rng.integers(-30, 31, (each, 3 * 32 * 32))
        np.hstack([labels[:, None], pixels]).astype(np.uint8).tofile(folder / name)
    (folder / train.NAMES).write_text("\n".join(ddpm.CLASSES) + "\n")


def run(folder: Path, *more: str) -> int:
    """The command on these data, with a small network and few pixels."""
    small = ("--architecture", SMALL, "--size", "32", "--batch", "8", "--epochs", "4", "--device", "cpu")
    return classifier.main(["--data", str(folder), "--out", str(folder / "out"), *small, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of data, with a trained classifier in `out`."""
    folder = tmp_path_factory.mktemp("cifar10")
    batches(folder)
    assert run(folder) == 0
    return folder


def test_what_it_writes_is_a_detector_that_knows_the_classes(made: Path) -> None:
    """The harness's own detector loads the folder and names what is in the test images."""
    detector = catalogue.find("detection", "classifier")(str(made / "out"))
    images, truth = train.read(made, train.TEST)
    scores = detector(images.float() / 255)
    assert (detector.labels, detector.none, scores.shape) == (ddpm.CLASSES, None, (16, 10))
    assert (scores.argmax(dim=1) == truth).all()
    config = json.loads((made / "out" / "config.json").read_text())
    assert (config["image_size"], config["interpolation"], config["mean"], config["std"]) == (32, "bilinear", [0.5] * 3, [0.5] * 3)


def test_its_card_says_what_it_was_made_of(made: Path) -> None:
    """Seed, versions, digests of data and files, the recipe, where it started, and the accuracy on the test file alone."""
    card = json.loads((made / "out" / "card.json").read_text())
    assert card["test"] == {"images": 16, "accuracy": 1.0, "accuracy_by_class": dict.fromkeys(ddpm.CLASSES[:4], 1.0)}
    assert (card["start"], card["seed"], card["packages"]["timm"]) == ("random", classifier.SEED, timm.__version__)
    assert card["recipe"] == {"rate": 1e-3, "head": 1e-3, "decay": 5e-4, "batch": 8, "epochs": 4, "size": 32}
    assert card["data"] == {name: sha256(made / name) for name in (*train.FILES, "test_batch.bin")}
    assert card["files"] == {name: sha256(made / "out" / name) for name in ("config.json", "model.safetensors")}


def test_the_accuracy_is_the_share_that_is_right(made: Path) -> None:
    """With a quarter of the labels wrong, and by class."""
    images, truth = train.read(made, train.TEST)
    found = classifier.accuracy(made / "out", images, truth.where(truth != 3, 2))
    assert found == {"images": 16, "accuracy": 0.75, "accuracy_by_class": {"airplane": 1.0, "automobile": 1.0, "bird": 0.5}}


def test_it_goes_on_from_a_file_of_weights(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the last layer; at the published rates, which the card says with the file's digest. What was pinned before does not stand in the way."""
    batches(tmp_path)
    learned = load_file(made / "out" / "model.safetensors")
    wide = {name: torch.zeros(1000, *tensor.shape[1:]) if name.startswith("fc.") else tensor for name, tensor in learned.items()}
    torch.save(wide, tmp_path / "imagenet.pth")
    save_file(wide, tmp_path / "imagenet.safetensors")
    for name in ("imagenet.pth", "imagenet.safetensors"):
        model = classifier.start(SMALL, tmp_path / name)
        assert model.fc.weight.shape[0] == 10
        assert all(torch.equal(tensor, learned[key]) for key, tensor in model.state_dict().items() if not key.startswith("fc."))
        assert run(tmp_path, "--weights", str(tmp_path / name), "--epochs", "1") == 0
        card = json.loads((tmp_path / "out" / "card.json").read_text())
        assert card["start"] == {"file": name, "sha256": sha256(tmp_path / name)}
        assert (card["recipe"]["rate"], card["recipe"]["head"]) == (1e-5, 1e-4)
        (tmp_path / "out" / "pinned.json").write_text(json.dumps({"model.safetensors": "another"}))
    assert "epoch 1/1 batch 10/10 loss " in capsys.readouterr().out


def test_weights_of_another_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other names, names missing or too many, other shapes, or no file: said before anything is trained or written."""
    batches(tmp_path)
    state = timm.create_model(SMALL).state_dict()
    save_file({"body.0.weight": torch.zeros(1)}, tmp_path / "names.safetensors")
    save_file({name: torch.zeros(1, *tensor.shape).contiguous() for name, tensor in state.items()}, tmp_path / "shapes.safetensors")
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("layer4.")}, tmp_path / "lacking.safetensors")
    save_file(state | {"more": torch.zeros(1)}, tmp_path / "strange.safetensors")
    other = f"are not a {SMALL}"
    differs = {"lacking": "layer4", "strange": "more and 0 other", "names": "body"}
    messages = {name: f"{other}: they and the network differ in {first}" for name, first in differs.items()} | {"shapes": other, "none": "cannot be read"}
    for name, message in messages.items():
        with pytest.raises(StoreError, match=message):
            classifier.start(SMALL, tmp_path / f"{name}.safetensors")
        assert run(tmp_path, "--weights", str(tmp_path / f"{name}.safetensors")) == 2
        assert capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_test_images_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training set alone does not do."""
    batches(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    assert run(tmp_path) == 2
    assert "no test_batch.bin in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_learns_as_published() -> None:
    """The last layer ten times as fast, weight decay, batches of 128 at 224 pixels for ten epochs; half of the images are mirrored."""
    assert classifier.parser().parse_args(["--data", "x"]).architecture == "resnet34"
    recipe = classifier.Recipe()
    assert (recipe.rate, recipe.head, recipe.decay, recipe.batch, recipe.epochs, recipe.size) == (1e-5, 1e-4, 5e-4, 128, 10, 224)


def test_it_sees_what_the_detector_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image once an epoch, about half of them mirrored, resized as the detector does it, in [-1, 1]; each part of it at its rate."""
    shown: list[Tensor] = []
    used: list[dict[str, Any]] = []

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = torch.nn.Conv2d(3, 2, 1), torch.nn.Linear(2, 10)

        def get_classifier(self) -> Any:
            return self.fc

        def forward(self, images: Tensor) -> Tensor:
            shown.append(images)
            return self.fc(self.body(images).mean((2, 3)))

    class Adam(torch.optim.Adam):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            used.extend(self.param_groups)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    images = torch.zeros(64, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 0] = torch.arange(64).view(-1, 1, 1) * 4 + 3
    classifier.learn(Net(), images, torch.zeros(64, dtype=torch.int64), classifier.Recipe(batch=24, epochs=2, size=8), torch.device("cpu"))
    assert [len(batch) for batch in shown] == [24, 24, 16] * 2
    seen = torch.cat(shown)
    assert seen.shape[-2:] == (8, 8)
    left, right = seen[:, 0, 0, 0], seen[:, 0, 0, -1]
    for epoch in (slice(0, 64), slice(64, 128)):
        assert torch.allclose(torch.maximum(left, right)[epoch].sort().values, images[:, 0, 0, 0] / 127.5 - 1, atol=1e-6)
    assert 40 < int((right > left).sum()) < 88
    assert not torch.equal(left[:64], left[64:])
    assert [(group["lr"], group["weight_decay"], [p.ndim for p in group["params"]]) for group in used] == [(1e-5, 5e-4, [4, 1]), (1e-4, 5e-4, [2, 1])]
