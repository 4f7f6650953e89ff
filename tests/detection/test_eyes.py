"""Digests are pinned, images are resized and normalised as the models expect, and a batch never matters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness.detection import _eyes
from harness.errors import StoreError
from harness.spec import sha256


def test_a_digest_is_recorded_on_first_use_and_pinned(tmp_path: Path) -> None:
    """The first use writes it, the second accepts it, another file is refused with both digests and the next step."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    first = _eyes.pinned(tmp_path, ["model.safetensors"], "")
    assert first == json.loads((tmp_path / "pinned.json").read_text()) == {"model.safetensors": sha256(file)}
    assert _eyes.pinned(tmp_path, ["model.safetensors"], "") == first
    file.write_bytes(b"two")
    with pytest.raises(StoreError, match=f"{first['model.safetensors'][:12]}, now {sha256(file)[:12]}.*delete"):
        _eyes.pinned(tmp_path, ["model.safetensors"], "")
    (tmp_path / "pinned.json").unlink()
    assert _eyes.pinned(tmp_path, ["model.safetensors"], "") != first


def test_a_further_file_joins_the_record(tmp_path: Path) -> None:
    """What is used later is pinned later; what was pinned stays."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    _eyes.pinned(tmp_path, ["a"], "")
    _eyes.pinned(tmp_path, ["b"], "")
    assert set(json.loads((tmp_path / "pinned.json").read_text())) == {"a", "b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "pinned.json"]


def test_a_missing_file_says_what_to_fetch(tmp_path: Path) -> None:
    """Nothing is recorded of a folder that is not complete."""
    with pytest.raises(StoreError, match=r"no b in '.*'\. Fetch it there"):
        _eyes.pinned(tmp_path, ["b"], "Fetch it there")
    assert not list(tmp_path.iterdir())


def test_sizes_and_channels() -> None:
    """Same size: untouched. Another: squashed to a square within [0, 1]. Mean and deviation go channel by channel."""
    images = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0)).round()
    assert _eyes.resized(images[..., :6, :], 6) is not images
    assert torch.equal(_eyes.resized(images[..., :6, :], 6), images[..., :6, :])
    small = _eyes.resized(images, 4)
    assert small.shape == (2, 3, 4, 4)
    assert 0 <= small.min() <= small.max() <= 1
    shifted = _eyes.normalised(images, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    assert torch.allclose(shifted[:, 2], (images[:, 2] - 1) / 2)
    assert torch.allclose(shifted[:, 1], images[:, 1] * 2 - 1)


def test_looking_leaves_no_gradient_and_ends_in_float32_on_the_cpu() -> None:
    """Whatever the model computes in."""
    weight = torch.ones(1, requires_grad=True)
    out = _eyes.seen(lambda x: (x.flatten(1).sum(1) * weight).double(), torch.ones(5, 3, 2, 2), 2, torch.device("cpu"))
    assert (out.tolist(), out.dtype, out.requires_grad) == ([12.0] * 5, torch.float32, False)
