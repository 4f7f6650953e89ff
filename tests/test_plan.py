"""What a plan says against what is then made, with the real claims on a tiny model; and the plan's stages done one by one from files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fixtures import planning
from fixtures.claims import blank, measured
from fixtures.lab import LOOKS, Lab
from fixtures.options import CLAIMS, Cell
from fixtures.planning import Noting, Rehearsal
from harness import catalogue, devices, jobfiles, jobs, pipeline, plan
from harness.__main__ import main
from harness.candidate import Candidate
from harness.engine import Engine
from harness.errors import PreconditionError, SpecError, StoreError
from harness.jobs import Job
from harness.meta.meta import Method as Meta
from harness.plan import Cost
from harness.spec import HOLDS, Base, ImageSet, Lineage, Quality, Sampler, Tolerance
from harness.store import Store
from harness.unlearning import dimum, uce
from tests import tiny
from tests.test_contract import execute, model
from tests.test_options import parsed

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
TASK = replace(tiny.task(), control="uce", tolerance=Tolerance(floor=12, cap=12), quality=Quality(fid=1e6, count=20, backbone="pocket"))
METHODS = "uce,dimum:steps=2:batch=1:images_per_prompt=1"
FINETUNE = "lora-in:batch=1:images_per_prompt=1"


class Eyes:
    """A detector without weights; `shown` is the label that it sees everywhere, None: whatever the picture's colour says."""

    address, description, labels, none = "eyes", "eyes", ("x", "y", "r", "s", "none"), "none"

    def __init__(self, shown: int | None) -> None:
        self.shown = shown

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Scores (n, 5)."""
        places = (images.mean((1, 2, 3)) * 1e4).long() % 5 if self.shown is None else torch.full((len(images),), self.shown)
        return torch.nn.functional.one_hot(places, 5).float()


class Undecided(Lab):
    """A lab that draws and looks, and then goes on whatever it saw."""

    def _rate(self, *question: Any, **more: Any) -> Any:
        return replace(super()._rate(*question, **more), word=HOLDS)

    def _learns(self, cell: Cell) -> None:
        """The first look."""
        self._held_out(cell, LOOKS[0])

    def comes_back(self, cell: Cell) -> None:
        """Both rates of the control, whatever they are."""
        with suppress(PreconditionError):
            super().comes_back(cell)


@pytest.fixture
def selection(tiny_folder):
    """The command line and its cells: two methods, a fine-tune at two steps, every claim."""
    written = ("--model", str(tiny_folder), "--method", METHODS, "--finetune", FINETUNE, "--steps", "2,4", "--profile", "smoke")
    options = parsed(*written)
    return options, [cell for claim in CLAIMS for cell in options.cells(claim, TASK)]


def planned(selection: Any, store: Store) -> Noting:
    """The plan, noted."""
    options, cells = selection
    noting = Noting(store)
    lab = Rehearsal(options, TASK, noting)
    lab.prepare(cells)
    for cell in cells:
        measured(lab, cell, blank("", "", cell, options, TASK))
    return noting


def done(selection: Any, store: Store, shown: int | None) -> Engine:
    """The same selection, measured."""
    options, cells = selection
    engine = Engine(store)
    lab = Undecided(options, TASK, engine)
    lab.detector = Eyes(shown)
    lab.prepare(cells)
    for cell in cells:
        measured(lab, cell, blank("", "", cell, options, TASK))
    return engine


def sums(noting: Noting) -> tuple[Cost, Cost]:
    """At least and at most."""
    rows, looking = planning.rows(noting).values(), Cost(looking=noting.looking)
    return sum((row.making + row.least for row in rows), looking), sum((row.making + row.most for row in rows), looking)


def test_what_was_planned_is_made(selection, tmp_path, monkeypatch):
    """Gates whose floor is their cap: images and UNet passes are exactly the plan's, checkpoints are its new ones; then nothing is left."""
    monkeypatch.setattr("fixtures.lab.CAP_MISTAKEN", 12)
    store = Store(tmp_path)
    before = planned(selection, store)
    (least, most), new = sums(before), [row.lineage for row in planning.rows(before).values() if not row.made]
    assert (least, list(store.root.iterdir())) == (most, [])
    engine = done(selection, store, None)
    assert (engine.cost()["images"], engine.cost()["unet_passes"]) == (most.images, most.passes)
    assert {engine.folder(lineage).name for lineage in new} == set(store.addresses("checkpoints"))
    assert len(new) == 8  # of two methods and none, the fine-tune at 2 and 4 steps; and the two methods
    assert sums(planned(selection, store)) == (Cost(memory=0), Cost(memory=0))
    drawn = sum(len(engine.read_images(store.folder("images", address))) for address in store.addresses("images"))
    assert drawn == most.images


def test_what_stops_early_lies_between_the_bounds(selection, tmp_path):
    """Gates that are looser: some stop at the floor, some go on."""
    task = replace(TASK, tolerance=Tolerance(tau=0.9, retained=0.2, drawn=0.2, floor=4, cap=40))
    options, cells = selection
    noting, engine = Noting(Store(tmp_path)), Engine(Store(tmp_path))
    for kind, runner in ((Rehearsal, noting), (Undecided, engine)):
        lab = kind(options, task, runner)
        lab.detector = Eyes(0)
        lab.prepare(cells)
        for cell in cells[:6]:
            measured(lab, cell, blank("", "", cell, options, task))
        if runner is noting:
            least, most = sums(noting)
    assert least.images < engine.cost()["images"] < most.images
    assert least.passes < engine.cost()["unet_passes"] < most.passes


def test_a_longer_run_goes_on_from_a_shorter_one(tiny_folder, tmp_path):
    """200 steps cost 150 where 50 are in the store or planned before."""
    base = Lineage(Base("d", str(tiny_folder)), TASK)
    short, long = (base.then(dimum.Method(steps=steps, batch=3)) for steps in (50, 200))
    noting = Noting(Store(tmp_path))
    noting.build([long])
    assert [row.making.learning for row in planning.rows(noting).values() if row.lineage.stages] == [200 * 2 * 3]
    noting.build([short])
    assert sorted(row.making.learning for row in planning.rows(noting).values() if row.lineage.stages) == [50 * 2 * 3, 150 * 2 * 3]
    noting.store.publish(noting.folder(short), lambda draft: {})
    assert sorted(row.making.learning for row in planning.rows(noting).values() if row.lineage.stages) == [0, 150 * 2 * 3]


@pytest.mark.parametrize("change", [{}, {"order": "exact"}, {"order": "hvp"}, {"zeta": 0.0}, {"gamma_2": 0.0}, {"inner_steps": 3}], ids=str)
@pytest.mark.parametrize("base", [dimum.Method(batch=1, images_per_prompt=1), None], ids=["dimum", "second stage"])
def test_meta_unlearning_says_what_it_costs(base, change):
    """The base's passes and its own, by the order and by what is switched off."""
    stage = Meta(**{"base": base, "steps": 2, "lr": 1e-3, "batch": 2, "images_per_prompt": 1, "inner_steps": 2, **change})
    pipe = model()
    execute(pipe, stage)
    assert catalogue.passes(stage, TASK.view(stage.reads), 2) == pipe.passes


def test_sizes_are_read_off_the_files(tiny_folder, pipe):
    """Shapes, latents and pixels without loading; disk and memory follow from them."""
    base = Base("d", str(tiny_folder))
    found = plan.size(base)
    assert found
    assert {name: shape for name, shape in found.shapes.items() if name in pipe.named()} == {name: tuple(p.shape) for name, p in pipe.named().items()}
    assert (found.latent, found.image) == (pipe.latent_shape[1:], (16, 16))
    lineage = Lineage(base, TASK)
    cost = plan.cost(Job(lineage, (ImageSet(("a", "b"), (1, 2)), Sampler(steps=5, guidance=3.0))))
    assert (cost.images, cost.looking, cost.disk) == (2, 20, 2 * 3 * 16 * 16)
    assert plan.cost(Job(lineage, (ImageSet(("a",), (1,)), Sampler(steps=5, guidance=1.0)))).looking == 5
    assert plan.size(Base("d", "nobody/knows-it")) is None


def test_a_model_without_readable_weights_has_no_size(tiny_folder, tmp_path):
    """Configurations alone, as where weights are pickles, are no model of no size."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    assert plan.size(Base("d", str(folder))) is None


def test_what_is_not_loaded_is_not_counted(tiny_folder, pipe, tmp_path):
    """A folder often holds a safety checker, larger than the text encoder, which a pipeline here does without."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "safety_checker").mkdir()
    save_file({"vision_model.weight": torch.zeros(100, 100)}, folder / "safety_checker" / "model.safetensors")
    found, without = (plan.size(Base("d", str(place))) for place in (folder, tiny_folder))
    assert found == without
    assert found
    assert found.parameters("all") == sum(p.numel() for p in pipe.named().values())


def test_what_cannot_be_estimated_is_a_dash(tmp_path):
    """Passes and images are counted all the same; no minutes, disk and memory are not zero."""
    task, noting = tiny.task(), Noting(Store(tmp_path))
    noting.images(Lineage(Base("d", "nobody/knows-it"), task), (ImageSet(("a x",), (1,)), task.sampler))
    _, _, tree, total, note, *_ = planning.lines(noting, 1)
    for line in (tree, total):
        assert line.split()[-5:] == ["1", str(2 * task.sampler.steps), "-", "-", "-"]
    assert "minutes at -, as disk and memory: the model's files are not here" in note


@pytest.mark.parametrize("name", ["dimum", "uce", "lora"])
def test_the_disk_is_about_what_a_checkpoint_takes(name, tiny_folder, base, tmp_path):
    """Weights or adapter, and Adam's two moments: within a tenth, besides what a header and a record take."""
    kind = "finetuning" if name == "lora" else "unlearning"
    fields = {"steps": 1, "batch": 1, "images_per_prompt": 1} if name != "uce" else {}
    lineage, engine = Lineage(base, TASK, (catalogue.find(kind, name)(**fields),)), Engine(Store(tmp_path))
    folder = engine.checkpoint(lineage)
    real = sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in planning_load(path).values())
    assert plan.cost(Job(lineage)).disk == pytest.approx(real, rel=0.1)


def planning_load(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors."""
    from safetensors.torch import load_file

    return load_file(path)


def test_the_command_line_shows_it_and_makes_nothing(tmp_path):
    """`--plan` with -n 2: exit 0, a tree with a sum, job files, and neither an artefact nor a report."""
    command = [sys.executable, "-m", "pytest", "suites/celebrity", "--plan", "-n", "2", "--method", "uce", "--steps", "50", "-p", "no:cacheprovider"]
    places = ["--store", str(tmp_path / "store"), "--report", str(tmp_path / "out"), "--jobs", str(tmp_path / "jobs")]
    found = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    lines = found.stdout.splitlines()
    assert any(line.startswith("  uce of Tildeth Oskeby") and " new " in line for line in lines)
    assert any(line.startswith("sum, at least and at most") for line in lines)
    assert not (tmp_path / "out").exists()
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    files = sorted((tmp_path / "jobs").iterdir())
    assert f"{len(files)} jobs in" in found.stdout
    assert "their models compute in float32, wherever that is; so must the run that measures (RESURGENCE_DTYPE" in found.stdout
    assert {json.loads(path.read_text())["kind"] for path in files} == {"checkpoints", "images"}


# --- job files -------------------------------------------------------------------------------------------------------


def one(paths: list[Path], store: Path) -> int:
    """Jobs in a process of their own, as on another machine; how many failed."""
    return len(jobfiles.make(map(jobfiles.read, paths), Store(store)))


def test_jobs_in_processes_of_their_own_equal_one_engine(base, tmp_path, child):
    """Each file in another process, in the order of their names: the same addresses and the same bytes."""
    root = Lineage(base, TASK)
    unlearned = root.then(dimum.Method(steps=2, batch=1, images_per_prompt=1, lr=1e-3))
    lora = catalogue.find("finetuning", "lora")(steps=2, batch=1, images_per_prompt=1)
    pictures = [(unlearned.then(lora), (ImageSet(("a x", "the y"), (1, 2)), TASK.sampler))]
    every = jobs.ordered([unlearned.then(lora), root.then(uce.Method())], pictures)
    paths = jobfiles.write(tmp_path / "jobs", every)
    assert len(paths) == 7  # three sets to learn from, three checkpoints, the pictures
    apart, together = Store(tmp_path / "apart"), Store(tmp_path / "together")
    assert [child(one, [path], apart.root).result() for path in paths] == [0] * 7
    Engine(together).build([unlearned.then(lora), root.then(uce.Method())], pictures)
    for store in (apart, together):
        assert {(kind, address) for kind in store.kinds() for address in store.addresses(kind)} == {job.place for job in every}
    for job in every:
        theirs, ours = (store.folder(*job.place) for store in (apart, together))
        tensors = [{p.name: p.read_bytes() for p in folder.glob("*.safetensors")} for folder in (theirs, ours)]
        assert tensors[0]
        assert tensors[0] == tensors[1]


def test_two_processes_given_the_same_jobs_share_them(base, tmp_path, child):
    """Nothing fails, and all of it is there."""
    lineage = Lineage(base, TASK, (dimum.Method(steps=2, batch=1, images_per_prompt=1), uce.Method()))
    paths = jobfiles.write(tmp_path / "jobs", jobs.ordered([lineage]))
    assert [each.result() for each in [child(one, paths, tmp_path / "store") for _ in range(2)]] == [0, 0]
    assert Store(tmp_path / "store").has(Store(tmp_path / "store").folder(*Job(lineage).place))


def test_a_job_makes_what_it_needs(base, tmp_path):
    """The last file alone, on an empty store."""
    job = Job(Lineage(base, TASK, (uce.Method(),)), (ImageSet(("a x",), (1,)), TASK.sampler))
    store = Store(tmp_path / "store")
    assert jobfiles.make([json.dumps(jobfiles.describe(job))], store) == {}
    assert store.addresses("checkpoints") == [Job(job.lineage).place[1]]


STAGES = [
    uce.Method(guide="a b"),
    Meta(base=dimum.Method(), steps=3),
    catalogue.find("relearning", "malicious")(source="pocket"),
    catalogue.find("unlearning", "mace")(),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__module__)
def test_a_job_survives_its_file(stage):
    """Lineage, task and fields come back equal, also those that are no part of an address."""
    job = Job(Lineage(Base("d", "somewhere"), TASK, (stage,)), (ImageSet(("a",), (1,)), Sampler(steps=7, guidance=2.0)))
    again = jobfiles.parse(json.loads(json.dumps(jobfiles.describe(job))))
    assert again == job
    assert again.place == job.place


def broken(change: Any) -> Any:
    """A job file with a change."""
    data = jobfiles.describe(Job(Lineage(Base("d", "pocket"), TASK, (uce.Method(),))))
    change(data := json.loads(json.dumps(data)))
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["stages"][0].update({"class": "os.system"}), "only stages of the harness are run"),
        (lambda data: data["stages"][0].update({"class": "harness.unlearning.nobody.Method"}), "which is not here"),
        (lambda data: data["stages"][0].update(version=99), "was written for version 99"),
        (lambda data: data["stages"][0].update(ridge=7.0), "or it was edited"),
        (lambda data: data["stages"][0].update(strange=7.0), "this is no job file"),
        (lambda data: data["task"]["erased"].update(concepts=["z"]), "or it was edited"),
        (lambda data: data["task"].update(erased=3), "must be a table"),
        (lambda data: data.pop("base"), "this is no job file"),
    ],
    ids=["class", "module", "version", "field", "unknown field", "task", "table", "no base"],
)
def test_a_job_that_would_make_something_else_is_refused(change, says):
    """A class from elsewhere, another version, an edited field: nothing runs."""
    with pytest.raises(SpecError, match=says):
        jobfiles.parse(broken(change))


def test_a_model_that_changed_is_refused(base, tmp_path):
    """The job is about a digest, not about a place."""
    job = Job(Lineage(Base("another", base.source), TASK, (uce.Method(),)))
    with pytest.raises(StoreError, match="put that model there"):
        jobfiles.make([json.dumps(jobfiles.describe(job))], Store(tmp_path))
    candidate = Candidate("another", base.source)
    job = Job(Lineage(base, TASK, (candidate,)))
    with pytest.raises(StoreError, match="is not the model that the job was written for"):
        jobfiles.parse(jobfiles.describe(job))


@pytest.mark.parametrize(("there", "here"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_job_computes_in_what_its_plan_said(base, tmp_path, monkeypatch, there, here):
    """Planned on a login node, done where another precision is usual: the address is the plan's, and so are the bits."""
    wanted = ImageSet(("a x",), (1,)), TASK.sampler
    monkeypatch.setenv(devices.DTYPE, there)
    job = Job(Lineage(pipeline.identify(base.source), TASK), wanted)
    planned, made = Store(tmp_path / "there"), Store(tmp_path / "here")
    Engine(planned).make(job)
    monkeypatch.setenv(devices.DTYPE, here)
    assert jobfiles.make([json.dumps(jobfiles.describe(job))], made) == {}
    pictures = [Engine(store).read_images(store.folder(*job.place)) for store in (planned, made)]
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], Engine(made).read_images(Engine(made).make(Job(Lineage(pipeline.identify(base.source), TASK), wanted))))


def test_a_job_in_a_precision_that_nobody_knows_is_refused(base, tmp_path):
    """Another version's, say: computed in float32 it would lie at a wrong address."""
    job = Job(Lineage(Base(f"{base.digest}+float8", base.source), TASK, (uce.Method(),)))
    with pytest.raises(SpecError, match=r"unknown precision in the address of .* 'float8'; allowed: bfloat16, float32"):
        jobfiles.make([json.dumps(jobfiles.describe(job))], Store(tmp_path))


def test_the_command_line_of_run(base, tmp_path, capsys):
    """Exit 0 and a line a job, also if all is there already; a file that is none is exit 2; a stage that fails is said, with exit 1."""
    paths = jobfiles.write(tmp_path / "jobs", jobs.ordered([Lineage(base, TASK, (uce.Method(),))]))
    arguments = ["run", *map(str, paths), "--store", str(tmp_path / "store")]
    assert (main(arguments), main(arguments)) == (0, 0)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["done", "done"]
    failing = jobfiles.write(tmp_path / "failing", jobs.ordered([Lineage(base, TASK, (uce.Method(ridge=float(0), preserve=float(0)),))]))
    assert main(["run", *map(str, failing), "--store", str(tmp_path / "store")]) == 1
    assert capsys.readouterr().out.startswith(f"failed {failing[0].name}: the linear system is singular")
    (tmp_path / "other.json").write_text("{}")
    assert main(["run", str(tmp_path / "other.json")]) == 2
    assert "cannot read the job" in capsys.readouterr().err


def test_fewer_jobs_leave_no_old_files(base, tmp_path):
    """Another plan in the same folder replaces the first; files of other names stay."""
    (tmp_path / "notes.json").touch()
    jobfiles.write(tmp_path, jobs.ordered([Lineage(base, TASK, (uce.Method(),)), Lineage(base, TASK, (uce.Method(ridge=2.0),))]))
    jobfiles.write(tmp_path, jobs.ordered([Lineage(base, TASK, (uce.Method(),))]))
    assert len(list(tmp_path.iterdir())) == 2
