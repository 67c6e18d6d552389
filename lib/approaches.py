"""What five published approaches reported, what their way of measuring gives on a run's maps, and the honest figure.

Approaches are described, not their authors; what a run cannot repeat is said to be "not run here".
"""

import pandas as pd

from lib import slice_traps, traps
from lib.cohort import Cohort

NOT_RUN = "not run here"
BOUNDS = ["auroc", "auroc_low", "auroc_high"]
COLUMNS = ["approach", "reported", "measured the same way here", "honest figure"]


def five_approaches(
    run: str, prepared: Cohort, results: pd.DataFrame, scans: pd.DataFrame | None, method: str = "ae"
) -> pd.DataFrame:
    """A row an approach, columns as in COLUMNS, all sentences; `results` is what `evaluate` returns, `scans` what
    `slice_traps.scanner` does."""
    rows = [
        _single_image(run, prepared, results, method),
        _slices(run, prepared, results, method),
        _accuracy(run, prepared, results, method),
        _label(run, prepared, results, method, scans),
        _whole_image(results, method, scans),
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _single_image(run: str, prepared: Cohort, results: pd.DataFrame, method: str) -> tuple[str, ...]:
    ill = traps.mean_plus_sigma(run, prepared, method, (1, 2)).pivot(index="k", columns="truth", values="called_ill")
    shares = "; ".join(f"at k = {k:g} {_percent(row['lesion'])} of the slices with lesion, "
                       f"{_percent(row['no lesion'])} of those without" for k, row in ill.iterrows())  # fmt: skip
    return (
        "One slice of one scan: autoencoder or latent search; ill where more than 5 % of the pixels exceed mean + kσ "
        "of the image's own error",
        "“No tumour” at k = 2 (4.6, 4.4, 4.6 % above), “tumour” at k = 1 (15.8 %), all on tumour patients; no truth",
        f"Called ill by {method}: {shares}",
        f"{method}: Dice at a threshold frozen on healthy scans {_found(results, method, 'voxel', 'dice')}; "
        f"latent search: {_found(results, 'anogan', 'voxel', 'dice')}",
    )


def _slices(run: str, prepared: Cohort, results: pd.DataFrame, method: str) -> tuple[str, ...]:
    table = slice_traps.brain_area(run, prepared, method)
    gain = slice_traps.youden(run, prepared, method).iloc[0]
    mean, area = table.loc["mean over the whole image"], table.loc["brain area alone"]
    return (
        "Slices: autoencoders, adversarial networks, vision transformer; mean error of the whole image, threshold "
        "tuned on the test slices",
        "ROC-AUC 0.862, average precision 0.838",
        f"Slice AUROC of {method}'s mean error {_interval(*mean[BOUNDS])}, of brain area alone "
        f"{_interval(*area[BOUNDS])}; on slices of like level and area {mean.matched:.2f} and {area.matched:.2f}; "
        f"Youden index {gain.tuned:.2f} where tuned, {gain.elsewhere:.2f} on other subjects",
        f"{method}: slice AUROC of the highest 1 % {_found(results, method, 'slice', 'auroc')}, average precision "
        f"{_found(results, method, 'voxel', 'ap')}; transformer: {_found(results, 'vit_masked', 'voxel', 'ap')}",
    )


def _accuracy(run: str, prepared: Cohort, results: pd.DataFrame, method: str) -> tuple[str, ...]:
    accuracy = traps.pixel_accuracy(run, prepared, (method,)).accuracy
    auroc = traps.background(run, prepared, method).auroc
    return (
        "Variational autoencoder and f-AnoGAN: an AUROC over all pixels, called segmentation accuracy",
        "“91.8 %”: an AUROC of 0.918 beside a Dice of 0.39, from a table that calls itself simulated",
        f"Pixel accuracy of {method} {_percent(accuracy[method])}, of the empty mask "
        f"{_percent(accuracy['nothing marked'])}; AUROC of {method} with the background {auroc['whole square']:.2f}, "
        f"inside the brain {auroc['inside the brain']:.2f}",
        f"{method}: Dice {_found(results, method, 'voxel', 'dice')}, average precision "
        f"{_found(results, method, 'voxel', 'ap')}; variational: {_found(results, 'vae', 'voxel', 'dice')}",
    )


def _label(
    run: str, prepared: Cohort, results: pd.DataFrame, method: str, scans: pd.DataFrame | None
) -> tuple[str, ...]:
    lot = slice_traps.mislabelled(run, prepared, method)
    drawn = NOT_RUN if lot is None else f"{_interval(lot['mean'], lot['low'], lot['high'])}, {lot['n']} patients"
    return (
        "3D autoencoder, “healthy” by a label that is not health (MGMT methylation; every subject has a tumour)",
        "Acquisition and resizing change the outcome; figures could not be verified",
        f"Patients declared healthy by lot, scan score of {method}: AUROC (95 % of draws) {drawn}",
        f"Patients against healthy: {_scan(scans, f'{method}, highest 1 %')}; without looking for a lesion "
        f"{_scan(scans, 'domain classifier')}; 3D network: {_found(results, 'cae3d', 'voxel', 'ap')}",
    )


def _whole_image(results: pd.DataFrame, method: str, scans: pd.DataFrame | None) -> tuple[str, ...]:
    return (
        "Brainstem tumours: autoencoder, squared error averaged over the image as the score",
        "“Improved accuracy”; no figure",
        f"Mean of {method}'s map over the whole volume: {_scan(scans, f'{method}, mean of the volume')}; brain size "
        f"alone: {_scan(scans, 'brain size')}; brainstem scans alone: {NOT_RUN}",
        f"Highest 1 %: {_scan(scans, f'{method}, highest 1 %')}; average precision on lesions of the pons: "
        f"{_found(results, method, 'voxel', 'ap', 'kind:pontine')}",
    )


def _found(results: pd.DataFrame, method: str, level: str, metric: str, stratum: str = "all") -> str:
    """A figure of the table of results with its interval."""
    wanted = {"method": method, "level": level, "metric": metric, "stratum": stratum, "postprocess": "none"}
    row = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    return NOT_RUN if row.empty else _interval(*row.iloc[0][["value", "low", "high"]])


def _scan(scans: pd.DataFrame | None, name: str) -> str:
    return NOT_RUN if scans is None or name not in scans.index else f"AUROC {_interval(*scans.loc[name, BOUNDS])}"


def _interval(value: float, low: float, high: float) -> str:
    return NOT_RUN if pd.isna(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
