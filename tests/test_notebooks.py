"""The whole course on the tiny profile, as a person starts it: figures, files, repetition, a kill in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from lib import phantom

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "brats"
SLICES_ONLY = {"brain_area", "slice_index"}
ADVERSARIAL = {"gan", "anogan", "f_anogan", "ganomaly"}
METHODS = ADVERSARIAL | {
    "ae", "ae_dense", "ae_ssim", "empty", "random", "intensity", "intensity_median", "atlas_z", "blur"
}  # fmt: skip
METHODS |= {"mirror", "single_masked", "single_similarity", "single_ensemble"}
METHODS |= {"ae_attention", "vae", "vae_restoration", "vit_context_dropout", "vit_masked"}
CORRUPTED = (
    "dae", "synthetic_lesions", "synthetic_restoration", "sided_ensemble", "diffusion", "diffusion_patched"
)  # fmt: skip
METHODS |= {*CORRUPTED, "features", "cae3d"}
SHORT = """
    02.epochs=1 02.encoder_epochs=1 02.ganomaly_epochs=1 02.shown_steps=10 02.steps=1
    03.epochs=1 03.variants= 03.codes= 03.vae_epochs=1 03.restoration=false 03.clahe=false
    04.epochs=1
    05.epochs=1 05.copy_epochs=1 05.dropouts=
    06.epochs=1 06.lesion_epochs=1 06.watched_epochs=0 06.noise_grids= 06.restoration=false 06.patched=false
    06.diffusion_epochs=1 06.encoders=
"""
FEW = [option for value in SHORT.split() for option in ("-p", value)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the course in a new folder."""
    root = tmp_path_factory.mktemp("a fresh") / "course"
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def command(*options):
    return [sys.executable, "-m", "lib.course", "--profile", "tiny", "--device", "cpu", *options]


def course(tree, *options):
    done = subprocess.run(command(*options), cwd=tree, env=clean(tree), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clean(tree):
    return {**os.environ, "PYTHONPATH": str(tree)}


@pytest.fixture(scope="module")
def whole(tree):
    course(tree, "--run", "whole")
    return tree / "reports" / "whole"


def texts(folder, name):
    cells = nbformat.read(folder / "notebooks" / f"{name}.ipynb", 4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    return "".join(o.get("text", "") for o in outputs), sum("image/png" in o.get("data", {}) for o in outputs)


def test_the_report_says_what_ran(whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["status"] == "done"
    assert [n["status"] for n in record["notebooks"].values()] == ["done"] * 8
    assert all(n["seconds"] > 0 and n["peak_memory_gb"] > 0 for n in record["notebooks"].values())
    page = (whole / "index.html").read_text()
    for word in ("intensity_median", "ae_dense", "embedded", "not for diagnosis", "torch"):
        assert word in page


def test_01_prepares_a_cohort_and_shows_it(whole):
    said, pictures = texts(whole, "01_preprocessing")
    assert "10 subjects in the layout brats" in said
    assert "left out 0" in said
    assert pictures >= 8
    cohort = json.loads((whole / "cohort.json").read_text())
    manifest = json.loads((whole.parents[1] / cohort["path"] / "manifest.json").read_text())
    assert {s["split"] for s in manifest["subjects"] if s["healthy"]} == {"train", "validation", "test"}
    assert {s["split"] for s in manifest["subjects"] if not s["healthy"]} == {"test"}
    assert manifest["recipe"]["size"] == 48
    assert np.load(whole / "largest_slice.npy").shape == (256, 256)


def test_02_plays_searches_and_writes_models_and_maps(whole):
    said, pictures = texts(whole, "02_anogan")
    assert "Trained gan, anogan, f_anogan, ganomaly" in said
    assert "at once take" in said
    assert pictures >= 11
    fall = int(said.partition("From a random start, the loss falls by ")[2].partition(" %")[0])
    assert fall >= 10  # the tiny profile's players hardly learn
    assert float(said.partition("Their losses differ by ")[2].partition(" %")[0]) < 2
    for name in ADVERSARIAL:
        assert (whole / "models" / f"{name}.safetensors").exists()
        assert len(list((whole / "maps" / name).iterdir())) == len(list((whole / "maps" / "ae").iterdir()))
    rows = [json.loads((whole / "models" / f"{name}.history.json").read_text()) for name in ("gan", "anogan")]
    assert rows[0]["rows"] == rows[1]["rows"]  # one game, played once


def test_03_trains_and_writes_models_and_maps(whole):
    said, pictures = texts(whole, "03_conv_autoencoder")
    names = ("ae", "ae_dense", "ae_ssim", "ae_attention", "vae", "vae_restoration")
    assert f"Trained {', '.join(names)}" in said
    assert pictures >= 17
    rows = {}
    for name in names:
        rows[name] = json.loads((whole / "models" / f"{name}.history.json").read_text())["rows"]
        assert rows[name][-1]["train"] < rows[name][0]["train"]
        assert (whole / "models" / f"{name}.safetensors").exists()
    assert rows["vae"] == rows["vae_restoration"]  # one training
    assert "units are active" in said
    assert "equalised" in said
    assert {folder.name for folder in (whole / "models").glob("ae_code*")} == {"ae_code2", "ae_code16"}


def test_04_redraws_whole_brains_and_shows_them_in_space(whole):
    said, pictures = texts(whole, "04_cae3d")
    assert "Trained cae3d on 4 volumes" in said
    assert "No series was given." in said
    assert pictures >= 14
    page = (whole / "notebooks" / "04_cae3d.html").read_text()
    for word in ("truth, ml", "resampled − clustered", "aspect_10", "nobody ill", "header and shape", "p_within"):
        assert word in page
    assert (whole / "notebooks" / "04_cae3d.html").stat().st_size < 3e6
    assert 0.5 < float(said.partition("nothing else reaches an AUROC of ")[2][:4]) < 1
    assert "brainsprite" in page  # the viewer, all of it
    rows = json.loads((whole / "models" / "cae3d.history.json").read_text())["rows"]
    assert rows[-1]["validation"] < rows[0]["validation"]
    assert len(list((whole / "maps" / "cae3d").iterdir())) == len(list((whole / "maps" / "ae").iterdir()))


def test_05_copies_or_hides_and_shows_that_what_is_hidden_does_not_matter(whole):
    said, pictures = texts(whole, "05_vision_transformer")
    assert "Trained vit_context_dropout, vit_masked" in said
    assert pictures >= 11
    moves = {line.split(":")[0]: float(line.split()[-3]) for line in said.splitlines() if "patch moves by" in line}
    assert moves["vit_masked"] == 0 < moves["vit_context_dropout"]
    returned = {line.split()[0]: int(line.split()[2]) for line in said.splitlines() if "% of the synthetic" in line}
    assert returned["vit_masked"] < returned["vit_context_dropout"]
    for name in ("vit_context_dropout", "vit_masked"):
        assert (whole / "models" / f"{name}.safetensors").exists()
        assert len(list((whole / "maps" / name).iterdir())) == len(list((whole / "maps" / "ae").iterdir()))


def test_06_teaches_by_corruption_and_stops_without_a_real_lesion(whole):
    said, pictures = texts(whole, "06_denoising")
    assert f"Trained {', '.join((*CORRUPTED, 'features'))}" in said
    assert "class UNet" in said
    assert "def redrawn" in said
    assert "Kept: epoch " in said
    assert pictures >= 17
    for name in CORRUPTED:
        rows = json.loads((whole / "models" / f"{name}.history.json").read_text())["rows"]
        assert rows[-1]["validation"] < rows[0]["validation"]
    for name in (*CORRUPTED, "features"):
        assert len(list((whole / "maps" / name).glob("*.npz"))) == len(list((whole / "maps" / "ae").glob("*.npz")))
    assert {folder.name for folder in (whole / "models").glob("dae_grid*")} == {"dae_grid4", "dae_grid48"}


def test_07_maps_each_scan_alone_and_pairs_the_methods(whole):
    said, pictures = texts(whole, "07_single_scan")
    assert "methods on" in said
    assert "No scan was given." in said
    assert pictures >= 16
    for name in ("mirror", "single_masked", "single_similarity", "single_ensemble"):
        assert len(list((whole / "maps" / name).iterdir())) >= 5


def test_08_judges_every_method_by_the_contract(whole):
    _, pictures = texts(whole, "08_comparison")
    assert pictures >= 18
    table = pd.read_csv(whole / "results.csv", keep_default_na=False, na_values=[""])
    assert set(table.method) == METHODS | SLICES_ONLY
    order = ["method", "postprocess", "stratum", "level", "metric"]
    assert table.sort_values(order).index.is_monotonic_increasing
    assert set(table.postprocess) == {"none", "median", "eroded", "components"}
    table = table[(table.postprocess == "none") & (table.stratum == "all")]
    value = table.set_index(["method", "level", "metric"]).value
    prevalence = value["empty", "voxel", "prevalence"]
    assert value["empty", "voxel", "ap_pooled"] == pytest.approx(prevalence, abs=1e-3)
    assert value["random", "voxel", "ap_pooled"] == pytest.approx(prevalence, rel=0.2)
    assert value["intensity_median", "voxel", "ap"] > 2 * value["random", "voxel", "ap"]
    assert value["empty", "slice", "auroc"] == 0.5
    assert value["brain_area", "slice", "auroc"] > 0.5
    for method in METHODS:
        assert value[method, "voxel", "dice"] <= value[method, "voxel", "dice_oracle"]


def test_seeds_and_the_scan_s_own_grid_are_one_parameter_each(tree, whole):
    course(tree, "--run", "seeds", "-p", "seeds=2", "-p", "grid=scan", "-p", "08.baselines=intensity", *FEW)
    table = pd.read_csv(tree / "reports" / "seeds" / "results.csv", keep_default_na=False, na_values=[""])
    assert set(table[table.method == "ae"].seed) == {0, 1}
    assert table.note.str.contains("own grid").all()
    said, _ = texts(tree / "reports" / "seeds", "08_comparison")
    assert "seed_sd" in said
    before = pd.read_csv(whole / "results.csv", keep_default_na=False, na_values=[""])
    key = ["method", "postprocess", "stratum", "level", "metric", "seed"]
    both = (
        before.set_index(key).value.to_frame("prepared").join(table.set_index(key).value.to_frame("scan"), how="inner")
    )
    ap = both.loc["intensity", "none", "all", "voxel", "ap"]
    assert ap.scan.item() == pytest.approx(ap.prepared.item(), abs=0.1)


@pytest.mark.parametrize("kind", ["no masks", "nobody ill"])
def test_without_outlined_lesions_the_comparison_says_what_scans_allow(tree, kind):
    folder = phantom.write_cohort(tree / kind.replace(" ", "_"), healthy=6, patients=4, voxel_mm=4.0, seed=0)
    table = pd.read_csv(folder / "participants.tsv", sep="\t", keep_default_na=False)
    for name in table.participant_id[table.healthy == 0]:
        if kind == "no masks":
            (folder / name / f"{name}_seg.nii.gz").unlink()
        else:
            shutil.rmtree(folder / name)
    course(
        tree,
        "--run",
        folder.name,
        "--data",
        str(folder),
        "--only",
        "01,03,08",
        *FEW,
        "-p",
        "08.baselines=random,intensity",
    )
    results = pd.read_csv(tree / "reports" / folder.name / "results.csv", keep_default_na=False)
    said, pictures = texts(tree / "reports" / folder.name, "08_comparison")
    words = "no subject has a lesion mask" if kind == "no masks" else "nobody is ill among the test subjects"
    assert words in said
    assert words in (tree / "reports" / folder.name / "index.html").read_text()
    assert results.note.str.contains(words).all()
    assert not set(results.metric[results.level == "voxel"]) - {"fpr_promised", "fpr_seen"}
    assert set(results.level[results.metric == "auroc"]) == ({"scan"} if kind == "no masks" else set())
    assert pictures >= 10


def test_times_are_kept_apart_from_results(whole):
    times = pd.read_csv(whole / "timings.csv", keep_default_na=False)
    assert {("03_conv_autoencoder", "ae", "fit"), ("08_comparison", "atlas_z", "maps")} <= set(
        zip(times.notebook, times.method, times.stage, strict=True)
    )


def test_a_second_run_killed_in_the_middle_of_03_resumes_to_the_same_results_byte_for_byte(tree, whole):
    folder = tree / "reports" / "killed"
    with subprocess.Popen(command("--run", "killed"), cwd=tree, env=clean(tree), stdout=subprocess.DEVNULL) as runner:
        deadline = time.monotonic() + 240
        while not (folder / "models" / "ae.checkpoint").exists():
            assert runner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        runner.send_signal(signal.SIGKILL)
    assert not (folder / "results.csv").exists()
    said = course(tree, "--run", "killed", "--resume")
    assert "01_preprocessing" in said
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
def test_real_patients_without_a_healthy_one(tree):
    course(tree, "--run", "real", "--data", str(REAL), "--modality", "FLAIR", "-p", "01.slice_mm=4.0", *FEW)
    folder = tree / "reports" / "real"
    table = pd.read_csv(folder / "results.csv", keep_default_na=False)
    assert table.note.str.contains("lesion-free slices of patients").all()
    assert "lesion-free slices of patients" in (folder / "index.html").read_text()
    plain = table[(table.level == "voxel") & (table.stratum == "all") & (table.postprocess == "none")]
    value = plain[plain.metric == "ap"].set_index("method").value
    assert value["intensity_median"] > 0.6 > 3 * value["random"]
