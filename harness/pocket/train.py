"""Rebuild the pocket model: `python -m harness.pocket.train --icons ICONS [stage ...]`.

Every stage keeps its result in the work folder, so that a stopped run goes on where it was; delete a result to
make it anew. With `--without ROLE` the words and the denoiser are learned from scratch and never meet the people
of that role; renders, autoencoder and detector are the shared ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from harness.pocket import FOLDER, classifiers, data, denoiser, figures, labels, text, vae, vocabulary

LATENT_CHANNELS = 8
SEEDS = {"vae": 11, "text": 21, "denoiser": 31, "polish": 32, "detector": 41, "style": 42}
STEPS = {"vae": 1200, "text": 900, "denoiser": 2600, "polish": 1300, "detector": 1000, "style": 400}


class Recipe:
    """The stages, in the order in which they need one another."""

    def __init__(self, work: Path, out: Path, icons: str, without: str | None) -> None:
        """`work` keeps what is shared, `work/main` or `work/control` what is not; `out` receives the model."""
        self.shared, self.out, self.icons, self.without = work / "cache", out, icons, without
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
        """Draw all three data sets."""
        for split in data.SPLITS:
            self.pictures(split)

    def detector(self) -> None:
        """Train the detector and the style classifier on their own renders."""
        pictures = data.load("detector", self.shared, self.icons)
        styles = [style["name"] for style in vocabulary()["concepts"]["styles"]]
        if not (self.shared / "detector").is_dir():
            model = classifiers.train_detector(pictures, STEPS["detector"], SEEDS["detector"])
            classifiers.save(model, classifiers.DETECTOR_ARGS, labels(), self.shared / "detector")
        if not (self.shared / "style").is_dir():
            model = classifiers.train_style(pictures, STEPS["style"], SEEDS["style"])
            classifiers.save(model, classifiers.STYLE_ARGS, [*styles, "none"], self.shared / "style")

    def vae(self) -> AutoencoderKL:
        """Train the autoencoder on all renders and whiten its latents."""
        folder = self.shared / "vae"
        if not folder.is_dir():
            images = self.images()
            model = vae.train(images, STEPS["vae"], SEEDS["vae"], LATENT_CHANNELS)
            vae.whiten(model, images[::7]).save_pretrained(folder)
        return AutoencoderKL.from_pretrained(folder).eval()

    def text(self) -> tuple[CLIPModel, CLIPTokenizer]:
        """Train the small CLIP."""
        folder = self.own / "clip"
        if not folder.is_dir():
            words = text.tokenizer()
            clip = text.train(self.pictures("generator"), words, STEPS["text"], SEEDS["text"])
            clip.save_pretrained(folder)
            words.save_pretrained(folder)
        return CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)

    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior means and deviations of all renders but those left out."""
        path = self.shared / "latents.pt"
        if not path.is_file():
            torch.save(vae.encode(self.vae(), self.images()), path)
        mean, deviation = torch.load(path, weights_only=True)
        keep = torch.from_numpy(data.kept(data.load("generator", self.shared, self.icons), self.without))
        return mean[keep], deviation[keep]

    def denoiser(self) -> None:
        """Train the UNet; every 650th step leaves a whole, usable model in `out`."""
        self._denoise("denoiser", None)

    def polish(self) -> None:
        """A second, gentler cycle from the averaged UNet, with more objects and characters."""
        self._denoise("polish", self.own / "denoiser.pt")

    def _denoise(self, stage: str, start: Path | None) -> None:
        clip, words = self.text()
        tower, autoencoder = text.text_tower(clip), self.vae()
        denoiser.train(
            self.pictures("generator"),
            self.latents(),
            denoiser.Reader(tower, words),
            steps=STEPS[stage],
            seed=SEEDS[stage],
            state=self.own / f"{stage}.pt",
            snapshot=lambda unet, _: _save(denoiser.pipeline(autoencoder, tower, words, unet), self.out / "model"),
            start=start,
        )

    def publish(self) -> None:
        """Write all folders, in fp16, to `out`."""
        clip, words = self.text()
        unet = denoiser.build(LATENT_CHANNELS)
        denoiser.load_average(unet, self.own / "polish.pt")
        _save(denoiser.pipeline(self.vae(), text.text_tower(clip), words, unet), self.out / "model")
        if self.without is None:
            copy.deepcopy(clip).half().save_pretrained(self.out / "clip")
            words.save_pretrained(self.out / "clip")
            text.image_processor().save_pretrained(self.out / "clip")
            for name in ("detector", "style"):
                model, names = classifiers.load(self.shared / name)
                args = classifiers.DETECTOR_ARGS if name == "detector" else classifiers.STYLE_ARGS
                classifiers.save(model, args, names, self.out / name)

    def seconds(self) -> dict[str, float]:
        """Time spent in each stage so far, summed over runs."""
        path = self.own / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the time of `stage`."""
        total = self.seconds()
        total[stage] = round(total.get(stage, 0) + seconds, 1)
        (self.own / "seconds.json").write_text(json.dumps(total) + "\n", encoding="utf-8")

    def figures(self) -> None:
        """Measure what was published, and write the card and the grid."""
        recipe = {"seeds": SEEDS, "steps": STEPS, "latent_channels": LATENT_CHANNELS, "seconds": self.seconds()}
        figures.write(self.out, self.shared, self.own, without=self.without, recipe=recipe)


def _save(pipe: Any, folder: Path) -> None:
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("config.json"):  # where a part was loaded from is nobody's business, and changes the digest
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


STAGES = ("renders", "detector", "vae", "text", "denoiser", "polish", "publish", "figures")


def main(argv: list[str] | None = None) -> None:
    """Run the named stages, by default all."""
    parser = argparse.ArgumentParser(prog="python -m harness.pocket.train", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--icons", required=True, help="the unpacked package/ folder of @iconify-json/noto")
    parser.add_argument("--without", choices=vocabulary()["roles"], help="train a control that never meets these people")
    parser.add_argument("--work", type=Path, default=Path("pocket-work"), help="where stages keep their results")
    parser.add_argument("--out", type=Path, help=f"where the model goes; default {FOLDER}, a control: its work folder")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    unknown = [stage for stage in arguments.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; stages are {', '.join(STAGES)}")
    torch.set_num_threads(arguments.threads)
    out = arguments.out or (arguments.work / "control" if arguments.without else FOLDER)
    recipe = Recipe(arguments.work, out, arguments.icons, arguments.without)
    for stage in arguments.stages or STAGES:
        print(f"== {recipe.name}: {stage}", flush=True)
        started = time.monotonic()
        step: Callable[[], object] = getattr(recipe, stage)
        step()
        recipe.spent(stage, time.monotonic() - started)


if __name__ == "__main__":
    main()
