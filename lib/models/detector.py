"""What every detector is: fitted on healthy slices, it turns a subject into an anomaly map."""

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError
from lib.training import Forward, History, choose_device, mixed_precision, place, present
from lib.volumes import write_bytes

HIGHEST = 0.01  # share of a slice's brain whose mean is the slice's score
MAP_BATCH = 96
LESION_SIGN = {"FLAIR": 1, "T2": 1, "PD": 1, "T1": -1}  # bright or dark; elsewhere lesions are both


@dataclass(frozen=True)
class NoSettings:
    """For a detector that has nothing to set."""


class Detector(ABC):
    """A method by `name` for the given `modalities`; `settings` is a frozen dataclass of its class's `Settings`."""

    Settings = NoSettings
    family = "baseline"

    def __init__(self, name: str, modalities: tuple[str, ...], settings=None):
        self.name = name
        self.modalities = modalities
        self.settings = settings or self.Settings()

    def fit(self, cohort: Cohort, *, out: Path, device: str = "auto", resume: bool = True, seed: int = 0) -> History:
        """Learn from the healthy slices of train, watch those of validation; checkpoints go to the folder `out`."""
        return History()

    @abstractmethod
    def maps(self, subject: PreparedSubject) -> np.ndarray:
        """Anomaly maps, float32 [slice, row, column]; higher is more anomalous, 0 outside the brain."""

    def slice_scores(self, subject: PreparedSubject, maps: np.ndarray) -> np.ndarray:
        """One score a slice, float32 [slice]: the mean of the highest 1 % of its brain, 0 without brain."""
        return highest_means(maps, subject.brain)

    def state(self) -> dict[str, torch.Tensor]:
        """What was learnt, by name."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Take back what `state` gave."""

    def save(self, path: Path) -> None:
        """Write one file of safe tensors, with name, modalities and settings as JSON inside; never a pickle."""
        about = {"name": self.name, "modalities": self.modalities, "settings": asdict(self.settings)}
        state = {key: value.contiguous() for key, value in self.state().items()}
        write_bytes(path, save(state, {"detector": json.dumps(about)}))


class NetworkDetector(Detector):
    """A detector that looks through `self.network`."""

    network: torch.nn.Module | None = None
    device = torch.device("cpu")
    learns_as = ""  # the detector whose training it shares, if it is another's

    @property
    def training(self) -> str:
        """The name of its training, once for all that share it in a run and seed: "gan@1" for "anogan@1"."""
        method, at, seed = self.name.partition("@")
        return (self.learns_as or method) + at + seed

    def build(self) -> torch.nn.Module:
        """A new network for these settings."""
        raise NotImplementedError

    @property
    def forward(self) -> Forward:
        """The network's call, in mixed precision where that helps."""
        return mixed_precision(self.network, self.device)

    def state(self) -> dict[str, torch.Tensor]:
        return {key: value.detach().cpu() for key, value in self.network.state_dict().items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.network = self.build()
        self.network.load_state_dict(state)
        self.to("auto")

    def to(self, device: str) -> None:
        """Move the network to a device by name; `auto` takes the best there is."""
        self.device = choose_device(device)
        place(self.network, self.device)


class SliceDetector(NetworkDetector):
    """A detector that looks at one slice at a time."""

    def anomaly(self, image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
        """Anomaly of a batch, [batch, row, column], of `image` [batch, modality, row, column] and `brain` bool."""
        raise NotImplementedError

    @torch.inference_mode()
    def maps(self, subject: PreparedSubject) -> np.ndarray:
        self.network.eval()
        result = np.zeros(subject.brain.shape, np.float32)
        for start in range(0, len(result), MAP_BATCH):
            part = slice(start, start + MAP_BATCH)
            image = torch.from_numpy(subject.image[:, part].swapaxes(0, 1).astype(np.float32)).to(self.device)
            brain = torch.from_numpy(np.array(subject.brain[part])).to(self.device)
            result[part] = (self.anomaly(image, brain) * brain).cpu().numpy()
        return result

    def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
        """What the network makes of slices [batch, modality, row, column], same shape and units."""
        return self.forward(image)

    @torch.inference_mode()
    def redraw(self, subject: PreparedSubject, number: int) -> np.ndarray:
        """The healthy slice that the network expects in place of one, float32 [modality, row, column]."""
        self.network.eval()
        image = torch.from_numpy(subject.image[:, number].astype(np.float32))[None]
        return self.reconstruct(image.to(self.device))[0].cpu().numpy() * subject.brain[number]


def highest_means(maps: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The mean of the highest 1 % of each slice's brain, 0 without brain: [slice, row, column] → float32 [slice]."""
    scores = np.zeros(len(maps), np.float32)
    for i, (one, inside) in enumerate(zip(maps, brain, strict=True)):
        if inside.any():
            values = np.sort(one[inside])
            scores[i] = values[-max(1, round(HIGHEST * len(values))) :].mean()
    return scores


def residual(image: torch.Tensor, expected: torch.Tensor, modalities: tuple[str, ...], kind: str) -> torch.Tensor:
    """What an image has beyond the healthy one expected, mean over modalities: [batch, row, column], ≥ 0.

    Both [batch, modality, row, column], or volumes with one axis more. `kind` "absolute", or "signed": only the side on
    which lesions lie in a modality (bright in FLAIR, T2 and PD, dark in T1), after Baur et al. 2021. A modality that is
    missing has none.
    """
    there = present(image)
    left = (image - expected) * there
    signs = [0 if kind == "absolute" else LESION_SIGN.get(m, 0) for m in modalities]
    sides = [(left[:, i] * sign).clamp(min=0) if sign else left[:, i].abs() for i, sign in enumerate(signs)]
    return torch.stack(sides).sum(dim=0) / there.sum(dim=1).clamp(min=1)


def read_file(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a saved detector."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["detector"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        cure = "Run the notebook that trains it again, with --overwrite."
        raise CourseError(f"{path} holds no whole detector.", cure) from error
