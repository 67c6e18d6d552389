"""Synthetic lesions: where they lie, how they look, which of them teach and which only judge; and the detector."""

import made_cohort
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from lib import lesions, models, training
from lib.cohort import Slices
from lib.intake import LESION_FREE
from lib.lesions import FAMILIES, KEPT_OUT, TAUGHT
from lib.models import synthetic
from lib.models.synthetic import Mirrored

FAST = {"width": 8, "learning_rate": 5e-3}


def slices(count=64, modalities=1, side=48):
    brain = torch.zeros(count, side, side, dtype=torch.bool)
    brain[:, 8:40, 8:40] = True
    texture = lesions.smooth_noise(count, modalities, 12, side, torch.Generator().manual_seed(9))
    return (0.5 + 0.05 * texture).clamp(0, 1.5) * brain[:, None], brain


def painted(families, modalities=("FLAIR",), seed=0, **options):
    image, brain = slices(modalities=len(modalities), **options)
    return image, *lesions.paint(image, brain, modalities, families, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_lesions_lie_inside_the_brain_and_change_nothing_else(family):
    image, result, share = painted([family])
    _, brain = slices()
    assert ((share >= 0) & (share <= 1)).all()
    assert (share[~brain] == 0).all()
    assert torch.equal(result[~brain[:, None]], image[~brain[:, None]])
    untouched = share < 1e-6
    assert torch.allclose(result[:, 0][untouched], image[:, 0][untouched], atol=1e-5)
    assert ((result >= 0) & (result <= lesions.HIGHEST)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("modality", "sign"), [("FLAIR", 1), ("T2", 1), ("PD", 1), ("T1", -1)])
def test_lesions_are_bright_or_dark_as_the_modality_has_them(family, modality, sign):
    image, result, share = painted([family], (modality,))
    inside = share.sum(dim=(1, 2)) > 20
    change = ((result - image)[:, 0] * share).sum(dim=(1, 2)) / share.sum(dim=(1, 2)).clamp(min=1)
    assert (sign * change[inside] > 0).all()


def test_lesions_are_both_where_no_side_is_known():
    image, result, share = painted(["textured"], ("T1ce",))
    change = ((result - image)[:, 0] * share).sum(dim=(1, 2))
    assert (change > 1).any()
    assert (change < -1).any()


def test_all_modalities_share_a_lesion_s_shape():
    image, result, _ = painted(["textured"], ("FLAIR", "T1"))
    changed = (result - image).abs() > 0.03
    both = (changed[:, 0] & changed[:, 1]).sum() / (changed[:, 0] | changed[:, 1]).sum()
    assert both > 0.6
    assert ((result - image)[:, 0] >= 0).all()
    assert ((result - image)[:, 1] <= 0).all()


def test_edges_are_soft_and_sizes_and_places_vary():
    *_, share = painted(TAUGHT, count=256)
    partial = ((share > 0.1) & (share < 0.9)).sum() / (share > 0.1).sum()
    assert 0.1 < partial < 0.7
    areas = share.sum(dim=(1, 2))
    assert 0.15 < (areas == 0).float().mean() < 0.35  # a quarter without
    assert areas.max() > 20 * areas[areas > 0].quantile(0.1)
    rows, columns = share.amax(dim=2) > 0.9, share.amax(dim=1) > 0.9
    assert rows.any(dim=0)[8:40].all()
    assert columns.any(dim=0)[8:40].all()


def test_lesions_repeat_by_their_generator():
    first, again, other = (painted(TAUGHT, seed=s)[1:] for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_families_that_judge_are_none_of_those_that_teach(monkeypatch):
    assert not set(TAUGHT) & set(KEPT_OUT)
    assert set(TAUGHT) | set(KEPT_OUT) == set(FAMILIES)
    used = []
    for name, function in FAMILIES.items():
        monkeypatch.setitem(FAMILIES, name, lambda *a, n=name, f=function: used.append(n) or f(*a))
    detector = models.create("synthetic_lesions", ("FLAIR",))
    image, brain = slices()
    batch = {"image": image.repeat(1, 2, 1, 1), "brain": brain}
    detector.corrupt(batch, torch.Generator().manual_seed(0), "train")
    assert set(used) == set(TAUGHT)
    used.clear()
    detector.corrupt(batch, torch.Generator().manual_seed(0), "validation")
    assert set(used) == set(KEPT_OUT)


def test_the_reflection_shows_the_lesions_on_the_other_side_where_there_is_nothing_to_find():
    detector = models.create("synthetic_lesions", ("FLAIR", "T1"))
    image, brain = slices(modalities=4)
    batch = detector.corrupt({"image": image, "brain": brain}, torch.Generator().manual_seed(0), "validation")
    added = batch["shown"] - image
    assert batch["shown"].shape == image.shape
    inner = (batch["shown"] > 0) & (batch["shown"] < lesions.HIGHEST)  # elsewhere it was clipped
    both = inner[:, :2].flip(-1) & inner[:, 2:]
    assert torch.allclose(added[:, 2:][both], added[:, :2].flip(-1)[both], atol=1e-5)
    assert (added[:, :2].abs().amax(dim=1)[batch["lesion"] < 1e-6] < 1e-5).all()
    assert (added[:, 2:].abs().amax(dim=1)[batch["lesion"] < 1e-6] > 0.05).any()


def test_the_network_sees_what_one_side_has_and_the_other_has_not():
    detector = models.create("synthetic_lesions", ("FLAIR", "T1"))
    image, _ = slices(count=1, modalities=2)
    same = detector.seen(torch.cat([image, image], dim=1))
    assert torch.equal(same[:, :2], image)
    assert (same[:, 2:] == 0).all()
    brighter = image.clone()
    brighter[:, 0, 16:26, 10:20] += 0.4
    seen = detector.seen(torch.cat([brighter, image], dim=1))[0, 2:]
    assert seen[0, 20, 14] > 0.95 * seen[0].max() > 0.1
    assert (seen[1] == 0).all()
    alone = models.create("synthetic_lesions", ("FLAIR", "T1"), mirror=False)
    assert torch.equal(alone.seen(image), image)


def test_the_reflection_is_that_of_the_scan_and_stands_where_the_other_side_is(tmp_path):
    cohort = made_cohort.write(tmp_path / "c", modalities=("FLAIR", "T2"))
    subject = cohort.split("test")[-1]
    mirrored = Mirrored.of(subject)
    assert mirrored.image.shape == (4, *subject.brain.shape)
    np.testing.assert_array_equal(mirrored.image[:2], subject.image)
    assert (mirrored.image[2:, ~subject.brain] == 0).all()
    flipped = subject.image[:, ..., ::-1].astype(np.float32)
    apart = np.abs(mirrored.image[2:].astype(np.float32) - flipped)[:, subject.brain & subject.brain[..., ::-1]]
    assert np.median(apart) < 0.05


def test_no_slice_with_a_lesion_teaches_or_stops_training(tmp_path, monkeypatch):
    cohort = made_cohort.write(tmp_path / "c", healthy=(0, 0, 0), patients=3, training=LESION_FREE)
    taken, original = [], Slices.__getitem__
    monkeypatch.setattr(
        Slices, "__getitem__", lambda self, i: taken.append((self.index[i], original(self, i))) or original(self, i)
    )
    detector = models.create("synthetic_lesions", cohort.modalities, epochs=2, **FAST)
    history = detector.fit(cohort, out=tmp_path, device="cpu")
    assert {subject.split for (subject, _), _ in taken} == {"train", "validation"}
    assert not any(item["lesion"].any() for _, item in taken)
    assert len(history.rows) == 2


def test_validation_paints_the_same_lesions_every_epoch(tmp_path, monkeypatch):
    cohort, seen = made_cohort.write(tmp_path / "c"), {}
    original = synthetic.SyntheticLesions.corrupt

    def watching(self, batch, random, split):
        result = original(self, batch, random, split)
        seen.setdefault(split, []).append(result["lesion"])
        return result

    monkeypatch.setattr(synthetic.SyntheticLesions, "corrupt", watching)
    models.create("synthetic_lesions", cohort.modalities, epochs=2, **FAST).fit(cohort, out=tmp_path, device="cpu")
    half = len(seen["validation"]) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen["validation"][:half], seen["validation"][half:], strict=True))
    assert not torch.equal(seen["train"][0], seen["train"][len(seen["train"]) // 2])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["synthetic_lesions", "synthetic_restoration", "dae"])
def test_a_killed_training_resumes_to_the_same_weights(name, tmp_path, monkeypatch):
    cohort = made_cohort.write(tmp_path / "c")

    def fitted(folder):
        detector = models.create(name, cohort.modalities, epochs=3, **FAST)
        return detector, detector.fit(cohort, out=tmp_path / folder, device="cpu")

    whole, history = fitted("whole")
    steps, original = [], training._step
    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", lambda *a: steps.append(1) or original(*a))
        patch.setattr(training.State, "keep", dying(training.State.keep))
        with pytest.raises(Killed):
            fitted("killed")
        assert steps
    resumed, again = fitted("killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), resumed.state().values(), strict=True))
    assert [row["validation"] for row in history.rows] == [row["validation"] for row in again.rows]


def dying(keep):
    def kept(self, row):
        keep(self, row)
        if row["epoch"] == 1:
            raise Killed

    return kept


@pytest.mark.parametrize("mirror", [True, False])
def test_it_learns_to_find_lesions_it_never_saw(mirror, tmp_path):
    cohort = made_cohort.write(tmp_path / "c", healthy=(6, 2, 2))
    ill, precision = cohort.split("test")[-3:], []
    for epochs, rate in ((1, 1e-9), (10, 1e-2)):
        settings = {"epochs": epochs, "width": 8, "learning_rate": rate, "mirror": mirror}
        detector = models.create("synthetic_lesions", cohort.modalities, **settings)
        history = detector.fit(cohort, out=tmp_path / str(epochs), device="cpu")
        maps = [(s, detector.maps(s)) for s in ill]
        precision.append(np.mean([average_precision_score(s.lesion[s.brain], one[s.brain]) for s, one in maps]))
    assert all(one.max() <= 1 for _, one in maps)
    assert history.rows[-1]["validation"] < history.rows[0]["validation"]
    assert precision[1] > 2.5 * precision[0]
