"""Ratio of gamma_1 to gamma_2 (arXiv 2410.12777, table 4), 300 and 1000 steps there.

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(
    methods=[f"meta-esd:gamma_1={a}:gamma_2={b}:steps={k}" for a, b in ((1.0, 1.0), (1.0, 10.0), (10.0, 1.0)) for k in (100, 300)],
    attacks=("malicious-several",),
)
@pytest.mark.claim("withstands-malicious")
def test_meta_table4(claim: Claim) -> None:
    """{method}, after {steps} steps of {attack}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
