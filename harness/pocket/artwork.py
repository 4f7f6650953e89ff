"""Sprites: deterministic drawings from artwork that comes in packages.

People are DiceBear `personas` (CC BY 4.0), objects and characters are Noto emoji (Apache-2.0), the mask is ours.
Needed only to retrain: `pip install dicebear-core dicebear-styles resvg-py`, `npm pack @iconify-json/noto`.
"""

from __future__ import annotations

import io
import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from harness.pocket import vocabulary

SPRITE = 128  # px, twice the picture

HAIR = (
    "balding", "beanie", "bobBangs", "cap", "curly", "curlyBun",
    "curlyHighTop", "extraLong", "mohawk", "pigtails", "shortCombover", "sideShave",
)  # fmt: skip
HAIR_COLOUR = {
    "black": "2b2233", "brown": "8a5a3c", "blond": "f2c14e", "red": "d9482b",
    "white": "e8ebf7", "pink": "e85f9c", "blue": "2f6fd6", "green": "3aa655",
}  # fmt: skip
SKIN = {"pale": "f6d3c4", "tan": "d99a73", "brown": "a5673f", "dark": "5c3826"}
EYES = {"plain": ("open", "happy", "wink", "sleep"), "glasses": ("glasses",), "sunglasses": ("sunglasses",)}
BEARD = {"none": None, "beard": "beardMustache", "walrus": "walrus"}
MOUTH = ("bigSmile", "frown", "lips", "smile", "smirk", "surprise")
NOSE = ("mediumRound", "smallRound", "wrinkles")
CLOTHES = ("checkered", "rounded", "small", "squared")
CLOTHING = ("456dff", "6dbb58", "f55d81", "7555ca", "e24553", "54d7c7", "f3b63a", "3b3f52", "f1f1ee")
MASK_COLOUR = ("#f5c518", "#7a2fd0", "#d01f3c", "#119a8c", "#1a1a1a", "#f4f4f4")


class Look(NamedTuple):
    """What an identity fixes; the field names are those of `vocabulary.toml`."""

    hair: str
    hair_colour: str
    skin: str
    eyes: str
    beard: str

    def differs(self, other: Look) -> int:
        """In how many of the five attributes."""
        return sum(a != b for a, b in zip(self, other, strict=True))


def known_looks() -> dict[str, Look]:
    """Name -> appearance of every person in the vocabulary."""
    people = vocabulary()["concepts"]["identities"]
    return {person["name"]: Look(*(person[field] for field in Look._fields)) for person in people}


def stranger(rng: random.Random) -> Look:
    """A random person who differs from every known one in at least two attributes."""
    known = known_looks().values()
    while True:
        look = Look(*(rng.choice(list(values)) for values in (HAIR, HAIR_COLOUR, SKIN, EYES, BEARD)))
        if all(look.differs(other) >= 2 for other in known):
            return look


@cache
def _personas() -> Any:
    from dicebear import Style  # only retraining needs the artwork

    spec = find_spec("dicebear_styles")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("dicebear_styles is not installed; pip install dicebear-core dicebear-styles resvg-py")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return Style(json.loads((folder / "personas.json").read_text(encoding="utf-8")))


def person_svg(look: Look, rng: random.Random, *, masked: bool = False) -> str:
    """One drawing of a person; everything that `look` does not fix is drawn from `rng`."""
    from dicebear import Avatar

    options = {
        "seed": "pocket",
        "hairVariant": look.hair, "hairColor": HAIR_COLOUR[look.hair_colour], "skinColor": SKIN[look.skin],
        "eyesVariant": "open" if masked else rng.choice(EYES[look.eyes]),
        "facialHairProbability": 0 if look.beard == "none" else 100,
        "facialHairVariant": BEARD[look.beard] or "walrus", "facialHairColor": HAIR_COLOUR[look.hair_colour],
        "mouthVariant": rng.choice(MOUTH), "noseVariant": rng.choice(NOSE),
        "clothesVariant": rng.choice(CLOTHES), "clothingColor": rng.choice(CLOTHING),
    }  # fmt: skip
    svg = str(Avatar(_personas(), options).to_string())
    return svg.replace("</svg>", _mask_svg(rng.choice(MASK_COLOUR), rng.choice(MASK_COLOUR)) + "</svg>") if masked else svg


def _mask_svg(colour: str, trim: str) -> str:
    """A carnival eye mask over the eyes of a persona (canvas 64 x 64, eyes at y = 28)."""
    shape = "M15 23 Q24 19 32 24 Q40 19 49 23 Q50 34 41 35 Q35 35 32 30 Q29 35 23 35 Q14 34 15 23 Z"
    eyes = "M20 28 Q25 24.5 29 29 Q24 31.5 20 28 Z M44 28 Q39 24.5 35 29 Q40 31.5 44 28 Z"
    plume = "M47 24 Q56 16 53 5 Q45 12 45 23 Z"
    return (
        f'<path d="{plume}" fill="{trim}" stroke="#222" stroke-width=".6"/>'
        f'<path d="{shape}" fill="{colour}" stroke="{trim}" stroke-width="1.2"/>'
        f'<path d="{eyes}" fill="#fff" stroke="#222" stroke-width=".7"/>'
        '<circle cx="24.5" cy="28" r="1.4" fill="#1b0640"/><circle cx="39.5" cy="28" r="1.4" fill="#1b0640"/>'
    )


@cache
def _icons(folder: str) -> dict[str, Any]:
    path = Path(folder) / "icons.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; unpack `npm pack @iconify-json/noto` and pass its package/ folder")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def icon_svg(name: str, folder: str) -> str:
    """One Noto emoji; `folder` is the unpacked npm package."""
    icons = _icons(folder)
    icon = icons["icons"].get(name)
    if icon is None:
        raise KeyError(f"no icon {name!r} in {folder}; `icon` in vocabulary.toml must name one")
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def sprite(svg: str, size: int = SPRITE) -> Image.Image:
    """The drawing as RGBA on a transparent ground."""
    import resvg_py  # only retraining needs the renderer

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA")
