"""GANomaly's three losses reach the generator, its discriminator learns apart, and codes are compared as they are."""

import copy

import made_cohort
import numpy as np
import pytest
import torch

from lib import adversarial, models
from lib.models import ganomaly

SETTINGS = ganomaly.Settings(latent=8, width=8, size=made_cohort.SIZE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c", healthy=(6, 2, 2))


@pytest.fixture(scope="module")
def fitted(prepared, tmp_path_factory):
    detector = models.create("ganomaly", prepared.modalities, epochs=12, width=8, latent=8, batch_size=8)
    history = detector.fit(prepared, out=tmp_path_factory.mktemp("ganomaly"), device="cpu")
    return detector, history


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ganomaly.Network(1, SETTINGS)


@pytest.fixture
def real():
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        ("adversarial", {"encoder", "decoder"}),
        ("contextual", {"encoder", "decoder"}),
        ("latent", {"encoder", "decoder", "second"}),
    ],
)
def test_every_loss_s_gradient_reaches_the_generator(network, real, loss, reached):
    network.generator_losses(real, torch.Generator())[loss].backward()
    found = {
        name
        for name in ("encoder", "decoder", "second")
        if any(p.grad is not None and p.grad.any() for p in getattr(network.generator, name).parameters())
    }
    assert found == reached


def test_a_step_of_the_discriminator_leaves_the_generator_unchanged_and_the_other_way_round(network, real):
    before, random = copy.deepcopy(network), torch.Generator()
    adversarial.discriminate(network, torch.optim.Adam(network.discriminator.parameters()), real, 0, random)
    pairs = zip(before.generator.parameters(), network.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) and b.grad is None for a, b in pairs)
    middle = copy.deepcopy(network.discriminator)
    parts = adversarial.generate(network, torch.optim.Adam(network.generator.parameters()), real, random)
    assert all(torch.equal(a, b) for a, b in zip(middle.parameters(), network.discriminator.parameters(), strict=True))
    assert parts.keys() == {"adversarial", "contextual", "latent"}
    assert min(parts.values()) > 0


def test_the_losses_are_the_paper_s_with_its_weights(network, real):
    code, drawn, again = network.generator(real)
    features = network.discriminator.features
    parts = network.generator_losses(real, torch.Generator())
    assert parts["adversarial"].item() == pytest.approx(((features(drawn) - features(real)) ** 2).mean().item())
    assert parts["contextual"].item() == pytest.approx(50 * (drawn - real).abs().mean().item())
    assert parts["latent"].item() == pytest.approx(((again - code) ** 2).mean().item())
    loss = network.discriminator_loss(real, drawn.detach(), 0, torch.Generator())
    right = torch.nn.functional.binary_cross_entropy_with_logits
    scores = network.discriminator(real), network.discriminator(drawn)
    expected = (right(scores[0], torch.ones(6)) + right(scores[1], torch.zeros(6))) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_second_encoder_is_one_of_its_own(network):
    first, second = network.generator.encoder.parameters(), network.generator.second.parameters()
    assert not {id(p) for p in first} & {id(p) for p in second}


def test_it_learns_to_redraw_healthy_slices_and_marks_lesions(fitted, prepared):
    detector, history = fitted
    assert history.rows[history.best_epoch]["validation"] < history.rows[0]["validation"] / 2
    for subject in prepared.split("test")[-3:]:
        maps = detector.maps(subject)
        assert maps[subject.lesion].mean() > 1.5 * maps[subject.brain & ~subject.lesion].mean()


def test_a_slice_s_score_is_the_distance_of_its_codes_whatever_other_scans_score(fitted, prepared):
    detector, _ = fitted
    subject = prepared.split("test")[-1]
    scores = detector.slice_scores(subject, detector.maps(subject))
    image = adversarial.small(torch.from_numpy(subject.image[:, 5].astype(np.float32))[None], 2)
    with torch.no_grad():
        code, _, again = detector.network.generator(image)
    assert scores[5] == pytest.approx(((again - code) ** 2).mean().item(), rel=1e-3)
    detector.maps(prepared.split("test")[0])
    np.testing.assert_array_equal(detector.slice_scores(subject, detector.maps(subject)), scores)
