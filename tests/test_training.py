"""The loop stops early, resumes to the very same weights, augments image and brain alike, and names what is wrong."""

import made_cohort
import pytest
import torch
from torch import nn
from torch.nn import functional

from lib import training
from lib.errors import CourseError
from lib.training import Plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return made_cohort.write(tmp_path_factory.mktemp("cohort") / "c")


def loss(forward, batch):
    return functional.mse_loss(forward(batch["image"]), batch["image"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 1, 3, padding=1))


def run(prepared, path, epochs=4, of=loss, net=None, **options):
    net = net or network()
    plan = Plan(epochs, 8, 1e-2, options.pop("patience", 10))
    history = training.train(net, of, prepared, plan, checkpoint=path, seed=1, device=CPU, **options)
    return net, history


class Killed(BaseException):
    pass


def test_a_killed_training_resumes_to_the_same_weights_and_history(prepared, tmp_path):
    whole, history = run(prepared, tmp_path / "whole")
    steps = []

    def dying(forward, batch):
        steps.append(1)
        if len(steps) == 20:
            raise Killed
        return loss(forward, batch)

    with pytest.raises(Killed):
        run(prepared, tmp_path / "killed", of=dying)
    resumed, again = run(prepared, tmp_path / "killed")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert [r["validation"] for r in again.rows] == [r["validation"] for r in history.rows]
    assert 0 < len(steps) < 4 * 8  # it had really begun, and not ended


def test_a_finished_training_is_not_repeated(prepared, tmp_path):
    run(prepared, tmp_path / "c")

    def never(forward, batch):
        raise AssertionError("trained again")

    _, history = run(prepared, tmp_path / "c", of=never)
    assert len(history.rows) == 4


@pytest.mark.parametrize("change", [{"resume": False}, {"patience": 9}])
def test_a_checkpoint_is_not_taken_up_unasked_or_for_another_plan(prepared, tmp_path, change):
    run(prepared, tmp_path / "c")
    calls = []
    run(prepared, tmp_path / "c", of=lambda f, b: calls.append(1) or loss(f, b), **change)
    assert calls


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 broken"])
def test_a_damaged_checkpoint_is_named(prepared, tmp_path, content):
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(CourseError, match=r"checkpoint .* is damaged"):
        run(prepared, tmp_path / "c")


def test_it_stops_after_patience_and_keeps_the_best_weights(prepared, tmp_path):
    values = iter([5.0, 3.0, 4.0, 6.0, 7.0, 8.0])
    seen = []

    def scripted(forward, batch):
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return loss(forward, batch)
        seen.append(float(forward(batch["image"]).sum()))
        return torch.tensor(scripted.value)

    net = network()
    original = training._validate

    def validate(*arguments):
        scripted.value = next(values)
        return original(*arguments)

    training._validate = validate
    try:
        _, history = run(prepared, tmp_path / "c", epochs=6, of=scripted, net=net, patience=2)
    finally:
        training._validate = original
    assert [row["validation"] for row in history.rows] == [5, 3, 4, 6]
    assert history.stopped_early
    assert history.best_epoch == 1
    kept = torch.load(tmp_path / "c", weights_only=True)["best"]
    assert all(torch.equal(kept[f"module.{key}"], value) for key, value in net.state_dict().items())


def test_the_same_seed_gives_the_same_weights_and_another_does_not(prepared, tmp_path):
    first, _ = run(prepared, tmp_path / "a", epochs=1)
    second, _ = run(prepared, tmp_path / "b", epochs=1)
    assert torch.equal(first[0].weight, second[0].weight)
    third = network()
    training.train(third, loss, prepared, Plan(1, 8, 1e-2, 3), checkpoint=tmp_path / "d", seed=2, device=CPU)
    assert not torch.equal(first[0].weight, third[0].weight)


def test_only_healthy_slices_of_train_are_learnt_from(prepared, tmp_path):
    steps = []

    def watching(forward, batch):
        steps.append(len(batch["image"]))
        return loss(forward, batch)

    run(prepared, tmp_path / "c", epochs=1, of=watching)
    healthy = sum(
        s.brain.any(axis=(1, 2)).sum() for s in prepared.subjects if s.healthy and s.split in ("train", "validation")
    )
    assert sum(steps) == healthy


def test_augmentation_moves_image_and_brain_alike_and_differs_by_slice():
    brain = torch.zeros(64, 32, 32, dtype=torch.bool)
    brain[:, 8:20, 10:28] = True
    batch = {"image": brain[:, None].float(), "brain": brain}
    varied = training.augment(batch, torch.Generator().manual_seed(0))
    assert varied["brain"].dtype == torch.bool
    assert (varied["image"][:, 0][~varied["brain"]] == 0).all()
    assert (varied["image"][:, 0][varied["brain"]] > 0.49).all()
    areas = varied["brain"].sum(dim=(1, 2)) / brain[0].sum()
    assert ((areas > 0.9) & (areas < 1.1)).all()
    assert len({tuple(one.flatten().tolist()) for one in varied["brain"]}) > 32
    left = varied["brain"][:, :, :16].sum(dim=(1, 2)) > varied["brain"][:, :, 16:].sum(dim=(1, 2))
    assert 10 < left.sum() < 54  # about half are mirrored


def test_augmentation_of_nothing_is_the_identity(monkeypatch):
    monkeypatch.setattr(training, "ROTATION_DEGREES", 0)
    image = torch.rand(16, 1, 32, 32)
    batch = {"image": image, "brain": torch.ones(16, 32, 32, dtype=torch.bool)}
    varied = training.augment(batch, torch.Generator().manual_seed(0))["image"]
    for before, after in zip(image, varied, strict=True):
        assert torch.allclose(before, after, atol=1e-4) or torch.allclose(before.flip(-1), after, atol=1e-4)


def test_a_volume_is_turned_in_the_plane_as_each_of_its_slices():
    flat = torch.zeros(8, 32, 32, dtype=torch.bool)
    flat[:, 8:20, 10:28] = True
    high = torch.zeros(8, 6, 32, 32, dtype=torch.bool)
    high[:, 1:4] = flat[:, None]
    turned = [training.augment({"image": brain[:, None].float(), "brain": brain}, torch.Generator().manual_seed(0))
              for brain in (flat, high)]  # fmt: skip
    for key in ("image", "brain"):
        slices, volumes = (one[key] for one in turned)
        for number in (1, 2, 3):
            torch.testing.assert_close(volumes[..., number, :, :], slices, atol=1e-4, rtol=0)
        assert not volumes[..., [0, 4, 5], :, :].any()


def test_the_learning_rate_falls_along_a_cosine_or_stays():
    plan = Plan(10, 8, 1e-2, 3, cosine=True)
    assert [plan.rate(done) for done in (0, 0.5, 1)] == pytest.approx([1e-2, 5e-3, 0])
    assert Plan(10, 8, 1e-2, 3).rate(0.9) == 1e-2


def test_what_is_kept_is_the_mean_of_the_weights_where_that_is_asked_for(prepared, tmp_path, monkeypatch):
    walked, original = [], training._step

    def step(optimiser, value, rate):
        original(optimiser, value, rate)
        walked.append(optimiser.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(training, "_step", step)
    net = network()
    training.train(
        net, loss, prepared, Plan(1, 8, 1e-2, 3, averaging=0.8), checkpoint=tmp_path / "c", seed=1, device=CPU
    )
    mean = walked[0]
    for weight in walked[1:]:
        mean = 0.8 * mean + 0.2 * weight
    assert torch.allclose(net[0].weight, mean, atol=1e-6)
    assert not torch.allclose(net[0].weight, walked[-1], atol=1e-4)


def test_each_epoch_s_network_can_be_looked_at_and_the_best_is_kept(prepared, tmp_path):
    seen = []
    net, history = run(prepared, tmp_path / "x", each=lambda network: seen.append(training._copied(network)))
    assert len(seen) == len(history.rows) == 4
    for key, value in net.state_dict().items():
        assert torch.equal(value, seen[history.best_epoch][key])


def test_an_epoch_ends_after_so_many_steps(prepared, tmp_path):
    batches = []
    plan = Plan(2, 8, 1e-2, 3, steps=2)
    corrupt = lambda batch, random, split: batches.append((split, batch["image"])) or batch  # noqa: E731
    training.train(network(), loss, prepared, plan, checkpoint=tmp_path / "c", seed=1, device=CPU, corrupt=corrupt)
    taught = [image for split, image in batches if split == "train"]
    assert [len(image) for image in taught] == [8] * 4
    assert not torch.equal(taught[0], taught[2])
    validated = [image for split, image in batches if split == "validation"]
    assert len(prepared.slices("validation")) > 16
    assert sum(len(image) for image in validated) == 2 * len(range(0, len(prepared.slices("validation")), 2))


def test_corruption_repeats_on_validation_and_goes_on_in_training(prepared, tmp_path):
    drawn = {"train": [], "validation": []}

    def corrupt(batch, random, split):
        drawn[split].append(float(torch.rand(1, generator=random)))
        return batch

    plan = Plan(2, 8, 1e-2, 3)
    training.train(network(), loss, prepared, plan, checkpoint=tmp_path / "c", seed=1, device=CPU, corrupt=corrupt)
    half = len(drawn["validation"]) // 2
    assert drawn["validation"][:half] == drawn["validation"][half:]
    assert len(set(drawn["train"])) == len(drawn["train"])


def test_devices_are_chosen_or_refused():
    assert training.choose_device("cpu").type == "cpu"
    assert training.choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(CourseError, match="no device 'tpu'"):
        training.choose_device("tpu")


def test_mixed_precision_returns_float32_close_to_the_network_s_own():
    net, image = network().eval(), torch.rand(2, 1, 16, 16)
    mixed = training.mixed_precision(net, CPU)(image)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed, net(image), atol=0.02)


def test_derived_seeds_differ_by_name_and_repeat():
    assert training.derived_seed(0, "a") == training.derived_seed(0, "a")
    assert len({training.derived_seed(s, n) for s in range(5) for n in ("a", "b", "c")}) == 15


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"patience": 0}, {"learning_rate": float("nan")}])
def test_a_plan_that_cannot_be_is_named(wrong):
    with pytest.raises(CourseError, match=next(iter(wrong))):
        Plan(**({"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "patience": 1} | wrong))
