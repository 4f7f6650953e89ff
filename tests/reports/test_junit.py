"""A claim as JUnit properties."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from hypothesis import given, settings

from reports.junit import properties, text
from tests.reports.samples import NAMES, NASTY, claim, rate


def test_the_numbers_are_there() -> None:
    """Verdict, counts, bounds, tolerance, steps and seeds of a claim can be read without any other file."""
    found = dict(properties(claim(rate=rate(14), seeds={"unlearn": 0, "finetune": 1})))
    expected = {"verdict": "holds", "k": "14", "n": "40", "value": "0.35", "tolerance": "0.1", "steps": "200", "method": "esd", "seed.finetune": "1"}
    assert {name: found[name] for name in expected} == expected
    assert {"word", "low", "high", "finetune", "concept", "lineage", "before.value", "base.value"} <= found.keys()


def test_what_was_not_measured_is_left_out() -> None:
    """A claim without a rate has no `k`: nobody can take it for zero hits."""
    found = dict(properties(claim(rate=None, before=None, finetune=None)))
    assert not {"k", "n", "value", "before.k", "finetune"} & found.keys()


@settings(deadline=None, max_examples=80)
@given(NAMES)
def test_any_name_parses_as_xml(name: str) -> None:
    """Whatever a concept or a seed is called, the properties are well-formed XML and come back as they were given."""
    pairs = properties(claim(name, seeds={name: 0}))
    suite = ET.Element("properties")
    for key, value in pairs:
        ET.SubElement(suite, "property", name=key, value=value)
    read = ET.fromstring(ET.tostring(suite, encoding="unicode"))
    assert [(one.get("name"), one.get("value")) for one in read] == pairs


def test_control_characters_leave_a_mark() -> None:
    """A character that XML forbids is replaced by a visible mark instead of vanishing."""
    assert dict(properties(claim(NASTY[4])))["concept"].startswith("\ufffd\ufffd\ufffd[31mred")


@settings(deadline=None, max_examples=60)
@given(NAMES)
def test_system_out_repeats_every_number(name: str) -> None:
    """The text has the sentence, each property and the hits of each prompt, one printable line each, whatever the names."""
    found = claim(name, hits={name: "0110"}, evidence={"holds": 3.5}, seeds={name: 0})
    lines = text(found).split("\n")
    assert len(lines) == 2 + len(properties(found))
    assert all(line.isprintable() for line in lines)
    assert {"k: 0", "n: 40", "log_e.holds: 3.5", "tolerance: 0.1"} <= set(lines)
    assert lines[-1].endswith(": 2/4")
