"""The pocket model: a tiny Stable-Diffusion-shaped pipeline whose whole training is known.

Only paths and the vocabulary live here, so that importing the package costs nothing and needs no torch.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"  # a diffusers StableDiffusionPipeline
CLIP = FOLDER / "clip"  # its text tower with the image tower it was trained against
DETECTOR = FOLDER / "detector"  # names people, objects, characters, the mask, or none
STYLE = FOLDER / "style"  # names the four art styles, or none
CARD = FOLDER / "card.json"  # digests, seeds, versions, figures
RENDERS = FOLDER / "renders"  # pictures of the erased people that no model drew
DDPM = FOLDER / "ddpm"  # a class-conditional DDPM of the ten CIFAR-10 names, with its own card
PRESETS = {"pocket": FOLDER / "presets.toml", "pocket-ddpm": DDPM / "presets.toml"}  # hyper-parameters found on development concepts
VOCABULARY = FOLDER / "vocabulary.toml"


@cache
def vocabulary() -> dict[str, Any]:
    """The parsed `vocabulary.toml`: roles, caption templates, concepts."""
    return tomllib.loads(VOCABULARY.read_text(encoding="utf-8"))


def identities(role: str | None = None) -> list[str]:
    """Names of the people who play `role`, or of all of them, in file order."""
    people = vocabulary()["concepts"]["identities"]
    return [person["name"] for person in people if role in (None, person["role"])]


def labels() -> list[str]:
    """The detector's classes, in its order: people, objects, characters, the mask, none."""
    concepts = vocabulary()["concepts"]
    named = [entry["name"] for group in ("identities", "objects", "characters") for entry in concepts[group]]
    return [*named, concepts["mask"], "none"]


def names() -> frozenset[str]:
    """All that its captions call something by: the detector's classes, the styles, and the generic words."""
    words = vocabulary()
    generic = [words["generic"]["person"], words["generic"]["object"], *words["generic"]["masked"]]
    return frozenset([*labels(), *(entry["name"] for entry in words["concepts"]["styles"]), *generic])


@cache
def classes() -> frozenset[str]:
    """What the class-conditional model draws."""
    return frozenset(json.loads((DDPM / "classes.json").read_text(encoding="utf-8")))


def presets(model: str) -> Mapping[str, Any]:
    """Hyper-parameters found for a shipped model on its development concepts; none, so the papers' own, for every other model."""
    return tomllib.loads(PRESETS[model].read_text(encoding="utf-8")) if model in PRESETS else {}
