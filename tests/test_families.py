"""Class-conditional models: a folder, labels for prompts, sampling in pixels, and the stages that run on them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import catalogue, pipeline, pocket, sampling
from harness.candidate import Candidate
from harness.catalogue import Spec
from harness.engine import Engine
from harness.errors import SpecError, StoreError
from harness.pipeline import ClassConditional, Pipe, denoise, group, identify
from harness.spec import Base, Group, Lineage, Sampler, Task
from harness.store import Store
from harness.training import Run
from harness.unlearning import dimum, esd, uce
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("x", "y", "p", "k", "l", "f", "g", "o", "r", "s")  # the people of the tiny task
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
SAMPLER = Sampler(steps=3, guidance=3.0)
SMALL = {"steps": 2, "lr": 1e-2, "batch": 2, "images_per_prompt": 1, "sampler_steps": 3, "trains": "unet"}
STAGES = [
    (kind, name)
    for kind in catalogue.CLASSES
    if kind != "detection"
    for name in catalogue.names(kind)
    if "class-conditional" in catalogue.families(catalogue.find(kind, name))
]


def unet(seed: int = 0, classes: int = len(CLASSES)) -> UNet2DModel:
    """A random UNet for 8 px images, with attention at 4 px and in the middle."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=4,
            num_class_embeds=classes + 1,
        )


def save(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, variant: str | None = None, **schedule: Any) -> Path:
    """A model's folder, as a user would have it: DDPM's scheduler and the list of classes."""
    unet(seed).to(dtype).save_pretrained(folder / "unet", variant=variant)
    DDPMScheduler(**schedule).save_pretrained(folder / "scheduler")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


def made(seed: int = 0, **schedule: Any) -> ClassConditional:
    """The tiny model in memory."""
    return ClassConditional(unet(seed), dict(DDPMScheduler(**schedule).config), CLASSES, CPU)


def task() -> Task:
    """The tiny task where a prompt is the name of a class."""
    plain = tiny.task()
    groups = {name: dataclasses.replace(getattr(plain, name), prompts=("{}",)) for name in ("erased", "anchor", "retain", "retained")}
    return dataclasses.replace(plain, **groups, finetune={name: Group(each.concepts, ("{}",)) for name, each in plain.finetune.items()})


def weights(pipe: Pipe) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in pipe.named().items()}


def moved(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """The names of tensors whose bits differ."""
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The tiny model on disk."""
    return save(tmp_path_factory.mktemp("ddpm") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """The tiny model's folder, to be changed."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def root(saved) -> Lineage:
    """The tiny model as a lineage."""
    return Lineage(identify(str(saved)), task())


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"dtype": torch.float16}, {"dtype": torch.float16, "variant": "fp16"}, {"prediction_type": "v_prediction"}])
def test_every_kind_of_folder_loads_and_draws(tmp_path, kind):
    """float16, as variant or not, is computed in float32; DDPM's own scheduler is read; names become images."""
    pipe = pipeline.load(identify(str(save(tmp_path / "model", **kind))))
    assert isinstance(pipe, ClassConditional)
    assert (pipe.classes, pipe.latent_shape) == (CLASSES, (3, 8, 8))
    assert {p.dtype for p in pipe.named().values()} == {torch.float32}
    rounded = {name: p.to(kind.get("dtype", torch.float32)).float() for name, p in weights(made()).items()}
    assert moved(weights(pipe), rounded) == set()
    assert pipe.schedule.config.prediction_type == kind.get("prediction_type", "epsilon")
    assert not pipe.unet.training
    assert not made().unet.training  # its parts were training
    assert not any(p.requires_grad for p in pipe.named().values())
    images = sampling.draw(pipe, ["x", "y"], [1, 1], SAMPLER)
    assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 8, 8))
    assert images.float().std() > 0
    assert not torch.equal(images[0], images[1])


def test_the_schedule_is_the_folders_own(tmp_path):
    """Betas from the file, not SD's: alpha_bar is that of DDPM's straight line."""
    pipe = pipeline.load(identify(str(save(tmp_path, beta_end=0.03))))
    expected = (1 - torch.linspace(1e-4, 0.03, 1000)).cumprod(0)
    assert torch.allclose(pipe.schedule.alphas_cumprod, expected)


def test_the_family_is_known_by_the_layout(saved, tiny_folder):
    """Without loading anything, and each folder as what it is."""
    assert pipeline.family(identify(str(saved))) == "class-conditional"
    assert pipeline.family(identify(str(tiny_folder))) == "stable-diffusion"


def test_the_classes_are_part_of_the_address_and_a_card_is_not(folder):
    """Renaming a class makes another model; writing about it does not."""
    digest = identify(str(folder)).digest
    (folder / "card.json").write_text("{}")
    assert identify(str(folder)).digest == digest
    (folder / "classes.json").write_text(json.dumps(CLASSES[::-1]))
    assert identify(str(folder)).digest != digest


def pickled(place: Path) -> None:
    """The weights as a pickle instead."""
    torch.save(load_file(place / WEIGHTS), place / "unet" / "diffusion_pytorch_model.bin")
    (place / WEIGHTS).unlink()


def without(tensor: str) -> Callable[[Path], None]:
    """Drop a tensor."""

    def drop(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        del tensors[tensor]
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})

    return drop


def classes(text: str) -> Callable[[Path], object]:
    """Other content in classes.json."""
    return lambda place: (place / "classes.json").write_text(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no classes": (lambda place: (place / "classes.json").unlink(), r"has no classes\.json; a class-conditional DDPM is a folder of unet/, scheduler/ and"),
    "no UNet": (lambda place: shutil.rmtree(place / "unet"), "has no unet;|holds no weights"),
    "no scheduler": (lambda place: shutil.rmtree(place / "scheduler"), "has no scheduler;"),
    "empty scheduler": (lambda place: (place / "scheduler" / "scheduler_config.json").unlink(), "does not load as a class-conditional DDPM"),
    "pickle": (pickled, "holds only diffusion_pytorch_model.bin, a format that can run code when opened"),
    "pickle beside other weights": (
        lambda place: (pickled(place), save_file({"a": torch.zeros(1)}, place / "a.safetensors")),
        "does not load as a class-conditional DDPM",
    ),
    "one class too few": (classes(json.dumps(CLASSES[1:])), "names 9 classes and the UNet's num_class_embeds is 11; it must be one more .*: 10"),
    "the null class listed": (classes(json.dumps([*CLASSES, "null"])), "names 11 classes and the UNet's num_class_embeds is 11; it must be one more .*: 12"),
    "garbled UNet": (lambda place: (place / "unet" / "config.json").write_text("{"), "does not load as a class-conditional DDPM"),
    "a class twice": (classes(json.dumps(["x", *CLASSES[:-1]])), "is no list of different names"),
    "an empty name": (classes(json.dumps(["", *CLASSES[1:]])), "is no list of different names"),
    "a table": (classes(json.dumps(dict.fromkeys(CLASSES, 1))), "is no list of different names"),
    "garbled classes": (classes("["), "does not load as a class-conditional DDPM"),
    "truncated": (lambda place: (place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes()[:1000]), "does not load as a class-conditional DDPM"),
    "lacks a tensor": (without("class_embedding.weight"), "does not load as a class-conditional DDPM.*class_embedding.weight"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_no_whole_model_is_refused(folder, name):
    """Missing parts, classes that do not count up, pickles, truncated files: refused with the reason."""
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(StoreError, match=f"(?s){message}"):
        pipeline.load(identify(str(folder)))


def test_a_prediction_of_another_kind_is_refused(folder):
    """Epsilon and v, as everywhere."""
    DDPMScheduler(prediction_type="sample").save_pretrained(folder / "scheduler")
    with pytest.raises(SpecError, match="prediction type 'sample' is not supported"):
        pipeline.load(identify(str(folder)))


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_class_and_its_condition_the_label():
    """Labels in the order of the file; the empty prompt is the label after the last."""
    pipe = made()
    labels = pipe.encode([*CLASSES, "", "y"])
    assert labels.dtype == torch.long
    assert labels.tolist() == [*range(10), 10, 1]
    assert pipe.tokens("k").tolist() == [[3]]


@pytest.mark.parametrize("prompt", ["a x", "X", "null", " "])
def test_an_unknown_class_is_answered_with_the_list(prompt):
    """Only exact names; the error lists the classes in words."""
    with pytest.raises(SpecError, match=f"unknown class '{prompt}'; allowed: f, g, k, l, o, p, r, s, x, y"):
        made().encode(["x", prompt])


def test_the_condition_reaches_the_network():
    """Each label, the null among them, gives another prediction of the same x_t."""
    pipe, x = made(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [pipe.predict(x, torch.tensor(500), pipe.encode([name])) for name in [*CLASSES, ""]]
    assert not any(torch.equal(one, two) for i, one in enumerate(seen) for two in seen[:i])


# --- pixels and sampling ---------------------------------------------------------------------------------------------


def test_pixels_go_there_and_back():
    """Every value of a byte: [-1, 1] without deviation, and the same byte again; what leaves the range is cut."""
    pipe, images = made(), torch.arange(192).add(64).to(torch.uint8).reshape(1, 3, 8, 8)
    images = torch.cat([images, torch.arange(192).to(torch.uint8).reshape(1, 3, 8, 8)])
    mean, std = pipe.latents(images)
    assert (mean.min().item(), mean.max().item()) == (-1, 1)
    assert not std.any()
    assert torch.equal(pipe.decode(mean), images)
    assert pipe.decode(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def by_hand(pipe: ClassConditional, x: Tensor, name: str, sampler: Sampler, clips: bool) -> Tensor:
    """DDIM (eta 0) with guidance from its formulas; abar after the last step is that of t = 0."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    stride = 1000 // sampler.steps
    for t in reversed(range(0, stride * sampler.steps, stride)):
        null, cond = (pipe.predict(x, torch.tensor(t), pipe.encode([each])) for each in ("", name))
        eps = null + sampler.guidance * (cond - null)
        x_0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        after = abar[max(t - stride, 0)]
        x = after.sqrt() * (x_0.clamp(-1, 1) if clips else x_0) + (1 - after).sqrt() * eps
    return x


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@torch.no_grad()
def test_guided_sampling_is_ddims_formula(clips, guidance):
    """Three steps by hand; the estimate of x_0 is kept among the pixels unless the folder says otherwise."""
    pipe, sampler = made(clip_sample=clips), Sampler(3, guidance)
    x = sampling.noise(pipe, [4])
    drawn, t = denoise(pipe, x, pipe.encode(["k"]), pipe.encode([""]), sampler)
    assert t.item() == 0
    assert torch.allclose(drawn, by_hand(pipe, x, "k", sampler, clips), atol=2e-4)
    assert not torch.allclose(drawn, by_hand(pipe, x, "k", sampler, not clips), atol=2e-2)


def test_passes_count_samples():
    """Guidance takes two samples per image and step, its absence one."""
    pipe = made()
    sampling.draw(pipe, ["x", "y"], [1, 2], Sampler(3, 3.0))
    sampling.draw(pipe, ["x", "y"], [1, 2], Sampler(3, 1.0))
    assert pipe.passes == 12 + 6


def test_an_image_does_not_depend_on_its_batch():
    """Same class and seed, alone or among others: the same picture but for the last bit of a pixel."""
    pipe = made()
    together = sampling.draw(pipe, ["x", "k", "x"], [1, 2, 3], SAMPLER)
    alone = sampling.draw(pipe, ["k"], [2], SAMPLER)
    assert (together[1].int() - alone[0].int()).abs().max() <= 1


# --- parameter groups ------------------------------------------------------------------------------------------------


def test_the_groups_of_a_model_without_text():
    """There is a UNet and nothing else; attention over positions is `selfattn`; u is all but the head."""
    pipe = made()
    names = set(pipe.named())
    chosen = {name: set(pipe.parameters(name)) for name in ("all", "unet", "selfattn", "u")}
    assert chosen["all"] == chosen["unet"] == names
    assert chosen["selfattn"] == {name for name in names if ".attentions." in name}
    assert {name.split(".")[1] for name in chosen["selfattn"]} == {"down_blocks", "mid_block", "up_blocks"}
    assert names - chosen["u"] == {name for name in names if name.startswith(("unet.time_embedding.", "unet.conv_norm_out.", "unet.conv_out."))}
    assert "unet.class_embedding.weight" in chosen["u"]


@pytest.mark.parametrize("name", ["x", "x-strict", "unet.xattn", "unet.xattn_kv"])
def test_there_is_no_cross_attention(name):
    """The error says so and lists the groups that there are."""
    with pytest.raises(SpecError, match=rf"group '{name}' matches nothing in this class-conditional model; allowed: all, unet, unet\.selfattn, .*selfattn$"):
        made().parameters(name)


# --- stages ----------------------------------------------------------------------------------------------------------


def small(kind: str, name: str, **changes: Any) -> Any:
    """The stage with few steps and images, and a learning rate that shows."""
    has = {f.name for f in dataclasses.fields(catalogue.find(kind, name))}
    return catalogue.make(kind, Spec(name), {}, **{field: value for field, value in {**SMALL, **changes}.items() if field in has})


every_stage = pytest.mark.parametrize(("kind", "name"), STAGES)


def test_the_stages_of_the_papers_run_on_both_families():
    """ESD and DiMUM, and plain fine-tuning, say that they do; UCE, which edits cross-attention, does not."""
    assert {("unlearning", "esd"), ("unlearning", "dimum"), ("finetuning", "full")} <= set(STAGES)
    assert ("unlearning", "uce") not in STAGES


@every_stage
def test_a_stage_makes_checkpoint_and_images(root, tmp_path, kind, name):
    """Only what `trains` holds is saved, a fresh engine gets the same weights back bit for bit, and draws other images than the base."""
    lineage, engine = root.then(small(kind, name)), Engine(Store(tmp_path))
    delta = load_file(engine.checkpoint(lineage) / "weights.safetensors")
    assert delta
    assert all(torch.isfinite(tensor).all() for tensor in delta.values())
    before, after = weights(made()), weights(engine.load(lineage))
    assert moved(before, after)
    assert all(group(lineage.stages[-1].trains)(each) for each in moved(before, after))
    assert moved(after, weights(Engine(Store(tmp_path)).load(lineage))) == set()
    wanted = dimum.Method(images_per_prompt=1).images(root.task)["retain"], SAMPLER
    one, two = (engine.read_images(engine.images(each, wanted)) for each in (root, lineage))
    assert one.shape == two.shape == (2, 3, 8, 8)
    assert not torch.equal(one, two)
    assert moved(before, weights(engine.load(root))) == set()


@every_stage
def test_a_trajectory_continues_bit_for_bit(root, tmp_path, kind, name):
    """Two steps and two more are four."""
    if "steps" not in {f.name for f in dataclasses.fields(catalogue.find(kind, name))}:
        pytest.skip("this stage has no steps")
    two, four = (root.then(small(kind, name, steps=steps)) for steps in (2, 4))
    at_once, chained = Engine(Store(tmp_path / "one")), Engine(Store(tmp_path / "two"))
    chained.checkpoint(two)
    assert moved(weights(at_once.load(four)), weights(chained.load(four))) == set()
    assert moved(weights(at_once.load(two)), weights(at_once.load(four)))


class Witness(list[tuple[Tensor, Tensor]]):
    """x_t and labels of every UNet pass."""

    def __init__(self, pipe: ClassConditional) -> None:
        super().__init__()
        pipe.unet.register_forward_hook(lambda module, args, given, out: self.append((args[0].detach(), given["class_labels"])), with_kwargs=True)


def run(pipe: ClassConditional, stage: Any, **images: Tensor) -> Run:
    """The stage on the tiny task; images that are not given are grey."""
    grey = {name: torch.full((len(each.prompts), 3, 8, 8), 128, dtype=torch.uint8) for name, each in stage.images(task()).items()}
    mine = Run(stage.seed, {**grey, **images}, {name: p for name, p in weights(pipe).items() if group(stage.trains)(name)})
    stage(pipe, task(), mine)
    return mine


def test_esd_asks_for_the_class_and_the_null_label():
    """The frozen passes see null and class labels in this order, the trained one the class: x or y, labels 0 and 1."""
    pipe = made()
    seen = Witness(pipe)
    run(pipe, esd.Method(trains="f", steps=1, batch=4, sampler_steps=1))
    (_, frozen), (_, trained) = seen
    assert frozen[:4].tolist() == [10] * 4
    assert frozen[4:].tolist() == trained.tolist()
    assert set(trained.tolist()) <= {0, 1}


def test_esd_of_cross_attention_says_what_there_is(root, tmp_path):
    """The paper's default group does not exist here."""
    with pytest.raises(SpecError, match="'x' matches nothing in this class-conditional model"):
        Engine(Store(tmp_path)).checkpoint(root.then(esd.Method(steps=1)))


def test_dimum_shows_the_alternative_under_the_forgotten_label():
    """Images of the anchor p (white) under the labels of x and y; the retain set (black) under k and l."""
    pipe, stage = made(), dimum.Method(steps=1, batch=64, images_per_prompt=1)
    seen = Witness(pipe)
    sets = stage.images(task())
    assert (sets["retain"].prompts, sets["alternative"].prompts) == (("k", "l"), ("p", "p"))
    flat = {name: torch.full((len(chosen.prompts), 3, 8, 8), value, dtype=torch.uint8) for (name, chosen), value in zip(sets.items(), (0, 255), strict=True)}
    run(pipe, stage, **flat)
    (dark, kept), (light, renamed) = seen
    assert set(kept.tolist()) == {3, 4}
    assert set(renamed.tolist()) == {0, 1}
    assert dark.mean() < 0 < light.mean()


@dataclasses.dataclass(frozen=True)
class Labels:
    """A stage for class-conditional models alone."""

    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("class-conditional",)
    reads: ClassVar[tuple[str, ...]] = ()

    def images(self, task: Any) -> dict[str, Any]:
        """None."""
        return {}

    def __call__(self, pipe: Any, task: Any, run: Any) -> None:
        """Do nothing."""


def test_a_stage_of_another_family_is_refused_before_anything_is_made(root, base, tmp_path):
    """It names the families that the stage is for, the model's, and the stages that would do; nothing is drawn or kept."""
    engine = Engine(Store(tmp_path))
    message = r"'uce' runs on text-to-image models and this one is class-conditional; unlearning that runs on it: (\w+, )*dimum, (\w+, )*esd"
    with pytest.raises(SpecError, match=message) as error:
        engine.checkpoint(root.then(uce.Method()))
    assert "uce" not in str(error.value).rpartition("on it: ")[2].split(", ")
    with pytest.raises(SpecError, match=message):
        engine.build([root.then(esd.Method(trains="f", steps=1), uce.Method())])
    with pytest.raises(SpecError, match="runs on class-conditional models and this one is stable-diffusion"):
        engine.checkpoint(Lineage(base, tiny.task(), (Labels(),)))
    assert list(tmp_path.glob("*/*")) == []
    assert load_file(engine.checkpoint(root.then(Labels())) / "weights.safetensors") == {}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in catalogue.CLASSES if kind != "detection" for name in catalogue.names(kind)])
def test_families_are_spelled_right(kind, name):
    """Whatever a stage declares exists."""
    declared = catalogue.families(catalogue.find(kind, name))
    assert declared
    assert set(declared) <= {"text-to-image", "stable-diffusion", "sdxl", "class-conditional"}


# --- candidates ------------------------------------------------------------------------------------------------------


def bring(pipe: Pipe, path: Path) -> set[str]:
    """Put a candidate into the model; the names of what it changed."""
    before = weights(pipe)
    Candidate.at(str(path))(pipe, None, Run(0))
    return moved(before, weights(pipe))


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_folder_as_a_candidate(tmp_path, part):
    """The whole model or its UNet: the weights become its weights."""
    pipe, place = made(), save(tmp_path, seed=1)
    assert bring(pipe, place / part) == moved(weights(made()), weights(made(1)))
    assert moved(weights(pipe), weights(made(1))) == set()


def test_a_candidate_goes_through_the_engine(root, tmp_path):
    """As any stage of either family."""
    engine, place = Engine(Store(tmp_path / "store")), save(tmp_path / "model", seed=1)
    assert moved(weights(engine.load(root.then(Candidate.at(str(place))))), weights(made(1))) == set()


def test_a_candidate_with_other_classes_is_refused(tmp_path):
    """Labels in another order would measure the wrong class."""
    place = save(tmp_path, seed=1)
    (place / "classes.json").write_text(json.dumps(CLASSES[::-1]))
    with pytest.raises(StoreError, match=r"has the classes s, r, .*; its parent's are, in this order: x, y, p"):
        bring(made(), place)


def test_a_lora_file_is_refused(tmp_path):
    """Its names belong to text-to-image pipelines."""
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(StoreError, match="is a LoRA, which is read for text-to-image models only"):
        bring(made(), tmp_path / "lora.safetensors")


def test_a_shipped_name_without_weights_says_where_its_recipe_is(monkeypatch, tmp_path):
    """Not a hub id and not "no such model": the recipe is named."""
    monkeypatch.setitem(pipeline.SHIPPED, "pocket-ddpm", tmp_path / "ddpm")
    with pytest.raises(SpecError, match=r"no weights here yet; .*README\.md"):
        pipeline.identify("pocket-ddpm")


def test_a_shipped_name_is_a_folder(monkeypatch, saved):
    """`pocket-ddpm` is found as `pocket` is, in its own place."""
    assert pipeline.SHIPPED["pocket-ddpm"] == pocket.DDPM
    monkeypatch.setitem(pipeline.SHIPPED, "pocket-ddpm", saved)
    assert identify("pocket-ddpm") == Base(identify(str(saved)).digest, "pocket-ddpm")
    assert moved(weights(pipeline.load(identify("pocket-ddpm"))), weights(made())) == set()


def test_it_is_what_diffusers_draws():
    """One DDIM step of diffusers' own scheduler on our prediction is one of ours."""
    pipe, x = made(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler(clip_sample=True, set_alpha_to_one=False, beta_schedule="linear")
    scheduler.set_timesteps(1)
    with torch.no_grad():
        out = pipe.predict(x, scheduler.timesteps[0], pipe.encode(["x"]))
    drawn, _ = denoise(pipe, x, pipe.encode(["x"]), pipe.encode([""]), Sampler(1, 1.0))
    assert torch.equal(drawn, scheduler.step(out, scheduler.timesteps[0], x).prev_sample)
