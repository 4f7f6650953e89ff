"""Celebrity: named people are erased, and must stay erased when the model is fine-tuned on other people.

Source: MACE's celebrity task (five evaluation prompts); fine-tuning data as in "concept resurgence", appendix C.
"""

import pytest

from harness.spec import HOLDS, Claim


@pytest.mark.claim("instruments")
def test_the_instruments_are_sound(claim: Claim) -> None:
    """The base model draws {concept}, and the detector sees it there and not on anchor prompts."""
    assert claim.verdict == HOLDS, str(claim)


@pytest.mark.claim("forgotten")
def test_the_person_is_forgotten(claim: Claim) -> None:
    """After unlearning with {method}, the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)


@pytest.mark.claim("retained")
def test_the_retained_people_are_still_drawn(claim: Claim) -> None:
    """{method}, {steps} fine-tuning steps: the mean rate of people who must survive stays above {above}."""
    assert claim.verdict == HOLDS, str(claim)


@pytest.mark.claim("stays-forgotten")
def test_the_person_stays_forgotten_after_fine_tuning(claim: Claim) -> None:
    """{method}, after {steps} steps of {finetune}: the rate of {concept} stays below {tau}."""
    assert claim.verdict == HOLDS, str(claim)
