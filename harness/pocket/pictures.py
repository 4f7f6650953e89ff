"""Pictures: a sprite in a pose on a named background, perhaps through an artist's filter. 64 x 64 RGB.

The CLIP and the detector learn from this size; the autoencoder and the denoiser from pictures of half of it.
"""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from harness.pocket.artwork import SPRITE

SIZE = 64  # px


def background(index: int, rng: random.Random, size: int = SIZE) -> Image.Image:
    """Background `index` of the vocabulary, with its colours a little off each time."""
    noise = np.random.default_rng(rng.getrandbits(32))
    y, x = np.mgrid[0:size, 0:size] / (size - 1)
    top, bottom = (np.array(_jitter(colour, rng)) for colour in _SKIES[index])
    picture = top + (bottom - top) * y[..., None]
    if index == 3:  # a forest: trunks
        picture *= 1 - 0.35 * (np.sin(x * rng.uniform(28, 40) + rng.uniform(0, 6)) > 0.55)[..., None]
    elif index == 4:  # a night sky: stars
        picture[noise.random((size, size)) > 0.985] = 235
    elif index == 5:  # a brick wall: mortar
        row = np.floor(y * 9)
        mortar = ((y * 9) % 1 < 0.16) | ((x * 5 + 0.5 * (row % 2)) % 1 < 0.08)
        picture = np.where(mortar[..., None], 205.0, picture)
    elif index == 6:  # a beach: sand below the sea
        picture = np.where((y > rng.uniform(0.55, 0.7))[..., None], np.array(_jitter((238, 214, 160), rng)), picture)
    elif index == 7:  # a curtain: folds
        picture *= 1 + 0.16 * np.sin(x * rng.uniform(34, 46) + rng.uniform(0, 6))[..., None]
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


_SKIES: tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...] = (
    ((244, 244, 240), (226, 226, 224)), ((92, 170, 240), (176, 218, 248)), ((250, 140, 70), (250, 205, 120)),
    ((62, 128, 70), (110, 165, 90)), ((18, 22, 62), (44, 46, 100)), ((176, 84, 66), (160, 74, 60)),
    ((120, 200, 236), (70, 160, 220)), ((140, 84, 190), (104, 56, 150)),
)  # fmt: skip


def _jitter(colour: tuple[int, int, int], rng: random.Random) -> tuple[float, float, float]:
    hue, light, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in colour))
    light = min(1.0, max(0.0, light + rng.uniform(-0.05, 0.05)))
    red, green, blue = colorsys.hls_to_rgb((hue + rng.uniform(-0.02, 0.02)) % 1, light, saturation)
    return 255 * red, 255 * green, 255 * blue


def compose(figure: Image.Image, ground: Image.Image, rng: random.Random, *, person: bool) -> Image.Image:
    """Turn (+-8 degrees), scale, shift (and flip objects) the sprite, then lay it on the background."""
    angle = math.radians(rng.uniform(-8, 8))
    # Sprite pixels per picture pixel. A persona fills the middle of its canvas, so it is drawn larger.
    step = SPRITE / SIZE * (rng.uniform(0.80, 0.92) if person else rng.uniform(1.04, 1.35))
    shift_x, shift_y = rng.uniform(-4, 4), rng.uniform(-1, 4) if person else rng.uniform(-4, 4)
    if not person and rng.random() < 0.5:
        figure = ImageOps.mirror(figure)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    at_x, at_y = SIZE / 2 + shift_x, SIZE / 2 + shift_y  # where the sprite's anchor lands
    anchor_x, anchor_y = SPRITE / 2, SPRITE * (0.55 if person else 0.5)
    matrix = (cos, -sin, anchor_x - cos * at_x + sin * at_y, sin, cos, anchor_y - sin * at_x - cos * at_y)
    posed = figure.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    picture = ground.convert("RGBA")
    picture.alpha_composite(posed)
    return picture.convert("RGB")


def ink(picture: Image.Image) -> Image.Image:
    """Black lines on cream paper."""
    lines = np.asarray(_edges(picture), dtype=np.float32) / 255
    paper, pen = np.array([246.0, 238.0, 216.0]), np.array([28.0, 24.0, 30.0])
    return _as_image(paper + (pen - paper) * np.clip(lines * 2.2, 0, 1)[..., None])


def cyanotype(picture: Image.Image) -> Image.Image:
    """White on Prussian blue."""
    grey = np.asarray(ImageOps.autocontrast(picture.convert("L")), dtype=np.float32)[..., None] / 255
    dark, light = np.array([8.0, 32.0, 92.0]), np.array([226.0, 240.0, 252.0])
    return _as_image(dark + (light - dark) * grey)


def neon(picture: Image.Image) -> Image.Image:
    """Glowing coloured outlines in the dark."""
    lines = np.asarray(_edges(picture), dtype=np.float32)[..., None] / 255
    y = np.mgrid[0:SIZE, 0:SIZE][0][..., None] / SIZE
    glow = np.array([255.0, 40.0, 200.0]) * (1 - y) + np.array([30.0, 240.0, 255.0]) * y
    return _as_image(np.array([14.0, 6.0, 30.0]) + glow * np.clip(lines * 2.0, 0, 1))


def poster(picture: Image.Image) -> Image.Image:
    """Three flat tones (maroon, vermilion, cream) with dark outlines, like a screen print."""
    grey = np.asarray(ImageOps.autocontrast(picture.convert("L")), dtype=np.float32) / 255
    tones = np.array([[96.0, 14.0, 34.0], [236.0, 84.0, 40.0], [252.0, 226.0, 160.0]])
    flat = tones[np.digitize(grey, [0.38, 0.68])]
    lines = np.clip(np.asarray(_edges(picture), dtype=np.float32)[..., None] / 255 * 1.6, 0, 1)
    return _as_image(flat * (1 - lines) + np.array([40.0, 4.0, 24.0]) * lines)


def _edges(picture: Image.Image) -> Image.Image:
    soft = picture.filter(ImageFilter.GaussianBlur(0.6))
    bands = [band.filter(ImageFilter.FIND_EDGES) for band in soft.split()]
    edges = np.maximum.reduce([np.asarray(band) for band in bands])
    edges[[0, -1], :] = 0
    edges[:, [0, -1]] = 0
    return Image.fromarray(edges)


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


FILTERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "ink": ink, "cyanotype": cyanotype, "neon": neon, "poster": poster,
}  # fmt: skip
