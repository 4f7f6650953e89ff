"""Unlearning and meta-unlearning under HRM-m, HRM-s and CLEAN (arXiv 2410.12777, table 1).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(methods=("esd", "meta-esd", "uce", "meta-uce"), attacks=("malicious-several", "malicious-one"))
@pytest.mark.claim("withstands-malicious")
def test_meta_table1(claim: Claim) -> None:
    """{method}, after {steps} steps of {attack}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
