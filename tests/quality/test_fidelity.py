"""FID, sFID and KID of features are what their formulas say, and no figure is printed without its conditions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3

from harness.detection.classifier import Detector
from harness.errors import SpecError, StoreError
from harness.quality._figure import Figure
from harness.quality.features import BACKBONES, Inception
from harness.quality.fidelity import fidelity


def images(count: int, seed: int, size: int = 32, share: float = 1.0) -> Tensor:
    """uint8 images of coloured noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=rng) * share
    return (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1) * 255).byte()


ONE, TWO = images(150, 0), images(140, 1, share=0.7)


@pytest.fixture(scope="module")
def figures() -> list[Figure]:
    """All three of two sets of images with the pocket backbone."""
    return fidelity(ONE, TWO, "darker noise", BACKBONES["pocket"])


def features(pictures: Tensor) -> dict[str, np.ndarray]:
    """The pocket detector's features, straight from its network."""
    model = Detector("pocket").model
    caught: list[Tensor] = []
    hook = model.layer3.register_forward_hook(lambda module, given, out: caught.append(out))
    big = torch.nn.functional.interpolate(pictures.float() / 255, size=(64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        pool = model.forward_head(model.forward_features((big - 0.5) / 0.5), pre_logits=True)
    hook.remove()
    return {"pool": pool.double().numpy(), "spatial": caught[0][:, :7].flatten(1).double().numpy()}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), by the square root of a matrix."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def test_fid_and_sfid_equal_a_direct_computation(figures: list[Figure]) -> None:
    """Means and covariances of features taken from the network itself, and SciPy's matrix square root."""
    one, two = features(ONE), features(TWO)
    for figure, layer in zip(figures[:2], ("pool", "spatial"), strict=True):
        expected = frechet(one[layer], two[layer])
        assert expected > 0.1
        assert figure.value == pytest.approx(expected, rel=2e-3)
        assert figure.size == one[layer].shape[1]
    assert [figure.size for figure in figures] == [80, 112, 80]


def test_kid_equals_a_direct_computation(figures: list[Figure]) -> None:
    """Unbiased MMD^2 under (x.y / d + 1)^3; with subsets of nearly all images every subset is near the whole."""
    x, y = features(ONE)["pool"], features(TWO)["pool"]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    own = (kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) + (kernel(y, y).sum() - np.trace(kernel(y, y))) / (m * (m - 1))
    assert figures[2].value == pytest.approx(own - 2 * kernel(x, y).mean(), rel=0.1)
    assert figures[2].spread is not None
    assert "100 subsets of 140" in figures[2].name


def test_a_set_is_near_itself() -> None:
    """FID and sFID of the same images are 0 but for rounding."""
    for figure in fidelity(TWO[:100], TWO[:100], "itself", BACKBONES["pocket"])[:2]:
        assert abs(figure.value) < 1e-2


def test_a_figure_is_never_printed_without_its_conditions(figures: list[Figure]) -> None:
    """Backbone, feature size, reference, counts and resize stand in every one."""
    for figure in figures:
        for word in ("backbone pocket detector", f"{figure.size} features", "150 images", "140 images: darker noise", "bicubic with antialiasing to 64 px"):
            assert word in str(figure)
    assert all("±" in str(figure) for figure in figures)
    assert "±" not in str(fidelity(ONE[:19], TWO, "too few for an error", BACKBONES["pocket"])[0])


def test_the_error_of_a_distance_is_the_jackknifes(figures: list[Figure]) -> None:
    """Ten distances, each without fifteen images in a row: sqrt(9/10 sum (d_i - mean)^2); fewer than 20 images have none."""
    rows = np.arange(len(ONE))
    for figure, layer in zip(figures[:2], ("pool", "spatial"), strict=True):
        mine, other = features(ONE)[layer], features(TWO)[layer]
        left = np.array([frechet(mine[rows // 15 != block], other) for block in range(10)])
        assert figure.spread == pytest.approx(np.sqrt(9 / 10 * ((left - left.mean()) ** 2).sum()), rel=1e-3)


def test_images_may_come_set_by_set(figures: list[Figure]) -> None:
    """Sets of any length, even of one image, give the figures of all images together; one image in all is too few."""
    found = fidelity(iter([ONE[:100], ONE[100:149], ONE[149:]]), iter(TWO.split(64)), "darker noise", BACKBONES["pocket"])
    for each, whole in zip(found, figures, strict=True):
        assert (each.name, each.count, each.reference, each.resize) == (whole.name, whole.count, whole.reference, whole.resize)
        assert (each.value, each.spread) == pytest.approx((whole.value, whole.spread), rel=1e-3)
    with pytest.raises(SpecError, match=r"at least 2 uint8 images .*, got 1"):
        fidelity(iter([ONE[:1]]), TWO, "", BACKBONES["pocket"])


def test_a_folder_without_images_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    """The images are not asked for."""
    coming = iter([ONE])
    with pytest.raises(StoreError, match="no PNG or JPEG"):
        fidelity(coming, tmp_path, "a folder", BACKBONES["pocket"])
    assert next(coming) is ONE


def test_a_folder_is_a_reference_too(tmp_path: Path) -> None:
    """PNGs of the same pixels give the same figures as the tensor; larger ones are resized and cut, and the figure says so."""
    for i, image in enumerate(TWO):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03d}.png")
    found = fidelity(ONE, tmp_path, "a folder", BACKBONES["pocket"])[0]
    assert found.value == pytest.approx(fidelity(ONE, TWO, "darker noise", BACKBONES["pocket"])[0].value, rel=1e-4)
    assert "centre crop" in found.resize
    with pytest.raises(StoreError, match="no PNG or JPEG"):
        fidelity(ONE, tmp_path / "nowhere", "a folder", BACKBONES["pocket"])


@pytest.mark.parametrize("bad", [ONE.float(), ONE[:1], ONE[0]])
def test_what_are_not_images_is_refused(bad: Tensor) -> None:
    """Floats, a single image, one without its batch."""
    with pytest.raises(SpecError, match="at least 2 uint8 images"):
        fidelity(bad, TWO, "", BACKBONES["pocket"])


# --- Inception --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of torch-fidelity's Inception, as a user would have converted the published ones."""
    folder = tmp_path_factory.mktemp("inception")
    caught: dict[str, Tensor] = {}

    class Skeleton(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):  # type: ignore[misc]  # torch-fidelity is not typed
        def load_state_dict(self, state: dict[str, Tensor]) -> None:
            caught.update(self.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **settings: {})
        torch.manual_seed(0)
        Skeleton("skeleton", ["2048"])
    save_file({name: tensor.contiguous() for name, tensor in caught.items()}, folder / "model.safetensors")
    return folder


def test_inceptions_spatial_features_are_seven_channels_of_mixed_6d(weights: Path) -> None:
    """2023 numbers: the 1x1 branch after its ReLU, 17 x 17 pixels; the 2048 pooled ones are torch-fidelity's own."""
    extractor = Inception("resurgence-inception", ["2048", "spatial"], feature_extractor_weights_path=str(weights))
    caught: list[Tensor] = []
    extractor.Mixed_6d.branch1x1.conv.register_forward_hook(lambda module, given, out: caught.append(extractor.Mixed_6d.branch1x1.bn(out).relu()))
    pool, spatial = extractor(images(1, 3))
    assert (pool.shape, spatial.shape) == ((1, 2048), (1, 2023))
    assert torch.equal(spatial[0], caught[0][0, :7].flatten())
    (alone,) = Inception("resurgence-inception", ["spatial"], feature_extractor_weights_path=str(weights))(images(1, 3))
    assert torch.equal(alone, spatial)


def test_inception_without_weights_says_what_to_fetch() -> None:
    """It never downloads, and never opens the pickle."""
    with pytest.raises(StoreError, match="convert inception"):
        fidelity(ONE, TWO, "", BACKBONES["inception"])
    assert "untested with real weights" in BACKBONES["inception"].says
