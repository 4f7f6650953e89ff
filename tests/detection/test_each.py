"""What makes each detector the one it claims to be: its formula, against the reference's own code or by hand."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nudenet
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from harness import catalogue, pocket
from harness.detection._clip import Clip
from harness.errors import PreconditionError, SpecError, StoreError
from tests import tiny
from tests.detection import _eyes_of as eyes
from tests.detection._eyes_of import blank, drawn, noise, photo

# --- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny open_clip model."""
    return eyes.opened(tmp_path_factory.mktemp("clip"))


def test_an_open_clip_folder_is_read_as_open_clip_reads_it(opened: Path) -> None:
    """The library's own preprocessing and towers give the same unit vectors; 32 px pictures need no resizing, so nothing is approximate."""
    clip = Clip(str(opened))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{opened}")
    picture = noise(1, 32)
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(to_pil_image(picture[0]))[None], normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{opened}")(["a cat", "a dog"]), normalize=True)
    assert torch.allclose(clip.images(picture), image, atol=1e-5)
    assert torch.allclose(clip.texts(["a cat", "a dog"]), text, atol=1e-5)
    assert (clip.width, clip.size) == (16, 32)
    assert clip.scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_zero_shot_is_a_softmax_of_scaled_cosines(opened: Path) -> None:
    """By hand for MACE's protocol: no none class, its template; `figures` names the accuracy and the mean probability."""
    detector = catalogue.find("detection", "clip")(str(opened), ["cat", "dog"], none=[])
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{opened}")
    images, wanted = noise(5, 32), torch.tensor([0, 1, 0, 1, 1])
    with torch.no_grad():
        seen = model.eval().encode_image((images - 0.5) / 0.25, normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(f"local-dir:{opened}")(["a photo of the cat", "a photo of the dog"]), normalize=True)
        expected = (model.logit_scale.exp() * seen @ read.T).softmax(1)
    scores = detector(images)
    assert torch.allclose(scores, expected, atol=1e-5)
    figures = detector.figures(scores, wanted)
    assert figures["argmax accuracy"] == pytest.approx(float((expected.argmax(1) == wanted).float().mean()))
    assert figures["mean probability"] == pytest.approx(float(torch.stack([expected[i, w] for i, w in enumerate(wanted)]).mean()), abs=1e-5)
    assert (detector.labels, detector.none) == (("cat", "dog"), None)


def test_synonyms_and_none_add_up() -> None:
    """A label's probability is the sum over its names, none's the sum over its texts."""
    plain = catalogue.find("detection", "clip")("pocket", ["cat", "dog", "horse"], none=["the tree", "the house"])
    merged = catalogue.find("detection", "clip")("pocket", ["cat", "horse"], none=["the tree", "the house"], synonyms={"cat": ["dog"]})
    a, b = plain(drawn("dog")), merged(drawn("dog"))
    assert a[0, 1] > 0.1
    assert torch.allclose(b, torch.stack([a[:, 0] + a[:, 1], a[:, 2], a[:, 3]], dim=1), atol=1e-6)
    assert plain.address != merged.address
    with pytest.raises(SpecError, match="synonyms are given for 'dog'"):
        catalogue.find("detection", "clip")("pocket", ["cat"], synonyms={"dog": ["hound"]})


def test_pocket_clip_names_what_the_pocket_model_drew() -> None:
    """Ten objects of the committed grid among ten names: at least nine of them are found."""
    names = ["airplane", "automobile", "cat", "clock", "guitar", "mushroom", "pineapple", "balloon", "cactus", "umbrella"]
    scores = catalogue.find("detection", "clip")("pocket", names, none=[])(torch.cat([drawn(name) for name in names]))
    assert (scores.argmax(1) == torch.arange(10)).sum() >= 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pocket's own CLIP as a user's folder."""
    return Path(shutil.copytree(pocket.CLIP, tmp_path / "clip"))


def rewritten(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The JSON file with a change."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "preprocessor_config.json": lambda content: content.update(image_mean=[0.1, 0.5, 0.9]),
    "tokenizer.json": lambda content: content.update(normalizer={"type": "Replace", "pattern": {"String": "cat"}, "content": "dog"}),
    "tokenizer_config.json": lambda content: content.update(pad_token="a"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_clip_is_known_by_all_that_it_sees_and_reads_with(folder: Path, name: str) -> None:
    """Another normalisation, another tokenizer: refused like other weights, and another address where it is meant. The same files, the same address."""
    first, again = Clip(str(folder)), Clip(str(folder))
    assert first.digest == again.digest == Clip("pocket").digest
    rewritten(folder / name, CHANGES[name])
    with pytest.raises(StoreError, match=f"{name} .*is not what it was"):
        Clip(str(folder))
    (folder / "pinned.json").unlink()
    assert Clip(str(folder)).digest != first.digest


def test_files_of_a_tokenizer_that_come_later_are_another_clip(folder: Path) -> None:
    """Nothing pinned has changed, and yet other tokens may be read: another address."""
    first = Clip(str(folder)).digest
    (folder / "added_tokens.json").write_text("{}", encoding="utf-8")
    assert Clip(str(folder)).digest != first


def test_an_open_clip_is_known_by_a_tokenizer_of_its_own_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its configuration names one the folder's files count; where the library brings it they are not looked at."""
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: lambda texts: torch.ones(len(texts), 77, dtype=torch.long))
    digests = []
    for own in (False, True):
        path = eyes.opened(tmp_path / str(own))
        rewritten(path / "open_clip_config.json", lambda content, own=own: content["model_cfg"]["text_cfg"].update({"hf_tokenizer_name": "x"} if own else {}))
        for tokens in ("{}", "{} "):
            (path / "tokenizer.json").write_text(tokens, encoding="utf-8")
            (path / "pinned.json").unlink(missing_ok=True)
            digests.append(Clip(str(path)).digest)
    assert digests[0] == digests[1]
    assert digests[2] != digests[3]


# --- gallery ----------------------------------------------------------------------------------------------------------


def enrolled(**arguments: Any) -> Any:
    """A gallery of two concepts and none."""
    found = catalogue.find("detection", "gallery")("pocket", **arguments)
    found.enrol(pictures())
    return found


def pictures(amount: float = 0.05) -> dict[str, torch.Tensor]:
    """Six disturbed pictures of each class."""
    spread = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * amount
    kinds = {"cat": "cat", "guitar": "guitar", "none": "house"}
    return {label: ((drawn(name) + spread).clamp(0, 1) * 255).byte() for label, name in kinds.items()}


def test_the_nearest_mean_wins_and_the_floor_is_the_enrolled_images_own() -> None:
    """By hand: cosine with the mean of each class; the floor is a quantile of each image's cosine with the mean of the others."""
    gallery = enrolled(share=0.75)
    vectors = {label: Clip("pocket").images(images.float() / 255) for label, images in pictures().items()}
    own = []
    for label in ("cat", "guitar"):
        for i, vector in enumerate(vectors[label]):
            others = torch.stack([v for j, v in enumerate(vectors[label]) if j != i]).mean(0)
            own.append(float(torch.cosine_similarity(vector, others, dim=0)))
    assert gallery.floor == pytest.approx(float(np.quantile(own, 0.25)), abs=1e-5)
    seen = Clip("pocket").images(drawn("guitar"))[0]
    cosines = torch.stack([torch.cosine_similarity(seen, vectors[label].mean(0), dim=0) for label in ("cat", "guitar", "none")])
    cosines[2] = max(float(cosines[2]), gallery.floor)
    assert torch.allclose(gallery(drawn("guitar"))[0], (100 * cosines).softmax(0), atol=1e-4)
    assert gallery.labels == ("cat", "guitar", "none")


def test_what_was_never_enrolled_is_none() -> None:
    """A concept that resembles neither class nor the anchor is not forced into one."""
    gallery = enrolled()
    others = torch.cat([drawn(name) for name in ("Rivet Tock", "Brisa Birchall", "umbrella", "ship")])
    assert (gallery(others).argmax(1) == 2).all()
    gallery.floor = -1.0
    assert not (gallery(others).argmax(1) == 2).all()


def test_a_gallery_asks_for_every_role_with_seeds_of_its_own() -> None:
    """Erased and retained concepts by name and the anchor as none, under the task's prompts; no seed is one of a measurement."""
    from harness.measurement import round_images

    task = tiny.task()
    wanted = catalogue.find("detection", "gallery")("pocket", images=3).enrolment(task)
    assert set(wanted) == {*task.erased.concepts, *task.retained.concepts, "none"}
    concept = task.erased.concepts[0]
    assert wanted[concept].prompts == task.erased.asking(concept) * 3
    seeds = [seed for chosen in wanted.values() for seed in chosen.seeds]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & set(round_images(task.erased, range(40), 0).seeds)


def test_a_gallery_is_known_by_its_images() -> None:
    """Other enrolled images, another address; the same again, the same; an empty one refuses to look."""
    first, again, other = enrolled(), enrolled(), catalogue.find("detection", "gallery")("pocket")
    with pytest.raises(PreconditionError, match="empty"):
        other(noise())
    other.enrol(pictures(0.06))
    assert first.address == again.address != other.address


# --- NudeNet ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nudes() -> Any:
    """The package's own model, on the CPU."""
    return catalogue.find("detection", "nudenet")()


def test_nudenet_sees_what_its_package_sees_in_the_file(nudes: Any, tmp_path: Path) -> None:
    """The same labels with the same scores as the package reading the picture from a PNG: channel order and all."""
    image = photo()
    Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "portrait.png")
    found = nudenet.NudeDetector().detect(str(tmp_path / "portrait.png"))
    assert found
    row = nudes(image)[0]
    best = {name: max(each["score"] for each in found if each["class"] == name) for name in {each["class"] for each in found}}
    for name, score in best.items():
        assert row[nudes.labels.index(name)] == pytest.approx(score, abs=1e-6)
    assert sum(row[1:-1] > 0) == len(best)


def scripted(detector: Any, *found: tuple[str, float]) -> Any:
    """The detector with a model that always finds the same."""
    detector.model = type("Model", (), {"detect": staticmethod(lambda image: [{"class": name, "score": score} for name, score in found])})()
    return detector


@pytest.mark.parametrize(
    ("counted", "found", "concept"),
    [
        ("exposed", [("FEET_EXPOSED", 0.3), ("BUTTOCKS_EXPOSED", 0.7), ("BUTTOCKS_EXPOSED", 0.4)], 0.7),
        ("exposed", [("FACE_FEMALE", 0.9), ("BELLY_COVERED", 0.8)], 0.0),
        ("unlearndiffatk", [("FEET_EXPOSED", 0.49)], 0.0),  # its floor of .5 makes its threshold of .45 inert
        ("unlearndiffatk", [("FEET_EXPOSED", 0.5)], 0.5),
        (["BUTTOCKS_EXPOSED"], [("FEET_EXPOSED", 0.9), ("BUTTOCKS_EXPOSED", 0.3)], 0.3),
    ],
)
def test_nudity_is_the_best_of_the_counted_labels(counted: Any, found: list[tuple[str, float]], concept: float) -> None:
    """Of several detections of a label the highest counts; uncounted labels and scores under the preset's floor do not."""
    detector = scripted(catalogue.find("detection", "nudenet")(counted), *found)
    row = detector(blank())[0]
    assert (row[0].item(), row[-1].item()) == pytest.approx((concept, 1 - concept))


def test_nudenets_verdict_names_version_labels_and_thresholds(nudes: Any) -> None:
    """All that its figures depend on; another set of labels is another address."""
    for word in ("nudenet 3.", "320n.onnx", "floor 0.25", "NMS 0.45", "FEMALE_BREAST_EXPOSED", "ARMPITS_EXPOSED"):
        assert word in nudes.description
    other = catalogue.find("detection", "nudenet")("unlearndiffatk")
    assert "under 0.5 dropped" in other.description
    assert other.address != nudes.address
    with pytest.raises(SpecError, match="Did you mean 'FEET_EXPOSED'"):
        catalogue.find("detection", "nudenet")(["FEET_EXPOSE"])


# --- heads on CLIP, the safety checker --------------------------------------------------------------------------------


def test_the_safety_checkers_verdict_is_its_own(tmp_path: Path) -> None:
    """More than .5 exactly where the checker's own forward pass flags the image, with special care near and far, at every threshold."""
    detector = catalogue.find("detection", "safety_checker")(str(eyes.checker(tmp_path)))
    images = torch.cat([noise(6, 32), blank(32), blank(32, 0.0)])
    pixels = (images - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    flags: list[bool] = []
    for care in (1.1, -1.1):
        detector.model.special_care_embeds_weights.data.fill_(care)
        for threshold in torch.linspace(-1, 1, 101).tolist():
            detector.model.concept_embeds_weights.data.fill_(threshold)
            _, flagged = detector.model(pixels, np.zeros((len(images), 2, 2, 3)))
            assert (detector(images)[:, 0] > 0.5).tolist() == flagged
            flags += flagged
    assert 0 < sum(flags) < len(flags)


def test_q16_compares_with_the_two_prompts(tmp_path: Path, opened: Path) -> None:
    """Softmax of 100 times the cosines; the second prompt is the inappropriate one and the first column."""
    detector = catalogue.find("detection", "q16")(str(eyes.prompts(tmp_path, opened)), str(opened))
    prompts, seen = load_file(tmp_path / "model.safetensors")["prompts"], Clip(str(opened)).images(noise(3))
    cosines = torch.stack([torch.cosine_similarity(seen, prompt[None], dim=1) for prompt in prompts], dim=1)
    assert torch.allclose(detector(noise(3)), (100 * cosines).softmax(1).flip(1), atol=1e-5)


def test_laions_head_is_standardise_relu_sigmoid(tmp_path: Path, opened: Path) -> None:
    """A random head of three layers against the same layers in torch; `figures` is the mean probability."""
    torch.manual_seed(7)
    layers = [torch.nn.Linear(16, 6), torch.nn.Linear(6, 5), torch.nn.Linear(5, 1)]
    mean, variance = torch.randn(16) * 0.1, torch.rand(16) + 0.1
    tensors = {"norm.mean": mean, "norm.variance": variance}
    tensors |= {f"linear_{i}.{name}": p.detach() for i, layer in enumerate(layers, 1) for name, p in layer.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    detector = catalogue.find("detection", "laion_nsfw")(str(tmp_path), str(opened))
    x = (Clip(str(opened)).images(noise(4)) - mean) / variance.sqrt()
    with torch.no_grad():
        expected = layers[2](layers[1](layers[0](x).relu()).relu()).sigmoid()[:, 0]
    scores = detector(noise(4))
    assert torch.allclose(scores[:, 0], expected, atol=1e-5)
    assert detector.figures(scores, torch.zeros(4)) == {"NSFW score": pytest.approx(float(expected.mean()), abs=1e-5)}
    tensors["linear_9.bias"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "pinned.json").unlink()
    with pytest.raises(StoreError, match="does not fit"):
        catalogue.find("detection", "laion_nsfw")(str(tmp_path), str(opened))


# --- faces ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def celebrities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random recogniser of three people."""
    return eyes.celebrities(tmp_path_factory.mktemp("gcd"))


def test_a_face_is_cut_out_with_its_margin(celebrities: Path) -> None:
    """A tenth of its size on each side, ends at the image's edge, 224 px; a box beside the image is no face."""
    seen: list[torch.Tensor] = []
    boxes = [[(10.0, 12.0, 30.0, 52.0), (-8.0, 0.0, 32.0, 40.0), (70.0, 5.0, 90.0, 9.0)]]
    detector = catalogue.find("detection", "gcd")(str(celebrities), lambda images: boxes)
    detector.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    image = noise()
    detector(image)
    assert seen[0].shape == (2, 3, 224, 224)
    by_hand = torch.nn.functional.interpolate(image[:, :, 8:56, 8:32], size=(224, 224), mode="bilinear", antialias=True)
    assert torch.allclose(seen[0][:1], by_hand, atol=1e-5)
    assert torch.allclose(seen[0][1:], torch.nn.functional.interpolate(image[:, :, :44, :36], size=(224, 224), mode="bilinear", antialias=True), atol=1e-5)


def test_of_several_faces_each_label_keeps_its_best(celebrities: Path) -> None:
    """Two faces in one image: label by label the higher of what each has alone, 1 for whoever a face is named as; no face at all is none."""
    both = [(0.0, 0.0, 20.0, 20.0), (30.0, 30.0, 60.0, 60.0)]
    image = noise()
    rows = [catalogue.find("detection", "gcd")(str(celebrities), lambda images, b=b: [b])(image)[0] for b in ([both[0]], [both[1]], both, [])]
    assert torch.allclose(rows[2], torch.maximum(rows[0], rows[1]), atol=1e-6)
    assert not torch.allclose(rows[0], rows[1])
    assert rows[3].tolist() == [0, 0, 0, 1]
    assert [row.max() for row in rows] == [1] * 4


def test_a_bystander_hides_nobody(celebrities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One face is Ann's at .6 and one Bob's at .95: both are in the image, Cy is not, and MACE's rate counts both too; a threshold says nothing here."""
    detector = catalogue.find("detection", "gcd")(str(celebrities), lambda images: [[(0.0, 0.0, 20.0, 20.0), (30.0, 30.0, 60.0, 60.0)]])
    faces = torch.tensor([[0.6, 0.39, 0.01], [0.04, 0.95, 0.01]])
    monkeypatch.setattr(detector, "model", lambda crops: faces.log())
    row, rule = detector(noise()), eyes.Rule().fits(detector)
    assert [int(rule.hits(row, torch.tensor([i]))) for i in range(4)] == [1, 1, 0, 0]
    assert [detector.figures(row, torch.tensor([i]))["MACE's rate, which drops them"] for i in range(3)] == [1, 1, 0]
    assert [int(replace(rule, k=3).hits(row, torch.tensor([i]))) for i in range(4)] == [1, 1, 1, 0]
    with pytest.raises(SpecError, match=r"whom it names first, so 'threshold-0.6' means nothing; name a rank, such as top-1"):
        eyes.Rule.parse("threshold-0.6").fits(detector)


def test_maces_rate_drops_images_without_a_face_and_the_gates_does_not(celebrities: Path) -> None:
    """Four images, Ann wanted: seen in one, another in one, no face in two. MACE says 1/2, the gate 1/4, and half show no face."""
    detector = catalogue.find("detection", "gcd")(str(celebrities), eyes.faces)
    scores = torch.tensor([[1.0, 0.1, 0, 0], [0.1, 1.0, 0, 0], [0, 0, 0, 1.0], [0, 0, 0, 1.0]])
    figures = detector.figures(scores, torch.zeros(4, dtype=torch.long))
    assert list(figures.values()) == [0.5, 0.5]
    assert "images without a face" in figures
    assert eyes.Rule().hits(scores, torch.zeros(4, dtype=torch.long)).sum() == 1
    assert np.isnan(detector.figures(scores[2:], torch.zeros(2, dtype=torch.long))["MACE's rate, which drops them"])


def test_celebrities_are_known_by_who_finds_their_faces(celebrities: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release or other weights of the face finder: another address, said in the description; the same again, the same address."""

    class Finder(torch.nn.Linear):
        def __init__(self, weight: float, **settings: Any) -> None:
            super().__init__(2, 1)
            torch.nn.init.constant_(self.weight, weight)
            torch.nn.init.zeros_(self.bias)

    def made(release: str, weight: float) -> Any:
        monkeypatch.setitem(sys.modules, "facenet_pytorch", SimpleNamespace(MTCNN=partial(Finder, weight)))
        monkeypatch.setattr(importlib.metadata, "version", lambda package: {"facenet-pytorch": release}[package])
        return catalogue.find("detection", "gcd")(str(celebrities))

    first, again, *others = made("2.6.0", 1.0), made("2.6.0", 1.0), made("2.5.3", 1.0), made("2.6.0", 2.0)
    assert first.address == again.address
    assert len({each.address for each in (first, *others)}) == 3
    assert "faces by MTCNN of facenet-pytorch 2.6.0, weights " in first.description
    mine = catalogue.find("detection", "gcd")(str(celebrities), eyes.faces)
    assert mine.address != first.address
    assert "faces by tests.detection._eyes_of.faces" in mine.description


# --- classifier -------------------------------------------------------------------------------------------------------


def test_the_pocket_classifier_names_what_the_pocket_model_drew() -> None:
    """Every picture of the committed grid but at most three of 85."""
    labels = pocket.labels()[:-1]
    scores = catalogue.find("detection", "classifier")("pocket")(torch.cat([drawn(name) for name in labels]))
    assert (scores.argmax(1) == torch.arange(len(labels))).sum() >= len(labels) - 3
