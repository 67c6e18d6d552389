"""Unsupervised anomaly detection in brain MRI: the library that the course's notebooks share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_folder(run: str) -> Path:
    """Where a run keeps its report, models, maps and logs."""
    return ROOT / "reports" / run
