"""What every family of models shares: weights by name, the noise schedule, the diffusion loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from harness.errors import SpecError, StoreError
from harness.groups import ALIASES, GROUPS, group

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

_SCHEDULE = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "steps_offset", "rescale_betas_zero_snr",
}  # fmt: skip


class Pipe(ABC):
    """A loaded model. Weights are changed through `apply` or in place, and put back by `reset`.

    `components` names its modules, `unet` among them. What `encode` returns is one condition per prompt, batch first,
    and nobody's business but `predict`'s. `passes` counts UNet samples: a batch of 8 under guidance is 16.

    Weights are float32, whatever trains and whatever does not; with another `dtype` the UNet computes in that (autocast). Text
    encoders and autoencoder stay in float32: they are a few per cent of the work, and SDXL's autoencoder overflows float16.
    """

    dtype: torch.dtype = torch.float32
    micro_batch: int | None = None  # samples that pass the UNet at once; None: as many as are given
    at_once: int | None = None  # images that this device draws at once; found when first drawing

    family: ClassVar[str]
    components: ClassVar[tuple[str, ...]]
    clips: ClassVar[bool]  # sampling keeps its estimate of x_0 in [-1, 1]: right for pixels, wrong for latents

    unet: Any
    text_encoder: Any  # this and what follows: of text-to-image models only
    tokenizer: Any
    vae: Any
    words: Any  # (prompts) -> (n, context, width), what cross-attention reads; `encode` may hold more

    def __init__(self, parts: Mapping[str, torch.nn.Module], config: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.config = {k: v for k, v in config.items() if not k.startswith("_")}
        self.schedule = self.scheduler()
        if self.schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise SpecError(f"prediction type '{self.schedule.config.prediction_type}' is not supported; allowed: epsilon, v_prediction")
        if self.schedule.config.rescale_betas_zero_snr and self.schedule.config.prediction_type == "epsilon":
            raise SpecError("the schedule ends in pure noise (rescale_betas_zero_snr), where predicting noise says nothing; such a model predicts v")
        for name in self.components:
            setattr(self, name, parts[name].to(device).eval().requires_grad_(False))
        self.passes = 0
        self.unet.register_forward_pre_hook(self._count)
        self._original: dict[str, Tensor] = {}
        self._embeddings: dict[tuple[str, bool], Tensor] = {}  # of prompts, whole or cut, as long as the weights stay what they are

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.passes += len(args[0])

    def scheduler(self) -> DDIMScheduler:
        """A DDIM scheduler over the model's own noise schedule."""
        from diffusers import DDIMScheduler

        known = {k: v for k, v in self.config.items() if k in _SCHEDULE}
        if known.get("rescale_betas_zero_snr"):  # a model that learnt from pure noise must be started there
            known["timestep_spacing"] = "trailing"
        return DDIMScheduler(**known, clip_sample=self.clips and self.config.get("clip_sample", True), set_alpha_to_one=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    # --- what a family is ----------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, prompts: Sequence[str], cut: bool = False) -> Tensor:
        """The condition of each prompt (n, ...); the empty prompt's is the unconditional one.

        A prompt longer than the model reads is an error or, with `cut`, read as far as that: what is drawn to be looked at is cut as
        everybody cuts it, what a method learns from must be whole.
        """

    def overlong(self, prompts: Sequence[str]) -> list[str]:
        """The prompts, each once, that are longer than the model reads."""
        return []

    @abstractmethod
    def tokens(self, prompt: str) -> Tensor:
        """The prompt as the model's input: ids (1, length)."""

    @abstractmethod
    def denoised(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """One pass of the UNet over the whole batch: what `predict` is made of."""

    @abstractmethod
    def latents(self, images: Tensor, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (n, c, h, w) of the latents of uint8 images (n, 3, H, W)."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images (n, 3, H, W) on the CPU."""

    # --- prediction ----------------------------------------------------------------------------------------------

    def predict(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's output (n, c, h, w) in float32, in its own parametrisation (epsilon or v); `t` is one timestep or (n,).

        At equal x_t, eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t. So guidance, and every target that adds predictions up
        with weights of sum 1, means the same in both; a squared error of v weighs timestep t by 1 / alpha_bar_t against one of eps,
        as v-prediction models are trained.

        With `micro_batch`, that many samples at a time. Under gradient each part is computed again when its turn comes in the
        backward pass, so that one part's activations are held and not the batch's: gradients add up to the whole batch's, whatever the loss.
        """
        if self.micro_batch is None or len(x_t) <= self.micro_batch:
            return self._pass(x_t, t, embeddings)
        parts = zip(*(each.split(self.micro_batch) for each in (x_t, t.expand(len(x_t)), embeddings)), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._pass(*part) for part in parts])
        return torch.cat([checkpoint(self._pass, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])  # nothing is drawn

    def _pass(self, x_t: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        if self.dtype == torch.float32:
            return self.denoised(x_t, t, embeddings)
        with torch.autocast(self.device.type, self.dtype):
            return self.denoised(x_t, t, embeddings).float()

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Without micro-batches for a while: for what looks into the UNet's layers and must see a batch whole."""
        size, self.micro_batch = self.micro_batch, None
        try:
            yield
        finally:
            self.micro_batch = size

    # --- weights -------------------------------------------------------------------------------------------------

    def named(self) -> dict[str, Tensor]:
        """Every parameter by its full name, such as `unet.conv_in.weight`."""
        return {f"{part}.{name}": p for part in self.components for name, p in getattr(self, part).named_parameters()}

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
            fitting = [each for each in [*GROUPS, *ALIASES] if any(map(group(each), self.named()))]
            raise SpecError(f"parameter group '{name}' matches nothing in this {self.family} model; allowed: {', '.join(fitting)}")
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
            if name not in self._original:
                self._original[name] = named[name].detach().clone()
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

    def remember(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Save the named parameters for `reset`, before something edits them in place. Returns them as they are now, not to be written to.

        A parameter that is still as it was loaded is copied once for both.
        """
        named, now = self.named(), {}
        for name in names:
            now[name] = named[name].detach().clone()
            self._original.setdefault(name, now[name])
        return now

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

    # --- noise ---------------------------------------------------------------------------------------------------

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


def pixels(images: Tensor) -> Tensor:
    """uint8 images on the CPU from images in [-1, 1]."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
