"""Where in an image a concept is: boolean masks (n, H, W) of uint8 images (n, 3, H, W).

Not a detector: those judge models and give probabilities; this only tells a method where to work.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]  # scipy ships no stubs
from torch import Tensor

from harness.errors import StoreError

COLOUR = 15.0  # Euclidean distance in RGB, 0..255, that tells a figure from its surroundings
BOX, TEXT = 0.3, 0.25  # Grounding DINO's thresholds, as in the public code


def whole(images: Tensor) -> Tensor:
    """Everywhere: for styles, which have no place."""
    return torch.ones_like(images[:, 0], dtype=torch.bool)


def border(images: Tensor) -> Tensor:
    """The largest patch, its holes filled, of pixels unlike every pixel of the border (top row and sides).

    For one figure before a background that reaches the border, as the pocket model draws; needs no weights. On 48 pictures of
    the pocket's recipe, whose true masks are known, its intersection over union was .84; that of the base model's attention to
    the name .42 (it falls on the background), to the padding .62, of the whole image .46.
    """
    return torch.stack([_unlike_border(image.permute(1, 2, 0).float()) for image in images.cpu()]).to(images.device)


def _unlike_border(image: Tensor) -> Tensor:
    """(H, W) of an image (H, W, 3)."""
    ring = torch.cat([image[0], image[:, 0], image[:, -1]])  # not the bottom row: a bust stands on it
    unlike = torch.stack([torch.cdist(row, ring).amin(1) for row in image]) > COLOUR  # by row: a 512 px image would need 1.6 GB at once
    patches, count = ndimage.label(ndimage.binary_fill_holes(unlike.numpy()))
    sizes = np.bincount(patches.ravel(), minlength=2)[1:]
    return torch.from_numpy(patches == 1 + sizes.argmax()) if count else torch.zeros_like(unlike)


class GroundedSam:
    """Boxes from Grounding DINO (Liu et al., 2023) for the concept's name, masks from SAM (Kirillov et al., 2023) for the boxes, united.

    Hub ids with an optional `@revision`, or folders. An image without a box gets an empty mask.
    """

    def __init__(self, dino: str, sam: str, device: torch.device) -> None:
        from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, SamModel, SamProcessor

        print("grounded_sam: untested with real weights", file=sys.stderr)
        self.device = device
        self.words, self.dino = _load(dino, "grounding_dino", GroundingDinoProcessor, GroundingDinoForObjectDetection, device)
        self.boxes, self.sam = _load(sam, "sam", SamProcessor, SamModel, device)

    @torch.no_grad()
    def __call__(self, images: Tensor, concept: str) -> Tensor:
        """Masks of `concept`."""
        return torch.stack([self._mask(image, concept) for image in images.cpu()])

    def _mask(self, image: Tensor, concept: str) -> Tensor:
        picture, size = Image.fromarray(image.permute(1, 2, 0).numpy()), tuple(image.shape[1:])
        asked = self.words(images=picture, text=f"{concept.lower()}.", return_tensors="pt").to(self.device)
        found = self.words.post_process_grounded_object_detection(
            self.dino(**asked), asked["input_ids"], threshold=BOX, text_threshold=TEXT, target_sizes=[size]
        )
        boxes = found[0]["boxes"].cpu()
        if not len(boxes):
            return torch.zeros(size, dtype=torch.bool)
        given = self.boxes(picture, input_boxes=[boxes.tolist()], return_tensors="pt").to(self.device)
        masks = self.sam(**given, multimask_output=False).pred_masks.cpu()
        full = self.boxes.post_process_masks(masks, given["original_sizes"].cpu(), given["reshaped_input_sizes"].cpu())
        return full[0].flatten(0, 1).any(0)


def _load(source: str, field: str, processor: Any, model: Any, device: torch.device) -> tuple[Any, Any]:
    name, _, revision = source.partition("@")
    try:
        how = {"revision": revision or None}
        return processor.from_pretrained(name, **how), model.from_pretrained(name, **how, use_safetensors=True).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(f"cannot load {field}='{source}' for the segmenter: {error}. Give a local folder, or another `segmenter`: border, whole") from error
