"""One tiny model for everybody, and other processes to race against and to kill."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from harness.pipeline import Pipe
    from harness.spec import Base

PATIENCE = 90  # seconds until a child counts as hung
PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once; its children start in milliseconds
PROCESSES.set_forkserver_preload(
    ["pytest", "tests.tiny", "harness.engine", "harness.unlearning.esd", "harness.unlearning.dimum", "harness.finetuning.full", "harness.finetuning.lora"]
)


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The house's own tests run on the CPU, where equal means bit for bit, unless marked `gpu`."""
    if "gpu" in request.keywords:
        return
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
    if "torch" in sys.modules:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


# --- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random pipeline on disk."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def base(tiny_folder: Path) -> Base:
    """The tiny model as a base model."""
    from harness import pipeline

    return pipeline.identify(str(tiny_folder))


@pytest.fixture(scope="session")
def _loaded(base: Base) -> Pipe:
    from harness import pipeline

    return pipeline.load(base)


@pytest.fixture
def pipe(_loaded: Pipe) -> Pipe:
    """The tiny model in memory, a fresh copy for every test."""
    return copy.deepcopy(_loaded)


# --- other processes -------------------------------------------------------------------------------------------------


class Child:
    """A process that runs `target(*args)`; what `target` returns or raises arrives as `result`."""

    def __init__(self, target: Callable[..., Any], *args: Any) -> None:
        self.receiver, sender = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=_answer, args=(sender, target, args), daemon=True)
        self.process.start()
        sender.close()

    def result(self, patience: float = PATIENCE) -> Any:
        """What the child sent next; an error if it died or hung instead."""
        if not self.receiver.poll(patience):
            raise TimeoutError(f"process {self.process.pid} said nothing for {patience} s")
        return self.receiver.recv()

    def wait(self) -> int:
        """The exit code; minus the signal's number if a signal ended it."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            raise TimeoutError(f"process {self.process.pid} still runs after {PATIENCE} s")
        return self.process.exitcode

    def kill(self) -> int:
        """SIGKILL it."""
        self.process.kill()
        return self.wait()


def _answer(sender: Connection, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    sender.send(target(*args))


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """Start a `Child`; none outlives its test."""
    children: list[Child] = []

    def start(target: Callable[..., Any], *args: Any) -> Child:
        children.append(Child(target, *args))
        return children[-1]

    yield start
    for each in children:
        each.kill()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, as in the children: equal bits are promised at an equal number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def eventually(true: Callable[[], bool]) -> bool:
    """Wait until something is so, but not forever."""
    end = time.monotonic() + PATIENCE
    while not (done := true()) and time.monotonic() < end:
        time.sleep(0.005)
    return done


def die() -> None:
    """SIGKILL this very process."""
    os.kill(os.getpid(), 9)
