"""A prepared cohort made in a moment: discs for brains, brighter discs for lesions."""

import json

import numpy as np

from lib import cohort
from lib.intake import HEALTHY, LESION_FREE

SIZE, SLICES = 32, 12


def write(folder, *, healthy=(3, 2, 2), patients=3, modalities=("FLAIR",), training=HEALTHY, seed=0, bare=0):
    """Write a cohort of `healthy` subjects by split and `patients` in test (in every split where none is healthy), and
    of `bare` patients in test whose lesions are not outlined."""
    random = np.random.default_rng(seed)
    roles = [(split, True) for split, n in zip(("train", "validation", "test"), healthy, strict=True) for _ in range(n)]
    if training == LESION_FREE:
        roles += [(split, False) for split in ("train", "validation")]
    roles += [("test", False)] * (patients + bare)
    subjects = [
        _subject(folder / f"s{i:02d}", random, split, well, modalities) for i, (split, well) in enumerate(roles)
    ]
    for facts in subjects[len(subjects) - bare :]:
        _forget(folder / facts["id"], facts)
    manifest = {
        "format": cohort.FORMAT, "hash": f"cohort{seed}",
        "recipe": {"modalities": modalities, "size": SIZE, "normalisation": "p99"},
        "training": training, "subjects": subjects, "left_out": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return cohort.open_cohort(folder)


def _subject(folder, random, split, healthy, modalities):
    folder.mkdir(parents=True)
    row, column = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    brain = np.repeat((np.hypot(row, column) < 12)[None], SLICES, axis=0)
    brain[[0, -1]] = False
    lesion = np.zeros_like(brain)
    if not healthy:
        lesion[3:6] = np.hypot(row - random.integers(-4, 4), column - random.integers(-4, 4)) < 3
    wave = 0.5 + 0.1 * np.sin(row / 3 + random.uniform(0, 6)) + 0.02 * random.standard_normal(brain.shape)
    image = np.repeat((np.clip(wave + 0.4 * lesion, 0, 1.5) * brain)[None], len(modalities), axis=0)
    for name, array in (("image", image.astype(np.float16)), ("brain", brain), ("lesion", lesion)):
        np.save(folder / f"{name}.npy", array)
    np.savez(folder / "own_grid.npz", brain=brain, lesion=lesion, affine=np.diag([2, 2, 2, 1]))
    (folder / "facts.json").write_text("{}")
    return {
        "id": folder.name,
        "split": split,
        "healthy": healthy,
        "affine": np.diag([2, 2, 2, 1]).tolist(),
        "scales": [1.0] * len(modalities),
        "missing": [],
        "acquisition": {m: {} for m in modalities},
        "shape": brain.shape,
        "prepared_lesion_ml": round(float(lesion.sum() * 0.008), 3),
        "lesion_slices": np.flatnonzero(lesion.any(axis=(1, 2))).tolist(),
    }


def _forget(folder, facts):
    """Take away where the lesion is."""
    lesion = np.load(folder / "lesion.npy")
    np.save(folder / "lesion.npy", np.zeros_like(lesion))
    facts |= {"outlined": False, "lesion_slices": [], "prepared_lesion_ml": 0.0}
