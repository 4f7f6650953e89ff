"""The lines that long work shows: whose, where, and when not."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from fixtures import progress
from fixtures.progress import Progress, quiet, writer


class Screen(io.StringIO):
    """A terminal that keeps what was written to it."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def until(true: Any) -> bool:
    """Wait for a thread, but not for ever."""
    end = time.monotonic() + 20
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(true())


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIVE", 0.01)
    monkeypatch.setattr(progress, "PLAIN", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("1", True), ("", False), ("false", False), (None, False)])
def test_ci_is_quiet(value: str | None, expected: bool) -> None:
    """A job that says CI gets no lines; one that says CI=false is a person."""
    assert quiet({} if value is None else {"CI": value}) is expected


@pytest.mark.usefixtures("_often")
def test_each_worker_has_its_newest_line() -> None:
    """On a terminal every worker's newest line is drawn, the older one of the same worker is not added to it."""
    screen = Screen()
    shown = Progress(screen)
    writer(str(shown.path), "gw0")("Ada: 1/40")
    assert until(lambda: "gw0  Ada: 1/40" in screen.getvalue())
    writer(str(shown.path), "gw1")("Alan: 2/40")
    writer(str(shown.path), "gw0")("Ada: 2/60")
    assert until(lambda: "Ada: 2/60" in screen.getvalue())
    shown.close()
    last = screen.getvalue().rpartition("gw0")[2]
    assert "Alan: 2/40" in last
    assert not shown.path.exists()


@pytest.mark.usefixtures("_often")
def test_while_somebody_else_writes_nothing_is_drawn() -> None:
    """What is drawn is taken away before pytest writes, and comes back only after, when there is something new."""
    screen = Screen()
    shown = Progress(screen)
    writer(str(shown.path), "gw0")("one")
    writer(str(shown.path), "gw1")("uno")
    assert until(lambda: "uno" in screen.getvalue())
    with shown.hidden():
        before = screen.getvalue()
        assert before.endswith("\x1b[2K")  # the line is erased
        writer(str(shown.path), "gw0")("two")
        time.sleep(0.1)
        assert screen.getvalue() == before
    screen.write("F")  # pytest's own
    assert until(lambda: "two" in screen.getvalue())
    shown.close()
    assert "F\n\x1b[?25l" in screen.getvalue()
    assert "\x1b[1A" not in screen.getvalue().rpartition("F\n")[2].partition("two")[0]  # it does not reach above its own line


@pytest.mark.usefixtures("_often")
def test_a_file_gets_plain_lines() -> None:
    """Without a terminal each change is a line without control characters, even if a name has some."""
    plain = io.StringIO()
    shown = Progress(plain)
    writer(str(shown.path), "gw0")("\x1b[31mAda\x07:\n1/40 [red]")
    assert until(lambda: "1/40" in plain.getvalue())
    shown.close()
    (line,) = plain.getvalue().strip().splitlines()
    assert line.isprintable()
    assert line.endswith("gw0  ?[31mAda?: 1/40 [red]")


@pytest.mark.usefixtures("_often")
def test_silence() -> None:
    """Where nobody watches nothing is written, and the file still takes lines."""
    screen = Screen()
    shown = Progress(screen, silent=True)
    writer(str(shown.path))("one")
    time.sleep(0.1)
    shown.close()
    assert screen.getvalue() == ""
