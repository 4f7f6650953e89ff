"""Malicious fine-tuning: ordinary training on images of what was unlearned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from harness.errors import SpecError
from harness.finetuning._benign import chosen_group, objective
from harness.pipeline import Pipe
from harness.relearning import _folder
from harness.spec import Group, ImageSet
from harness.training import Run, train

BASE = "base"


@dataclass(frozen=True)
class Attack:
    """Malicious fine-tuning (section 5 of "Meta-Unlearning on Diffusion Models", arXiv 2410.12777): L_DM on forget images, over the whole UNet.

    `data="one"` trains on one forget prompt (HRM-s), `several` on all of them (HRM-m), both on as many images of each
    concept; `clean` on five benign prompts (CLEAN), the first of the task's fine-tuning set `benign`. The paper looks
    after 50, 100, 200 and 300 steps. Its images came from FLUX.1, not from the model under attack: `source` is
    `pocket` (renders that ship with it), a folder with one sub-folder of pictures per concept, or `base`: then the
    model before unlearning draws them, which is another attack and must be named so. CLEAN is always drawn by it.

    Reference: sail-sg/Meta-Unlearning@5a2a760, which holds no attack. Differs from the paper: number of images, batch
    and optimizer are not stated, ours are fields; captions of given pictures are the forget prompts in turn. 1F + 1B a step.
    """

    data: Literal["one", "several", "clean"] = "several"
    source: str = field(default=BASE, metadata={"address": False})
    digest: str = ""  # content of the source; found when it is empty
    benign: str = "out"  # a name in the task's [finetune]
    steps: int = 300
    lr: float = 1e-5
    batch: int = 4
    images_per_concept: int = 25
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("erased", "finetune", "sampler")

    def __post_init__(self) -> None:
        if self.images_per_concept < 1:
            raise SpecError(f"images_per_concept must be at least 1, got {self.images_per_concept}: an attack without images is none")
        digest = BASE if self.source == BASE or self.data == "clean" else _folder.digest(self.source)
        if self.digest not in ("", digest):
            raise SpecError(f"the pictures in '{self.source}' have the digest {digest}, not {self.digest}; were they changed?")
        object.__setattr__(self, "digest", digest)

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """What the base model must draw: nothing where the pictures are given."""
        if self.digest != BASE:
            return {}
        asked = self._asked(task)
        per_prompt, rest = divmod(self.images_per_concept, len(asked.prompts))
        if rest:
            raise SpecError(f"images_per_concept must be a multiple of the {len(asked.prompts)} prompts, got {self.images_per_concept}")
        return {"train": ImageSet.of(asked, per_prompt, self.seed)}

    def _asked(self, task: Any) -> Group:
        if self.data == "clean":
            benign = chosen_group(task, self.benign)
            return Group(benign.concepts[:5], benign.prompts[:1])
        erased: Group = task.erased
        return erased if self.data == "several" else replace(erased, prompts=erased.prompts[:1])

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        if self.digest == BASE:
            captions = self.images(task)["train"].prompts
        else:
            asked = self._asked(task)
            size = pipe.decode(torch.zeros(1, *pipe.latent_shape, device=pipe.device)).shape[-1]
            pictures, captions = _folder.read(self.source, asked, self.images_per_concept, size)
            run.images = {**run.images, "train": pictures}
        loss, batch_at = objective(pipe, captions, run, self.batch)
        train(pipe.parameters(self.trains).values(), loss, batch_at, run, steps=self.steps, lr=self.lr, optimizer="adamw", clip=1.0)
