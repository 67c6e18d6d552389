"""Many subjects: killed and started again, or spread over a cluster, the cohort is the same to the byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_cohort
import psutil
import pytest

from lib import course, evaluation, intake, preparation, runs, scoring, workers
from lib.errors import CourseError
from lib.preprocessing import Recipe
from lib.settings import Course

FITS = {"size": 48, "pixel_mm": 4.0}
RECIPE = Recipe(**FITS)
SUBJECTS = 16
SECONDS = 120  # that anything may take before a test gives up
CODE = """
import os, sys
from pathlib import Path
import lib
from lib import intake, preparation
from lib.preprocessing import Recipe
os.cpu_count = lambda: 2
lib.ROOT = Path(sys.argv[2])
gathered = intake.gather(sys.argv[1], size=48, pixel_mm=4.0, cluster=sys.argv[3])
preparation.prepare_cohort(gathered, Recipe(size=48, pixel_mm=4.0), sys.argv[3])
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(workers.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def scans(brats):
    return brats(patients=SUBJECTS // 2, healthy=SUBJECTS // 2)


@pytest.fixture
def alone(scans, course_root):
    """The cohort as it is made in one go on this machine, a copy of its files' bytes."""
    folder = prepare(scans)
    kept = contents(folder)
    shutil.rmtree(course_root / "data")
    return folder.name, kept


def prepare(scans, cluster=""):
    gathered = intake.gather(str(scans), cluster=cluster, **FITS)
    return preparation.prepare_cohort(gathered, RECIPE, cluster)


def started(scans, root, cluster=""):
    """The same in a process of its own, the first of a group."""
    call = [sys.executable, "-c", CODE, str(scans), str(root), cluster]
    return subprocess.Popen(call, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(root, what):
    """Marks of what is done, by file: when it was written."""
    return {path: path.stat().st_mtime_ns for path in (root / "data").glob(what)}


def wait_for(true):
    until = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("stage", ["examined/*.json", "prepared/*/[!.]*/facts.json"])
def test_what_was_done_before_a_kill_is_not_done_again(scans, alone, course_root, stage):
    with started(scans, course_root) as process:
        wait_for(lambda: len(finished(course_root, stage)) >= 3)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
    wait_for(lambda: all(preparation._is_over(one.pid) for one in family))
    before = finished(course_root, stage)
    assert 3 <= len(before) < SUBJECTS
    folder = prepare(scans)
    after = finished(course_root, stage)
    assert len(after) == SUBJECTS
    assert {path: after[path] for path in before} == before
    assert (folder.name, contents(folder)) == alone


def test_what_killed_writers_left_is_cleared_and_what_living_ones_write_is_not(scans, course_root, alone):
    folder = course_root / "data" / "prepared" / alone[0]
    dead, unburied = (subprocess.Popen([sys.executable, "-c", ""]) for _ in range(2))
    dead.wait()
    wait_for(lambda: psutil.Process(unburied.pid).status() == psutil.STATUS_ZOMBIE)
    mine, machine = preparation._half(folder / "p0"), preparation._machine()
    gone, dying = (folder / f".p1-{machine}-{process.pid}-0123" for process in (dead, unburied))
    elsewhere, forgotten = folder / ".p2-host-1-0123", folder / ".p3-host-1-0123"
    for place in (mine, gone, dying, elsewhere, forgotten):
        place.mkdir(parents=True)
    os.utime(forgotten, (0, 0))
    assert prepare(scans) == folder
    unburied.wait()
    assert {path.name for path in folder.glob(".*")} == {mine.name, elsewhere.name}


def test_disk_use_is_said_before_and_is_true(scans, course_root, capsys):
    gathered = intake.gather(str(scans), **FITS)
    capsys.readouterr()
    folder = preparation.prepare_cohort(gathered, RECIPE)
    said = capsys.readouterr().out.splitlines()[0]
    taken = sum(path.stat().st_size for path in folder.rglob("*.np[yz]"))
    assert said.startswith(f"{SUBJECTS} subjects to prepare will take some ")
    assert float(said.split(" some ")[1].split(" MB")[0]) == pytest.approx(taken / 1e6, rel=0.05)
    shutil.rmtree(folder / "p0")
    assert preparation.space(gathered, RECIPE).startswith("1 subject to prepare will take some ")


def test_a_cohort_that_does_not_fit_the_disk_is_refused(scans, course_root, monkeypatch):
    gathered = intake.gather(str(scans), **FITS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(CourseError, match=r"too small.* 16 subjects .* MB of disk; 1\.0 MB are free"):
        preparation.prepare_cohort(gathered, RECIPE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Dask scheduler and two workers on this machine: its address and the workers' processes."""
    pytest.importorskip("distributed", reason="the extra package distributed is not installed")
    place = tmp_path_factory.mktemp("dask")
    quiet = {"env": ENVIRONMENT, "cwd": place, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    file = place / "scheduler.json"
    call = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    members = [subprocess.Popen([*call, "--no-dashboard", "--scheduler-file", file], **quiet)]
    call = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", file, "--nthreads", "1"]
    members += [subprocess.Popen([*call, "--no-dashboard", "--no-nanny"], **quiet) for _ in range(2)]
    try:
        wait_for(lambda: file.exists() and file.read_text())
        address = json.loads(file.read_text())["address"]
        wait_for(lambda: cores(address) == 2)
        yield address, members[1:]
    finally:
        for process in members:
            process.kill()
            process.wait()


def cores(address):
    with workers._client(address) as client:
        return len(client.ncores())


def test_a_cluster_makes_the_same_cohort_and_the_same_figures(scans, alone, course_root, cluster, tmp_path):
    folder = prepare(scans, cluster[0])
    assert (folder.name, contents(folder)) == alone

    prepared, run = made_cohort.write(tmp_path / "made"), str(tmp_path / "run")
    scoring.run_detector("intensity", prepared, run)
    names = ("results.csv", "patients.csv", "froc.csv")
    evaluation.evaluate(run, prepared)
    here = [(tmp_path / "run" / name).read_bytes() for name in names]
    evaluation.evaluate(run, prepared, cluster=cluster[0])
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == here


def test_a_refusal_of_a_cluster_s_worker_is_the_usual_one(scans, course_root, cluster):
    path = scans / "p1" / "p1_flair.nii.gz"
    path.write_bytes(b"")
    with pytest.raises(CourseError) as there:
        prepare(scans, cluster[0])
    with pytest.raises(CourseError) as here:
        prepare(scans)
    assert there.value.what == here.value.what
    assert f"{path} is empty" in here.value.what


def test_a_cluster_whose_worker_is_killed_makes_the_same_cohort(scans, alone, course_root, cluster):
    address, processes = cluster
    with started(scans, course_root, address) as process:
        wait_for(lambda: len(finished(course_root, "prepared/*/[!.]*/facts.json")) >= 3)
        processes[0].kill()
        assert len(finished(course_root, "prepared/*/[!.]*/facts.json")) < SUBJECTS
    assert process.returncode == 0
    assert cores(address) == 1
    (folder,) = (course_root / "data" / "prepared").iterdir()
    assert (folder.name, contents(folder)) == alone


def test_the_option_reaches_the_notebooks_and_decides_no_result(monkeypatch):
    pytest.importorskip("distributed", reason="the extra package distributed is not installed")
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1)
    table = Course.read(Path(workers.__file__).parents[1] / "notebooks")
    plain, spread = (
        table.values(course._settings(table, {}, course._parse(given)))
        for given in ([], ["--cluster", "tcp://127.0.0.1:1"])
    )
    assert {name for name in plain if plain[name] != spread[name]} == {"01_preprocessing", "08_comparison"}
    for name in plain:
        before, now = ({"source": "0", "parameters": values[name]} for values in (plain, spread))
        assert runs._what(before) == runs._what(now)
    with pytest.raises(CourseError, match="No Dask scheduler answers"):
        course._examine(spread["01_preprocessing"], True)
