"""LoRA and full fine-tuning (arXiv 2410.08074, figure 8).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(finetunes=("lora-in", "full-in"))
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure8(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
