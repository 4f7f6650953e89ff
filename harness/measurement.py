"""A rate of a model, measured image by image until the answer is clear."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.detection._rule import Rule
from harness.engine import Engine, Wanted
from harness.errors import SpecError
from harness.spec import Group, ImageSet, Lineage, key, seed_of
from harness.stats import Rate, Sequential, log_e_lower, log_e_upper

TOP = Rule()
CHUNK = 20  # images drawn at a time after the floor; looked at round by round all the same


@dataclass(frozen=True)
class Measured:
    """A rate with the gate's word, and where its first images are (`wanted`).

    `evidence` is the gate's e-process where it stopped; `hits` the 0/1 digits of every prompt's images, round by round;
    `figures` what else the detector says of the counted images, and `instead` the share of them that show another label; `cut` how many
    prompts were too long to be read whole, in words.
    """

    rate: Rate
    word: str
    wanted: Wanted
    evidence: Mapping[str, float] = field(default_factory=dict)
    hits: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    instead: float | None = None
    cut: str = ""


def measure(
    engine: Engine,
    lineage: Lineage,
    asked: Group,
    detector: Any,
    gate: Sequential,
    seed: int = 0,
    looked_for: str | None = None,
    report: Callable[[Sequential], None] = lambda gate: None,
    rule: Rule = TOP,
    instead: str = "",
) -> Measured:
    """Feed `gate` with whole rounds, one new image per prompt of `asked`, until it has stopped.

    A hit is an image in which `rule` finds the concept that was asked for (by default as its most probable label), or
    `looked_for` where that is given. A detector's own `figures(scores, wanted)`, and the share that shows `instead` where the
    detector knows it, as its most probable label if `rule` goes by ranks, are taken of the same images. Image r of a prompt has the same noise under every
    model, so models are compared pair by pair.
    """
    concepts = [c for c in asked.concepts for _ in asked.prompts]
    wanted_labels = [looked_for or c for c in concepts]
    index = places(detector, wanted_labels)
    prompts = [p for c in asked.concepts for p in asked.asking(c)]
    seen: dict[str, str] = defaultdict(str)
    width, first, done, counted = len(concepts), None, 0, []
    while not gate.stopped:
        rounds = rounds_ahead(gate.n, gate.floor, width)
        wanted = (round_images(asked, range(done, done + rounds), seed), lineage.task.sampler)
        first, done = first or wanted, done + rounds
        for scores in engine.scores(lineage, wanted, detector).split(width):
            if not gate.stopped:
                row = rule.hits(scores, index)
                gate.feed(row.numpy())
                counted.append(scores)
                for prompt, hit in zip(prompts, row.tolist(), strict=True):
                    seen[prompt] += str(int(hit))
        report(gate)
    if first is None:
        raise SpecError("a rate needs a gate that has not stopped yet")
    scores = torch.cat(counted)
    figures = detector.figures(scores, index.repeat(len(counted))) if hasattr(detector, "figures") else {}
    known = instead.casefold() in {label.casefold() for label in detector.labels}
    share = float(replace(rule, k=1).hits(scores, places(detector, [instead] * len(scores))).double().mean()) if known else None
    return Measured(gate.rate, gate.verdict, first, evidence(gate), dict(seen), figures, share, engine.cut(lineage, first))


def rounds_ahead(n: int, floor: int, width: int) -> int:
    """How many rounds of `width` images are drawn at once after `n` images: up to the floor, then about `CHUNK` images."""
    return max(1, -(-(floor - n) // width) if n < floor else CHUNK // width)


def evidence(gate: Sequential) -> dict[str, float]:
    """Natural logs of the e-values for *holds* and for *broken* after the last round, and the value at which each decides."""
    below, above = (float(log_e(gate.k, gate.n, gate.tolerance)) for log_e in (log_e_upper, log_e_lower))
    holds, broken = (below, above) if gate.direction == "below" else (above, below)
    return {"holds": holds, "holds_at": -float(np.log(gate.alpha)), "broken": broken, "broken_at": float(np.log(gate.m / gate.alpha))}


def hits(engine: Engine, lineage: Lineage, wanted: Wanted, detector: Any, labels: list[str], rule: Rule = TOP) -> Tensor:
    """Whether `rule` finds the wanted label, as 0/1 integers (rounds, prompts); `labels` are one round's."""
    scores = engine.scores(lineage, wanted, detector)
    index = places(detector, labels).repeat(len(scores) // len(labels))
    return rule.hits(scores, index).view(-1, len(labels))


def places(detector: Any, labels: list[str]) -> Tensor:
    """Where each label stands among the detector's (n,). Failing that, case is ignored, which is MACE's rule for GCD's labels."""
    known = {label.casefold(): i for i, label in enumerate(detector.labels)} | {label: i for i, label in enumerate(detector.labels)}
    if strange := sorted({label for label in labels if not {label, label.casefold()} & set(known)}):
        raise SpecError(f"the detector cannot see '{strange[0]}'; it knows {len(detector.labels)} labels, such as '{detector.labels[0]}'")
    return torch.tensor([known.get(label, known.get(label.casefold())) for label in labels])


def round_images(asked: Group, rounds: range, seed: int) -> ImageSet:
    """One image per prompt for each round."""
    prompts = tuple(p for c in asked.concepts for p in asked.asking(c))
    return ImageSet(prompts * len(rounds), tuple(seed_of("image", seed, p, r) for r in rounds for p in prompts))


def held_out_loss(engine: Engine, lineage: Lineage, data: Group, draws: int = 4, least: int = 30) -> Tensor:
    """Diffusion loss (images,) on images of the base model that no fine-tune sees: as many of each prompt of `data` as make `least` in all.

    Timesteps and noise are the same for every lineage, so two results can be subtracted image by image.
    """
    wanted = (ImageSet.of(data, -(-least // (len(data.concepts) * len(data.prompts))), seed_of("held out")), lineage.task.sampler)

    def look() -> Tensor:
        images = engine.read_images(engine.images(Lineage(lineage.base, lineage.task), wanted))
        pipe = engine.load(lineage)
        mean, _ = pipe.latents(images)
        embeddings = pipe.encode(wanted[0].prompts)
        generators = (torch.Generator().manual_seed(seed_of("held out", i)) for i in range(draws))
        with torch.no_grad():
            return torch.stack([pipe.diffusion_losses(mean, embeddings, rng) for rng in generators]).mean(0).cpu()

    return engine.kept("losses", {"lineage": lineage.key, "images": key(wanted), "draws": draws}, look)
