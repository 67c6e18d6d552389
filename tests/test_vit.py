"""Vision transformers: what the dropped tokens let through, and that a hidden patch takes no part in its prediction."""

import made_cohort
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from lib import models, training
from lib.errors import CourseError
from lib.models import vit

SMALL = {"patch": 8, "dim": 32, "depth": 2, "heads": 4}
FAST = SMALL | {"epochs": 8, "learning_rate": 5e-3}


def masked(**settings):
    """A masked detector with random weights that tells something."""
    torch.manual_seed(0)
    detector = models.create("vit_masked", ("FLAIR",), **SMALL | settings)
    detector.network = detector.build().eval()
    return detector


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2))


@pytest.mark.parametrize("side", [32, 44])
@pytest.mark.parametrize("shifted", [False, True])
def test_patches_come_back_and_padding_shifts_the_grid(side, shifted):
    image = torch.rand(2, 3, side, side)
    padded, edges = vit.pad(image, 8, shifted)
    assert padded.shape[-1] % 8 == 0
    assert padded.shape[-1] - side < 8 * (2 if shifted else 1)
    assert torch.equal(vit.cut(padded, edges), image)
    tokens = vit.patches(padded, 8)
    assert tokens.shape == (2, (padded.shape[-1] // 8) ** 2, 3 * 64)
    assert torch.equal(tokens[:, 1].unflatten(1, (3, 8, 8)), padded[:, :, :8, 8:16])
    assert torch.equal(vit.unpatch(tokens, padded.shape, 8), padded)
    if side == 32:
        assert edges == [4 * shifted] * 4  # half a patch


def test_positions_differ_everywhere_and_a_shifted_grid_lies_between():
    settings = vit.Settings(**SMALL)
    plain, shifted = (vit.positions(torch.zeros(1, 1, side, side), settings) for side in (32, 40))
    assert plain.shape == (16, 32)
    assert (torch.cdist(plain, plain) + 9 * torch.eye(16)).min() > 0.1
    near = torch.cdist(plain[5:6], shifted)[0].argsort()[:4]
    assert set(near.tolist()) == {6, 7, 11, 12}  # the four patches that meet in its middle


@pytest.mark.parametrize(
    ("dropout", "share", "times"), [(0.5, 0.5, 1), (0.25, 0.25, 1), (0.75, 0.75, 3), (0.6, 0.5, 1)]
)
def test_the_masks_of_a_partition_hide_every_patch_equally_often(dropout, share, times):
    masks = vit.partition(16, dropout, torch.Generator().manual_seed(0))
    assert vit.share_hidden(dropout) == pytest.approx(share)
    assert (masks.sum(dim=0) == times).all()
    assert masks.float().mean() == pytest.approx(share)
    other = vit.partition(16, dropout, torch.Generator().manual_seed(1))
    assert not torch.equal(masks, other)


@pytest.mark.parametrize("count", [4, 9, 25])
@pytest.mark.parametrize("dropout", [0.1, 0.34, 0.5, 0.9, 0.99])
def test_every_patch_is_hidden_and_every_mask_leaves_something_visible(count, dropout):
    masks = vit.partition(count, dropout, torch.Generator().manual_seed(0))
    assert masks.any(dim=0).all()
    assert (~masks).any(dim=1).all()
    assert masks.any(dim=1).all()


def test_what_a_hidden_patch_holds_does_not_change_its_prediction_and_what_is_visible_does():
    network, image = masked().network, torch.rand(1, 1, 32, 32)
    hidden = vit.partition(16, 0.5, torch.Generator().manual_seed(0))[:1]
    inside, outside = (int(torch.nonzero(which[0])[0]) for which in (hidden, ~hidden))
    drawn = network(vit.hide(image, hidden, 8))
    for patch, same in ((inside, True), (outside, False)):
        row, column = patch // 4 * 8, patch % 4 * 8
        changed = image.clone()
        changed[..., row : row + 8, column : column + 8] += 1
        assert torch.equal(network(vit.hide(changed, hidden, 8)), drawn) == same
    pixels = vit.hide(image, hidden, 8)[:, -1:] > 0
    assert (drawn[~pixels] == 0).all()
    assert (drawn[pixels] != 0).any()


@pytest.mark.parametrize("dropout", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("number", [0, 5, 15])
def test_a_patch_is_redrawn_without_itself(dropout, number):
    detector, image = masked(dropout=dropout, partitions=1), torch.rand(2, 1, 32, 32)
    where = (..., slice(number // 4 * 8, number // 4 * 8 + 8), slice(number % 4 * 8, number % 4 * 8 + 8))
    changed = image.clone()
    changed[where] = torch.rand_like(changed[where])
    with torch.inference_mode():
        before, after = detector.reconstruct(image), detector.reconstruct(changed)
    assert torch.allclose(before[where], after[where], atol=1e-6)
    assert not torch.allclose(before, after, atol=1e-4)


def test_context_dropout_redraws_a_patch_by_itself(prepared, tmp_path):
    detector = models.create("vit_context_dropout", ("FLAIR",), **FAST | {"learning_rate": 2e-3, "epochs": 16})
    detector.fit(prepared, out=tmp_path, device="cpu")
    image = torch.from_numpy(prepared.slices("validation")[4]["image"])[None]
    changed = image.clone()
    changed[..., 8:16, 8:16] += 0.3
    with torch.inference_mode():
        moved = (detector.reconstruct(changed) - detector.reconstruct(image))[0, 0]
    assert moved[8:16, 8:16].mean() > 0.1


def test_context_dropout_drops_tokens_in_training_only():
    torch.manual_seed(0)
    network, image = vit.Network(1, vit.Settings(**SMALL)), torch.rand(1, 1, 32, 32)
    network.train()
    assert not torch.equal(network(image), network(image))
    network.eval()
    assert torch.equal(network(image), network(image))


@pytest.mark.parametrize("name", ["vit_context_dropout", "vit_masked"])
def test_the_output_has_no_bounds(name):
    torch.manual_seed(0)
    network = models.create(name, ("FLAIR",), **SMALL).build().eval()
    last = network.tell if name == "vit_context_dropout" else network.tell[1]
    image, hidden = torch.rand(1, 1, 32, 32), torch.arange(16)[None] % 2 == 0
    for bias in (-5.0, 5.0):
        torch.nn.init.constant_(last.bias, (bias - vit.MIDDLE) / vit.SPREAD)
        drawn = network(vit.hide(image, hidden, 8) if name == "vit_masked" else image)
        assert float(drawn[drawn != 0].detach().mean()) == pytest.approx(bias, abs=1)


def test_the_loss_counts_hidden_pixels_inside_the_brain_only():
    detector, brain = masked(), torch.zeros(2, 32, 32, dtype=torch.bool)
    brain[:, 4:20, 4:20] = True
    batch = {"image": torch.rand(2, 1, 32, 32), "brain": brain}
    grids = set()
    for seed in range(8):
        ready = detector.corrupt(batch, torch.Generator().manual_seed(seed), "train")
        grids.add(ready["seen"].shape[-1])
        hidden = ready["seen"][:, -1:] > 0
        assert (ready["seen"][:, :1][hidden] == 0).all()
        right = torch.where(ready["counted"], ready["target"], 7.0)
        assert detector.loss(lambda seen, right=right: right, ready) == 0
        off = detector.loss(lambda seen, wrong=ready["target"] + 0.5 * hidden: wrong, ready)
        assert off == pytest.approx(0.25, abs=1e-5)
        inside = torch.nn.functional.pad(brain, [hidden.shape[-1] // 2 - 16] * 4)
        assert torch.equal(ready["counted"], hidden & inside[:, None])
    assert grids == {32, 40}


def test_a_hidden_patch_shares_its_attention_among_the_visible_ones():
    hidden = vit.partition(16, 0.75, torch.Generator().manual_seed(0))[:1]
    weights = masked().network.attention(vit.hide(torch.rand(3, 1, 32, 32), hidden.expand(3, -1), 8))
    assert weights.shape == (3, 12, 4)
    assert torch.allclose(weights.sum(dim=2), torch.ones(3, 12), atol=1e-5)
    assert (weights > 0).all()


def test_more_partitions_are_the_mean_of_several_predictions():
    image = torch.rand(1, 1, 36, 36)
    with torch.inference_mode():
        one, four, again = (masked(partitions=n).reconstruct(image) for n in (1, 4, 4))
    assert one.shape == four.shape == image.shape
    assert torch.equal(four, again)
    assert not torch.allclose(one, four)
    assert torch.isfinite(four).all()


def test_the_masked_one_learns_and_marks_lesions(prepared, tmp_path):
    precision, losses = [], []
    for epochs, rate in ((1, 1e-9), (8, 5e-3)):
        detector = models.create("vit_masked", ("FLAIR",), **FAST | {"epochs": epochs, "learning_rate": rate})
        history = detector.fit(prepared, out=tmp_path / str(epochs), device="cpu")
        maps = [(s, detector.maps(s)) for s in prepared.split("test")[-3:]]
        precision.append(np.mean([average_precision_score(s.lesion[s.brain], one[s.brain]) for s, one in maps]))
        losses.append(history.rows[-1]["validation"])
    assert losses[1] < losses[0] / 3
    assert precision[1] > 0.8


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["vit_context_dropout", "vit_masked"])
def test_a_killed_training_resumes_to_the_same_weights(name, prepared, tmp_path, monkeypatch):
    def fitted(folder):
        detector = models.create(name, ("FLAIR",), **SMALL | {"epochs": 3, "steps": 2})
        detector.fit(prepared, out=tmp_path / folder, device="cpu")
        return detector

    def dying(self, row, keep=training.State.keep):
        keep(self, row)
        if row["epoch"] == 1:
            raise Killed

    whole = fitted("whole")
    with monkeypatch.context() as patch:
        patch.setattr(training.State, "keep", dying)
        with pytest.raises(Killed):
            fitted("killed")
    resumed = fitted("killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.state().values(), resumed.state().values(), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"patch": 0}, {"dim": 30}, {"heads": 3}, {"depth": 0}, {"dropout": 0}, {"dropout": 1.0}, {"dropout": float("nan")},
     {"residual": "both"}, {"partitions": 0}, {"epochs": 0}, {"learning_rate": float("inf")}],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(wrong, prepared, tmp_path):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        models.create("vit_masked", ("FLAIR",), **wrong).fit(prepared, out=tmp_path, device="cpu")
