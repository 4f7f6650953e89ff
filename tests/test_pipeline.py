"""Models in memory: what is loaded, what a name means, what a number is; and models that somebody brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import pipeline, sampling
from harness.candidate import Candidate
from harness.errors import ResurgenceError, SpecError, StoreError
from harness.pipeline import ALIASES, COMPONENTS, GROUPS, Pipe, StableDiffusion, denoise, group, identify
from harness.spec import Base, Lineage, Sampler
from harness.training import Run
from tests import tiny

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def weights(pipe: Pipe) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in pipe.named().items()}


def moved(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """The names of tensors whose bits differ."""
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def made(prediction: str) -> Pipe:
    """The tiny model with another kind of prediction, without a file."""
    return StableDiffusion(tiny.pipeline(prediction), torch.device("cpu"))


def rng(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A tiny model's folder, to be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def to_bin(path: Path) -> None:
    """Save a .safetensors file as a pickle instead, under the name it would have."""
    torch.save(load_file(path), path.with_name("pytorch_model.bin" if path.name == "model.safetensors" else f"{path.stem}.bin"))
    path.unlink()


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [{}, {"dtype": torch.float16}, {"dtype": torch.float16, "variant": "fp16"}, {"prediction_type": "v_prediction"}],
    ids=["float32", "float16", "float16 variant", "v prediction"],
)
def test_every_kind_of_folder_loads_and_draws(tmp_path, kind):
    """float16, as variant or not, is computed in float32; either prediction type gives finite latents and uint8 images."""
    pipe = pipeline.load(identify(str(tiny.save(tmp_path / "model", **kind))))
    named = pipe.named()
    assert {p.dtype for p in named.values()} == {torch.float32}
    rounded = {name: p.to(kind.get("dtype", torch.float32)).float() for name, p in weights(made("epsilon")).items()}
    assert moved(weights(pipe), rounded) == set()
    assert pipe.schedule.config.prediction_type == kind.get("prediction_type", "epsilon")
    null, cond = pipe.encode(["", "a x"]).split(1)
    latents, t = denoise(pipe, sampling.noise(pipe, [1]), cond, null, Sampler(3, 3.0))
    assert (latents.dtype, latents.shape, t.item()) == (torch.float32, (1, 4, 4, 4), 0)
    assert torch.isfinite(latents).all()
    images = sampling.draw(pipe, ["a x", "a y"], [1, 2], Sampler(3, 3.0))
    assert (images.dtype, images.shape) == (torch.uint8, (2, 3, 16, 16))
    assert images.float().std() > 0


def test_the_full_precision_is_read_where_both_are_there(tmp_path):
    """A folder with float32 weights and a float16 variant beside them gives the float32 weights."""
    tiny.save(tmp_path, dtype=torch.float16, variant="fp16")
    tiny.save(tmp_path)
    assert moved(weights(pipeline.load(identify(str(tmp_path)))), weights(made("epsilon"))) == set()


def test_nothing_is_trained_or_dropped_out_by_itself(pipe):
    """A loaded model is in evaluation mode and asks for no gradient."""
    assert not any(p.requires_grad for p in pipe.named().values())
    assert not any(getattr(pipe, part).training for part in COMPONENTS)


def all_pickles(folder: Path) -> None:
    """Every weight as a pickle."""
    for path in [*folder.rglob("*.safetensors")]:
        to_bin(path)


def lacks(part: str) -> Callable[[Path], None]:
    """Remove a component."""

    def remove(folder: Path) -> None:
        shutil.rmtree(folder / part)

    return remove


def cut(file: str, length: int) -> Callable[[Path], None]:
    """Truncate a file."""

    def truncate(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:length])

    return truncate


def without(file: str, tensor: str) -> Callable[[Path], None]:
    """Drop a tensor from a file."""

    def drop(folder: Path) -> None:
        tensors = load_file(folder / file)
        del tensors[tensor]
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return drop


def predicts(kind: str) -> Callable[[Path], None]:
    """Claim another prediction type."""

    def change(folder: Path) -> None:
        file = folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": kind}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles": (all_pickles, "holds only diffusion_pytorch_model.bin, a format that can run code when opened; save it with"),
    "pickled text encoder": (lambda folder: to_bin(folder / TEXT), "does not load.*model.safetensors"),
    "pickled UNet": (lambda folder: to_bin(folder / UNET), "does not load"),
    **{f"no {part}": (lacks(part), f"has no {part}") for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
    "garbled index": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json"),
    "truncated UNet": (cut(UNET, 1000), "does not load.*diffusion_pytorch_model"),
    "empty UNet": (cut(UNET, 0), "does not load.*diffusion_pytorch_model"),
    "truncated text encoder": (cut(TEXT, 100), "does not load"),
    "UNet that lacks a tensor": (without(UNET, "conv_in.weight"), "does not load"),
    "text encoder that lacks a tensor": (without(TEXT, "encoder.layers.0.mlp.fc1.weight"), "lacks encoder.layers.0.mlp.fc1.weight"),
    "another prediction": (predicts("sample"), "prediction type 'sample' is not supported; allowed: epsilon, v_prediction"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_no_whole_model_is_refused(folder, name):
    """Pickles, missing parts, truncated files and tensors that would be drawn at random: refused with the reason."""
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ResurgenceError, match=f"(?s){message}"):
        pipeline.load(identify(str(folder)))


def test_an_empty_folder_is_no_model(tmp_path):
    """No weights at all."""
    with pytest.raises(StoreError, match="holds no weights"):
        identify(str(tmp_path))


@pytest.mark.parametrize("source", ["pokcet", "./missing", "/missing/folder", "~/missing", "a/b/c"])
def test_nonsense_is_no_model(source):
    """What is neither a folder nor looks like a hub id is refused without asking anybody."""
    with pytest.raises(SpecError, match=f"no model '{source}': neither 'pocket', nor a folder, nor a .safetensors file, nor a hub id such as"):
        identify(source)


@pytest.mark.parametrize("source", ["so me/thing?", "-a/b-"])
def test_a_hub_id_that_cannot_exist(source):
    """The hub's own rules for names, as an error of the request."""
    with pytest.raises(SpecError, match="cannot fetch the model"):
        identify(source)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    """Without network or cache the error says what would do."""

    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # offline, the error says that instead: tests/test_loading.py
    with pytest.raises(SpecError, match=r"cannot fetch the model 'owner/name': nothing in the cache\. Give a local diffusers folder"):
        identify("owner/name")


def test_a_hub_model_is_its_commit(monkeypatch, tiny_folder, tmp_path):
    """The address is id and commit, whatever revision was asked for; no pickle is ever downloaded."""
    commit, asked = shutil.copytree(tiny_folder, tmp_path / "0123abcd"), []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    base = identify("owner/name@main")
    assert base == Base("owner/name@0123abcd", "owner/name@main")
    assert identify("owner/name").digest == base.digest
    assert moved(weights(pipeline.load(base)), weights(made("epsilon"))) == set()
    assert [revision for _, revision, _ in asked] == ["main", None, "main"]
    assert {name for name, *_ in asked} == {"owner/name"}
    assert {pattern.rpartition(".")[2] for *_, patterns in asked for pattern in patterns} == {"json", "txt", "safetensors"}


def test_a_folder_is_its_content(folder, tiny_folder, tmp_path):
    """Weights, configurations and tokenizer make the address; the place, a README and a pickle that nobody reads do not."""
    digest = identify(str(folder)).digest
    (folder / "README.md").write_text("hello")
    (folder / "unet" / "old.bin").write_bytes(b"x")
    assert identify(str(folder)).digest == identify(str(tiny_folder)).digest == digest
    seen = {digest}
    for file in (UNET, TEXT, "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        other = shutil.copytree(tiny_folder, tmp_path / file.replace("/", "-"))
        (other / file).write_bytes((other / file).read_bytes() + b" ")
        seen.add(identify(str(other)).digest)
    assert len(seen) == 6


# --- parameter groups ------------------------------------------------------------------------------------------------


def members(pipe: Pipe, name: str) -> set[str]:
    """The names in a group."""
    return {each for each in pipe.named() if group(name)(each)}


def test_the_groups_of_esd(pipe):
    """x is cross-attention, x-strict its keys and values, u the rest of the UNet without its head; f is the UNet."""
    x, strict, u, f = (members(pipe, name) for name in ("x", "x-strict", "u", "f"))
    head = {each for each in f if each.startswith(("unet.time_embedding.", "unet.conv_norm_out.", "unet.conv_out."))}
    assert strict < x < f
    assert not x & u
    assert not (x | u) & head
    assert x | u | head == f
    assert x == {each for each in f if ".attn2." in each}
    assert strict == {each for each in x if each.endswith((".to_k.weight", ".to_v.weight"))}
    assert members(pipe, "selfattn") == {each for each in u if ".attn1." in each}
    assert len(strict) == 2 * len({each.partition(".attn2.")[0] for each in x})
    assert all(head)


def test_the_groups_cover_the_model(pipe):
    """`all` is every component, `unet` one of them, and no group is empty."""
    assert members(pipe, "all") == set(pipe.named())
    assert members(pipe, "unet") == {each for each in pipe.named() if each.startswith("unet.")}
    assert {each.partition(".")[0] for each in pipe.named()} == set(COMPONENTS)
    assert all(members(pipe, name) for name in [*GROUPS, *ALIASES])
    assert all(members(pipe, short) == members(pipe, long) for short, long in ALIASES.items())


def test_an_unknown_group_is_answered_with_a_guess(pipe):
    """Every name and short name is listed."""
    with pytest.raises(SpecError, match=r"unknown parameter group 'unet.xatn'; allowed: all, .*x-strict\. Did you mean 'unet.xattn'\?"):
        pipe.parameters("unet.xatn")


def test_a_group_that_matches_nothing_is_an_error(pipe, monkeypatch):
    """Nothing to train is no success."""
    monkeypatch.setitem(GROUPS, "none", lambda name: False)
    with pytest.raises(SpecError, match="parameter group 'none' matches nothing in this stable-diffusion model; allowed: all"):
        pipe.parameters("none")


def test_only_the_chosen_parameters_are_trained(pipe):
    """Asking for a group turns its gradients on and all others off, and forgets old gradients."""
    for parameter in pipe.parameters("unet").values():
        parameter.grad = torch.ones_like(parameter)
    chosen = pipe.parameters("x")
    assert set(chosen) == members(pipe, "x")
    assert {name for name, p in pipe.named().items() if p.requires_grad} == set(chosen)
    assert all(p.grad is None for p in pipe.named().values())
    assert all(p is pipe.named()[name] for name, p in chosen.items())


# --- changing weights ------------------------------------------------------------------------------------------------


def test_reset_undoes_apply_and_edits_in_place(pipe):
    """The model as it was loaded, bit for bit, however often it was changed."""
    before = weights(pipe)
    names = ["unet.conv_in.weight", "vae.encoder.conv_in.bias", "text_encoder.final_layer_norm.weight"]
    for value in (2.0, 3.0):
        pipe.apply({name: torch.full_like(before[name], value) for name in names})
        assert moved(before, weights(pipe)) == set(names)
    pipe.remember(["unet.conv_out.bias"])
    with torch.no_grad():
        pipe.named()["unet.conv_out.bias"].add_(1)
    pipe.reset()
    assert moved(before, weights(pipe)) == set()


def test_weights_of_another_model_are_refused(pipe):
    """A foreign name and a foreign shape are named, and nothing is changed by the part that fits."""
    before = weights(pipe)
    fits = {"unet.conv_in.weight": torch.zeros_like(before["unet.conv_in.weight"])}
    with pytest.raises(StoreError, match=r"'unet\.conv_inn\.weight', which this model does not have"):
        pipe.apply(fits | {"unet.conv_inn.weight": torch.zeros(1)})
    with pytest.raises(StoreError, match=r"'unet.conv_in.bias' has shape \(3,\), this model needs \(8,\)"):
        pipe.apply(fits | {"unet.conv_in.bias": torch.zeros(3)})
    assert moved(before, weights(pipe)) == set()


def test_embeddings_follow_the_text_encoder(pipe):
    """A remembered embedding is forgotten when weights change, and comes back with them."""
    name = "text_encoder.final_layer_norm.bias"
    before = pipe.encode(["a x"])
    pipe.apply({name: pipe.named()[name] + 1})
    torch.testing.assert_close(pipe.encode(["a x"]), before + 1)
    pipe.reset()
    assert torch.equal(pipe.encode(["a x"]), before)


def test_swapped_is_the_other_model_for_a_while(pipe):
    """Inside: the other weights' prediction, without gradient. Afterwards: the same storage, gradients again."""
    x, t, cond = sampling.noise(pipe, [1]), torch.tensor(500), pipe.encode(["a x"])
    chosen = pipe.parameters("x")
    before, places = weights(pipe), {name: p.data_ptr() for name, p in chosen.items()}
    other = {name: p.detach() * 2 for name, p in chosen.items()}
    own = pipe.predict(x, t, cond)
    with pipe.swapped(other):
        swapped = pipe.predict(x, t, cond)
    assert own.requires_grad
    assert not swapped.requires_grad
    assert moved(before, weights(pipe)) == set()
    assert {name: p.data_ptr() for name, p in chosen.items()} == places
    assert torch.is_grad_enabled()
    pipe.apply(other)
    torch.testing.assert_close(pipe.predict(x, t, cond), swapped)
    assert (own - swapped).abs().max() > 1e-5


def test_swapped_lets_nothing_leak(pipe):
    """An error inside restores the weights too; training outside does not reach the swapped tensors."""
    before, name = weights(pipe), "unet.conv_in.weight"
    with pytest.raises(KeyError), pipe.swapped({name: torch.zeros_like(before[name])}):
        raise KeyError
    assert moved(before, weights(pipe)) == set()
    frozen = {name: before[name].clone()}
    with torch.no_grad():
        pipe.named()[name].add_(1)
    with pipe.swapped(frozen):
        assert torch.equal(pipe.named()[name], before[name])
    assert torch.equal(frozen[name], before[name])
    assert torch.equal(pipe.named()[name], before[name] + 1)


# --- text ------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_refused_not_cut(pipe):
    """16 tokens with start and end: 14 letters fit, 15 do not; the error says so."""
    assert pipe.encode(["abcdefghijklmn"]).shape == (1, 16, 16)
    with pytest.raises(SpecError, match="prompt 'abcdefghijklmno' takes 17 tokens and this model reads 16; shorten it"):
        pipe.encode(["a x", "abcdefghijklmno"])


LETTERS = "a b c d e f g h i j k l m n o p"  # with start and end two more than the tiny model reads


def test_a_prompt_that_is_drawn_is_cut(pipe):
    """Of 16 letters the 14 that fit decide the image; what learns from the prompt is refused it all the same, whoever asked first."""
    assert pipe.overlong(["a x", LETTERS, LETTERS, LETTERS[:27]]) == [LETTERS]
    long, short = (sampling.draw(pipe, [prompt], [1], Sampler(2, 3.0)) for prompt in (LETTERS, LETTERS[:27]))
    assert torch.equal(long, short)
    assert not torch.equal(long, sampling.draw(pipe, [LETTERS[:25]], [1], Sampler(2, 3.0)))
    for ask in (pipe.encode, pipe.words, lambda prompts: pipe.tokens(*prompts)):
        with pytest.raises(SpecError, match="takes 18 tokens and this model reads 16; shorten it"):
            ask([LETTERS])


def test_embeddings_do_not_depend_on_company(pipe):
    """Each prompt is encoded alone: the same bits in any list, and one row per prompt asked for."""
    together = pipe.encode(["a x", "", "a x", "the y"])
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[3:], pipe.encode(["the y"]))
    assert not torch.equal(together[0], together[1])
    assert not together.requires_grad


# --- losses and samples ----------------------------------------------------------------------------------------------


def alpha_bar() -> Tensor:
    """The tiny model's noise schedule by hand: the square roots of beta are equally spaced."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_diffusion_loss_by_hand(prediction):
    """Mean squared error against the noise, or against v = sqrt(abar) eps - sqrt(1 - abar) x_0, at a uniform timestep."""
    pipe = made(prediction)
    x_0, cond = torch.randn(6, 4, 4, 4, generator=rng(5)), pipe.encode(["a x"] * 6)
    draws = rng()
    eps, t = torch.randn(x_0.shape, generator=draws), torch.randint(1000, (6,), generator=draws)
    a = alpha_bar()[t].view(-1, 1, 1, 1)
    wanted = eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    out = pipe.predict(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t, cond)
    losses = (out - wanted).pow(2).mean((1, 2, 3))
    torch.testing.assert_close(pipe.diffusion_losses(x_0, cond, rng()), losses)
    torch.testing.assert_close(pipe.diffusion_loss(x_0, cond, rng()), losses.mean())


def test_the_two_kinds_of_prediction_differ():
    """Equal weights, another target: another loss, and other images."""
    (one, two) = (made(kind) for kind in ("epsilon", "v_prediction"))
    assert moved(weights(one), weights(two)) == set()
    x_0 = torch.randn(2, 4, 4, 4, generator=rng())
    losses = [pipe.diffusion_loss(x_0, pipe.encode(["a x"] * 2), rng()).item() for pipe in (one, two)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert not torch.equal(*(sampling.draw(pipe, ["a x"], [1], Sampler(3, 3.0)) for pipe in (one, two)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_by_hand(prediction, guidance):
    """DDIM with eta 0 and classifier-free guidance, from 501 to 1 to 0, in plain formulas."""
    pipe, a = made(prediction), alpha_bar()
    x = start = sampling.noise(pipe, [3])
    null, cond = pipe.encode(["", "a x"]).split(1)
    with torch.no_grad():
        for t, earlier in ((501, 1), (1, None)):
            e_null, e = (pipe.predict(x, torch.tensor(t), each) for each in (null, cond))
            out, now, then = e_null + guidance * (e - e_null), a[t], a[0 if earlier is None else earlier]
            if prediction == "epsilon":
                eps, x_0 = out, (x - (1 - now).sqrt() * out) / now.sqrt()
            else:
                eps, x_0 = now.sqrt() * out + (1 - now).sqrt() * x, now.sqrt() * x - (1 - now).sqrt() * out
            x = then.sqrt() * x_0 + (1 - then).sqrt() * eps
    drawn, t = denoise(pipe, start, cond, null, Sampler(2, guidance))
    torch.testing.assert_close(drawn, x)
    assert t.item() == 0


@pytest.mark.parametrize(("stop", "timestep"), [(0, 751), (1, 501), (3, 1), (4, 0), (None, 0)])
def test_sampling_can_stop_on_the_way(pipe, stop, timestep):
    """The first `stop` of 4 steps give the latents at the next step's timestep; none gives the noise itself."""
    null, cond = pipe.encode(["", "a x"]).split(1)
    x_T, sampler = sampling.noise(pipe, [3]), Sampler(4, 3.0)
    x, t = denoise(pipe, x_T, cond, null, sampler, stop)
    assert t.item() == timestep
    assert torch.equal(x, x_T) is (stop == 0)
    assert pipe.passes == 2 * (4 if stop is None else stop)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 6), (3.0, 12)])
def test_passes_are_counted_by_the_image(pipe, guidance, passes):
    """Two images in three steps: 6 passes, and twice as many under guidance."""
    sampling.draw(pipe, ["a x", "a y"], [1, 2], Sampler(3, guidance))
    assert pipe.passes == passes


def test_noise_is_where_it_should_be(pipe):
    """At t = 0 nearly the image, at t = 999 nearly the noise."""
    x_0, noise = torch.ones(1, 4, 4, 4), torch.full((1, 4, 4, 4), -1.0)
    for t in (0, 500, 999):
        a = alpha_bar()[t]
        torch.testing.assert_close(pipe.noised(x_0, noise, torch.tensor([t])), a.sqrt() * x_0 + (1 - a).sqrt() * noise)


def test_images_to_latents_and_back(pipe):
    """uint8 0..255 becomes -1..1 and posterior moments, in any batch; latents become uint8 again."""
    images = torch.randint(256, (5, 3, 16, 16), generator=rng()).to(torch.uint8)
    mean, std = pipe.latents(images)
    posterior = pipe.vae.encode(images.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    torch.testing.assert_close(std, posterior.std * 0.18215)
    torch.testing.assert_close(pipe.latents(images, batch=2), (mean, std))
    plain = pipe.vae.decode(mean / 0.18215).sample
    decoded = pipe.decode(mean)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, images.shape)
    assert ((plain + 1) * 127.5).clamp(0, 255).sub(decoded).abs().max() <= 0.501


def test_a_latent_may_be_oblong(pipe):
    """(channels, height, width), whether the configuration gives one size or two."""
    assert pipe.latent_shape == (4, 4, 4)
    pipe.unet.register_to_config(sample_size=(4, 6))
    assert pipe.latent_shape == (4, 4, 6)
    assert sampling.draw(pipe, ["a x"], [1], Sampler(1, 3.0)).shape == (1, 3, 16, 24)


# --- models that somebody brings -------------------------------------------------------------------------------------


def bring(pipe: Pipe, path: Path) -> set[str]:
    """Put a candidate into the model; the names of what it changed."""
    before = weights(pipe)
    Candidate.at(str(path))(pipe, None, Run(0))
    return moved(before, weights(pipe))


def saved(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    """A .safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.parametrize("part", ["", "unet", "vae"])
def test_a_folder_as_a_candidate(pipe, tmp_path, part):
    """A whole pipeline changes every component, the folder of a UNet or a VAE only that one."""
    other = tiny.pipeline(seed=1)
    other.save_pretrained(tmp_path)
    expected = weights(StableDiffusion(other, torch.device("cpu")))
    differ = {name for name in moved(weights(pipe), expected) if name.startswith(part)}
    assert bring(pipe, tmp_path / part) == differ
    assert moved({name: pipe.named()[name] for name in differ}, {name: expected[name] for name in differ}) == set()


@pytest.mark.parametrize("name", ["conv_in.weight", "unet.conv_in.weight", "text_encoder.final_layer_norm.bias", "vae.encoder.conv_in.bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_delta_as_a_candidate(pipe, tmp_path, name, dtype):
    """Full names, and bare ones for the UNet; float16 is read as float32."""
    full = name if name in pipe.named() else f"unet.{name}"
    tensor = torch.randn(pipe.named()[full].shape, generator=rng()).to(dtype)
    assert bring(pipe, saved(tmp_path / "delta.safetensors", {name: tensor})) == {full}
    assert torch.equal(pipe.named()[full], tensor.float())


def adapters(text: bool) -> tuple[StableDiffusionPipeline, dict[str, dict[str, Tensor]]]:
    """The tiny model with random adapters of rank 2 and alpha 6, and their tensors by component."""
    sd = tiny.pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sd.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
        if text:
            sd.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    parts = ("unet", "text_encoder") if text else ("unet",)
    return sd, {part: get_peft_model_state_dict(getattr(sd, part)) for part in parts}


def lora(folder: Path, text: bool = False, alpha: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A LoRA file as diffusers saves it; with or without the metadata that hold alpha."""
    sd, tensors = adapters(text)
    layers = {f"{part}_lora_layers": {k: v.to(dtype) for k, v in convert_state_dict_to_diffusers(state).items()} for part, state in tensors.items()}
    metadata = _collate_lora_metadata({part: getattr(sd, part) for part in tensors}) if alpha else {}
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text"])
@pytest.mark.parametrize("alpha", [False, True], ids=["alpha unknown", "alpha known"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_lora_as_a_candidate(pipe, tmp_path, text, alpha, dtype):
    """What diffusers saves is merged as by hand: W + (alpha / rank) B A, in the UNet and the text encoder; alpha is the
    rank where the file does not tell."""
    own, expected = weights(pipe), {}
    for part, state in adapters(text)[1].items():
        for name, a in state.items():
            if "lora_A" in name:
                full, b = f"{part}.{name.replace('.lora_A', '')}", state[name.replace("lora_A", "lora_B")]
                expected[full] = own[full] + (3 if alpha else 1) * b.to(dtype).float() @ a.to(dtype).float()
    assert bring(pipe, lora(tmp_path, text, alpha, dtype)) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(pipe.named()[name], tensor)
    pipe.reset()
    assert moved(own, weights(pipe)) == set()


def test_a_lora_as_others_save_it(pipe, tmp_path):
    """Names with underscores and an alpha per layer, as kohya's scripts write them."""
    own, others, expected = weights(pipe), {}, {}
    for name, tensor in load_file(lora(tmp_path)).items():
        layer, _, kind = name.removeprefix("unet.").partition(".lora.")
        others |= {f"lora_unet_{layer.replace('.', '_')}.lora_{kind}": tensor, f"lora_unet_{layer.replace('.', '_')}.alpha": torch.tensor(1.0)}
        expected.setdefault(f"unet.{layer}.weight", {})[kind] = tensor
    assert bring(pipe, saved(tmp_path / "others.safetensors", others)) == set(expected)
    for name, pair in expected.items():
        torch.testing.assert_close(pipe.named()[name], own[name] + 0.5 * pair["up.weight"] @ pair["down.weight"])


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Other names for the same tensors."""
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def one_wider(kind: str, dim: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """One layer of another width."""
    return lambda tensors: {
        name: torch.cat([tensor, tensor], dim) if name.endswith(f"mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora.{kind}.weight") else tensor
        for name, tensor in tensors.items()
    }


LORAS = {
    "no layer of this model": renamed("attn", "bttn"),
    "half of it no layer of this model": renamed("attn1", "bttn1"),
    "no part of this model": renamed("unet.", "prior."),
    "one output too wide": one_wider("up", 0),
    "one input too wide": one_wider("down", 1),
    "not a number": lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("change", LORAS.values(), ids=LORAS)
def test_a_lora_that_does_not_fit_is_refused(pipe, tmp_path, change):
    """Even if a part of it fits; afterwards the model's weights are as before, and a good LoRA still merges."""
    before, good = weights(pipe), lora(tmp_path)
    bad = saved(tmp_path / "bad.safetensors", change(load_file(good)))
    with pytest.raises(StoreError, match=r"match|fit|NaN"):
        bring(pipe, bad)
    assert moved(before, weights(pipe)) == set()
    assert not [name for name, module in pipe.unet.named_modules() if "lora" in name or hasattr(module, "base_layer")]
    assert len(bring(pipe, good)) == 32


def a_unet_that_lacks(tensor: str) -> Callable[[Path, Path], Path]:
    """A UNet's folder without one of its tensors."""

    def make(place: Path, model: Path) -> Path:
        shutil.copytree(model / "unet", place / "unet")
        tensors = load_file(place / UNET)
        del tensors[tensor]
        save_file(tensors, place / UNET, metadata={"format": "pt"})
        return place / "unet"

    return make


def a_file(name: str, content: bytes) -> Callable[[Path, Path], Path]:
    """A file that holds these bytes."""

    def make(place: Path, model: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def a_delta(name: str, tensor: Tensor) -> Callable[[Path, Path], Path]:
    """A .safetensors file with one tensor."""
    return lambda place, model: saved(place / "delta.safetensors", {name: tensor})


CANDIDATES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "NaN": (a_delta("conv_in.weight", torch.full((8, 4, 3, 3), float("nan"))), "'unet.conv_in.weight' holds NaN or infinite values"),
    "infinite": (a_delta("unet.conv_in.bias", torch.full((8,), float("inf"))), "'unet.conv_in.bias' holds NaN or infinite values"),
    "another name": (a_delta("conv_inn.weight", torch.zeros(1)), "'unet.conv_inn.weight', which this model does not have"),
    "another shape": (a_delta("conv_in.weight", torch.zeros(8, 4, 1, 1)), r"has shape \(8, 4, 1, 1\), this model needs \(8, 4, 3, 3\)"),
    "pickle": (a_file("delta.bin", b"x"), "is a pickle, which can run code when opened; save it as .safetensors"),
    "ckpt": (a_file("model.ckpt", b"x"), "is a pickle"),
    "another format": (a_file("delta.gguf", b"x"), "is no .safetensors file; a candidate is that, a diffusers folder or a UNet folder"),
    "empty": (a_file("delta.safetensors", b""), "is not a readable .safetensors file"),
    "garbage": (a_file("delta.safetensors", b"garbage" * 99), "is not a readable .safetensors file"),
    "no tensors": (lambda place, model: saved(place / "delta.safetensors", {}), "holds no tensors"),
    "missing": (lambda place, model: place / "missing.safetensors", "missing.safetensors' does not exist"),
    "empty folder": (lambda place, model: place, "holds no weights"),
    "text encoder": (lambda place, model: model / "text_encoder", "neither a diffusers pipeline nor a UNet folder"),
    "UNet that lacks a tensor": (a_unet_that_lacks("conv_in.weight"), "lacks conv_in.weight"),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_that_is_not_fit_is_refused(pipe, tmp_path, tiny_folder, name):
    """With the reason, and without touching the model."""
    make, message = CANDIDATES[name]
    before = weights(pipe)
    with pytest.raises(StoreError, match=message):
        bring(pipe, make(tmp_path, tiny_folder))
    assert moved(before, weights(pipe)) == set()


def test_a_candidate_of_another_architecture_is_refused(pipe, tmp_path):
    """A UNet with other widths: the first tensor whose shape differs is named."""
    other = type(pipe.unet).from_config({**pipe.unet.config, "block_out_channels": (8, 32)})
    other.save_pretrained(tmp_path)
    before = weights(pipe)
    with pytest.raises(StoreError, match=r"has shape \(.*\), this model needs"):
        bring(pipe, tmp_path)
    assert moved(before, weights(pipe)) == set()


def test_a_candidate_is_its_content(tmp_path, base):
    """Not its place: a copy has the same address, another delta another one; a folder's is the folder's digest."""
    one = saved(tmp_path / "one.safetensors", {"conv_in.bias": torch.zeros(8)})
    copy, two = shutil.copy(one, tmp_path / "copy.safetensors"), saved(tmp_path / "two.safetensors", {"conv_in.bias": torch.ones(8)})
    keys = [Lineage(base, tiny.task(), (Candidate.at(str(path)),)).key for path in (one, copy, two)]
    assert keys[0] == keys[1] != keys[2]
    assert Candidate.at(base.source).digest == base.digest
