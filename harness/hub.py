"""Models of the Hugging Face hub: local snapshots at a commit. `HF_HUB_OFFLINE` is honoured, and no pickle is ever fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import SpecError

SETTINGS = ("*.json", "*.txt", "*/*.json", "*/*.txt")
PIPELINE = (*SETTINGS, "*/*.safetensors")


def named(source: str) -> bool:
    """Whether this reads as `owner/name` or `owner/name@revision`, and not as a path."""
    name = source.partition("@")[0]
    return name.count("/") == 1 and not source.startswith((".", "/", "~")) and not name.endswith(".safetensors")


def snapshot(source: str) -> Path:
    """The hub's snapshot of a candidate: a pipeline's parts, or whatever safetensors stand alone."""
    whole = (download(source, SETTINGS) / "model_index.json").is_file()
    return download(source, PIPELINE if whole else (*SETTINGS, "*.safetensors"))


def download(source: str, patterns: Sequence[str] = PIPELINE) -> Path:
    """The snapshot of `owner/name@revision`, named by its commit, with the files that the patterns match."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = constants.HF_HUB_OFFLINE
        why = f"HF_HUB_OFFLINE is set and the cache at {constants.HF_HUB_CACHE} lacks it" if offline else error
        where = f", or fetch it where there is a network: hf download {name}{f' --revision {revision}' if revision else ''}"
        raise SpecError(f"cannot fetch the model '{source}': {why}. Give a local diffusers folder instead{where}") from error
