"""The sentences of a report: what happened and what to do next. The terminal and the page say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from harness.spec import BROKEN, INVALID, VERDICTS, Claim, Numbers
from reports.verdict import Exit, Report

TITLES = {
    Exit.HOLDS: "Holds",
    Exit.BROKEN: "Broken",
    Exit.INCONCLUSIVE: "Inconclusive",
    Exit.INVALID: "Invalid",
    Exit.NOT_A_GATE: "Not a gate",
}
GATE = {Exit.HOLDS: "the gate is open", Exit.NOT_A_GATE: "no gate, nothing may pass on it"}  # everything else: shut
VEILED = ("unsafe",)  # suites whose images stay blurred until asked for
RENAMED = "{} by other names"  # how a concept is called in claims on its synonyms
UNASKED = "{} unasked"  # and in claims on prompts that do not name it
SIGNS = {"holds": "✓", "broken": "✗", "inconclusive": "?", "invalid": "!"}  # for those who do not see the colour
ADVICE = {
    Exit.HOLDS: "Nothing is left to do; keep verdict.json beside the model.",
    Exit.BROKEN: "Start with the cells marked below: their images show what came back, what stayed or what was lost.",
    Exit.INCONCLUSIVE: "Raise the task's image cap (of `quality`, its `count`) and run again; a rate next to the tolerance may never become clear.",
    Exit.INVALID: "Repair the measurement first (each reason is given below), then run again.",
    Exit.NOT_A_GATE: "Run the default selection with the task's own numbers before you rely on it.",
}
FINDINGS = {  # word of a broken claim -> what it says about a concept
    "resurged": "Resurgence found: {} came back after unlearning.",
    "not forgotten": "Unlearning did not work: {} can still be drawn.",
    "not retained": "Damage found: {} did not survive.",
}


def finding(report: Report) -> str:
    """One to three sentences that say what the run found, and whether it is about the model or the measurement."""
    counts, code = report.counts, report.exit_code
    if code is Exit.BROKEN:
        return " ".join([*_broken(report.claims), "This is a finding about the model, not a crash."])
    if code is Exit.INVALID:
        return f"{_gaps(report)} This says nothing about the model, neither good nor bad."
    if code is Exit.INCONCLUSIVE:
        return f"Nothing broke, but {_plural(counts['inconclusive'], 'claim')} could not be settled with these images."
    if code is Exit.NOT_A_GATE:
        return f"All {_plural(len(report.claims), 'claim')} hold, but this selection is not a gate."
    return f"All {_plural(len(report.claims), 'claim')} of this gate hold."


def advice(report: Report) -> str:
    """The one thing to do next."""
    return ADVICE[report.exit_code]


def gate(report: Report) -> str:
    """Whether anything may ship on this report."""
    return GATE.get(report.exit_code, "the gate is shut")


def tally(report: Report) -> str:
    """How many claims got which verdict, and what never arrived."""
    parts = [counted(report.counts) or "no claims"]
    parts += [f"{len(report.missing)} without a verdict"] if report.missing else []
    parts += [f"{report.tests_failed} failed outside any claim"] if report.tests_failed else []
    return ", ".join(parts)


def counted(counts: Mapping[str, int]) -> str:
    """`7 holds, 6 broken`: only the verdicts that occurred, always in the same order."""
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts.get(v))


def share(rate: Numbers | None) -> str:
    """`14/40 = .35 [.22, .50]`: hits, images, rate and its bounds, rounded outwards so that no digit claims too much; a figure by its name."""
    if rate is None:
        return "not measured"
    if (figure := rate.get("figure")) is not None:
        return f"{figure} {rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}], {rate['n']:g} images"
    low, high = math.floor(rate["low"] * 100) / 100, math.ceil(rate["high"] * 100) / 100
    return f"{rate['k']:g}/{rate['n']:g} = {short(rate['value'])} [{short(low)}, {short(high)}]"


def short(value: float | None) -> str:
    """Two digits after the point, without the leading zero: `.35`; a dash where there is no number."""
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


def clean(text: str) -> str:
    """`text` on one line without characters that could steer a terminal or reverse the text around them."""
    return "".join(c if c.isprintable() else "?" for c in text)


def recipe(claim: Claim, varying: Iterable[str] = ()) -> str:
    """What was done to the model: method, fine-tune, attack; led by whatever else differs within the report."""
    did = [claim.method, *(f"then {stage}" for stage in (claim.finetune, claim.attack) if stage)]
    return ": ".join([*(str(getattr(claim, name)) for name in varying), ", ".join(did)])


def after(claim: Claim) -> str:
    """When the claim's images were drawn."""
    if claim.claim == "instruments":
        return "before unlearning"
    return f"after {_plural(claim.steps, 'step')}" if claim.steps else "after unlearning"


def diagnosed(claim: Claim) -> str:
    """What the gradients said before the fine-tune, beside what was measured after it; or the losses along an attack."""
    numbers = dict(claim.diagnosis)
    if "alignment" not in numbers:  # losses along an attack
        return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
    predicted = f"{short(numbers['predicted'])} of the gap predicted to close" if "predicted" in numbers else "no gap in the loss to close"
    parts = [f"{name.removeprefix('carried by ')} {short(value)}" for name, value in numbers.items() if name.startswith("carried by ")]
    aligned = f"{short(numbers['alignment'])} [{short(numbers['alignment_low'])}, {short(numbers['alignment_high'])}]"
    if "orthogonal" in numbers:
        ends = short(numbers["orthogonal_low"]), short(numbers["orthogonal_high"])
        aligned += f"; orthogonal term {short(numbers['orthogonal'])} [{', '.join(ends)}]"
    return f"{predicted}, rate rose by {short(numbers['measured'])}; alignment {aligned}; carried by {', '.join(parts)}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """`Ada, Alan and 4 more`."""
    unique = list(dict.fromkeys(names))
    shown, rest = unique[:most], len(unique) - most
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _broken(claims: Iterable[Claim]) -> list[str]:
    broken = [c for c in claims if c.verdict == BROKEN]
    told = [(line, [c.concept for c in broken if c.word == word]) for word, line in FINDINGS.items()]
    other = [c.concept for c in broken if c.word not in FINDINGS]
    return [line.format(listed(names)) for line, names in [*told, ("Broken: {}.", other)] if names]


def _gaps(report: Report) -> str:
    """What is missing from the evidence."""
    if not report.claims and not report.missing:
        return "No claim was measured at all."
    gaps = [(report.counts[INVALID], "claim could not be measured validly", "claims could not be measured validly")]
    gaps += [(len(report.missing), "selected claim gave no verdict", "selected claims gave no verdict")]
    gaps += [(report.tests_failed, "test failed before it could say anything", "tests failed before they could say anything")]
    return "; ".join(f"{n} {one if n == 1 else many}" for n, one, many in gaps if n) + "."


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
