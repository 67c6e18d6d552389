"""DICOM series: geometry as an independent converter sees it, values as the headers mean them, refusals by name."""

import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import dicom2nifti
import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from lib import datasets, dicom, layouts
from lib.errors import CourseError

REAL = Path(__file__).parents[2] / "shared" / "data"
PLANES = {
    "axial": (1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": (0.9, 0.1, 0.42, -0.2, 0.97, 0.19),
}
MEANT = np.arange(5 * 7 * 4, dtype=np.float32).reshape(5, 7, 4) * 3 % 251  # column, row, slice
NUMBER = count()


def header(pixels, **values):
    """A grey image with what is given."""
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.file_meta.MediaStorageSOPClassUID = result.SOPClassUID = MRImageStorage
    result.SOPInstanceUID = generate_uid()
    result.Rows, result.Columns = pixels.shape[-2:]
    result.BitsAllocated = result.BitsStored = 16
    result.HighBit, result.PixelRepresentation, result.SamplesPerPixel = 15, 0, 1
    result.PhotometricInterpretation = "MONOCHROME2"
    result.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in values.items():
        setattr(result, name, value)
    return result


def write(folder, images):
    """Files in an order that is not that of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save_as(folder / f"{i * 7 % 11:02d}_{next(NUMBER)}.dcm", enforce_file_format=True)
    return folder


def directions(plane):
    """Unit vectors along a row, along a column and across."""
    along = np.array(PLANES[plane], float).reshape(2, 3)
    row = along[0] / np.linalg.norm(along[0])
    column = along[1] - (along[1] @ row) * row
    column /= np.linalg.norm(column)
    return row, column, np.cross(row, column)


def series(plane="axial", gaps=(2.0, 2.0, 2.0), **values):
    """MEANT as four slices of 1.5 × 0.8 mm pixels."""
    row, column, across = directions(plane)
    about = {"SeriesInstanceUID": "1.2.3", "PixelSpacing": [0.8, 1.5], "Modality": "MR"} | values
    for k, height in enumerate(np.cumsum([0.0, *gaps])):
        place = np.array([-10.0, 20.0, -30.0]) + height * across
        about |= {"ImageOrientationPatient": [*row, *column], "ImagePositionPatient": place.tolist()}
        yield header(MEANT[:, :, k].T, **about)


def refused(call, *arguments):
    with pytest.raises(CourseError) as caught:
        call(*arguments)
    assert caught.value.cure.strip()
    return caught.value.what


@pytest.mark.parametrize("plane", PLANES)
def test_each_voxel_lies_where_its_header_says(tmp_path, plane):
    volume = dicom.read(write(tmp_path, series(plane)))
    np.testing.assert_array_equal(volume.voxels, MEANT)
    row, column, across = directions(plane)
    lps = np.array([-10, 20, -30]) + 4 * 1.5 * row + 6 * 0.8 * column + 3 * 2.0 * across
    np.testing.assert_allclose(volume.affine @ [4, 6, 3, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-4)
    np.testing.assert_allclose(volume.voxel_mm, [1.5, 0.8, 2.0], atol=1e-4)


def test_a_tilted_gantry_s_slices_are_sheared(tmp_path):
    images = list(series())
    for k, image in enumerate(images):
        image.ImagePositionPatient = [0.0, 0.5 * k, 2.0 * k]
    affine = dicom.read(write(tmp_path, images)).affine
    np.testing.assert_allclose(affine[:3, 2], [0, -0.5, 2], atol=1e-6)


def test_values_are_rescaled_slice_by_slice_and_film_is_turned(tmp_path):
    images = list(series(BitsStored=8, HighBit=7))
    for k, image in enumerate(images):
        image.RescaleSlope, image.RescaleIntercept = 2 + k, -1000
    np.testing.assert_array_equal(dicom.read(write(tmp_path / "a", images)).voxels, MEANT * (2 + np.arange(4)) - 1000)
    film = series(PhotometricInterpretation="MONOCHROME1", BitsStored=8, HighBit=7)
    np.testing.assert_array_equal(dicom.read(write(tmp_path / "b", film)).voxels, 255 - MEANT)


def test_uneven_gaps_are_interpolated_and_said(tmp_path):
    images = list(series(gaps=(2.0, 2.0, 2.6)))
    for k, image in enumerate(images):
        image.PixelData = np.full((7, 5), 100 * (0, 2.0, 4.0, 6.6)[k] + (0, 0, 1, 0)[k], np.uint16).tobytes()
    found = dicom.find_series(write(tmp_path, images))[0]
    volume = dicom.volume(found)
    np.testing.assert_allclose(volume.voxels[0, 0], [0, 220, 440, 660], atol=1)
    assert volume.voxel_mm[2] == pytest.approx(2.2)
    assert "vary from 2.00 to 2.60 mm" in found.notes[0]


def multi_frame(shared=(), **values):
    """MEANT as one enhanced image, its geometry in functional groups."""
    row, column, across = directions("oblique")
    image = header(MEANT.transpose(2, 1, 0), NumberOfFrames=4, SeriesInstanceUID="1.2.4", **values)
    image.PerFrameFunctionalGroupsSequence = Sequence([])
    image.SharedFunctionalGroupsSequence = Sequence([group(
        PixelMeasuresSequence={"PixelSpacing": [0.8, 1.5]},
        PlaneOrientationSequence={"ImageOrientationPatient": [*row, *column]},
        PixelValueTransformationSequence={"RescaleSlope": 2, "RescaleIntercept": -1},
        MRTimingAndRelatedParametersSequence={"RepetitionTime": 2000},
    )])  # fmt: skip
    for k in range(4):
        place = ([-10, 20, -30] + 2.0 * k * across).tolist()
        own = group(PlanePositionSequence={"ImagePositionPatient": place}, MREchoSequence={"EffectiveEchoTime": 90})
        image.PerFrameFunctionalGroupsSequence.append(own)
    return image


def group(**sequences):
    result = Dataset()
    for name, values in sequences.items():
        inner = Dataset()
        for keyword, value in values.items():
            setattr(inner, keyword, value)
        setattr(result, name, Sequence([inner]))
    return result


def test_enhanced_images_keep_their_geometry_in_groups(tmp_path):
    volume = dicom.read(write(tmp_path / "one", [multi_frame()]))
    plain = dicom.read(write(tmp_path / "many", series("oblique")))
    np.testing.assert_array_equal(volume.voxels, 2 * plain.voxels - 1)
    np.testing.assert_allclose(volume.affine, plain.affine, atol=1e-4)


def test_facts_are_kept_and_nothing_that_names_a_person(tmp_path):
    secret = {
        "PatientName": "Doe^Jane",
        "PatientID": "4711",
        "PatientBirthDate": "19700101",
        "InstitutionName": "Xclinic",
    }
    timing = {"RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500, "MagneticFieldStrength": 3}
    found = dicom.find_series(write(tmp_path, series(**secret, **timing)))[0]
    assert found.facts == {
        "modality": "MR", "repetition_ms": 9000.0, "echo_ms": 120.0, "inversion_ms": 2500.0, "tesla": 3.0
    }  # fmt: skip
    assert not [word for word in [*secret.values(), "1.2.3"] if word in str((found.facts, found.notes))]


@pytest.mark.parametrize(
    ("times", "modality"),
    [((9000, 120, 2500), "FLAIR"), ((4000, 90, None), "T2"), ((2000, 2.5, 900), "T1"), ((500, 12, None), "T1"),
     ((2300, 22, None), "PD"), ((None, 22, None), None)],
)  # fmt: skip
def test_the_times_of_a_scan_tell_its_modality(times, modality):
    facts = {"modality": "MR"} | dict(zip(("repetition_ms", "echo_ms", "inversion_ms"), times, strict=True))
    assert dicom.weighting(facts) == modality
    assert dicom.weighting({"modality": "CT"}) == "CT"


def test_series_in_one_folder_are_told_apart(tmp_path):
    write(tmp_path, series())
    write(tmp_path, list(series("sagittal", SeriesInstanceUID="9.9"))[:3])
    (tmp_path / "LICENSE").write_text("of the scans")
    assert [len(found.frames) for found in dicom.find_series(tmp_path)] == [4, 3]
    assert "2 series: 4 slices, 3 slices" in refused(dicom.read, tmp_path)


def smaller(images):
    images[1].Rows, images[1].PixelData = 6, images[1].PixelData[: 6 * 5 * 2]


def turned(images):
    images[1].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def without_image(images):
    del images[1].Rows, images[1].PixelData


def coloured(images):
    images[1].PhotometricInterpretation = "RGB"


def short(images):
    images[1].PixelData = images[1].PixelData[:20]


BROKEN = {
    "a missing slice": (
        lambda images: images.pop(1),
        "1 of the slices is missing: a gap of 4.0 mm where others are 2.0 mm",
    ),
    "a doubled slice": (lambda images: images.append(list(series())[2]), "lie in one place"),
    "another size": (smaller, "differs in size"),
    "another orientation": (turned, "differs in orientation"),
    "no image": (without_image, "holds no image"),
    "colour": (coloured, "is in colour"),
    "too few pixels": (short, "cannot be decoded"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_series_is_refused_by_name(tmp_path, kind):
    harm, said = BROKEN[kind]
    images = list(series(gaps=(2.0,) * 3))
    harm(images)
    what = refused(dicom.read, write(tmp_path, images))
    assert said in what
    assert ".dcm" in what


def test_a_file_that_is_no_dicom_is_named(tmp_path):
    write(tmp_path, series())
    (tmp_path / "x.dcm").write_bytes(b"not at all")
    assert "x.dcm is damaged" in refused(dicom.read, tmp_path)
    assert "holds no DICOM image" in refused(dicom.find_series, tmp_path.parent)


def test_folders_of_series_are_a_layout(tmp_path):
    write(tmp_path / "p1" / "FLAIR", series())
    write(tmp_path / "p1" / "T1wCE", series("sagittal"))
    write(tmp_path / "p2" / "scan 7", series(RepetitionTime=500, EchoTime=10))
    dataset = datasets.find_subjects(tmp_path)
    assert dataset.layout == "dicom"
    assert {s.id: set(s.scans) for s in dataset.subjects} == {"p1": {"FLAIR", "T1ce"}, "p2": {"T1"}}
    np.testing.assert_array_equal(datasets.read_scan(dataset.subjects[0].scans["FLAIR"]).voxels, MEANT)


def converted(folder, place):
    """What dcm2niix makes of a series, in RAS+."""
    tool = Path(sys.executable).with_name("dcm2niix")
    subprocess.run([tool, "-b", "n", "-z", "n", "-o", place, folder], check=True, capture_output=True)
    return nibabel.as_closest_canonical(nibabel.load(next(place.glob("*.nii"))))


CONVERTED = ["dicom_sag_t1", "dicom_axial_pd", "MR2_J2KI.dcm", "emri_small.dcm", "emri_small_big_endian.dcm"]
CONVERTED += ["emri_small_RLE.dcm", "emri_small_jpeg_2k_lossless.dcm", "emri_small_jpeg_ls_lossless.dcm"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
@pytest.mark.parametrize("name", CONVERTED)
def test_real_series_are_what_another_converter_makes_of_them(tmp_path, name):
    folder = REAL / name
    if name.endswith(".dcm"):
        folder = tmp_path / "one"
        folder.mkdir()
        shutil.copy(REAL / "dicom_enhanced" / name, folder)
    (tmp_path / "out").mkdir()
    theirs = converted(folder, tmp_path / "out")
    volume = dicom.read(folder)
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.voxels, volume.affine))
    assert ours.shape == theirs.shape
    if name == "dicom_axial_pd":  # its positions are rounded to .1 mm; the other takes its step from the first two
        np.testing.assert_allclose(volume.voxel_mm[2], 7.0, atol=1e-3)
        np.testing.assert_allclose(ours.affine[:, :2], theirs.affine[:, :2], atol=1e-3)
    else:
        np.testing.assert_allclose(ours.header.get_zooms(), theirs.header.get_zooms(), atol=1e-3)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)
    if volume.oriented:
        np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), atol=1e-3)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
@pytest.mark.parametrize("name", ["dicom_sag_t1", "dicom_axial_pd"])
def test_real_series_are_what_a_second_converter_makes_of_them_to_the_last_axis(tmp_path, name):
    dicom2nifti.dicom_series_to_nifti(REAL / name, tmp_path / "theirs.nii", reorient_nifti=False)
    theirs = nibabel.as_closest_canonical(nibabel.load(tmp_path / "theirs.nii"))
    volume = dicom.read(REAL / name)
    ours = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.voxels, volume.affine))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-3)
    np.testing.assert_allclose(ours.get_fdata(), theirs.get_fdata(), atol=1e-3)


def test_ct_is_in_hounsfield_units(tmp_path):
    folder = write(tmp_path, series(Modality="CT", RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU"))
    np.testing.assert_array_equal(dicom.read(folder).voxels, 2 * MEANT - 1024)
    assert datasets.acquisition(folder) == {"modality": "CT"}


HARMED = {
    "ImagePositionPatient": b"Doe\\Jane\\x ",
    "PixelSpacing": b"Doe ",
    "RescaleSlope": b"Doe^Jane",
    "NumberOfFrames": b"Doe ",
}


@pytest.mark.parametrize("keyword", HARMED)
def test_a_header_s_damaged_value_is_refused_and_not_quoted(tmp_path, keyword, recwarn):
    folder = write(tmp_path, series(ImagePositionPatient=[0, 0, 0], RescaleSlope=1, NumberOfFrames=1))
    path = sorted(folder.iterdir())[0]
    image = pydicom.dcmread(path)
    image[keyword] = RawDataElement(Tag(keyword), image[keyword].VR, 8, HARMED[keyword], 0, False, True)
    image.save_as(path)
    what = refused(dicom.read, folder)
    assert path.name in what
    assert "Doe" not in what + "".join(str(one.message) for one in recwarn)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("Manufacturer", "Doe GmbH"), ("Modality", "JD"), ("EchoTime", "19530217"), ("EchoTime", None)],
)
def test_free_text_in_a_fact_is_left_out(tmp_path, keyword, value):
    folder = write(tmp_path, series(**{"EchoTime": 90, keyword: value}))
    assert datasets.acquisition(folder).keys() <= {"modality", "echo_ms"}
    assert str(value) not in str(datasets.acquisition(folder))


def rsna(folder, *subjects):
    folder.mkdir()
    (folder / "train_labels.csv").write_text("BraTS21ID,MGMT_value\n" + "".join(f"{s},1\n" for s in subjects))
    for number, subject in enumerate(subjects):
        for k, name in enumerate(("FLAIR", "T1w", "T1wCE", "T2w")):
            uid = f"1.2.{number}.{k}"
            write(folder / "train" / subject / name, series(SeriesInstanceUID=uid, PatientID=subject))
    return folder


@pytest.mark.parametrize("below", ["", "train"])
def test_the_label_of_rsna_miccai_is_not_health(tmp_path, below):
    folder = rsna(tmp_path / "rsna", "00000", "00123")
    dataset = datasets.find_subjects(folder / below)
    assert dataset.layout == "rsna_miccai"
    assert {s.id: (set(s.scans), s.healthy) for s in dataset.subjects} == {
        s: ({"FLAIR", "T1", "T1ce", "T2"}, False) for s in ("00000", "00123")
    }
    assert dataset.notes[-1] == layouts.MGMT
    assert "known to be healthy 0" in dataset.notes[0]


def test_folders_of_numbers_without_its_table_are_not_rsna_miccai(tmp_path):
    folder = rsna(tmp_path / "rsna", "00000")
    (folder / "train_labels.csv").unlink()
    dataset = datasets.find_subjects(folder)
    assert dataset.layout == "dicom"
    assert [s.id for s in dataset.subjects] == ["subject-001"]


def test_masks_in_nifti_belong_to_the_series_of_their_folder(tmp_path):
    write(tmp_path / "p1" / "FLAIR", series())
    write(tmp_path / "p2" / "some scan", series(RepetitionTime=500, EchoTime=10))
    for name in ("p1/p1_seg.nii.gz", "p2/masks/lesion.nii", "p2/atlas.nii.gz", "seg.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    dataset = datasets.find_subjects(tmp_path)
    assert {s.id: s.lesion_mask.name for s in dataset.subjects} == {"p1": "p1_seg.nii.gz", "p2": "lesion.nii"}
    assert dataset.notes[-1] == "Not understood and left alone: p2/atlas.nii.gz, seg.nii.gz."


def test_a_series_right_in_the_folder_is_named_after_it(tmp_path):
    write(tmp_path / "p9" / "FLAIR", series())
    assert [s.id for s in datasets.find_subjects(tmp_path / "p9").subjects] == ["p9"]


def of_the_other(folder, place):
    """The exit status of dcm2niix, and the shapes of what it wrote."""
    place.mkdir()
    tool = Path(sys.executable).with_name("dcm2niix")
    done = subprocess.run([tool, "-b", "n", "-z", "n", "-o", place, folder], capture_output=True)
    return done.returncode, sorted(nibabel.load(path).shape for path in place.glob("*.nii"))


def wide():
    """A series of ten slices of 16 × 16 pixels: the other converter takes no smaller ones for a volume."""
    about = {"SeriesInstanceUID": "1.2.3", "PixelSpacing": [1, 1], "Modality": "MR", "SeriesNumber": 1}
    about["ImageOrientationPatient"] = list(PLANES["axial"])
    for k in range(10):
        place = {"ImagePositionPatient": [0, 0, 2 * k], "InstanceNumber": k + 1}
        yield header(np.arange(256).reshape(16, 16) + 10 * k, **about, **place)


def lost(files):
    files[len(files) // 2].unlink()


def doubled(files):
    again = pydicom.dcmread(files[4])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    again.InstanceNumber = 500
    again.save_as(files[4].with_name("again.dcm"))


def mixed(files):
    for path in files[len(files) // 2 :]:
        image = pydicom.dcmread(path)
        image.ImageOrientationPatient = list(PLANES["sagittal" if len(files) == 10 else "axial"])
        image.save_as(path)


# What dcm2niix v1.0.20260724 made of each: a stack as if nothing were amiss, with a warning among its lines. Of the
# small series it says by its exit status 1 that slices are not equidistant; of the real one it says 0.
OTHER = {
    "lost": (lost, "1 of the slices is missing", (1, [(16, 16, 9)]), (0, [(256, 256, 191), (256, 256, 193)])),
    "doubled": (doubled, "lie in one place", (1, [(16, 16, 11)]), (0, [(256, 256, 193), (256, 256, 193)])),
    "mixed": (mixed, "differs in orientation", (1, [(16, 16, 5)] * 2), (0, [(96, 256, 256), (256, 256, 96)])),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_refused_another_converter_makes_a_volume_of(tmp_path, kind):
    harm, said, theirs, _ = OTHER[kind]
    harm(sorted(write(tmp_path / "scan", wide()).iterdir()))
    assert of_the_other(tmp_path / "scan", tmp_path / "out") == theirs
    assert said in refused(dicom.read, tmp_path / "scan")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
@pytest.mark.parametrize("kind", OTHER)
def test_what_is_refused_of_a_real_series_another_converter_passes(tmp_path, kind):
    harm, said, _, theirs = OTHER[kind]
    shutil.copytree(REAL / "dicom_sag_t1", tmp_path / "scan")
    harm(sorted((tmp_path / "scan").glob("*.dcm")))
    assert of_the_other(tmp_path / "scan", tmp_path / "out") == theirs
    what = refused(dicom.read, tmp_path / "scan")
    assert said in what
    assert ".dcm" in what
    assert "1.3.12" not in what  # the unique identifiers that these files are named by
