"""A method's own loss falls while it trains: on draws that no step sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.unlearning import ca, sdd
from tests import tiny
from tests.unlearning import _small as small

HOW: dict[str, Any] = {"steps": 20, "lr": 3e-3, "batch": 4}


@pytest.mark.parametrize(
    "method",
    [sdd.Method(**HOW, sampler_steps=2, decay=0.5, sample_under="iterative"), ca.Method(**HOW, images_per_prompt=1)],
    ids=["sdd", "ca"],
)
def test_what_a_method_trains_on_falls(method: Any) -> None:
    """After 20 steps below half of where it began, on a tiny random model whose cross-attention was made strong enough for the text to matter."""
    model, task = small.pipe(), tiny.task()
    with torch.no_grad():
        for name, p in model.named().items():
            if ".attn2." in name:
                p.mul_(4)
    run = small.run(model, method, task)

    def probed() -> float:
        loss, batch_at = method.objective(model, task, run)
        with torch.no_grad():
            return torch.stack([loss(batch_at(run.rng("probe", i))) for i in range(8)]).mean().item()

    start = probed()
    method(model, task, run)
    assert probed() < 0.5 * start
