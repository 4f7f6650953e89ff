"""Mapping concept (arXiv 2410.08074, figure 6; MACE there): generic and near, specific, and of another domain.

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(methods=("uce:guide=a person", "uce:guide=Kester Nettlebay", "uce:guide=object"))
@pytest.mark.claim("stays-forgotten")
def test_resurgence_figure6(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
