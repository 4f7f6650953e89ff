"""`python -m harness.quality --captions FILE ...`: FID, sFID, KID and CLIP score before unlearning, after it, and after fine-tuning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from harness import catalogue, pipeline, pocket
from harness.candidate import Candidate
from harness.catalogue import Spec
from harness.detection._clip import Clip
from harness.engine import Engine
from harness.errors import ResurgenceError, SpecError
from harness.quality import captions
from harness.quality._figure import Figure
from harness.quality.clip_score import clip_score
from harness.quality.features import BACKBONES
from harness.quality.fidelity import fidelity
from harness.spec import ImageSet, Lineage, Task
from harness.store import open_store


def measured(engine: Engine, lineage: Lineage, texts: tuple[str, ...], given: argparse.Namespace, clip: Clip) -> list[Figure]:
    """All figures of one lineage. Without a folder of real images the reference is the base model's own, from other noise."""
    base, sets = Lineage(lineage.base, lineage.task), captions.images(texts)
    if given.reference is not None:
        reference, says = given.reference, f"folder {given.reference.name}"
    else:
        reference = drawn(engine, base, captions.images(texts, "quality reference"))
        says = "the base model's for the same captions, other noise"
    found = fidelity(drawn(engine, lineage, sets), reference, says, BACKBONES[given.backbone], given.weights)
    return [*found, clip_score(drawn(engine, lineage, sets), texts, clip)]


def drawn(engine: Engine, lineage: Lineage, sets: list[ImageSet]) -> Iterator[Tensor]:
    """The images of one set after the other, each kept as soon as it is drawn."""
    for each in sets:
        yield engine.read_images(engine.images(lineage, (each, lineage.task.sampler)))


def lineages(given: argparse.Namespace, task: Task) -> Iterator[tuple[str, Lineage]]:
    """The base model, the unlearned one or the candidate, and each fine-tuned snapshot."""
    base = Lineage(pipeline.identify(given.model), task)
    yield "base model", base
    presets = pocket.presets(given.model)
    if given.candidate is not None:
        title, unlearned = f"candidate {given.candidate}", base.then(Candidate.at(given.candidate))
    elif given.method is not None:
        title, unlearned = f"after {given.method}", base.then(catalogue.make("unlearning", Spec.parse(given.method), presets, seed=0))
    elif given.finetune is not None:
        raise SpecError("--finetune needs an unlearned model to fine-tune; name it with --method or --candidate")
    else:
        return
    yield title, unlearned
    if given.finetune is not None:
        spec = Spec.parse(given.finetune)
        kind, _, data = spec.name.partition("-")
        if data not in task.finetune:
            raise SpecError(f"--finetune '{given.finetune}' names no set of the task; write for example lora-{next(iter(task.finetune))}")
        stage = catalogue.make("finetuning", Spec(kind, spec.fields), presets, data=data, seed=0)
        for steps in given.steps:
            yield f"{title} and {steps} steps of {given.finetune}", unlearned.then(replace(stage, steps=steps))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m harness.quality", description=__doc__)
    made.add_argument("--captions", type=Path, required=True, help=".txt, .csv with a column prompt or caption, or COCO's annotation .json")
    made.add_argument("--task", type=Path, required=True, help="a suite's task file: sampler, concepts, fine-tuning sets")
    made.add_argument("--model", default="pocket")
    edited = made.add_mutually_exclusive_group()
    edited.add_argument("--method", help="such as esd or esd:trains=u; without it and --candidate only the base model is measured")
    edited.add_argument("--candidate", help="a model made elsewhere from --model: diffusers folder, UNet folder, .safetensors file, or a hub id")
    made.add_argument("--finetune", help="such as lora-in")
    made.add_argument("--steps", type=lambda text: [int(part) for part in text.split(",")], default=[50], help="fine-tuning steps, such as 50,200")
    made.add_argument("--count", type=int, help="only the first so many captions")
    made.add_argument("--reference", type=Path, help="folder of real images; left out, the base model's own are the reference")
    made.add_argument("--backbone", choices=sorted(BACKBONES), default="inception")
    made.add_argument("--weights", type=Path, help="folder with the Inception weights")
    made.add_argument("--clip", required=True, help="'pocket' or a folder with CLIP")
    made.add_argument("--store", default=".store", help="folder or URL (s3://bucket/prefix) of finished work")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every figure with its conditions; 0 if all went well."""
    given = parser().parse_args(arguments)
    try:
        task, texts = Task.load(given.task), captions.read(given.captions, given.count)
        chosen = list(lineages(given, task))
        engine, clip = Engine(open_store(given.store), lambda line: print(line, file=sys.stderr)), Clip(given.clip)
        for title, lineage in chosen:
            print(title)
            for figure in measured(engine, lineage, texts, given, clip):
                print(f"  {figure}")
            if cut := engine.cut(lineage, *((each, task.sampler) for each in captions.images(texts))):
                print(f"  {cut}")
    except ResurgenceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
