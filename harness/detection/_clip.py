"""Two CLIP towers from a folder, whichever library wrote it: open_clip or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from harness import pocket
from harness.detection import _eyes
from harness.errors import StoreError
from harness.spec import key, sha256

FETCH = (
    "A CLIP folder holds either open_clip_config.json and open_clip_model.safetensors (open_clip's layout, for example"
    " `hf download timm/vit_base_patch32_clip_224.openai`) or a transformers CLIPModel (config.json, model.safetensors, tokenizer files,"
    " for example `hf download openai/clip-vit-large-patch14`); give its path"
)
TOKENS = (  # what a tokenizer of transformers may be made of
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PIXELS = "preprocessor_config.json"


class Clip:
    """Embeds images and texts on the unit sphere of `width` dimensions; `scale` is the learned inverse temperature.

    A text longer than the context is cut, as in every published CLIP score.
    """

    width: int
    scale: float
    _see: Callable[[Tensor], Tensor]
    _read: Callable[[list[str]], Tensor]

    def __init__(self, folder: str) -> None:
        path = pocket.CLIP if folder == "pocket" else Path(folder)
        opened = (path / "open_clip_config.json").is_file()
        files = _files(path, opened)
        digests = {name: sha256(path / name) for name in files} if folder == "pocket" else _eyes.pinned(path, files, FETCH)
        self.device = _eyes.device()
        self.size, self.mean, self.std = 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        try:
            (self._open if opened else self._transformers)(path)
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise StoreError(f"'{path}' does not load as CLIP: {error}. {FETCH}") from error
        self.digest = key(list(digests.values()))
        self.name = f"CLIP {path.name} ({'open_clip' if opened else 'transformers'}, {self.width} dimensions, {self.size} px, weights {self.digest[:12]})"

    def images(self, images: Tensor, batch: int = 64) -> Tensor:
        """Unit vectors (n, width) of images (n, 3, h, w) in [0, 1]."""
        return _eyes.seen(self._look, images, batch, self.device)

    def texts(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Unit vectors (n, width)."""
        with torch.no_grad():
            parts = [self._read(list(texts[i : i + batch])) for i in range(0, len(texts), batch)]
        return normalize(torch.cat(parts).float().cpu(), dim=1)

    def _look(self, images: Tensor) -> Tensor:
        return normalize(self._see(_eyes.normalised(_eyes.resized(images, self.size), self.mean, self.std)).float(), dim=1)

    def _open(self, path: Path) -> None:
        import open_clip

        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{path}", device=self.device)
        tokens: Any = open_clip.get_tokenizer(f"local-dir:{path}")
        settings = open_clip.get_model_preprocess_cfg(model)
        size = settings["size"]
        self.size, self.mean, self.std = size if isinstance(size, int) else size[0], settings["mean"], settings["std"]
        model.eval().requires_grad_(False)
        self.scale = float(model.logit_scale.exp())
        self._see, self._read = model.encode_image, lambda texts: model.encode_text(tokens(texts).to(self.device))
        self.width = self._read(["a"]).shape[1]

    def _transformers(self, path: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model: Any = CLIPModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True).eval().requires_grad_(False).to(self.device)
        tokenizer, limit = AutoTokenizer.from_pretrained(path), model.config.text_config.max_position_embeddings
        self.size, self.width = model.config.vision_config.image_size, model.config.projection_dim
        if (settings := path / PIXELS).is_file():
            stored = json.loads(settings.read_text(encoding="utf-8"))
            self.mean, self.std = tuple(stored["image_mean"]), tuple(stored["image_std"])
        self.scale = float(model.logit_scale.exp())

        def read(texts: list[str]) -> Tensor:
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").to(self.device)
            return model.text_projection(model.text_model(input_ids=tokens.input_ids).pooler_output)

        self._see = lambda images: model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        self._read = read


def _files(path: Path, opened: bool) -> list[str]:
    """All that the answers depend on: what must be there, and of what may be there what is. Most open_clip models have their tokens from the library."""
    needed, optional = ["config.json", "model.safetensors"], [PIXELS, *TOKENS]
    if opened:
        needed = ["open_clip_config.json", "open_clip_model.safetensors"]
        named = '"hf_tokenizer_name"' in (path / needed[0]).read_text(encoding="utf-8", errors="replace")
        optional = [*TOKENS] if named else []
    return [*needed, *(name for name in optional if (path / name).is_file())]
