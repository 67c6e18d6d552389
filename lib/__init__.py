"""Unsupervised anomaly detection in brain MRI: the library that the course's notebooks share."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait stall beside any other program

ROOT = Path(__file__).resolve().parents[1]
RESEARCH = "For research, not for diagnosis."


def run_folder(run: str) -> Path:
    """Where a run keeps its report, models, maps and logs."""
    return ROOT / "reports" / run


def data_folder(*names: str) -> Path:
    """Where prepared cohorts, downloads and what is remembered of scans are kept."""
    return ROOT.joinpath("data", *names)
