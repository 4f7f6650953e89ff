"""The autoencoder: 32 x 32 x 3 pictures to 8 x 8 latents and back."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BATCH, RATE, KL, EDGE = 64, 2e-3, 1e-6, 0.5
SIZE = 32  # px, what the model draws


def build(latent_channels: int) -> AutoencoderKL:
    """An `AutoencoderKL` with SD's parts, 4x downsampling and few channels where the picture is large."""
    vae = AutoencoderKL(
        block_out_channels=(24, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    with torch.no_grad():  # begin almost without posterior noise: at deviation 1 the first hundreds of steps are lost
        vae.quant_conv.weight[latent_channels:] = 0
        vae.quant_conv.bias[latent_channels:] = -6
    return vae


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Shuffled indices, epoch after epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """L1 and squares on pixels, L1 on their differences (what keeps lines sharp), and a whisper of KL."""
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16):  # 1.6 times as fast; a loss for the UNet, a gain here
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample
    error = drawn.float() - pictures
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + EDGE * edges + KL * posterior.kl().float().mean()


def train(images: np.ndarray, steps: int, seed: int, latent_channels: int, device: torch.device) -> AutoencoderKL:
    """Seeded training on `device`; the weights returned are an average over the last fifth of the steps."""
    torch.manual_seed(seed)
    vae = build(latent_channels).to(device)
    vae.train()
    parameters = list(vae.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    started = time.monotonic()
    for step, rows in zip(range(steps), batches(len(images), BATCH, seed), strict=False):
        value = loss(vae, to_tensor(images[rows]).to(device).contiguous())
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step >= steps * 4 // 5:
            average.update_parameters(vae)
        if step % 50 == 0:
            print(f"vae {step}/{steps} loss {value.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    vae.load_state_dict(average.module.state_dict())
    return vae.cpu().eval()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: np.ndarray) -> AutoencoderKL:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions beside it: `scaling_factor` is 1."""
    mean, deviation = encode(vae, images)
    variance = mean.float().var(dim=(0, 2, 3)) + deviation.float().square().mean(dim=(0, 2, 3))
    centre, scale = mean.float().mean(dim=(0, 2, 3)), variance.sqrt()
    into, out = vae.quant_conv, vae.post_quant_conv
    size = len(scale)
    out.bias += out.weight[:, :, 0, 0] @ centre
    out.weight *= scale[None, :, None, None]
    into.bias[:size] -= centre
    into.bias[:size] /= scale
    into.weight[:size] /= scale[:, None, None, None]
    into.bias[size:] -= 2 * scale.log()
    vae.register_to_config(scaling_factor=1.0)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior means and standard deviations, unscaled, fp16."""
    means, deviations = [], []
    for at in range(0, len(images), batch):
        posterior = vae.encode(to_tensor(images[at : at + batch]).to(vae.device)).latent_dist
        means.append(posterior.mean.half().cpu())
        deviations.append(posterior.std.half().cpu())
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean over pictures, in dB, of pictures decoded from posterior means."""
    pictures = to_tensor(images).to(vae.device)
    drawn = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(128)])
    error = functional.mse_loss(drawn.clamp(-1, 1), pictures, reduction="none").mean(dim=(1, 2, 3)) / 4  # range 2 -> 1
    return float((-10 * error.log10()).mean())
