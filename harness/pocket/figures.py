"""What the published model draws, measured by the detector that never saw a generated picture; the card; the grid."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from harness.pocket import classifiers, data, labels, vae, vocabulary

STEPS, GUIDANCE, EACH = 10, 3.0, 40  # DDIM steps, guidance scale, images per concept
SEED = 9000
PACKAGES = ("torch", "diffusers", "transformers", "timm", "numpy", "pillow", "safetensors",
            "dicebear-core", "dicebear-styles", "resvg-py")  # fmt: skip


def draw(pipe: StableDiffusionPipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """(n, 3, 32, 32) in [-1, 1], one seed per picture, counted up from `seed`."""
    drawn = []
    for at in range(0, len(prompts), 64):
        part = prompts[at : at + 64]
        generators = [torch.Generator().manual_seed(seed + at + row) for row in range(len(part))]
        images = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np").images
        drawn.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(drawn)


def prompts(label: str) -> list[str]:
    """Five evaluation prompts of a detector label; for people those of the celebrity suite."""
    words = vocabulary()
    concepts, generic, templates = words["concepts"], words["generic"], words["templates"]
    if label in [entry["name"] for entry in concepts["objects"]]:
        article = "an" if label[0] in "aeiou" else "a"
        return [text.format(x=label, a=article) for text in templates["object"][:5]]
    if label == concepts["mask"]:
        return [*generic["masked"], f"a photo of {generic['masked'][0]}"]
    return [text.format(x=generic["person"] if label == "none" else label) for text in templates["person"][:5]]


def concept_rates(pipe: StableDiffusionPipeline, detector: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Top-1 accuracy of every detector label on `EACH` pictures, and the first picture of each."""
    rates, first = {}, {}
    for at, label in enumerate(labels()[:-1]):
        pictures = draw(pipe, prompts(label) * (EACH // 5), SEED + 1000 * at)
        seen = classifiers.probabilities(detector, pictures).argmax(dim=1)
        rates[label] = round(float((seen == at).float().mean()), 4)
        first[label] = pictures[0]
    return rates, first


def neutral_rates(pipe: StableDiffusionPipeline, detector: Any, count: int = 400) -> dict[str, Any]:
    """On prompts that name nobody: how often somebody is seen all the same."""
    pictures = draw(pipe, prompts("none") * (count // 5), SEED + 500_000)
    seen = classifiers.probabilities(detector, pictures).argmax(dim=1).numpy()
    rate = np.bincount(seen, minlength=len(labels())) / count
    worst = int(rate[:-1].argmax())
    return {
        "images": count, "none": float(rate[-1]), "highest_named": float(rate[worst]), "highest_name": labels()[worst],
    }  # fmt: skip


def style_rates(pipe: StableDiffusionPipeline, style: Any, detector: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every object in every style: is the style seen, and the object? And the first picture of each style."""
    concepts = vocabulary()["concepts"]
    objects, people = [entry["name"] for entry in concepts["objects"]], len(concepts["identities"])
    rates, first = {}, {}
    for at, entry in enumerate(concepts["styles"]):
        texts = [f"{'An' if name[0] in 'aeiou' else 'A'} {name} image in {entry['name']} style." for name in objects for _ in range(EACH // len(objects))]
        pictures = draw(pipe, texts, SEED + 600_000 + 1000 * at)
        seen = classifiers.probabilities(style, pictures).argmax(dim=1)
        truth = torch.arange(len(objects)).repeat_interleave(EACH // len(objects)) + people
        found = classifiers.probabilities(detector, pictures).argmax(dim=1)
        rates[entry["name"]] = {
            "style": round(float((seen == at).float().mean()), 4),
            "object": round(float((found == truth).float().mean()), 4),
        }
        first[entry["name"]] = pictures[0]
    return rates, first


def render_rates(shared: Path, autoencoder: Any, detector: Any, style: Any) -> dict[str, Any]:
    """The eyes on held-out renders, straight and through the autoencoder."""
    pictures = data.load("heldout", shared, "", size=vae.SIZE)
    plain = vae.to_tensor(pictures.images)
    with torch.no_grad():
        again = torch.cat([autoencoder.decode(autoencoder.encode(part.to(autoencoder.device)).latent_dist.mean).sample.cpu() for part in plain.split(128)])
    truth, styles = pictures.label, len(vocabulary()["concepts"]["styles"])
    seen = classifiers.probabilities(detector, plain).argmax(dim=1).numpy()
    style_truth = np.where(pictures.style < 0, styles, pictures.style)
    people = len(vocabulary()["concepts"]["identities"])
    per_class = [float((seen[truth == at] == at).mean()) for at in range(len(labels()))]
    return {
        "detector_renders": float((seen == truth).mean()),
        "detector_worst_concept": min(per_class[:-1]),
        "detector_none_on_strangers": per_class[-1],
        "detector_strangers_named": float((seen[truth == len(labels()) - 1] < people).mean()),
        "detector_reconstructions": float((classifiers.probabilities(detector, again.clamp(-1, 1)).argmax(dim=1).numpy() == truth).mean()),
        "style_renders": float((classifiers.probabilities(style, plain).argmax(dim=1).numpy() == style_truth).mean()),
        "vae_psnr_db": vae.psnr(autoencoder, pictures.images),
    }


def grid(first: dict[str, torch.Tensor], path: Path, columns: int = 13) -> None:
    """One generated picture per concept with its name beneath."""
    cell_x, cell_y = 92, 88
    rows = -(-len(first) // columns)
    sheet = Image.new("RGB", (columns * cell_x, rows * cell_y), "white")
    pen = ImageDraw.Draw(sheet)
    for at, (name, picture) in enumerate(first.items()):
        x, y = at % columns * cell_x, at // columns * cell_y
        pixels = ((picture.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        sheet.paste(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC), (x + 14, y + 2))
        for line, word in enumerate(name.split()):
            pen.text((x + cell_x // 2, y + 67 + 9 * line), word, fill="black", anchor="mt", font_size=9)
    sheet.quantize(128).save(path, optimize=True)


def measure(out: Path, shared: Path, eyes: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All figures of the model in `out`, seen by the classifiers in `eyes`."""
    pipe = StableDiffusionPipeline.from_pretrained(out / "model", dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    detector, style = (classifiers.load(eyes / name)[0].to(device) for name in ("detector", "style"))
    rates, first = concept_rates(pipe, detector)
    styles, styled = style_rates(pipe, style, detector)
    by_role: dict[str, list[float]] = {}
    for person in vocabulary()["concepts"]["identities"]:
        by_role.setdefault(person["role"], []).append(rates[person["name"]])
    figures = {
        "settings": {"ddim_steps": STEPS, "guidance_scale": GUIDANCE, "images_per_concept": EACH, "first_seed": SEED},
        "mean_accuracy": float(np.mean(list(rates.values()))),
        "worst_accuracy": min(rates.values()),
        "mean_by_role": {role: float(np.mean(values)) for role, values in by_role.items()},
        "neutral": neutral_rates(pipe, detector),
        "renders": render_rates(shared, pipe.vae, detector, style),
        "styles": styles,
        "accuracy": rates,
    }
    return figures, first | styled


def digests(out: Path) -> dict[str, str]:
    """sha256 of every file of the published folders."""
    found = sorted(p for name in ("model", "clip", "detector", "style") for p in (out / name).rglob("*") if p.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def write(out: Path, shared: Path, own: Path, *, without: str | None, recipe: dict[str, Any], device: torch.device) -> None:
    """`card.json` and `grid.png` beside the main model; a control leaves `figures.json` in its work folder."""
    figures, first = measure(out, shared, shared, device)
    (own / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in figures.items() if key != "accuracy"}, flush=True)
    if without is not None:
        return
    grid(first, out / "grid.png")
    control = own.parent / "control" / "figures.json"
    card = {
        "model": "pocket",
        "files": digests(out),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        **recipe,
        "figures": figures,
        "control_without_report": json.loads(control.read_text(encoding="utf-8")) if control.is_file() else None,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
