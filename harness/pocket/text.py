"""Words: the tokenizer, and a small CLIP trained on the renders, whose text tower conditions the denoiser."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from harness.pocket import captions, labels, vocabulary
from harness.pocket.data import Pictures
from harness.pocket.pictures import SIZE
from harness.pocket.vae import batches, to_tensor

CONTEXT, WIDTH, PROJECTION, LAYERS, HEADS, PATCH = 24, 96, 64, 3, 4, 16
BATCH, RATE = 128, 2e-3
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in CLIP's order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(others))]


def merge_rules(words: list[str]) -> list[tuple[str, str]]:
    """BPE merges that make every word one token. A later word's new rules rank below all that earlier words need."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(best, len(ranks))
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
    return list(ranks)


def tokenizer() -> CLIPTokenizer:
    """A `CLIPTokenizer` of context 24 in which every word of the vocabulary is one token."""
    merges = merge_rules(captions.every_word())
    symbols = byte_symbols()
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    numbers = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(
        vocab=numbers, merges=merges, bos_token=START, eos_token=END, unk_token=END, pad_token=END,
        model_max_length=CONTEXT,
    )  # fmt: skip


def build(words: CLIPTokenizer) -> CLIPModel:
    """Text tower 3 x 96, image tower 3 x 96 on 16-pixel patches."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
             "num_attention_heads": HEADS, "projection_dim": PROJECTION}  # fmt: skip
    text = tower | {
        "vocab_size": len(words), "max_position_embeddings": CONTEXT,
        "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def image_processor() -> CLIPImageProcessor:
    """What the image tower expects: 64 pixels, in [-1, 1]; smaller pictures are enlarged."""
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def write(pictures: Pictures, rows: np.ndarray, rng: random.Random) -> list[str]:
    """A fresh caption for each of the pictures `rows`."""
    names = [*labels()]
    styles = ["", *(style["name"] for style in vocabulary()["concepts"]["styles"])]
    places = vocabulary()["concepts"]["backgrounds"]
    return [captions.caption(names[pictures.label[row]], styles[pictures.style[row] + 1], places[pictures.place[row]], rng) for row in rows]


def token_ids(words: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(n, 24), padded."""
    batch = words(texts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch["input_ids"])


def features(clip: CLIPModel, ids: torch.Tensor | None = None, pixels: torch.Tensor | None = None) -> torch.Tensor:
    """Unit-length projections of texts or of pictures in [-1, 1]."""
    if ids is not None:
        return functional.normalize(clip.text_projection(clip.text_model(input_ids=ids).pooler_output), dim=-1)
    return functional.normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def contrast(logits: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
    """InfoNCE; half of the target is the own caption (teaches the background), half any caption of the subject."""
    same = (subject[:, None] == subject[None]).float()
    target = 0.5 * torch.eye(len(subject), device=subject.device) + 0.5 * same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train(pictures: Pictures, words: CLIPTokenizer, steps: int, seed: int, device: torch.device) -> CLIPModel:
    """Seeded contrastive training on `device`. No weight decay: words that are never read keep their first embedding."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    clip = build(words).to(device).train()
    optimiser = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step, rows in zip(range(steps), batches(len(pictures.label), BATCH, seed), strict=False):
        ids = token_ids(words, write(pictures, rows, rng)).to(device)
        logits = features(clip, pixels=to_tensor(pictures.images[rows]).to(device)) @ features(clip, ids=ids).T
        subject = torch.from_numpy(pictures.label[rows] * 8 + pictures.style[rows]).to(device)
        value = contrast(clip.logit_scale.exp() * logits, subject)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=4.6)
        if step % 100 == 0:
            print(f"text {step}/{steps} loss {value.item():.3f} {time.monotonic() - started:.0f} s", flush=True)
    return clip.cpu().eval()


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The pipeline's text encoder: the same weights as a `CLIPTextModel`."""
    tower = CLIPTextModel(clip.config.text_config)
    state = {name: value for name, value in clip.state_dict().items() if name.startswith("text_model.")}
    if not any(name.startswith("text_model.") for name in tower.state_dict()):
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    tower.load_state_dict(state, strict=False)
    missing = set(tower.state_dict()) - set(state) - {"embeddings.position_ids", "text_model.embeddings.position_ids"}
    if missing:
        raise RuntimeError(f"CLIPTextModel kept untrained weights {sorted(missing)[:3]}; its layout changed")
    return tower.eval()


@torch.no_grad()
def embeddings(tower: CLIPTextModel, words: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """(n, 24, 96): `encoder_hidden_states` as the pipeline computes them."""
    ids = token_ids(words, texts).to(tower.device)
    return torch.cat([tower(part).last_hidden_state for part in ids.split(512)])
