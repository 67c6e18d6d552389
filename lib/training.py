"""The one training loop: seeds, device, precision, augmentation, early stopping, checkpoints that resume exactly."""

import hashlib
import io
import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.cohort import Cohort
from lib.errors import CourseError, check_least
from lib.progress import bar
from lib.volumes import write_bytes

ROTATION_DEGREES = 10
LEFT_OUT = 0.25  # share of the modalities that training leaves out where subjects lack some


@dataclass(frozen=True)
class Plan:
    """How long and how fast: at most `epochs` passes over the training slices in batches of `batch_size`, Adam at
    `learning_rate`, stopped after `patience` epochs without a lower validation loss.

    `cosine`: the learning rate falls to 0 along a cosine over all epochs; `averaging`: the exponential mean of the
    weights, which keeps this share of itself at a step, is what is validated and kept (0: the weights themselves);
    `steps`: an epoch ends after so many (0: with the last slice), and validation takes no more, evenly spaced.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    cosine: bool = False
    averaging: float = 0.0
    steps: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "patience"):
            check_least(name, getattr(self, name), 1)
        check_least("learning_rate", self.learning_rate, 0)
        check_least("steps", self.steps, 0)

    def rate(self, done: float) -> float:
        """The learning rate after a share of all epochs."""
        return self.learning_rate * ((1 + math.cos(math.pi * done)) / 2 if self.cosine else 1)

    def steps_of(self, slices: int) -> int:
        """Steps of an epoch over so many slices."""
        return min(math.ceil(slices / self.batch_size), self.steps or slices)


@dataclass
class History:
    """What training did, a row an epoch: `epoch`, `train` and `validation` losses, `seconds`, `seconds_per_step`; and
    in words what went wrong without stopping it."""

    rows: list[dict] = field(default_factory=list)
    stopped_early: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        return min(self.rows, key=lambda row: row["validation"])["epoch"]

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.rows)


Batch = dict[str, torch.Tensor]
Items = Sequence[dict[str, np.ndarray]]
Forward = Callable[[torch.Tensor], torch.Tensor]
Loss = Callable[[Forward, Batch], torch.Tensor]
Corrupt = Callable[[Batch, torch.Generator, str], Batch]


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` takes cuda, then mps, then the processor. CourseError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, present in there.items() if present))
    if not there.get(name):
        raise CourseError(f"There is no device {name!r} here.", "Use --device auto or --device cpu.")
    return torch.device(name)


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to a device, in the layout that is fast there: the last digits depend on it."""
    volumes = any(weight.dim() == 5 for weight in network.parameters())
    last = torch.channels_last_3d if volumes else torch.channels_last
    network.to(device, memory_format=torch.contiguous_format if native_bfloat16(device) else last)


def mixed_precision(network: nn.Module, device: torch.device) -> Forward:
    """The network's call, in bfloat16 where that was measured to help (`python -m benchmarks.training`), float32 out.

    A rule by what the device can do, not by the clock, so that two runs on one machine are equal.
    """

    def forward(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device)):
            return network(image).float()

    return forward


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


def derived_seed(seed: int, *names) -> int:
    """A seed of its own for each purpose: equal names, equal seed."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *names]).encode()).digest()[:6], "big")


def train(
    network: nn.Module, loss: Loss, cohort: Cohort, plan: Plan, *, checkpoint: Path, seed: int, device: torch.device,
    resume: bool = True, corrupt: Corrupt | None = None, each: Callable[[nn.Module], None] | None = None,
    items: Callable[[str], Items] | None = None,
) -> History:  # fmt: skip
    """Train on the healthy slices of train until those of validation stop improving; the best weights are kept.

    `loss(forward, batch)` is the mean loss of a batch on the device, a dict of `image` float32 [batch, modality, row,
    column] and `brain` bool [batch, row, column]; `forward` calls the network in mixed precision. `corrupt(batch,
    random, split)` is what the loss gets instead; on validation it finds `random` in the same state every time. After
    each epoch everything that the next one depends on goes to `checkpoint`; with `resume`, one of the same cohort,
    plan, seed and network goes on where it stopped, to the same end. `each` may look at the network of every epoch.
    `items(split)` gives what is learnt from in place of slices: whole volumes have one axis more, in front of the row.
    """
    corrupt = _corruption(corrupt, cohort)
    place(network, device)
    optimiser = torch.optim.Adam(network.parameters(), lr=plan.learning_rate)
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(plan.averaging))
    signature = json.dumps([cohort.hash, asdict(plan), seed, str(network)])
    state = State(mean, [network, optimiser], checkpoint, signature)
    if not (resume and state.restore()):
        torch.manual_seed(derived_seed(seed, "steps"))
    slices, watched = map(items or cohort.slices, ("train", "validation"))
    steps = plan.steps_of(len(slices))
    with bar(
        total=plan.epochs * steps, initial=len(state.history.rows) * steps, what=checkpoint.stem, unit="step"
    ) as progress:
        for epoch in range(len(state.history.rows), plan.epochs):
            if state.waited() >= plan.patience:
                break
            random = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
            row = _epoch(state, loss, corrupt, slices, plan, random, device, progress)
            random = torch.Generator().manual_seed(derived_seed(seed, "validation"))
            row |= {"epoch": epoch, "validation": _validate(mean.module, loss, corrupt, watched, plan, random, device)}
            state.keep(row)
            if each:
                each(mean.module)
            progress.set_postfix_str(f"loss {row['train']:.4f}, validation {row['validation']:.4f}")
    mean.load_state_dict(state.best)
    network.load_state_dict(mean.module.state_dict())
    state.history.stopped_early = len(state.history.rows) < plan.epochs
    return state.history


def _corruption(corrupt: Corrupt | None, cohort: Cohort) -> Corrupt:
    """What is done to a batch: where subjects lack modalities, every slice may lack some in training."""

    def both(batch: Batch, random: torch.Generator, split: str) -> Batch:
        if cohort.incomplete and split == "train":
            batch = leave_out(batch, len(cohort.modalities), random)
        return corrupt(batch, random, split) if corrupt else batch

    return both


def augment(batch: Batch, random: torch.Generator) -> Batch:
    """Flip left and right, and rotate by up to 10° in the plane, each slice or volume by chance and image and brain
    alike."""
    count, device = len(batch["image"]), batch["image"].device
    angle = (torch.rand(count, generator=random) * 2 - 1) * math.radians(ROTATION_DEGREES)
    mirror = (torch.rand(count, generator=random) < 0.5) * 2.0 - 1
    cos, sin, axes = angle.cos(), angle.sin(), batch["brain"].dim() - 1
    turn = torch.eye(axes, axes + 1).repeat(count, 1, 1)
    turn[:, :2, :2] = torch.stack([torch.stack([cos * mirror, -sin], 1), torch.stack([sin * mirror, cos], 1)], 1)
    grid = functional.affine_grid(turn, [count, 1, *batch["brain"].shape[1:]], align_corners=False).to(device)
    image = functional.grid_sample(batch["image"], grid, align_corners=False)
    brain = functional.grid_sample(batch["brain"][:, None].float(), grid, align_corners=False)[:, 0] > 0.5
    return {"image": image * brain[:, None], "brain": brain}


def leave_out(batch: Batch, modalities: int, random: torch.Generator) -> Batch:
    """Each of so many modalities is 0 by chance, but never all that a slice has; further channels go with their own."""
    there = present(batch["image"]).flatten(1)[:, :modalities].cpu()
    kept = torch.rand(there.shape, generator=random) >= LEFT_OUT
    kept |= ~(kept & there).any(dim=1, keepdim=True)
    image = batch["image"]
    channels = kept.repeat(1, image.shape[1] // modalities).to(image.device)
    return batch | {"image": image * channels.view(*channels.shape, *[1] * (image.dim() - 2))}


def present(image: torch.Tensor) -> torch.Tensor:
    """Which modalities slices [batch, modality, row, column] or volumes have, bool [batch, modality, 1, 1] or one axis
    more: one that is missing is 0 everywhere."""
    return (image != 0).any(dim=tuple(range(2, image.dim())), keepdim=True)


def _epoch(state: "State", loss: Loss, corrupt: Corrupt, slices: Items, plan: Plan, random, device, progress) -> dict:
    epoch, steps = len(state.history.rows), plan.steps_of(len(slices))
    network, optimiser = state.others
    order = torch.randperm(len(slices), generator=random)[: steps * plan.batch_size]
    network.train()
    forward = mixed_precision(network, device)
    started, total, times = time.perf_counter(), 0.0, []
    for step, part in enumerate(order.split(plan.batch_size)):
        step_started = time.perf_counter()
        batch = corrupt(augment(batch_of(slices, part.tolist(), device), random), random, "train")
        value = loss(forward, batch)
        _step(optimiser, value, plan.rate((epoch + step / steps) / plan.epochs))
        state.network.update_parameters(network)
        total += value.item() * len(part)
        times.append(time.perf_counter() - step_started)
        progress.update()
    return {
        "train": total / len(order),
        "seconds": time.perf_counter() - started,
        "seconds_per_step": float(np.median(times)),
    }


def _step(optimiser: torch.optim.Optimizer, value: torch.Tensor, rate: float) -> None:
    """Down the gradient of a loss."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    value.backward()
    optimiser.step()


@torch.inference_mode()
def _validate(network, loss: Loss, corrupt: Corrupt, slices: Items, plan: Plan, random, device) -> float:
    network.eval()
    forward, total = mixed_precision(network, device), 0.0
    most = plan.steps_of(len(slices)) * plan.batch_size
    order = torch.arange(0, len(slices), math.ceil(len(slices) / most))
    for part in order.split(plan.batch_size):
        batch = corrupt(batch_of(slices, part.tolist(), device), random, "validation")
        total += loss(forward, batch).item() * len(part)
    return total / len(order)


def batch_of(slices: Items, numbers: list[int], device: torch.device) -> Batch:
    """Slices by their numbers as one batch on the device."""
    items = [slices[i] for i in numbers]
    return {key: torch.from_numpy(np.stack([item[key] for item in items])).to(device) for key in ("image", "brain")}


class State:
    """All that the next epoch depends on, in memory and in the checkpoint: the network whose best weights are kept,
    `others` that have a state of their own (optimisers, networks), and `shown`, a tensor an epoch to look at."""

    def __init__(self, network: nn.Module, others: Sequence, path: Path, signature: str):
        self.network, self.others, self.path, self.signature = network, others, path, signature
        self.history = History()
        self.shown: list[torch.Tensor] = []
        self.best = _copied(network)

    def waited(self) -> int:
        """Epochs since the lowest validation loss."""
        return len(self.history.rows) - 1 - self.history.best_epoch if self.history.rows else 0

    def keep(self, row: dict) -> None:
        self.history.rows.append(row)
        if self.history.best_epoch == row["epoch"]:
            self.best = _copied(self.network)
        kept = {"network": self.network.state_dict(), "others": [other.state_dict() for other in self.others]}
        kept |= {"signature": self.signature, "rows": self.history.rows, "random": torch.get_rng_state()}
        kept |= {"best": self.best, "shown": self.shown}
        content = io.BytesIO()
        torch.save(kept, content)
        write_bytes(self.path, content.getvalue())

    def restore(self) -> bool:
        """Whether a checkpoint of this very training was there and taken up."""
        if not self.path.exists():
            return False
        try:
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            if kept["signature"] != self.signature:
                return False
            self.network.load_state_dict(kept["network"])
            for other, its in zip(self.others, kept["others"], strict=True):
                other.load_state_dict(its)
        except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise CourseError(
                f"The checkpoint {self.path} is damaged.", "Delete it and start again with --resume."
            ) from error
        self.best, self.history.rows, self.shown = kept["best"], kept["rows"], kept["shown"]
        torch.set_rng_state(kept["random"])
        return True


def _copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}
