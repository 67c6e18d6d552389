"""The search lowers each image's loss by itself, one image or many; the encoder replaces it; the game is shared."""

from types import SimpleNamespace

import made_cohort
import numpy as np
import pytest
import torch

from benchmarks import latent_search
from lib import models
from lib.errors import CourseError
from lib.models import anogan, f_anogan, gan
from lib.models.anogan import search, search_loss

GAME = {"epochs": 16, "shrink": 1, "width": 8, "latent": 8, "batch_size": 8}
SEARCH = {"steps": 30, "search_rate": 0.1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def fitted(name, prepared, out, **settings):
    detector = models.create(name, prepared.modalities, **GAME, **settings)
    detector.fit(prepared, out=out, device="cpu")
    return detector


@pytest.fixture(scope="module")
def searching(prepared, out):
    return fitted("anogan", prepared, out, **SEARCH)


@pytest.fixture(scope="module")
def images(prepared):
    slices = prepared.slices("test")
    return gan.small(torch.stack([torch.from_numpy(slices[i]["image"]) for i in range(6)]), 1)


@pytest.fixture
def starts(searching, images):
    return searching.network.draw(len(images), torch.Generator().manual_seed(3))


def test_the_generator_draws_what_prepared_slices_can_be():
    network = gan.Network(2, gan.Settings(latent=8, width=8, size=48, shrink=2))
    drawn = network.generator(30 * torch.randn(64, 8))
    assert drawn.shape == (64, 2, 24, 24)
    assert drawn.min() >= 0
    assert drawn.max() <= gan.TOP
    network.generator.end.bias.data.fill_(100)
    assert network.generator(torch.randn(1, 8)).min() > 1.4  # all of [0, 1.5] can be reached
    network.generator.end.bias.data.fill_(-100)
    assert network.generator(torch.randn(1, 8)).max() < 0.1


def test_players_learn_to_draw_healthy_slices(prepared, out, images):
    history = fitted("gan", prepared, out).fit(prepared, out=out, device="cpu")
    assert history.rows[history.best_epoch]["validation"] < 0.7 * history.rows[0]["validation"]


def test_the_search_changes_the_latent_alone_and_lowers_every_image_s_loss(searching, images, starts):
    before = {key: value.clone() for key, value in searching.network.state_dict().items()}
    found = search(searching.network, images, starts, 50, 0.1)
    assert all(torch.equal(before[key], value) for key, value in searching.network.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in searching.network.parameters())
    assert (found.loss < 0.98 * found.curve[0]).all()
    assert not torch.equal(found.latent, starts)
    features = searching.network.discriminator.features(images)
    with torch.no_grad():
        torch.testing.assert_close(search_loss(searching.network, images, features, found.latent), found.loss)


def test_an_image_s_search_does_not_depend_on_its_batch(searching, images, starts):
    together = search(searching.network, images, starts, 20, 0.1)
    for i in (0, 3, 5):
        alone = search(searching.network, images[i : i + 1], starts[i : i + 1], 20, 0.1)
        torch.testing.assert_close(alone.loss[0], together.loss[i], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(alone.latent[0], together.latent[i], rtol=1e-2, atol=1e-2)


def test_no_image_s_gradient_reaches_another_s_latent(searching, images, starts):
    network, latent = searching.network, starts.clone().requires_grad_()
    losses = search_loss(network, images, network.discriminator.features(images), latent)
    (slope,) = torch.autograd.grad(losses[2], latent)
    assert slope[2].any()
    assert not slope[[0, 1, 3, 4, 5]].any()


def test_the_loss_is_the_paper_s(searching, images, starts):
    network = searching.network
    features = network.discriminator.features
    with torch.no_grad():
        drawn = network.generator(starts)
        expected = 0.9 * (drawn - images).abs().mean(dim=(1, 2, 3))
        expected += 0.1 * (features(drawn) - features(images)).abs().mean(dim=(1, 2, 3))
        torch.testing.assert_close(search_loss(network, images, features(images), starts), expected)


def test_a_search_stops_at_its_goal_or_where_it_gains_nothing(searching, images, starts):
    whole = search(searching.network, images, starts, 40, 0.1, pause=100)
    assert not whole.curve.isnan().any()
    goal = whole.curve[0] * torch.tensor([1, 0.98, 1, 0.98, 1, 0])
    early = search(searching.network, images, starts, 40, 0.1, goal=goal, pause=100)
    taken = (~early.curve.isnan()).sum(dim=0)
    assert (taken[[0, 2, 4]] == 1).all()
    assert ((taken[[1, 3]] > 1) & (taken[[1, 3]] <= 40)).all()
    assert taken[5] == 41
    assert (early.loss[:5] <= goal[:5]).all()
    still = search(searching.network, images, starts, 40, 0.0, pause=3)
    assert (~still.curve.isnan()).sum(dim=0).tolist() == [4] * 6


def test_the_path_leads_from_the_start_to_the_best(searching, images, starts):
    found = search(searching.network, images, starts, 15, 0.1)
    torch.testing.assert_close(found.path[0], starts)
    for i in range(len(images)):
        torch.testing.assert_close(found.path[found.steps[i], i], found.latent[i])
        assert found.curve[found.steps[i], i] == found.loss[i] == found.curve[:, i].nan_to_num(9).min()


def test_the_nearest_sample_is_a_better_start_than_chance(searching, images, starts):
    near = search(searching.network, images, searching.starts(images), 0, 0.1)
    far = search(searching.network, images, starts, 0, 0.1)
    assert (near.loss < far.loss).all()


def test_axes_are_the_directions_in_which_samples_change_most():
    latents = torch.randn(2048, 5, generator=torch.Generator().manual_seed(0))
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    samples = 0.3 + latents @ turn @ torch.diag(torch.tensor([9.0, 5, 3, 1, 0.2]))
    found = gan.principal_axes(latents, samples.view(-1, 1, 1, 5))
    torch.testing.assert_close(found.T @ found, torch.eye(5), rtol=0, atol=1e-5)
    assert ((found * turn).sum(dim=0).abs() > 0.98).all()


def test_along_its_axes_a_search_goes_further_in_as_many_steps():
    random = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(16, 16, generator=random))
    slope = turn @ torch.diag(torch.logspace(1, -2, 16))
    drawing = SimpleNamespace(
        generator=lambda latent: (latent @ slope).view(-1, 1, 4, 4), discriminator=SimpleNamespace(features=torch.abs)
    )
    latents, starts = torch.randn(2048, 16, generator=random), torch.randn(6, 16, generator=random)
    axes = gan.principal_axes(latents, drawing.generator(latents))
    images = drawing.generator(torch.randn(6, 16, generator=random))
    plain = search(drawing, images, starts, 30, 0.1, pause=30)
    along = search(drawing, images, starts, 30, 0.1, pause=30, axes=axes)
    assert along.loss.mean() < 0.7 * plain.loss.mean()


def test_a_search_along_axes_is_a_search_of_latents(searching, images, starts):
    network, axes = searching.network, searching.drawn[2]
    found = search(network, images, starts, 20, 0.1, axes=axes)
    torch.testing.assert_close(found.path[0], starts)
    with torch.no_grad():
        features = network.discriminator.features(images)
        torch.testing.assert_close(search_loss(network, images, features, found.latent), found.loss)
    alone = search(network, images[3:4], starts[3:4], 20, 0.1, axes=axes)
    torch.testing.assert_close(alone.loss[0], found.loss[3], rtol=1e-3, atol=1e-5)
    plain = search(network, images, starts, 20, 0.1)
    assert not torch.equal(found.latent, plain.latent)
    same = search(network, images, starts, 20, 0.1, axes=torch.eye(starts.shape[1]))
    torch.testing.assert_close(same.curve, plain.curve, equal_nan=True)


def test_nearest_samples_are_those_that_differ_least():
    samples = torch.tensor([0.0, 1.0, 3.0, 7.0]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    distance, which = gan.nearest(torch.tensor([2.9, 0.2]).view(2, 1, 1, 1).expand(2, 1, 2, 2), samples, 2)
    assert which.T.tolist() == [[2, 1], [0, 1]]
    torch.testing.assert_close(distance.T, torch.tensor([[0.1, 1.9], [0.2, 0.8]]))


def test_the_best_restart_counts(prepared, out, images):
    several = fitted("anogan", prepared, out, start="random", restarts=3, **SEARCH)
    starts = several.starts(images)
    repeated, along = images.repeat(3, 1, 1, 1), several.drawn[2]
    ends = search(several.network, repeated, starts, 30, 0.1, axes=along).loss.view(3, -1)
    found = several.search(images)
    torch.testing.assert_close(found.loss, ends.min(dim=0).values, rtol=1e-3, atol=1e-5)
    assert len(found.loss) == len(images)
    assert torch.equal(starts[0], starts[len(images) - 1])  # images share their starts, whatever the batch


@pytest.mark.parametrize("name", ["gan", "anogan", "f_anogan"])
def test_lesions_stand_out_and_slice_scores_are_of_the_slice(name, prepared, out):
    detector = fitted(name, prepared, out, **({"steps": 30} if name == "anogan" else {}))
    inside, outside = [], []
    for subject in prepared.split("test")[-3:]:
        maps = detector.maps(subject)
        inside.append(maps[subject.lesion].mean())
        outside.append(maps[subject.brain & ~subject.lesion].mean())
        scores = detector.slice_scores(subject, maps)
        assert scores.shape == (len(maps),)
        assert (scores[~subject.brain.any(axis=(1, 2))] == 0).all()
        np.testing.assert_array_equal(scores, detector.slice_scores(subject, maps))
    assert np.mean(inside) > 1.5 * np.mean(outside)


def test_slice_scores_are_those_of_the_subject_that_is_asked_for(searching, prepared):
    first, last = prepared.split("test")[0], prepared.split("test")[-1]
    maps = searching.maps(first)
    own = searching.slice_scores(first, maps)
    searching.maps(last)
    np.testing.assert_array_equal(searching.slice_scores(first, maps), own)


def test_the_discriminator_s_map_is_its_gradient_times_the_intensity(prepared, out, images):
    detector = fitted("gan", prepared, out)
    found, score = detector.judge(images.clone())
    torch.testing.assert_close(score, -detector.network.discriminator(images).detach())
    step = 1e-2
    for row, column in ((5, 5), (8, 9), (10, 6)):
        brighter = images.clone()
        brighter[0, 0, row, column] += step
        change = (detector.network.discriminator(images)[0] - detector.network.discriminator(brighter)[0]).item() / step
        expected = max(change * images[0, 0, row, column].item(), 0)
        assert found[0, row, column].item() == pytest.approx(expected, rel=0.2, abs=2e-3)


def test_each_seed_has_a_game_of_its_own():
    names = ("gan", "anogan", "f_anogan", "gan@1", "anogan@1")
    games = {name: models.create(name, ("FLAIR",)).training for name in names}
    assert games == {"gan": "gan", "anogan": "gan", "f_anogan": "gan", "gan@1": "gan@1", "anogan@1": "gan@1"}


def test_detectors_of_a_run_share_one_game(prepared, tmp_path, monkeypatch):
    fitted("gan", prepared, tmp_path)
    monkeypatch.setattr("lib.adversarial.generate", lambda *given: pytest.fail("played again"))
    searched = fitted("anogan", prepared, tmp_path, **SEARCH)
    encoding = fitted("f_anogan", prepared, tmp_path, encoder_epochs=1)
    for key, value in searched.network.state_dict().items():
        assert torch.equal(value, encoding.network["players"].state_dict()[key])


def test_the_encoder_learns_where_slices_lie_and_leaves_the_players_alone(prepared, out, images):
    detector = models.create("f_anogan", prepared.modalities, **GAME, encoder_epochs=25)
    history = detector.fit(prepared, out=out, device="cpu")
    searched = fitted("gan", prepared, out)
    assert history.rows[history.best_epoch]["validation"] < history.rows[0]["validation"]
    for key, value in searched.network.state_dict().items():
        assert torch.equal(value, detector.network["players"].state_dict()[key])
    redrawn = (detector.expect(images) - images).abs().mean()
    drawn = (searched.network.invent(images, torch.Generator().manual_seed(0)) - images).abs().mean()
    assert redrawn < drawn


@pytest.mark.parametrize("loss", ["izi", "izi_f"])
def test_the_encoder_s_loss_is_the_paper_s(loss, prepared, out, images):
    detector = models.create("f_anogan", prepared.modalities, **GAME, loss=loss, encoder_epochs=1)
    detector.fit(prepared, out=out, device="cpu")
    drawn, features = detector.expect(images), detector.network["players"].discriminator.features
    expected = ((images - drawn) ** 2).mean(dim=(1, 2, 3))
    if loss == "izi_f":
        expected = expected + ((features(images) - features(drawn)) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(detector.compare(images, drawn), expected)
    torch.testing.assert_close(detector.judge(images)[1], expected.detach())


def test_a_redrawn_slice_is_of_the_slice_s_size(searching, prepared):
    subject = prepared.split("test")[-1]
    drawn = searching.redraw(subject, 5)
    assert drawn.shape == subject.image[:, 5].shape
    assert (drawn[:, ~subject.brain[5]] == 0).all()
    assert drawn[:, subject.brain[5]].min() >= 0


def test_the_penalty_is_zero_for_a_slope_of_one_and_grows_with_it():
    real, fake = torch.rand(2, 5, 1, 4, 4).unbind()
    for slope, penalty in ((1, 0), (3, 4)):
        critic = lambda image, slope=slope: slope * image.flatten(1).sum(dim=1) / 4  # noqa: E731
        found = gan.gradient_penalty(critic, real, fake, torch.Generator().manual_seed(0))
        assert found.item() == pytest.approx(penalty, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (gan, {"latent": 0}), (gan, {"width": 12}), (gan, {"shrink": 0}), (gan, {"shrink": 5}),
        (gan, {"residual": "both"}), (anogan, {"start": "far"}), (anogan, {"steps": -1}),
        (anogan, {"restarts": 0}), (anogan, {"search_rate": float("nan")}), (f_anogan, {"loss": "zizi"}),
        (f_anogan, {"encoder_epochs": 0}),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(kind, wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        kind.Settings(**wrong)


def test_the_benchmark_s_ways_end_equal_and_its_figures_bear_plain_names(prepared, out, images):
    detector = fitted("f_anogan", prepared, out, encoder_epochs=3)
    table, figures = latent_search.measure(detector, images, 8)
    assert figures["largest_difference"] < 1e-3 * table.loss["one at a time"]
    assert {"speedup_batched", "speedup_warm", "speedup_encoder", "error_fall"} <= figures.keys()
    assert (table.steps[["one at a time", "at once"]] == 8).all()
    assert table.as_good["at once"] == 1
    near = table.loc["along axes, from: nearest of many samples"]
    assert near.as_good == 1
    assert near.steps < 8


def test_only_a_way_that_ends_as_low_counts_as_faster():
    ways = latent_search.pd.DataFrame({"speedup": [20.0, 30.0], "loss": [0.99, 1.02]})
    assert latent_search._best_of(ways, 1.01) == 20
    assert latent_search._best_of(ways, 0.9) == 0
