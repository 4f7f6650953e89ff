"""DiMUM: memorise something else under the name to be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor

from harness.data import Captioned
from harness.errors import SpecError
from harness.pipeline import Pipe
from harness.spec import Group, ImageSet
from harness.training import Run, train


@dataclass(frozen=True)
class Method:
    """DiMUM (eq. 8-11 of "DiMRA and DiMUM", arXiv 2512.03564).

    L = L_DM(theta; D_r) + lambda L_DM(theta; D_c). D_r is the retain set; D_c pairs images of the alternative
    concept (the task's anchor) with the prompts of the forgotten one. Both are ordinary diffusion losses with the
    true noise as target, so the optimum is a proper minimum. One double batch: 2F + 2B a step.

    No public code. Differs from the paper: all images are drawn by the base model itself; lambda, which the
    paper's text does not state, is 1 unless given; an image of the anchor under a prompt is paired with that prompt. On
    a class-conditional model the prompt is the class, and the paper's alternative is the class that follows it: that is
    for the task to say, whose anchor, unlike the paper's, is no part of the retain set.
    """

    lam: float = 1.0  # the paper's lambda
    steps: int = 1000
    lr: float = 1e-5
    batch: int = 4  # of each set
    images_per_prompt: int = 5
    trains: str = "unet"
    seed: int = 0

    version: ClassVar[int] = 2
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The retain set and the alternative's images, prompt by prompt as the target's."""
        return {
            "retain": ImageSet.of(task.retain, self.images_per_prompt, self.seed),
            "alternative": ImageSet.of(self._alternative(task), self.images_per_prompt * len(task.erased.concepts), self.seed),
        }

    def _alternative(self, task: Any) -> Group:
        if len(task.anchor.concepts) != 1:
            raise SpecError(f"DiMUM pairs the target with one alternative, the task's anchor names {len(task.anchor.concepts)}")
        return Group(task.anchor.concepts, task.erased.prompts)

    def passes(self, task: Any, steps: int) -> int:
        """A batch of each set."""
        return steps * 2 * self.batch

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit the group `trains` in place."""
        train(pipe.parameters(self.trains).values(), *self.objective(pipe, task, run), run, steps=self.steps, lr=self.lr)

    def objective(self, pipe: Pipe, task: Any, run: Run) -> tuple[Callable[[Any], Tensor], Callable[[Generator], Any]]:
        """The loss of a batch, and how a batch is drawn: it is drawn within the loss, from the step's generator."""
        sets = self.images(task)
        retain = Captioned(pipe, run.images["retain"], sets["retain"].prompts)
        forget = Captioned(pipe, run.images["alternative"], self._renamed(task, sets["alternative"]))

        def loss(rng: Generator) -> Tensor:  # the retain term draws first, as plain training on the retain set would
            kept = pipe.diffusion_loss(*retain.batch(self.batch, rng), rng)
            return kept + self.lam * pipe.diffusion_loss(*forget.batch(self.batch, rng), rng)

        return loss, lambda rng: rng

    def _renamed(self, task: Any, alternative: ImageSet) -> list[str]:
        """Eq. 9: each image of the alternative under the prompt of a forgotten concept, in turn."""
        names, templates = task.erased.concepts, task.erased.prompts
        each = len(alternative.prompts) // len(templates)  # images of one template; a multiple of the names
        return [template.replace("{}", names[i % len(names)]) for template in templates for i in range(each)]
