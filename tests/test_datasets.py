"""Datasets: folders are understood or refused in a sentence, and splits share subjects and loads as they should."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import datasets
from lib.errors import CourseError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def refused(call, *arguments):
    with pytest.raises(CourseError) as caught:
        call(*arguments)
    assert caught.value.cure.strip()
    return caught.value.what


def found(folder):
    return {s.id: (set(s.scans), s.lesion_mask is not None) for s in datasets.find_subjects(folder).subjects}


NAMINGS = {
    "BraTS 2012": ["BRATS_HG0015_flair.nii.gz", "BRATS_HG0015_T1.nii.gz", "BRATS_HG0015_seg.nii.gz"],
    "BraTS 2020": ["BraTS20_Training_001_flair.nii", "BraTS20_Training_001_t1.nii", "BraTS20_Training_001_seg.nii"],
    "BraTS 2023": ["BraTS-GLI-00000-000-t2f.nii.gz", "BraTS-GLI-00000-000-t1n.nii.gz", "BraTS-GLI-00000-000-seg.nii"],
    "capitals": ["X_FLAIR.NII.GZ", "X_T1.nii.gz", "X_SEG.Nii.Gz"],
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings_are_understood(tmp_path, naming):
    touch(tmp_path / "data" / "one", *NAMINGS[naming])
    assert found(tmp_path / "data") == {"one": ({"FLAIR", "T1"}, True)}


def test_any_subset_of_modalities_at_any_depth(tmp_path):
    touch(tmp_path, "HGG/a/a_t1ce.nii.gz", "HGG/a/a_t2.nii.gz", "LGG/b/b_flair.nii", "LGG/b/b_seg.nii")
    assert found(tmp_path) == {"a": ({"T1ce", "T2"}, False), "b": ({"FLAIR"}, True)}


def test_what_was_understood_is_said(tmp_path):
    touch(tmp_path, "a/a_flair.nii.gz", "a/a_seg.nii.gz", "b/b_flair.nii.gz", "b/atlas.nii.gz", "b/notes.txt")
    dataset = datasets.find_subjects(tmp_path)
    assert dataset.layout == "brats"
    assert "2 subjects" in dataset.notes[0]
    assert "FLAIR 2" in dataset.notes[0]
    assert "masks 1" in dataset.notes[0]
    assert "b/atlas.nii.gz" in dataset.notes[1]


def test_hidden_files_are_not_scans(tmp_path):
    touch(tmp_path, "a/a_flair.nii.gz", "a/._a_flair.nii.gz", "__MACOSX/a/._a_flair.nii.gz")
    assert list(found(tmp_path)) == ["a"]


@pytest.mark.parametrize("spelling", [".", "../one", "sub/.."])
def test_one_subject_is_named_by_its_folder_however_that_is_spelled(tmp_path, monkeypatch, spelling):
    touch(tmp_path / "one", "one_flair.nii.gz", "sub/notes.txt")
    monkeypatch.chdir(tmp_path / "one")
    assert list(found(spelling)) == ["one"]


def test_order_is_that_of_the_names(tmp_path):
    touch(tmp_path, *(f"{place}/{name}/{name}_t1.nii" for place, name in [("z", "a"), ("y", "c"), ("x", "b")]))
    assert list(found(tmp_path)) == ["a", "b", "c"]


def test_bids_is_understood(tmp_path):
    touch(
        tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
        "sub-01/anat/sub-01_acq-3d_FLAIR.nii.gz", "derivatives/seg/sub-01/sub-01_label-lesion_mask.nii.gz",
        "derivatives/seg/sub-01/sub-01_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii",
        "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii", "sub-02/ses-2/anat/sub-02_ses-2_desc-brain_mask.nii",
    )  # fmt: skip
    dataset = datasets.find_subjects(tmp_path)
    said = {s.id: (sorted(s.scans), s.lesion_mask and s.lesion_mask.name) for s in dataset.subjects}
    assert dataset.layout == "bids"
    assert said == {
        "sub-01": (["FLAIR", "T1", "T1ce"], "sub-01_label-lesion_mask.nii.gz"),
        "sub-02": (["T1"], None),
    }
    assert next(s for s in dataset.subjects if s.id == "sub-02").scans["T1"].name == "sub-02_ses-1_T1w.nii"
    assert "Of 1 subjects with several sessions, the first session is used." in dataset.notes
    assert "derivatives/seg/sub-01/sub-01_T1w.nii.gz, sub-02/ses-2/anat/sub-02_ses-2_desc-brain" in dataset.notes[1]


def test_healthy_subjects_of_another_folder_join_and_the_gap_is_told(tmp_path):
    touch(tmp_path / "ill", "a/a_t1.nii", "a/a_seg.nii")
    touch(tmp_path / "well", "sub-01/anat/sub-01_T1w.nii.gz")
    ill, well = tmp_path / "ill", tmp_path / "well"
    together = datasets.find_subjects(ill, "", well)
    assert {s.id: s.healthy for s in together.subjects} == {"a": None, "sub-01": True}
    assert "known to be healthy 1" in together.notes[1]
    assert together.notes[-1] == datasets.GAP
    assert "a" in refused(datasets.find_subjects, ill, "", ill)
    (well / "participants.tsv").write_text("participant_id\thealthy\nsub-01\t0")
    assert "sub-01" in refused(datasets.find_subjects, ill, "", well)


def test_participants_say_who_is_healthy(tmp_path):
    touch(tmp_path, *(f"{s}/{s}_t1.nii" for s in "abcd"))
    rows = ["participant_id\thealthy\tsite\tkind", "a\t1\tone\t", "b\tNo\ttwo\tglioma", "c\tn/a\t\t"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows))
    said = {s.id: (s.healthy, s.site, s.kind) for s in datasets.find_subjects(tmp_path).subjects}
    assert said == {
        "a": (True, "one", None),
        "b": (False, "two", "glioma"),
        "c": (None, None, None),
        "d": (None, None, None),
    }


BAD_FOLDERS = {
    "empty": ([], "scans"),
    "no scans": (["a/readme.txt", "a/scan.dcm"], "scans"),
    "unknown names": (["a/anat.nii.gz"], "scans"),
    "two files for one modality": (["a/a_flair.nii.gz", "a/a_t2f.nii"], "FLAIR"),
    "plain and compressed": (["a/a_t1.nii.gz", "a/a_t1.nii"], "a_t1.nii"),
    "names that differ in case": (["x/abc/abc_t1.nii", "y/ABC/ABC_t1.nii"], "ABC, abc"),
    "one name twice": (["x/abc/abc_t1.nii", "y/abc/abc_t1.nii"], "abc"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_refused(tmp_path, kind):
    names, named = BAD_FOLDERS[kind]
    (tmp_path / "scans").mkdir()
    assert named in refused(datasets.find_subjects, touch(tmp_path / "scans", *names))


def test_a_wrong_path_or_layout_is_refused(tmp_path):
    touch(tmp_path, "file")
    assert "nowhere" in refused(datasets.find_subjects, tmp_path / "nowhere")
    assert "file" in refused(datasets.find_subjects, tmp_path / "file")
    assert "'bits'" in refused(datasets.find_subjects, tmp_path, "bits")


BAD_PARTICIPANTS = {
    "no column": b"name\thealthy\na\t1\n",
    "commas": b"participant_id,healthy\na,1\n",
    "another word": b"participant_id\thealthy\na\tmaybe\n",
    "no rows": b"participant_id\thealthy\n",
    "empty": b"",
    "binary": b"\x89PNG\r\n\x1a\n\xff\xfe\x00",
    "an endless field": b"participant_id\thealthy\na\t" + b"x" * 200_000,
}


@pytest.mark.parametrize("kind", BAD_PARTICIPANTS)
def test_broken_participants_are_refused(tmp_path, kind):
    touch(tmp_path, "a/a_t1.nii")
    (tmp_path / "participants.tsv").write_bytes(BAD_PARTICIPANTS[kind])
    assert "participants.tsv" in refused(datasets.find_subjects, tmp_path)


@pytest.mark.parametrize(("text", "names"), [("FLAIR", ("FLAIR",)), (" t1CE, flair ", ("T1ce", "FLAIR"))])
def test_modalities_are_named_in_any_case(text, names):
    assert datasets.parse_modalities(text) == names


@pytest.mark.parametrize("text", ["", "FLAIR,", "T1,t1", "T3", "FLAIR T1"])
def test_unknown_or_doubled_modalities_are_refused(text):
    refused(datasets.parse_modalities, text)


SHARES = st.sampled_from([datasets.HEALTHY_SHARES, datasets.PATIENT_SHARES])
LOADS = st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0, 300), max_size=60)


@given(LOADS, SHARES, st.integers(0, 2**32))
def test_every_subject_is_in_one_split_and_shares_hold(loads, shares, seed):
    result = datasets.split(loads, shares, seed)
    count = Counter(result.values())
    assert result.keys() == loads.keys()
    assert set(count) <= set(datasets.SPLITS)
    for name, share in zip(datasets.SPLITS, shares, strict=True):
        assert abs(count[name] - share * len(loads)) <= 1
    assert len(count) == 3 or len(loads) < 3


@given(LOADS, st.integers(0, 2**32), st.randoms())
def test_a_split_depends_on_seed_and_loads_alone(loads, seed, random):
    shuffled = list(loads.items())
    random.shuffle(shuffled)
    assert datasets.split(dict(shuffled), seed=seed) == datasets.split(loads, seed=seed)


def test_another_seed_is_another_split():
    loads = dict.fromkeys("abcdefghijkl", 0.0)
    assert len({tuple(sorted(datasets.split(loads, seed=seed).items())) for seed in range(8)}) == 8


@pytest.mark.parametrize("seed", range(5))
def test_every_split_has_its_share_of_every_load(seed):
    loads = {f"s{i}": float(i) for i in range(60)}
    result = datasets.split(loads, seed=seed)
    for start in range(0, 60, 10):
        stretch = Counter(result[f"s{i}"] for i in range(start, start + 10))
        apart = [stretch[n] - 10 * w for n, w in zip(datasets.SPLITS, datasets.PATIENT_SHARES, strict=True)]
        assert np.abs(apart).max() <= 2


def csv(tmp_path, text):
    path = tmp_path / "splits.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_splits_are_read_from_a_file(tmp_path):
    path = csv(tmp_path, "\ufeffsubject,split,why\r\na, train ,x\r\nb,test\r\na,train\r\n")
    assert datasets.read_splits(path, {"a", "b", "c"}) == {"a": "train", "b": "test"}


BAD_SPLITS = {
    "a subject in two splits": ("subject,split\na,train\na,test\n", "a in two splits"),
    "an unknown subject": ("subject,split\na,train\nnobody,test\n", "nobody"),
    "an unknown split": ("subject,split\na,training\n", "'training'"),
    "a short row": ("subject,split\na\n", "a"),
    "a missing column": ("subject,set\na,train\n", "split"),
    "tabs": ("subject\tsplit\na\ttrain\n", "split"),
    "no rows": ("subject,split\n", "no rows"),
    "empty": ("", "no rows"),
    "binary": (b"\xff\xfe\x00\x01", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_SPLITS)
def test_bad_splits_are_refused(tmp_path, kind):
    text, named = BAD_SPLITS[kind]
    what = refused(datasets.read_splits, csv(tmp_path, text), {"a", "b"})
    assert "splits.csv" in what
    assert named in what


def test_a_missing_file_or_a_folder_of_splits_is_refused(tmp_path):
    assert "nowhere.csv" in refused(datasets.read_splits, tmp_path / "nowhere.csv", {"a"})
    assert str(tmp_path) in refused(datasets.read_splits, tmp_path, {"a"})


def test_links_to_subjects_are_followed_and_a_ring_of_links_ends(brats, tmp_path):
    folder = brats(patients=2)
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    (chosen / "renamed").symlink_to(folder / "p0")
    (chosen / "ring").symlink_to(chosen)
    assert [s.id for s in datasets.find_subjects(chosen).subjects] == ["renamed"]


def test_a_subject_listed_twice_is_named(brats):
    folder = brats(patients=1)
    (folder / "participants.tsv").write_text("participant_id\thealthy\np0\t1\np0\t0\n")
    with pytest.raises(CourseError, match="more than one row for p0"):
        datasets.find_subjects(folder)
