"""The adversarial loop: each player moves alone, a killed game resumes to the same end, failures are said in words."""

import copy

import made_cohort
import pytest
import torch

from lib import adversarial
from lib.errors import CourseError
from lib.models import gan
from lib.training import History, Plan

CPU = torch.device("cpu")
SETTINGS = gan.Settings(latent=8, width=8, size=made_cohort.SIZE)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c")


def network():
    torch.manual_seed(0)
    return gan.Network(1, SETTINGS)


def run(prepared, path, players=None, epochs=3, patience=10, rate=2e-3, **options):
    players = players or network()
    plan = Plan(epochs, 8, rate, patience)
    history = adversarial.train(players, prepared, plan, shrink=2, checkpoint=path, seed=1, device=CPU, **options)
    return players, history


class Killed(BaseException):
    pass


class Mortal(gan.Network):
    """Dies at its 10th step."""

    steps = 0

    def generator_losses(self, real, random):
        self.steps += 1
        if self.steps == 10:
            raise Killed
        return super().generator_losses(real, random)

    def _get_name(self):
        return "Network"


def test_a_killed_game_resumes_to_the_same_players_history_and_pictures(prepared, tmp_path):
    whole, history = run(prepared, tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(Killed):
        run(prepared, tmp_path / "killed", Mortal(1, SETTINGS))
    begun = torch.load(tmp_path / "killed", weights_only=True)["rows"]
    assert 0 < len(begun) < 3
    resumed, again = run(prepared, tmp_path / "killed")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    timeless = [[{k: v for k, v in row.items() if "seconds" not in k} for row in h.rows] for h in (history, again)]
    assert timeless[0] == timeless[1]
    assert (adversarial.shown(tmp_path / "whole") == adversarial.shown(tmp_path / "killed")).all()


def test_a_finished_game_is_not_played_again_unless_asked(prepared, tmp_path, monkeypatch):
    run(prepared, tmp_path / "c", epochs=1)
    played = []
    original = adversarial.generate
    monkeypatch.setattr(adversarial, "generate", lambda *given: played.append(1) or original(*given))
    run(prepared, tmp_path / "c", epochs=1)
    assert not played
    run(prepared, tmp_path / "c", epochs=1, resume=False)
    assert played


def test_the_same_seed_gives_the_same_players(prepared, tmp_path):
    first, _ = run(prepared, tmp_path / "a", epochs=1)
    second, _ = run(prepared, tmp_path / "b", epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def moved(before, after):
    """Which players have other weights than before."""
    return {
        name
        for name in ("generator", "discriminator")
        if any(
            not torch.equal(a, b)
            for a, b in zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        )
    }


@pytest.mark.parametrize("step", ["discriminate", "generate"])
def test_a_step_of_one_player_leaves_the_other_unchanged(step):
    players, random = network(), torch.Generator().manual_seed(0)
    before, real = copy.deepcopy(players), torch.rand(4, 1, 16, 16)
    if step == "discriminate":
        optimiser = torch.optim.Adam(players.discriminator.parameters())
        adversarial.discriminate(players, optimiser, real, 0, random)
        assert moved(before, players) == {"discriminator"}
    else:
        adversarial.generate(players, torch.optim.Adam(players.generator.parameters()), real, random)
        assert moved(before, players) == {"generator"}
        assert all(p.grad is None for p in players.discriminator.parameters())


def test_it_stops_by_healthy_validation_and_keeps_the_best_players(prepared, tmp_path, monkeypatch):
    values, kept = iter([5.0, 3.0, 4.0, 6.0, 1.0]), []

    def scripted(self, images):
        kept.append(copy.deepcopy(self.state_dict()))
        return next(values)

    monkeypatch.setattr(gan.Network, "validation", scripted)
    players, history = run(prepared, tmp_path / "c", epochs=5, patience=2)
    assert [row["validation"] for row in history.rows] == [5, 3, 4, 6]
    assert history.stopped_early
    assert all(torch.equal(kept[1][key], value) for key, value in players.state_dict().items())
    assert not torch.equal(kept[0]["generator.end.weight"], kept[1]["generator.end.weight"])


def test_only_healthy_slices_of_train_are_learnt_from(prepared, tmp_path, monkeypatch):
    asked = []
    original = adversarial.batch_of
    monkeypatch.setattr(adversarial, "batch_of", lambda s, *given: asked.extend(s.index) or original(s, *given))
    run(prepared, tmp_path / "c", epochs=1)
    assert {subject.split for subject, _ in asked} == {"train", "validation"}
    assert all(subject.healthy for subject, _ in asked)


class Painted(gan.Network):
    """Draws what it is told, and recognises bright slices as real."""

    def __init__(self, drawn):
        super().__init__(1, SETTINGS)
        self.drawn = drawn
        self.discriminator.forward = lambda image: image.mean(dim=(1, 2, 3))

    def invent(self, images, random):
        return self.drawn[: len(images)]


def test_watching_measures_recognition_and_diversity():
    real = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    alike = adversarial.watch(Painted(real.flip(0)), real)
    assert alike["diversity"] == pytest.approx(1)
    assert alike["recognised"] == pytest.approx(0.5, abs=0.02)
    same = adversarial.watch(Painted(real[:1].repeat(40, 1, 1, 1) * 0.1), real)
    assert same["diversity"] == pytest.approx(0, abs=1e-3)
    assert same["recognised"] == 1
    half = adversarial.watch(Painted(0.5 * real), real)
    assert half["diversity"] == pytest.approx(0.5)


def test_failures_are_told_in_words():
    def told(recognised, diversity):
        first = {"epoch": 0, "validation": 2.0, "recognised": 1.0, "diversity": 0.0}
        best = {"epoch": 1, "validation": 1.0, "recognised": recognised, "diversity": diversity}
        return adversarial.warnings(History([first, best]))

    assert told(0.8, 0.9) == []
    assert told(1.0, 0.9) == ["the discriminator wins: it tells 100 % of real from invented slices"]
    assert told(0.8, 0.2) == ["the samples collapse: they differ 20 % as much as healthy slices do"]
    assert len(told(1.0, 0.1)) == 2


class Stuck(gan.Network):
    """Its generator learns nothing from the discriminator and draws always the same."""

    def draw(self, count, random):
        return torch.zeros(count, self.latent)

    def generator_losses(self, real, random):
        return {"adversarial": 0 * super().generator_losses(real, random)["adversarial"]}


def test_a_game_that_fails_warns(prepared, tmp_path):
    torch.manual_seed(0)
    _, history = run(prepared, tmp_path / "c", Stuck(1, SETTINGS), epochs=4)
    assert [w.partition(":")[0] for w in history.warnings] == ["the discriminator wins", "the samples collapse"]


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_pictures_of_a_missing_or_damaged_checkpoint_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "c").write_bytes(content)
    with pytest.raises(CourseError, match="c is missing, damaged"):
        adversarial.shown(tmp_path / "c")


def test_pictures_of_every_epoch_are_kept(prepared, tmp_path):
    run(prepared, tmp_path / "c", epochs=2)
    drawn = adversarial.shown(tmp_path / "c")
    assert drawn.shape == (2, adversarial.SHOWN, 1, 16, 16)
    assert (drawn[0] != drawn[1]).any()


def test_the_network_sees_averages_of_pixels():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert adversarial.small(image, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(adversarial.small(image, 1), image)
