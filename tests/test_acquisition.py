"""What the scanner did: by white list from headers and sidecars, through the examination into the cohort."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib import acquisition, cohort, datasets, intake, preparation
from lib.errors import CourseError
from lib.preprocessing import Recipe

SIDECAR = {
    "Modality": "MR", "Manufacturer": "GE MEDICAL SYSTEMS", "MagneticFieldStrength": 3, "RepetitionTime": 2.3,
    "EchoTime": 0.00298, "InversionTime": 0.9, "SliceThickness": 1.2, "PatientName": "Doe^Jane",
    "InstitutionName": "Xclinic", "SeriesDescription": "T1 of Jane", "ImageType": ["ORIGINAL"], "global": {"x": "Doe"},
}  # fmt: skip
FACTS = {
    "modality": "MR", "vendor": "GE", "tesla": 3, "repetition_ms": 2300, "echo_ms": 2.98, "inversion_ms": 900,
    "thickness_mm": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["x_t1.nii.gz", "x_t1.nii", "x_t1.NII.GZ"])
def test_a_sidecar_s_facts_are_kept_by_white_list_in_milliseconds(tmp_path, name):
    assert datasets.acquisition(tmp_path / name) == {}
    (tmp_path / "x_t1.json").write_text(json.dumps(SIDECAR))
    assert datasets.acquisition(tmp_path / name) == FACTS


def test_a_sidecar_says_what_it_was_given():
    assert acquisition.to_sidecar(FACTS) == {
        **{name: SIDECAR[name] for name in list(SIDECAR)[2:7]}, "Modality": "MR", "Manufacturer": "GE"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("said", "vendor"),
    [
        ("SIEMENS", "Siemens"), ("Siemens Healthineers", "Siemens"), ("GE", "GE"), ("Philips Healthcare", "Philips"),
        ("TOSHIBA_MEC", "Canon"), ("CANON_MEC", "Canon"), ("UIH", "United Imaging"), ("Hitachi, Ltd.", "Hitachi"),
        ("FUJIFILM Corporation", "Fujifilm"), ("Bruker BioSpin MRI GmbH", "Bruker"), ("George Doe", None),
        ("Siemensstrasse 4", None), ("", None), (None, None), (["GE"], "GE"),
    ],
)  # fmt: skip
def test_vendors_are_known_ones_alone(said, vendor):
    assert acquisition.known({"vendor": said}).get("vendor") == vendor


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=2)


@given(st.dictionaries(st.sampled_from([*FACTS, "name"]), ANYTHING))
def test_whatever_is_said_only_plausible_facts_stay(said):
    for name, value in acquisition.known(said).items():
        if name in acquisition.PLAUSIBLE:
            least, most = acquisition.PLAUSIBLE[name]
            assert least <= value <= most
        else:
            assert value in (*acquisition.KINDS, *acquisition.VENDORS)


@given(st.dictionaries(st.sampled_from(list(SIDECAR)), ANYTHING))
def test_any_object_in_json_is_read(tmp_path_factory, said):
    path = tmp_path_factory.mktemp("any") / "x.json"
    path.write_text(json.dumps(said))
    assert acquisition.of_sidecar(path).keys() <= FACTS.keys()


BROKEN = {"empty": b"", "half": b'{"EchoTime": 0.1', "a list": b"[1]", "binary": b"\xff\xfe\x00", "deep": b"[" * 99_999}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_sidecar_is_named_in_the_examination(brats, course_root, kind):
    folder = brats()
    (folder / "p1" / "p1_flair.json").write_bytes(BROKEN[kind])
    with pytest.raises(CourseError, match=r"p1_flair\.json is no BIDS sidecar") as caught:
        intake.gather(str(folder), size=48, pixel_mm=4)
    assert "1 of 4 subjects" in caught.value.what
    assert "out of the folder" in caught.value.what


def test_facts_reach_the_prepared_subjects_and_a_changed_sidecar_another_cohort(brats, course_root):
    folder, recipe = brats(modalities=("FLAIR", "T1")), Recipe(("FLAIR", "T1"), size=48, pixel_mm=4.0)

    def prepare():
        gathered = intake.gather(str(folder), modalities="FLAIR,T1", size=48, pixel_mm=4)
        return cohort.open_cohort(preparation.prepare_cohort(gathered, recipe))

    before = prepare()
    assert before.subjects[1].facts["acquisition"] == {"FLAIR": {}, "T1": {}}
    (folder / "p1" / "p1_t1.json").write_text(json.dumps(SIDECAR))
    after = prepare()
    assert after.subjects[1].facts["acquisition"] == {"FLAIR": {}, "T1": FACTS}
    assert after.hash != before.hash
    assert prepare().hash == after.hash
    assert "Doe" not in (after.folder / "manifest.json").read_text()
