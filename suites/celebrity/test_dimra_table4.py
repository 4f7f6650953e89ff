"""Unlearning steps under DiMRA (arXiv 2512.03564, table IV: 1K, 2K and 5K there).

pytest suites/celebrity -m ablation
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.ablation(methods=[f"{name}:steps={k}" for name in ("esd", "dimum") for k in (100, 200, 500)], attacks=("dimra-retain", "dimra-auxiliary"))
@pytest.mark.claim("withstands-dimra")
def test_dimra_table4(claim: Claim) -> None:
    """{method}, on the whole grid of {attack} ({grid} steps): the largest rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
