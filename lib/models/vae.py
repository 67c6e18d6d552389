"""The variational autoencoder: a code for healthy slices that is a distribution, and two ways to use it.

After Kingma and Welling, ICLR 2014; its residual as in Baur et al., Medical Image Analysis 69 (2021), and restoration
as in You et al., MIDL 2019, and Chen et al., Medical Image Analysis 64 (2020). It cannot see lesions that its blurred
drawing does not part from healthy tissue, and the distance of a code tells first how high in the head a slice lies.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from lib.cohort import Cohort
from lib.errors import check_choice, check_least
from lib.lesions import KEPT_OUT, paint
from lib.models import autoencoder
from lib.models.autoencoder import HALVINGS, Autoencoder, squeeze
from lib.models.detector import MAP_BATCH
from lib.training import Batch, Forward, History, batch_of, derived_seed

ACTIVE = 0.01  # nats, the mean KL on healthy slices above which a unit of the code is in use
TV_WEIGHTS = (10.0, 30.0, 100.0, 300.0)  # nats for a step of 1 in intensity between two pixels
JUDGED = 8  # healthy validation slices by which one of these is chosen
RATE = 0.02  # Adam's step in restoring, in units of the prepared intensity
SLOPE = 1.0  # nats for a step of 1 in intensity; a pixel with a gradient below it moves less


@dataclass(frozen=True)
class Settings(autoencoder.Settings):
    """`sigma`: standard deviation of a pixel around its drawing, in units of the prepared intensity; `warm_up`: steps
    in which the weight of the KL grows from 0 to 1; the rest as in autoencoder.Settings."""

    bottleneck: str = "dense"
    sigma: float = 0.1
    warm_up: int = 100

    def __post_init__(self):
        super().__post_init__()
        check_choice("loss", self.loss, ("l2",))
        check_least("sigma", self.sigma, 1e-3)
        check_least("warm_up", self.warm_up, 1)


class Network(autoencoder.Network):
    """The autoencoder's network with a Gaussian for each number of the code: drawn from it in training, its mean after.

    It returns slices with one channel more [batch, modality + 1, row, column]: the KL divergence of the code from a
    standard normal one, in nats, spread evenly over the pixels and in training weighted by the warm-up.
    """

    def __init__(self, channels: int, settings: Settings):
        super().__init__(channels, settings)
        self.warm_up = settings.warm_up
        both = replace(settings, code=2 * settings.code)
        self.encoder[-1] = squeeze(4 * settings.width, settings.size // HALVINGS, both)
        self.register_buffer("step", torch.zeros(()))

    def code(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of each number, both [batch, …]."""
        return self.encoder(image).float().chunk(2, dim=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean, log_variance = self.code(image)
        kl = divergence(mean, log_variance).flatten(1).sum(dim=1)
        if self.training:
            self.step += 1
            kl = kl * (self.step / self.warm_up).clamp(max=1)
            mean = mean + torch.exp(log_variance / 2) * torch.randn(mean.shape).to(mean.device)
        drawn = self.decoder(mean)
        spread = (kl / drawn[0, 0].numel())[:, None, None, None].expand(-1, 1, *drawn.shape[2:])
        return torch.cat([drawn.float(), spread], dim=1)


class VariationalAutoencoder(Autoencoder):
    """Trained on the evidence lower bound (ELBO); the anomaly is the residual of the drawing of the mean code."""

    Settings = Settings
    learns_as = "vae"

    def build(self) -> Network:
        return Network(len(self.modalities), self.settings)

    @property
    def task(self) -> tuple:
        return (self.settings.sigma, self.settings.warm_up)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The negative ELBO of a slice. Validation takes the mean code, so that it is the same every time."""
        return self.negative_elbo(forward, batch["image"]).mean()

    def negative_elbo(self, forward: Forward, image: torch.Tensor) -> torch.Tensor:
        """−log p(image | code) + KL, in nats [batch] and up to a constant: both are sums, over pixels and over code."""
        drawn, kl = forward(image).split([len(self.modalities), 1], dim=1)
        wrong = (image - drawn).square().flatten(1).sum(dim=1)
        return wrong / (2 * self.settings.sigma**2) + kl.flatten(1).sum(dim=1)

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        return self.forward(image)[:, : len(self.modalities)]

    @torch.inference_mode()
    def codes(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means of the codes of slices [slice, modality, row, column], and the KL of each number in nats: both float32
        [slice, number]."""
        self.network.eval()
        parts = [
            self.network.code(torch.from_numpy(images[i : i + MAP_BATCH].astype(np.float32)).to(self.device))
            for i in range(0, len(images), MAP_BATCH)
        ]
        mean, log_variance = (torch.cat(ones).flatten(1).cpu() for ones in zip(*parts, strict=True))
        return mean.numpy(), divergence(mean, log_variance).numpy()

    @torch.inference_mode()
    def draw(self, codes: np.ndarray) -> np.ndarray:
        """Slices [slice, modality, row, column] of codes [slice, number]."""
        self.network.eval()
        s, side = self.settings, self.settings.size // HALVINGS
        shape = (-1, 8 * s.code) if s.bottleneck == "dense" else (-1, s.code, side, side)
        return self.network.decoder(torch.from_numpy(codes).reshape(shape).to(self.device)).cpu().numpy()


@dataclass(frozen=True)
class RestorationSettings(Settings):
    """`restore_steps`: of gradient descent on a slice; the rest as in Settings."""

    restore_steps: int = 20

    def __post_init__(self):
        super().__post_init__()
        check_least("restore_steps", self.restore_steps, 1)


class Restoration(VariationalAutoencoder):
    """Moves a slice to where the ELBO is higher, and no more than total variation allows; the anomaly is what moved.

    The weight of the total variation is the one under which lesions of families that no network is taught, painted on
    healthy validation slices, are found best. The rule of Chen et al. 2020, least change of healthy slices, has no
    answer between the extremes here: the larger the weight, the less changes.
    """

    Settings = RestorationSettings
    tv_weight: torch.Tensor
    weights: dict[float, tuple[float, float]]  # what `fit` chose from

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        """Train, or take the training that `vae` of equal settings has left in `out`; then choose the weight."""
        history = super().fit(cohort, out=out, device=device, resume=resume, seed=seed)
        self.weights = self.weighed(cohort, seed)
        self.tv_weight = torch.tensor(max(self.weights, key=lambda weight: self.weights[weight][0]))
        return history

    def weighed(self, cohort: Cohort, seed: int) -> dict[float, tuple[float, float]]:
        """By weight: average precision on painted lesions, and the mean change of the same slices without them."""
        self.network.eval()
        watched = cohort.slices("validation")
        few = batch_of(watched, list(range(0, len(watched), -(-len(watched) // JUDGED))), self.device)
        random = torch.Generator().manual_seed(derived_seed(seed, "total variation"))
        painted, share = paint(few["image"], few["brain"], self.modalities, KEPT_OUT, random)
        brain, truth, table = few["brain"], (share[few["brain"]] > 0.5).cpu(), {}
        for weight in TV_WEIGHTS:
            self.tv_weight = torch.tensor(weight)
            found = self.anomaly(painted, brain)[brain].cpu()
            changed = (self.reconstruct(few["image"]) - few["image"]).abs().mean(dim=1)[brain]
            table[weight] = float(average_precision_score(truth, found)), float(changed.mean())
        return table

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        """Restored slices, same shape; those without anything in them stay as they are."""
        result, there = image.clone(), image.flatten(1).any(dim=1)
        if there.any():
            result[there] = self.restored(image[there])[-1]
        return result

    @torch.inference_mode(False)
    @torch.enable_grad()
    def restored(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Slices [batch, modality, row, column] after each step; no slice touches another."""
        image, path = image.clone(), []  # a clone may be differentiated where the image may not
        now = image.clone().requires_grad_()
        optimiser = torch.optim.Adam([now], lr=RATE, eps=SLOPE)
        for _ in range(self.settings.restore_steps):
            cost = self.negative_elbo(self.forward, now).sum() + self.tv_weight * total_variation(now - image)
            (now.grad,) = torch.autograd.grad(cost, now)
            optimiser.step()
            path.append(now.detach().clone())
        return path

    def state(self) -> dict[str, torch.Tensor]:
        return super().state() | {"tv_weight": self.tv_weight}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.tv_weight = state["tv_weight"]
        super().restore({key: value for key, value in state.items() if key != "tv_weight"})


def total_variation(image: torch.Tensor) -> torch.Tensor:
    """Sum of the absolute differences between neighbours in a column and in a row."""
    return image.diff(dim=-2).abs().sum() + image.diff(dim=-1).abs().sum()


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats of a Gaussian from the standard normal one, number by number (Kingma and Welling 2014,
    appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def active(kl: np.ndarray) -> int:
    """How many units of the code are in use, by their KL on healthy slices [slice, number] (after Burda et al., ICLR
    2016); the others draw nothing."""
    return int((kl.mean(axis=0) > ACTIVE).sum())
