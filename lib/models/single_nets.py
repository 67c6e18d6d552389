"""Networks that learn from one scan: an autoencoder of its slices and an AnoGAN of its patches.

Every slice and patch is turned and flipped, slices or patches held out say when to stop, and what the network cannot
redraw is the anomaly (Schlegl et al., IPMI 2017, sections 2.1 to 2.3, for the AnoGAN; Baur et al., Medical Image
Analysis 69, 2021, for the autoencoder). The lesion is part of what they learn from, so a large one is redrawn as well
as anything; and they see no more than half the scan's resolution.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.cohort import PreparedSubject
from lib.errors import check_least
from lib.models import autoencoder
from lib.models.detector import Detector, residual
from lib.preprocessing import HALVINGS
from lib.training import History, augment, derived_seed

HELD_OUT = 4  # every so manieth slice or patch is watched and not learnt from
PATCH = 16  # side in pixels of half the size
FEATURE_WEIGHT = 0.1  # of the discriminator's features in the search, as Schlegl et al. have it
WATCHED_STEPS = 20  # of the search on held-out patches
MOST_WATCHED = 64


@contextmanager
def one_thread():
    """Networks this small are learnt sooner without sharing their steps, the more so where others compute as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class OneScan(Detector):
    """A detector that learns anew from each scan whose map is asked for."""

    family = "single"

    def maps(self, subject: PreparedSubject) -> np.ndarray:
        image, brain = halved(subject)
        return self.compare(subject, self.redraw(image, brain, derived_seed(0, self.name, subject.id)))

    def compare(self, subject: PreparedSubject, redrawn: torch.Tensor) -> np.ndarray:
        """The map of a subject whose halved slices were redrawn so, [slice, modality, row, column]."""
        image, brain = halved(subject)
        far = residual(image, redrawn * brain[:, None], self.modalities, "signed")
        return enlarged(far, subject.brain.shape) * np.asarray(subject.brain)

    def redraw(self, image: torch.Tensor, brain: torch.Tensor, seed: int) -> torch.Tensor:
        """The slices [slice, modality, row, column] as a network that learnt from them alone draws them."""
        raise NotImplementedError


@dataclass(frozen=True)
class AutoencoderSettings:
    """`epochs` at most, stopped `patience` epochs after the lowest loss on held-out slices; `width`: channels of the
    first stage, a multiple of 8; `code`: channels of the code."""

    epochs: int = 20
    patience: int = 4
    batch_size: int = 16
    learning_rate: float = 4e-3
    width: int = 8
    code: int = 4

    def __post_init__(self):
        for name in ("epochs", "patience", "batch_size", "code"):
            check_least(name, getattr(self, name), 1)


class SingleAutoencoder(OneScan):
    """What a convolutional autoencoder of the scan's own slices does not redraw."""

    Settings = AutoencoderSettings

    def redraw(self, image: torch.Tensor, brain: torch.Tensor, seed: int) -> torch.Tensor:
        network, _ = learn_autoencoder(image, brain, self.settings, seed)
        with torch.inference_mode():
            return network(image)


@one_thread()
def learn_autoencoder(
    image: torch.Tensor, brain: torch.Tensor, settings: AutoencoderSettings, seed: int
) -> tuple[nn.Module, History]:
    """The network with the lowest loss on held-out slices, and the losses by epoch.

    `image` float32 [slice, modality, row, column], `brain` bool [slice, row, column].
    """
    s, random = settings, torch.Generator().manual_seed(seed)
    network = seeded(seed, lambda: _autoencoder(image, s))
    learnt, watched = split(len(image))
    history, best = History(), network.state_dict()
    optimiser = torch.optim.Adam(network.parameters(), lr=s.learning_rate)
    for epoch in range(s.epochs):
        losses = []
        for part in learnt[torch.randperm(len(learnt), generator=random)].split(s.batch_size):
            batch = augment({"image": image[part], "brain": brain[part]}, random)["image"]
            losses.append(step(optimiser, functional.mse_loss(network(batch), batch)))
        with torch.inference_mode():
            now = functional.mse_loss(network(image[watched]), image[watched]).item()
        history.rows.append({"epoch": epoch, "train": float(np.mean(losses)), "validation": now})
        if history.best_epoch == epoch:
            best = {key: value.clone() for key, value in network.state_dict().items()}
        if epoch - history.best_epoch >= s.patience:
            history.stopped_early = True
            break
    network.load_state_dict(best)
    return network, history


@dataclass(frozen=True)
class AnoGANSettings:
    """`rounds` of `steps` training steps at most, stopped `patience` rounds after held-out patches were redrawn best;
    `search_steps` of Adam at `search_rate` on each patch's code of `latent` numbers."""

    rounds: int = 4
    steps: int = 30
    patience: int = 2
    batch_size: int = 32
    learning_rate: float = 1e-3
    latent: int = 16
    width: int = 16
    search_steps: int = 30
    search_rate: float = 0.1

    def __post_init__(self):
        for name in ("rounds", "steps", "patience", "batch_size", "latent", "width", "search_steps"):
            check_least(name, getattr(self, name), 1)


class SingleAnoGAN(OneScan):
    """What a generator of the scan's own patches cannot draw, whatever code it is given."""

    Settings = AnoGANSettings

    def redraw(self, image: torch.Tensor, brain: torch.Tensor, seed: int) -> torch.Tensor:
        s = self.settings
        tiles, seen = brain_tiles(image, brain)
        generator, discriminator, _ = learn_gan(tiles[seen], s, seed)
        drawn, _ = search(generator, discriminator, tiles[seen], s, seed)
        return from_tiles(drawn, image.shape, seen)


@one_thread()
def learn_gan(patches: torch.Tensor, settings: AnoGANSettings, seed: int) -> tuple[nn.Module, nn.Module, History]:
    """Generator and discriminator of the round in which held-out patches [patch, modality, row, column] were redrawn
    best, and the losses by round: `train` the generator's, `discriminator`, `validation` the search's residual."""
    s, random = settings, torch.Generator().manual_seed(seed)
    channels = patches.shape[1]
    pair = seeded(seed, lambda: nn.ModuleList([build_generator(channels, s), Discriminator(channels, s)]))
    optimisers = [torch.optim.Adam(one.parameters(), lr=s.learning_rate, betas=(0.5, 0.999)) for one in pair]
    learnt, watched = split(len(patches))
    history, best = History(), None
    for number in range(s.rounds):
        losses = [gan_step(*pair, optimisers, drawn_patches(patches[learnt], s.batch_size, random), random, s.latent)
                  for _ in range(s.steps)]  # fmt: skip
        kept = patches[watched[:MOST_WATCHED]]
        _, curve = search(*pair, kept, replace(s, search_steps=WATCHED_STEPS), seed)
        train, judge = np.mean(losses, axis=0).tolist()
        history.rows.append({"epoch": number, "train": train, "discriminator": judge, "validation": curve[-1]})
        if history.best_epoch == number:
            best = {key: value.clone() for key, value in pair.state_dict().items()}
        if number - history.best_epoch >= s.patience:
            history.stopped_early = True
            break
    pair.load_state_dict(best)
    return *pair, history


def gan_step(generator, discriminator, optimisers, real: torch.Tensor, random, latent: int) -> tuple[float, float]:
    """One step of the discriminator, then one of the generator (non-saturating; Goodfellow et al., 2014, section 3):
    their losses."""
    drawn = generator(torch.randn(len(real), latent, generator=random))
    ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
    judged = discriminator(real), discriminator(drawn.detach())
    judge = sum(functional.binary_cross_entropy_with_logits(j, t) for j, t in zip(judged, (ones, zeros), strict=True))
    judge = step(optimisers[1], judge)
    fooled = functional.binary_cross_entropy_with_logits(discriminator(drawn), ones)
    return step(optimisers[0], fooled), judge


@one_thread()
def search(
    generator: nn.Module, discriminator: nn.Module, patches: torch.Tensor, settings: AnoGANSettings, seed: int
) -> tuple[torch.Tensor, list[float]]:
    """The nearest drawings to patches that a search of the codes finds, all patches at once, and the mean loss by step.

    Residual + 0.1 × difference of the discriminator's features; only the codes move.
    """
    s, random = settings, torch.Generator().manual_seed(seed)
    codes = torch.randn(len(patches), s.latent, generator=random).requires_grad_()
    optimiser, curve = torch.optim.Adam([codes], lr=s.search_rate), []
    with torch.no_grad():
        wanted = discriminator.features(patches)
    for _ in range(s.search_steps):
        drawn = generator(codes)
        far = (drawn - patches).abs().flatten(1).mean(dim=1)
        unlike = (discriminator.features(drawn) - wanted).abs().flatten(1).mean(dim=1)
        loss = (1 - FEATURE_WEIGHT) * far + FEATURE_WEIGHT * unlike
        (codes.grad,) = torch.autograd.grad(loss.sum(), [codes])  # the networks' weights get none
        optimiser.step()
        curve.append(loss.mean().item())
    with torch.inference_mode():
        return generator(codes), curve


def build_generator(channels: int, settings: AnoGANSettings) -> nn.Module:
    """Codes [patch, latent] → patches [patch, channel, 16, 16]."""
    w = settings.width
    return nn.Sequential(
        nn.Linear(settings.latent, 2 * w * 16), nn.Unflatten(1, (2 * w, 4, 4)), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, w, 3, padding=1), nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2), nn.Conv2d(w, w, 3, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(w, channels, 3, padding=1),
    )  # fmt: skip


class Discriminator(nn.Module):
    """Patches → logit of being real, [patch]; `features` are what it looks at, [patch, channel, 4, 4]."""

    def __init__(self, channels: int, settings: AnoGANSettings):
        super().__init__()
        w = settings.width
        self.features = nn.Sequential(
            nn.Conv2d(channels, w, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(w, 2 * w, 4, 2, 1), nn.LeakyReLU(0.2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(2 * w * 16, 1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(patches))[:, 0]


def halved(subject: PreparedSubject) -> tuple[torch.Tensor, torch.Tensor]:
    """A subject's slices at half the size, edges filled up to what networks can halve: float32 [slice, modality, row,
    column] and the brain, bool [slice, row, column]."""
    image = torch.from_numpy(subject.image.astype(np.float32).swapaxes(0, 1) * subject.brain[:, None])
    brain = torch.from_numpy(np.asarray(subject.brain, np.float32))[:, None]
    both = functional.avg_pool2d(torch.cat([image, brain], dim=1), 2)
    more = -both.shape[-1] % HALVINGS
    both = functional.pad(both, (0, more, 0, more))
    return both[:, :-1], both[:, -1] >= 0.5


def enlarged(values: torch.Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """A map [slice, row, column] of halved slices back at full size, float32, linear."""
    full = functional.interpolate(values[:, None], scale_factor=2, mode="bilinear")[:, 0]
    return full[:, : shape[1], : shape[2]].numpy()


def to_tiles(image: torch.Tensor) -> torch.Tensor:
    """Slices [slice, channel, row, column] cut into patches without overlap, [patch, channel, 16, 16]."""
    parts = image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return parts.permute(0, 2, 3, 1, 4, 5).reshape(-1, image.shape[1], PATCH, PATCH).contiguous()


def brain_tiles(image: torch.Tensor, brain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All patches of slices and which of them hold brain, bool [patch]."""
    return to_tiles(image), to_tiles(brain[:, None].float()).flatten(1).any(dim=1)


def from_tiles(patches: torch.Tensor, shape: torch.Size, seen: torch.Tensor) -> torch.Tensor:
    """The slices that patches were cut from, [slice, channel, row, column], 0 where a patch was not `seen`."""
    slices, channels, rows, columns = shape
    whole = patches.new_zeros(len(seen), *patches.shape[1:])
    whole[seen] = patches
    parts = whole.reshape(slices, rows // PATCH, columns // PATCH, channels, PATCH, PATCH)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def drawn_patches(patches: torch.Tensor, number: int, random: torch.Generator) -> torch.Tensor:
    """Patches by chance, all turned by the same quarter turns and flipped or not."""
    chosen = patches[torch.randint(len(patches), (number,), generator=random)]
    turns, flip = (int(torch.randint(n, (), generator=random)) for n in (4, 2))
    return chosen.rot90(turns, (2, 3)).flip([3] * flip)


def split(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to learn from and to watch."""
    places = torch.arange(number)
    return places[places % HELD_OUT > 0], places[places % HELD_OUT == 0]


def step(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> float:
    """One step down a loss, and its value."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.item()


def seeded(seed: int, build) -> nn.Module:
    """A network with initial weights of its own seed; the global one stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def _autoencoder(image: torch.Tensor, settings: AutoencoderSettings) -> nn.Module:
    shape = autoencoder.Settings(size=image.shape[-1], width=settings.width, code=settings.code)
    return autoencoder.Network(image.shape[1], shape)
