"""The variational autoencoder's bound, its code, and restoration on top of it; attention in the autoencoder."""

import made_cohort
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lib import models
from lib.errors import CourseError
from lib.models import autoencoder, vae

SMALL = {"width": 8, "code": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def trained(prepared, place):
    detector = models.create("vae", prepared.modalities, epochs=20, warm_up=20, **SMALL)
    return detector, detector.fit(prepared, out=place, device="cpu")


@pytest.fixture(scope="module")
def restorer(prepared, place, trained):
    detector = models.create("vae_restoration", prepared.modalities, epochs=20, warm_up=20, **SMALL)
    return detector, detector.fit(prepared, out=place, device="cpu")


def network(**given):
    torch.manual_seed(0)
    return vae.Network(1, vae.Settings(size=32, **(SMALL | given)))


def healthy(prepared, split):
    slices = prepared.slices(split)
    return np.stack([slices[i]["image"] for i in range(len(slices))])


def test_the_divergence_is_that_of_torch_s_distributions():
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    peer = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(vae.divergence(mean, log_variance), peer)
    assert vae.divergence(torch.zeros(3), torch.zeros(3)).eq(0).all()


def test_the_bound_is_a_sum_over_pixels_and_over_the_code():
    detector = models.create("vae", ("FLAIR",), sigma=0.5, **SMALL)
    image = torch.rand(2, 1, 8, 8)

    def forward(x):
        return torch.cat([x + 0.1, torch.full_like(x, 0.25)], dim=1)  # 16 nats of KL, spread over 64 pixels

    expected = 64 * 0.1**2 / (2 * 0.5**2) + 16
    assert detector.negative_elbo(forward, image).tolist() == pytest.approx([expected] * 2)
    assert detector.loss(forward, {"image": image}).item() == pytest.approx(expected)


@pytest.mark.parametrize("bottleneck", ["dense", "spatial"])
def test_the_last_channel_holds_the_divergence_of_the_code(bottleneck):
    one, image = network(bottleneck=bottleneck).eval(), torch.rand(3, 1, 32, 32)
    result = one(image)
    mean, log_variance = one.code(image)
    assert result.shape == (3, 2, 32, 32)
    torch.testing.assert_close(result[:, 1].sum((1, 2)), vae.divergence(mean, log_variance).flatten(1).sum(1))
    torch.testing.assert_close(result[:, :1], one.decoder(mean))


def test_codes_are_drawn_in_training_only_and_the_divergence_warms_up():
    one, image = network(warm_up=4), torch.rand(1, 1, 32, 32)
    in_training = [one(image).detach() for _ in range(6)]
    weights = [float(result[:, 1].sum() / in_training[-1][:, 1].sum()) for result in in_training]
    assert weights == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert not torch.equal(in_training[4], in_training[5])
    one.eval()
    assert torch.equal(one(image), one(image))
    assert one.step == 6


def test_it_learns_and_marks_lesions(trained, prepared):
    detector, history = trained
    assert history.rows[-1]["validation"] < history.rows[0]["validation"] / 2
    for subject in prepared.split("test")[-3:]:
        maps = detector.maps(subject)
        assert maps[subject.lesion].mean() > 2 * maps[subject.brain & ~subject.lesion].mean()


def test_codes_are_means_from_which_the_drawings_come(trained, prepared):
    detector, _ = trained
    images = healthy(prepared, "validation")
    codes, kl = detector.codes(images)
    assert codes.shape == kl.shape == (len(images), detector.code_size())
    with torch.inference_mode():
        expected = detector.reconstruct(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(detector.draw(codes), expected, atol=0.02)  # bfloat16


def test_units_that_say_nothing_are_not_active(trained, prepared):
    detector, _ = trained
    _, kl = detector.codes(healthy(prepared, "validation"))
    assert 1 <= vae.active(kl) <= detector.code_size()
    assert vae.active(np.array([[0.0, 0.005, 2.0], [0.0, 0.01, 0.0]])) == 1


def test_a_resumed_training_ends_where_a_whole_one_does(prepared, tmp_path):
    few = SMALL | {"warm_up": 30, "patience": 9}
    halves = [models.create("vae", prepared.modalities, epochs=4, **few) for _ in range(2)]
    whole = halves[0].fit(prepared, out=tmp_path / "a", device="cpu")

    def interrupted(*given, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return vae.VariationalAutoencoder.loss(halves[1], *given)

    halves[1].loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        halves[1].fit(prepared, out=tmp_path / "b", device="cpu")
    del halves[1].loss
    again = halves[1].fit(prepared, out=tmp_path / "b", device="cpu")
    assert [r["train"] for r in again.rows] == [r["train"] for r in whole.rows]
    states = [d.state() for d in halves]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_total_variation_counts_both_directions():
    image = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert vae.total_variation(image) == 1 + 3 + 0 + 2
    assert vae.total_variation(image + 5) == vae.total_variation(image)


def test_restoration_takes_the_training_of_the_vae(trained, restorer):
    (plain, history), (restored, again) = trained, restorer
    assert again.rows == history.rows
    own = restored.state()
    assert float(own.pop("tv_weight")) in vae.TV_WEIGHTS
    assert all(torch.equal(own[key], value) for key, value in plain.state().items())
    assert vae.Restoration("vae_restoration@2", ("FLAIR",)).training == "vae@2"


def test_restoring_raises_the_bound_and_changes_less_under_a_larger_weight(restorer, prepared):
    detector, _ = restorer
    subject = prepared.split("test")[-1]
    image = torch.from_numpy(subject.image[:, 3:6].swapaxes(0, 1).astype(np.float32))
    chosen, changes = detector.tv_weight, []
    for weight in (0.0, 1000.0):
        detector.tv_weight = torch.tensor(weight)
        path = detector.restored(image)
        changes.append((path[-1] - image).abs().mean())
        with torch.no_grad():
            before, after = (detector.negative_elbo(detector.forward, one) for one in (image, path[-1]))
        assert weight or (after < before).all()
    detector.tv_weight = chosen
    assert len(path) == detector.settings.restore_steps
    assert changes[1] < changes[0] / 2


def test_restored_slices_do_not_touch_each_other(restorer, prepared):
    detector, _ = restorer
    image = torch.from_numpy(healthy(prepared, "validation")[:3])
    together = detector.reconstruct(image)
    alone = torch.cat([detector.reconstruct(one[None]) for one in image])
    torch.testing.assert_close(together, alone, atol=0.01, rtol=0)
    assert detector.reconstruct(torch.zeros(2, 1, 32, 32)).eq(0).all()


def test_the_weight_is_chosen_by_painted_lesions_on_healthy_validation(restorer, prepared):
    detector, _ = restorer
    chosen = float(detector.tv_weight)
    table = detector.weighed(prepared, 0)
    assert max(table, key=lambda weight: table[weight][0]) == chosen
    changes = [change for _, change in table.values()]
    assert changes[-1] < changes[0]


def test_attention_lets_a_place_take_from_all_others():
    settings = autoencoder.Settings(attention=True, width=8, code=2, size=96)
    *stages, attention, _ = autoencoder.Network(1, settings).encoder
    assert len(stages) == 4
    attention.norm = torch.nn.Identity()  # it looks at the whole map as well
    tokens = torch.rand(1, 32, 6, 6)
    moved = tokens.clone()
    moved[..., 5, 5] += torch.rand(32)
    change = (attention(moved) - attention(tokens)).abs().amax(dim=1)[0]
    assert (change > 0).all()
    assert change.argmax() == 35
    torch.nn.init.zeros_(attention.heads.out_proj.weight)
    assert torch.equal(attention(tokens), tokens)  # what it adds is all there is to it


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("vae", {"sigma": 0}), ("vae", {"warm_up": 0}), ("vae", {"loss": "ssim"}), ("vae", {"bottleneck": "wide"}),
     ("vae_restoration", {"restore_steps": 0}), ("vae", {"sigma": float("nan")})],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(name, wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        models.create(name, ("FLAIR",), **wrong)
