"""Fine-tuning people by their CLIP similarity to the erased ones: where the task files' sets near, middle and far come from.

    python -m suites.celebrity.terciles pocket

Ranks the pool by the smallest cosine between the text embedding of a person's name and an erased one's (arXiv 2410.08074,
appendix C.2), in the pocket model's own CLIP. Differs from the paper: ten people of each tercile there, six here, because
the pool is twenty; they are the outer and the middle six, so that the sets do not touch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness import pocket
from harness.spec import Task

HERE, SIZE = Path(__file__).parent, 6


def similarity(names: list[str], erased: list[str]) -> dict[str, float]:
    """Smallest cosine of each name with an erased one."""
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(pocket.CLIP, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(pocket.CLIP)
    words = tokenizer([*names, *erased], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        pooled = model.text_model(**words).pooler_output
        unit = torch.nn.functional.normalize(model.text_projection(pooled), dim=-1)
    cosines = unit[: len(names)] @ unit[len(names) :].T
    return dict(zip(names, cosines.min(dim=1).values.tolist(), strict=True))


def pool(task: Task) -> list[str]:
    """The people who may be fine-tuned on: the pocket model's role `finetune` without those that the task retains."""
    return [name for name in pocket.identities("finetune") if name not in task.retain.concepts]


def terciles(task: Task) -> dict[str, dict[str, float]]:
    """near, middle and far: names with their similarity, nearest first."""
    found = similarity(pool(task), list(task.erased.concepts))
    ranked = sorted(found.items(), key=lambda item: -item[1])
    start = (len(ranked) - SIZE) // 2
    return {"near": dict(ranked[:SIZE]), "middle": dict(ranked[start : start + SIZE]), "far": dict(ranked[-SIZE:])}


def main(name: str) -> None:
    """Print the three tables of a task file."""
    for tercile, people in terciles(Task.load(HERE / f"{name}.toml")).items():
        values = list(people.values())
        print(f"[finetune.{tercile}] # smallest CLIP cosine to an erased person {values[-1]:.2f} to {values[0]:.2f} (terciles.py)")
        print("concepts = [" + ", ".join(f'"{person}"' for person in people) + "]")
        print("prompts = [\n" + "".join(f'  "{prompt}",\n' for prompt in Task.load(HERE / f"{name}.toml").erased.prompts) + "]\n")


if __name__ == "__main__":
    main(sys.argv[1])
