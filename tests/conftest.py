"""Small synthetic scans in the layout of BraTS, and a course folder of their own for tests that write."""

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside each other, a core each

from lib import cohort, intake, volumes  # noqa: F401 (course_root needs them loaded)

HERE = Path(__file__).parent
SEMI_AXES_MM = np.array([65.0, 80.0, 60.0])  # an ellipsoid of 1.3 litres
MODALITIES = ("FLAIR", "T1", "T2")


def pytest_collection_modifyitems(items):
    """The course's runs take longest, so they begin first, beside everything else."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@lru_cache(maxsize=64)
def simulate(seed=0, voxel_mm=5.0, radius_mm=15.0):
    """A smooth brain in each of MODALITIES (int16), the mask of its bright lesion (uint8) and the affine.

    Radius 0 means no lesion.
    """
    random = np.random.default_rng(seed)
    half = np.ceil(SEMI_AXES_MM / voxel_mm).astype(int) + 1
    mm = np.stack(np.mgrid[tuple(slice(-h, h + 1) for h in half)], axis=-1) * voxel_mm
    brain = ((mm / SEMI_AXES_MM) ** 2).sum(axis=-1) <= 1
    lesion = (((mm - (25, 10, 5)) ** 2).sum(axis=-1) <= radius_mm**2) & (radius_mm > 0)
    texture = ndimage.gaussian_filter(random.standard_normal((len(MODALITIES), *brain.shape)), (0, 2, 2, 2))
    images = (500 + 100 * texture / texture.std() + 500 * lesion).clip(50, 3000) * brain
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = -half * voxel_mm
    return dict(zip(MODALITIES, images.astype(np.int16), strict=True)), lesion.astype(np.uint8), affine


def _write_subject(folder, seed=0, modalities=("FLAIR",), radius_mm=15.0, mask=True, voxel_mm=5.0):
    images, lesion, affine = simulate(seed, voxel_mm, radius_mm)
    for modality in modalities:
        volumes.write(folder / f"{folder.name}_{modality.lower()}.nii.gz", images[modality], affine)
    if mask:
        volumes.write(folder / f"{folder.name}_seg.nii.gz", lesion, affine)
    return folder


@pytest.fixture(scope="session")
def write_subject():
    """`write_subject(folder, seed, modalities, radius_mm, mask, voxel_mm)` writes a subject and returns its folder."""
    return _write_subject


@pytest.fixture
def brats(tmp_path):
    """`brats(patients, healthy, **options)` writes a folder of subjects p0 … and h0 …, and returns it."""

    def write(patients=4, healthy=0, name="scans", **options):
        folder = tmp_path / name
        for i in range(patients):
            _write_subject(folder / f"p{i}", seed=i, radius_mm=11 + 3 * i, **options)
        for i in range(healthy):
            _write_subject(folder / f"h{i}", seed=100 + i, radius_mm=0, **options)
        return folder

    return write


@pytest.fixture
def course_root(tmp_path, monkeypatch):
    """A course folder of its own: whatever a test prepares or runs lands there, not in the repository."""
    root = tmp_path / "course"
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "lib" and hasattr(module, "ROOT"):
            monkeypatch.setattr(module, "ROOT", root)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A course folder of its own with a finished run, `small`, that has models; `scans/p0 …` and `scans/h0 …` are its
    scans."""
    root = tmp_path_factory.mktemp("finished") / "course"
    for name in ("lib", "notebooks"):
        shutil.copytree(HERE.parent / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for i in range(8):
        _write_subject(root / "scans" / f"p{i}", seed=i, radius_mm=11 + 2 * i)
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, HERE / "made_run.py"], env=environment, cwd=root, check=True, capture_output=True)
    return root
