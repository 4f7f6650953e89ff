"""Number of erased people (arXiv 2410.08074, figure 5): there 1, 5, 10 and 100, here the task's first 1, 2 and 5.

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(erased=(1, 2, 5))
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure5(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
