"""Lineages made, resumed, shared and read back."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from harness import jobs, pipeline, sampling
from harness.engine import Engine
from harness.errors import PreconditionError, SpecError, StoreError
from harness.finetuning import full, lora
from harness.pipeline import denoise
from harness.spec import Base, Group, ImageSet, Lineage, Sampler
from harness.store import RECORD, Store
from harness.unlearning import dimum, esd, uce
from tests import tiny
from tests.conftest import PATIENCE, PROCESSES, die, eventually

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = tiny.task()
SAMPLER = Sampler(steps=3, guidance=3.0)
PROMPTS, SEEDS = ("a x", "a y", "the x", "a x", "a x"), (5, 6, 7, 8, 5)
TRAJECTORIES = {
    "esd-student": esd.Method(lr=1e-2, batch=1, sampler_steps=3, x_t_from="student"),
    "esd-frozen": esd.Method(lr=1e-2, batch=1, sampler_steps=3, x_t_from="frozen"),
    "dimum": dimum.Method(lr=1e-2, batch=1, images_per_prompt=1),
    "full": full.Finetune(lr=1e-2, batch=1, images_per_prompt=1),
    "lora": lora.Finetune(lr=1e-2, batch=1, images_per_prompt=1),
}
ESD, FULL, LORA, UCE = TRAJECTORIES["esd-frozen"], TRAJECTORIES["full"], TRAJECTORIES["lora"], uce.Method()


@dataclass(frozen=True)
class Edit:
    """A stage that multiplies one tensor and adds to it, or fails."""

    tensor: str = "unet.conv_in.weight"
    times: float = 1.0
    plus: float = 0.0
    trains: str = "unet"
    fails: bool = False
    seed: int = 0

    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """None."""
        return {}

    def __call__(self, pipe: Any, task: Any, run: Any) -> None:
        """Edit the tensor, whatever `trains` says."""
        with torch.no_grad():
            pipe.named()[self.tensor].mul_(self.times).add_(self.plus)
        if self.fails:
            raise PreconditionError("this stage never works")


def after(stage: Any, steps: int) -> Any:
    """The stage with that many steps."""
    return dataclasses.replace(stage, steps=steps)


def weights(engine: Engine, lineage: Lineage) -> dict[str, torch.Tensor]:
    """A copy of every weight of the loaded lineage."""
    return {name: p.detach().clone() for name, p in engine.load(lineage).named().items()}


def same(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint's files hold."""
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def losses(folder: Path) -> list[float]:
    """The losses of the run that made a checkpoint."""
    return json.loads((folder / RECORD).read_text())["record"]["losses"]


def artefacts(root: Path) -> list[str]:
    """Whatever lies in the store besides locks."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*") if path.parent.name != "locks")


@pytest.fixture
def root(base):
    """The base model as a lineage."""
    return Lineage(base, TASK)


@pytest.fixture
def engine(tmp_path):
    """An engine on an empty store."""
    return Engine(Store(tmp_path / "store"))


# --- trajectories ----------------------------------------------------------------------------------------------------


def dies_at(store: Path, lineage: Lineage, step: int) -> None:
    """Make a checkpoint, but be killed right after the given step."""
    engine = Engine(Store(store))
    engine._reporter = lambda _: lambda at, *_: die() if at == step else None  # type: ignore[method-assign]
    engine.checkpoint(lineage)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_continued_trajectory_equals_an_unbroken_one(name, root, tmp_path, child):
    """2 steps, then 4, then 6: the same bits as 6 at once, also if the run from 2 to 4 was killed on its way."""
    stage = TRAJECTORIES[name]
    two, four, six = (root.then(after(stage, steps)) for steps in (2, 4, 6))
    folders = {}
    for way, chain in {"unbroken": [six], "chained": [two, four, six], "killed": [two, six]}.items():
        for lineage in chain:
            folders[way] = Engine(Store(tmp_path / way)).checkpoint(lineage)  # a new engine each time: nothing in memory helps
            if (way, lineage) == ("killed", two):
                assert child(dies_at, tmp_path / way, four, 3).wait() == -9
    expected = files(folders["unbroken"])
    assert expected["weights.safetensors"]
    assert expected["state.safetensors"]
    for way in ("chained", "killed"):
        assert all(same(expected[file], tensors) for file, tensors in files(folders[way]).items())
    assert not same(expected["weights.safetensors"], files(Engine(Store(tmp_path / "chained")).folder(two))["weights.safetensors"])
    assert losses(folders["chained"]) == losses(folders["unbroken"])[4:]
    assert losses(folders["killed"]) == losses(folders["unbroken"])[2:]


def test_a_fine_tune_after_unlearning_continues_too(root, tmp_path):
    """The chain on top of a parent: esd, then lora in two parts, equals esd, then lora at once."""
    parent = root.then(after(ESD, 2))
    two, four = (parent.then(after(LORA, steps)) for steps in (2, 4))
    at_once, chained = Engine(Store(tmp_path / "one")), Engine(Store(tmp_path / "two"))
    chained.checkpoint(two)
    assert same(weights(at_once, four), weights(chained, four))
    assert not same(weights(at_once, four), weights(at_once, parent))


def test_a_shorter_snapshot_can_come_later(root, tmp_path):
    """The snapshot at 2 steps is the same whether it was made before or after the one at 4."""
    two, four = (root.then(after(LORA, steps)) for steps in (2, 4))
    early, late = Engine(Store(tmp_path / "early")), Engine(Store(tmp_path / "late"))
    expected = weights(early, two)
    late.checkpoint(four)
    assert same(expected, weights(late, two))


def test_a_run_starts_from_the_longest_shorter_snapshot(root, tmp_path):
    """Of snapshots at 2, 4 and 8 steps, a run to 6 continues the one at 4; a seed's snapshots are its own."""
    engine = Engine(Store(tmp_path))
    for steps in (2, 4, 8):
        engine.checkpoint(root.then(after(FULL, steps)))
    assert len(losses(engine.checkpoint(root.then(after(FULL, 6))))) == 2
    assert len(losses(engine.checkpoint(root.then(dataclasses.replace(FULL, steps=6, seed=1))))) == 6


# --- what is stored --------------------------------------------------------------------------------------------------


def test_only_what_changed_is_saved(root, engine):
    """ESD-x saves cross-attention, UCE keys and values, LoRA its adapter: nothing else."""
    for stage, belongs in ((after(ESD, 1), ".attn2."), (UCE, ".attn2.to_"), (after(LORA, 1), "lora_")):
        saved = load_file(engine.checkpoint(root.then(stage)) / "weights.safetensors")
        assert saved
        assert all(belongs in name for name in saved)
    assert set(load_file(engine.checkpoint(root.then(Edit(plus=1.0))) / "weights.safetensors")) == {Edit.tensor}


def test_a_stage_that_does_nothing_is_a_checkpoint_too(root, engine):
    """Nothing changed, nothing saved, and the same weights come back."""
    assert same(weights(engine, root), weights(engine, root.then(Edit())))
    assert load_file(engine.checkpoint(root.then(Edit())) / "weights.safetensors") == {}


def test_the_record_tells_where_the_weights_come_from(root, engine):
    """Address and stages of the lineage, with what the run cost."""
    lineage = root.then(after(ESD, 2))
    record = json.loads((engine.checkpoint(lineage) / RECORD).read_text())["record"]
    assert lineage.record().items() <= record.items()
    assert {"seconds", "losses", "torch"} == record.keys() - lineage.record().keys()


def test_the_model_itself_is_no_checkpoint(root, engine):
    """A lineage without stages needs nothing from the store."""
    engine.checkpoint(root)
    engine.load(root)
    assert artefacts(engine.store.root) == []


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_loading_in_turn_gives_the_same_weights_each_time(root, engine):
    """Whatever was loaded before: each lineage's weights come back bit for bit, and the base model's with them."""
    erased = root.then(UCE)
    lineages = [root, erased, erased.then(after(LORA, 2)), root.then(after(FULL, 2)), root.then(after(ESD, 2), after(FULL, 2))]
    for lineage in lineages:
        engine.checkpoint(lineage)
    expected = [weights(Engine(engine.store), lineage) for lineage in lineages]
    assert not any(same(one, two) for i, one in enumerate(expected) for two in expected[:i])
    for i in (2, 0, 1, 4, 3, 0, 4, 2, 2, 1, 0):
        assert same(expected[i], weights(engine, lineages[i]))


def test_two_places_of_one_model(root, base, tmp_path, engine):
    """Copies of a model share an address; the second one gets the lineage's weights as well."""
    other = shutil.copytree(base.source, tmp_path / "copy")
    lineage, moved = root.then(UCE), Lineage(pipeline.identify(str(other)), TASK, (UCE,))
    assert lineage.key == moved.key
    assert same(weights(engine, lineage), weights(engine, moved))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A store with one checkpoint of two steps, to be copied and damaged."""
    store = tmp_path_factory.mktemp("trained")
    Engine(Store(store)).checkpoint(Lineage(base, TASK, (after(FULL, 2),)))
    return store


@pytest.mark.parametrize("file", ["weights.safetensors", "state.safetensors", RECORD])
@pytest.mark.parametrize("then", ["load it", "continue it", "build upon it"])
def test_a_damaged_checkpoint_is_not_used(root, trained, tmp_path, file, then):
    """One flipped bit in any of its files: loading it, continuing it and building upon it raise, and make nothing."""
    store = Store(shutil.copytree(trained, tmp_path / "store"))
    lineage, before = root.then(after(FULL, 2)), artefacts(store.root)
    path = Engine(store).folder(lineage) / file
    data = bytearray(path.read_bytes())
    data[data.index(b'"files"') + 1 if file == RECORD else -40] ^= 1
    path.write_bytes(data)
    wanted = {"load it": lineage, "continue it": root.then(after(FULL, 4)), "build upon it": lineage.then(UCE)}
    with pytest.raises(StoreError, match="delete the folder and run again"):
        Engine(store).load(wanted[then])
    assert artefacts(store.root) == before


# --- what is refused -------------------------------------------------------------------------------------------------


CHANGES = [
    Edit("unet.conv_in.weight", plus=1.0),
    Edit("unet.conv_in.weight", times=-1.0),  # every sign
    Edit("unet.conv_norm_out.weight", times=1.5),  # all ones
    Edit("unet.conv_norm_out.bias", plus=-0.25),  # all zeros
    Edit("vae.encoder.conv_in.weight", times=0.0, plus=0.1),
    Edit("text_encoder.final_layer_norm.weight", plus=0.5),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda edit: f"{edit.tensor}*{edit.times}+{edit.plus}")
def test_a_stage_that_changes_more_than_it_says_is_refused(root, engine, change):
    """Whatever it does to a tensor outside `trains`: the tensor is named, nothing is kept, and the next model is clean."""
    expected = weights(engine, root)
    with pytest.raises(StoreError, match=f"says it trains 'x' but it changed '{change.tensor}' too"):
        engine.checkpoint(root.then(dataclasses.replace(change, trains="x")))
    assert artefacts(engine.store.root) == []
    assert same(expected, weights(engine, root))


def test_a_stage_may_change_what_it_says(root, engine):
    """The control of the test above: the same edit under a group that holds the tensor."""
    assert not same(weights(engine, root), weights(engine, root.then(Edit(plus=1.0, trains="unet"))))


def test_a_stage_that_fails_halfway_leaves_nothing(root, engine):
    """Neither in the store nor in memory."""
    expected = weights(engine, root)
    with pytest.raises(PreconditionError, match="never works"):
        engine.checkpoint(root.then(Edit("vae.encoder.conv_in.weight", plus=1.0, fails=True)))
    assert artefacts(engine.store.root) == []
    assert same(expected, weights(engine, root))


@pytest.mark.parametrize("stage", [dataclasses.replace(FULL, lr=1e30, steps=3), dataclasses.replace(ESD, lr=1e30, steps=3), Edit(times=3e38, plus=3e38)])
def test_weights_that_are_not_numbers_are_refused(root, engine, stage):
    """A loss that becomes NaN, and weights that do: PreconditionError, nothing half-written, and the model is intact."""
    expected = weights(engine, root)
    with pytest.raises(PreconditionError, match=r"smaller (lr|learning rate)"):
        engine.checkpoint(root.then(stage))
    assert [name for name in artefacts(engine.store.root) if name.startswith("checkpoints")] == []
    assert same(expected, weights(engine, root))


def with_a_full_disk(store: Path, lineage: Lineage) -> str:
    """Make a checkpoint where no file can grow beyond 4 kB, as on a full disk."""
    engine = Engine(Store(store))
    engine.load(Lineage(lineage.base, lineage.task))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        engine.checkpoint(lineage)
    except StoreError as error:
        return str(error)
    return "no error"


def test_a_full_disk_is_a_store_error(root, tmp_path, child):
    """What the system refuses to write is said in words, and nothing half-written stays."""
    assert "is the disk full or read-only?" in child(with_a_full_disk, tmp_path, root.then(UCE)).result()
    assert artefacts(tmp_path) == []


# --- working together ------------------------------------------------------------------------------------------------


class Logging(Store):
    """A store that writes down what this process publishes."""

    def publish(self, folder: Path, write: Any) -> None:
        """Publish, and log it."""
        with (self.root / "log").open("a") as log:
            log.write(f"{folder.name}\n")
        super().publish(folder, write)


def builds(store: Path, start: Any, lineages: list[Lineage]) -> tuple[dict[str, str], dict[str, int]]:
    """Build them together with others; the failures and the costs."""
    engine = Engine(Logging(store))
    engine.load(Lineage(lineages[0].base, lineages[0].task))
    start.wait(PATIENCE)
    failures = engine.build(iter(lineages), [(lineages[-1], (ImageSet(PROMPTS, SEEDS), SAMPLER))])
    return {key: f"{type(error).__name__}: {error}" for key, error in failures.items()}, engine.cost()


def test_two_processes_share_the_work(root, tmp_path, child):
    """Each checkpoint is made once in total, each failure is reported to both, and the others are there."""
    erased, broken = root.then(after(ESD, 2)), root.then(Edit(fails=True))
    good = [erased, *(parent.then(after(LORA, steps)) for parent in (root, erased) for steps in (2, 4)), erased.then(after(FULL, 2)), root.then(UCE)]
    bad = [broken, broken.then(after(LORA, 2))]
    start = PROCESSES.Barrier(2)
    results = [each.result() for each in [child(builds, tmp_path, start, [*bad, *good]) for _ in range(2)]]
    engine = Engine(Store(tmp_path))
    assert all(engine.store.has(engine.folder(lineage)) for lineage in good)
    assert not any(engine.store.has(engine.folder(lineage)) for lineage in bad)
    made = Counter((tmp_path / "log").read_text().split())
    assert set(made.values()) == {1}
    assert {engine.folder(lineage).name for lineage in good} < set(made)
    drawn = [len(load_file(path)["images"]) for path in tmp_path.glob("images/*/images.safetensors")]
    assert len(drawn) == 2
    assert sum(cost["images"] for _, cost in results) == sum(drawn)
    for failures, _ in results:
        assert failures == dict.fromkeys([lineage.key for lineage in bad], "PreconditionError: this stage never works")
    alone = Engine(Store(tmp_path / "alone"))
    assert all(same(weights(alone, lineage), weights(engine, lineage)) for lineage in good)


def alone(store: Path, lineages: list[Lineage]) -> int:
    """Build them; the number of failures."""
    return len(Engine(Store(store)).build(lineages))


def test_a_builder_does_what_is_free_and_waits_for_the_rest(root, tmp_path, child):
    """What another process holds comes last; if that one goes away without having made it, it is made here."""
    taken, free, store = root.then(UCE), root.then(Edit(plus=1.0)), Store(tmp_path)
    with store.lease(taken.trajectory):
        waiting = child(alone, tmp_path, [taken, free])
        assert eventually(lambda: store.has(Engine(store).folder(free)))
        assert not waiting.receiver.poll(0.5)
        assert artefacts(tmp_path) == [f"checkpoints/{free.trajectory}-0"]
    assert waiting.result() == 0
    assert store.has(Engine(store).folder(taken))


def test_a_failure_names_every_lineage_that_needed_it(root, engine):
    """In one process too: the failed stage and what follows it, by key; a generator will do as a list."""
    broken = root.then(Edit(fails=True))
    failures = engine.build(lineage for lineage in (broken.then(UCE), root.then(UCE), broken))
    assert failures.keys() == {broken.key, broken.then(UCE).key}
    assert engine.store.has(engine.folder(root.then(UCE)))


# --- images and scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_an_image_does_not_depend_on_its_batch(pipe, batch):
    """The initial noise of a seed is the same bits in every batch and place; the images agree up to rounding."""
    whole = sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER)
    drawn = sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER, batch=batch)
    backwards = sampling.draw(pipe, PROMPTS[::-1], SEEDS[::-1], SAMPLER, batch=batch).flip(0)
    for images in (drawn, backwards):
        assert (images.int() - whole.int()).abs().max() <= 1  # of 255
    assert torch.equal(sampling.noise(pipe, SEEDS), sampling.noise(pipe, SEEDS[::-1]).flip(0))
    assert torch.equal(sampling.noise(pipe, SEEDS)[:1], sampling.noise(pipe, SEEDS[:1]))


def test_latents_do_not_depend_on_their_batch(pipe):
    """Before rounding to uint8: latents of one prompt and seed are close wherever they stand."""
    x_T, cond = sampling.noise(pipe, SEEDS), pipe.encode(PROMPTS)
    null = pipe.encode([""]).expand(len(PROMPTS), -1, -1)
    together, _ = denoise(pipe, x_T, cond, null, SAMPLER)
    alone = torch.cat([denoise(pipe, x_T[i : i + 1], cond[i : i + 1], null[:1], SAMPLER)[0] for i in range(len(PROMPTS))])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together[0], together[4])
    assert (together[0] - together[3]).abs().max() > 0.1


def test_seed_and_prompt_make_the_image(pipe):
    """Same prompt and seed, same image; another seed or another prompt, another image."""
    images = sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 3, 16, 16)
    assert (images[0].int() - images[4].int()).abs().max() <= 1
    assert not torch.equal(images[0], images[3])
    other = sampling.draw(pipe, ("qqqqq zzzzz",), SEEDS[:1], Sampler(steps=3, guidance=60.0))
    assert not torch.equal(images[0], other[0])


def test_images_are_drawn_once(root, tmp_path):
    """A second process finds them, and counts a hit instead of images; another sampler is another set."""
    chosen = ImageSet(PROMPTS, SEEDS)
    first, second = Engine(Store(tmp_path)), Engine(Store(tmp_path))
    folder = first.images(root, (chosen, SAMPLER))
    assert [first.images(root, (chosen, SAMPLER)), *(second.images(root, (chosen, SAMPLER)) for _ in range(2))] == [folder] * 3
    assert torch.equal(first.read_images(folder), second.read_images(folder))
    assert first.images(root, (chosen, dataclasses.replace(SAMPLER, steps=2))) != folder
    assert (first.cost()["images"], first.cost()["cache_hits"]) == (10, 0)
    assert second.cost() == {"unet_passes": 0, "images": 0, "cache_hits": 1}


def test_unet_passes_are_counted(root, engine):
    """Five images in three steps under guidance are 30 passes, and stay counted when the model is dropped."""
    engine.images(root, (ImageSet(PROMPTS, SEEDS), SAMPLER))
    assert engine.cost()["unet_passes"] == 2 * 3 * 5
    engine.load(Lineage(Base("other", root.base.source), TASK))
    assert engine.cost()["unet_passes"] == 2 * 3 * 5


class Detector:
    """Gives the mean of each colour."""

    address = "mean colour"

    def __init__(self, worst: float = 0.0) -> None:
        self.worst, self.looked = worst, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (n, 3)."""
        self.looked += len(images)
        return images.mean((2, 3)) + self.worst


def test_scores_are_taken_once(root, engine):
    """The detector sees images in [0, 1], once; the second answer comes from the store."""
    wanted, detector = (ImageSet(PROMPTS, SEEDS), SAMPLER), Detector()
    first, second = (engine.scores(root, wanted, detector) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, engine.read_images(engine.images(root, wanted)).float().div(255).mean((2, 3)))
    assert detector.looked == 5


def test_scores_that_are_not_numbers_are_refused(root, engine):
    """A detector that gives NaN makes the measurement invalid, and nothing is kept."""
    with pytest.raises(PreconditionError, match="detector mean colour gave scores that are not finite"):
        engine.scores(root, (ImageSet(PROMPTS, SEEDS), SAMPLER), Detector(float("nan")))
    assert not [name for name in artefacts(engine.store.root) if name.startswith("scores")]


def test_pictures_are_the_first_images(root, engine):
    """PNG files of the images, in their order, for people to look at."""
    wanted = (ImageSet(PROMPTS, SEEDS), SAMPLER)
    paths = engine.pictures(root, wanted, 2)
    assert [Path(path).name for path in paths] == ["000.png", "001.png"]
    assert engine.pictures(root, wanted, 2) == paths
    images = engine.read_images(engine.images(root, wanted))
    for path, image in zip(paths, images, strict=False):
        assert Image.open(path).tobytes() == image.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_a_stage_gets_the_images_it_asks_for_from_the_base_model(root, engine):
    """A fine-tune after unlearning learns from what the model drew before it."""
    erased = root.then(Edit(plus=1.0))
    engine.checkpoint(erased.then(after(FULL, 1)))
    wanted = (ImageSet.of(Group(("f", "g"), ("a {}", "the {}")), 1, 0), TASK.sampler)
    folders = [path.name for path in (engine.store.root / "images").iterdir()]
    assert folders == [Engine(engine.store).images(root, wanted).name]


def test_a_stage_that_learns_from_images_and_hides_their_sampler_is_refused(base):
    """Its address would be that of a model made from other images."""

    class Forgetful(lora.Finetune):
        reads: ClassVar[tuple[str, ...]] = ("finetune",)

    with pytest.raises(SpecError, match="add 'sampler' to `reads`"):
        jobs.needed(Lineage(base, tiny.task(), (Forgetful(),)))
