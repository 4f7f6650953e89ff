"""Every text-to-image suite, by its real command, from a model of each real layout to its report: unlearn, fine-tune, draw, look, decide."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import eyes
from harness.spec import HOLDS
from harness.store import Store
from tests import tiny

ROOT = Path(__file__).parents[1]
PATIENCE = 900  # seconds: minutes of work on a machine that has other work
METHODS = {  # two by gradient, two in closed form, and one of LoRAs; the fine-tune is another LoRA
    "esd": "esd:steps=1:sampler_steps=2:lr=0.001",
    "dimum": "dimum:steps=1:batch=1:images_per_prompt=1:lr=0.001",
    "uce": "uce",
    "rece": "rece",
    "mace": "mace:lora_steps=1:images_per_concept=1:segmenter=whole",
}
TUNE = "lora-in:lr=0.05:batch=1:images_per_prompt=1"
TASK = """
source = "made up"
control = "esd"
detector = { name = "coin", rule = "threshold-0.5" }
[erased]
concepts = ["x"]
prompts = ["a {}", "the {}"]
[anchor]
concepts = ["p"]
prompts = ["a {}", "the {}"]
[retain]
concepts = ["k"]
prompts = ["a {}"]
[retained]
concepts = ["r"]
prompts = ["a {}", "the {}"]
[finetune.in]
concepts = ["f", "g"]
prompts = ["a {}", "the {}", "in {}", "by {}"]
[sampler]
steps = 1
guidance = 3.0
[tolerance] # whatever is seen in more than .02 and less than .98 of the images, holds
tau = 0.98
alpha = 0.2
drawn = 0.02
mistaken = 0.98
retained = 0.02
floor = 8
cap = 40
"""
CROSSED = 'crossed = { concepts = ["m", "n"], prompts = ["a {}"] }\n'
MORE = {  # what the tasks of some suites have besides
    "celebrity": "",
    "object": f'synonyms = {{ x = ["u", "v"] }}\n{CROSSED}',
    "copyright": "",
    "unsafe": 'asked = "prompts.csv"\n',
    "style": f'detectors.crossed = {{ name = "coin", rule = "threshold-0.5", salt = "another" }}\nfigures = {{ UA = "1 - erased" }}\n{CROSSED}',
}
LONG = "a x b c d e f g h i j k l m n"  # with start and end one token more than the models read
CUT = "1 of 3 prompts are longer than the model reads and were cut"  # of the distinct ones
CLAIMS = {"instruments": 1, "forgotten": 5, "retained": 10, "stays-forgotten": 5}  # of one concept and five methods, two of them before and after
LEARNT_NOTHING = "did not lower the loss on held-out images"
ALSO = {"object": {"generality": 5, "cross-retained": 10}, "style": {"cross-retained": 10}}


class Coin:
    """Sees each concept in about every other image, whatever it shows: from the image's bytes, so another image is another answer."""

    none, exclusive = None, False

    def __init__(self, labels: list[str], salt: str = "") -> None:
        self.labels, self.address, self.description, self.salt = tuple(labels), f"coin {salt}", "a coin", salt

    def __call__(self, images: Tensor) -> Tensor:
        """Scores (n, labels)."""
        rows = [hashlib.sha256((image * 255).round().byte().numpy().tobytes() + self.salt.encode()).digest() for image in images]
        return torch.tensor([list(row[: len(self.labels)]) for row in rows]) / 255


def command(arguments: list[str]) -> tuple[int, str]:
    """`pytest ARGUMENTS` in this process, with the coin for a detector; the exit code and what was said."""
    os.chdir(ROOT)
    eyes.made = lambda task, table: Coin(list("xypkrsfguvmn"), table.get("salt", ""))
    with redirect_stdout(io.StringIO()) as said:
        code = pytest.main([*arguments, "-p", "no:cacheprovider"])
    return int(code), said.getvalue()


def prepared(place: Path, layout: str) -> Path:
    """The folder with a model of the layout and the suites' tasks in it; a store may come."""
    tiny.of_layout(layout).save_pretrained(place / "model")
    (place / "prompts.csv").write_text(f"prompt\na x\nin x\na x\n{LONG}\n")
    for suite, more in MORE.items():
        (place / f"{suite}.toml").write_text(f'suite = "{suite}"\n{more}{TASK}')
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each layout such a folder."""
    return {layout: prepared(tmp_path_factory.mktemp(layout), layout) for layout in tiny.LAYOUTS}


@pytest.mark.parametrize("suite", MORE)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_cell_is_measured(child: Any, places: dict[str, Path], layout: str, suite: str) -> None:
    """All claims of all methods are decided by images that were drawn and looked at, or for the reason that is right; every model is in the store."""
    place = places[layout]
    report = place / f"report-{suite}"
    options = {"--model": place / "model", "--task": place / f"{suite}.toml", "--store": place / suite, "--report": report}
    asked = [f"suites/{suite}", "--no-control", "--steps", "2", "--finetune", TUNE, "--method", ",".join(METHODS.values())]
    code, said = child(command, [*asked, *(str(each) for pair in options.items() for each in pair)]).result(PATIENCE)
    verdict = json.loads((report / "verdict.json").read_text())
    claims, made = verdict["claims"], Store(place / suite).addresses("checkpoints")
    assert Counter(claim["claim"] for claim in claims) == CLAIMS | ALSO.get(suite, {})
    unclear = [claim for claim in claims if claim["verdict"] != HOLDS]
    assert {claim["claim"] for claim in unclear} <= {"stays-forgotten"}, said
    assert all(LEARNT_NOTHING in claim["reason"] for claim in unclear), said  # a random model in two steps; all before it was measured
    assert code == (11 if unclear else 12), said  # all hold, and without a control it is no gate
    assert all(claim["rate"]["n"] >= 8 for claim in claims if claim not in unclear)
    about = [claim["reason"] for claim in claims if claim["claim"] in ("instruments", "forgotten")]
    assert all((CUT in reason) == (suite == "unsafe") for reason in about)
    assert len(made) == 11  # each method's, each of them fine-tuned, and the base model fine-tuned
    assert {claim["lineage"] for claim in claims if claim not in unclear} <= verdict["lineages"].keys()
    assert len({json.dumps(claim["hits"]) for claim in claims if claim["claim"] == "retained"}) >= 5  # models draw images of their own; a coin may agree
    assert (report / "report.html").is_file()
