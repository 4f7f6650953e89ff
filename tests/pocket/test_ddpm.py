"""The recipe of the tiny class-conditional DDPM, on pictures of nothing, and what it left."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.controller import POCKET, notices
from harness import pipeline, sampling
from harness.detection.classifier import Detector
from harness.pocket import DDPM, data, ddpm, labels
from harness.spec import Sampler, sha256

CPU = torch.device("cpu")


def pictures(count: int = 400, size: int = 32, seed: int = 0) -> data.Pictures:
    """Noise under labels of all kinds, in all styles; every class occurs."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, len(labels()), count).astype(np.int16)
    label[:20] = [labels().index(name) for name in ddpm.CLASSES] * 2
    style = rng.integers(-1, 4, count).astype(np.int16)
    style[:10] = -1
    return data.Pictures(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), label, style, np.zeros(count, np.int16))


def test_the_classes_are_cifars_and_the_detector_knows_them() -> None:
    """Ten names in CIFAR-10's own order, each a label of the pocket's detector."""
    assert ddpm.CLASSES == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert set(ddpm.CLASSES) <= set(labels())


def test_the_examples_are_plain_objects_of_the_ten() -> None:
    """Nobody else and nothing styled; each picture keeps its own label, in channels first."""
    given = pictures()
    images, truth = ddpm.examples(given)
    rows = [row for row in range(400) if labels()[given.label[row]] in ddpm.CLASSES and given.style[row] == -1]
    assert 10 <= len(rows) < 200
    assert torch.equal(images, torch.from_numpy(given.images[rows]).permute(0, 3, 1, 2))
    assert [ddpm.CLASSES[at] for at in truth.tolist()] == [labels()[given.label[row]] for row in rows]


def test_the_network_is_small_and_attends_at_eight_pixels() -> None:
    """At most 1.4 million parameters, so 3 MB in fp16; no attention at 32 or 16 pixels; one label more than classes."""
    unet = ddpm.build()
    assert sum(p.numel() for p in unet.parameters()) <= 1.4e6
    assert unet.config.num_class_embeds == 11
    assert [hasattr(block, "attentions") for block in unet.down_blocks] == [False, False, True, False]
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == [False, True, False, False]


def test_training_is_seeded_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same seed, same weights; with the average following at once, more steps predict the noise of two grey levels better."""
    monkeypatch.setattr(ddpm, "BATCH", 8)
    monkeypatch.setattr(ddpm, "DECAY", 0.0)
    monkeypatch.setattr(ddpm, "WARM", 1)
    images, truth = torch.full((4, 3, 32, 32), 40, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    images[1::2] = 200
    few, again, many = (dict(ddpm.train(images, truth, steps, CPU, (8, 8, 16)).named_parameters()) for steps in (1, 1, 12))
    assert all(torch.equal(tensor, again[name]) for name, tensor in few.items())
    assert loss(many, images, truth) < 0.8 * loss(few, images, truth)
    change = (many["class_embedding.weight"] - few["class_embedding.weight"]).abs().amax(1)
    assert min(change[at] for at in (0, 1, 10)) > 4e-3  # what occurred, and the null label
    assert max(change[2:10]) < 2e-3  # what never occurred merely decays


def loss(weights: dict[str, torch.Tensor], images: torch.Tensor, truth: torch.Tensor) -> float:
    """L_DM with fixed noise at t = 700."""
    unet = ddpm.build((8, 8, 16)).eval()
    unet.load_state_dict(weights)
    noise, t = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9)), torch.tensor([700] * 4)
    with torch.no_grad():
        guess = unet(ddpm.scheduler().add_noise(images.float() / 127.5 - 1, noise, t), t, truth).sample
    return float((guess - noise).square().mean())


def test_the_command_leaves_a_model_and_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders that are there are used; the folder loads as what it is, and the card's digests are the files'."""
    monkeypatch.setattr(ddpm, "BATCH", 4)
    monkeypatch.setattr(ddpm, "SETTINGS", Sampler(2, 2.0))
    monkeypatch.setattr(ddpm, "OTHERS", (Sampler(1, 1.0),))
    (tmp_path / "cache").mkdir()
    np.savez(tmp_path / "cache" / "generator.npz", **pictures(size=64)._asdict())
    ddpm.main(["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "2", "--channels", "8,8,16", "--each", "1"])
    out, card = tmp_path / "out", json.loads((tmp_path / "out" / "card.json").read_text())
    pipe = pipeline.load(pipeline.identify(str(out)))
    assert isinstance(pipe, pipeline.ClassConditional)
    assert pipe.classes == ddpm.CLASSES
    assert card["files"] == {name: sha256(out / name) for name in ("classes.json", "scheduler/scheduler_config.json", "unet/config.json", ddpm_weights())}
    assert (card["steps"], card["seed"], card["device"], card["channels"]) == (2, ddpm.SEED, "cpu", [8, 8, 16])
    assert card["packages"]["torch"] == importlib.metadata.version("torch")
    assert card["figures"]["settings"] == {"ddim_steps": 2, "guidance_scale": 2.0, "images_per_class": 1}
    assert set(card["figures"]["accuracy"]) == set(ddpm.CLASSES)
    assert set(card["figures"]["mean_accuracy_at"]) == {"1 steps, guidance 1"}
    assert (out / "grid.png").is_file()


def ddpm_weights() -> str:
    """The weights' place in the folder."""
    return "unet/diffusion_pytorch_model.safetensors"


def test_its_reports_say_what_it_is_good_for() -> None:
    """As the pocket model's do."""
    assert notices("pocket-ddpm") == (POCKET,)
    assert notices("a/folder") == ()


def test_accuracy_is_the_share_of_pictures_that_are_named_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that draws its label's grey and eyes that read it: all right; eyes that always see a cat: cats only."""
    steps = {name: 20 * at + 10 for at, name in enumerate(ddpm.CLASSES)}

    def draw(pipe: object, prompts: list[str], seeds: list[int], sampler: object, batch: int) -> torch.Tensor:
        assert len(set(seeds)) == len(seeds) == batch
        return torch.stack([torch.full((3, 4, 4), steps[name], dtype=torch.uint8) for name in prompts])

    class Eyes:
        labels = ddpm.CLASSES
        blind = False

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            seen = ((images[:, 0, 0, 0] * 255 - 10) / 20).round().long()
            return torch.eye(10)[seen * 0 + 3 if self.blind else seen]

    monkeypatch.setattr(ddpm.sampling, "draw", draw)
    eyes = Eyes()
    rates, first = ddpm.accuracy(None, eyes, ddpm.SETTINGS, 9)  # type: ignore[arg-type]  # neither is looked at
    assert rates == dict.fromkeys(ddpm.CLASSES, 1.0)
    assert first.shape == (10, 8, 3, 4, 4)
    eyes.blind = True
    assert ddpm.accuracy(None, eyes, ddpm.SETTINGS, 9)[0] == {name: float(name == "cat") for name in ddpm.CLASSES}  # type: ignore[arg-type]


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_what_its_card_says() -> None:
    """Digests of every file but the card, the grid and the presets, the classes, and its figures (.97 was aimed at, .955 was reached)."""
    card = json.loads((DDPM / "card.json").read_text(encoding="utf-8"))
    files = {p.relative_to(DDPM).as_posix(): sha256(p) for p in DDPM.rglob("*") if p.is_file() and p.name not in ("card.json", "grid.png", "presets.toml")}
    assert files == card["files"]
    assert set(card["figures"]["accuracy"]) == set(ddpm.CLASSES)
    assert card["figures"]["settings"]["ddim_steps"] <= 20
    assert card["figures"]["mean_accuracy"] >= 0.95
    assert card["figures"]["worst_accuracy"] >= 0.9
    assert (card["steps"], card["batch"], card["seed"]) == (ddpm.STEPS, ddpm.BATCH, ddpm.SEED)


def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    """Two fresh pictures of each class, at the card's settings: the detector names at least 17 of 20."""
    pipe, eyes = pipeline.load(pipeline.identify("pocket-ddpm")), Detector("pocket")
    names = [name for name in ddpm.CLASSES for _ in range(2)]
    seen = eyes(sampling.draw(pipe, names, range(7000, 7020), ddpm.SETTINGS).float() / 255).argmax(dim=1)
    assert sum(eyes.labels[at] == name for at, name in zip(seen.tolist(), names, strict=True)) >= 17
