"""The rendered data sets, each from its own seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from harness.pocket import labels, vocabulary
from harness.pocket.artwork import icon_svg, known_looks, person_svg, sprite, stranger
from harness.pocket.pictures import FILTERS, SIZE, background, compose

# Seed and number of pictures per identity, object, (object, style) pair, character; of masked people; of strangers.
SPLITS = {
    "generator": (1, 320, 260, 70, 260, 900, 2600),
    "detector": (2, 160, 120, 25, 120, 500, 2600),
    "heldout": (3, 40, 40, 6, 40, 40, 400),
}
DRAWINGS = 32  # different drawings of one identity; poses and backgrounds differ between all pictures


class Pictures(NamedTuple):
    """`images` uint8 (n, 64, 64, 3); the rest int16 (n,): detector label, style (-1: none), background."""

    images: np.ndarray
    label: np.ndarray
    style: np.ndarray
    place: np.ndarray


def render(split: str, icons: str) -> Pictures:
    """All pictures of one split; `icons` is the unpacked Noto package."""
    seed, people, things, styled, characters, masked, strangers = SPLITS[split]
    rng = random.Random(seed)
    concepts, index = vocabulary()["concepts"], {name: at for at, name in enumerate(labels())}
    rows: list[tuple[Image.Image, int, int, int]] = []

    def add(figure: Image.Image, label: str, *, person: bool, style: int = -1) -> None:
        # Styled pictures keep to the four smooth backgrounds, whose outlines do not hide the object.
        place = rng.randrange(8) if style < 0 else rng.choice((0, 1, 2, 6))
        picture = compose(figure, background(place, rng), rng, person=person)
        if style >= 0:
            picture = FILTERS[concepts["styles"][style]["filter"]](picture)
        rows.append((picture, index[label], style, place))

    for name, look in known_looks().items():
        drawings = [sprite(person_svg(look, rng)) for _ in range(min(DRAWINGS, people))]
        for count in range(people):
            add(drawings[count % len(drawings)], name, person=True)
    for entry in concepts["objects"] + concepts["characters"]:
        figure, is_object = sprite(icon_svg(entry["icon"], icons)), entry in concepts["objects"]
        for _ in range(things if is_object else characters):
            add(figure, entry["name"], person=False)
        for style in range(len(concepts["styles"]) if is_object else 0):
            for _ in range(styled):
                add(figure, entry["name"], person=False, style=style)
    for count in range(masked + strangers):
        wears = count < masked
        figure = sprite(person_svg(stranger(rng), rng, masked=wears))
        add(figure, concepts["mask"] if wears else "none", person=True)
    pictures = np.stack([np.asarray(row[0]) for row in rows])
    return Pictures(pictures, *(np.array([row[column] for row in rows], dtype=np.int16) for column in (1, 2, 3)))


def prepare(split: str, work: Path, icons: str) -> Path:
    """Where the split's pictures are, rendered first if need be."""
    path = work / f"{split}.npz"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part.npz")
        np.savez(temporary, **render(split, icons)._asdict())
        temporary.rename(path)
    return path


def load(split: str, work: Path, icons: str, *, size: int = SIZE) -> Pictures:
    """The split from the work folder, rendered first if need be; for the generator, averaged down to 32 pixels."""
    path = prepare(split, work, icons)
    with np.load(path) as saved:
        pictures = Pictures(*(saved[field] for field in Pictures._fields))
    if pictures.images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"{path}: pictures are {pictures.images.shape[1:]}, not ({SIZE}, {SIZE}, 3); delete the file")
    return pictures if size == SIZE else pictures._replace(images=shrink(pictures.images, SIZE // size))


def shrink(images: np.ndarray, by: int) -> np.ndarray:
    """Average `by` x `by` pixels into one."""
    count, height, width, _ = images.shape
    parts = [
        part.reshape(len(part), height // by, by, width // by, by, 3).mean(axis=(2, 4)).round().astype(np.uint8)
        for part in np.array_split(images, max(1, count // 1000))
    ]
    return np.concatenate(parts)


def kept(pictures: Pictures, role: str | None) -> np.ndarray:
    """Which pictures show nobody of `role`: bool (n,)."""
    people = vocabulary()["concepts"]["identities"]
    gone = [at for at, person in enumerate(people) if person["role"] == role]
    if role is not None and not gone:
        raise ValueError(f"no identity has the role {role!r}; roles are {', '.join(vocabulary()['roles'])}")
    return np.asarray(~np.isin(pictures.label, gone))


def without(pictures: Pictures, role: str | None) -> Pictures:
    """The pictures that show nobody of `role`; all of them for None."""
    keep = kept(pictures, role)
    return Pictures(*(field[keep] for field in pictures))
