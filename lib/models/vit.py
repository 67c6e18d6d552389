"""Vision transformers on slices: context dropout as it is often done, and with patches that are truly hidden.

`vit_context_dropout` drops tokens in training and sees the whole slice at test: a token has as many numbers as a patch
has pixels, so nothing stops it copying a lesion. `vit_masked` is after masked autoencoders (He et al., CVPR 2022), with
a decoder in which hidden patches ask the visible ones (Fu et al., CrossMAE, 2024) and complementary masks at test: no
patch takes part in its own prediction. (MONAI's MaskedAutoEncoderViT draws its mask itself, so its masks cannot
complement each other.) It cannot see a lesion that is many patches wide and even: what is around a patch tells it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lib.errors import CourseError, check_choice, check_least
from lib.models import unet
from lib.models.detector import residual
from lib.training import Batch, Forward

MIDDLE, SPREAD = (
    0.5,
    0.2,
)  # of prepared intensities inside a brain, about; what a network sees and tells is scaled by it
WIDEN = 2  # hidden numbers of a feed-forward layer, in dims
LONGEST = 32  # patches to half a wave of the slowest position code
ASKING = 2  # decoder layers


@dataclass(frozen=True)
class Settings:
    """`patch`: its side in pixels; `dim`: numbers a token, a multiple of 4 and of `heads`; `depth`: layers of the
    encoder; `heads`: attention heads a layer; `dropout`: share of tokens dropped, or of patches hidden; `residual`:
    "signed" or "absolute"; `steps`: as in unet.Settings; the rest as in training.Plan."""

    patch: int = 16
    dim: int = 256
    depth: int = 4
    heads: int = 8
    dropout: float = 0.2
    residual: str = "signed"
    epochs: int = 20
    steps: int = 32
    batch_size: int = 8
    learning_rate: float = 1e-3
    patience: int = 8

    def __post_init__(self):
        for name in ("patch", "dim", "depth", "heads"):
            check_least(name, getattr(self, name), 1)
        if self.dim % 4 or self.dim % self.heads:
            raise CourseError(f"dim is {self.dim}.", f"Give a multiple of 4 and of heads, which is {self.heads}.")
        if not 0 < self.dropout < 1:
            raise CourseError(f"dropout is {self.dropout}.", "Give a share above 0 and below 1.")
        check_choice("residual", self.residual, ("signed", "absolute"))


@dataclass(frozen=True)
class MaskedSettings(Settings):
    """`partitions`: random partitions of a slice into masks at test, each of which predicts every patch. `dropout`
    becomes the nearest share that complementary masks can have: 1/2, or 1/n or 1 − 1/n for a whole n."""

    patch: int = 8
    dim: int = 128
    dropout: float = 0.5
    partitions: int = 2

    def __post_init__(self):
        super().__post_init__()
        check_least("partitions", self.partitions, 1)


class Network(nn.Module):
    """Every token, dropped ones as zeros, through the encoder; each then tells its patch. The output has no bounds."""

    def __init__(self, channels: int, settings: Settings):
        super().__init__()
        self.settings, numbers = settings, channels * settings.patch**2
        self.embed = nn.Linear(numbers, settings.dim)
        self.encoder = _encoder(settings)
        self.tell = nn.Linear(settings.dim, numbers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        s, (padded, edges) = self.settings, pad(image, self.settings.patch)
        tokens = self.embed(scaled(patches(padded, s.patch))) + positions(padded, s)
        if self.training:
            tokens = tokens * (torch.rand(*tokens.shape[:2], 1) >= s.dropout).to(image.device)
        told = MIDDLE + SPREAD * self.tell(self.encoder(tokens))
        return cut(unpatch(told, padded.shape, s.patch), edges)


class MaskedNetwork(nn.Module):
    """Visible patches through the encoder; hidden ones, of which it knows the position alone, ask them.

    It sees [batch, modality + 1, row, column]: slices and, last, 1 where a pixel is hidden: whole patches, as many in
    every slice of the batch. It returns [batch, modality, row, column], 0 where nothing is hidden.
    """

    def __init__(self, channels: int, settings: MaskedSettings):
        super().__init__()
        self.settings, numbers = settings, channels * settings.patch**2
        self.embed = nn.Linear(numbers, settings.dim)
        self.mask_token = nn.Parameter(torch.zeros(settings.dim))
        self.encoder = _encoder(settings)
        self.asking = nn.ModuleList([Asking(settings.dim, settings.heads) for _ in range(ASKING)])
        self.tell = nn.Sequential(nn.LayerNorm(settings.dim), nn.Linear(settings.dim, numbers))

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        hidden, asking, answers = self._encode(seen)
        for layer in self.asking:
            asking = layer(asking, answers)
        told = MIDDLE + SPREAD * self.tell(asking)
        drawn = torch.zeros(*hidden.shape, told.shape[-1], dtype=told.dtype, device=told.device)
        drawn[hidden] = told.flatten(0, 1)
        return unpatch(drawn, seen[:, :-1].shape, self.settings.patch)

    def attention(self, seen: torch.Tensor) -> torch.Tensor:
        """How much each hidden patch takes from each visible one, mean over heads and decoder layers: [batch, hidden
        patch, visible patch], both in reading order; each row adds up to 1."""
        _, asking, answers = self._encode(seen)
        weights = []
        for layer in self.asking:
            weights.append(layer.attend(asking, answers, weights=True)[1])
            asking = layer(asking, answers)
        return torch.stack(weights).mean(dim=0)

    def _encode(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which patches are hidden, bool [batch, patch]; their tokens; and those of the visible ones, encoded."""
        s, image = self.settings, seen[:, :-1]
        hidden, places = hidden_patches(seen, s.patch), positions(image, s)
        tokens = scaled(patches(image, s.patch))[~hidden].unflatten(0, (len(seen), -1))
        places = places.expand(len(seen), -1, -1)
        where = [places[which].unflatten(0, (len(seen), -1)) for which in (hidden, ~hidden)]
        return hidden, self.mask_token + where[0], self.encoder(self.embed(tokens) + where[1])


class Asking(nn.Module):
    """A decoder layer: tokens [batch, token, dim] take from encoded ones [batch, other token, dim], never from each
    other."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.forth = nn.Sequential(nn.Linear(dim, WIDEN * dim), nn.GELU(), nn.Linear(WIDEN * dim, dim))

    def attend(self, asking: torch.Tensor, answers: torch.Tensor, *, weights: bool = False):
        """What is taken, and with `weights` from which token, mean over heads."""
        return self.cross(self.before(asking), answers, answers, need_weights=weights)

    def forward(self, asking: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        asking = asking + self.attend(asking, answers)[0]
        return asking + self.forth(self.after(asking))


class ContextDropout(unet.UNetDetector):
    """Trained to return healthy slices, squared error over all pixels, while a share of its tokens, position code and
    all, is dropped; at test it is given every token and returns what it is given, whatever that is."""

    Settings = Settings
    family = "transformer"

    def build(self) -> nn.Module:
        return Network(len(self.modalities), self.settings)

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        return batch

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Squared error over the whole square."""
        return functional.mse_loss(forward(batch["image"]), batch["image"])

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        return residual(image, self.reconstruct(image), self.modalities, self.settings.residual)


class Masked(ContextDropout):
    """Trained to tell hidden patches from visible ones; at test every patch is told from others alone, and the residual
    is that of the mean over random partitions, every other one on a grid that is shifted by half a patch."""

    Settings = MaskedSettings

    def build(self) -> nn.Module:
        return MaskedNetwork(len(self.modalities), self.settings)

    def corrupt(self, batch: Batch, random: torch.Generator, split: str) -> Batch:
        """Random patches hidden, each slice by chance, all of a batch on one of the two grids."""
        s = self.settings
        image, edges = pad(batch["image"], s.patch, shifted=bool(torch.rand(1, generator=random) < 0.5))
        grid = image.shape[-1] // s.patch
        ranks = torch.rand(len(image), grid**2, generator=random).argsort(dim=1).argsort(dim=1)
        hidden = (ranks < round(share_hidden(s.dropout) * grid**2)).to(image.device)
        seen = hide(image, hidden, s.patch)
        brain = functional.pad(batch["brain"], edges)[:, None]
        return batch | {"seen": seen, "target": image, "counted": brain & (seen[:, -1:] > 0)}

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Squared error of the hidden patches inside the brain."""
        wrong = (forward(batch["seen"]) - batch["target"]).square().mean(dim=1, keepdim=True)
        return wrong[batch["counted"]].mean()

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        s, random, total = self.settings, torch.Generator().manual_seed(0), torch.zeros_like(image)
        for number in range(s.partitions):
            padded, edges = pad(image, s.patch, shifted=number % 2 == 1)
            masks = partition((padded.shape[-1] // s.patch) ** 2, s.dropout, random)
            drawn, counted = torch.zeros_like(padded), torch.zeros_like(padded[:1, :1])
            for mask in masks.to(image.device):
                seen = hide(padded, mask.expand(len(image), -1), s.patch)
                drawn += self.forward(seen)
                counted += seen[:1, -1:]
            total += cut(drawn / counted, edges)
        return total / s.partitions


def scaled(tokens: torch.Tensor) -> torch.Tensor:
    """Intensities of about mean 0 and standard deviation 1; else the position code, of that size, drowns them."""
    return (tokens - MIDDLE) / SPREAD


def share_hidden(dropout: float) -> float:
    """The share of hidden patches that complementary masks can have and that is next to `dropout`."""
    few = 1 / round(1 / min(dropout, 1 - dropout))
    return few if dropout <= 0.5 else 1 - few


def partition(count: int, dropout: float, random: torch.Generator) -> torch.Tensor:
    """Complementary masks over `count` patches, bool [mask, patch], true where hidden: with a share up to a half each
    patch is hidden in one of them, with a larger one it is visible in one of them."""
    parts = min(round(1 / min(dropout, 1 - dropout)), count)
    of_part = torch.randperm(count, generator=random) % parts
    chosen = of_part == torch.arange(parts)[:, None]
    return chosen if dropout <= 0.5 else ~chosen


def hide(image: torch.Tensor, hidden: torch.Tensor, patch: int) -> torch.Tensor:
    """What a MaskedNetwork sees of slices [batch, modality, row, column] when patches are `hidden`, bool [batch,
    patch]: 0 there, and the mask as a further channel."""
    mask = unpatch(hidden[..., None].float().expand(-1, -1, patch**2), image[:, :1].shape, patch)
    return torch.cat([image * (1 - mask), mask], dim=1)


def hidden_patches(seen: torch.Tensor, patch: int) -> torch.Tensor:
    """The patches that `hide` hid, bool [batch, patch]."""
    return seen[:, -1, ::patch, ::patch].flatten(1) > 0


def pad(image: torch.Tensor, patch: int, shifted: bool = False) -> tuple[torch.Tensor, list[int]]:
    """Slices [..., row, column] with zeros around them, to the next multiple of the patch; `shifted`: half a patch more
    on every side, so that the grid of patches shifts. Second, how much was put left, right, below and above."""
    room = -image.shape[-1] % patch + patch * shifted
    edges = [room // 2, room - room // 2] * 2
    return functional.pad(image, edges), edges


def cut(image: torch.Tensor, edges: list[int]) -> torch.Tensor:
    """Take away what `pad` put on."""
    return functional.pad(image, [-edge for edge in edges])


def patches(image: torch.Tensor, patch: int) -> torch.Tensor:
    """Square slices [batch, modality, row, column] as patches in reading order, [batch, patch, number]."""
    return functional.pixel_unshuffle(image, patch).flatten(2).transpose(1, 2)


def unpatch(tokens: torch.Tensor, shape: torch.Size, patch: int) -> torch.Tensor:
    """Slices of a `shape` from their patches."""
    grid = (shape[-2] // patch, shape[-1] // patch)
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch)


def positions(image: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Sines and cosines of each patch's row and column, counted from the middle of the slice, [patch, dim]: a shifted
    grid has the codes of the places in between."""
    grid = image.shape[-1] // settings.patch
    place = torch.arange(grid, device=image.device) - (grid - 1) / 2
    waves = math.pi * LONGEST ** -torch.linspace(0, 1, settings.dim // 4, device=image.device)
    angle = place[:, None] * waves
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _encoder(s: Settings) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        s.dim, s.heads, WIDEN * s.dim, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, s.depth, norm=nn.LayerNorm(s.dim), enable_nested_tensor=False)
