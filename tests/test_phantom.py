"""The embedded cohort: the same for the same seed, plausible as anatomy, true in its truth, and safe on disk."""

import shutil
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from skimage.filters import threshold_multiotsu
from sklearn.metrics import average_precision_score
from threadpoolctl import threadpool_limits

from lib import datasets, dicom, phantom, volumes
from lib.errors import CourseError

KINDS = sorted(set(phantom.TURNS))
SITES = list(phantom.SCANNERS)
COHORT = {"healthy": 3, "patients": 3, "voxel_mm": 6, "seed": 5}


@lru_cache(maxsize=64)
def scan(index, kind=None, site="scanner_a", voxel_mm=4, seed=0):
    return phantom.simulate(index, kind=kind, site=site, voxel_mm=voxel_mm, seed=seed)


def brain(subject):
    return subject.images["T1"] > 0


def same(a, b):
    pairs = [(a.images[m], b.images[m]) for m in phantom.MODALITIES] + [(a.lesion, b.lesion)]
    return all(np.array_equal(*pair) for pair in pairs)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return phantom.write_cohort(tmp_path_factory.mktemp("cohort"), **COHORT)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_same_seed_gives_the_same_voxels(kind):
    assert same(scan(7, kind), phantom.simulate(7, kind=kind, voxel_mm=4))


@pytest.mark.parametrize("threads", [1, 2])
def test_voxels_do_not_depend_on_the_number_of_threads(threads):
    with threadpool_limits(threads):
        assert same(scan(3, "ms", "scanner_a"), phantom.simulate(3, kind="ms", voxel_mm=4))


def test_every_subject_and_every_seed_is_another():
    assert not same(scan(0), scan(2))
    assert not same(scan(0), scan(0, seed=1))
    assert not np.array_equal(brain(scan(0)), brain(scan(2)))


def test_a_subject_does_not_depend_on_the_size_of_its_cohort():
    identity = ["index", "healthy", "site", "kind"]
    small, large = (phantom.plan(*sizes, seed=3)[identity] for sizes in ((4, 5), (9, 11)))
    assert set(small.itertuples(index=False, name=None)) < set(large.itertuples(index=False, name=None))


def test_a_lesion_leaves_the_rest_of_the_brain_as_it_was():
    healthy, patient = scan(5), scan(5, "ms")
    far = brain(healthy) & (ndimage.distance_transform_edt(patient.lesion == 0) > 3)
    assert np.median(np.abs(healthy.images["T2"] - patient.images["T2"])[far]) == 0


@pytest.mark.parametrize("voxel_mm", [2, 4])
def test_grid_is_what_the_affine_says(voxel_mm):
    subject = scan(1, "glioma", voxel_mm=voxel_mm)
    np.testing.assert_allclose(subject.affine[:3, :3], voxel_mm * np.eye(3))
    low = subject.affine[:3, 3] - voxel_mm / 2
    np.testing.assert_allclose(low, np.array(phantom.BOX_MM)[:, 0])
    np.testing.assert_allclose(low + voxel_mm * np.array(subject.lesion.shape), np.array(phantom.BOX_MM)[:, 1])
    assert {i.dtype for i in subject.images.values()} == {np.dtype(np.int16)}


def test_a_subject_is_the_same_at_every_voxel_size():
    coarse, fine = scan(1, "glioma"), scan(1, "glioma", voxel_mm=2)
    assert brain(coarse).sum() * 8 == pytest.approx(brain(fine).sum(), rel=0.02)
    assert (coarse.lesion > 0).sum() * 8 == pytest.approx((fine.lesion > 0).sum(), rel=0.02)
    centres = [ndimage.center_of_mass(s.lesion > 0) @ s.affine[:3, :3] + s.affine[:3, 3] for s in (coarse, fine)]
    np.testing.assert_allclose(*centres, atol=3)


@pytest.mark.parametrize("index", range(8))
def test_brain_is_plausible(index):
    subject = scan(index)
    assert 1.0 < brain(subject).sum() * 4**3 / 1e6 < 1.8
    assert all(np.array_equal(image > 0, brain(subject)) for image in subject.images.values())
    largest = np.bincount(ndimage.label(brain(subject))[0].ravel())[1:].max()
    assert largest / brain(subject).sum() > 0.97
    assert not any(brain(subject).take(end, axis).any() for axis in range(3) for end in (0, -1))
    assert not subject.lesion.any()


@pytest.mark.parametrize("site", SITES)
def test_tissues_have_the_contrast_of_their_sequence(site):
    images, inside = scan(0, site=site, voxel_mm=2).images, brain(scan(0, site=site, voxel_mm=2))

    def medians(modality, classes_from):
        reference = np.log(images[classes_from][inside])
        classes = np.digitize(reference, threshold_multiotsu(reference))
        return [np.median(images[modality][inside][classes == c]) for c in range(3)]

    white, grey, fluid = medians("T1", classes_from="T2")
    assert fluid < grey < white
    white, grey, fluid = medians("FLAIR", classes_from="T2")
    assert fluid < white < grey
    fluid, grey, white = medians("T2", classes_from="T1")
    assert white < grey < fluid


def test_sites_differ_in_units_and_noise():
    levels = [np.median(scan(0, site=site).images["FLAIR"][brain(scan(0))]) for site in SITES]
    assert max(levels) > 5 * min(levels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [1, 9])
def test_truth_lies_in_the_brain_and_has_its_volume(kind, index):
    subject = scan(index, kind)
    assert not subject.lesion[~brain(subject)].any()
    low, high = phantom.GROWTHS[kind].millilitres if kind in phantom.GROWTHS else (0.5, 20)
    assert low - 0.1 <= (subject.lesion > 0).sum() * 0.064 <= high + 0.1
    labels = {"glioma": {1, 2, 4}, "ms": {2}, "hypo": {1, 2}}
    assert set(np.unique(subject.lesion)) - {0} == labels.get(kind, {1})


@pytest.mark.parametrize("index", [1, 9, 17])
@pytest.mark.parametrize("kind", ["glioma", "hyper", "pontine", "ms", "hypo"])
def test_lesions_change_every_modality_as_they_should(kind, index):
    signs = (-1, 1, -1 if kind == "hypo" else 1)
    healthy, patient = scan(index), scan(index, kind)
    inside = (patient.lesion == 1 if kind == "hypo" else patient.lesion > 0) & brain(healthy)
    for modality, sign in zip(phantom.MODALITIES, signs, strict=True):
        change = patient.images[modality][inside].mean() / healthy.images[modality][inside].mean() - 1
        assert sign * change > 0.03


def test_gliomas_show_in_a_threshold_and_isointense_lesions_hide_from_it():
    def precision(kind):
        patients = [scan(index, kind, voxel_mm=3) for index in (1, 9, 17)]
        truths = [patient.lesion[brain(patient)] > 0 for patient in patients]
        flairs = [patient.images["FLAIR"][brain(patient)] for patient in patients]
        return np.mean([average_precision_score(*pair) for pair in zip(truths, flairs, strict=True)])

    assert precision("glioma") > 0.3
    assert precision("iso") < 0.1


def test_pontine_lesions_lie_in_the_pons():
    subject = scan(3, "pontine")
    x, y, z = ndimage.center_of_mass(subject.lesion > 0) @ subject.affine[:3, :3] + subject.affine[:3, 3]
    assert abs(x) < 12
    assert -50 < y < -8
    assert z < -12


def test_sixteen_patients_have_all_kinds_and_all_sites_serve_both_groups():
    table = phantom.plan(24, 16)
    assert set(table.kind[table.healthy == 0]) == set(KINDS)
    assert set(table.kind[table.healthy == 1]) == {"n/a"}
    assert set(table.site[table.healthy == 1]) == set(table.site[table.healthy == 0]) == set(SITES)
    assert table.participant_id.is_unique
    assert table["index"].is_unique


def test_names_do_not_betray_health():
    healthy = phantom.plan(24, 16).healthy.to_numpy()
    assert 0 < healthy[:16].mean() < 1
    assert 0 < healthy[16:].mean() < 1


def test_cohort_on_disk_reads_back(cohort):
    people = pd.read_csv(cohort / "participants.tsv", sep="\t", index_col="participant_id")
    assert list(people.columns) == ["healthy", "site", "kind"]
    assert list(people.index) == [f"sub-{number:03d}" for number in range(1, 7)]
    assert {path.name for path in cohort.iterdir()} == {*people.index, "participants.tsv"}
    for name, person in people.iterrows():
        found = {path.name for path in (cohort / name).iterdir()}
        masks = set() if person.healthy else {f"{name}_seg.nii.gz"}
        assert found == masks | {f"{name}_{m}{end}" for m in ("flair", "t1", "t2") for end in (".nii.gz", ".json")}
        read = [volumes.read(cohort / name / file) for file in sorted(found) if file.endswith(".gz")]
        assert all(volumes.same_grid(v.voxels.shape, v.affine, read[0].voxels.shape, read[0].affine) for v in read)


def test_files_hold_what_was_simulated(cohort):
    row = next(r for r in phantom.plan(3, 3, 5).itertuples() if r.kind == "glioma")
    subject = scan(row.index, row.kind, row.site, 6, 5)
    stem = cohort / row.participant_id / row.participant_id
    np.testing.assert_array_equal(volumes.read(f"{stem}_t2.nii.gz").voxels, subject.images["T2"])
    np.testing.assert_array_equal(volumes.read(f"{stem}_seg.nii.gz").voxels, subject.lesion)
    np.testing.assert_allclose(volumes.read(f"{stem}_seg.nii.gz").affine, subject.affine)


def test_every_scan_has_its_times_beside_it_also_in_a_folder_of_before(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.json"):
        path.unlink()
    voxels = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    phantom.write_cohort(tmp_path, **COHORT)
    assert contents(tmp_path) == contents(cohort)
    assert {path: path.stat().st_mtime_ns for path in voxels} == voxels
    sites = pd.read_csv(tmp_path / "participants.tsv", sep="\t", index_col="participant_id").site
    for path in voxels:
        if "seg" not in path.name:
            facts = datasets.acquisition(path)
            modality = path.name.split("_")[1].removesuffix(".nii.gz").upper()
            times = phantom.SCANNERS[sites[path.parent.name]].sequences[modality]
            said = [facts["repetition_ms"], facts["echo_ms"], facts.get("inversion_ms", 0)]
            np.testing.assert_allclose(said, times)
            assert facts["tesla"] == 1.5
            assert dicom.weighting(facts) == modality


@pytest.mark.filterwarnings("ignore:.*still being processed:UserWarning")
def test_interrupted_writing_goes_on_and_ends_the_same(cohort, tmp_path):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom.write_cohort(tmp_path, **COHORT, progress=interrupt)
    assert not (tmp_path / "participants.tsv").exists()
    whole = [p for p in tmp_path.iterdir() if len(list(p.iterdir())) == len(list((cohort / p.name).iterdir()))]
    before = {path: path.stat().st_mtime_ns for p in whole for path in p.iterdir()}
    seen = []
    phantom.write_cohort(tmp_path, **COHORT, progress=lambda *counts: seen.append(counts))
    assert before
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert seen == [(i, 6) for i in range(1, 7)]
    assert contents(tmp_path) == contents(cohort)


def test_folder_name_tells_cohorts_apart():
    assert phantom.folder_name(24, 16) == f"24-healthy-16-patients-2mm-seed0-v{phantom.VERSION}"
    cohorts = [(24, 16), (16, 24), (24, 16, 4.0), (24, 16, 2.5), (24, 16, 2.0, 1)]
    assert len({phantom.folder_name(*cohort) for cohort in cohorts}) == 5


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: phantom.plan(0, 0), "0 healthy"),
        (lambda: phantom.plan(-1, 3), "-1 healthy"),
        (lambda: phantom.simulate(0, voxel_mm=0.5), "0.5 mm"),
        (lambda: phantom.simulate(0, voxel_mm=float("nan")), "nan mm"),
        (lambda: phantom.simulate(0, kind="tumor"), "tumor"),
        (lambda: phantom.simulate(0, site="scanner_z"), "scanner_z"),
    ],
)
def test_impossible_wishes_are_refused(call, names):
    with pytest.raises(CourseError, match=names) as refusal:
        call()
    assert refusal.value.cure


def test_a_folder_of_another_cohort_or_a_file_is_refused(cohort, tmp_path):
    with pytest.raises(CourseError, match="another cohort"):
        phantom.write_cohort(cohort, healthy=2, patients=3, voxel_mm=6, seed=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="cannot be written"):
        phantom.write_cohort(tmp_path / "file", healthy=1, patients=0)
