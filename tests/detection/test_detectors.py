"""What every detector promises. A new file in `harness/detection` fails here until it has a case in `_eyes_of.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import catalogue
from harness.errors import StoreError
from tests.detection._eyes_of import MAKERS, Case, blank, noise

NAMES = catalogue.names("detection")
_made: dict[str, Case] = {}


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each detector of the folder, made once."""
    name = request.param
    if name not in _made:
        _made[name] = MAKERS[name](tmp_path_factory.mktemp(name))
    return _made[name]


def index(case: Case) -> torch.Tensor:
    """The label's place."""
    return torch.tensor([case.detector.labels.index(case.label)])


def test_every_image_gets_probabilities_for_every_label(case: Case) -> None:
    """(n, labels), float32 on the CPU, in [0, 1]; no label twice, and none is one of them where there is one."""
    images = torch.cat([noise(2, case.size), blank(case.size)])
    scores = case.detector(images)
    assert scores.shape == (3, len(case.detector.labels))
    assert (scores.dtype, scores.device.type, scores.requires_grad) == (torch.float32, "cpu", False)
    assert scores.min() >= 0
    assert scores.max() <= 1 + 1e-6
    assert len(set(case.detector.labels)) == len(case.detector.labels)
    assert case.detector.none in (None, *case.detector.labels)


def test_what_is_seen_does_not_depend_on_the_company(case: Case) -> None:
    """The same images again: equal bit for bit. One at a time, or in another order: the same within rounding."""
    images = torch.cat([noise(2, case.size), blank(case.size)])
    scores = case.detector(images)
    assert torch.equal(scores, case.detector(images))
    assert torch.allclose(scores, case.detector(images, batch=1), atol=1e-5)
    assert torch.allclose(scores.flip(0), case.detector(images.flip(0), batch=2), atol=1e-5)


def test_it_sees_what_is_there_and_nothing_in_a_blank_image(case: Case) -> None:
    """Its own example is a hit under its rule; images of one colour are not."""
    rule = case.rule.fits(case.detector)
    assert rule.hits(case.detector(case.hits), index(case)).tolist() == [1]
    empty = torch.cat([blank(case.size, grey) for grey in case.greys])
    assert rule.hits(case.detector(empty), index(case).repeat(len(empty))).sum() == 0


def test_it_says_what_it_is(case: Case) -> None:
    """A description for the verdict, and an address of 32 hex digits."""
    assert case.detector.description
    assert len(case.detector.address) == 32


@pytest.mark.parametrize(
    ("name", "arguments", "fetch"),
    [
        ("classifier", (), "style50.pth"),
        ("clip", (["cat"],), "hf download"),
        ("gcd", (), "resources.tar.gz"),
        ("safety_checker", (), "CompVis/stable-diffusion-safety-checker"),
        ("laion_nsfw", ("pocket",), "clip_ViT-L-14_openai_binary_nsfw_head.pth"),
        ("q16", ("pocket",), "data/ViT-L-14/prompts.p"),
    ],
)
def test_missing_weights_are_told_how_to_be_fetched(name: str, arguments: tuple[object, ...], fetch: str, tmp_path: Path) -> None:
    """An empty folder: the error names the file that lacks and the one to fetch."""
    with pytest.raises(StoreError, match=r"no .* in ") as raised:
        catalogue.find("detection", name)(str(tmp_path), *arguments)
    assert fetch in str(raised.value)


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    """A file that is no safetensors: which one, and what to do."""
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StoreError, match=r"model\.safetensors' cannot be read.*convert it again"):
        catalogue.find("detection", "q16")(str(tmp_path), "pocket")


@pytest.mark.parametrize("name", ["gcd", "safety_checker", "laion_nsfw", "q16"])
def test_what_nobody_ran_on_real_weights_says_so(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The verdict carries the words until somebody has."""
    if name not in _made:
        _made[name] = MAKERS[name](tmp_path_factory.mktemp(name))
    assert "untested with real weights" in _made[name].detector.description


def test_collection_loads_no_detector() -> None:
    """Naming the folder's detectors imports neither torch nor any of them."""
    code = "import sys; from harness import catalogue; catalogue.names('detection'); sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'nudenet')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
