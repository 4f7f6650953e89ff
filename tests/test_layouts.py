"""The layouts of SD 1.4, SD 2.1 and SDXL, small and random: the whole way from a folder to images, and what each layout asks of the code."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import catalogue, pipeline, sampling
from harness.catalogue import Spec
from harness.engine import Engine
from harness.errors import SpecError, StoreError
from harness.families.sdxl import StableDiffusionXL
from harness.pipeline import Pipe, StableDiffusion, group, identify
from harness.relearning import unlearndiffatk
from harness.spec import ImageSet, Lineage, Sampler
from harness.store import Store
from harness.unlearning import esd
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("esd", "dimum", "uce", "rece", "mace")  # two by gradient, two in closed form, one of both with LoRAs
SMALL = {"steps": 1, "lr": 1e-3, "batch": 1, "images_per_prompt": 1, "images_per_concept": 1, "sampler_steps": 2, "lora_steps": 1, "segmenter": "whole"}
FAMILIES = {"sd14": "stable-diffusion", "sd21": "stable-diffusion", "sdxl": "sdxl"}
CPU = torch.device("cpu")
every_layout = pytest.mark.parametrize("layout", tiny.LAYOUTS)


@cache
def made(layout: str) -> Pipe:
    """The model in memory; nobody changes it."""
    return (StableDiffusionXL if layout == "sdxl" else StableDiffusion)(tiny.of_layout(layout), CPU)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Engine, Lineage]]:
    """For each layout its folder as a base model, and an engine with a store."""
    found = {}
    for layout in tiny.LAYOUTS:
        place = tmp_path_factory.mktemp(layout)
        tiny.of_layout(layout).save_pretrained(place / "model")
        found[layout] = Engine(Store(place / "store")), Lineage(identify(str(place / "model")), tiny.task())
    return found


def small(kind: str, name: str) -> Any:
    """A stage with few steps."""
    has = {f.name for f in dataclasses.fields(catalogue.find(kind, name))}
    return catalogue.make(kind, Spec(name), {}, **{field: value for field, value in SMALL.items() if field in has})


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """The names of tensors whose bits differ."""
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


@every_layout
@pytest.mark.parametrize("method", METHODS)
def test_from_a_folder_to_images(engines, layout, method):
    """Loaded, unlearned, fine-tuned with LoRA and drawn: only what each stage names moves, all of it stays finite, and images change."""
    engine, root = engines[layout]
    assert pipeline.family(root.base) == FAMILIES[layout]
    stage = small("unlearning", method)
    unlearned = root.then(stage)
    tuned = unlearned.then(small("finetuning", "lora"))
    first, second, third = ({name: p.clone() for name, p in engine.load(each).named().items()} for each in (root, unlearned, tuned))
    moved, adapted = (differing(*pair) for pair in ((first, second), (second, third)))
    assert moved
    assert all(group(stage.trains)(name) for name in moved)
    projections = {name for name in first if name.startswith("unet.") and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))}
    assert {name for name in projections if ".attn2." in name} <= adapted <= projections  # at one position self-attention has nothing to choose from
    assert all(torch.isfinite(p).all() for p in third.values())
    wanted = ImageSet(("a x", "a y"), (1, 2)), Sampler(2, 3.0)
    images = [engine.read_images(engine.images(each, wanted)) for each in (root, tuned)]
    assert [(each.dtype, each.shape) for each in images] == [(torch.uint8, (2, 3, 32, 32))] * 2
    assert not torch.equal(*images)


# --- prompts that are too long ---------------------------------------------------------------------------------------

LONG = "a b c d e f g h i j k l m n o p"  # with start and end two tokens more than the encoders read


@every_layout
def test_a_cut_is_diffusers_cut(layout):
    """What is drawn of a prompt that is too long is what diffusers' own pipeline draws of it, for one text encoder and for two; else it is refused."""
    words, _, *pooled = tiny.of_layout(layout).encode_prompt(LONG, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    rows = torch.cat([words.flatten(1), pooled[0]], 1) if pooled else words
    assert torch.equal(made(layout).encode([LONG], cut=True), rows)
    for read in (made(layout).encode, made(layout).words):
        with pytest.raises(SpecError, match="takes 18 tokens and this model reads 16"):
            read([LONG])


@every_layout
def test_images_say_which_prompts_were_cut(engines, layout):
    """When they are drawn, and whenever they are asked later; images of whole prompts have the record that they always had."""
    engine, root = engines[layout]
    said = "1 of 2 prompts are longer than the model reads and were cut"
    cut, whole = ((ImageSet((*prompts, "a x"), (1, 2, 3)), Sampler(2, 3.0)) for prompts in ((LONG, LONG), ("a y", "a y")))
    lines: list[str] = []
    told = Engine(engine.store, lines.append)
    assert (told.cut(root, cut), told.cut(root, whole)) == (said, "")
    assert lines == [said]
    assert (engine.cut(root, cut), engine.cut(root, whole)) == (said, "")
    assert engine.store.record(engine.images(root, cut))["cut"] == [LONG]
    assert set(engine.store.record(engine.images(root, whole))) == {"lineage", "prompts", "seeds"}


@pytest.mark.parametrize("which", ["tokenizer", "tokenizer_2"])
def test_a_prompt_is_cut_if_one_encoder_does_not_read_it_whole(which, monkeypatch):
    """SDXL has two, and either may be the shorter."""
    pipe = StableDiffusionXL(tiny.of_layout("sdxl"), CPU)
    monkeypatch.setattr(getattr(pipe, which), "model_max_length", 12)
    assert pipe.overlong([LONG[:19], LONG[:21]]) == [LONG[:21]]


# --- SDXL ------------------------------------------------------------------------------------------------------------


def test_sdxl_says_what_diffusers_says():
    """Words and pooled vector of a prompt are those of diffusers' own pipeline, and so is a pass of the UNet with them."""
    pipe, theirs = made("sdxl"), tiny.of_layout("sdxl")
    words, _, pooled, _ = theirs.encode_prompt("a x", device="cpu", do_classifier_free_guidance=False)
    row = pipe.encode(["a x"])
    assert row.shape == (1, 16 * 40 + 12)
    assert torch.equal(pipe.words(["a x"]), words)
    assert torch.equal(row, torch.cat([words.flatten(1), pooled], 1))
    x, t = sampling.noise(pipe, [1]), torch.tensor(500)
    added = {"text_embeds": pooled, "time_ids": theirs._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 12)}
    with torch.no_grad():
        assert torch.equal(pipe.predict(x, t, row), theirs.unet(x, t, encoder_hidden_states=words, added_cond_kwargs=added).sample)


@pytest.mark.parametrize("zeroed", [True, False])
def test_the_empty_prompt_of_sdxl(zeroed):
    """All zeros where the model says so, also for what reads as nothing, and the encoders' own answer elsewhere; `words` is always theirs."""
    theirs = tiny.of_layout("sdxl")
    theirs.register_to_config(force_zeros_for_empty_prompt=zeroed)
    pipe = StableDiffusionXL(theirs, CPU)
    assert [bool(row.any()) for row in pipe.encode(["", " ", "a x"])] == [not zeroed, not zeroed, True]
    assert pipe.words([""]).any()


@pytest.mark.parametrize("part", ["words", "pooled"])
def test_both_parts_of_the_condition_reach_the_network(part):
    """Another sequence, or another pooled vector alone: another prediction."""
    pipe = made("sdxl")
    (one, two), x, t = pipe.encode(["a x", "the y"]), sampling.noise(pipe, [1]), torch.tensor(500)
    mixed = torch.cat([two[:-12], one[-12:]]) if part == "words" else torch.cat([one[:-12], two[-12:]])
    with torch.no_grad():
        assert not torch.equal(pipe.predict(x, t, one[None]), pipe.predict(x, t, mixed[None]))


def test_sizes_reach_the_network():
    """The UNet is told the image's own height and width; an oblong one is told as such."""
    pipe, told = StableDiffusionXL(tiny.of_layout("sdxl"), CPU), []
    pipe.unet.register_forward_pre_hook(lambda module, args, given: told.append(given["added_cond_kwargs"]["time_ids"].tolist()), with_kwargs=True)
    with torch.no_grad():
        pipe.predict(torch.zeros(1, 4, 8, 16), torch.tensor(1), pipe.encode(["a x"]))
    assert told == [[[32, 64, 0, 0, 32, 64]]]


def test_the_attack_on_one_text_encoder_refuses_two(engines):
    """UnlearnDiffAtk says by name what it runs on and what would do instead, before anything is drawn."""
    engine, root = engines["sdxl"]
    with pytest.raises(SpecError, match="'unlearndiffatk' runs on stable-diffusion models and this one is sdxl; relearning that runs on it: dimra, malicious"):
        unlearndiffatk.Attack().rates(engine, root, ImageSet(("a x",), (1,)), None, "x")


# --- v-prediction ----------------------------------------------------------------------------------------------------


def alpha_bar(pipe: Pipe, t: Tensor) -> Tensor:
    """alpha_bar at t (n, 1, 1, 1)."""
    return pipe.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)


def as_noise(pipe: Pipe, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """eps from v at x_t."""
    a = alpha_bar(pipe, t)
    return a.sqrt() * v + (1 - a).sqrt() * x_t


def test_esds_target_is_the_same_in_noise_and_in_v():
    """Its weights add up to 1: taken of v and turned into noise, it is the paper's target of noise; the squared error differs by alpha_bar alone."""
    pipe = made("sd21")
    x, t = sampling.noise(pipe, [1, 2]), torch.tensor([100, 900])
    with torch.no_grad():
        null, cond = (pipe.predict(x, t, pipe.encode([text] * 2)) for text in ("", "a x"))
    eps_null, eps_c = (as_noise(pipe, v, x, t) for v in (null, cond))
    wanted = esd.target(null, cond, 1.5)
    torch.testing.assert_close(as_noise(pipe, wanted, x, t), esd.target(eps_null, eps_c, 1.5))
    in_v, in_noise = (cond - wanted).square(), (eps_c - esd.target(eps_null, eps_c, 1.5)).square()
    torch.testing.assert_close(in_noise, alpha_bar(pipe, t) * in_v)


def test_a_schedule_that_ends_in_pure_noise():
    """Zero terminal SNR is kept, its sampling starts at the last timestep, and it is refused with noise prediction, which says nothing there."""
    theirs = tiny.of_layout("sd21")
    theirs.scheduler.register_to_config(rescale_betas_zero_snr=True)
    pipe = StableDiffusion(theirs, CPU)
    assert pipe.schedule.alphas_cumprod[-1] == 0
    scheduler = pipe.scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    images = sampling.draw(pipe, ["a x"], [1], Sampler(4, 3.0))
    assert images.float().std() > 0
    theirs.scheduler.register_to_config(prediction_type="epsilon")
    with pytest.raises(SpecError, match="ends in pure noise"):
        StableDiffusion(theirs, CPU)


def test_an_inpainting_model_is_refused():
    """Its UNet takes more than a latent."""
    theirs = tiny.of_layout("sd14")
    theirs.unet.register_to_config(in_channels=9)
    with pytest.raises(StoreError, match="takes 9 channels, gives 4, and the latents have 4; is it an inpainting model"):
        StableDiffusion(theirs, CPU)
