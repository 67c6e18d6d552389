"""AnoGAN: search the generator of healthy slices for the one most like a patient's; what is left over is the anomaly.

Schlegl et al., IPMI 2017. The search minimises, for each slice by itself, the difference of intensities and of the
discriminator's features. Here it starts from the most similar of many samples and moves along the generator's own axes,
which takes a fraction of the paper's steps. It cannot see lesions that some healthy slice resembles, and what the
generator cannot draw stays in the residual as well.
"""

from dataclasses import dataclass

import torch

from lib.errors import check_choice, check_least
from lib.models import gan
from lib.models.detector import residual
from lib.models.gan import Gan, Network, nearest, principal_axes

FEATURES = 0.1  # weight of the feature matching, λ of section 2.2
PAUSE = 10  # steps in which a search must gain ...
GAIN = 0.01  # ... this share of its loss, or it stops


@dataclass(frozen=True)
class Settings(gan.Settings):
    """`start`: of the search, "nearest" (of many samples) or "random"; `steps` of Adam along the axes at most, at
    `search_rate`; `restarts`: searches a slice, the best of which counts; the rest as in gan.Settings."""

    start: str = "nearest"
    steps: int = 500
    restarts: int = 1
    search_rate: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_choice("start", self.start, ("nearest", "random"))
        check_least("steps", self.steps, 0)
        check_least("restarts", self.restarts, 1)
        check_least("search_rate", self.search_rate, 0)


@dataclass
class Found:
    """The best of a search: `latent` [image, latent], `loss` and `steps` (to that loss) [image]; `curve`, the loss at
    every step [step, image], and `path`, the latent there [step, image, latent]; NaN once an image is done."""

    latent: torch.Tensor
    loss: torch.Tensor
    steps: torch.Tensor
    curve: torch.Tensor
    path: torch.Tensor


class AnoGan(Gan):
    """The searched residual; a slice's score is the loss where its search ends."""

    Settings = Settings
    _drawn: tuple = (None, None)

    def judge(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.search(image)
        expected = self.network.generator(found.latent).detach()
        return residual(image, expected, self.modalities, self.settings.residual), found.loss

    def expect(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.generator(self.search(image).latent).detach()

    def search(self, image: torch.Tensor) -> Found:
        """Search for all averaged slices [image, modality, row, column] at once, from every start."""
        s, count = self.settings, len(image)
        starts, repeated = self.starts(image), image.repeat(s.restarts, 1, 1, 1)
        found = search(self.network, repeated, starts, s.steps, s.search_rate, axes=self.drawn[2])
        best = found.loss.view(s.restarts, count).argmin(dim=0) * count + torch.arange(count, device=image.device)
        return Found(found.latent[best], found.loss[best], found.steps[best], found.curve[:, best], found.path[:, best])

    def starts(self, image: torch.Tensor) -> torch.Tensor:
        """Where the searches begin, [restarts × image, latent]; an image's own do not depend on the other images."""
        s = self.settings
        if s.start == "random":
            drawn = self.network.draw(s.restarts, torch.Generator().manual_seed(0))
            return drawn.repeat_interleave(len(image), dim=0)
        latents, samples, _ = self.drawn
        return latents[nearest(image, samples, s.restarts)[1].flatten()]

    @property
    def drawn(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, the slices drawn from them and the axes of both, the same for each network and device."""
        place = (self.network, self.device)
        if self._drawn[0] != place:
            latents, samples = self.network.samples()
            self._drawn = (place, (latents, samples, principal_axes(latents, samples)))
        return self._drawn[1]


def search_loss(network: Network, image: torch.Tensor, features: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """(1 − λ) × the mean absolute difference of a pixel + λ × that of a feature, one loss an image [image]."""
    drawn = network.generator(latent)
    pixels = (drawn - image).abs().flatten(1).mean(dim=1)
    matched = (network.discriminator.features(drawn) - features).abs().flatten(1).mean(dim=1)
    return (1 - FEATURES) * pixels + FEATURES * matched


@torch.enable_grad()
def search(
    network: Network, image: torch.Tensor, start: torch.Tensor, steps: int, rate: float, *,
    axes: torch.Tensor | None = None, goal: torch.Tensor | None = None, pause: int = PAUSE,
) -> Found:  # fmt: skip
    """Adam on the latent of every image [image, modality, row, column] at once, from `start` [image, latent].

    The loss is a sum of one loss an image and Adam works on each number by itself, so no image touches another. The
    numbers are the latent's own or, with orthonormal `axes` [latent, axis], those along them. An image leaves the batch
    when its best loss has not fallen by 1 % in `pause` steps, or has reached its `goal` [image].
    """
    axes = torch.eye(start.shape[1], device=start.device) if axes is None else axes
    turned = (start @ axes).requires_grad_()
    optimiser = torch.optim.Adam([turned], lr=rate)
    features = network.discriminator.features(image).detach()
    losses, path = torch.full((steps + 1, len(image)), torch.nan, device=image.device), []
    going = torch.arange(len(image), device=image.device)
    for step in range(steps + 1):
        latent = turned @ axes.T
        loss = search_loss(network, image[going], features[going], latent[going])
        losses[step, going] = loss.detach()
        path.append(latent.detach())
        going_on = going[_goes_on(losses[: step + 1, going], goal if goal is None else goal[going], pause)]
        if step == steps or not len(going_on):
            break
        optimiser.zero_grad(set_to_none=True)
        loss.sum().backward(inputs=[turned])
        optimiser.step()
        going = going_on
    return _best(losses[: step + 1], torch.stack(path))


def _goes_on(losses: torch.Tensor, goal: torch.Tensor | None, pause: int) -> torch.Tensor:
    """Which searches are worth another step, bool [image], by their losses [step, image] so far."""
    best = losses.amin(dim=0)
    wanted = best > (0 if goal is None else goal)
    if len(losses) <= pause:
        return wanted
    return wanted & (best < (1 - GAIN) * losses[:-pause].amin(dim=0))


def _best(losses: torch.Tensor, path: torch.Tensor) -> Found:
    loss, step = losses.nan_to_num(torch.inf).min(dim=0)
    latent = path[step, torch.arange(len(loss), device=loss.device)]
    return Found(latent, loss, step, losses, torch.where(losses[..., None].isnan(), torch.nan, path))
