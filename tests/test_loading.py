"""Models and candidates as they are found in the world: single files, hub repositories, LoRAs of SDXL; and what is refused, with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from harness import pipeline, plan
from harness.candidate import Candidate
from harness.errors import ResurgenceError, SpecError, StoreError
from harness.families.sdxl import StableDiffusionXL
from harness.pipeline import Pipe, StableDiffusion, identify
from harness.training import Run
from tests import original, tiny

CPU = torch.device("cpu")
every_layout = pytest.mark.parametrize("layout", tiny.LAYOUTS)


@cache
def random(layout: str, seed: int = 0) -> Any:
    """A pipeline of diffusers' that nobody changes."""
    return tiny.of_layout(layout, seed)


def made(layout: str, seed: int = 0) -> Pipe:
    """The model in memory."""
    return (StableDiffusionXL if layout == "sdxl" else StableDiffusion)(tiny.of_layout(layout, seed), CPU)


def weights(pipe: Pipe) -> dict[str, Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in pipe.named().items()}


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    """The names of tensors whose bits differ."""
    assert one.keys() == two.keys()
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def settings(folder: Path, layout: str) -> Path:
    """A diffusers folder without its weights."""
    random(layout).save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has nothing and cannot be asked."""

    def refuse(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# --- one file --------------------------------------------------------------------------------------------------------


@every_layout
def test_a_single_file_is_the_model_it_was_made_from(tmp_path, layout):
    """Under the original code's names, with its configuration in a folder beside it: every weight and the schedule, bit for bit."""
    file = original.save(tmp_path / "model.safetensors", layout, random(layout))
    settings(tmp_path / "model", layout)
    base = identify(str(file))
    assert pipeline.family(base) == ("sdxl" if layout == "sdxl" else "stable-diffusion")
    pipe = pipeline.load(base)
    assert differing(weights(pipe), weights(made(layout))) == set()
    assert pipe.schedule.config.prediction_type == ("v_prediction" if layout == "sd21" else "epsilon")
    assert not any(p.requires_grad for p in pipe.named().values())


@every_layout
def test_a_single_file_is_planned_by_its_configuration(tmp_path, layout):
    """Every parameter by its name, and the sizes of latents and images, as of the model once loaded."""
    file = original.save(tmp_path / "model.safetensors", layout, random(layout))
    settings(tmp_path / "model", layout)
    found, pipe = plan.size(identify(str(file))), made(layout)
    assert found
    assert found.shapes == {name: tuple(p.shape) for name, p in pipe.named().items()}
    assert (found.latent, found.image) == (pipe.latent_shape[1:], (32, 32))
    assert found.seconds > 0


def test_a_single_file_is_its_content_and_its_configuration(tmp_path):
    """Its place does not count; another weight or another schedule does."""
    seen = []
    for i, (seed, change) in enumerate([(0, {}), (0, {}), (1, {}), (0, {"beta_end": 0.02})]):
        file = original.save(tmp_path / f"{i}.safetensors", "sd14", random("sd14", seed))
        config = settings(tmp_path / str(i), "sd14") / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        seen.append(identify(str(file)).digest)
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_a_single_file_whose_configuration_is_nowhere(tmp_path, monkeypatch):
    """Offline and with nothing beside it: the error names the model it looks like, and both ways out."""
    unreachable(monkeypatch)
    file = original.save(tmp_path / "model.safetensors", "sd14", random("sd14"))
    message = r"looks like stable-diffusion-v1-5/stable-diffusion-v1-5, whose configuration is not here .*hf download.*or put its .* into '.*/model/'"
    with pytest.raises(SpecError, match=message):
        identify(str(file))


@pytest.mark.parametrize("why", ["SD 2.x", "v-prediction"])
def test_a_single_file_that_does_not_say_what_it_predicts(tmp_path, why):
    """SD 2.x comes with either prediction, and a v-prediction SDXL is used otherwise than SDXL: nothing is guessed."""
    more = {"v_pred": torch.zeros(0)} if why == "v-prediction" else {}
    found = {**original.tensors("sd14", random("sd14")), **more}
    if why == "SD 2.x":
        found["model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(1, 1024)
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, tmp_path / "model.safetensors")
    with pytest.raises(SpecError, match=rf"does not say how its model is used \({why}.*put its diffusers configuration .* into '.*/model/'"):
        identify(str(tmp_path / "model.safetensors"))


def a_file(**tensors: Tensor) -> Callable[[Path], Path]:
    """A .safetensors file of these."""

    def make(place: Path) -> Path:
        save_file(tensors, place / "some.safetensors")
        return place / "some.safetensors"

    return make


def the_unet(place: Path) -> Path:
    """The folder of a UNet alone."""
    random("sd14").unet.save_pretrained(place / "unet")
    return place / "unet"


def bytes_in(name: str) -> Callable[[Path], Path]:
    """A file of that name."""

    def make(place: Path) -> Path:
        (place / name).write_bytes(b"x")
        return place / name

    return make


def lacking_a_tensor(place: Path) -> Path:
    """A whole file but for one of the UNet's tensors."""
    found = original.tensors("sd14", random("sd14"))
    del found["model.diffusion_model.input_blocks.0.0.weight"]
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, place / "model.safetensors")
    settings(place / "model", "sd14")
    return place / "model.safetensors"


def with_own_code(part: str) -> Callable[[Path], Path]:
    """A folder whose index names a class that would come with it."""

    def make(place: Path) -> Path:
        random("sd14").save_pretrained(place / "model")
        index = place / "model" / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {part: ["my_module", "MyClass"]}))
        (place / "model" / "my_module.py").write_text("raise SystemExit('run')")
        return place / "model"

    return make


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle": (bytes_in("model.ckpt"), "is a pickle, which can run code when opened; save it as .safetensors"),
    "another format": (bytes_in("model.gguf"), "is no .safetensors file"),
    "garbage": (bytes_in("model.safetensors"), "is not a readable .safetensors file"),
    "a delta": (a_file(**{"unet.conv_in.weight": torch.zeros(1)}), "is no whole model .* and a UNet, delta or LoRA as --candidate"),
    "a UNet's file": (a_file(**{"model.diffusion_model.out.2.weight": torch.zeros(1)}), "is no whole model"),
    "a UNet's folder": (the_unet, "is one part of a model; give the whole model it belongs to, and this as --candidate"),
    "a file that lacks a tensor": (lacking_a_tensor, "does not load .*lacks"),
    "a component's own code": (with_own_code("unet"), r"wants code of its own for unet \(my_module\), which is never run"),
    "a pipeline's own code": (with_own_code("_class_name"), r"wants code of its own for _class_name \(my_module\), which is never run"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_model_is_refused(tmp_path, name):
    """With the reason and the next step; no code that came along is run."""
    make, message = REFUSED[name]
    with pytest.raises(ResurgenceError, match=f"(?s){message}"):
        pipeline.load(identify(str(make(tmp_path))))


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_offline_is_said(monkeypatch):
    """Where HF_HUB_OFFLINE is set the error says so, and what to fetch where there is a network."""
    unreachable(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SpecError, match=r"HF_HUB_OFFLINE is set and the cache at .* lacks it.*hf download owner/name --revision refs/pr/1"):
        identify("owner/name@refs/pr/1")


class Hub:
    """A hub with one repository: the files of a folder, at a commit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.asked = folder, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)

    def __call__(self, name: str, revision: str | None, allow_patterns: list[str]) -> str:
        """The folder, as if just fetched."""
        self.asked.append((name, revision, allow_patterns))
        return str(self.folder)


def a_unet_repository(place: Path, sd: Any) -> set[str]:
    """A UNet alone."""
    sd.unet.save_pretrained(place)
    return {"unet"}


def a_pipeline_repository(place: Path, sd: Any) -> set[str]:
    """The whole model."""
    sd.save_pretrained(place)
    return {"unet", "vae", "text_encoder"}


def a_file_repository(place: Path, sd: Any) -> set[str]:
    """A delta of one component."""
    place.mkdir()
    save_file({f"vae.{name}": p.detach().clone() for name, p in sd.vae.named_parameters()}, place / "delta.safetensors")
    return {"vae"}


@pytest.mark.parametrize("repository", [a_unet_repository, a_pipeline_repository, a_file_repository])
def test_a_candidate_from_the_hub(monkeypatch, tmp_path, repository):
    """A pipeline, a UNet or a file: its address is id and commit, and no pickle is ever asked for."""
    parts = repository(tmp_path / "0123abcd", random("sd14", 1))
    hub, pipe = Hub(monkeypatch, tmp_path / "0123abcd"), made("sd14")
    candidate = Candidate.at("owner/name@main")
    assert candidate.digest == "owner/name@0123abcd"
    before = weights(pipe)
    candidate(pipe, None, Run(0))
    changed = differing(before, weights(pipe))
    assert changed == {name for name in differing(before, weights(made("sd14", 1))) if name.partition(".")[0] in parts}
    assert {(name, revision) for name, revision, _ in hub.asked} == {("owner/name", "main")}
    assert {pattern.rpartition(".")[2] for *_, patterns in hub.asked for pattern in patterns} == {"json", "txt", "safetensors"}


def test_a_repository_of_several_files_is_not_guessed_at(monkeypatch, tmp_path):
    """Which of two LoRAs is meant is for the user to say."""
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    Hub(monkeypatch, tmp_path)
    with pytest.raises(StoreError, match=r"holds 2 \.safetensors files \(a.safetensors, b.safetensors\); fetch the one you mean"):
        Candidate.at("owner/name")(made("sd14"), None, Run(0))


# --- candidates ------------------------------------------------------------------------------------------------------


def bring(pipe: Pipe, path: Path) -> set[str]:
    """Put a candidate into the model; the names of what it changed."""
    before = weights(pipe)
    Candidate.at(str(path))(pipe, None, Run(0))
    return differing(before, weights(pipe))


@every_layout
@pytest.mark.parametrize("part", ["", "model.diffusion_model."], ids=["whole", "UNet"])
def test_a_file_of_the_original_code_as_a_candidate(tmp_path, layout, part):
    """Read by its parent's configuration, whole or a part of it; what was left as it is stays."""
    found = {name: tensor for name, tensor in original.tensors(layout, random(layout, 1)).items() if name.startswith(part)}
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, tmp_path / "candidate.safetensors")
    pipe, other = made(layout), weights(made(layout, 1))
    expected = {name for name in differing(weights(pipe), other) if not part or name.startswith("unet.")}
    assert bring(pipe, tmp_path / "candidate.safetensors") == expected
    assert differing({name: pipe.named()[name] for name in expected}, {name: other[name] for name in expected}) == set()


def test_a_delta_with_the_names_of_another_transformers(tmp_path):
    """A text encoder saved with one more level of names is still the text encoder."""
    pipe, other = made("sd14"), random("sd14", 1).text_encoder
    delta = {f"text_encoder.text_model.{name.removeprefix('text_model.')}": p.detach().clone() for name, p in other.named_parameters()}
    save_file(delta, tmp_path / "delta.safetensors")
    assert {name.partition(".")[0] for name in bring(pipe, tmp_path / "delta.safetensors")} == {"text_encoder"}


def test_a_folder_of_sdxl_as_a_candidate(tmp_path):
    """Both text encoders, UNet and autoencoder."""
    random("sdxl", 1).save_pretrained(tmp_path)
    pipe = made("sdxl")
    assert {name.partition(".")[0] for name in bring(pipe, tmp_path)} == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert differing(weights(pipe), weights(made("sdxl", 1))) == set()


def test_a_lora_of_sdxl_as_a_candidate(tmp_path):
    """Of the UNet and both text encoders: W + B A in each, and nothing else."""
    sd, own = tiny.of_layout("sdxl"), made("sdxl")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sd.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        for encoder in (sd.text_encoder, sd.text_encoder_2):
            encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False))
    states = {part: get_peft_model_state_dict(getattr(sd, part)) for part in ("unet", "text_encoder", "text_encoder_2")}
    layers = {f"{part}_lora_layers": convert_state_dict_to_diffusers(state) for part, state in states.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers)
    before, expected = weights(own), {}
    for part, state in states.items():
        for name, a in state.items():
            if "lora_A" in name:
                full = f"{part}.{name.replace('.lora_A', '')}"
                expected[full] = before[full] + state[name.replace("lora_A", "lora_B")] @ a
    assert {name.partition(".")[0] for name in expected} == set(states)
    assert bring(own, tmp_path / "pytorch_lora_weights.safetensors") == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(own.named()[name], tensor)


def test_a_candidate_of_another_family_is_refused(tmp_path):
    """SDXL's folder is no candidate of SD 1.4, and the model stays as it was."""
    random("sdxl").save_pretrained(tmp_path)
    pipe = made("sd14")
    before = weights(pipe)
    with pytest.raises(StoreError, match=r"which this model does not have|this model needs"):
        bring(pipe, tmp_path)
    assert differing(before, weights(pipe)) == set()


def test_a_hub_id_is_a_candidate_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub passes where a missing path is refused; the report lists the snapshot's files, its address is the commit."""
    from fixtures import controller
    from tests.test_options import parsed

    assert parsed("--candidate", "owner/name@1").candidate == "owner/name@1"
    with pytest.raises(SpecError, match="does not exist"):
        parsed("--candidate", "./owner/name")
    snapshot = tiny.save(tmp_path / "c0ffee")
    monkeypatch.setattr("harness.hub.snapshot", lambda source: snapshot)
    files, address = controller.subjects("owner/name@1")
    assert address == "owner/name@c0ffee"
    assert "unet/diffusion_pytorch_model.safetensors" in files


def test_a_candidates_card_may_change(tmp_path: Path) -> None:
    """The report's address of a folder is the one under which it was measured, with a card in it or without."""
    from fixtures import controller

    folder = tiny.save(tmp_path / "model")
    (folder / "card.json").write_text("{}")
    files, address = controller.subjects(str(folder))
    assert address == pipeline.folder_digest(folder)
    assert "card.json" not in files
