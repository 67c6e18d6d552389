"""Clinics with protocols of their own, three ways to one network, and what each does to a ball of known size."""

from collections import Counter
from dataclasses import replace

import made_cohort
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from lib import reshape
from lib.boxes import Box
from lib.cohort import _mapped
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.reshape import Acquired, Clinics, Groups, Learnt, Protocol, Settings

SMALL = Settings(side=32, groups=3, width=8, code=8, epochs=2)
PROTOCOLS = (
    Protocol("as prepared", (2, 2, 2), (24, 64, 64)),
    Protocol("thick axial", (6, 2, 2), (0, 64, 64)),
    Protocol("thick coronal, wide", (2, 6, 2), (60, 0, 90)),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2), patients=3)


@pytest.fixture(scope="module")
def clinics(prepared):
    return Clinics.dealt(prepared, protocols=PROTOCOLS)


@pytest.fixture(scope="module")
def learnt(clinics, tmp_path_factory):
    return reshape.learn(clinics, SMALL, out=tmp_path_factory.mktemp("out"), device="cpu")


@pytest.fixture(scope="module")
def measured(clinics, learnt):
    return reshape.measure(clinics, learnt)


def volume(shape=(60, 60, 60), edges=(1.0, 1.0, 1.0)):
    """A scan whose brain fills all of it."""
    full = np.ones(shape, bool)
    return Acquired("made", "made", np.array(edges), full[None].astype(np.float32), full, full, np.zeros(shape, bool))


def planted(learnt, network):
    return {name: replace(one, network=network) for name, one in learnt.items()}


class Drawn(torch.nn.Module):
    """A network that returns what it gets times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, image):
        return image * self.factor


def test_protocols_are_dealt_evenly_over_health_and_split(prepared):
    dealt = Clinics.dealt(prepared, 0)
    for split in ("train", "validation", "test"):
        for healthy in (True, False):
            members = [s for s in prepared.split(split) if s.healthy == healthy]
            counts = [[dealt.protocols[s.id] for s in members].count(p) for p in reshape.PROTOCOLS]
            assert max(counts) - min(counts) <= 1
    assert max(Counter(p.name for p in dealt.protocols.values()).values()) <= -(-len(prepared.subjects) // 5)
    assert Clinics.dealt(prepared, 0).protocols == dealt.protocols != Clinics.dealt(prepared, 1).protocols


def test_shapes_differ_as_protocols_do(clinics):
    table = clinics.shapes()
    by_name = table.groupby("protocol")["shape"].agg(lambda s: set(s))
    assert by_name["as prepared"] == {(12, 32, 32)}
    assert by_name["thick axial"] == {(4, 32, 32)}
    assert by_name["thick coronal, wide"] == {(30, 8, 45)}
    assert len(table) == len(clinics.prepared.subjects)


def test_the_grid_as_prepared_gives_the_voxels_back(clinics):
    subject = next(s for s in clinics.prepared.subjects if clinics.protocols[s.id] is PROTOCOLS[0])
    scan = clinics.scan(subject)
    assert scan.edges_mm == pytest.approx(2)
    assert np.array_equal(scan.brain, subject.brain)
    assert np.array_equal(scan.lesion, subject.lesion)
    assert scan.image == pytest.approx(subject.image.astype(np.float32))


def test_a_brain_keeps_its_place_and_volume_on_every_grid(clinics):
    for subject in clinics.prepared.subjects:
        scan = clinics.scan(subject)
        spread = clinics.grid(subject).cut(subject.brain).sum()
        assert spread * scan.edges_mm.prod() == pytest.approx(subject.brain.sum() * 8, rel=0.1)
        assert scan.brain.sum() == pytest.approx(spread, rel=0.2)  # one of five slices
        middle = (np.array(ndimage.center_of_mass(scan.brain)) - (np.array(scan.brain.shape) - 1) / 2) * scan.edges_mm
        assert np.abs(middle).max() < 1
        assert not scan.image[0][~scan.brain].any()


def test_a_thick_slice_smears_what_is_thin(prepared, tmp_path):
    thin = made_cohort.write(tmp_path, healthy=(1, 1, 1), patients=0).subjects[0]
    image = np.zeros(thin.image.shape, np.float16)
    image[0, 5] = thin.brain[5]
    np.save(thin.folder / "image.npy", image)
    _mapped.cache_clear()
    dealt = Clinics(prepared, {thin.id: PROTOCOLS[1]})
    scan = dealt.scan(thin)
    assert 0.2 < scan.image.max() < 0.6
    assert scan.image.sum() * scan.edges_mm[0] == pytest.approx(image.sum(dtype=float) * 2, rel=0.25)


def test_a_protocol_is_never_finer_than_what_was_prepared(clinics):
    fine = Clinics(clinics.prepared, dict.fromkeys(clinics.protocols, Protocol("fine", (1, 0.5, 1), (0, 0, 0))))
    assert fine.scan(clinics.prepared.subjects[0]).edges_mm == pytest.approx(2)


def test_slices_that_do_not_count_leave_no_image_but_their_brain(clinics):
    subject = clinics.prepared.split("test")[-1]
    keep = np.arange(len(subject.brain)) < 6
    whole, part = clinics.scan(subject), clinics.scan(subject, keep)
    assert np.array_equal(whole.brain, part.brain)
    assert np.array_equal(whole.kept, whole.brain)
    assert 0.3 < part.kept.sum() / whole.kept.sum() < 0.7
    assert not part.image[0][~part.kept].any()


def test_groups_are_the_families_of_shapes_with_their_most_common_one():
    flat, tall = [(24, 100, 100)] * 3 + [(26, 100, 100), (22, 104, 104)], [(90, 100, 80)] * 2 + [(96, 110, 84)]
    groups = Groups.of(flat + tall, 2, 48**3)
    assert {groups.group(s) for s in flat}.isdisjoint({groups.group(s) for s in tall})
    assert groups.modal[groups.group((25, 96, 96))] == (24, 100, 100)
    assert groups.modal[groups.group((100, 100, 100))] == (90, 100, 80)
    assert groups.target[groups.group((90, 100, 80))] == (48, 48, 48)


def test_there_are_no_more_groups_than_shapes():
    assert Groups.of([(16, 16, 16)] * 4 + [(32, 16, 16)], 9, 16**3).clusters.n_clusters == 2


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [((80, 80, 80), 48, (48, 48, 48)), ((25, 104, 104), 48, (16, 80, 80)), ((88, 29, 88), 48, (64, 32, 64))],
)
def test_halvable_keeps_proportions_as_far_as_halving_allows(shape, side, expected):
    assert reshape.halvable(shape, side**3) == expected


def test_halvable_is_near_to_the_voxels_asked_for():
    random = np.random.default_rng(0)
    for shape in random.integers(20, 260, (40, 3)):
        sides = np.array(reshape.halvable(shape, 48**3))
        assert (sides % 16 == 0).all()
        assert 0.6 < sides.prod() / 48**3 < 1.6


def test_a_ball_has_its_volume_in_mm():
    ball = reshape.sphere(volume((60, 40, 30), (1, 1.5, 2)), 10)
    assert ball.sum() * 3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.03)
    assert [int(ball.any(axis=axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))] == [20, 14, 10]


def test_a_ball_smaller_than_any_voxel_is_the_voxels_nearest():
    assert reshape.sphere(volume((5, 5, 5), (20, 20, 20)), 1).sum() == 1
    assert reshape.sphere(volume((4, 5, 5), (20, 20, 20)), 1).sum() == 2


def test_a_grid_that_changes_nothing_distorts_nothing():
    scan = volume()
    ball = reshape.sphere(scan, 10)
    bent = reshape.distortion(ball, Box.squeezed(scan.brain.shape, scan.brain.shape))
    assert bent == {"kept": 1, "dice": 1, "aspect": pytest.approx(1), "voxels": pytest.approx(ball.sum())}


def test_a_brats_volume_in_a_cube_is_flattened_by_its_proportions():
    scan = volume((155, 240, 240))
    box = Box.squeezed(scan.brain.shape, (64, 64, 64))
    vast, large, small = (reshape.distortion(reshape.sphere(scan, radius), box) for radius in (30, 10, 3))
    assert vast["aspect"] == pytest.approx(240 / 155, rel=0.01)
    assert large["voxels"] == pytest.approx(4 / 3 * np.pi * 10**3 * 64**3 / scan.brain.size, rel=0.03)
    assert 1.4 < large["aspect"] < 240 / 155  # smoothing rounds what is small
    assert 0.85 < large["kept"] < 1
    assert small["kept"] < 0.3
    assert small["dice"] < large["dice"]


def test_distortion_looks_near_the_ball_and_finds_what_the_whole_volume_has():
    scan = volume((40, 90, 100), (6, 2, 2))
    ball = reshape.sphere(scan, 10)
    for box in (Box.squeezed(scan.brain.shape, (16, 32, 48)), Box.centred(scan.brain, scan.edges_mm, (32,) * 3, 4.0)):
        there = box.cut(ball)
        back = box.back(there) > 0.5
        bent = reshape.distortion(ball, box)
        assert bent["voxels"] == pytest.approx(there.sum(), rel=1e-3)
        assert bent["kept"] == pytest.approx(back.sum() / ball.sum())
        assert bent["dice"] == pytest.approx(2 * (back & ball).sum() / (back.sum() + ball.sum()))


def test_each_way_has_the_grid_that_its_name_says(clinics):
    ways, groups = reshape.ways(clinics, SMALL), reshape.groups(clinics, SMALL)
    for subject in clinics.prepared.subjects:
        scan = clinics.scan(subject)
        fixed, clustered, resampled = (ways[name](scan) for name in ("fixed", "clustered", "resampled"))
        assert fixed.shape == resampled.shape == (32, 32, 32)
        assert clustered.shape == groups.target[groups.group(scan.brain.shape)]
        assert fixed.step * fixed.shape == pytest.approx(scan.brain.shape)
        assert clustered.step * clustered.shape == pytest.approx(scan.brain.shape)
        assert np.ptp(resampled.step * scan.edges_mm) < 1e-9
        assert resampled.step[0] * scan.edges_mm[0] * 32 == pytest.approx(48)


def test_ways_are_fitted_without_a_look_at_validation_and_test(clinics):
    blind = tuple(s for s in clinics.prepared.subjects if s.split == "train")
    alone = replace(clinics, prepared=replace(clinics.prepared, subjects=blind))
    assert reshape.groups(alone, SMALL).target == reshape.groups(clinics, SMALL).target
    for subject in clinics.prepared.split("test"):
        scan = clinics.scan(subject)
        for name, way in reshape.ways(alone, SMALL).items():
            assert way(scan).step == pytest.approx(reshape.ways(clinics, SMALL)[name](scan).step)


def test_all_ways_learn_from_the_same_volumes_in_as_many_steps(clinics, learnt):
    assert list(learnt) == ["fixed", "clustered", "resampled"]
    brought = reshape.volumes(clinics, {name: one.way for name, one in learnt.items()})
    assert {len(one["train"]) for one in brought.values()} == {6}
    assert len({one["image"].shape for one in brought["clustered"]["train"]}) > 1
    for one in learnt.values():
        assert len(one.history.rows) == SMALL.epochs
        assert one.history.rows[-1]["train"] < one.history.rows[0]["train"]


def test_a_finished_training_is_taken_up_again_but_not_for_other_clinics(clinics, tmp_path):
    once = replace(SMALL, epochs=1)
    first, again = (reshape.learn(clinics, once, out=tmp_path, device="cpu") for _ in range(2))
    assert [row["seconds"] for row in again["fixed"].history.rows] == [
        row["seconds"] for row in first["fixed"].history.rows
    ]
    for name, weights in first["clustered"].network.state_dict().items():
        assert torch.equal(weights, again["clustered"].network.state_dict()[name])
    alike = replace(clinics, protocols=dict.fromkeys(clinics.protocols, PROTOCOLS[0]))
    other = reshape.learn(alike, once, out=tmp_path, device="cpu")
    assert other["fixed"].history.rows[0]["train"] != first["fixed"].history.rows[0]["train"]


def test_a_network_that_returns_what_it_gets_loses_what_the_way_loses(clinics, learnt):
    table = reshape.measure(clinics, planted(learnt, Drawn(1.0)))
    healthy, patients = (table[table.material == kind] for kind in ("healthy", "patient"))
    assert healthy.mse.to_numpy() == pytest.approx(healthy.mse_way.to_numpy())
    assert (healthy.mse > 0).all()
    assert patients.ap.to_numpy() == pytest.approx(patients.prevalence.to_numpy())


def test_a_network_that_draws_nothing_errs_by_all_there_is(clinics, learnt):
    table = reshape.measure(clinics, planted(learnt, Drawn(0.0)))
    for scan in clinics.healthy("validation", "test"):
        rows = table[table.subject == scan.id]
        inside = scan.image[:, scan.kept]
        assert rows.mse.to_numpy() == pytest.approx((inside**2).mean(), rel=1e-5)
        assert rows.mae.to_numpy() == pytest.approx(inside.mean(), rel=1e-5)
    found = table[table.material == "patient"]
    assert (found.ap > 2 * found.prevalence).all()  # then the map is the image, and lesions are bright
    assert found.ap.to_numpy() == pytest.approx(found.ap_grey.to_numpy(), abs=0.02)  # they lie above the mean


def test_every_way_is_judged_on_the_same_scans(measured, clinics):
    counts = measured.groupby(["material", "way"]).size()
    assert set(counts["healthy"]) == {4}
    assert set(counts["patient"]) == {3}
    assert (measured.groupby(["subject", "material"]).prevalence.nunique() <= 1).all()
    whole = measured[measured.material == "healthy"][["mse", "mae", "mse_way", "kept_5", "aspect_10", "dice_10"]]
    assert np.isfinite(whole.to_numpy()).all()
    assert (measured.mse >= 0)[measured.material == "healthy"].all()


def test_the_summary_has_means_within_their_intervals(measured):
    table = reshape.summary(measured)
    assert list(table.index) == ["fixed", "clustered", "resampled"]
    assert table.n_healthy.tolist() == [4] * 3
    assert table.n_patients.tolist() == [3] * 3
    for name in reshape.FIGURES:
        assert table[name]["clustered"] == pytest.approx(measured[measured.way == "clustered"][name].mean())
        assert (table[f"{name}_low"] <= table[name] + 1e-9).all()
        assert (table[name] <= table[f"{name}_high"] + 1e-9).all()


def test_differences_are_paired():
    by_subject = {"s0": 1.0, "s1": 5.0, "s2": 90.0}
    rows = [{"subject": s, "material": "healthy", "way": way, "mse": value + shift}
            for s, value in by_subject.items() for way, shift in (("fixed", 0.0), ("resampled", -0.5))]  # fmt: skip
    table = reshape.differences(pd.DataFrame(rows), ("mse",))
    assert table.loc["resampled − fixed"].tolist() == pytest.approx([-0.5] * 3)


def test_compare_has_it_all_in_one_table(prepared, clinics, measured, learnt, tmp_path, monkeypatch):
    monkeypatch.setattr(reshape, "PROTOCOLS", PROTOCOLS)
    monkeypatch.setattr(Clinics, "dealt", classmethod(lambda cls, cohort, seed: clinics))
    table = reshape.compare(prepared, SMALL, out=tmp_path, device="cpu")
    pd.testing.assert_frame_equal(table, reshape.summary(measured))


def test_lesion_free_slices_of_patients_serve_where_nobody_is_healthy(tmp_path):
    lone = made_cohort.write(tmp_path, healthy=(0, 0, 0), patients=2, training=LESION_FREE)
    clinics = Clinics.dealt(lone, protocols=PROTOCOLS[:2])
    for scan in clinics.healthy("train", "validation", "test"):
        assert 0 < scan.kept.sum() < scan.brain.sum()
        assert not (scan.kept & scan.lesion).any()
    learnt = reshape.learn(clinics, SMALL, out=tmp_path, device="cpu")
    table = reshape.summary(reshape.measure(clinics, learnt))
    assert table.n_healthy.tolist() == [3] * 3
    assert table.n_patients.tolist() == [2] * 3


def test_without_patients_detection_is_undefined(tmp_path, learnt):
    clinics = Clinics.dealt(made_cohort.write(tmp_path, healthy=(1, 1, 1), patients=0), protocols=PROTOCOLS)
    table = reshape.summary(reshape.measure(clinics, learnt))
    assert table.ap.isna().all()
    assert table.n_patients.tolist() == [0] * 3
    assert table.mse.notna().all()


@pytest.mark.parametrize(("split", "healthy"), [("train", (0, 1, 1)), ("validation", (1, 0, 1))])
def test_a_split_without_healthy_material_is_refused(tmp_path, split, healthy):
    clinics = Clinics.dealt(made_cohort.write(tmp_path, healthy=healthy))
    with pytest.raises(CourseError, match=f"The split {split} has no healthy slice"):
        reshape.learn(clinics, SMALL, out=tmp_path, device="cpu")


@pytest.mark.parametrize("wrong", [{"side": 40}, {"side": 16}, {"groups": 0}, {"width": 4}, {"code": 12}])
def test_settings_that_no_network_can_have_are_refused(wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        Settings(**wrong)


def test_a_learnt_network_looks_at_any_shape(learnt, clinics):
    assert all(isinstance(one, Learnt) for one in learnt.values())
    for subject in clinics.prepared.subjects[:4]:
        scan = clinics.scan(subject)
        box, image, inside, drawn = learnt["clustered"].look(scan)
        assert image.shape == drawn.shape == (1, *box.shape)
        assert not drawn[0][~inside].any()
