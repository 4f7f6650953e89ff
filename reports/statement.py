"""The verdict as an in-toto statement: an unsigned Test Result about the candidate's files, ready to be signed.

Statement v1 (in-toto.io/Statement/v1) with predicate Test Result v0.1. Subjects are the files that were measured; the
configuration names verdict.json, the base model and the detectors by digest.
"""

from __future__ import annotations

from typing import Any

from harness.spec import HOLDS
from reports.verdict import Exit, Report

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"


def of(report: Report, verdict: str) -> dict[str, Any]:
    """The statement; `verdict` is the SHA-256 of verdict.json.

    Nothing is a warning: policies may let those through, and neither doubt nor a selection that is no gate may pass.
    """
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in report.subjects.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "PASSED" if report.exit_code is Exit.HOLDS else "FAILED",
            "configuration": [{"name": "verdict.json", "digest": {"sha256": verdict}}, *_instruments(report)],
            "passedTests": [c.id for c in report.claims if c.verdict == HOLDS],
            "warnedTests": [],
            "failedTests": [*(c.id for c in report.claims if c.verdict != HOLDS), *report.missing],
        },
    }


def _instruments(report: Report) -> list[dict[str, Any]]:
    """Base models and detectors. Their addresses are this project's own digests, and are called that."""
    bases = {made["base"] for made in report.lineages.values()}
    detectors = {c.detector for c in report.claims if c.detector}
    found = [("base model", each) for each in sorted(bases)] + [("detector", each) for each in sorted(detectors)]
    return [{"name": name, "digest": {"resurgenceAddress": digest}} for name, digest in found]
