"""What is predicted does not see itself, likeness is sought on the other side, networks learn one scan alone."""

import made_cohort
import numpy as np
import pytest
import torch
from scipy import ndimage

from lib import models, preparation, single_scan, volumes
from lib.errors import CourseError
from lib.models import single, single_nets
from lib.models.mirror import Plane, Scan
from lib.models.single import Cells, folded, nearest, predict
from lib.preprocessing import Recipe

EDGES = np.array([4.0, 4.0, 4.0])


def cells_of(values, share=None):
    """Cells of 4 mm, symmetric about the middle column."""
    share = np.ones(values.shape, np.float32) if share is None else share
    centre = tuple((np.array(values.shape) - 1) / 2 * EDGES)
    return Cells(values.astype(np.float32), share, np.ones(3, int), EDGES, Plane(0, 0, 0, centre))


def test_a_cell_s_own_value_does_not_change_its_own_prediction():
    values = np.random.default_rng(0).random((30, 36, 34))
    before, numbers = predict(cells_of(values), 12.0), np.arange(values.size).reshape(values.shape)
    for place in ((15, 18, 6), (7, 10, 16), (2, 3, 30), (29, 0, 17)):
        changed = values.copy()
        changed[place] += 5
        after = predict(cells_of(changed), 12.0)
        assert after[numbers[place]] == before[numbers[place]]
        assert (after != before).any()


def test_symmetric_regions_are_predicted_from_the_other_side():
    random = np.random.default_rng(0)
    half = ndimage.gaussian_filter(random.standard_normal((30, 36, 17)), 1)
    values = np.concatenate([half, half[:, :, ::-1]], axis=2)
    left = np.abs(predict(cells_of(values), 12.0) - values.ravel()).reshape(values.shape)
    assert left[:, :, :10].mean() < 0.1 * np.abs(values - values.mean()).mean()
    values[4:8, 6:10, 2:5] += 1
    surplus = values.ravel() - predict(cells_of(values), 12.0)
    assert surplus.reshape(values.shape)[4:8, 6:10, 2:5].mean() > 0.5


def test_neighbours_come_from_the_other_side_only():
    cells = cells_of(np.random.default_rng(0).random((6, 8, 10)))
    side = cells.distance_mm() < 0
    near = nearest(folded(cells), side, 3)
    assert near.shape == (side.sum(), 3)
    assert not side[near].any()
    np.testing.assert_allclose(folded(cells)[side], folded(cells)[near[:, 0]], atol=1e-9)


def test_similarity_marks_what_the_other_side_has_nowhere_near():
    values = np.random.default_rng(0).random((14, 20, 18)) * 0.2 + 0.4
    values[4:8, 6:10, 2:5] += 1
    detector = models.create("single_similarity", ("FLAIR",))
    unlike = detector.unlike(cells_of(values), "FLAIR").reshape(values.shape)
    assert unlike[4:8, 6:10, 2:5].mean() > 5 * unlike.mean()
    assert unlike[4:8, 6:10, 13:16].mean() < unlike.mean()
    assert models.create("single_similarity", ("T1",)).unlike(cells_of(values), "T1").reshape(values.shape)[
        4:8, 6:10, 2:5
    ].mean() == pytest.approx(0, abs=1e-3)


def test_cells_are_means_inside_the_brain_and_come_back_in_place(tmp_path):
    subject = made_cohort.write(tmp_path / "c").split("test")[-1]
    scan = Scan.of(subject)
    cells = Cells.of(scan)
    assert cells.edges.tolist() == [4, 4, 4]
    assert cells.values[cells.inside].mean() == pytest.approx(scan.image[0][scan.brain].mean(), rel=0.02)
    ramp = np.argwhere(cells.inside) @ (0.0, 1.0, 0.0)
    back = cells.enlarge(ramp, scan, 0.1)
    rows = np.indices(scan.brain.shape)[1]
    np.testing.assert_allclose(back[4:8, 8:16, 8:16], (rows[4:8, 8:16, 8:16] - 0.5) / 2, atol=0.05)


def test_the_ensemble_averages_ranks(tmp_path):
    subject = made_cohort.write(tmp_path / "c").split("test")[-1]
    brain = np.asarray(subject.brain)
    alone = models.create("single_ensemble", ("FLAIR",), members="mirror").maps(subject)
    mirror = models.create("mirror", ("FLAIR",)).maps(subject)
    assert alone[brain].max() <= 1
    marked = brain & (mirror > 0)
    np.testing.assert_array_equal(np.argsort(alone[marked], kind="stable"), np.argsort(mirror[marked], kind="stable"))
    with pytest.raises(CourseError, match="members"):
        models.create("single_ensemble", ("FLAIR",), members="mirror,atlas_z")


@pytest.mark.parametrize(("modality", "bright"), [("FLAIR", True), ("T1", False)])
def test_the_median_member_knows_the_modality_s_side(tmp_path, modality, bright):
    subject = made_cohort.write(tmp_path / "c", modalities=(modality,)).split("test")[-1]
    maps = single.SidedMedian("intensity_median", (modality,)).maps(subject)
    inside = maps[np.asarray(subject.lesion)].mean() - maps[np.asarray(subject.brain)].mean()
    assert (inside > 0) == bright  # the made lesions are bright


def slices():
    subject = torch.zeros(24, 1, 32, 32)
    rows = torch.linspace(0, 1, 32)
    subject[:] = 0.5 + 0.3 * torch.sin(6 * rows)[:, None] * torch.cos(4 * rows)
    return subject + 0.01 * torch.randn(subject.shape, generator=torch.Generator().manual_seed(0))


def test_the_autoencoder_learns_its_scan_and_keeps_the_best_epoch():
    image, settings = slices(), single_nets.AutoencoderSettings(epochs=12)
    network, history = single_nets.learn_autoencoder(image, image[:, 0] > 0, settings, 0)
    losses = [row["validation"] for row in history.rows]
    assert min(losses) < losses[0] / 3
    _, watched = single_nets.split(len(image))
    with torch.inference_mode():
        assert torch.nn.functional.mse_loss(network(image[watched]), image[watched]).item() == pytest.approx(
            min(losses)
        )


def test_the_gan_s_steps_move_one_network_each_and_the_search_only_codes():
    settings, patches = single_nets.AnoGANSettings(width=4, latent=4), single_nets.to_tiles(slices())
    generator, discriminator, history = single_nets.learn_gan(patches, settings, 0)
    assert len(history.rows) <= settings.rounds
    before = [p.clone() for p in [*generator.parameters(), *discriminator.parameters()]]
    drawn, curve = single_nets.search(generator, discriminator, patches, settings, 0)
    assert drawn.shape == patches.shape
    assert curve[-1] < 0.8 * curve[0]
    weights = [*generator.parameters(), *discriminator.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    optimisers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (generator, discriminator)]
    single_nets.gan_step(generator, discriminator, optimisers, patches[:8], torch.Generator().manual_seed(0), 4)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True) if a.numel() > 4)


def test_the_search_of_a_patch_does_not_depend_on_the_others():
    settings, patches = single_nets.AnoGANSettings(width=4, latent=4), single_nets.to_tiles(slices())[:8]
    pair = single_nets.seeded(0, lambda: torch.nn.ModuleList(
        [single_nets.build_generator(1, settings), single_nets.Discriminator(1, settings)]))  # fmt: skip
    all_drawn, _ = single_nets.search(*pair, patches, settings, 0)
    alone, _ = single_nets.search(*pair, patches[:4], settings, 0)
    torch.testing.assert_close(alone, all_drawn[:4], atol=1e-4, rtol=1e-3)


def test_tiles_come_back_as_the_slices_they_were():
    image = torch.rand(3, 2, 48, 32)
    tiles = single_nets.to_tiles(image)
    assert tiles.shape == (18, 2, 16, 16)
    torch.testing.assert_close(single_nets.from_tiles(tiles, image.shape, torch.ones(len(tiles), dtype=bool)), image)
    torch.testing.assert_close(tiles[0], image[0, :, :16, :16])


def test_halved_slices_are_filled_up_and_come_back_in_size(tmp_path):
    subject = made_cohort.write(tmp_path / "c").split("test")[-1]
    image, brain = single_nets.halved(subject)
    assert image.shape == (12, 1, 16, 16)
    assert brain.shape == (12, 16, 16)
    assert single_nets.enlarged(image[:, 0], (12, 30, 32)).shape == (12, 30, 32)


def test_a_scan_on_disk_is_prepared_without_a_cohort(course_root, brats):
    path = brats(1) / "p0" / "p0_flair.nii.gz"
    recipe = Recipe(modalities=("FLAIR",), pixel_mm=5.0, size=48)
    subject = preparation.prepare_scan({"FLAIR": path}, recipe)
    assert subject.image.shape == (1, *subject.brain.shape)
    assert not subject.lesion.any()
    assert subject.folder.is_relative_to(course_root / "data" / "prepared")
    assert models.create("mirror", ("FLAIR",)).maps(subject).max() > 0
    assert preparation.prepare_scan({"FLAIR": path}, recipe).folder == subject.folder


def test_a_bad_scan_on_disk_is_named(course_root, tmp_path):
    with pytest.raises(CourseError, match="nothing_flair"):
        preparation.prepare_scan({"FLAIR": tmp_path / "nothing_flair.nii.gz"}, Recipe())
    volumes.write(tmp_path / "flat_t1.nii.gz", np.ones((9, 9, 9), np.int16), np.eye(4))
    with pytest.raises(CourseError, match="constant"):
        preparation.prepare_scan({"T1": tmp_path / "flat_t1.nii.gz"}, Recipe(modalities=("T1",)))


def test_methods_are_paired_by_patient():
    found = {"a": {"p": 0.5, "q": 0.7, "r": 0.6}, "b": {"p": 0.4, "q": 0.6, "r": 0.5}}
    table = single_scan.against(found, "b")
    assert list(table.index) == ["a", "b"]
    assert table.difference["a"] == pytest.approx(0.1)
    assert table.difference_low["a"] == pytest.approx(0.1)
    assert table.ap["b"] == pytest.approx(0.5)


def test_a_lesion_alike_on_both_sides_is_symmetric(tmp_path):
    prepared = made_cohort.write(tmp_path / "c")
    subject = prepared.split("test")[-1]
    lesion = np.zeros(subject.brain.shape, bool)
    lesion[4:7, 14:18, 8:12] = True
    np.save(subject.folder / "lesion.npy", lesion | lesion[:, :, ::-1])
    assert single_scan.symmetric_share(subject) > 0.8


def test_the_contrast_of_a_lesion_follows_the_modality_s_sign(tmp_path):
    subject = made_cohort.write(tmp_path / "c").split("test")[-1]
    assert single_scan.contrast(subject, "FLAIR") > 0.3
    assert single_scan.contrast(subject, "T1") == -single_scan.contrast(subject, "FLAIR")
