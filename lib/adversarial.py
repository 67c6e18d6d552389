"""The one adversarial training loop: two players with an optimiser each, weights averaged over time, early stopping by
a figure of healthy validation slices, checkpoints that resume exactly, and in words what went wrong."""

import json
import math
import pickle
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.cohort import Cohort, Slices
from lib.errors import CourseError
from lib.progress import bar
from lib.training import History, Plan, State, augment, batch_of, derived_seed

BETAS = (0.0, 0.9)  # Adam's, after Gulrajani et al. 2017, section 5
AVERAGING = 0.98  # weight of the past in the averaged players, a step
WATCHED = 512  # healthy validation slices at most that an epoch is judged by
SHOWN = 6  # invented slices that are kept of each epoch
PART = 64  # slices that go through a player at once where nothing is learnt
WINS = 0.99  # share of pairs told apart from which on the discriminator has won
COLLAPSED = 0.5  # of the real slices' diversity


class Players(nn.Module, ABC):
    """A `generator` and a `discriminator`. The discriminator turns images [batch, modality, row, column] into scores
    [batch], higher for what looks more real."""

    generator: nn.Module
    discriminator: nn.Module

    @abstractmethod
    def invent(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """As many slices of the generator's as there are images, of the same shape and on the same device."""

    @abstractmethod
    def discriminator_loss(
        self, real: torch.Tensor, fake: torch.Tensor, step: int, random: torch.Generator
    ) -> torch.Tensor:
        """The discriminator's loss; `fake` carries no gradient to the generator, `step` counts from 0."""

    @abstractmethod
    def generator_losses(self, real: torch.Tensor, random: torch.Generator) -> dict[str, torch.Tensor]:
        """The parts of the generator's loss by name; it learns from their sum."""

    @abstractmethod
    def validation(self, images: torch.Tensor) -> float:
        """How badly the generator draws healthy slices that it never saw; training stops by this."""


def train(
    players: Players, cohort: Cohort, plan: Plan, *, shrink: int, checkpoint: Path, seed: int, device: torch.device,
    resume: bool = True,
) -> History:  # fmt: skip
    """Train both players in turn on the healthy slices of train, each slice averaged over `shrink` × `shrink` pixels.

    What is judged and kept is the pair averaged over the steps (Karras et al. 2018, section 5), at its best epoch. A
    row has the losses `train` (the generator's, with its parts) and `discriminator`, and the figures of `watch`.
    Checkpoints as in training.train; the history warns where a player failed.
    """
    players.to(device, memory_format=torch.channels_last)
    optimisers = [
        torch.optim.Adam(player.parameters(), lr=plan.learning_rate, betas=BETAS)
        for player in (players.generator, players.discriminator)
    ]
    averaged = AveragedModel(players, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    signature = json.dumps([cohort.hash, asdict(plan), seed, shrink, str(players)])
    state = State(averaged, [players, *optimisers], checkpoint, signature)
    _ = resume and state.restore()
    slices, done = cohort.slices("train"), len(state.history.rows)
    watched = small(_watched(cohort.slices("validation"), device), shrink)
    steps = math.ceil(len(slices) / plan.batch_size)
    with bar(total=plan.epochs * steps, initial=done * steps, what=checkpoint.stem, unit="step") as progress:
        for epoch in range(done, plan.epochs):
            if state.waited() >= plan.patience:
                break
            batches = _batches(slices, plan.batch_size, shrink, derived_seed(seed, "epoch", epoch), device)
            row = {"epoch": epoch, **_epoch(players, optimisers, averaged, batches, progress)}
            row |= watch(averaged.module, watched)
            state.shown.append(_shown(averaged.module, watched))
            state.keep(row)
            progress.set_postfix_str(f"validation {row['validation']:.4f}, told apart {row['recognised']:.2f}")
    averaged.load_state_dict(state.best)
    players.load_state_dict(averaged.module.state_dict())
    state.history.stopped_early = len(state.history.rows) < plan.epochs
    state.history.warnings = warnings(state.history)
    return state.history


def small(image: torch.Tensor, shrink: int) -> torch.Tensor:
    """Images [batch, modality, row, column] averaged over squares of `shrink` × `shrink` pixels."""
    return functional.avg_pool2d(image, shrink)


@torch.inference_mode()
def watch(players: Players, images: torch.Tensor) -> dict[str, float]:
    """How the game stands, on healthy validation slices [slice, modality, row, column].

    `validation` as the players define it; `recognised`, the share of pairs of a real and an invented slice in which the
    discriminator scores the real one higher (0.5: it cannot tell, 1: it has won); `diversity`, the mean distance
    between two invented slices over that between two real ones (0: all samples are one).
    """
    players.eval()
    random = torch.Generator().manual_seed(0)
    invented = in_parts(lambda part: players.invent(part, random), images)
    real, fake = (in_parts(players.discriminator, some) for some in (images, invented))
    spreads = [functional.pdist(some.flatten(1)).mean() for some in (invented, images)]
    return {
        "validation": players.validation(images),
        "recognised": (real[:, None] > fake[None]).float().mean().item(),
        "diversity": (spreads[0] / spreads[1]).item(),
    }


def warnings(history: History) -> list[str]:
    """What a reader of the results must know, in words; nothing where the game went well at the epoch that was kept."""
    row = history.rows[history.best_epoch]
    found = []
    if row["recognised"] >= WINS:
        found.append(f"the discriminator wins: it tells {100 * row['recognised']:.0f} % of real from invented slices")
    if row["diversity"] < COLLAPSED:
        found.append(f"the samples collapse: they differ {100 * row['diversity']:.0f} % as much as healthy slices do")
    return found


def shown(checkpoint: Path) -> np.ndarray:
    """The same few invented slices after each epoch, float32 [epoch, sample, modality, row, column]."""
    try:
        return torch.stack(torch.load(checkpoint, map_location="cpu", weights_only=True)["shown"]).float().numpy()
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        cure = "Run the notebook that trains it again, with --overwrite."
        raise CourseError(f"{checkpoint} is missing, damaged, or no adversarial training.", cure) from error


def in_parts(call, batch: torch.Tensor) -> torch.Tensor:
    """`call` of a batch, some at a time, so that memory does not grow with it."""
    return torch.cat([call(part) for part in batch.split(PART)])


def discriminate(players: Players, optimiser: torch.optim.Optimizer, real: torch.Tensor, step: int,
                 random: torch.Generator) -> float:  # fmt: skip
    """One step of the discriminator; the generator stays as it is."""
    with torch.no_grad():
        fake = players.invent(real, random)
    loss = players.discriminator_loss(real, fake, step, random)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.item()


def generate(players: Players, optimiser: torch.optim.Optimizer, real: torch.Tensor,
             random: torch.Generator) -> dict[str, float]:  # fmt: skip
    """One step of the generator, its gradient passing through the discriminator, which stays as it is."""
    players.discriminator.requires_grad_(False)
    parts = players.generator_losses(real, random)
    optimiser.zero_grad(set_to_none=True)
    sum(parts.values()).backward()
    optimiser.step()
    players.discriminator.requires_grad_(True)
    return {name: part.item() for name, part in parts.items()}


def _batches(slices: Slices, size: int, shrink: int, seed: int, device: torch.device):
    """Batches of an epoch in its order, augmented, each with the epoch's source of chance."""
    random = torch.Generator().manual_seed(seed)
    for part in torch.randperm(len(slices), generator=random).split(size):
        batch = batch_of(slices, part.tolist(), device)
        batch = {"image": small(batch["image"], shrink), "brain": small(batch["brain"].float(), shrink) > 0}
        yield augment(batch, random)["image"], random


def _epoch(players: Players, optimisers, averaged: AveragedModel, batches, progress) -> dict:
    players.train()
    started, times, sums = time.perf_counter(), [], Counter()
    for real, random in batches:
        step_started = time.perf_counter()
        sums["discriminator"] += discriminate(players, optimisers[1], real, int(averaged.n_averaged), random)
        sums.update(generate(players, optimisers[0], real, random))
        averaged.update_parameters(players)
        times.append(time.perf_counter() - step_started)
        progress.update()
    means = {name: value / len(times) for name, value in sums.items()}
    return means | {
        "train": sum(means.values()) - means["discriminator"],
        "seconds": time.perf_counter() - started,
        "seconds_per_step": float(np.median(times)),
    }


def _watched(slices: Slices, device: torch.device) -> torch.Tensor:
    """Healthy slices, evenly taken, so that memory does not grow with the cohort."""
    numbers = np.unique(np.linspace(0, len(slices) - 1, min(len(slices), WATCHED)).round().astype(int))
    return batch_of(slices, numbers.tolist(), device)["image"]


@torch.inference_mode()
def _shown(players: Players, images: torch.Tensor) -> torch.Tensor:
    chosen = images[:: max(1, len(images) // SHOWN)][:SHOWN]
    return players.invent(chosen, torch.Generator().manual_seed(0)).half().cpu()
