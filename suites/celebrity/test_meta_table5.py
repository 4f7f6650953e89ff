"""Number of inner steps M, and the inner optimizer (arXiv 2410.12777, table 5 and section 5).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(
    methods=[*(f"meta-esd:inner_steps={m}" for m in (1, 3, 5)), *(f"meta-esd:inner={each}" for each in ("momentum", "adam"))], attacks=("malicious-several",)
)
@pytest.mark.claim("withstands-malicious")
def test_meta_table5(claim: Claim) -> None:
    """{method}, after {steps} steps of {attack}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
