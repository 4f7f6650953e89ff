"""The CI examples: they parse, their platforms' own schemas accept them, and every word of their command exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "reports" / "examples"
FILES = {"github-actions.yml": "vendor.github-workflows", "gitlab-ci.yml": "vendor.gitlab-ci"}


def scripts(value: Any) -> list[str]:
    """Every shell line of a workflow or job."""
    if isinstance(value, dict):
        lines = [value[key] for key in ("run",) if key in value] + list(value.get("script", []))
        return lines + [line for each in value.values() for line in scripts(each)]
    return [line for each in value for line in scripts(each)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", FILES)
def test_the_platform_accepts_it(name: str) -> None:
    """The published schema of GitHub or GitLab, as shipped in check-jsonschema, finds nothing wrong."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema, of the dev extra, holds the platforms' schemas")
    options = ["--data-transform", "gitlab-ci"] if "gitlab" in name else []
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", FILES[name], *options, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_the_shell_accepts_it(name: str) -> None:
    """Every script line is valid shell, and no value from outside is pasted into one."""
    lines = scripts(yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8")))
    assert len(lines) >= 2
    for line in lines:
        assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
        assert "${{" not in line


@pytest.mark.parametrize("name", FILES)
def test_pytest_knows_every_option(name: str, request: pytest.FixtureRequest) -> None:
    """The command names options that exist, and writes JUnit into the folder that is kept."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    (line,) = [line for line in scripts(yaml.safe_load(text)) if line.startswith("pytest ")]
    words = shlex.split(line)
    known = {option for group in request.config._parser._groups for each in group.options for option in each.names()}
    assert {word for word in words if word.startswith("-")} <= known | {"-n"}
    assert (Path(__file__).parents[2] / words[1]).is_dir()
    assert words[words.index("--junitxml") + 1].startswith(words[words.index("--report") + 1])


@pytest.mark.parametrize("name", FILES)
def test_the_report_is_kept_when_the_gate_is_shut(name: str) -> None:
    """A red gate is what the report is for: it is uploaded always, and nothing turns the red into green."""
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert re.search(r"if: always\(\)|when: always", text)
    assert not re.search(r"continue-on-error|allow_failure|\|\| true", text)
