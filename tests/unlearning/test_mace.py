"""MACE: the refinement, one LoRA per concept that looks away inside a mask, and their fusion, on the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe, group
from harness.spec import Base, Lineage
from harness.unlearning import _mace_closed
from harness.unlearning._mace_lora import Lora, energy, focal, shrink
from harness.unlearning.mace import Method
from tests import tiny
from tests.unlearning import _small as small

CALM = settings(deadline=None, max_examples=50)
KV = group("unet.xattn_kv")
QUICK = Method(lora_steps=2, lora_lr=1e-2, images_per_concept=2, segmenter="whole")


def asking(*erased: str, anchor: str = "p", retain: tuple[str, ...] = ("k", "l")) -> Any:
    """The tiny task with other names."""
    task = tiny.task()
    return replace(
        task, erased=replace(task.erased, concepts=erased), anchor=replace(task.anchor, concepts=(anchor,)), retain=replace(task.retain, concepts=retain)
    )


def kv(stage: Method, task: Any = None) -> dict[str, Tensor]:
    """Keys and values after a stage."""
    return small.weights(small.after(stage, task)[0], KV)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """How far two sets of weights are apart."""
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


# --- what a run does --------------------------------------------------------------------------------------------------


def test_every_key_and_value_moves_and_nothing_else() -> None:
    """All of `unet.xattn_kv`, bit for bit only that; one loss for each of two concepts' steps; no state to go on from."""
    before = small.weights(small.pipe())
    model, run = small.after(QUICK)
    assert small.moved(before, small.weights(model)) == {name for name in before if KV(name)}
    assert len(run.losses) == 2 * QUICK.lora_steps
    assert run.state == {}


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")  # the counter's hook: the picture itself needs no gradient
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_costs_one_forward_and_one_backward_pass_of_its_images(batch: int) -> None:
    """1F + 1B per image, two concepts, two steps each; refinement, masks and fusion ask the UNet nothing."""
    model = small.pipe()
    seen = small.witness(model)
    backwards: list[int] = []
    model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.register_full_backward_hook(lambda *_: backwards.append(1))
    small.after(replace(QUICK, lora_batch=batch), model=model)
    assert model.passes == 2 * QUICK.lora_steps * batch
    assert len(seen) == len(backwards) == 2 * QUICK.lora_steps
    assert all(each.learns for each in seen)


def test_the_loras_learn_on_the_refined_weights_and_see_noised_images_of_their_concept() -> None:
    """During the steps the weights are W M, not W; the embeddings are those of one concept's prompts, first x, then y;
    y's draws are not x's again.
    """
    model, task = small.pipe(), tiny.task()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    w = model.named()[name].detach().clone()
    pairs = [_mace_closed.coexisting(model, template, c, "p") for c in task.erased.concepts for template in task.erased.prompts]
    m = _mace_closed.refinement(pairs, QUICK._prior(model, task), QUICK.lam1, QUICK.ridge)
    seen = small.witness(model, name)
    small.after(QUICK, task, model)
    assert all(torch.allclose(each.weight, (w.double() @ m).float(), atol=1e-6) for each in seen)
    assert [each.t.tolist() for each in seen[:2]] != [each.t.tolist() for each in seen[2:]]
    for each, concept in zip(seen, "xxyy", strict=True):
        assert any(torch.equal(each.embeddings[0], e) for e in model.encode(task.erased.asking(concept)))


def test_no_concept_is_no_change() -> None:
    """An empty request: bit for bit the weights as they were, and no UNet pass."""
    model, before = small.pipe(), small.weights(small.pipe())
    task = SimpleNamespace(erased=SimpleNamespace(concepts=()), anchor=tiny.task().anchor, retain=tiny.task().retain)
    QUICK(model, task, small.run(model, QUICK, task))
    assert small.same(before, small.weights(model))
    assert model.passes == 0


@pytest.mark.parametrize("mapping", ["y", "Y", " y"])
def test_a_mapping_that_is_the_concept_is_refused(mapping: str) -> None:
    """An error and no silent no-op, also for what the tokenizer reads as the same name; the weights stay."""
    model, before = small.pipe(), small.weights(small.pipe())
    with pytest.raises(SpecError, match="choose another `mapping`"):
        small.after(replace(QUICK, mapping=mapping), model=model)
    assert small.same(before, small.weights(model))


@pytest.mark.parametrize(
    "change",
    [
        {"mapping": "q"}, {"lam1": 1.0}, {"lam1": 0.0}, {"lam2": 1.0}, {"lam3": 50.0}, {"ridge": 1.0}, {"rank": 2}, {"lora_steps": 0},
        {"lora_lr": 1e-3}, {"lora_batch": 2}, {"tokens": "tail"}, {"timesteps": "uniform"}, {"t1": 100}, {"t2": 500}, {"segmenter": "border"}, {"seed": 1},
    ],
)  # fmt: skip
def test_every_term_matters(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Signature: mapping, prior, ridge, LoRA, its tokens, its timesteps, its mask: without or with another, the weights differ."""
    half = torch.zeros(1, 16, 16, dtype=torch.bool)
    half[:, 4:] = True
    monkeypatch.setattr("harness.unlearning._segment.border", lambda images: half.expand(len(images), -1, -1))
    stage = replace(QUICK, lora_lr=0.05)
    assert far(kv(stage), kv(replace(stage, **change))) > 1e-5


def test_the_refinement_the_retained_names_and_the_task_s_anchor_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchor is the mapping unless one is given; other retained names give other weights; so does leaving stage 1 out."""
    stage = replace(QUICK, lam1=1e-2)
    default = kv(stage)
    assert small.same(default, kv(replace(stage, mapping="p")))
    assert small.same(kv(stage, asking("x", "y", anchor="q")), kv(replace(stage, mapping="q")))
    assert far(default, kv(stage, asking("x", "y", retain=("m", "n")))) > 1e-5
    monkeypatch.setattr("harness.unlearning.mace.refinement", lambda pairs, prior, lam1, ridge: torch.eye(len(prior), dtype=torch.float64))
    assert far(default, kv(stage)) > 1e-3


def test_lambda_1_keeps_the_weights_near() -> None:
    """Over the values of arXiv 2410.08074 the refinement alone moves W the less the larger lam1, and 0 is a number too."""
    before, distances = small.weights(small.pipe(), KV), []
    for lam1 in (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        distances.append(far(before, kv(replace(QUICK, lam1=lam1, lam2=0.0, lora_steps=0), asking("x"))))
    assert distances == sorted(distances, reverse=True)
    assert math.isfinite(distances[0])
    assert distances[-1] < 0.5 * distances[0]


def test_erasing_in_another_order_gives_the_same_model() -> None:
    """Each LoRA and each image depends on its concept's name, not on its place: y then x is x then y up to rounding."""
    results = []
    for names in (("x", "y"), ("y", "x")):
        model, task = small.pipe(), asking(*names)
        run = small.run(model, QUICK, task)
        run.images = {"concepts": torch.cat([small.pictures(2, seed=ord(name)) for name in names])}
        QUICK(model, task, run)
        results.append(small.weights(model, KV))
    assert far(*results) < 1e-4 * far(results[0], small.weights(small.pipe(), KV))
    one, two = (set(zip((s := QUICK.images(asking(*n))["concepts"]).prompts, s.seeds, strict=True)) for n in (("x",), ("y", "x")))
    assert one < two


def test_with_one_concept_and_no_prior_the_fusion_is_the_lora_on_its_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam2 = 0: W* e = (W' + up down) e for every token e of the concept's prompts, in every layer; and no LoRA is nothing,
    but for the last layer's values, which no attention depends on.
    """
    model, task, kept = small.pipe(), asking("x"), {}
    trained = Method._trained

    def keeping(self: Method, pipe: Pipe, *args: Any) -> Lora:
        kept["lora"], kept["refined"] = trained(self, pipe, *args), small.weights(pipe, KV)
        return kept["lora"]

    monkeypatch.setattr(Method, "_trained", keeping)
    small.after(replace(QUICK, lam1=0.1, lam2=0.0, lora_lr=0.1, lora_steps=4), task, model)
    e = model.encode(task.erased.asking("x")).flatten(0, 1)
    idle = [name for name, (up, down) in kept["lora"].loras().items() if (e @ down.T @ up.T).norm() < 1e-2]
    assert [(name.split(".")[1], name.split(".")[-2]) for name in idle] == [("up_blocks", "to_v")]
    for name, (up, down) in kept["lora"].loras().items():
        assert torch.allclose(e @ model.named()[name].T, e @ (kept["refined"][name] + up @ down).T, atol=1e-4)


def test_the_loss_falls() -> None:
    """Thirty steps at one image: the attention to the phrase inside the mask is smaller at the end."""
    _, run = small.after(replace(QUICK, lora_steps=30, lora_lr=0.05, lora_batch=4), asking("x"))
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])


def test_without_lora_steps_no_image_and_no_segmenter_is_asked_for() -> None:
    """The closed forms alone: no images, no pass, no download, and the fused weights differ from the refined ones only by the prior's pull."""
    stage, model = replace(QUICK, lora_steps=0, segmenter="grounded_sam", lam2=0.0), small.pipe()
    assert stage.images(tiny.task()) == {}
    before = small.weights(model, KV)
    small.after(stage, model=model)
    assert model.passes == 0
    pairs = [_mace_closed.coexisting(model, template, c, "p") for c in "xy" for template in tiny.task().erased.prompts]
    m = _mace_closed.refinement(pairs, stage._prior(model, tiny.task()), stage.lam1, stage.ridge)
    assert all(torch.allclose(model.named()[name], (w.double() @ m).float(), atol=1e-5) for name, w in before.items())


def test_eight_images_of_each_concept_under_its_prompts_in_turn() -> None:
    """As in the paper: 8 each, here four of each of two prompts, every seed once."""
    drawn = Method().images(tiny.task())["concepts"]
    assert drawn.prompts == ("a x", "the x") * 4 + ("a y", "the y") * 4
    assert len(set(drawn.seeds)) == 16


# --- timesteps --------------------------------------------------------------------------------------------------------


@CALM
@given(t1=st.integers(50, 500), width=st.integers(20, 400), gamma=st.floats(0.02, 0.2))
def test_the_timesteps_follow_the_formula(t1: int, width: int, gamma: float) -> None:
    """xi sums to 1, is nowhere negative, is largest midway between t1 and t2, and relative to there follows the two sigmoids."""
    t2 = t1 + 2 * (width // 2)
    xi, middle = focal(t1, t2, 1000, gamma), (t1 + t2) // 2
    assert xi.sum().item() == pytest.approx(1)
    assert xi.min() >= 0
    assert xi.max().item() == pytest.approx(xi[middle].item())
    for t in (t1 - 40, t1, t1 + 7, t2):
        by_hand = [1 / (1 + math.exp(-gamma * (at - t1))) - 1 / (1 + math.exp(-gamma * (at - t2))) for at in (t, middle)]
        assert (xi[t] / xi[middle]).item() == pytest.approx(by_hand[0] / by_hand[1], rel=1e-6)


def test_most_timesteps_of_the_paper_lie_between_200_and_400() -> None:
    """The paper's density: mean 300, 86 % in [200, 400]; 2000 drawn by a run say the same, uniform ones do not."""
    xi = focal(200, 400, 1000)
    assert (xi * torch.arange(1000)).sum().item() == pytest.approx(300, abs=0.5)
    assert xi[200:401].sum().item() == pytest.approx(0.86, abs=0.01)
    shares = {}
    for kind in ("focal", "uniform"):
        stage, model, task = replace(QUICK, timesteps=kind, lora_batch=500), small.pipe(), asking("x")
        batch_at = stage._batches(model, task, "x", small.pictures(2), torch.ones(2, 16, 16, dtype=torch.bool))
        t = torch.cat([batch_at(torch.Generator().manual_seed(i))[1] for i in range(4)])
        shares[kind] = ((t >= 200) & (t <= 400)).float().mean().item()
    assert shares["focal"] == pytest.approx(0.86, abs=0.03)
    assert shares["uniform"] == pytest.approx(0.20, abs=0.03)


# --- attention --------------------------------------------------------------------------------------------------------


def layer() -> Attention:
    """Two heads of width 3."""
    return Attention(query_dim=6, cross_attention_dim=6, heads=2, dim_head=3)


def drawn(seed: int, images: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, mask and phrase of `images` images, 5 positions, 4 tokens."""
    rng = torch.Generator().manual_seed(seed)
    query, key = torch.randn(images, 5, 6, generator=rng), torch.randn(images, 4, 6, generator=rng)
    return query, key, torch.rand(images, 5, generator=rng) < 0.5, torch.rand(images, 4, generator=rng) < 0.5


@CALM
@given(seed=st.integers(0, 10_000))
def test_the_energy_is_the_squared_attention_to_the_phrase_inside_the_mask(seed: int) -> None:
    """By hand: softmax(q k^T / sqrt 3) of each head, masked, squared, summed; the mean over images."""
    query, key, inside, phrase = drawn(seed)
    total = 0.0
    for head in (slice(0, 3), slice(3, 6)):
        attention = (query[..., head] @ key[..., head].mT / math.sqrt(3)).softmax(-1)
        total += (attention * inside[:, :, None] * phrase[:, None]).square().sum().item()
    assert energy(layer(), query, key, inside, phrase).item() == pytest.approx(total / 2, rel=1e-4, abs=1e-7)


@CALM
@given(seed=st.integers(0, 10_000))
def test_the_energy_is_zero_if_and_only_if_the_attention_inside_is(seed: int) -> None:
    """With the phrase's keys far against every query inside, its attention there is 0 and so is the energy, whatever is outside; otherwise both are above 0."""
    _, key, inside, phrase = drawn(seed)
    inside[:, 0], inside[:, 1], phrase[:, 0], phrase[:, 1] = True, False, True, False
    query = torch.where(inside[..., None], torch.ones(2, 5, 6), -torch.ones(2, 5, 6))
    away = torch.where(phrase[..., None], torch.full_like(key, -200.0), key)
    assert energy(layer(), query, away, inside, phrase) == 0
    assert energy(layer(), query, away, ~inside, phrase) > 0
    assert energy(layer(), query, key, inside, phrase) > 0
    assert energy(layer(), query, key, torch.zeros_like(inside), phrase) == 0


@contextmanager
def watched(model: Pipe) -> Iterator[list[Tensor]]:
    """The attention maps (heads, positions, context) of every cross-attention of later passes, from diffusers' own processor."""
    maps: list[Tensor] = []
    model.unet.set_attn_processor(AttnProcessor())
    for name, attn in model.unet.named_modules():
        if isinstance(attn, Attention) and name.endswith("attn2"):
            plain = attn.get_attention_scores
            attn.get_attention_scores = lambda *args, f=plain: maps.append(f(*args)) or maps[-1]  # type: ignore[func-returns-value,misc]
    yield maps


def strong(model: Pipe, rank: int = 1) -> Lora:
    """A LoRA that does something."""
    lora, rng = Lora(model, rank, torch.Generator().manual_seed(3)), torch.Generator().manual_seed(4)
    for up, _ in lora.factors.values():
        up.data = torch.randn(up.shape, generator=rng)
    return lora


def test_the_watched_attention_is_the_one_of_the_pass_with_the_lora_in_it() -> None:
    """Every layer's energy equals that of the maps that diffusers computes with the weights W + up down, masks shrunk to the map."""
    model, merged = small.pipe(), small.pipe()
    x, t, e = torch.randn(1, 4, 4, 4), torch.tensor([300]), model.encode(["the x"])
    mask, phrase = torch.zeros(1, 16, 16, dtype=torch.bool), torch.zeros(1, 16, dtype=torch.bool)
    mask[:, 4:, :9], phrase[:, 4] = True, True
    lora = strong(model)
    with lora.attached(), torch.no_grad():
        lora.watch(mask, phrase)
        out = model.predict(x, t, e)
    merged.apply({name: merged.named()[name] + up @ down for name, (up, down) in lora.loras().items()})
    with watched(merged) as maps, torch.no_grad():
        expected = merged.predict(x, t, e)
    assert torch.allclose(out, expected, atol=1e-4)
    by_hand = [(each * shrink(mask, (s := math.isqrt(each.shape[1]), s)).view(1, -1, 1) * phrase[:, None]).square().sum().item() for each in maps]
    assert [each.item() for each in lora.energies] == pytest.approx(by_hand, rel=1e-3)
    assert len(by_hand) == len(lora.layers) == 4


def test_a_fresh_lora_changes_nothing_and_a_detached_one_neither() -> None:
    """up = 0: the model's own output bit for bit; after `attached` no trace."""
    model = small.pipe()
    given_ = torch.randn(1, 4, 4, 4), torch.tensor([300]), model.encode(["x"])
    plain = model.predict(*given_)
    for lora in (Lora(model, 1, torch.Generator().manual_seed(0)), strong(model)):
        lora.watch(torch.ones(1, 16, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool))
        with lora.attached():
            assert torch.equal(model.predict(*given_), plain) is not bool(next(iter(lora.factors.values()))[0].any())
        assert torch.equal(model.predict(*given_), plain)


def test_a_mask_shrinks_to_where_half_of_it_is() -> None:
    """4 x 4 to 2 x 2: two of four pixels are enough, one is not."""
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]]], dtype=torch.bool)
    assert shrink(mask, (2, 2)).tolist() == [[[True, False], [True, False]]]


@pytest.mark.parametrize(("tokens", "places"), [("phrase", [4, 5]), ("tail", [4, 5, 8, 9, 10, 11, 12, 13, 14, 15])])
def test_which_tokens_are_suppressed(tokens: Any, places: list[int]) -> None:
    """ "the xy in" is start t h e x y i n end: the name is at 4 and 5, the end token at 8, padding behind it."""
    assert replace(QUICK, tokens=tokens)._phrase(small.pipe(), "the {} in", "xy").nonzero().flatten().tolist() == places


# --- what cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"), ({"lora_steps": -1}, "lora_steps"), ({"lora_batch": 0}, "lora_batch"), ({"lam1": -1.0}, "lam1"),
        ({"images_per_concept": 0}, "images_per_concept"), ({"t1": 400}, "t1 must be below t2"),
        ({"prior_file": "nowhere.txt"}, "one prompt a line"),
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(change: dict[str, Any], says: str) -> None:
    """An error names the field, what it was and what it may be."""
    with pytest.raises(SpecError, match=says):
        replace(QUICK, **change)


def test_images_without_a_mask_are_left_out_and_none_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One empty mask of two: the other image is always drawn. Both empty: the error names segmenter, concept and the way out."""
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    model, pictures = small.pipe(), small.pictures(2)
    with pytest.raises(PreconditionError, match=r"segmenter 'whole' finds 'x' in none of its 2 images; try segmenter=whole"):
        QUICK._batches(model, asking("x"), "x", pictures, masks)
    masks[1, 3:] = True
    looked: list[Tensor] = []
    latents = model.latents
    monkeypatch.setattr(model, "latents", lambda images: looked.append(images) or latents(images))
    batch_at = QUICK._batches(model, asking("x"), "x", pictures, masks)
    assert torch.equal(looked[0], pictures[1:])
    assert all(torch.equal(batch_at(torch.Generator().manual_seed(i))[3], masks[1:]) for i in range(5))


def test_a_sample_has_the_mask_of_its_image_and_the_phrase_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images (latents +10 and -10) with two masks, two prompts with the name at 2 and at 4: never mixed up, and all of them drawn."""
    model, task = small.pipe(), asking("x")
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 8:] = True, True
    ends = torch.tensor([10.0, -10.0]).view(2, 1, 1, 1).expand(2, 4, 4, 4)
    monkeypatch.setattr(model, "latents", lambda images: (ends, torch.zeros_like(ends)))
    batch = replace(QUICK, lora_batch=32)._batches(model, task, "x", small.pictures(2), masks)(torch.Generator().manual_seed(0))
    first = batch[0].flatten(1).mean(1) > 0
    assert torch.equal(first, batch[3][:, 0, 0])
    place = [2 if torch.equal(e, model.encode(["a x"])[0]) else 4 for e in batch[2]]
    assert batch[4].int().argmax(1).tolist() == place
    assert set(place) == {2, 4}
    assert first.any()
    assert not first.all()


def test_the_fusion_is_over_the_concepts_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prior's two, one Gram a concept, of its prompts and nothing else."""
    asked: list[list[str]] = []
    monkeypatch.setattr("harness.unlearning.mace.gram", lambda pipe, prompts: asked.append(list(prompts)) or _mace_closed.gram(pipe, prompts))
    small.after(QUICK)
    assert asked == [[""], ["k", "a k", "the k", "l", "a l", "the l"], ["a x", "the x"], ["a y", "the y"]]


def test_a_loss_that_is_no_number_names_its_field() -> None:
    """A learning rate beyond all bounds: the error says which LoRA, which step and which field."""
    with pytest.raises(PreconditionError, match=r"LoRA of 'x'.*became nan at step \d.*`lora_lr`"):
        small.after(replace(QUICK, lora_lr=1e30, lora_steps=5), asking("x"))


def test_a_prior_file_is_read_and_its_bytes_are_the_address(tmp_path: Path) -> None:
    """Other lines, other weights and another key; another path with the same bytes, the same key; blank lines are no prompts."""
    files = [tmp_path / name for name in "abc"]
    for file, text in zip(files, ("m\n\nn\n", "m\n\nn\n", "o\n"), strict=True):
        file.write_text(text, encoding="utf-8")
    one, same, other = (replace(QUICK, lam1=0.1, prior_file=str(file)) for file in files)
    keys = [Lineage(Base("d", ""), tiny.task(), (stage,)).key for stage in (one, same, other, replace(QUICK, lam1=0.1))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert far(kv(one), kv(other)) > 1e-5
    model = small.pipe()
    extra = one._prior(model, tiny.task()) - replace(QUICK)._prior(model, tiny.task())
    assert torch.allclose(extra, _mace_closed.gram(model, ["m", "n"]))
    with pytest.raises(SpecError, match="prior_digest without prior_file"):
        small.after(replace(QUICK, prior_digest=one.prior_digest))
    with pytest.raises(SpecError, match="another file"):
        replace(QUICK, prior_file=str(files[2]), prior_digest=one.prior_digest)
