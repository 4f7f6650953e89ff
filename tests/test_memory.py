"""What a device decides: precision, micro-batches, recomputation, how many images at once. None of it changes what was asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import devices, pipeline, sampling
from harness.errors import PreconditionError, SpecError
from harness.meta import _gradient, meta
from harness.pipeline import Pipe, identify
from harness.spec import Sampler
from harness.training import Run, train
from harness.unlearning import ca, dimum, esd, mace, sfron
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

TASK, SAMPLER = tiny.task(), Sampler(2, 3.0)
STAGES = {
    "esd": esd.Method(batch=3, sampler_steps=2),
    "dimum": dimum.Method(batch=3, images_per_prompt=1),
    "ca": ca.Method(batch=3, images_per_prompt=1, prior=0.5),
    "sfron": sfron.Method(batch=3, images_per_prompt=1, gamma=0.0),
}


@cache
def drawn(chosen: Any) -> Tensor:
    """Any images: noise."""
    return torch.randint(256, (len(chosen.prompts), 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def run_of(pipe: Pipe, stage: Any) -> Run:
    """What the engine gives a stage."""
    original = {name: p.detach().clone() for name, p in pipe.named().items() if pipeline.group(stage.trains)(name)}
    return Run(stage.seed, {name: drawn(chosen) for name, chosen in stage.images(TASK).items()}, original)


def gradient(pipe: Pipe, stage: Any) -> tuple[dict[str, Tensor], int]:
    """The gradient of a stage's loss on one batch, and the bytes that the forward pass kept for it."""
    parameters, kept = pipe.parameters(stage.trains), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    loss, batch_at = stage.objective(pipe, TASK, run := run_of(pipe, stage))
    batch = batch_at(run.rng("step", 0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(batch)
    value.backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}, kept


def widths(pipe: Pipe) -> list[int]:
    """The number of samples of each of the UNet's passes, from now on."""
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_batch(pipe, name, size):
    """The same gradient to rounding, whatever the loss does with its batch, while no more samples pass at once and far less is kept."""
    other = copy.deepcopy(pipe)
    other.micro_batch, passed = size, widths(other)
    (whole, much), (parts, little) = gradient(pipe, STAGES[name]), gradient(other, STAGES[name])
    assert max(passed) == size
    assert whole.keys() == parts.keys()
    assert any(tensor.any() for tensor in whole.values())
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=1e-3, atol=1e-6)
    assert little < much / 4


@pytest.mark.parametrize("name", STAGES)
def test_recomputed_activations_change_nothing(pipe, monkeypatch, base, name):
    """With RESURGENCE_CHECKPOINTING the gradient is the same and less is kept."""
    monkeypatch.setenv(devices.CHECKPOINTING, "1")
    other = pipeline.load(base)
    assert other.unet.is_gradient_checkpointing
    (whole, much), (again, little) = gradient(pipe, STAGES[name]), gradient(other, STAGES[name])
    for key, tensor in whole.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-4, atol=1e-7)
    assert little < much


@pytest.mark.parametrize("order", ["first", "exact", "hvp"])
def test_meta_gradients_add_up_too(pipe, order):
    """Also where the weights move between the passes, and where the gradient is differentiated again."""
    found = []
    for size in (None, 1):
        pipe.micro_batch = size
        parameters = list(pipe.parameters("x-strict").values())
        x, c = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1)), pipe.encode(["a x", "a y", "the x"])

        def loss(seed: int, x: Tensor = x, c: Tensor = c) -> Callable[[], Tensor]:
            return lambda: pipe.diffusion_loss(x, c, torch.Generator().manual_seed(seed))

        _gradient.add(parameters, [loss(1), loss(2)], loss(3), loss(4), gamma=1.0, zeta=0.5, tau=0.1, order=order)
        found.append([p.grad.clone() for p in parameters])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2 if order == "hvp" else 1e-3, atol=1e-5)


def test_differences_of_gradients_need_float32(pipe):
    """What bfloat16 rounds away is larger than the difference: meta-unlearning's `hvp` refuses, before anything is learnt."""
    pipe.dtype = torch.bfloat16
    with pytest.raises(SpecError, match=r"order 'hvp' takes differences .* set RESURGENCE_DTYPE=float32, or take order=exact"):
        meta.Method(steps=1, order="hvp")(pipe, TASK, Run(0))


def test_mace_looks_at_whole_batches(pipe):
    """It measures attention inside the passes, by masks of the whole batch: micro-batches leave it alone, and are there again afterwards."""
    stage, other = mace.Method(lora_steps=1, lora_batch=2, images_per_concept=2, segmenter="whole"), copy.deepcopy(pipe)
    other.micro_batch = 1
    for each in (pipe, other):
        stage(each, TASK, run_of(each, stage))
    assert other.micro_batch == 1
    assert all(torch.equal(p, other.named()[name]) for name, p in pipe.named().items())


def test_a_step_that_does_not_fit_says_what_to_do():
    """The batch is the stage's and is not made smaller behind its back: the error names the variables that help."""

    def loss(_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(PreconditionError, match=r"does not fit into memory .*set RESURGENCE_MICRO_BATCH=1, and RESURGENCE_CHECKPOINTING=1"):
        train([torch.zeros(1, requires_grad=True)], loss, lambda rng: None, Run(0), steps=1, lr=0.1)


# --- drawing ---------------------------------------------------------------------------------------------------------

PROMPTS, SEEDS = ["a x", "a y", "the x", "the y", "a k", "a l", "a f"], [1, 2, 3, 4, 5, 6, 7]


class Small:
    """A device on which at most `room` samples fit, from the `after`-th pass on."""

    def __init__(self, pipe: Pipe, room: int, after: int = 0) -> None:
        self.room, self.after, self.passes, self.failed = room, after, 0, 0
        pipe.unet.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: tuple[Tensor, ...]) -> None:
        """Refuse what does not fit."""
        self.passes += 1
        if len(args[0]) > self.room and self.passes > self.after:
            self.failed += 1
            raise torch.OutOfMemoryError("out of memory")


def test_what_does_not_fit_is_halved_and_nothing_finished_is_lost(pipe):
    """Two batches of three are done when memory gets short: the rest is drawn in smaller ones, and every image is the one it would have been."""
    expected = sampling.draw(copy.deepcopy(pipe), PROMPTS, SEEDS, SAMPLER, batch=3)
    pipe.at_once, reported, passed = 3, [], widths(pipe)
    device = Small(pipe, room=2, after=2)  # the first batch's two steps
    images = sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER, report=lambda done, total: reported.append((done, total)))
    assert (images.int() - expected.int()).abs().max() <= 1
    assert device.failed == 1
    assert reported == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]
    assert passed == [6, 6, 6, *[2] * 8]
    assert pipe.at_once == 1


def test_a_device_without_room_for_one_image(pipe):
    """It is said, with what may help; nothing is tried for ever."""
    device = Small(pipe, room=1)
    with pytest.raises(PreconditionError, match=r"not even one image of this model fits into memory .*RESURGENCE_DTYPE=bfloat16, or a larger device"):
        sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER, batch=4)
    assert device.failed == 3


@pytest.mark.parametrize(("side", "count"), [(8, 50), (32, 50), (64, 12), (128, 3), (512, 1)])
def test_large_images_are_drawn_few_at_a_time(pipe, side, count):
    """On the CPU by the size of the latents: 50 of the pocket model's, 12 of SD 1.4's, 3 of SDXL's."""
    pipe.unet.register_to_config(sample_size=side)
    assert sampling.fitting(pipe) == count


def test_the_autoencoder_takes_large_images_one_by_one(pipe):
    """64 of 64 px at once, one of 512 px; in parts the latents and images are the same."""
    assert [pipe._at_once(side, side) for side in (32, 64, 128, 512, 1024)] == [64, 64, 16, 1, 1]
    seen: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    latents = torch.randn(3, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    parts = pipe.decode(latents)
    assert seen == [1, 1, 1]
    assert parts.shape == (3, 3, 512, 512)


# --- precision -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_another_address_and_weights_stay_float32(monkeypatch, tiny_folder, base):
    """The UNet computes in it and what it gives is near and not equal; a loaded model does what its address says, whatever the environment says now."""
    monkeypatch.setenv(devices.DTYPE, "bfloat16")
    half = identify(str(tiny_folder))
    assert half.digest == f"{base.digest}+bfloat16"
    monkeypatch.delenv(devices.DTYPE)
    assert identify(str(tiny_folder)) == base
    rough, exact = pipeline.load(half), pipeline.load(base)
    x, t, c = sampling.noise(exact, [1, 2]), torch.tensor(500), exact.encode(["a x", "a y"])
    one, two = (pipe.predict(x, t, c).detach() for pipe in (rough, exact))
    assert one.dtype == torch.float32
    assert 0 < (one - two).abs().max() < 0.1
    assert torch.equal(rough.encode(["a x"]), exact.encode(["a x"]))
    stage = esd.Method(steps=2, sampler_steps=2, lr=1e-3)
    stage(rough, TASK, run := run_of(rough, stage))
    moved = [p for name, p in rough.named().items() if name in run.original and not torch.equal(p, run.original[name])]
    assert moved
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in rough.named().values())


def test_what_ships_with_the_project_is_always_float32(monkeypatch):
    """Its figures and presets were found so."""
    plain = identify("pocket")
    monkeypatch.setenv(devices.DTYPE, "bfloat16")
    assert identify("pocket") == plain
    assert "+" not in plain.digest


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (devices.DTYPE, "float16", "RESURGENCE_DTYPE=float16 would lose small gradients; allowed: float32, bfloat16"),
        (devices.DTYPE, "bfloat", "unknown precision in RESURGENCE_DTYPE 'bfloat'; allowed: bfloat16, float32. Did you mean 'bfloat16'?"),
        (devices.MICRO_BATCH, "0", "RESURGENCE_MICRO_BATCH is a whole number from 1, got '0'"),
        (devices.MICRO_BATCH, "two", "RESURGENCE_MICRO_BATCH is a whole number from 1, got 'two'"),
        (devices.CHECKPOINTING, "yes", "RESURGENCE_CHECKPOINTING is 0 or 1, got 'yes'"),
    ],
)
def test_a_wrong_variable_is_an_error(monkeypatch, base, variable, value, message):
    """Not a default that nobody asked for."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SpecError) as error:
        pipeline.load(identify(base.source))
    assert message in str(error.value)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(tiny_folder) -> Pipe:
    """The tiny model where it computes in bfloat16 by default."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return pipeline.load(identify(str(tiny_folder)))


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws(on_gpu, pipe):
    """As many images at once as its memory has room for, in bfloat16, and nearly the same pictures; the probe is not counted."""
    assert on_gpu.dtype == torch.bfloat16
    images = sampling.draw(on_gpu, PROMPTS, SEEDS, SAMPLER)
    assert on_gpu.at_once == sampling.MOST
    assert on_gpu.passes == 2 * 2 * len(PROMPTS)
    assert (images.float() - sampling.draw(pipe, PROMPTS, SEEDS, SAMPLER).float()).abs().mean() < 4


@pytest.mark.gpu
def test_a_gpu_that_is_full_is_drawn_on_in_smaller_batches(on_gpu):
    """A real out-of-memory error, of the driver's: the images are finished all the same."""
    torch.cuda.set_per_process_memory_fraction(1e-3)  # some tens of MB
    try:
        on_gpu.at_once = len(PROMPTS) * 512
        images = sampling.draw(on_gpu, PROMPTS * 512, [*range(len(PROMPTS) * 512)], SAMPLER)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(images) == len(PROMPTS) * 512
    assert on_gpu.at_once < len(PROMPTS) * 512


@pytest.mark.gpu
def test_micro_batches_save_memory_on_a_gpu(on_gpu):
    """The peak of one step falls, its gradient stays."""
    stage, peaks, found = dimum.Method(batch=64, images_per_prompt=1), [], []
    for size in (None, 4):
        on_gpu.micro_batch = size
        torch.cuda.reset_peak_memory_stats()
        found.append(gradient(on_gpu, stage)[0])
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0.1, atol=1e-3)
