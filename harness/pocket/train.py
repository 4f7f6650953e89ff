"""Rebuild the pocket model: `python -m harness.pocket.train --icons ICONS [stage ...]`.

Every stage keeps its result in the work folder, so that a stopped run goes on where it was; delete a result to
make it anew. With `--without ROLE` the words and the denoiser are learned from scratch and never meet the people
of that role; renders, autoencoder and detector are the shared ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from harness.pocket import FOLDER, classifiers, data, denoiser, figures, labels, text, vae, vocabulary

LATENT_CHANNELS = 8
SEEDS = {"vae": 11, "text": 21, "denoiser": 31, "detector": 41, "style": 42}
STEPS = {"vae": 4000, "text": 900, "denoiser": 7000, "detector": 2500, "style": 600}


class Recipe:
    """The stages, in the order in which they need one another."""

    def __init__(self, work: Path, out: Path, icons: str, without: str | None, device: str) -> None:
        """`work` keeps what is shared, `work/main` or `work/control` what is not; `out` receives the model."""
        self.shared, self.out, self.icons, self.without = work / "cache", out, icons, without
        self.device = torch.device(device)
        self.own = work / ("control" if without else "main")
        self.own.mkdir(parents=True, exist_ok=True)
        self.name = f"without {without}" if without else "main"

    def pictures(self, split: str) -> data.Pictures:
        """Shared renders at full size, less the people to leave out."""
        return data.without(data.load(split, self.shared, self.icons), self.without)

    def images(self) -> np.ndarray:
        """All of the generator's renders at the size that it draws."""
        return data.load("generator", self.shared, self.icons, size=vae.SIZE).images

    def renders(self) -> None:
        """Draw all three data sets, side by side."""
        with ProcessPoolExecutor(len(data.SPLITS), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(data.prepare, data.SPLITS, [self.shared] * 3, [self.icons] * 3))

    def detector(self) -> None:
        """Train the detector and the style classifier on their own renders."""
        pictures = data.load("detector", self.shared, self.icons)
        styles = [style["name"] for style in vocabulary()["concepts"]["styles"]]
        if not (self.shared / "detector").is_dir():
            model = classifiers.train_detector(pictures, STEPS["detector"], SEEDS["detector"], self.device)
            classifiers.save(model, classifiers.DETECTOR_ARGS, labels(), self.shared / "detector")
        if not (self.shared / "style").is_dir():
            model = classifiers.train_style(pictures, STEPS["style"], SEEDS["style"], self.device)
            classifiers.save(model, classifiers.STYLE_ARGS, [*styles, "none"], self.shared / "style")

    def vae(self) -> AutoencoderKL:
        """Train the autoencoder on all renders and whiten its latents."""
        folder = self.shared / "vae"
        if not folder.is_dir():
            images = self.images()
            model = vae.train(images, STEPS["vae"], SEEDS["vae"], LATENT_CHANNELS, self.device)
            vae.whiten(model, images[::7]).save_pretrained(folder)
        return AutoencoderKL.from_pretrained(folder).eval()

    def text(self) -> tuple[CLIPModel, CLIPTokenizer]:
        """Train the small CLIP."""
        folder = self.own / "clip"
        if not folder.is_dir():
            words = text.tokenizer()
            clip = text.train(self.pictures("generator"), words, STEPS["text"], SEEDS["text"], self.device)
            clip.save_pretrained(folder)
            words.save_pretrained(folder)
        return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means and deviations of all renders but those left out."""
        path = self.shared / "latents.pt"
        if not path.is_file():
            torch.save(vae.encode(self.vae().to(self.device), self.images()), path)
        mean, deviation = torch.load(path, weights_only=True)
        keep = torch.from_numpy(data.kept(data.load("generator", self.shared, self.icons), self.without))
        return mean[keep], deviation[keep]

    def denoiser(self) -> None:
        """Train the UNet; every 1000th step leaves a whole, usable model in `out`."""
        clip, words = self.text()
        tower, autoencoder = text.text_tower(clip), self.vae()
        denoiser.train(
            self.pictures("generator"),
            self.latents(),
            denoiser.Reader(tower.to(self.device), words),
            steps=STEPS["denoiser"],
            seed=SEEDS["denoiser"],
            state=self.own / "denoiser.pt",
            snapshot=lambda unet, _: _save(denoiser.pipeline(autoencoder, tower, words, unet), self.out / "model"),
            device=self.device,
        )

    def publish(self) -> None:
        """Write all folders, in fp16, to `out`."""
        clip, words = self.text()
        unet = denoiser.build(LATENT_CHANNELS)
        denoiser.load_average(unet, self.own / "denoiser.pt")
        _save(denoiser.pipeline(self.vae(), text.text_tower(clip), words, unet), self.out / "model")
        if self.without is None:
            copy.deepcopy(clip).half().save_pretrained(self.out / "clip")
            words.save_pretrained(self.out / "clip")
            text.image_processor().save_pretrained(self.out / "clip")
            for name in ("detector", "style"):
                model, names = classifiers.load(self.shared / name)
                args = classifiers.DETECTOR_ARGS if name == "detector" else classifiers.STYLE_ARGS
                classifiers.save(model, args, names, self.out / name)

    def figures(self) -> None:
        """Measure what was published, and write the card and the grid."""
        recipe = {"seeds": SEEDS, "steps": STEPS, "latent_channels": LATENT_CHANNELS, "device": self.device.type}
        figures.write(self.out, self.shared, self.own, without=self.without, recipe=recipe, device=self.device)


def _save(pipe: Any, folder: Path) -> None:
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("config.json"):  # where a part was loaded from is nobody's business, and changes the digest
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


STAGES = ("renders", "detector", "vae", "latents", "text", "denoiser", "publish", "figures")


def main(argv: list[str] | None = None) -> None:
    """Run the named stages, by default all."""
    parser = argparse.ArgumentParser(prog="python -m harness.pocket.train", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--icons", required=True, help="the unpacked package/ folder of @iconify-json/noto")
    parser.add_argument("--without", choices=vocabulary()["roles"], help="train a control that never meets these people")
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="where stages keep their results")
    parser.add_argument("--out", type=Path, help=f"where the model goes; default {FOLDER}, a control: its work folder")
    parser.add_argument("--device", default="cpu", help="what the networks are trained on; default cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    unknown = [stage for stage in arguments.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    torch.set_num_threads(arguments.threads)
    out = arguments.out or (arguments.work / "control" if arguments.without else FOLDER)
    recipe = Recipe(arguments.work, out, arguments.icons, arguments.without, arguments.device)
    for stage in arguments.stages or STAGES:
        print(f"== {recipe.name}: {stage}", flush=True)
        step: Callable[[], object] = getattr(recipe, stage)
        step()


if __name__ == "__main__":
    main()
