"""What a search in the generator's space costs: `python -m benchmarks.latent_search`.

Healthy test slices of the embedded cohort in a generator trained for the purpose. First the plain search of the paper,
Adam at a fixed rate for a fixed number of steps from random numbers, one slice after the other; then the same searches
all at once. The other ways, all at once too, differ in the start, in moving along the generator's axes as the detector
does, or in both. A slice leaves them as soon as its loss is as low as the plain search made it (`as_good`: the share
that is, within 1 %), or when it no longer gains, after as many steps at most. Last, one pass of the encoder. The
samples among which the nearest is sought, and the axes, are made beforehand, as for a whole test set
(`prepared_seconds`). Seconds are of this machine; look at the ratios.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lib import cohort, intake, models, preparation
from lib.models.anogan import Found, Settings, search
from lib.models.gan import nearest, principal_axes, small
from lib.preprocessing import Recipe

BATCH, SHRINK = 32, 2
RATE = 0.1  # of the plain search
OWN_RATE = Settings().search_rate  # along the axes, as the detector's
NEVER, STUCK = 10**9, 30  # steps without gain after which to stop: the plain search, the others
SAME = 1.01  # a loss is as good as another up to this factor
QUICK = {"epochs": 8, "steps": 100}
WHOLE = {"epochs": 20, "steps": 300}


def prepared() -> cohort.Cohort:
    """The embedded cohort of the course's default run."""
    gathered = intake.gather("", modalities="FLAIR", healthy=24, patients=16)
    return cohort.open_cohort(preparation.prepare_cohort(gathered, Recipe()))


def timed(call) -> tuple[float, object]:
    """Seconds and result of a call; the best of the two it is made."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def one_at_a_time(network, images: torch.Tensor, starts: torch.Tensor, steps: int) -> torch.Tensor:
    """Losses [image] of searches one after the other."""
    pairs = zip(images.split(1), starts.split(1), strict=True)
    return torch.cat([search(network, image, start, steps, RATE, pause=NEVER).loss for image, start in pairs])


def at_once(network, images: torch.Tensor, starts: torch.Tensor, steps: int) -> Found:
    """The same searches in one batch, to the end."""
    return search(network, images, starts, steps, RATE, pause=NEVER)


def to_goal(detector, images: torch.Tensor, steps: int, goal: torch.Tensor, drawn) -> dict:
    """The ways that leave each image at its goal, or where it gains nothing; `drawn` as from `sampled`."""
    players, encoder = detector.network["players"], detector.network["encoder"]
    latents, samples, axes = drawn
    starts = {
        "random": lambda: players.draw(len(images), torch.Generator().manual_seed(0)),
        "nearest of many samples": lambda: latents[nearest(images, samples)[1][0]],
        "encoder": lambda: encoder(images).detach(),
    }
    size = starts["encoder"]().square().mean().sqrt().item()  # of a random start: 1
    plans = {
        "from: nearest of many samples": (RATE, None),
        "along axes, from: random": (OWN_RATE, axes),
        "along axes, from: nearest of many samples": (OWN_RATE, axes),
        "along axes, from: encoder": (OWN_RATE * size, axes),
    }

    def one(start, rate: float, axes: torch.Tensor | None) -> Found:
        return search(players, images, start(), steps, rate, axes=axes, goal=goal, pause=STUCK)

    return {way: _way(partial(one, starts[way.split("from: ")[1]], *plan)) for way, plan in plans.items()}


def measure(detector, images: torch.Tensor, steps: int) -> tuple[pd.DataFrame, dict]:
    """Seconds and mean loss by way, and the ratios."""
    players = detector.network["players"]
    random = players.draw(len(images), torch.Generator().manual_seed(0))
    alone_seconds, alone = timed(lambda: one_at_a_time(players, images, random, steps))
    ways = {"one at a time": (alone_seconds, alone, float(steps))}
    ways["at once"] = _way(lambda: at_once(players, images, random, steps))
    prepared_seconds, drawn = timed(lambda: sampled(players))
    ways |= to_goal(detector, images, steps, alone, drawn)
    encoded, _ = timed(lambda: detector.expect(images))
    rows = [{"way": way, "seconds": s, "loss": loss.mean().item(), "steps": k, "as_good": _share(loss, alone)}
            for way, (s, loss, k) in ways.items()]  # fmt: skip
    table = pd.DataFrame(rows).set_index("way")
    table["speedup"] = alone_seconds / table.seconds
    begun = at_once(players, images, random, 0).loss.mean().item()
    return table, {
        "speedup_batched": float(table.speedup["at once"]),
        "speedup_warm": _best_of(table.iloc[-2:], SAME * alone.mean().item()),
        "speedup_encoder": alone_seconds / encoded,
        "encoder_vs_batched": float(table.seconds["at once"]) / encoded,
        "largest_difference": (alone - ways["at once"][1]).abs().max().item(),
        "error_fall": 1 - float(table.loss["at once"]) / begun,
        "prepared_seconds": prepared_seconds,
    }


def sampled(network) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, the slices drawn from them, and the axes of both."""
    latents, samples = network.samples()
    return latents, samples, principal_axes(latents, samples)


def _way(call) -> tuple[float, torch.Tensor, float]:
    seconds, found = timed(call)
    return seconds, found.loss, (~found.curve.isnan()).sum(dim=0).float().mean().item() - 1


def _best_of(table: pd.DataFrame, loss: float) -> float:
    """The highest speedup among the ways that end at no more than the loss; 0 where none does."""
    return max(table.speedup[table.loss <= loss], default=0.0)


def _share(loss: torch.Tensor, other: torch.Tensor) -> float:
    """Of the images, those whose loss is as good as the other way's."""
    return (loss <= SAME * other).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter training and search")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    given = parser.parse_args()
    size = QUICK if given.quick else WHOLE
    healthy = prepared()
    detector = models.create("f_anogan", healthy.modalities, epochs=size["epochs"], encoder_epochs=6, shrink=SHRINK)
    with tempfile.TemporaryDirectory() as place:
        detector.fit(healthy, out=Path(place), device="cpu")
    table, figures = measure(detector, test_slices(healthy), size["steps"])
    print(table.round(4).to_string())
    print({name: round(value, 4) for name, value in figures.items()})
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


def test_slices(healthy: cohort.Cohort) -> torch.Tensor:
    """Healthy test slices, evenly taken, averaged as the detector does."""
    slices = healthy.slices("test")
    numbers = range(0, len(slices), max(1, len(slices) // BATCH))
    return small(torch.stack([torch.from_numpy(slices[i]["image"]) for i in numbers])[:BATCH], SHRINK)


if __name__ == "__main__":
    main()
