import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

import lib
from lib import course, runs
from lib.errors import CourseError

HERE = Path(__file__).parent
MAKES = {"01_makes": {"makes": ["made.json"]}}
NEEDS = {**MAKES, "02_needs": {"needs": ["01_makes"], "makes": ["seen.json"]}}
REPORT = """
import json
def write(folder):
    (folder / "index.html").write_text(json.loads((folder / "run.json").read_text())["status"])
    return folder / "index.html"
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty course in a folder whose name has a space."""
    root = tmp_path / "a course"
    (root / "lib").mkdir(parents=True)
    (root / "notebooks").mkdir()
    for name in ("__init__", "errors", "refusals", "nifti", "volumes", "settings", "runner", "jobs", "runs", "course"):
        shutil.copy(HERE.parent / "lib" / f"{name}.py", root / "lib")
    (root / "lib" / "report.py").write_text(REPORT)
    fake = SimpleNamespace()
    exec(REPORT, vars(fake))
    monkeypatch.setattr(lib, "ROOT", root)
    monkeypatch.setattr(lib, "report", fake, raising=False)
    monkeypatch.setitem(sys.modules, "lib.report", fake)
    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, "")
    return root


def offer(root: Path, notebooks: dict, profiles: str = "") -> None:
    """Put fixture notebooks into the course; `01_makes` is tests/notebooks/makes.ipynb."""
    lines = []
    for name, entry in notebooks.items():
        shutil.copy(
            HERE / "notebooks" / f"{entry.get('fixture', name[3:])}.ipynb", root / "notebooks" / f"{name}.ipynb"
        )
        lines += [f"[notebooks.{name}]", f'title = "{name[3:]}"']
        lines += [f"{key} = {json.dumps(entry[key])}" for key in ("needs", "after", "makes") if key in entry]
    (root / "notebooks" / "course.toml").write_text("\n".join([*lines, profiles]))


def run(*options: str) -> int:
    return course.main(["--device", "cpu", "--run", "one", *options])


def record(name: str = "one") -> dict:
    return json.loads((lib.run_folder(name) / "run.json").read_text())


@contextlib.contextmanager
def started(root: Path, *options: str):
    """The course in a process of its own, and the process ids of its kernel and of what that started."""
    command = [sys.executable, "-m", "lib.course", "--device", "cpu", "--run", "one", *options]
    with (root / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    pids = root / "reports" / "one" / "pids.txt"
    try:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        yield process, [int(pid) for pid in pids.read_text().split()]
    finally:
        for pid in [process.pid, *(pids.read_text().split() if pids.exists() else ())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.wait()


def wait_for(there, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_run_does_what_it_is_asked_and_records_it(tree, capsys, tmp_path):
    offer(tree, NEEDS, "[profiles.quick.01_makes]\nepochs = 7\nrate = 0.5\naugment = true")
    values = tmp_path / "values.yml"
    values.write_text("rate: 1e-4\n01:\n  augment: no\n  sizes: [1, 2, 3]\n  seed: 1\nmodalities: 1\n")
    assert run("-f", str(values), "--seed", "4", "-p", "epochs=8", "-p", "01.mask=none", "--modality", "FLAIR,T2") == 0
    folder = lib.run_folder("one")
    made = json.loads((folder / "made.json").read_text())
    assert made == {
        "epochs": 8,
        "rate": 1e-4,
        "augment": False,
        "modalities": "FLAIR,T2",
        "sizes": [1, 2, 3],
        "mask": None,
        "seed": 4,
        "cwd": str(tree),
        "backend": "module://matplotlib_inline.backend_inline",
    }
    ran = record()
    assert ran["status"] == "done"
    assert (ran["seed"], ran["profile"], ran["kernel"]) == (4, "quick", "python3")
    assert ran["device"].startswith("cpu (")
    assert {entry["status"] for entry in ran["notebooks"].values()} == {"done"}
    assert ran["notebooks"]["02_needs"]["parameters"] == {"run": "one", "epochs": 8}
    assert 0.02 < ran["notebooks"]["01_makes"]["peak_memory_gb"] < 2
    assert (folder / "index.html").read_text() == "done"
    assert (folder / "logs" / "01_makes.log").read_text() == "epoch 1: loss 0.5 ×\nwhole\n"
    timings = (folder / "timings.csv").read_text().splitlines()
    assert timings[0] == "notebook,method,stage,seconds,peak_memory_gb"
    assert [line.rsplit(",", 2)[0] for line in timings[1:3]] == ["01_makes,,notebook", "02_needs,,notebook"]
    assert timings[3:] == ["01_makes,ae,fit,1.5,0.25"]
    assert str(folder / "index.html") in capsys.readouterr().out


def test_resume_repeats_only_what_is_not_finished(tree, capsys):
    offer(tree, NEEDS)
    assert run("--seed", "1") == 0
    counted = lib.run_folder("one") / "count.txt"
    assert run("--resume") == 0
    assert "not repeated: 01_makes, 02_needs" in capsys.readouterr().out
    assert counted.read_text() == "once\n"
    assert run("--resume", "-p", "02.epochs=6") == 0
    assert "not repeated: 01_makes." in capsys.readouterr().out
    assert counted.read_text() == "once\n" * 2
    assert record()["notebooks"]["01_makes"]["parameters"]["seed"] == 1
    (lib.run_folder("one") / "made.json").unlink()
    assert run("--resume", "--only", "02") == 2
    assert "02_needs needs 01_makes" in capsys.readouterr().err
    assert run("--resume", "--only", "01") == 0
    assert "Still to run with these settings: 02_needs" in capsys.readouterr().out
    assert course.main(["--device", "cpu", "--resume"]) == 0
    assert counted.read_text() == "once\n" * 3
    assert record()["status"] == "done"
    assert course.main(["--resume"]) == 2


@pytest.mark.parametrize(
    ("fixture", "cell", "said"),
    [
        ("fails", 2, ["01_fails failed in cell [2].", "ValueError: the loss is not a number"]),
        ("refuses", 1, ["01_refuses failed in cell [1].", "scan.nii.gz is empty. Copy or download it again."]),
        ("exits", 2, ["01_exits failed in cell [2].", "1 of its cells did not run"]),
        (
            "dies",
            2,
            ["01_dies failed in cell [2].", "was killed in this cell; it had used up to 0.3 GB", "--profile quick"],
        ),
        ("forgets", None, ["01_forgets failed.", "without making maps/ae"]),
    ],
)
def test_a_failure_stops_the_course_and_is_shown(tree, capsys, fixture, cell, said):
    source = "makes" if fixture == "forgets" else fixture
    offer(tree, {f"01_{fixture}": {"fixture": source, "makes": ["maps/ae"]}, "02_needs": {"needs": [f"01_{fixture}"]}})
    assert run("--quiet") == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert "Traceback" not in err
    assert "--resume --run one" in err
    for words in said:
        assert words in err
    ran = record()
    assert (ran["status"], ran["notebooks"]["02_needs"]["status"]) == ("failed", "waiting")
    assert ran["notebooks"][f"01_{fixture}"]["error"]["cell"] == cell
    assert (lib.run_folder("one") / "index.html").read_text() == "failed"
    if cell:
        notebook = nbformat.read(lib.run_folder("one") / "notebooks" / f"01_{fixture}.ipynb", as_version=4)
        cells = [c for c in notebook.cells if c.cell_type == "code"]
        assert any(output.output_type == "error" for output in cells[cell - 1].outputs)
        assert all(c.execution_count is None for c in cells[cell:])


def test_the_report_shows_a_failure_in_its_place(tree, monkeypatch):
    monkeypatch.delattr(lib, "report")
    monkeypatch.delitem(sys.modules, "lib.report")
    offer(tree, {"01_fails": {}})
    assert run("--quiet") == 1
    page = (lib.run_folder("one") / "notebooks" / "01_fails.html").read_text()
    assert page.index("so far, so good") < page.index("the loss is not a number", page.index("so far, so good"))
    assert "01_fails" in (lib.run_folder("one") / "index.html").read_text()


def test_a_kernel_that_does_not_start(tree, tmp_path, monkeypatch, capsys):
    spec = {"argv": ["false"], "display_name": "broken", "language": "python"}
    (tmp_path / "kernels" / "broken").mkdir(parents=True)
    (tmp_path / "kernels" / "broken" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    offer(tree, MAKES)
    assert run("--kernel", "broken", "--quiet") == 1
    assert "01_makes failed.\nThe kernel did not start." in capsys.readouterr().err


def test_the_records_hold_no_path_of_this_machine(tree):
    offer(tree, MAKES)
    assert run("--quiet") == 0
    for file in (lib.run_folder("one") / "run.json", lib.run_folder("one") / "notebooks" / "01_makes.ipynb"):
        assert str(tree) not in file.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_kernel_and_resume_goes_on(tree, number):
    offer(tree, {**MAKES, "02_waits": {"makes": ["waited.txt"]}})
    folder = lib.run_folder("one")
    with started(tree, "--only", "02") as (process, pids):
        wait_for(lambda: (folder / "logs" / "02_waits.log").read_text() == "waiting\n")
        process.send_signal(number)
        assert process.wait(60) == 130
        assert all(map(gone, pids))
    said = (tree / "said.txt").read_text()
    assert "--resume --run one" in said
    assert "Traceback" not in said
    assert (folder / "index.html").read_text() == "interrupted"
    assert "Interrupted" in (folder / "notebooks" / "02_waits.ipynb").read_text()
    (folder / "go.txt").touch()
    assert course.main(["--resume"]) == 0
    assert (folder / "waited.txt").exists()
    assert not (folder / "made.json").exists()  # --only is kept


@pytest.mark.parametrize("beside", ["makes", "fails"])
def test_notebooks_run_side_by_side_and_one_at_work_ends_whatever_the_other_does(tree, beside):
    offer(
        tree,
        {"01_waits": {"makes": ["waited.txt"]}, "02_other": {"fixture": beside}, "03_needs": {"needs": ["02_other"]}},
    )
    with started(tree, "--jobs", "2", "--only", "01,02") as (process, _):
        wait_for(lambda: record()["notebooks"]["02_other"]["status"] in ("done", "failed"))
        assert record()["notebooks"]["01_waits"]["status"] == "running"
        (lib.run_folder("one") / "go.txt").touch()
        assert process.wait(60) == (beside == "fails")
    assert record()["notebooks"]["01_waits"]["status"] == "done"


def test_what_comes_after_another_waits_for_it_only_where_it_runs(tree, capsys):
    offer(tree, {"01_waits": {"makes": ["waited.txt"]}, "02_makes": {"after": ["01_waits"]}})
    assert run("--only", "02") == 0
    with started(tree, "--jobs", "2", "--overwrite") as (process, _):
        time.sleep(1)
        assert record()["notebooks"]["02_makes"]["status"] == "waiting"
        (lib.run_folder("one") / "go.txt").touch()
        assert process.wait(60) == 0
    (lib.run_folder("one") / "waited.txt").unlink()
    assert run("--resume", "--only", "01") == 0
    assert "Still to run with these settings: 02_makes" in capsys.readouterr().out


def test_one_at_a_time_keeps_the_order(tree):
    offer(tree, {"01_waits": {}, "02_makes": {}})
    with started(tree, "--jobs", "1") as (process, _):
        time.sleep(1)
        assert record()["notebooks"]["02_makes"]["status"] == "waiting"
        (lib.run_folder("one") / "go.txt").touch()
        assert process.wait(60) == 0


def test_a_killed_run_leaves_no_kernel_and_resumes(tree, capsys):
    offer(tree, {**MAKES, "02_waits": {"needs": ["01_makes"], "makes": ["waited.txt"]}})
    with started(tree) as (process, (kernel, _)):
        assert run("--resume") == 2
        assert "at work in another process" in capsys.readouterr().err
        process.kill()
        wait_for(lambda: gone(kernel), 10)
    assert record()["status"] == "running"
    (lib.run_folder("one") / "go.txt").touch()
    assert run("--resume") == 0
    assert "not repeated: 01_makes." in capsys.readouterr().out
    assert record()["status"] == "done"


REFUSED = {
    "unknown parameter": (["-p", "epoch=3"], ["'epoch'", "Did you mean 'epochs'?", "modalities"]),
    "of one notebook": (["-p", "02.rate=3"], ["02_needs has no parameter 'rate'", "epochs"]),
    "unknown notebook": (["--only", "09"], ["'09'", "01_makes, 02_needs"]),
    "a notebook in -p": (["-p", "09.rate=3"], ["'09'", "01_makes"]),
    "word for a number": (["-p", "epochs=many"], ["epochs of 01_makes cannot be 'many'", "a whole number"]),
    "fraction for a count": (["-p", "epochs=2.5"], ["a whole number"]),
    "truth for a count": (["-p", "epochs=true"], ["a whole number"]),
    "number for a truth": (["-p", "augment=3"], ["true or false"]),
    "nan": (["-p", "rate=nan"], ["a number"]),
    "the run by -p": (["-p", "run=x"], ["--run"]),
    "no value": (["-p", "epochs"], ["NAME=VALUE"]),
    "unknown option": (["--epochs", "3"], ["--epochs", "--help"]),
    "unknown profile": (["--profile", "huge"], ["'huge'", "tiny"]),
    "seed": (["--seed", "one"], ["'one'"]),
    "kernel": (["--kernel", "nope"], ["'nope'", "python3"]),
    "name": (["--run", "../x"], ["'../x'"]),
    "missing file": (["-f", "nowhere.yml"], ["nowhere.yml", "cannot be read"]),
    "needs": (["--only", "02"], ["02_needs needs 01_makes", "--only"]),
    "from": (["--from", "02"], ["02_needs needs 01_makes"]),
    "no notebook at a time": (["--jobs", "0"], ["--jobs", "'0'", "from 1"]),
    "nothing to resume": (["--resume"], ["no run 'one'"]),
    "both": (["--resume", "--overwrite"], ["Give one"]),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_starts(tree, capsys, options, said):
    offer(tree, NEEDS)
    assert run(*options) == 2
    err = capsys.readouterr().err
    for words in said:
        assert words in err
    assert len(err.strip().splitlines()) == 2
    assert not (tree / "reports").exists()


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "just words", b"\xff\xfe"])
def test_a_file_that_is_no_table_of_parameters(tree, capsys, content):
    offer(tree, NEEDS)
    file = tree / "values.yml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("-f", str(file)) == 2
    assert "values.yml is not a YAML file of parameters" in capsys.readouterr().err


def test_a_profile_that_sets_an_unknown_parameter_is_refused(tree, capsys):
    offer(tree, NEEDS, "[profiles.quick.01_makes]\nepoch = 1")
    assert run() == 2
    assert "'epoch'" in capsys.readouterr().err


def test_refused_data_leaves_nothing_behind(tree, capsys, monkeypatch):
    offer(tree, {"01_preprocessing": {"fixture": "makes"}})
    asked = {}

    def gather(data="", *, modalities="T1", seed=0, size=96):
        asked.update(modalities=modalities, seed=seed, size=size)
        raise CourseError("scan.nii.gz is empty.", "Copy it again.")

    monkeypatch.setattr("lib.intake.gather", gather)
    assert run("--modality", "T2", "--seed", "3") == 2
    assert capsys.readouterr().err == "scan.nii.gz is empty.\nCopy it again.\n"
    assert asked == {"modalities": "T2", "seed": 3, "size": 96}
    assert not (tree / "reports").exists()


def test_an_existing_run_is_not_written_over(tree, capsys):
    offer(tree, {"01_makes": {"makes": ["made.json"]}})
    folder = lib.run_folder("one")
    folder.mkdir(parents=True)
    (folder / "results.csv").write_text("mine")
    assert run() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "results.csv").read_text() == "mine"
    assert run("--overwrite", "-p", "epochs=no") == 2
    assert (folder / "results.csv").exists()
    assert run("--overwrite", "--quiet") == 0
    assert not (folder / "results.csv").exists()


def test_two_starts_in_one_second_get_two_folders(tree):
    with runs.claimed(None, "quick", False, False) as one, runs.claimed(None, "quick", False, False) as two:
        assert one != two
        assert one.name.endswith("_quick")
    assert not (tree / "reports").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_cell_time_left_and_the_last_line_on_one_line(tree, monkeypatch):
    offer(tree, {**MAKES, "02_dies": {}})
    before = {"run": "before", "status": "done", "settings": {"profile": "quick", "data": None}}
    before["notebooks"] = {name: {"status": "done", "seconds": 600.0} for name in ("01_makes", "02_dies")}
    lib.run_folder("before").mkdir(parents=True)
    (lib.run_folder("before") / "run.json").write_text(json.dumps(before))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("--only", "02") == 1
    shown = sys.stderr.getvalue()
    assert re.search(r"\r\x1b\[J1/1 02_dies · cell [12] of 3 · \d:\d\d · about (10:00|9:\d\d) left", shown)
    assert shown.count("\n") == 3  # the failure
    assert "\r\x1b[J02_dies failed" in shown  # on a line of its own


def test_list_shows_every_parameter_with_its_value_and_unit(tree, capsys):
    offer(tree, NEEDS, "[profiles.tiny.01_makes]\nepochs = 2")
    assert course.main(["--list", "--profile", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "01_makes  makes"
    assert any(
        line.split() == ["epochs", "=", "2", "epochs,", "1", "to", "100", "(default", "=", "3)"] for line in lines
    )
    assert any("flips × rotations" in line for line in lines)
    assert not (tree / "reports").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        course.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    options = "data healthy layout modality splits skip-broken profile run only from resume overwrite"
    assert [option for option in f"{options} device kernel seed jobs list".split() if f"--{option}" not in shown] == []


def test_paths_are_kept_as_given_and_hold_from_any_folder(tree, monkeypatch):
    offer(tree, NEEDS)
    monkeypatch.chdir(tree.parent)
    assert course._from_root("scans") == os.path.join("..", "scans")
    assert course._from_root("/data/scans") == "/data/scans"
    assert course._from_root("") == ""
