"""Rebuild the tiny class-conditional DDPM: `python -m harness.pocket.ddpm --work WORK --icons ICONS [--device cuda]`.

Ten classes with the names of CIFAR-10, drawn as the pocket draws them, at 32 x 32 pixels. The renders are those of
`harness.pocket.train` (`WORK/cache`, made if they are not there): plain objects, no art style. An hour and a quarter on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from harness import pipeline, sampling
from harness.detection.classifier import Detector
from harness.families.class_conditional import CLASSES as LIST
from harness.pocket import DDPM, data, labels, vae
from harness.spec import Base, Sampler, seed_of, sha256

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANNELS = (16, 32, 64, 80)  # at 32, 16, 8 and 4 pixels; few where the picture is large, so that a CPU can follow
STEPS, BATCH, RATE, WARM, EMPTY, DECAY, SEED = 5_000, 48, 1.5e-3, 200, 0.1, 0.998, 51
EACH = 100  # pictures of each class that the detector looks at
SETTINGS = Sampler(steps=20, guidance=2.0)  # what the card's figures are about; the others are beside it
OTHERS = tuple(Sampler(steps, guidance) for steps in (10, 20) for guidance in (1.0, 2.0, 3.0))
PACKAGES = ("torch", "diffusers", "timm", "numpy", "safetensors")


def build(channels: tuple[int, ...] = CHANNELS) -> UNet2DModel:
    """One layer per block, attention at 8 pixels and in the middle; the last label is the null of guidance."""
    plain = len(channels) - 2
    return UNet2DModel(
        sample_size=vae.SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if at == 2 else "DownBlock2D" for at in range(len(channels))),
        up_block_types=tuple("AttnUpBlock2D" if at == plain - 1 else "UpBlock2D" for at in range(len(channels))),
        attention_head_dim=16,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


def scheduler() -> DDIMScheduler:
    """DDPM's schedule: 1000 steps, beta from 1e-4 to .02 in a straight line; sampling clips to the range of pixels."""
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True, set_alpha_to_one=False)


def examples(pictures: data.Pictures) -> tuple[Tensor, Tensor]:
    """uint8 images (n, 3, 32, 32) of the ten classes without style, and their labels (n,)."""
    label = {labels().index(name): at for at, name in enumerate(CLASSES)}
    rows = [row for row, (seen, style) in enumerate(zip(pictures.label.tolist(), pictures.style.tolist(), strict=True)) if seen in label and style < 0]
    images = torch.from_numpy(pictures.images[rows]).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([label[int(pictures.label[row])] for row in rows])


@dataclass(frozen=True)
class Recipe:
    """How a class-conditional DDPM learns. `falls`: the rate ends at 0 (a cosine); else it stays."""

    steps: int
    batch: int
    rate: float
    warm: int  # steps in which the rate rises
    decay: float  # of the averaged weights
    falls: bool
    optimiser: type[torch.optim.Optimizer]

    def share(self, at: int) -> float:
        """The rate's share at a step."""
        return min(1, (at + 1) / self.warm) * ((1 + math.cos(math.pi * at / self.steps)) / 2 if self.falls else 1)


def train(images: Tensor, truth: Tensor, steps: int, device: torch.device, channels: tuple[int, ...] = CHANNELS) -> UNet2DModel:
    """The averaged UNet of the tiny model."""
    torch.manual_seed(SEED)
    return learn(build(channels), images, truth, Recipe(steps, BATCH, RATE, WARM, DECAY, True, torch.optim.AdamW), device)


def learn(unet: UNet2DModel, images: Tensor, truth: Tensor, recipe: Recipe, device: torch.device) -> UNet2DModel:
    """The averaged UNet after seeded training on the squared error of the predicted noise."""
    unet, noiser, steps, batch = unet.to(device), scheduler(), recipe.steps, recipe.batch
    draws = torch.Generator(device).manual_seed(SEED)
    images, truth = images.to(device), truth.to(device)
    optimiser = recipe.optimiser(unet.parameters(), lr=recipe.rate)  # type: ignore[call-arg]  # all of them take it
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, recipe.share)
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(recipe.decay))
    started = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=draws, device=device)
        times = torch.randint(1000, (batch,), generator=draws, device=device)
        nameless = torch.rand(batch, generator=draws, device=device) < EMPTY
        clean = images[rows].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=draws, device=device)
        guess = unet(noiser.add_noise(clean, noise, times), times, truth[rows].masked_fill(nameless, len(CLASSES))).sample
        value = functional.mse_loss(guess, noise)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(unet)
        if step % 500 == 0 or step + 1 == steps:
            print(f"ddpm {step}/{steps} loss {value.item():.4f} {time.monotonic() - started:.0f} s", flush=True)
    return average.module.eval()


def save(unet: UNet2DModel, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """The model's folder; the tiny one's in fp16."""
    unet.cpu().to(dtype).save_pretrained(out / "unet", safe_serialization=True)
    scheduler().save_pretrained(out / "scheduler")
    (out / LIST).write_text(json.dumps(CLASSES, indent=1) + "\n", encoding="utf-8")


def accuracy(pipe: pipeline.Pipe, detector: Detector, sampler: Sampler, each: int) -> tuple[dict[str, float], Tensor]:
    """How often the detector names the class that was asked for, and the first eight pictures of each."""
    rates, first = {}, []
    for name in CLASSES:
        seeds = [seed_of("ddpm card", name, at) for at in range(each)]
        images = sampling.draw(pipe, [name] * each, seeds, sampler, batch=each)
        seen = detector(images.float() / 255).argmax(dim=1)
        rates[name] = round(float((seen == detector.labels.index(name)).float().mean()), 4)
        first.append(images[:8])
    return rates, torch.stack(first)


def grid(first: Tensor, path: Path) -> None:
    """One row of pictures per class, twice enlarged."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in first], dim=1).permute(1, 2, 0)
    picture = Image.fromarray(sheet.numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(path, optimize=True)


def measure(out: Path, each: int) -> dict[str, Any]:
    """Figures of the published folder, seen by the detector that never saw a generated picture."""
    pipe, detector = pipeline.load(Base("", str(out))), Detector("pocket")
    rates, first = accuracy(pipe, detector, SETTINGS, each)
    grid(first, out / "grid.png")
    others = {}
    for sampler in OTHERS:
        means = list(accuracy(pipe, detector, sampler, each)[0].values())
        others[f"{sampler.steps} steps, guidance {sampler.guidance:g}"] = round(sum(means) / len(means), 4)
    return {
        "settings": {"ddim_steps": SETTINGS.steps, "guidance_scale": SETTINGS.guidance, "images_per_class": each},
        "mean_accuracy": round(sum(rates.values()) / len(rates), 4),
        "worst_accuracy": min(rates.values()),
        "accuracy": rates,
        "mean_accuracy_at": others,
    }


def card(out: Path, each: int, **recipe: Any) -> None:
    """Write `card.json` about the folder as it is."""
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors") and p.name != "card.json")
    figures = measure(out, each)
    content = {
        "model": "pocket-ddpm",
        "files": {path.relative_to(out).as_posix(): sha256(path) for path in files},
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seed": SEED, "batch": BATCH, "rate": RATE, "average": DECAY, "null_label": EMPTY, **recipe,
        "figures": figures,
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Render if need be, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="work folder of harness.pocket.train; the renders are in its cache/")
    parser.add_argument("--icons", default="package", help="the unpacked Noto package; not read where the renders are there")
    parser.add_argument("--out", type=Path, default=DDPM)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--channels", type=lambda text: tuple(map(int, text.split(","))), default=CHANNELS, help="at 32, 16, 8, ... pixels, divisible by 8")
    parser.add_argument("--each", type=int, default=EACH, help="pictures of each class that are measured")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    images, truth = examples(data.load("generator", arguments.work / "cache", arguments.icons, size=vae.SIZE))
    print(f"{len(images)} pictures of {len(CLASSES)} classes", flush=True)
    unet = train(images, truth, arguments.steps, device, arguments.channels)
    save(unet, arguments.out)
    parameters = sum(p.numel() for p in unet.parameters())
    card(arguments.out, arguments.each, steps=arguments.steps, channels=arguments.channels, parameters=parameters, device=device.type)


if __name__ == "__main__":
    main()
