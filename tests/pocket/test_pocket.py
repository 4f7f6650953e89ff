"""The pocket model is what its card says, and draws what it is asked for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from harness.pocket import CARD, CLIP, DDPM, DETECTOR, FOLDER, MODEL, STYLE, identities, labels, vocabulary


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """The committed card."""
    return dict(json.loads(CARD.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """The committed pipeline in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def classifier(folder: Any) -> tuple[torch.nn.Module, list[str]]:
    """A classifier built from nothing but what its folder holds."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = timm.create_model(config["architecture"], num_classes=len(config["labels"]), **config["model_args"])
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()})
    return model.eval(), config["labels"]


def draw(pipe: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """(n, 3, 64, 64) in [0, 1], enlarged as the classifiers want it, ten steps at guidance 3."""
    seeds = [torch.Generator().manual_seed(at) for at in range(len(prompts))]
    images = pipe(prompts, num_inference_steps=10, guidance_scale=3.0, generator=seeds, output_type="np").images
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pictures, size=(64, 64), mode="bilinear", antialias=True)


def test_committed_files_match_the_card(card: dict[str, Any]) -> None:
    """Every published file has the digest that the card records, and no file is unrecorded."""
    folders = (MODEL, CLIP, DETECTOR, STYLE)
    found = {p.relative_to(FOLDER).as_posix(): p for folder in folders for p in folder.rglob("*") if p.is_file()}
    assert set(found) == set(card["files"])
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()} == card["files"]


def test_the_model_stays_small() -> None:
    """All that is committed takes at most 16 MiB, and the class-conditional model beside it 3."""
    size = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    beside = sum(each for path, each in size.items() if path.is_relative_to(DDPM))
    assert sum(size.values()) - beside <= 16 * 2**20
    assert beside <= 3 * 2**20


def test_package_needs_no_torch() -> None:
    """Paths and vocabulary are there without importing torch, so collection stays cheap."""
    code = "import sys, harness.pocket as p; p.vocabulary(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], check=False).returncode == 0


def test_pipeline_has_stable_diffusions_classes(pipe: StableDiffusionPipeline) -> None:
    """The parts are those of Stable Diffusion, with its betas, a context of 24 words and no safety checker."""
    names = {name: type(getattr(pipe, name)).__name__ for name in ("vae", "unet", "text_encoder", "tokenizer")}
    assert names["vae"] == "AutoencoderKL"
    assert names["unet"] == "UNet2DConditionModel"
    assert names["text_encoder"] == "CLIPTextModel"
    assert names["tokenizer"].startswith("CLIPTokenizer")
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert pipe.tokenizer.model_max_length == 24
    assert pipe.safety_checker is None


def test_weights_are_stored_in_half_precision() -> None:
    """No floating-point tensor is committed in more than 16 bits."""
    for path in FOLDER.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}, path


def test_detector_names_what_is_drawn(pipe: StableDiffusionPipeline) -> None:
    """Of two pictures each of eight people and four objects, at least 22 of 24 are recognised."""
    model, names = classifier(DETECTOR)
    people = [name for role in vocabulary()["roles"] for name in identities(role)[:2]]
    wanted = [name for name in (*people, "cat", "airplane", "ship", "guitar") for _ in range(2)]
    pictures = draw(pipe, [f"a photo of {'a ' if name.islower() else ''}{name}" for name in wanted])
    with torch.no_grad():
        seen = model(pictures * 2 - 1).argmax(dim=1)
    assert sum(names[at] == name for at, name in zip(seen.tolist(), wanted, strict=True)) >= 22


def test_detector_sees_nothing_in_nothing() -> None:
    """Noise and flat colours are `none`."""
    model, names = classifier(DETECTOR)
    noise = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 64, 64)
    with torch.no_grad():
        seen = model(torch.cat([noise, flat]) * 2 - 1).argmax(dim=1)
    assert {names[at] for at in seen.tolist()} == {"none"}


def test_detector_and_style_labels() -> None:
    """The detector knows every concept and `none`; the style classifier every style and `none`."""
    assert classifier(DETECTOR)[1] == labels()
    assert classifier(STYLE)[1] == [style["name"] for style in vocabulary()["concepts"]["styles"]] + ["none"]


def test_clip_shares_the_pipelines_text_tower(pipe: StableDiffusionPipeline) -> None:
    """The CLIP's text tower is the pipeline's text encoder, weight for weight."""
    clip = CLIPModel.from_pretrained(CLIP, dtype=torch.float32)
    ids = torch.tensor(pipe.tokenizer(["a portrait of a cat"], padding="max_length", max_length=24)["input_ids"])
    encoder: CLIPTextModel = pipe.text_encoder
    with torch.no_grad():
        assert torch.equal(clip.text_model(input_ids=ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_roles_are_disjoint() -> None:
    """Nobody plays two parts, and each part has the number of people that the suites count on."""
    assert len(set(identities())) == len(identities()) == 60
    people = vocabulary()["concepts"]["identities"]
    assert Counter(person["role"] for person in people) == {
        "development": 10, "report": 10, "finetune": 30, "retained": 10,
    }  # fmt: skip


def test_recorded_name_sharing_is_true_of_the_tokens() -> None:
    """`shares_no_token` holds exactly where no token of the name is in another name; 4 or more per erased role."""
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    tokens = {name: set(tokenizer(name)["input_ids"][1:-1]) for name in identities()}
    for person in vocabulary()["concepts"]["identities"]:
        others = set().union(*(found for name, found in tokens.items() if name != person["name"]))
        assert person["shares_no_token"] == (not tokens[person["name"]] & others), person["name"]
    unshared = Counter(p["role"] for p in vocabulary()["concepts"]["identities"] if p["shares_no_token"])
    assert min(unshared["development"], unshared["report"]) >= 4


def test_every_name_is_two_tokens() -> None:
    """Each name word is one token, so that no piece of a word is shared behind the vocabulary's back."""
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert {len(tokenizer(name)["input_ids"]) - 2 for name in identities()} == {2}


def test_mean_accuracy_meets_its_target(card: dict[str, Any]) -> None:
    """Over all concepts, 97 % or more of the pictures show what was asked for."""
    assert card["figures"]["mean_accuracy"] >= 0.97


def test_worst_accuracy_meets_its_target(card: dict[str, Any]) -> None:
    """No concept falls below 85 %."""
    assert card["figures"]["worst_accuracy"] >= 0.85


def test_nobody_is_seen_where_nobody_was_named(card: dict[str, Any]) -> None:
    """On prompts for a person, no named person is seen in more than 2 % of the pictures."""
    assert card["figures"]["neutral"]["highest_named"] <= 0.02


def test_the_never_learned_control_does_not_draw_the_report_people(card: dict[str, Any]) -> None:
    """The control draws the retained people and none of the report people."""
    control = card["control_without_report"]
    assert control["mean_by_role"]["report"] <= 0.05
    assert control["mean_by_role"]["retained"] >= 0.9
