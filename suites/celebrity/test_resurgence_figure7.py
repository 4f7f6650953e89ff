"""Strength of preservation, the paper's lambda_1 (arXiv 2410.08074, figure 7; MACE there, UCE's `preserve` here).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(methods=[f"uce:preserve={value}" for value in (0.0, 0.0001, 0.001, 0.01, 0.1, 1.0)])
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure7(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
