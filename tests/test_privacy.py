"""Nothing of a header that leads to a person is written: planted values are looked for in every byte of a whole run."""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from conftest import simulate
from nibabel.nifti1 import Nifti1Extension
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from lib import cohort, datasets, dicom, evaluation, examination, intake, preparation, privacy, report, scoring
from lib.errors import CourseError
from lib.preprocessing import Recipe

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
FAMILIES = ("Qzvorn", "Wujkowic", "Xyphos", "Bzhezin", "Kvetlof")
TEXTS = {
    "PatientName": "{0}^Jan{0}",
    "PatientID": "ID-{0}-0815",
    "OtherPatientIDs": "OTHER{0}",
    "PatientAddress": "{0}weg",
    "PatientBirthDate": "1953021{1}",
    "PatientComments": "he is {0}",
    "InstitutionName": "Clinic of {0}",
    "InstitutionAddress": "Hospitalroad{1}41",
    "ReferringPhysicianName": "Refphysi{1}^Olavqwert",
    "PerformingPhysicianName": "Perphysi{1}^Adamqwert",
    "OperatorsName": "Operbert{1}^Evelqwert",
    "StationName": "STATQ778{1}",
    "DeviceSerialNumber": "SERQ55122{1}",
    "SoftwareVersions": "softkwyj{1}",
    "AccessionNumber": "ACCQ99887{1}",
    "StudyID": "STUDYQ{1}4",
    "StudyDate": "2019042{1}",
    "StudyTime": "11223{1}.445566",
    "SeriesDate": "2019052{1}",
    "AcquisitionDate": "2019062{1}",
    "AcquisitionDateTime": "2019072{1}101112.131415",
    "StudyDescription": "head of {0}",
    "SeriesDescription": "tumour of {0}",
    "ImageComments": "kwyjibo{1}comment",
    "ProtocolName": "protkwyj{1}",
    "Manufacturer": "SIEMENS of Clinic {0}",
}
HARMLESS = {"SIEMENS", "BRAIN"}
TIMES = {"Modality": "MR", "RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500, "MagneticFieldStrength": 3}


def texts(number):
    """The planted values of a person, by keyword."""
    return {name: text.format(FAMILIES[number], number) for name, text in TEXTS.items()}


def image(pixels, number, position, uids, **values):
    """A slice whose header carries every planted value."""
    result = Dataset()
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    result.file_meta.MediaStorageSOPClassUID = result.SOPClassUID = MRImageStorage
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID = generate_uid()
    for name, value in (TIMES | texts(number) | uids | values).items():
        setattr(result, name, value)
    request = Dataset()
    request.RequestedProcedureDescription = f"asked by {FAMILIES[number]}"
    result.RequestAttributesSequence = [request]
    private = result.private_block(0x0029, "PLANTED HEADER", create=True)
    private.add_new(0x01, "LO", f"privkwyj{number}")
    private.add_new(0x02, "OB", f"binakwyj{number}".encode())
    result.add_new(0x60003000, "OW", f"overlaykwyj{number}".encode().ljust(16))
    result.add_new(0x60004000, "LT", f"overcomment{number}")
    result.Rows, result.Columns = pixels.shape
    result.BitsAllocated = result.BitsStored = 16
    result.HighBit, result.PixelRepresentation, result.SamplesPerPixel = 15, 0, 1
    result.PhotometricInterpretation = "MONOCHROME2"
    result.PixelSpacing, result.ImageOrientationPatient = [5, 5], [1, 0, 0, 0, 1, 0]
    result.ImagePositionPatient = position
    result.PixelData = pixels.astype(np.uint16).tobytes()
    return result


def write_series(folder, number, *, named=False, without=None):
    """A person's brain as a series; `named`: files named by their unique identifiers; returns the planted values."""
    voxels = simulate(number)[0]["FLAIR"][:, ::-1]
    uids = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
    }
    folder.mkdir(parents=True)
    planted = {*texts(number).values(), *uids.values()}
    planted |= {f"{word}{number}" for word in ("privkwyj", "binakwyj", "overlaykwyj", "overcomment")}
    for k in range(voxels.shape[2]):
        if k != without:
            one = image(voxels[:, :, k].T, number, [0, 0, 5 * k], uids)
            planted.add(one.SOPInstanceUID)
            one.save_as(folder / f"{one.SOPInstanceUID if named else k:>03}.dcm", enforce_file_format=True)
    return planted | {FAMILIES[number]}


def write_mask(path, number):
    """The lesion of a series, as a converter would lay it: rows turned, and a header that says too much."""
    lesion = nibabel.Nifti1Image(
        simulate(number)[1], np.diag([-5.0, -5.0, 5.0, 1.0]) @ turned(simulate(number)[1].shape)
    )
    return plant(path, lesion, number)


def turned(shape):
    """The grid of a series whose second axis runs from front to back."""
    result = np.diag([1.0, -1.0, 1.0, 1.0])
    result[1, 3] = shape[1] - 1
    return result


def plant(path, picture, number):
    """Write NIfTI with planted texts in the header's free fields and an extension; returns them."""
    words = {name: f"{name[:3]}kwyj{number}{FAMILIES[number]}" for name in ("descrip", "aux_file", "db_name")}
    for name, word in words.items():
        picture.header[name] = word
    picture.header.extensions.append(Nifti1Extension("comment", f"extkwyj{number}".encode()))
    nibabel.save(picture, path)
    return {*words.values(), f"extkwyj{number}"}


def write_nifti(folder, number):
    """A healthy person in NIfTI with a sidecar that says too much; returns the planted values."""
    folder.mkdir(parents=True)
    images, _, affine = simulate(number, radius_mm=0)
    path = folder / f"{folder.name}_flair.nii.gz"
    planted = plant(path, nibabel.Nifti1Image(images["FLAIR"], affine), number)
    said = texts(number) | {"RepetitionTime": 9, "EchoTime": 0.12, "InversionTime": 2.5, "MagneticFieldStrength": 3}
    said |= {"SeriesInstanceUID": generate_uid(), "dcmmeta": {"PatientName": FAMILIES[number]}}
    path.with_name(f"{folder.name}_flair.json").write_text(json.dumps(said))
    return planted | {*texts(number).values(), said["SeriesInstanceUID"], FAMILIES[number]}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """`ill`: DICOM patients in folders named by name, by identifier, by number and neutrally, two of them broken;
    `well`: NIfTI; and what was planted in them."""
    folder = tmp_path_factory.mktemp("scans")
    uid = generate_uid()
    places = {
        0: f"{FAMILIES[0]}_Jan{FAMILIES[0]}",
        1: uid,
        2: "p2",
        3: f"id-{FAMILIES[3]}-0815",
        4: f"jan{FAMILIES[4]}",
    }
    planted = {uid}
    for number, place in places.items():
        lacking = 9 if number == 3 else None
        planted |= write_series(folder / "ill" / place / "FLAIR", number, named=number != 2, without=lacking)
        planted |= write_mask(folder / "ill" / place / f"{place}_seg.nii.gz", number)
    broken = folder / "ill" / places[4] / f"{places[4]}_seg.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-50])
    for number in range(3):
        planted |= write_nifti(folder / "well" / f"h{number}", number)
    return folder, {part for value in planted for part in value.split("^")}


def contents(path):
    """A file's bytes, and those of what is packed in it."""
    raw = path.read_bytes()
    yield raw
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as packed:
            yield from (packed.read(name) for name in packed.namelist())
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)


def readable(path):
    """The runs of 5 and more letters in a file, in small ones: as they stand, and as letters of two or four bytes."""
    blobs = (blob for packed in contents(path) for blob in (packed, packed.replace(b"\0", b"")))
    return b"\n".join(run for blob in blobs for run in re.findall(rb"[ -~]{5,}", blob)).lower()


def found(folder, values, least=1):
    """Which of the values (5 letters or more) stand in a file or a name below a folder, with the file's name."""
    assert min(map(len, values)) >= 5
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= least
    for path in files:
        name = path.relative_to(folder).as_posix()
        text = readable(path) + b"\n" + name.casefold().encode()
        yield from ((value, name) for value in values if value.casefold().encode() in text)


def test_what_is_looked_for_would_be_found(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.array(["secretname"]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"of SecretName"))
    (tmp_path / "secretname.txt").touch()
    (tmp_path / "c.json").write_text(json.dumps("nothing"))
    (tmp_path / "d").write_bytes(b"\xff\xfe" + "of SecretName".encode("utf-16-le"))
    assert {file for _, file in found(tmp_path, {"secretname"})} == {"a.npz", "b.gz", "d", "secretname.txt"}


@pytest.fixture(scope="module")
def tree(scans, tmp_path_factory):
    """A copy of the course that has prepared the scans, and what it said."""
    tree = tmp_path_factory.mktemp("tree") / "course"
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = [
        "--profile",
        "tiny",
        "--device",
        "cpu",
        "--only",
        "01",
        "--run",
        "one",
        "--skip-broken",
        "-p",
        "01.size=48",
        "-p",
        "01.pixel_mm=4",
    ]
    call = [sys.executable, "-m", "lib.course", "--data", scans[0] / "ill", "--healthy", scans[0] / "well", *options]
    done = subprocess.run(call, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tree / "reports" / "said.txt").write_text(done.stdout + done.stderr)
    return tree


def test_a_run_writes_nothing_that_leads_to_a_person(scans, tree, monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lib" and hasattr(module, "ROOT"):
            monkeypatch.setattr(module, "ROOT", tree)
    prepared = cohort.of_run("one")
    scoring.run_detector("ae", prepared, "one", epochs=1, width=8, device="cpu")
    scoring.run_detector("intensity", prepared, "one")
    evaluation.evaluate("one", prepared)
    report.write(tree / "reports" / "one")
    written = {path.suffix for path in (tree / "reports").rglob("*")}
    assert written >= {".ipynb", ".html", ".npz", ".safetensors", ".csv", ".json", ".log"}
    assert set(found(tree / "data", scans[1], 20)) == set()
    assert set(found(tree / "reports", scans[1], 20)) == set()


def test_the_run_s_subjects_keep_what_the_scanner_did_and_go_by_neutral_names(tree):
    said = json.loads((tree / "reports" / "one" / "cohort.json").read_text())
    subjects = {s["id"]: s for s in json.loads((tree / said["path"] / "manifest.json").read_text())["subjects"]}
    assert subjects.keys() == {"h0", "h1", "h2", "p2", "subject-001", "subject-002"}
    facts = {"vendor": "Siemens", "tesla": 3, "repetition_ms": 9000, "echo_ms": 120, "inversion_ms": 2500}
    assert subjects["p2"]["acquisition"]["FLAIR"] == {"modality": "MR", **facts}
    assert subjects["h0"]["acquisition"]["FLAIR"] == facts
    assert {one["subject"] for one in said["left_out"]} == {"subject-003", "subject-004"}
    assert "1 of the slices is missing" in str(said["left_out"])
    assert any("they are called subject-001 to subject-004" in note for note in said["notes"])
    assert any("3 DICOM series of 27 slices over 135 mm" in note for note in said["notes"])


def test_refusals_name_no_person(scans, course_root):
    with pytest.raises(CourseError) as caught:
        intake.gather(str(scans[0] / "ill"), size=48, pixel_mm=4)
    said = str(caught.value).casefold()
    assert "subject-003: " in said
    assert "subject-004: " in said
    assert [value for value in scans[1] if value.casefold() in said] == []


def test_tables_may_name_subjects_by_their_folders(scans, tmp_path):
    ill = tmp_path / "ill"
    shutil.copytree(scans[0] / "ill", ill)
    names = sorted(place.name for place in ill.iterdir())
    rows = [f"{name}\t{i % 2}\tsite {i}" for i, name in enumerate(names)]
    (ill / "participants.tsv").write_text("\n".join(["participant_id\thealthy\tsite", *rows]))
    dataset = datasets.find_subjects(ill)
    assert {s.site: s.healthy for s in dataset.subjects} == {f"site {i}": bool(i % 2) for i in range(5)}
    (tmp_path / "splits.csv").write_text("\n".join(["subject,split", f"{names[0]},test", "p2,train"]))
    said = datasets.read_splits(tmp_path / "splits.csv", {s.id for s in dataset.subjects}, dataset.called)
    assert said == {"subject-001": "test", "p2": "train"}


PERSON = {"PatientName": "M\u00fcller-L\u00fcd^Anna Maria", "PatientID": "4711", "PatientBirthDate": "19530217"}


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("smith", False), ("M\u00dcLLER", True), ("anna", True), ("annamaria_mullerlud", True), ("ID4711", True),
        ("4711", True), ("scan_19530217", True), ("1.2.840.113619.2.5.1762583153", True),
        ("2.25.329800735698586629", True), ("subject_12", False), ("FLAIR", False), ("v1.2.3", False), ("lud", True),
    ],
)  # fmt: skip
def test_names_that_lead_to_a_person_are_known_by_its_header(name, leading):
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in PERSON.items():
        setattr(header, keyword, value)
    known = privacy.identifiers(header)
    assert privacy.leads(name, known) == leading


def identifying(folder):
    """Every text of 5 letters or more in the headers of a folder that is neither a code nor a number: of all files the
    unique identifiers, of the first also the texts, in private elements those that stand among other bytes."""
    files = sorted(folder.glob("*.dcm"))
    for path in files:
        texts = (
            ("UI",) if path != files[0] else ("UI", "PN", "LO", "SH", "LT", "ST", "UT", "DA", "TM", "DT", "UC", "AE")
        )
        for element in pydicom.dcmread(path, stop_before_pixels=True).iterall():
            if element.VR in texts:
                several = element.value if element.VM > 1 else [element.value]
                yield from (str(one).strip() for one in several)
            elif path == files[0] and element.tag.is_private and isinstance(element.value, bytes):
                yield from (run.decode().strip() for run in re.findall(rb"[A-Za-z0-9^._-]{8,64}", element.value))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
@pytest.mark.parametrize("name", ["dicom_sag_t1", "dicom_axial_pd"])
def test_real_headers_leave_no_trace(name, tmp_path, course_root, monkeypatch):
    place = tmp_path / "data" / "p0" / "T1"
    shutil.copytree(REAL / name, place)
    values = {value for value in identifying(place) if len(value) >= 5} - HARMLESS
    assert len(values) > 20
    monkeypatch.setattr(examination, "BRAIN_LITRES", (0, 100))
    recipe = Recipe(("T1",), pixel_mm=4.0, slice_mm=8.0, size=96)
    prepared = preparation.prepare_scan({"T1": place}, recipe)
    assert prepared.facts["acquisition"]["T1"]["vendor"] in ("Siemens", "GE")
    found_in = datasets.find_subjects(tmp_path / "data")
    messages = [*found_in.notes, *map(str, found_in.subjects[0].scans), str(prepared.facts)]
    files = sorted(place.glob("*.dcm"))
    harms = [
        lambda: files[0].write_bytes(files[0].read_bytes()[:700]),
        lambda: shutil.copy(files[1], place / f"x{files[1].name}"),
        lambda: files[len(files) // 2].unlink(),
    ]
    for harm in harms:
        harm()
        with pytest.raises(CourseError) as caught:
            dicom.read(place)
        messages.append(str(caught.value))
    (course_root / "messages").write_text("\n".join(messages))
    assert set(found(course_root, values, 5)) == set()
