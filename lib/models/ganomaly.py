"""GANomaly: encode, redraw, encode again; what is not healthy comes back with another code.

Akcay et al., ACCV 2018, section 3. Codes are compared, so the method was made to score a slice, not to say where in it
the anomaly lies; its map is the residual. A slice whose redrawing is bad but has the right code goes unnoticed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lib.adversarial import Players
from lib.cohort import Cohort
from lib.models import gan
from lib.models.detector import residual
from lib.models.gan import AdversarialDetector, Discriminator, Encoder, Generator
from lib.training import History

ADVERSARIAL, CONTEXTUAL, LATENT = 1.0, 50.0, 1.0  # weights of the three losses, section 4.2


@dataclass(frozen=True)
class Settings(gan.Settings):
    """As in gan.Settings."""

    epochs: int = 12


class Redrawer(nn.Module):
    """Encoder, decoder, and a second encoder of its own."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.encoder = Encoder(channels, settings)
        self.decoder = Generator(channels, settings)
        self.second = Encoder(channels, settings)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The code [batch, latent] of slices, what is redrawn from it, and the code of that."""
        code = self.encoder(image)
        drawn = self.decoder(code)
        return code, drawn, self.second(drawn)


class Network(Players):
    """Redrawer and discriminator, with the three losses of the paper."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.generator = Redrawer(channels, settings)
        self.discriminator = Discriminator(channels, settings)

    def invent(self, images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        return self.generator(images)[1]

    def discriminator_loss(
        self, real: torch.Tensor, fake: torch.Tensor, step: int, random: torch.Generator
    ) -> torch.Tensor:
        """Binary cross-entropy: real slices are 1, redrawn ones 0."""
        scores = self.discriminator(real), self.discriminator(fake)
        return (functional.softplus(-scores[0]) + functional.softplus(scores[1])).mean() / 2

    def generator_losses(self, real: torch.Tensor, random: torch.Generator) -> dict[str, torch.Tensor]:
        code, drawn, again = self.generator(real)
        features = self.discriminator.features
        return {
            "adversarial": ADVERSARIAL * functional.mse_loss(features(drawn), features(real)),
            "contextual": CONTEXTUAL * functional.l1_loss(drawn, real),
            "latent": LATENT * functional.mse_loss(again, code),
        }

    def validation(self, images: torch.Tensor) -> float:
        """The sum of the three losses."""
        return sum(self.generator_losses(images, torch.Generator()).values()).item()


class Ganomaly(AdversarialDetector):
    """The residual of the redrawn slice; a slice's score is the mean squared distance of its two codes, as it is: the
    paper scales it by the scores of the test set, which is not for whoever judges one scan at a time to know."""

    Settings = Settings

    def build(self) -> Network:
        return Network(len(self.modalities), self.settings)

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        self.prepare(cohort, device, seed)
        return self.play(self.network, cohort, out, resume, seed)

    @torch.no_grad()
    def expect(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.generator(image)[1]

    @torch.no_grad()
    def judge(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code, drawn, again = self.network.generator(image)
        found = residual(image, drawn, self.modalities, self.settings.residual)
        return found, (again - code).square().mean(dim=1)
