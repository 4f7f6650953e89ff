"""LoRA fine-tuning: a low-rank adapter on the attention of the UNet, on benign images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import SpecError
from harness.finetuning._benign import image_set, objective
from harness.pipeline import Pipe
from harness.spec import ImageSet
from harness.training import Run, train

NAME = "finetune"


@dataclass(frozen=True)
class Finetune:
    """LoRA (Hu et al., 2021) with L_DM on images that the base model draws of other concepts.

    W' = W + (alpha / rank) B A on the query, key, value and output projections. The snapshot keeps the unmerged
    adapter; it is merged only to be used. Source of the data: as in `full`. Differs from the paper: rank, alpha
    and learning rate are not stated there. 1F + 1B a step.
    """

    data: str = "in"  # a name in the task's [finetune]
    steps: int = 200
    rank: int = 4
    alpha: float = 4.0
    lr: float = 1e-4
    batch: int = 4
    images_per_prompt: int = 5
    targets: str = "to_q,to_k,to_v,to_out.0"
    seed: int = 0

    version: ClassVar[int] = 1
    trains: ClassVar[str] = "unet"
    families: ClassVar[tuple[str, ...]] = ("text-to-image", "class-conditional")
    reads: ClassVar[tuple[str, ...]] = ("finetune", "sampler")

    def images(self, task: Any) -> Mapping[str, ImageSet]:
        """The fine-tuning images."""
        return {"train": image_set(task, self.data, self.images_per_prompt, self.seed)}

    def __call__(self, pipe: Pipe, task: Any, run: Run) -> None:
        """Train an adapter and leave it in `run.adapter`; the weights themselves stay as they are."""
        from peft import get_peft_model_state_dict  # here and below, so that a run that only reads the store need not load peft

        loss, batch_at = objective(pipe, self.images(task)["train"].prompts, run, self.batch)
        pipe.unet.requires_grad_(False)
        self._inject(pipe, run.adapter)
        try:
            moving = [p for p in pipe.unet.parameters() if p.requires_grad]
            train(moving, loss, batch_at, run, steps=self.steps, lr=self.lr, optimizer="adamw", clip=1.0)
            state = get_peft_model_state_dict(pipe.unet, adapter_name=NAME)
            run.adapter = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        finally:
            _remove(pipe)

    def merged(self, pipe: Pipe, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the adapter's tensors amount to, by their full names."""
        from peft.tuners.lora import LoraLayer

        self._inject(pipe, tensors)
        layers = [(name, m) for name, m in pipe.unet.named_modules() if isinstance(m, LoraLayer)]
        weights = {f"unet.{n}.weight": (m.get_base_layer().weight + m.get_delta_weight(NAME)).detach() for n, m in layers}
        _remove(pipe)
        return weights

    def _inject(self, pipe: Pipe, tensors: Mapping[str, Tensor]) -> None:
        """Put the adapter in, drawn from the stage's seed or holding `tensors`. peft draws from the global generator."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=self.targets.split(","))
            layers = [name for name, _ in pipe.unet.named_modules()]
            for target in self.targets.split(","):
                if not any(name == target or name.endswith(f".{target}") for name in layers):  # as peft matches
                    raise SpecError(f"LoRA target '{target}' matches no layer of this UNet; allowed: ends of its module names, such as to_q")
            inject_adapter_in_model(config, pipe.unet, adapter_name=NAME)
        if tensors:
            set_peft_model_state_dict(pipe.unet, dict(tensors), adapter_name=NAME)


def _remove(pipe: Pipe) -> None:
    """Take every adapter out again and leave the plain layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in [(n, m) for n, m in pipe.unet.named_modules() if isinstance(m, LoraLayer)]:
        parent, _, child = name.rpartition(".")
        setattr(pipe.unet.get_submodule(parent), child, module.get_base_layer())
    vars(pipe.unet).pop("peft_config", None)
