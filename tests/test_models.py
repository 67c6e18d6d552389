"""Every detector keeps the contract; the autoencoder learns, resumes and comes back from its file."""

import made_cohort
import numpy as np
import pytest
import torch
from monai.losses import SSIMLoss
from scipy import ndimage
from skimage.metrics import structural_similarity

from lib import models
from lib.baselines import SLICE_LABELS
from lib.errors import CourseError
from lib.models import autoencoder
from lib.models.detector import residual

SMALL = {"epochs": 2, "width": 8, "code": 2}
CORRUPTED = (
    "dae", "synthetic_lesions", "synthetic_restoration", "sided_ensemble", "diffusion", "diffusion_patched"
)  # fmt: skip


SMALL_VIT = {"epochs": 1, "patch": 8, "dim": 16, "depth": 1, "heads": 2}
QUICK_GAN = {"epochs": 1, "width": 8, "latent": 8}
FEW_STEPS = {
    "gan": QUICK_GAN,
    "anogan": QUICK_GAN | {"steps": 5, "restarts": 2},
    "f_anogan": QUICK_GAN | {"encoder_epochs": 1},
    "ganomaly": QUICK_GAN,
    "cae3d": {"epochs": 1, "box": 32, "voxel_mm": 2.0, "width": 8, "code": 8},
    "vit_context_dropout": SMALL_VIT,
    "vit_masked": SMALL_VIT,
    "single_ae": {"epochs": 2},
    "single_anogan": {"rounds": 1, "steps": 2, "search_steps": 2},
}


def settings_of(name):
    if name in CORRUPTED:
        return {"epochs": 2, "width": 8}
    return SMALL if name.startswith(("ae", "vae")) else FEW_STEPS.get(name, {})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", modalities=("FLAIR", "T2"))


@pytest.fixture(scope="module", params=list(models.DETECTORS))
def fitted(request, prepared, tmp_path_factory):
    detector = models.create(request.param, prepared.modalities, **settings_of(request.param))
    detector.fit(prepared, out=tmp_path_factory.mktemp(request.param), device="cpu")
    return detector


def test_maps_are_finite_zero_outside_the_brain_and_of_the_right_shape(fitted, prepared):
    subject = prepared.split("test")[-1]
    maps = fitted.maps(subject)
    assert maps.shape == subject.brain.shape
    assert maps.dtype == np.float32
    assert np.isfinite(maps).all()
    assert (maps[~subject.brain] == 0).all()
    assert (maps >= 0).all()


def test_slice_scores_are_the_mean_of_the_highest_hundredth(fitted, prepared):
    if fitted.name in SLICE_LABELS or fitted.family == "adversarial":
        pytest.skip("its slice scores are of another kind on purpose")
    subject = prepared.split("test")[-1]
    maps = np.random.default_rng(0).random(subject.brain.shape).astype(np.float32)
    scores = fitted.slice_scores(subject, maps)
    inside = np.sort(maps[5][subject.brain[5]])
    assert scores[5] == pytest.approx(inside[-round(len(inside) / 100) :].mean())
    assert scores[0] == 0


def test_a_saved_detector_gives_the_same_maps(fitted, prepared, tmp_path):
    subject = prepared.split("test")[-1]
    fitted.save(tmp_path / "model.safetensors")
    loaded = models.load(tmp_path / "model.safetensors")
    np.testing.assert_allclose(loaded.maps(subject), fitted.maps(subject), atol=1e-6)
    assert (loaded.name, loaded.modalities, loaded.settings) == (fitted.name, fitted.modalities, fitted.settings)
    fitted.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_maps_of_a_subject_do_not_depend_on_the_others(fitted, prepared):
    first, last = prepared.split("test")[0], prepared.split("test")[-1]
    alone = fitted.maps(last)
    fitted.maps(first)
    np.testing.assert_array_equal(alone, fitted.maps(last))


def test_unknown_and_damaged_detectors_are_named(tmp_path):
    with pytest.raises(CourseError, match="no detector 'aee'"):
        models.create("aee", ("FLAIR",))
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for name in ("bad", "missing"):
        with pytest.raises(CourseError, match=name):
            models.load(tmp_path / f"{name}.safetensors")


def test_a_batch_s_maps_do_not_depend_on_its_size(prepared, monkeypatch, tmp_path):
    detector = models.create("ae", prepared.modalities, **SMALL)
    detector.fit(prepared, out=tmp_path, device="cpu")
    subject = prepared.split("test")[-1]
    whole = detector.maps(subject)
    monkeypatch.setattr("lib.models.detector.MAP_BATCH", 1)
    np.testing.assert_allclose(detector.maps(subject), whole, atol=0.02)  # bfloat16


def test_the_residual_s_side_follows_the_modality():
    image, expected = torch.tensor([[[[0.9]], [[0.1]], [[0.1]]]]), torch.full((1, 3, 1, 1), 0.5)
    assert residual(image[:, :1], expected[:, :1], ("FLAIR",), "signed").item() == pytest.approx(0.4)
    assert residual(image[:, :1], expected[:, :1], ("T1",), "signed").item() == 0
    assert residual(image[:, 1:2], expected[:, 1:2], ("T1",), "signed").item() == pytest.approx(0.4)
    assert residual(image[:, 1:2], expected[:, 1:2], ("T1ce",), "signed").item() == pytest.approx(0.4)
    assert residual(image, expected, ("FLAIR", "T2", "T1"), "signed").item() == pytest.approx(0.8 / 3)
    assert residual(image, expected, ("FLAIR", "T2", "T1"), "absolute").item() == pytest.approx(0.4)


@pytest.mark.parametrize("bottleneck", ["spatial", "dense"])
def test_everything_passes_through_the_code(bottleneck):
    settings = autoencoder.Settings(bottleneck=bottleneck, code=2, width=8, size=32)
    network = autoencoder.Network(1, settings).eval()
    code = network.encoder(torch.rand(1, 1, 32, 32))
    detector = autoencoder.Autoencoder("ae", ("FLAIR",), settings)
    assert code.numel() == detector.code_size() < 32 * 32
    assert network.decoder(code).shape == (1, 1, 32, 32)


def test_the_ssim_map_is_that_of_scikit_image_and_its_mean_monai_s_loss():
    random = np.random.default_rng(0)
    image = ndimage.gaussian_filter(random.random((40, 40)), 2).astype(np.float32)
    other = (image + 0.05 * random.standard_normal((40, 40))).astype(np.float32)
    ours = autoencoder.ssim_map(*(torch.from_numpy(a)[None, None] for a in (image, other)))[0].numpy()
    _, peer = structural_similarity(
        image,
        other,
        data_range=autoencoder.DATA_RANGE,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    np.testing.assert_allclose(ours[5:-5, 5:-5], peer[5:-5, 5:-5], atol=1e-3)
    inner = 1 - SSIMLoss(spatial_dims=2, data_range=autoencoder.DATA_RANGE)(
        *(torch.from_numpy(a)[None, None] for a in (image, other))
    )
    assert ours[5:-5, 5:-5].mean() == pytest.approx(inner.item(), abs=1e-3)


def test_an_autoencoder_learns_to_redraw_healthy_slices_and_marks_lesions(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(6, 2, 2))
    detector = models.create("ae", cohort.modalities, epochs=15, width=8, code=2, learning_rate=5e-3)
    history = detector.fit(cohort, out=tmp_path, device="cpu")
    assert history.rows[-1]["train"] < history.rows[0]["train"] / 3
    for subject in cohort.split("test")[-3:]:
        maps = detector.maps(subject)
        assert maps[subject.lesion].mean() > 2 * maps[subject.brain & ~subject.lesion].mean()


@pytest.mark.parametrize(
    "wrong", [{"bottleneck": "narrow"}, {"loss": "l3"}, {"residual": "both"}, {"code": 0}, {"width": 12}, {"width": 0}]
)
def test_settings_that_cannot_be_are_named(wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        autoencoder.Settings(**wrong)
