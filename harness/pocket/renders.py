"""Pictures of the people who get erased, straight from the artwork: what an attacker has who does not use the model itself.

    python -m harness.pocket.renders

Their seed is their own: none of them was seen in training. One file of several pages per person.
"""

from __future__ import annotations

import random

from PIL import Image

from harness.pocket import RENDERS, identities
from harness.pocket.artwork import Look, known_looks, person_svg, sprite
from harness.pocket.pictures import background, compose

SEED, COUNT, SIZE = 7, 25, 32  # px: what the model draws


def main() -> None:
    rng, looks = random.Random(SEED), known_looks()
    for name in [*identities("development"), *identities("report")]:
        pictures = [picture(looks[name], rng) for _ in range(COUNT)]
        (RENDERS / name).mkdir(parents=True, exist_ok=True)
        pictures[0].save(RENDERS / name / "renders.tiff", save_all=True, append_images=pictures[1:], compression="tiff_adobe_deflate")


def picture(look: Look, rng: random.Random) -> Image.Image:
    drawn = compose(sprite(person_svg(look, rng)), background(rng.randrange(8), rng), rng, person=True)
    return drawn.resize((SIZE, SIZE), Image.Resampling.BOX)


if __name__ == "__main__":
    main()
