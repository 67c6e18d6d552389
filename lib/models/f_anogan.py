"""f-AnoGAN: an encoder learns where in the generator's space a healthy slice lies; one pass replaces the search.

Schlegl et al., Medical Image Analysis 54 (2019), section 2.2. It shares the blindness of AnoGAN; and the encoder, too,
never saw a lesion, so what it answers to one is anybody's guess.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from lib.cohort import Cohort
from lib.errors import check_choice, check_least
from lib.models import gan
from lib.models.detector import residual
from lib.models.gan import AdversarialDetector, Encoder, Network, small
from lib.training import Batch, Forward, History, Plan, derived_seed, train

FEATURES = 1.0  # weight of the feature matching, κ of equation 5


@dataclass(frozen=True)
class Settings(gan.Settings):
    """`loss` of the encoder: "izi" (slice to latent to slice) or "izi_f" (the discriminator's features as well);
    `encoder_epochs` and `encoder_rate` as in training.Plan; the rest as in gan.Settings."""

    loss: str = "izi_f"
    encoder_epochs: int = 8
    encoder_rate: float = 2e-3

    def __post_init__(self):
        super().__post_init__()
        check_choice("loss", self.loss, ("izi", "izi_f"))
        check_least("encoder_epochs", self.encoder_epochs, 1)
        check_least("encoder_rate", self.encoder_rate, 0)


class FAnoGan(AdversarialDetector):
    """The residual of one pass through encoder and generator; a slice's score is the encoder's loss."""

    Settings = Settings
    learns_as = "gan"

    def build(self) -> nn.ModuleDict:
        channels, s = len(self.modalities), self.settings
        return nn.ModuleDict({"players": Network(channels, s), "encoder": Encoder(channels, s)})

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        """Train the GAN, or take it from the run, then the encoder while both players stay as they are."""
        self.prepare(cohort, device, seed)
        players, s = self.network["players"], self.settings
        played = self.play(players, cohort, out, resume, seed)
        players.requires_grad_(False)
        plan = Plan(s.encoder_epochs, s.batch_size, s.encoder_rate, s.patience)
        history = train(
            self.network["encoder"], self.loss, cohort, plan, checkpoint=out / f"{self.name}.checkpoint",
            seed=derived_seed(seed, self.name, asdict(s)), device=self.device, resume=resume,
        )  # fmt: skip
        history.warnings = played.warnings
        self.to(device)
        return history

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Equation 4 (izi) or 5 (izi_f) of the paper, mean over a batch of whole slices."""
        image = small(batch["image"], self.settings.shrink)
        return self.compare(image, self.network["players"].generator(forward(image))).mean()

    def compare(self, image: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Mean squared difference of pixels, with izi_f also of the discriminator's features; one an image [image]."""
        pixels = (image - drawn).square().flatten(1).mean(dim=1)
        if self.settings.loss == "izi":
            return pixels
        features = self.network["players"].discriminator.features
        return pixels + FEATURES * (features(image) - features(drawn)).square().flatten(1).mean(dim=1)

    @torch.no_grad()
    def expect(self, image: torch.Tensor) -> torch.Tensor:
        return self.network["players"].generator(self.network["encoder"](image))

    @torch.no_grad()
    def judge(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expected = self.expect(image)
        found = residual(image, expected, self.modalities, self.settings.residual)
        return found, self.compare(image, expected)
