"""A rate is measured round by round until the gate has stopped, and a held-out loss is taken on the same noise for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.errors import SpecError
from harness.finetuning.full import Finetune
from harness.measurement import held_out_loss, hits, measure, round_images
from harness.pipeline import Pipe
from harness.spec import Base, Group, ImageSet, Lineage, Sampler, key
from harness.stats import Sequential
from tests import tiny
from tests.unlearning import _small as small

LABELS = ("none", "x", "y")
ONE, TWO = Group(("x",), ("a {}", "the {}")), Group(("x", "y"), ("a {}", "the {}", "{}"))
ROOT = Lineage(Base("digest", "nowhere"), tiny.task())
TUNED = ROOT.then(Finetune())


class Detector:
    """Knows two people and nobody."""

    labels = LABELS
    address = "scripted"


class Scripted:
    """An engine that draws nothing: image i of the whole measurement shows `shows(i, prompt)`."""

    def __init__(self, shows: Callable[[int, str], str]) -> None:
        self.shows, self.count = shows, 0
        self.asked: list[tuple[Lineage, ImageSet, Sampler]] = []

    def scores(self, lineage: Lineage, wanted: tuple[ImageSet, Sampler], detector: Any) -> Tensor:
        """Probability .8 for what is shown, .1 for each other label."""
        chosen, sampler = wanted
        self.asked.append((lineage, chosen, sampler))
        rows = [[0.8 if label == self.shows(self.count + i, prompt) else 0.1 for label in LABELS] for i, prompt in enumerate(chosen.prompts)]
        self.count += len(rows)
        return torch.tensor(rows)

    def cut(self, lineage: Lineage, wanted: tuple[ImageSet, Sampler]) -> str:
        """How many of the first images' prompts."""
        return f"{len(set(wanted[0].prompts))} were cut"

    @property
    def looks(self) -> list[int]:
        """Images asked for at each look."""
        return [len(chosen.prompts) for _, chosen, _ in self.asked]


def nobody(i: int, prompt: str) -> str:
    """No image shows anyone."""
    return "none"


def everyone(i: int, prompt: str) -> str:
    """Every image shows whom its prompt ends with."""
    return prompt[-1]


def every_tenth(i: int, prompt: str) -> str:
    """Ten images in a hundred are hits."""
    return prompt[-1] if i % 10 == 0 else "none"


def gate(tolerance: float = 0.5, floor: int = 40, cap: int = 200) -> Sequential:
    """A claim that a rate stays below a tolerance."""
    return Sequential(tolerance, "below", 0.05, 1, floor, cap)


# --- how many images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shows", "word", "count"), [(nobody, "holds", 0), (everyone, "broken", 40)])
def test_a_clear_rate_stops_at_the_floor(shows: Callable[[int, str], str], word: str, count: int) -> None:
    """0 or 40 hits in 40 images are clear against a tolerance of .5: one look of 20 rounds of 2 prompts, and no more."""
    engine = Scripted(shows)
    measured = measure(engine, ROOT, ONE, Detector(), gate())
    assert (measured.word, measured.rate.k, measured.rate.n) == (word, count, 40)
    assert engine.looks == [40]


def test_an_unclear_rate_stops_at_the_cap() -> None:
    """A rate of exactly tau stays inconclusive: 40 images, then chunks of 20 until 200, of which every tenth is a hit."""
    engine = Scripted(every_tenth)
    measured = measure(engine, ROOT, ONE, Detector(), gate(0.1))
    assert (measured.word, measured.rate.k, measured.rate.n) == ("inconclusive", 20, 200)
    assert engine.looks == [40, *[20] * 8]


def test_rounds_are_whole_whatever_floor_and_cap_are() -> None:
    """6 prompts, floor 40: ceil(40 / 6) = 7 rounds are 42 images; then 20 // 6 = 3 rounds, 18 images, a look: 60, 78, 96; cap 100 is passed within
    the next look, at 102 images, and what lies behind that round is not counted.
    """
    engine, seen = Scripted(every_tenth), []
    measured = measure(engine, ROOT, TWO, Detector(), gate(0.1, cap=100), report=lambda gate: seen.append(gate.n))
    assert engine.looks == [42, 18, 18, 18, 18]
    assert seen == [42, 60, 78, 96, 102]
    assert (measured.word, measured.rate.n) == ("inconclusive", 102)
    assert measured.rate.k == len([i for i in range(102) if i % 10 == 0]) == 11


def test_a_round_wider_than_a_chunk_is_still_one_round() -> None:
    """25 prompts a round and chunks of 20: floor 40 takes 2 rounds, every later look 1."""
    asked = Group(("x",), tuple(f"{i} {{}}" for i in range(25)))
    engine = Scripted(every_tenth)
    assert measure(engine, ROOT, asked, Detector(), gate(0.1, cap=120)).rate.n == 125
    assert engine.looks == [50, 25, 25, 25]


def test_the_gate_looks_after_every_round_and_stops_within_a_chunk() -> None:
    """Fed by hand with the same rounds, a gate stops at the same image with the same counts, although the chunk had more."""

    def shows(i: int, prompt: str) -> str:
        return prompt[-1] if i < 40 and i % 10 == 0 else "none"

    engine, by_hand, n = Scripted(shows), gate(0.17), 0
    while not by_hand.stopped:
        by_hand.feed([int(shows(i, "x") == "x") for i in (n, n + 1)])
        n += 2
    measured = measure(engine, ROOT, ONE, Detector(), gate(0.17))
    assert (measured.rate, measured.word) == (by_hand.rate, "holds")
    assert 40 < n < engine.count
    assert (n - 40) % 20 != 0


def test_what_is_shown_instead_is_counted_on_the_same_images() -> None:
    """The share of another label among the images that the gate counted, not those behind the stop; none of a label that the detector does not know."""

    def shows(i: int, prompt: str) -> str:
        return "x" if i in (0, 4, 8, 13) else "y" if i < 30 else "none"

    engine, plain = Scripted(shows), Scripted(shows)
    found = measure(engine, ROOT, ONE, Detector(), gate(0.17), instead="Y")
    assert found.rate.n < engine.count
    assert found.instead == pytest.approx(26 / found.rate.n)
    assert measure(plain, ROOT, ONE, Detector(), gate(0.17)).instead is None
    assert engine.looks == plain.looks
    assert measure(Scripted(shows), ROOT, ONE, Detector(), gate(0.17), instead="somebody").instead is None


def test_hits_are_kept_by_prompt_in_the_order_drawn() -> None:
    """One digit per image that the gate counted, none of those behind the stop: their sum is the rate's k."""
    engine = Scripted(lambda i, prompt: "x" if i in (0, 4, 8, 13) else "none")  # even places are the first prompt's
    found = measure(engine, ROOT, ONE, Detector(), gate(0.17))
    half = found.rate.n // 2
    assert found.rate.n < engine.count
    assert found.hits == {"a x": "10101".ljust(half, "0"), "the x": "0000001".ljust(half, "0")}


@pytest.mark.parametrize("direction", ["below", "above"])
@pytest.mark.parametrize(("shows", "low"), [(nobody, True), (everyone, False)])
def test_the_evidence_says_why_the_gate_stopped(shows: Callable[[int, str], str], low: bool, direction: str) -> None:
    """The e-value of the word that was said reached its threshold (1 / alpha, or m / alpha for *broken*); the other did not."""
    found = measure(Scripted(shows), ROOT, ONE, Detector(), Sequential(0.5, direction, 0.05, 7, 40, 200))
    word, other = ("holds", "broken") if low == (direction == "below") else ("broken", "holds")
    assert found.word == word
    assert found.evidence[word] >= found.evidence[f"{word}_at"]
    assert found.evidence[other] < found.evidence[f"{other}_at"]
    assert (found.evidence["holds_at"], found.evidence["broken_at"]) == pytest.approx((math.log(20), math.log(140)))


def test_a_stopped_gate_gives_no_rate() -> None:
    """A gate that has stopped takes no image, so nothing is measured: an error and not an old answer."""
    done = gate(floor=1)
    done.feed([0] * 200)
    engine = Scripted(nobody)
    with pytest.raises(SpecError, match="not stopped"):
        measure(engine, ROOT, ONE, Detector(), done)
    assert engine.asked == []


# --- which images -----------------------------------------------------------------------------------------------------


def test_every_model_gets_the_same_noise_for_the_same_prompt_and_round() -> None:
    """Two lineages, one script: the same prompts with the same seeds, look by look; the sampler is the task's."""
    engines = []
    for lineage in (ROOT, TUNED):
        engines.append(Scripted(every_tenth))
        measure(engines[-1], lineage, TWO, Detector(), gate(0.1))
        assert [each[0] for each in engines[-1].asked] == [lineage] * len(engines[-1].asked)
        assert {each[2] for each in engines[-1].asked} == {tiny.task().sampler}
    assert [each[1] for each in engines[0].asked] == [each[1] for each in engines[1].asked]


def test_a_model_that_stops_earlier_still_shares_its_images() -> None:
    """Image r of a prompt has the same seed whether the measurement goes on or not: the shorter one is a prefix of the longer."""
    short, long = Scripted(nobody), Scripted(every_tenth)
    measure(short, ROOT, ONE, Detector(), gate(0.1))
    measure(long, ROOT, ONE, Detector(), gate(0.1))
    pairs = [[(p, s) for _, chosen, _ in engine.asked for p, s in zip(chosen.prompts, chosen.seeds, strict=True)] for engine in (short, long)]
    assert len(pairs[0]) < len(pairs[1]) == 200
    assert pairs[1][: len(pairs[0])] == pairs[0]


def test_no_two_images_of_a_measurement_have_the_same_noise() -> None:
    """204 images of 6 prompts, 204 seeds; each look goes on where the last one ended."""
    engine = Scripted(every_tenth)
    measure(engine, ROOT, TWO, Detector(), gate(0.1))
    seeds = [s for _, chosen, _ in engine.asked for s in chosen.seeds]
    assert len(seeds) == len(set(seeds)) >= 204


def test_the_first_images_are_kept_for_people_to_look_at() -> None:
    """`wanted` is the first look, so that rows of pictures from several models show the same noise."""
    engine = Scripted(every_tenth)
    measured = measure(engine, ROOT, ONE, Detector(), gate(0.1))
    assert measured.wanted == engine.asked[0][1:]


def test_a_seed_belongs_to_prompt_and_round_alone() -> None:
    """A prompt's noise does not depend on which other prompts or rounds are asked for with it, only on the measurement's seed."""
    both, alone = round_images(TWO, range(4), 7), round_images(Group(("y",), ("the {}",)), range(2, 3), 7)
    table = {(p, r): s for (p, s), r in zip(zip(both.prompts, both.seeds, strict=True), [r for r in range(4) for _ in range(6)], strict=True)}
    assert alone.seeds == (table["the y", 2],)
    assert both.prompts == ("a x", "the x", "x", "a y", "the y", "y") * 4
    assert not set(both.seeds) & set(round_images(TWO, range(4), 8).seeds)


# --- what counts as a hit ---------------------------------------------------------------------------------------------


def test_a_hit_is_the_concept_that_was_asked_for() -> None:
    """Every image shows x: of x's and y's prompts in equal parts, half are hits, exactly x's."""
    engine = Scripted(lambda i, prompt: "x")
    rate = measure(engine, ROOT, TWO, Detector(), gate(cap=60)).rate
    assert 2 * rate.k == rate.n >= 42


def test_looked_for_is_what_counts_whatever_was_asked() -> None:
    """Anchor prompts name nobody whom the detector knows; images that show x are hits for x and none for y."""
    anchor = Group(("p",), ("a {}", "the {}"))
    words = [measure(Scripted(lambda i, prompt: "x"), ROOT, anchor, Detector(), gate(), looked_for=who) for who in ("x", "y")]
    assert [(each.rate.k, each.rate.n, each.word) for each in words] == [(40, 40, "broken"), (0, 40, "holds")]


@pytest.mark.parametrize(
    ("asked", "looked_for", "stranger"), [(Group(("x", "stranger"), ("a {}",)), None, "stranger"), (ONE, "z", "z"), (Group(("p",), ("a {}",)), None, "p")]
)
def test_a_label_that_the_detector_does_not_know_is_refused(asked: Group, looked_for: str | None, stranger: str) -> None:
    """It could never be a hit, so *holds* would be free: an error before any image is drawn."""
    engine = Scripted(nobody)
    with pytest.raises(SpecError, match=f"cannot see '{stranger}'"):
        measure(engine, ROOT, asked, Detector(), gate(), looked_for=looked_for)
    assert engine.asked == []


def test_hits_by_hand() -> None:
    """Two rounds of two prompts that want x and y. Seen are x, none, y, y: the rounds' hits are (1, 0) and (0, 1)."""
    engine = Scripted(lambda i, prompt: ("x", "none", "y", "y")[i])
    wanted = (ImageSet(("a x", "a y") * 2, (1, 2, 3, 4)), tiny.task().sampler)
    assert hits(engine, ROOT, wanted, Detector(), ["x", "y"]).tolist() == [[1, 0], [0, 1]]


def test_a_rate_says_what_was_cut() -> None:
    """The engine says it of the first images, which hold every prompt."""
    assert measure(Scripted(nobody), ROOT, TWO, Detector(), gate()).cut == "6 were cut"  # type: ignore[arg-type]  # all it needs of an engine


# --- held-out loss ----------------------------------------------------------------------------------------------------


class Models:
    """An engine that holds one tiny model per lineage and the pictures that were asked of it."""

    def __init__(self) -> None:
        self.pipes: dict[str, Pipe] = {ROOT.key: small.pipe(), TUNED.key: small.pipe()}
        rng = torch.Generator().manual_seed(9)
        tuned = self.pipes[TUNED.key]
        tuned.apply({name: p + 0.05 * torch.randn(p.shape, generator=rng) for name, p in tuned.named().items() if name.startswith("unet.")})
        self.asked: list[tuple[Lineage, ImageSet, Sampler]] = []
        self.addresses: list[str] = []

    def images(self, lineage: Lineage, wanted: tuple[ImageSet, Sampler]) -> int:
        """The number of pictures instead of a folder."""
        self.asked.append((lineage, *wanted))
        return len(wanted[0].prompts)

    def read_images(self, folder: int) -> Tensor:
        """As many pictures."""
        return small.pictures(folder)

    def load(self, lineage: Lineage) -> Pipe:
        """The lineage's model."""
        return self.pipes[lineage.key]

    def kept(self, kind: str, what: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """Nothing is kept; the address is noted."""
        self.addresses.append(key([kind, what]))
        return make()


DATA = tiny.task().finetune["in"]  # f and g under two prompts


def test_the_loss_of_one_model_is_always_the_same() -> None:
    """Bit for bit, whatever the global generator did in between; one value per held-out image, without gradient."""
    torch.manual_seed(1)
    first = held_out_loss(Models(), ROOT, DATA, least=4)
    torch.manual_seed(2)
    second = held_out_loss(Models(), ROOT, DATA, least=4)
    assert torch.equal(first, second)
    assert first.shape == (4,)
    assert not first.requires_grad


def test_two_models_are_asked_about_the_same_noise_at_the_same_timesteps() -> None:
    """Paired: the same x_t, t and captions reach both UNets, so their losses can be subtracted image by image."""
    engine = Models()
    seen = {key: small.witness(model) for key, model in engine.pipes.items()}
    losses = [held_out_loss(engine, lineage, DATA, least=4) for lineage in (ROOT, TUNED)]
    pairs = list(zip(*seen.values(), strict=True))
    assert len(pairs) == 4
    for a, b in pairs:
        assert torch.equal(a.x_t, b.x_t)
        assert torch.equal(a.t, b.t)
        assert torch.equal(a.embeddings, b.embeddings)
    assert not torch.isclose(losses[0], losses[1], rtol=1e-3).any()


def test_the_loss_is_the_mean_squared_error_over_the_draws() -> None:
    """With the noise e taken back from x_t = sqrt(abar) x_0 + sqrt(1 - abar) e, an image's loss is the mean of (prediction - e)^2 over pixels and draws."""
    engine = Models()
    pipe = engine.pipes[ROOT.key]
    seen, x_0 = small.witness(pipe), pipe.latents(small.pictures(4))[0]
    losses = held_out_loss(engine, ROOT, DATA, draws=3, least=4)
    expected = []
    for each in seen:
        abar = pipe.schedule.alphas_cumprod[each.t].view(-1, 1, 1, 1)
        expected.append(((each.out - (each.x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()) ** 2).mean((1, 2, 3)))
    assert len(expected) == 3
    assert len({tuple(each.t.tolist()) for each in seen}) == 3
    assert torch.allclose(losses, torch.stack(expected).mean(0), rtol=1e-3)


def test_a_kept_loss_is_found_by_all_that_it_depends_on() -> None:
    """The same question has the same address; another model, other held-out images, another sampler or number of draws has another."""
    engine = Models()
    coarse = Lineage(ROOT.base, replace(tiny.task(), sampler=Sampler(1, 1.0)))
    questions = [(ROOT, DATA, 1), (ROOT, DATA, 1), (TUNED, DATA, 1), (ROOT, Group(("f",), ("a {}",)), 1), (ROOT, DATA, 2), (coarse, DATA, 1)]
    for lineage, data, draws in questions:
        held_out_loss(engine, lineage, data, draws)
    first, again, *others = engine.addresses
    assert first == again
    assert len({first, *others}) == 5


def test_the_held_out_images_are_the_base_models_own_as_many_of_each_prompt() -> None:
    """Whatever lineage is measured, the unedited base model draws them, with the task's sampler, under every prompt of the set."""
    engine = Models()
    held_out_loss(engine, TUNED, DATA, least=3)
    ((lineage, chosen, sampler),) = engine.asked
    assert lineage == ROOT
    assert sampler == tiny.task().sampler
    assert chosen.prompts == ("a f", "the f", "a g", "the g")


@pytest.mark.parametrize(("prompts", "images"), [(1, 30), (4, 32), (29, 58), (30, 30), (31, 31)])
def test_the_held_out_images_are_enough_to_tell_two_models_apart(prompts: int, images: int) -> None:
    """At least thirty, however few the prompts; one of each prompt where these are thirty."""
    data, engine = Group(("f",), tuple(f"{i} {{}}" for i in range(prompts))), Models()
    assert held_out_loss(engine, ROOT, data, draws=1).shape == (images,)
    assert len(set(engine.asked[0][1].seeds)) == images


@pytest.mark.parametrize("seed", range(3))
def test_no_fine_tune_sees_a_held_out_image(seed: int) -> None:
    """The same captions, but no seed in common with the images that a fine-tune of this seed asks for."""
    engine = Models()
    held_out_loss(engine, ROOT, DATA)
    ((_, chosen, _),) = engine.asked
    trained = replace(Finetune(), seed=seed).images(tiny.task())["train"]
    assert set(trained.prompts) == set(chosen.prompts)
    assert not set(trained.seeds) & set(chosen.seeds)
