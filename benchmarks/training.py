"""What a training step of the autoencoder costs, by precision and memory layout: `python -m benchmarks.training`."""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional

from lib.models.autoencoder import Network, Settings
from lib.training import choose_device, native_bfloat16

WAYS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last": (torch.bfloat16, torch.channels_last),
}


def step_seconds(
    device: torch.device, batch: int, dtype: torch.dtype, layout: torch.memory_format, steps: int
) -> float:
    """The median seconds of a step, after three to warm up."""
    network = Network(1, Settings()).to(device, memory_format=layout)
    image = torch.rand(batch, 1, 96, 96, device=device).contiguous(memory_format=layout)
    optimiser = torch.optim.Adam(network.parameters())
    times = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = network(image).float()
        optimiser.zero_grad()
        functional.mse_loss(result, image).backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[3:])[steps // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device, steps = choose_device(given.device), 5 if given.quick else 25
    rows = [
        {"batch": batch, "way": way, "ms": 1000 * step_seconds(device, batch, *how, steps)}
        for batch in (8, 32)
        for way, how in WAYS.items()
    ]
    table = pd.DataFrame(rows)
    table["speedup"] = table.groupby("batch").ms.transform("first") / table.ms
    print(f"{device}, {torch.get_num_threads()} threads, native bfloat16: {native_bfloat16(device)}")
    print(table.round(2).to_string(index=False))
    if given.json:
        given.json.write_text(json.dumps({"rows": table.to_dict("records")}, indent=1))


if __name__ == "__main__":
    main()
