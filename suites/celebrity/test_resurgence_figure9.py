"""CLIP similarity of the fine-tuning people to the erased (arXiv 2410.08074, figure 9): terciles of one pool, equal in size.

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(finetunes=("lora-near", "lora-middle", "lora-far"))
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure9(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
