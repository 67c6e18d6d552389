"""Layouts: every folder is recognised as what it is, junk changes nothing, and what it says is read as it was meant."""

import csv
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skimage.io import imsave

from lib import cohort, datasets, formats, intake, pictures, preparation, volumes
from lib.errors import CourseError
from lib.layouts import LAYOUTS
from lib.preprocessing import Recipe, canonical

SHARED = Path(__file__).parents[2] / "shared" / "data"
OASIS = "{0}/PROCESSED/MPRAGE/T88_111/{0}_mpr_n4_anon_111_t88_masked_gfc.img"
LONG = "_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz"
GOLD = "GOLD_STANDARD_N4_noneck_reduced_winsor_regtoFLAIR_regtoMNI.nii.gz"
IXI = ("IXI002-Guys-0828", "IXI012-HH-1211", "IXI035-IOP-0873")
ATLAS = "Training/{1}/sub-{0}/ses-1/anat/sub-{0}_ses-1_space-MNI152NLin2009aSym_{2}.nii.gz"
STROKE = ("T1w", "label-L_desc-T1lesion_mask")

FOLDERS = {  # name: (layout, files, subjects by id with modalities and whether there is a mask)
    "msd": (
        "msd",
        [f"Task01/{kind}/BRATS_00{i}.nii.gz" for kind in ("imagesTr", "labelsTr") for i in (1, 2)],
        {f"BRATS_00{i}": ("FLAIR T1 T1ce T2", True) for i in (1, 2)},
    ),
    "ixi, flat": ("ixi", [f"{name}-T1.nii.gz" for name in IXI], {name[:6]: ("T1", False) for name in IXI}),
    "ixi, a folder a modality": (
        "ixi",
        [f"IXI-{scan}/{name}-{scan}.nii.gz" for name in IXI for scan in ("T1", "T2", "PD")],
        {name[:6]: ("PD T1 T2", False) for name in IXI},
    ),
    "oasis1": (
        "oasis1",
        [f"disc1/{OASIS.format(f'OAS1_000{i}_MR1')}" for i in (1, 2)],
        {f"OAS1_000{i}_MR1": ("T1", False) for i in (1, 2)},
    ),
    "atlas": (
        "atlas",
        [ATLAS.format(name, name[:4].upper(), end) for name in ("r001s001", "r009s002") for end in STROKE],
        {f"sub-{name}": ("T1", True) for name in ("r001s001", "r009s002")},
    ),
    "atlas, derivatives": (
        "atlas",
        [f"derivatives/ATLAS/sub-r1s1/ses-1/anat/sub-r1s1_ses-1_space-MNI152NLin2009aSym_{end}.nii" for end in STROKE],
        {"sub-r1s1": ("T1", True)},
    ),
    "mslub": (
        "mslub",
        [f"raw/patient01/patient01_{n}.nii.gz" for n in ("FLAIR", "T1W", "T2W", "T1WKS", "consensus_gt", "brainmask")],
        {"patient01": ("FLAIR T1 T1ce T2", True)},
    ),
    "mslub, bare": (
        "mslub",
        [f"patient0{i}/{name}.nii.gz" for i in (1, 2) for name in ("FLAIR", "T1W", "consensus_gt", "brainmask")],
        {f"patient0{i}": ("FLAIR T1", True) for i in (1, 2)},
    ),
    "mslub, long names": (
        "mslub",
        [f"patient07/{name}" for name in (f"FLAIR{LONG}", f"T1{LONG}", f"T1POST{LONG}", GOLD)],
        {"patient07": ("FLAIR T1 T1ce", True)},
    ),
    "lgg": (
        "lgg",
        [f"TCGA_CS_49{p}/TCGA_CS_49{p}_{i}{m}.tif" for p in (41, 42) for i in range(1, 13) for m in ("", "_mask")],
        {f"TCGA_CS_49{p}": ("FLAIR T1 T1ce", True) for p in (41, 42)},
    ),
    "bids": (
        "bids",
        ["sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"],
        {"sub-01": ("FLAIR T1", False), "sub-02": ("T1", False)},
    ),
    "bids, oasis-3": (
        "bids",
        [f"OAS1_MR_{d}/anat{r}/sub-OAS1_ses-{d}_run-0{r}_T1w.nii.gz" for d in ("d0129", "d0757") for r in (1, 2)],
        {"sub-OAS1": ("T1", False)},
    ),
    "brats": (
        "brats",
        [f"{s}/{s}{end}.nii.gz" for s in ("BraTS2021_00006", "sub-01") for end in ("_flair", "_t1", "_t1ce", "_seg")],
        dict.fromkeys(("BraTS2021_00006", "sub-01"), ("FLAIR T1 T1ce", True)),
    ),
    "brats 2023": (
        "brats",
        [f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{end}.nii.gz" for end in ("t2f", "t1n", "t1c", "t2w", "seg")],
        {"BraTS-GLI-00000-000": ("FLAIR T1 T1ce T2", True)},
    ),
    "brats 2015": (
        "brats",
        [
            f"HGG/brats_2013_pat0001_1/{n}/{n}.mha"
            for n in ("VSD.Brain.XX.O.MR_Flair.54512", "VSD.Brain.XX.O.MR_T1c.54514", "VSD.Brain_3more.XX.O.OT.54517")
        ],
        {"brats_2013_pat0001_1": ("FLAIR T1ce", True)},
    ),
    "brats 2012": (
        "brats",
        [f"HG/0001/BRATS_HG0001_{n}/BRATS_HG0001_{n}.mha" for n in ("FLAIR", "T1C", "truth")],
        {"0001": ("FLAIR T1ce", True)},
    ),
    "flat": (
        "nifti",
        [f"{s}_{end}.nii.gz" for s in ("case1", "case2") for end in ("t1", "flair", "seg")],
        dict.fromkeys(("case1", "case2"), ("FLAIR T1", True)),
    ),
    "flat, nothing named": (
        "nifti",
        ["case1.nii.gz", "case2.nii", "case1_seg.nii.gz"],
        {"case1": ("unknown", True), "case2": ("unknown", False)},
    ),
    "flat, masks under the same names": (
        "nifti",
        [f"{kind}/{s}.nii.gz" for kind in ("images", "masks") for s in ("case1", "case2")],
        dict.fromkeys(("case1", "case2"), ("unknown", True)),
    ),
    "classes": (
        "classes",
        ["yes/Y1.jpg", "yes/Y2.JPG", "no/1 no.jpeg", "no/N2.png"],
        dict.fromkeys(("yes-Y1", "yes-Y2", "no-1 no", "no-N2"), ("unknown", False)),
    ),
    "classes, kinds": (
        "classes",
        ["Training/glioma_tumor/image(1).jpg", "Training/no_tumor/image(1).jpg", "Training/no_tumor/image(1).png"],
        dict.fromkeys(("glioma_tumor-image(1)", "no_tumor-image(1).jpg", "no_tumor-image(1).png"), ("unknown", False)),
    ),
}
JUNK = (
    *("notes.txt", "Thumbs.db", ".DS_Store", "dataset.json", "oasis_cross-sectional.csv", "train_labels.csv"),
    *("screenshot.png", "yes/shot.png", "map.tif", "x_1.tif", "atlas.nii.gz", "IXI900-Guys-0900-T1.nii.gz", "scan.dcm"),
    *("sub-99_T1w.nii.gz", "patient99/patient99_FLAIR.nii.gz", "x/y_flair.nii.gz", "imagesTr/x.nii.gz", "a/b.img"),
)


def laid_out(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def told(dataset):
    return {s.id: (" ".join(sorted(s.scans)), s.lesion_mask is not None) for s in dataset.subjects}


def refused(call, *arguments, **options):
    with pytest.raises(CourseError) as caught:
        call(*arguments, **options)
    assert caught.value.cure.strip()
    return caught.value.what


@pytest.mark.parametrize("name", FOLDERS)
def test_a_layout_is_recognised_as_itself(tmp_path, name):
    layout, files, subjects = FOLDERS[name]
    found = datasets.find_subjects(laid_out(tmp_path, *files))
    assert found.layout == layout
    assert told(found) == subjects
    assert told(datasets.find_subjects(tmp_path, layout.upper())) == subjects


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([n for n, (_, files, _) in FOLDERS.items() if len(files) > 2]), st.sampled_from(JUNK))
def test_one_file_more_changes_neither_the_layout_nor_whom_it_knows(tmp_path_factory, name, junk):
    layout, files, subjects = FOLDERS[name]
    found = datasets.find_subjects(laid_out(tmp_path_factory.mktemp("junk"), *files, junk))
    assert found.layout == layout
    assert told(found).items() >= subjects.items()


def test_every_layout_but_those_of_dicom_has_a_folder_here():
    assert {layout for layout, *_ in FOLDERS.values()} == LAYOUTS.keys() - {"dicom", "rsna_miccai"}


def test_what_was_looked_for_and_what_is_there_is_said(tmp_path):
    laid_out(tmp_path, "a1/x_1.csv", "a2/x_2.csv", "a/x.doc")
    with pytest.raises(CourseError, match=r"x_#\.csv \(2\), x\.doc \(1\)") as caught:
        datasets.find_subjects(tmp_path)
    assert "_flair" in caught.value.cure
    assert "layout bids" in refused(datasets.find_subjects, tmp_path, "bids")


def test_a_mask_without_a_session_belongs_to_the_only_one(tmp_path):
    laid_out(tmp_path, "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz", "derivatives/sub-1_label-lesion_mask.nii.gz")
    assert told(datasets.find_subjects(tmp_path)) == {"sub-1": ("T1", True)}
    laid_out(tmp_path, "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz")
    assert told(datasets.find_subjects(tmp_path)) == {"sub-1": ("T1", False)}


def test_ixi_is_healthy_and_bears_its_hospital(tmp_path):
    found = datasets.find_subjects(laid_out(tmp_path, *FOLDERS["ixi, flat"][1]))
    assert {(s.site, s.healthy) for s in found.subjects} == {("Guys", True), ("HH", True), ("IOP", True)}
    assert "sites Guys, HH, IOP" in found.notes[0]


def test_atlas_is_stroke_and_bears_its_cohort(tmp_path):
    found = datasets.find_subjects(laid_out(tmp_path, *FOLDERS["atlas"][1]))
    assert {(s.site, s.kind, s.healthy) for s in found.subjects} == {
        ("R001", "stroke", False),
        ("R009", "stroke", False),
    }


def test_oasis_takes_health_from_rating_or_age_and_no_second_visit(tmp_path):
    names = [f"OAS1_000{i}_MR1" for i in (1, 2, 3, 4)]
    laid_out(tmp_path, *(f"disc1/{OASIS.format(n)}" for n in [*names, "OAS1_0001_MR2"]))
    rows = [("ID", "Age", "CDR"), (names[0], 74, 0), (names[1], 73, 0.5), (names[2], 22, ""), (names[3], 65, "")]
    with open(tmp_path / "oasis_cross-sectional.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    found = datasets.find_subjects(tmp_path)
    assert [(s.id, s.healthy) for s in found.subjects] == list(zip(names, (True, False, True, None), strict=True))
    (tmp_path / "oasis_cross-sectional.csv").unlink()
    (tmp_path / "disc1" / names[1] / f"{names[1]}.txt").write_text("AGE:   73\nCDR:          0\n")
    assert [s.healthy for s in datasets.find_subjects(tmp_path).subjects] == [None, True, None, None]


def test_of_mslub_s_forms_the_best_fitting_is_used(tmp_path):
    files = [
        f"{form}/patient01/patient01_{n}.nii.gz" for form in ("raw", "coregistered") for n in ("FLAIR", "consensus_gt")
    ]
    found = datasets.find_subjects(laid_out(tmp_path, *files))
    assert {p.parts[-3] for s in found.subjects for p in s.scans.values()} == {"coregistered"}
    assert "raw, coregistered: coregistered is used" in found.notes[-1]


def test_classes_say_who_is_healthy_and_warn_of_the_frame(tmp_path):
    found = datasets.find_subjects(laid_out(tmp_path, *FOLDERS["classes, kinds"][1], "pred/x.jpg"))
    assert {s.id: (s.healthy, s.kind) for s in found.subjects}["glioma_tumor-image(1)"] == (False, "glioma_tumor")
    assert sum(s.healthy for s in found.subjects) == 2
    assert any("the frame" in note for note in found.notes)
    assert any("pred/x.jpg" in note for note in found.notes)


def test_a_group_of_controls_or_a_rating_says_who_is_healthy(tmp_path):
    laid_out(tmp_path, *(f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(5)))
    rows = ["participant_id\tgroup\tCDR\thealthy", "sub-0\tControl\t\t", "sub-1\tdepr\t\t", "sub-2\t\t0.5\t"]
    rows += ["sub-3\t\t0.0\tn/a", "sub-4\tcontrol\t\t0"]
    (tmp_path / "participants.tsv").write_text("\n".join(rows))
    found = datasets.find_subjects(tmp_path)
    assert [s.healthy for s in found.subjects] == [True, None, False, True, False]
    assert "puts 1 subjects in the group 'control'" in found.notes[-1]


def brain(seed=0, shape=(9, 10, 8)):
    voxels = np.zeros(shape, np.int16)
    voxels[1:-1, 1:-1, 1:-1] = np.random.default_rng(seed).integers(50, 500, [n - 2 for n in shape])
    return voxels


def test_the_volumes_of_a_decathlon_file_are_the_modalities_of_its_json(tmp_path):
    scans = np.stack([brain(i) for i in range(4)], axis=-1)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    volumes.write(tmp_path / "imagesTr" / "BRATS_001.nii.gz", scans, np.diag([2, 2, 2, 1]))
    volumes.write(
        tmp_path / "labelsTr" / "BRATS_001.nii.gz", (scans[..., 0] > 400).astype(np.uint8), np.diag([2, 2, 2, 1])
    )
    order = {"0": "FLAIR", "1": "T1w", "3": "t1gd", "2": "T2w"}
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": order}))
    (subject,) = datasets.find_subjects(tmp_path).subjects
    read = datasets.read_subject(subject, ("T2", "T1ce", "FLAIR"))
    assert list(read) == ["T2", "T1ce", "FLAIR"]
    for modality, number in {"T2": 2, "T1ce": 3, "FLAIR": 0}.items():
        np.testing.assert_array_equal(read[modality].voxels, scans[..., number])
    np.testing.assert_array_equal(datasets.read_lesion(subject).voxels, scans[..., 0] > 400)
    assert "no volume 5" in refused(datasets.read_scan, subject.scans["T1"], channel=4)
    (tmp_path / "dataset.json").write_text("{}")
    assert "dataset.json" in refused(datasets.find_subjects, tmp_path)


def analyze(path, voxels, **header):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.AnalyzeImage(voxels, None)
    image.header.set_zooms((1.0, 1.5, 2.0))
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


def test_an_analyze_pair_is_read_with_its_convention_said(tmp_path):
    path = analyze(tmp_path / "x.img", brain())
    volume = datasets.read_scan(path)
    np.testing.assert_array_equal(volume.voxels, brain())
    np.testing.assert_array_equal(canonical(volume).voxels, brain()[::-1])
    np.testing.assert_allclose(volume.voxel_mm, (1, 1.5, 2))
    assert volume.notes == (formats.NO_SIDE,)


def test_broken_analyze_pairs_are_named(tmp_path):
    assert "axial" in refused(datasets.read_scan, analyze(tmp_path / "turned.img", brain(), orient=b"\x02"))
    short = analyze(tmp_path / "short.img", brain())
    short.write_bytes(short.read_bytes()[:100])
    assert "short.img" in refused(datasets.read_scan, short)
    alone = analyze(tmp_path / "alone.img", brain())
    alone.with_suffix(".hdr").unlink()
    assert "alone.img" in refused(datasets.read_scan, alone)
    torn = analyze(tmp_path / "torn.img", brain())
    torn.with_suffix(".hdr").write_bytes(b"x" * 348)
    assert "torn.img" in refused(datasets.read_scan, torn)


def test_a_metaimage_is_read_on_the_grid_that_simpleitk_gives_it(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is an optional package")
    affine = np.array([[-2.0, 0, 0, 5], [0, 0, 3, -7], [0, 1.5, 0, 2], [0, 0, 0, 1]])
    volumes.write(tmp_path / "x.nii.gz", brain(), affine)
    sitk.WriteImage(sitk.ReadImage(tmp_path / "x.nii.gz"), tmp_path / "x_flair.mha", useCompression=True)
    volume = datasets.read_scan(tmp_path / "x_flair.mha")
    np.testing.assert_array_equal(volume.voxels, brain())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    (tmp_path / "x_flair.mha").write_bytes(b"ObjectType = Image\n")
    assert "x_flair.mha" in refused(datasets.read_scan, tmp_path / "x_flair.mha")
    assert "gone.mha" in refused(datasets.read_scan, tmp_path / "gone.mha")


def test_without_its_package_a_metaimage_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(CourseError, match=r"x_flair\.mha") as caught:
        datasets.read_scan(tmp_path / "x_flair.mha")
    assert "requirements-extra.txt" in caught.value.cure


def stack(folder, slices=12, missing=(), repeat_red=False, size=64):
    """A head of rising slices, green twice as bright as red; slice 5 has a lesion."""
    folder.mkdir(parents=True)
    grid = np.hypot(*np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j])
    for i in range(1, slices + 1):
        red = ((grid < 0.7) * (20 + 5 * i + 30 * grid)).astype(np.uint8)
        green = red if repeat_red else 2 * red
        if i not in missing:
            imsave(folder / f"{folder.name}_{i}.tif", np.stack([red, green, red // 2], -1), check_contrast=False)
        lesion = np.uint8(255) * ((grid < 0.2) & (i == 5))
        imsave(folder / f"{folder.name}_{i}_mask.tif", lesion.astype(np.uint8), check_contrast=False)
    return folder


def test_a_stack_of_pictures_is_a_volume_in_the_order_of_its_numbers(tmp_path):
    (subject,) = datasets.find_subjects(stack(tmp_path / "TCGA_1").parent).subjects
    read = datasets.read_subject(subject, ("T1", "FLAIR", "T1ce"))
    assert read["T1"].voxels.shape == (64, 64, 12)
    middle = read["T1"].voxels[32, 32]
    np.testing.assert_array_equal(np.diff(middle), 5)
    np.testing.assert_array_equal(read["FLAIR"].voxels, 2 * read["T1"].voxels)
    np.testing.assert_allclose(read["T1"].voxel_mm * (64, 64, 12), (240, 240, 160))
    assert read["T1"].notes == pictures.STACK_NOTES
    lesion = datasets.read_lesion(subject)
    assert lesion.voxels[..., 4].any()
    assert not np.delete(lesion.voxels, 4, axis=2).any()


def test_a_sequence_that_repeats_flair_is_missing(tmp_path):
    stack(tmp_path / "TCGA_1", repeat_red=True)
    found = datasets.find_subjects(stack(tmp_path / "TCGA_2").parent)
    assert told(found)["TCGA_1"] == ("FLAIR T1ce", True)
    assert "left out: TCGA_1 T1." in found.notes[-1]


def test_broken_stacks_are_named(tmp_path):
    gap = stack(tmp_path / "gap", missing=(7,))
    assert "lacks slice 7" in refused(pictures.read_stack, gap, 0)
    few = stack(tmp_path / "few")
    (few / "few_3_mask.tif").unlink()
    assert "few_3.tif has no mask" in refused(pictures.read_stack_mask, few)
    mixed = stack(tmp_path / "mixed")
    imsave(mixed / "mixed_4.tif", np.zeros((32, 64, 3), np.uint8), check_contrast=False)
    imsave(mixed / "mixed_4_mask.tif", np.zeros((32, 64), np.uint8), check_contrast=False)
    assert "mixed_4.tif has another size" in refused(pictures.read_stack, mixed, 0)
    assert "mixed_4_mask.tif has another size" in refused(pictures.read_stack_mask, mixed)
    imsave(mixed / "mixed_4.tif", np.zeros((64, 64), np.uint8), check_contrast=False)
    assert "mixed_4.tif has no colour 2" in refused(pictures.read_stack, mixed, 1)
    imsave(mixed / "mixed_04.tif", np.zeros((64, 64, 3), np.uint8), check_contrast=False)
    assert "both claim to be slice 4" in refused(pictures.read_stack, mixed, 0)
    (mixed / "mixed_04.tif").unlink()
    (mixed / "mixed_4.tif").write_bytes(b"II*\x00")
    assert "mixed_4.tif is damaged" in refused(pictures.read_stack, mixed, 0)


def test_a_mask_of_the_brain_that_came_with_the_scans_is_used(tmp_path):
    place = tmp_path / "patient01"
    affine = np.diag([2.0, 2, 2, 1])
    volumes.write(place / "patient01_FLAIR.nii.gz", brain() + np.int16(9), affine)
    volumes.write(place / "patient01_T1W.nii.gz", brain(1, (7, 7, 7)), affine)
    volumes.write(place / "patient01_brainmask.nii.gz", (brain() > 0).astype(np.uint8), affine)
    (subject,) = datasets.find_subjects(tmp_path).subjects
    read = datasets.read_subject(subject, ("FLAIR", "T1"))
    np.testing.assert_array_equal(read["FLAIR"].voxels > 0, brain() > 0)
    assert datasets.MASKED in read["FLAIR"].notes
    np.testing.assert_array_equal(read["T1"].voxels, brain(1, (7, 7, 7)))


def of(*scans):
    subjects = tuple(datasets.Subject(str(i), dict.fromkeys(one.split(), Path("x"))) for i, one in enumerate(scans))
    return datasets.Dataset("brats", subjects)


@pytest.mark.parametrize(
    ("scans", "chosen"),
    [
        (["FLAIR T1", "FLAIR T1"], "FLAIR"),
        (["FLAIR T1", "T1"], "FLAIR"),
        (["FLAIR T1", "T1", "T1"], "T1"),
        (["T1 T2", "T1 T2"], "T2"),
        (["CT", "CT", "PD"], "CT"),
        (["unknown"], "FLAIR"),
    ],
)
def test_the_usual_modality_is_looked_at_where_none_is_asked_for(scans, chosen):
    assert datasets.with_modalities(of(*scans))[1] == (chosen,)


def test_scans_of_unknown_modality_are_called_as_asked_and_that_is_said():
    dataset, wanted = datasets.with_modalities(of("unknown", "T1"), "t1")
    assert wanted == ("T1",)
    assert all("T1" in s.scans for s in dataset.subjects)
    assert "of 1 subjects' scans: they are taken to be T1" in dataset.notes[-1]
    assert "which 1 of 2 subjects have" in datasets.with_modalities(of("PD", "T1"))[0].notes[0]


def test_pictures_of_classes_become_subjects_of_one_slice(tmp_path, course_root):
    grid = np.hypot(*np.mgrid[-1:1:64j, -1:1:64j])
    (tmp_path / "scans" / "no").mkdir(parents=True)
    for i in range(3):
        image = ((grid < 0.8) * (100 + 20 * i + 50 * grid)).astype(np.uint8)
        imsave(tmp_path / "scans" / "no" / f"{i}.png", image, check_contrast=False)
    dataset, wanted = datasets.with_modalities(datasets.find_subjects(tmp_path / "scans"), "T2")
    well = tuple(s for s in dataset.subjects if s.healthy)
    facts = intake.examine(well, wanted, 192.0)
    assert all(not record["problems"] for record in facts.values())
    splits = dict(zip([s.id for s in well], datasets.SPLITS, strict=True))
    gathered = intake.Gathered(well, wanted, facts, splits, intake.HEALTHY, (), ())
    prepared = cohort.open_cohort(preparation.prepare_cohort(gathered, Recipe(wanted)))
    for subject in prepared.subjects:
        assert subject.brain.any(axis=(1, 2)).sum() == 1
        assert 0.4 < subject.brain.sum() * subject.voxel_mm[:2].prod() / (np.pi * 85**2) < 1.2


def test_two_folders_share_the_modality_most_have_and_stay_apart(tmp_path, course_root, write_subject):
    for i in range(3):
        write_subject(tmp_path / "ill" / f"p{i}", seed=i, modalities=("FLAIR", "T1")[: 1 + (i < 2)])
        write_subject(tmp_path / "well" / f"h{i}", seed=9 + i, modalities=("T1",), mask=False)
    gathered = intake.gather(str(tmp_path / "ill"), healthy_data=str(tmp_path / "well"), size=48, pixel_mm=5.0)
    assert gathered.modalities == ("T1",)
    assert {s.id: s.origin for s in gathered.subjects} == {
        **dict.fromkeys(("p0", "p1"), ""),
        **dict.fromkeys(("h0", "h1", "h2"), datasets.HEALTHY_FOLDER),
    }
    assert "T1 is looked at, which 5 of 6 subjects have." in "".join(gathered.notes)
    assert [one["subject"] for one in gathered.left_out] == ["p2"]


def test_a_refusal_says_first_how_the_folder_was_understood(tmp_path, course_root, write_subject):
    folder = write_subject(tmp_path / "scans" / "p0")
    (folder / "p0_flair.nii.gz").write_bytes(b"torn")
    what = refused(intake.gather, str(tmp_path / "scans"))
    assert what.startswith("1 subjects in the layout brats: FLAIR 1; lesion masks 1")
    assert "p0_flair.nii.gz is not a gzip file" in what


SEEN = {  # folder: layout, subjects, the modality that is looked at
    "brats": ("brats", 12, "FLAIR"),
    "mslub": ("mslub", 3, "FLAIR"),
    "healthy_t1_bids": ("bids", 21, "T1"),
    "lgg_kaggle_3m": ("lgg", 4, "FLAIR"),
    "png2d": ("classes", 24, "FLAIR"),
    "dicom_sag_t1": ("dicom", 1, "T1"),
    "dicom_axial_pd": ("dicom", 1, "PD"),
    "dicom_enhanced": ("dicom", 1, "T1"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no scans in ../shared/data")
@pytest.mark.parametrize("name", SEEN)
def test_real_folders_are_understood_without_options(name):
    dataset, wanted = datasets.with_modalities(datasets.find_subjects(SHARED / name))
    assert (dataset.layout, len(dataset.subjects), *wanted) == SEEN[name]
    assert not any("left alone" in note for note in dataset.notes)


@pytest.mark.skipif(not SHARED.is_dir(), reason="there are no scans in ../shared/data")
def test_real_stacks_are_read_whole_with_their_masks():
    for subject in datasets.find_subjects(SHARED / "lgg_kaggle_3m").subjects:
        scan, lesion = datasets.read_modality(subject, "FLAIR"), datasets.read_lesion(subject)
        files = len(list(subject.scans["FLAIR"].glob("*[0-9].tif")))
        assert scan.voxels.shape == lesion.voxels.shape == (256, 256, files)
        assert volumes.same_grid(scan.voxels.shape, scan.affine, lesion.voxels.shape, lesion.affine)
        inside = scan.voxels[lesion.voxels > 0]
        assert inside.mean() > 1.1 * np.median(scan.voxels[scan.voxels > 20])
