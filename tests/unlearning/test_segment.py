"""Masks: the border's unlike, everywhere, and boxes made into masks by true classes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.errors import StoreError
from harness.unlearning import _segment
from harness.unlearning._segment import GroundedSam, border, whole

CALM = settings(deadline=None, max_examples=30)


def canvas(kind: str = "gradient", size: int = 24) -> Tensor:
    """A background (3, size, size), uint8, without a figure."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grey = {"gradient": 40 + 2 * y, "folds": 60 + 40 * (x % 4 < 2), "bricks": 90 + 80 * ((y % 4 == 0) | (x % 6 == 0)), "two halves": 50 + 150 * (y > 10)}[kind]
    return torch.stack([grey, grey, grey + 10]).to(torch.uint8)


@CALM
@given(kind=st.sampled_from(["gradient", "folds", "bricks", "two halves"]), top=st.integers(2, 8), left=st.integers(2, 8), height=st.integers(4, 15))
def test_a_figure_before_a_background_is_found(kind: str, top: int, left: int, height: int) -> None:
    """A red rectangle before a gradient, folds, bricks or two halves that reach the border: exactly its pixels, and none without it."""
    plain, image = canvas(kind), canvas(kind)
    truth = torch.zeros(24, 24, dtype=torch.bool)
    truth[top : top + height, left : left + 9] = True
    image[:, truth] = torch.tensor([250, 0, 0], dtype=torch.uint8)[:, None]
    masks = border(torch.stack([image, plain]))
    assert torch.equal(masks[0], truth)
    assert not masks[1].any()


def test_holes_are_filled_specks_are_dropped_and_the_bottom_is_no_border() -> None:
    """A ring whose inside has the background's colour is a disc; a lone pixel far from it is no figure; a bust may touch the bottom."""
    image = canvas("gradient")
    truth = torch.zeros(24, 24, dtype=torch.bool)
    truth[8:24, 6:18] = True
    inside = torch.zeros_like(truth)
    inside[12:15, 10:13] = True
    speck = torch.zeros_like(truth)
    speck[3, 20] = True
    image[:, (truth & ~inside) | speck] = 255
    assert torch.equal(border(image[None])[0], truth)


def test_colours_near_the_border_s_are_background() -> None:
    """A patch 14 away in one channel is none, 16 away is one."""
    image = torch.full((3, 24, 24), 100, dtype=torch.uint8)
    for step, found in ((14, False), (16, True)):
        image[0, 8:16, 8:16] = 100 + step
        assert border(image[None]).any().item() is found


def test_whole_is_everywhere() -> None:
    """One mask an image, all true."""
    assert torch.equal(whole(torch.zeros(2, 3, 4, 5, dtype=torch.uint8)), torch.ones(2, 4, 5, dtype=torch.bool))


# --- Grounding DINO and SAM ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Random tiny models of the true classes, with their processors, as a user's folders would hold them."""
    from transformers import (
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SamConfig,
        SamImageProcessor,
        SamModel,
        SamProcessor,
    )
    from transformers.models.bert import BertConfig
    from transformers.models.sam import SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
    from transformers.models.swin import SwinConfig

    place = tmp_path_factory.mktemp("segmenters")
    words = place / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "b", "x", "y"]), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = BertConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        swin = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=32, out_features=["stage1", "stage2"])
        dino = GroundingDinoForObjectDetection(
            GroundingDinoConfig(
                backbone_config=swin, text_config=text, use_pretrained_backbone=False, backbone=None, d_model=32, num_queries=5, encoder_layers=1,
                decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_feature_levels=2,
                max_text_len=16,
            )
        )  # fmt: skip
        vision = SamVisionConfig(hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, mlp_dim=16,
                                 num_pos_feats=4, window_size=2, global_attn_indexes=[0])  # fmt: skip
        prompts = SamPromptEncoderConfig(hidden_size=8, image_size=32, patch_size=8, mask_input_channels=4)
        decoder = SamMaskDecoderConfig(hidden_size=8, mlp_dim=8, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8)
        sam = SamModel(SamConfig(vision_config=vision.to_dict(), prompt_encoder_config=prompts.to_dict(), mask_decoder_config=decoder.to_dict()))
    finding = GroundingDinoProcessor(GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}), BertTokenizerFast(str(words)))
    cutting = SamProcessor(SamImageProcessor(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}, mask_size={"longest_edge": 8}))
    for name, parts in {"dino": (dino, finding), "sam": (sam, cutting)}.items():
        for part in parts:
            part.save_pretrained(place / name)
    return str(place / "dino"), str(place / "sam")


def test_the_true_classes_load_and_give_masks(folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random Grounding DINO and SAM from folders: (n, H, W) booleans of the images' own size, and a word about the weights on stderr.
    With a threshold that no box reaches, nothing is found; with one that every box reaches, each box's mask counts.
    """
    segment = GroundedSam(*folders, torch.device("cpu"))
    assert "untested with real weights" in capsys.readouterr().err
    images = torch.randint(256, (2, 3, 20, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(_segment, "BOX", 1.0)
    assert not segment(images, "X").any()
    monkeypatch.setattr(_segment, "BOX", 0.0)
    masks = segment(images, "X")
    assert masks.shape == (2, 20, 28)
    assert masks.dtype == torch.bool


def test_the_boxes_are_those_of_the_name_and_their_masks_are_united(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Grounding DINO is asked for the name in lower case with a full stop, at the public thresholds and the image's size; SAM gets its boxes;
    a pixel counts if any box's mask holds it.
    """
    segment, asked = GroundedSam(*folders, torch.device("cpu")), {}

    def boxes(outputs: Any, ids: Tensor, **given: Any) -> list[dict[str, Tensor]]:
        asked.update(given, text=segment.words.tokenizer.decode(ids[0]))
        return [{"boxes": torch.tensor([[1.0, 2.0, 9.0, 8.0], [3.0, 3.0, 20.0, 18.0]])}]

    def cut(masks: Tensor, original: Tensor, reshaped: Tensor) -> list[Tensor]:
        asked.update(masks=masks.shape, original=original.tolist(), reshaped=reshaped.tolist())
        two = torch.zeros(2, 1, 20, 28, dtype=torch.bool)
        two[0, 0, 2:8, 1:9] = two[1, 0, 3:18, 3:20] = True
        return [two]

    monkeypatch.setattr(segment.words, "post_process_grounded_object_detection", boxes)
    monkeypatch.setattr(segment.boxes, "post_process_masks", cut)
    mask = segment(torch.zeros(1, 3, 20, 28, dtype=torch.uint8), "X")[0]
    assert (asked["threshold"], asked["text_threshold"], asked["target_sizes"]) == (0.3, 0.25, [(20, 28)])
    assert asked["text"] == "[CLS] x. [SEP]"
    assert asked["masks"][:3] == (1, 2, 1)
    assert asked["original"] == [[20, 28]]
    assert mask.sum() == 6 * 8 + 15 * 17 - 5 * 6


def test_models_that_are_not_there_name_their_field(tmp_path: Path, folders: tuple[str, str]) -> None:
    """A folder without the model: the field, what was given and the way out."""
    with pytest.raises(StoreError, match=r"cannot load sam='.*'.*another `segmenter`: border, whole"):
        GroundedSam(folders[0], str(tmp_path), torch.device("cpu"))
