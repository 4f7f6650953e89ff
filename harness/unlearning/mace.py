"""MACE: refine the words around the concept, suppress attention to it with one LoRA each, fuse the LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from harness.errors import PreconditionError, SpecError
from harness.pipeline import Pipe
from harness.spec import ImageSet, seed_of, sha256
from harness.training import Run, train
from harness.unlearning import _segment
from harness.unlearning._mace_closed import Fusion, coexisting, gram, refinement, span
from harness.unlearning._mace_lora import Lora, focal, shrink

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x_t, t, embeddings, masks, phrase


@dataclass(frozen=True)
class Method:
    """MACE (Lu et al., 2024, "MACE: Mass Concept Erasure in Diffusion Models"), in three stages.

    1. `refinement` (eq. 1): tokens beside the concept take the keys and values they have beside the mapping concept.
    2. `lora_steps` per concept of a rank-1 LoRA on the refined weights (eq. 3): sum_S sum_l ||A_l (.) M||_F^2, the attention
       to the phrase inside the image's mask, at timesteps from xi (`focal`). Images drawn by the base model, encoded once.
    3. `Fusion` (eq. 7): one weight that acts on each concept's prompts as its LoRA does.
    Stages 1 and 3 also hold a prior in place: "", the lines of `prior_file`, and lam3 times the task's retained names, bare and in
    the task's prompts. Minimum cost: 1F + 1B per image of a LoRA step, no pass for stages 1 and 3.

    Reference: Shilin-LU/MACE@057e7a6. Differs from it: attention is squared, as in the paper; lam1 weighs once (there it is
    squared in stage 1); the phrase's tokens only, unless `tokens="tail"`, which adds end and padding as there; the task's
    prompts for the 30 built-in ones; the prior from names and a file for cached COCO captions, so lam1 and lam2 weigh
    a sum over that many tokens; latents as the VAE wants them (there: ImageNet's mean); lam1 = ridge = 0 gives the optimum nearest
    to W; images without a mask are left out. As there, the fusion is over all positions of the prompts.
    """

    mapping: str | None = None  # what the concept becomes; None: the task's anchor
    lam1: float = 1e-4  # the prior's weight in stage 1
    lam2: float = 1e-4  # the prior's weight in stage 3
    lam3: float = 1.0  # the retained names' weight within the prior
    ridge: float = 0.0  # pull to the weights before stage 1, and to the refined ones in stage 3; not in the paper
    prior_file: str | None = field(default=None, metadata={"address": False})  # UTF-8, one prompt a line
    prior_digest: str | None = None  # of its bytes; found out if not given
    rank: int = 1
    lora_steps: int = 50  # per concept
    lora_lr: float = 1e-4
    lora_batch: int = 1
    tokens: Literal["phrase", "tail"] = "phrase"
    timesteps: Literal["focal", "uniform"] = "focal"
    t1: int = 200
    t2: int = 400
    images_per_concept: int = 8
    segmenter: Literal["grounded_sam", "border", "whole"] = "grounded_sam"
    grounding_dino: str = "IDEA-Research/grounding-dino-base"
    sam: str = "facebook/sam-vit-huge"
    seed: int = 0

    version: ClassVar[int] = 1
    trains: ClassVar[str] = "unet.xattn_kv"
    reads: ClassVar[tuple[str, ...]] = ("erased", "anchor", "retain", "sampler")

    def __post_init__(self) -> None:
        for name, least in {"rank": 1, "lora_steps": 0, "lora_batch": 1, "images_per_concept": 1, "lam1": 0, "lam2": 0, "lam3": 0, "ridge": 0}.items():
            if getattr(self, name) < least:
                raise SpecError(f"mace: {name} must be at least {least}, got {getattr(self, name)}")
        if not self.t1 < self.t2:
            raise SpecError(f"mace: t1 must be below t2, the ends of the timesteps to train at; got {self.t1} and {self.t2}")
        object.__setattr__(self, "prior_digest", self._digest())

    def _digest(self) -> str | None:
        if self.prior_file is None:
            return self.prior_digest
        if not (path := Path(self.prior_file)).is_file():
            raise SpecError(f"mace: prior_file '{self.prior_file}' is no file; give a text file with one prompt a line")
        if self.prior_digest not in (None, found := sha256(path)):
            raise SpecError(f"mace: prior_file '{self.prior_file}' has digest {found}, not {self.prior_digest}; it is another file, or it was edited")
        return found

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """`images_per_concept` of each erased concept, its prompts in turn. Their seeds depend on the concept, not on its place."""
        if not self.lora_steps:
            return {}
        every = [(c, i) for c in task.erased.concepts for i in range(self.images_per_concept)]
        prompts = tuple((asked := task.erased.asking(c))[i % len(asked)] for c, i in every)
        return {"concepts": ImageSet(prompts, tuple(seed_of("training image", self.seed, c, i) for c, i in every))}

    def passes(self, task: Any, steps: int) -> int:
        """One an image and step of each concept's LoRA; the closed forms take none."""
        return len(task.erased.concepts) * self.lora_steps * self.lora_batch

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Edit every key and value matrix in place."""
        if not task.erased.concepts:
            return
        mapping, segment = self._mapping(pipe, task), self._segmenter(pipe)
        layers, prior = pipe.parameters(self.trains), self._prior(pipe, task)
        pairs = (coexisting(pipe, template, c, mapping) for c in task.erased.concepts for template in task.erased.prompts)
        m = refinement(pairs, prior, self.lam1, self.ridge)
        with torch.no_grad():
            for weight in layers.values():
                weight.copy_(weight.double() @ m.to(weight.device))
        pipe.unet.requires_grad_(False)  # the LoRAs alone learn
        shapes = {name: weight.shape for name, weight in layers.items()}
        fusion = Fusion(prior, self.lam2, self.ridge, shapes, self.rank * len(task.erased.concepts))
        for i, concept in enumerate(task.erased.concepts):
            loras = self._trained(pipe, task, i, segment, run).loras() if self.lora_steps else {}
            fusion.add(gram(pipe, task.erased.asking(concept)), loras)
        with torch.no_grad():
            for name, weight in fusion.weights(layers, run.original):
                layers[name].copy_(weight)

    def _prior(self, pipe: Pipe, task: Any) -> Tensor:
        """sum p p^T (d, d) over the prior's tokens."""
        if self.prior_digest is not None and self.prior_file is None:
            raise SpecError("mace: prior_digest without prior_file; give the file of prompts it is the digest of")
        lines = Path(self.prior_file).read_text(encoding="utf-8").splitlines() if self.prior_file else []
        names = [text for c in task.retain.concepts for text in dict.fromkeys((c, *task.retain.asking(c)))]
        return gram(pipe, ["", *(line for line in lines if line.strip())]) + self.lam3 * gram(pipe, names)

    def _mapping(self, pipe: Pipe, task: Any) -> str:
        """The mapping concept, which is none of the erased ones."""
        mapping: str = task.anchor.concepts[0] if self.mapping is None else self.mapping
        for concept in task.erased.concepts:
            if torch.equal(pipe.tokens(concept), pipe.tokens(mapping)):
                raise SpecError(f"mace: mapping '{mapping}' is the concept '{concept}' itself, so nothing would be erased; choose another `mapping`")
        return mapping

    def _segmenter(self, pipe: Pipe) -> Callable[[Tensor, str], Tensor]:
        """Images and a concept to masks (n, H, W)."""
        if self.segmenter == "grounded_sam" and self.lora_steps:
            return _segment.GroundedSam(self.grounding_dino, self.sam, pipe.device)
        place = _segment.border if self.segmenter == "border" else _segment.whole
        return lambda images, concept: place(images)

    def _trained(self, pipe: Pipe, task: Any, i: int, segment: Callable[[Tensor, str], Tensor], run: Run) -> Lora:
        """The LoRA of the task's i-th erased concept after its steps; its randomness depends on the concept's name, not on i."""
        concept, images = task.erased.concepts[i], run.images["concepts"][i * self.images_per_concept :][: self.images_per_concept]
        mine = Run(seed_of("lora", run.seed, concept), report=run.report)
        lora = Lora(pipe, self.rank, mine.rng("lora"))
        batch_at = self._batches(pipe, task, concept, images, segment(images, concept).to(pipe.device))

        def loss(batch: Batch) -> Tensor:
            x_t, t, embeddings, masks, phrase = batch
            lora.watch(masks, phrase)
            pipe.predict(x_t, t, embeddings)
            return torch.stack(lora.energies).sum()

        with pipe.undivided(), lora.attached():  # it looks at whole batches
            try:
                train(lora.parameters, loss, batch_at, mine, steps=self.lora_steps, lr=self.lora_lr, optimizer="adamw", weight_decay=0.01, clip=1.0)
            except PreconditionError as error:
                raise PreconditionError(f"mace: the LoRA of '{concept}': {error}; the field is `lora_lr`") from error
        run.losses += mine.losses
        return lora

    def _batches(self, pipe: Pipe, task: Any, concept: str, images: Tensor, masks: Tensor) -> Callable[[Generator], Batch]:
        """How a batch is drawn: an image and a prompt each, noise, a timestep."""
        found = shrink(masks, pipe.latent_shape[1:]).flatten(1).any(1)
        if not found.any():
            raise PreconditionError(
                f"mace: segmenter '{self.segmenter}' finds '{concept}' in none of its {len(images)} images; try segmenter=whole, or look at the images"
            )
        masks, (mean, std) = masks[found], pipe.latents(images[found.to(images.device)])
        embeddings = pipe.encode(task.erased.asking(concept))
        phrases = torch.stack([self._phrase(pipe, template, concept) for template in task.erased.prompts]).to(pipe.device)
        length = pipe.schedule.config.num_train_timesteps
        xi = focal(self.t1, self.t2, length) if self.timesteps == "focal" else torch.ones(length)

        def batch_at(rng: Generator) -> Batch:
            i, p = (torch.randint(len(each), (self.lora_batch,), generator=rng) for each in (mean, phrases))
            t = torch.multinomial(xi, self.lora_batch, replacement=True, generator=rng).to(pipe.device)
            posterior, noise = (torch.randn(mean[i].shape, generator=rng).to(mean) for _ in range(2))
            return pipe.noised(mean[i] + std[i] * posterior, noise, t), t, embeddings[p], masks[i], phrases[p]

        return batch_at

    def _phrase(self, pipe: Pipe, template: str, concept: str) -> Tensor:
        """(context,) true at the concept's tokens; with `tail` also at the end token and the padding."""
        first, behind, end = span(pipe, template, concept)
        places = torch.arange(pipe.tokens(concept).shape[1])
        named = (places >= first) & (places < behind)
        return named | (places >= end) if self.tokens == "tail" else named
