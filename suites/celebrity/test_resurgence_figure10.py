"""In-domain and out-of-domain fine-tuning (arXiv 2410.08074, figure 10).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(finetunes=("lora-in", "lora-out"))
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure10(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
