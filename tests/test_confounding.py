"""The designs are what they say, and the scanner is found where it is all that there is to find."""

import numpy as np
import pandas as pd
import pytest

import lib
from lib import confounding, phantom, transfer
from lib.errors import CourseError
from lib.transfer import Plan

SMALL = {"per_scanner": 6, "learners": 6, "voxel_mm": 6}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib, "ROOT", tmp_path_factory.mktemp("course"))
        yield confounding.study(**SMALL, modalities="T1,FLAIR")


@pytest.mark.parametrize("per_scanner", [6, 10, 12, 24])
def test_designs_have_equal_sizes_and_differ_in_who_was_scanned_where(per_scanner):
    scans = confounding.plan(per_scanner).set_index("participant_id")
    designs = confounding.Study(scans, {}).designs()
    shares = {
        name: pd.Series(labels).groupby(scans.site[list(labels)]).mean().to_dict() for name, labels in designs.items()
    }
    assert {len(labels) for labels in designs.values()} == {3 * per_scanner}
    assert all(sum(labels.values()) == 3 * per_scanner / 2 for labels in designs.values())
    assert set(shares["balanced"].values()) == {0.5}
    assert shares["confounded"] == shares["nobody ill"]
    assert 0 < shares["confounded"]["scanner_a"] < 0.2
    assert 0.8 < shares["confounded"]["scanner_b"] < 1


def test_labels_are_about_health_but_where_nobody_is_ill():
    scans = confounding.plan().set_index("participant_id")
    designs = confounding.Study(scans, {}).designs()
    for name in ("balanced", "confounded"):
        assert all(scans.healthy[scan] == (not ill) for scan, ill in designs[name].items())
    assert scans.healthy[list(designs["nobody ill"])].all()
    brains = {name: dict(zip(scans["index"][list(of)], of.values(), strict=True)) for name, of in designs.items()}
    assert brains["confounded"] == brains["nobody ill"]
    assert brains["balanced"].keys() == brains["confounded"].keys()


def test_no_brain_of_a_design_is_one_that_encoders_learn_from():
    scans = confounding.plan()
    brains = {name: set(of) for name, of in scans.groupby("split")["index"]}
    assert set(brains) == {"train", "validation", "test"}
    assert not brains["test"] & (brains["train"] | brains["validation"])
    learners = scans[scans.split != "test"]
    assert learners.healthy.all()
    assert set(learners.site.value_counts()) == {5}
    assert not scans.duplicated(["index", "healthy"]).any()
    assert not set(scans["index"]) & set(phantom.plan(200, 200)["index"])


@pytest.mark.parametrize(("numbers", "what"), [((5, 15), "per_scanner is 5"), ((12, 1), "learners is 1")])
def test_too_few_are_refused(numbers, what):
    with pytest.raises(CourseError, match=what):
        confounding.plan(*numbers)


def test_a_study_is_prepared_by_modality_and_knows_its_scanners(small):
    assert list(small.cohorts) == ["T1", "FLAIR"]
    for modality, prepared in small.cohorts.items():
        assert prepared.modalities == (modality,)
        assert {s.id: s.split for s in prepared.subjects} == small.scans.split.to_dict()
        assert {s.id: int(s.healthy) for s in prepared.subjects} == small.scans.healthy.to_dict()
        for subject in prepared.subjects:
            np.testing.assert_allclose(subject.own_voxel_mm, 6)
            (times,) = subject.facts["acquisition"].values()
            named = [times[f"{name}_ms"] for name in ("repetition", "echo", "inversion") if f"{name}_ms" in times]
            sequence = phantom.SCANNERS[subject.facts["site"]].sequences[modality]
            assert named == [time for time in sequence if time]


def test_ill_and_healthy_scans_are_of_one_brain(small):
    subjects = {s.id: s for s in small.cohorts["T1"].subjects}
    ill = small.scans[small.scans.healthy == 0]
    for name, row in ill.iterrows():
        healthy = subjects[f"brain{row['index']}"]
        litres = [s.brain.sum() for s in (healthy, subjects[name])]
        assert litres[0] == pytest.approx(litres[1], rel=0.02)
        assert subjects[name].lesion.any()


def test_where_nobody_is_ill_the_scanner_alone_is_found(small):
    tables = transfer.by_acquisition(list(small.cohorts.values()))
    found = confounding.experiment(small, tables, plan=Plan(outer=3, inner=2, trials=2)).droplevel("classifier")
    header = found.xs("header and shape", level="features")
    assert (header.auroc[["confounded", "nobody ill"]] > 0.7).all()
    assert header.site_out_low["nobody ill"] <= 0.5 <= header.site_out_high["nobody ill"]
    assert header.auroc["balanced"] < header.auroc["nobody ill"]
    assert np.isnan(found.p_value).all()
    assert set(found.n) == {18}
