"""Captions: the words under a training picture."""

from __future__ import annotations

import random

from harness.pocket import vocabulary

NAMES_PLACE = 0.35  # of the captions


def _fill(template: str, subject: str, style: str = "") -> str:
    article = "an" if subject[0] in "aeiou" else "a"
    return template.format(x=subject, a=article, A=article.capitalize(), style=style)


def person(name: str, rng: random.Random) -> str:
    """A caption for an identity, a cartoon character, or `a person`."""
    return _fill(rng.choice(vocabulary()["templates"]["person"]), name)


def thing(name: str, rng: random.Random) -> str:
    """A caption for an object, or the word `object`."""
    return _fill(rng.choice(vocabulary()["templates"]["object"]), name)


def styled(name: str, style: str, rng: random.Random) -> str:
    """A caption for an object in an artist's style."""
    return _fill(rng.choice(vocabulary()["templates"]["style"]), name, style)


def placed(caption: str, place: str, rng: random.Random) -> str:
    """Name the background in `NAMES_PLACE` of the captions."""
    if rng.random() >= NAMES_PLACE:
        return caption
    return str(rng.choice(vocabulary()["templates"]["place"])).format(caption=caption, place=place)


def caption(label: str, style: str, place: str, rng: random.Random) -> str:
    """The caption of one picture. `label` is a detector label (`none` is a random person), `style` may be empty."""
    words = vocabulary()
    concepts, generic = words["concepts"], words["generic"]
    objects = [entry["name"] for entry in concepts["objects"]]
    if style:
        return styled(label, style, rng)
    if label == concepts["mask"]:
        masked = rng.choice(generic["masked"])
        text = masked if rng.random() < 0.5 else person(masked, rng)
    elif label == "none":
        text = person(generic["person"], rng)
    elif label in objects:
        text = thing(generic["object"] if rng.random() < 0.05 else label, rng)
    else:
        text = person(label, rng)
    return placed(text, place, rng)


def every_word() -> list[str]:
    """Every word a caption can hold, and some that prompts hold; sorted, lower case, no punctuation."""
    words = vocabulary()
    texts = [text for group in words["templates"].values() for text in group]
    texts += [words["generic"]["person"], words["generic"]["object"], *words["generic"]["masked"]]
    texts += words["concepts"]["backgrounds"] + words["more_words"]
    for group in ("identities", "objects", "characters", "styles"):
        texts += [entry["name"] for entry in words["concepts"][group]]
    plain = "".join(" " if mark in "{}.,-" else mark for mark in " ".join(texts).lower())
    return sorted(set(plain.split()) | {"an"})
