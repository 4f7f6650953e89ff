"""A text-to-image model in memory: load it, name its parameters, ask it for noise predictions.

`source` is `pocket` (ships with the project), a diffusers folder, or a hub id with an optional `@revision`, of the
Stable Diffusion 1.x / 2.x layout. Only safetensors are read: other formats can run code when opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.logging import disable_progress_bar as _quiet_diffusers
from safetensors import SafetensorError
from torch import Generator, Tensor
from transformers import CLIPTextModel
from transformers.utils.logging import disable_progress_bar as _quiet_transformers

from harness import pocket
from harness.errors import SpecError, StoreError, unknown
from harness.spec import Base, Sampler, key, sha256

_quiet_diffusers()
_quiet_transformers()
COMPONENTS = ("unet", "text_encoder", "vae")
KEPT = 1024  # prompts whose embeddings stay in memory: 240 MB for SD 1.x
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

# Parameter groups by name. Sources: ESD (rohitgandikota/erasing@a2189e9) `train_method`, in diffusers' names.
_HEAD = ("time_embedding.", "conv_norm_out.", "conv_out.")
GROUPS: Mapping[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "unet": lambda name: name.startswith("unet."),
    "unet.xattn": lambda name: name.startswith("unet.") and ".attn2." in name,
    "unet.xattn_kv": lambda name: name.startswith("unet.") and (".attn2.to_k." in name or ".attn2.to_v." in name),
    "unet.selfattn": lambda name: name.startswith("unet.") and ".attn1." in name,
    "unet.noxattn": lambda name: name.startswith("unet.") and ".attn2." not in name and not name.removeprefix("unet.").startswith(_HEAD),
}
ALIASES = {"x": "unet.xattn", "x-strict": "unet.xattn_kv", "u": "unet.noxattn", "f": "unet", "selfattn": "unet.selfattn"}


def group(name: str) -> Callable[[str], bool]:
    """The test for membership in a parameter group; `x`, `x-strict`, `u`, `f` are ESD's short names."""
    try:
        return GROUPS[ALIASES.get(name, name)]
    except KeyError:
        raise unknown("parameter group", name, [*GROUPS, *ALIASES]) from None


class Pipe:
    """A loaded model. Weights are changed through `apply` or in place, and put back by `reset`.

    `passes` counts UNet samples: a batch of 8 under guidance is 16.
    """

    def __init__(self, sd: StableDiffusionPipeline, device: torch.device) -> None:
        self.device = device
        self.unet, self.vae, self.text_encoder, self.tokenizer = sd.unet, sd.vae, sd.text_encoder, sd.tokenizer
        self.config = {k: v for k, v in sd.scheduler.config.items() if not k.startswith("_")}
        self.schedule = self.scheduler()
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise SpecError(f"prediction type '{self.schedule.config.prediction_type}' is not supported; allowed: epsilon, v_prediction")
        for name in COMPONENTS:
            getattr(self, name).to(device).eval().requires_grad_(False)
        self.passes = 0
        self.unet.register_forward_pre_hook(self._count)
        self._original: dict[str, Tensor] = {}
        self._embeddings: dict[str, Tensor] = {}

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.passes += len(args[0])

    def scheduler(self) -> DDIMScheduler:
        """A DDIM scheduler over the model's own noise schedule."""
        known = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset", "trained_betas"}
        return DDIMScheduler(**{k: v for k, v in self.config.items() if k in known}, clip_sample=False, set_alpha_to_one=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    # --- weights -------------------------------------------------------------------------------------------------

    def named(self) -> dict[str, Tensor]:
        """Every parameter by its full name, such as `unet.conv_in.weight`."""
        return {f"{part}.{name}": p for part in COMPONENTS for name, p in getattr(self, part).named_parameters()}

    def parameters(self, name: str) -> dict[str, Tensor]:
        """The parameters of a group, and only they, ready to be trained."""
        belongs = group(name)
        chosen = {}
        for full, parameter in self.named().items():
            parameter.requires_grad_(belongs(full))
            parameter.grad = None
            if parameter.requires_grad:
                chosen[full] = parameter
        if not chosen:
            raise SpecError(f"parameter group '{name}' matches nothing in this model; allowed: {', '.join([*GROUPS, *ALIASES])}")
        return chosen

    @torch.no_grad()
    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the named parameters. Names and shapes must be the model's own."""
        named = self.named()
        for name, tensor in tensors.items():
            if name not in named:
                raise StoreError(f"the weights name '{name}', which this model does not have; are they of another architecture?")
            if named[name].shape != tensor.shape:
                raise StoreError(f"'{name}' has shape {tuple(tensor.shape)}, this model needs {tuple(named[name].shape)}")
        for name, tensor in tensors.items():
            self._original.setdefault(name, named[name].detach().clone())
            named[name].copy_(tensor)
        self._embeddings.clear()

    @torch.no_grad()
    def reset(self) -> None:
        """Put back every parameter that `apply` or `remember` saved: the model as it was loaded."""
        named = self.named()
        for name, tensor in self._original.items():
            named[name].copy_(tensor)
        self._original.clear()
        self._embeddings.clear()

    def remember(self, names: Sequence[str]) -> None:
        """Save the named parameters for `reset`, before something edits them in place."""
        named = self.named()
        for name in names:
            self._original.setdefault(name, named[name].detach().clone())

    @contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with `tensors` in place of its own, without gradient: a frozen copy that needs no second UNet.

        Points the parameters at other storage; nothing is copied.
        """
        named = self.named()
        own = {name: named[name].data for name in tensors}
        try:
            for name, tensor in tensors.items():
                named[name].data = tensor
            with torch.no_grad():
                yield
        finally:
            for name, tensor in own.items():
                named[name].data = tensor

    # --- numbers -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (n, context, width). A prompt longer than the context is an error, not a cut."""
        if len(self._embeddings) + len(prompts) > KEPT:
            self._embeddings.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = self.tokens(prompt).to(self.device)
                self._embeddings[prompt] = self.text_encoder(ids)[0][0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def tokens(self, prompt: str) -> Tensor:
        """Token ids (1, context) of a prompt, padded as the tokenizer pads."""
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt).input_ids
        if len(ids) > limit:
            raise SpecError(f"prompt {prompt!r} takes {len(ids)} tokens and this model reads {limit}; shorten it")
        return self.tokenizer(prompt, padding="max_length", max_length=limit, return_tensors="pt").input_ids

    def predict(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's output (n, c, h, w), in its own parametrisation (epsilon or v)."""
        return self.unet(x_t, t, encoder_hidden_states=embeddings).sample

    def noised(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""
        return self.schedule.add_noise(x_0, noise, t)

    def diffusion_losses(self, x_0: Tensor, embeddings: Tensor, rng: Generator) -> Tensor:
        """L_DM of each image (n,): mean squared error of the prediction at uniform t, the true noise (or v) as target."""
        noise = torch.randn(x_0.shape, generator=rng).to(x_0)
        t = torch.randint(self.schedule.config.num_train_timesteps, (len(x_0),), generator=rng).to(self.device)
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(x_0, noise, t) if velocity else noise
        return (self.predict(self.noised(x_0, noise, t), t, embeddings) - target).square().flatten(1).mean(1)

    def diffusion_loss(self, x_0: Tensor, embeddings: Tensor, rng: Generator) -> Tensor:
        """L_DM, the mean over the batch (scalar)."""
        return self.diffusion_losses(x_0, embeddings, rng).mean()

    @torch.no_grad()
    def latents(self, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation (n, c, h, w), scaled, of uint8 images (n, 3, H, W)."""
        parts = []
        for chunk in images.split(batch):
            posterior = self.vae.encode(chunk.to(self.device).float() / 127.5 - 1).latent_dist
            parts.append((posterior.mean, posterior.std))
        scale = self.vae.config.scaling_factor
        return tuple(torch.cat(part) * scale for part in zip(*parts, strict=True))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W) on the CPU."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def denoise(pipe: Pipe, x_T: Tensor, cond: Tensor, uncond: Tensor, sampler: Sampler, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """DDIM (eta 0) with classifier-free guidance from noise `x_T` through the first `stop` of the sampler's steps.

    Returns (x_t, t): the latents and the timestep they are at; all steps give x_0 and t = 0.
    """
    scheduler = pipe.scheduler()
    scheduler.set_timesteps(sampler.steps)
    timesteps = scheduler.timesteps.to(pipe.device)
    stop = len(timesteps) if stop is None else stop
    x = x_T * scheduler.init_noise_sigma
    both = torch.cat([uncond, cond])
    with torch.no_grad():
        for t in timesteps[:stop]:
            if sampler.guidance == 1:
                out = pipe.predict(x, t, cond)
            else:
                null, out = pipe.predict(torch.cat([x, x]), t, both).chunk(2)
                out = null + sampler.guidance * (out - null)
            x = scheduler.step(out, t, x).prev_sample
    return x, timesteps[stop] if stop < len(timesteps) else torch.zeros_like(timesteps[0])


# --- loading -----------------------------------------------------------------------------------------------------


def identify(source: str) -> Base:
    """Find a model and take its address: the digest of its files, or hub id and commit."""
    folder = pocket.MODEL if source == "pocket" else Path(source)
    if folder.is_dir():
        return Base(digest=folder_digest(folder), source=source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise SpecError(f"no model '{source}': neither 'pocket', nor a folder, nor a hub id such as 'owner/name@revision'")
    path = _download(source)
    return Base(digest=f"{source.partition('@')[0]}@{path.name}", source=source)


def folder_digest(folder: Path) -> str:
    """Digest of the weights, configurations and tokenizer files in a model folder."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt"))
    if not any(p.suffix == ".safetensors" for p in files):
        found = sorted({p.name for p in folder.rglob("*") if p.suffix in PICKLES})
        why = f"only {found[0]}, a format that can run code when opened" if found else "no weights"
        raise StoreError(f"'{folder}' holds {why}; save it with `save_pretrained(..., safe_serialization=True)`")
    return key([[p.relative_to(folder).as_posix(), sha256(p)] for p in files])


def _download(source: str) -> Path:
    """Local snapshot of a hub repository at a commit. Honours HF_HUB_OFFLINE."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        wanted = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SpecError(f"cannot fetch the model '{source}': {error}. Give a local diffusers folder instead") from error


def load(base: Base) -> Pipe:
    """The model in float32, on the worker's GPU if it has one."""
    folder = pocket.MODEL if base.source == "pocket" else Path(base.source)
    if not folder.is_dir():
        folder = _download(base.source)
    if lacking := [part for part in (*COMPONENTS, "tokenizer", "scheduler") if not (folder / part).is_dir()]:
        raise StoreError(f"'{base.source}' has no {lacking[0]}; a diffusers folder of the Stable Diffusion 1.x/2.x layout is needed")
    plain = any(".fp16" not in path.name for path in (folder / "unet").glob("*.safetensors"))
    how = {"dtype": torch.float32, "variant": None if plain else "fp16", "use_safetensors": True}  # an fp16 folder would mix dtypes otherwise
    try:
        text_encoder, found = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", output_loading_info=True, **how)
        if found["missing_keys"]:  # they would be drawn at random
            raise KeyError(f"text_encoder lacks {', '.join(sorted(found['missing_keys']))}")
        sd = StableDiffusionPipeline.from_pretrained(
            folder,
            **how,
            text_encoder=text_encoder,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Pipe(sd, device)
    except SpecError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"'{base.source}' does not load as a Stable Diffusion 1.x/2.x pipeline: {error}") from error
