"""Every text-to-image suite, by its real command, from a model of each real layout to its report: unlearn, fine-tune, draw, look, decide."""

from __future__ import annotations

import hashlib
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import eyes
from harness.spec import HOLDS
from tests import tiny

ROOT = Path(__file__).parents[1]
METHODS = {  # two by gradient, two in closed form, and one of LoRAs; the fine-tune is another LoRA
    "esd": "esd:steps=1:sampler_steps=2:lr=0.001",
    "dimum": "dimum:steps=1:batch=1:images_per_prompt=1:lr=0.001",
    "uce": "uce",
    "rece": "rece",
    "mace": "mace:lora_steps=1:images_per_concept=1:segmenter=whole",
}
TUNE = "lora-in:lr=0.01:batch=1:images_per_prompt=1"
TASK = """
suite = "{suite}"
source = "made up"
control = "esd"
detector = {{ name = "coin" }}
{more}
[erased]
concepts = ["x", "y"]
prompts = ["a {{}}", "the {{}}"]
[anchor]
concepts = ["p"]
prompts = ["a {{}}", "the {{}}"]
[retain]
concepts = ["k"]
prompts = ["a {{}}"]
[retained]
concepts = ["r", "s"]
prompts = ["a {{}}", "the {{}}"]
[finetune.in]
concepts = ["f", "g"]
prompts = ["a {{}}", "the {{}}", "in {{}}", "by {{}}"]
[sampler]
steps = 1
guidance = 3.0
[tolerance] # whatever is seen in more than .02 and less than .98 of the images, holds
tau = 0.98
drawn = 0.02
mistaken = 0.98
retained = 0.02
floor = 8
cap = 40
"""
MORE = {  # what some suites' tasks have besides; the first concept or its count stands in each claim's name
    "celebrity": "",
    "object": 'synonyms = {{ x = ["u"], y = ["v"] }}\ncrossed = {{ concepts = ["m", "n"], prompts = ["a {{}}"] }}\n',
    "copyright": "",
    "unsafe": "",
    "style": 'detectors.crossed = {{ name = "coin", salt = "another" }}\ncrossed = {{ concepts = ["m"], prompts = ["a {{}}"] }}\nfigures = {{ UA = "1 - erased" }}\n',
}
CLAIMS = {"instruments": 2, "forgotten": 2 * 5, "retained": 2 * 5, "stays-forgotten": 2 * 5}
ALSO = {"object": {"generality": 2 * 5, "cross-retained": 2 * 5}, "style": {"cross-retained": 2 * 5}}


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


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each layout a folder with the model, the suites' tasks and a store."""
    found = {}
    for layout in tiny.LAYOUTS:
        place = found[layout] = tmp_path_factory.mktemp(layout)
        tiny.of_layout(layout).save_pretrained(place / "model")
        for suite, more in MORE.items():
            (place / f"{suite}.toml").write_text((TASK.replace("{more}", more)).format(suite=suite))
    return found


@pytest.mark.parametrize("suite", MORE)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_cell_is_measured(child: Any, places: dict[str, Path], layout: str, suite: str) -> None:
    """All claims of all methods are there and decided by images that were drawn and looked at; nothing is skipped, nothing fails."""
    place = places[layout]
    report = place / f"report-{suite}"
    options = {"--model": place / "model", "--task": place / f"{suite}.toml", "--store": place / "store", "--report": report}
    asked = [f"suites/{suite}", "--no-control", "--steps", "2", "--finetune", TUNE, "--method", ",".join(METHODS.values())]
    code, said = child(command, [*asked, *(str(each) for pair in options.items() for each in pair)]).result()
    assert code == 12, said  # all hold, and without a control it is no gate
    verdict = json.loads((report / "verdict.json").read_text())
    claims = verdict["claims"]
    assert {claim["claim"]: 0 for claim in claims}.keys() == (CLAIMS | ALSO.get(suite, {})).keys()
    for kind, count in (CLAIMS | ALSO.get(suite, {})).items():
        assert sum(claim["claim"] == kind for claim in claims) == count
    assert {(claim["verdict"], claim["rate"]["n"] >= 8) for claim in claims} == {(HOLDS, True)}
