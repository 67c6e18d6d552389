import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TOOLS = ["bash", "cat", "cmp", "cp", "dirname", "env", "flock", "mkdir", "readlink", "rm", "sleep", "tee"]
COURSE = "import os, sys\nimport tiny\nprint(sys.prefix, os.getcwd(), tiny.VERSION, *sys.argv[1:], sep='|')\n"
PYTHON = """#!/usr/bin/env bash
case "$FAKE|$*" in
    old*sys.version_info*|no_pip*'-m pip'*|no_*'import ensurepip'*) exit 1 ;;
    old*--version*) echo Python 3.9.2; exit ;;
    no_*'-m venv /'*) exit 1 ;;
    no_slow*'pip '*install*) : >"$HOME/slow" && sleep 30 ;;
esac
exec "$REAL" "$@"
"""
SPEAKS = "import sys\nprint('{name}', *sys.argv[1:])\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="set-up is tested on Linux")


def wheel(folder: Path, name: str, version: str, **modules: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {f"{module}.py": text for module, text in modules.items()}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


class Clone:
    """A copy of the scripts beside requirements of a few bytes, and a machine with a Python and little else."""

    def __init__(self, home: Path):
        self.home, self.root, self.bin, self.wheels = home, home / "a clone", home / "bin", home / "wheels"
        (self.root / "lib").mkdir(parents=True)
        (self.root / "notebooks").mkdir()
        self.bin.mkdir()
        for script in ("setup.sh", "run_all.sh", "run_tests.sh"):
            shutil.copy(ROOT / script, self.root)
        (self.root / "lib" / "__init__.py").touch()
        (self.root / "lib" / "course.py").write_text(COURSE)
        (self.root / "requirements.txt").write_text("tiny==1.0\n")
        (self.root / "requirements-dev.txt").write_text("-r requirements.txt\nextra==1.0\n")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        (self.bin / "python3").write_text(PYTHON)
        (self.bin / "python3").chmod(0o755)
        wheel(self.wheels, "tiny", "1.0", tiny="VERSION = '1.0'")
        tools = {name: SPEAKS.format(name=name) for name in ("ruff", "nbstripout", "pytest")}
        wheel(self.wheels, "extra", "1.0", **tools)

    def start(self, *arguments: str, script: str = "run_all.sh", fake: str = "no_ensurepip", **variables: str):
        environment = {"PATH": str(self.bin), "HOME": str(self.home), "REAL": sys._base_executable, "FAKE": fake}
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [self.root / script, *arguments]
        options = {"cwd": self.home, "env": environment | variables, "start_new_session": True}
        return subprocess.Popen(command, **options, **pipes)

    def run(self, *arguments: str, **options) -> tuple[int, str, str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        return process.returncode, out, err

    def said(self, *arguments: str, prefix: Path | None = None, version: str = "1.0") -> str:
        return "|".join([str(prefix or self.root / ".venv"), str(self.home), version, *arguments]) + "\n"


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_the_first_start_sets_up_and_the_second_does_not(clone):
    status, out, err = clone.run("--data", "my scans", fake="")
    assert (status, out) == (0, clone.said("--data", "my scans"))
    assert err.startswith("Setting up once")
    shutil.rmtree(clone.wheels)
    assert clone.run() == (0, clone.said(), "")


def test_without_ensurepip_the_systems_pip_fills_the_environment(clone):
    status, out, _ = clone.run(fake="no_ensurepip")
    assert (status, out) == (0, clone.said())
    assert not (clone.root / ".venv" / "bin" / "pip").exists()


@pytest.mark.parametrize(
    ("fake", "said"),
    [("old", ["3.11 or newer", "Python 3.9.2", "apt install"]), ("no_pip", ["has no pip", "apt install python3-pip"])],
)
def test_a_machine_that_cannot_do_it_gets_a_sentence_and_the_cure(clone, fake, said):
    status, out, err = clone.run(fake=fake)
    assert (status, out) == (2, "")
    assert all(words in err for words in said)
    assert clone.run()[:2] == (0, clone.said())


def test_no_python_at_all(clone):
    (clone.bin / "python3").unlink()
    status, _, err = clone.run()
    assert status == 2
    assert "here is none" in err


def test_a_folder_that_cannot_be_written(clone):
    if os.geteuid():
        pytest.skip("only root can start a process as somebody else")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        other = Clone(Path(folder) / "home")
        command = ["/bin/bash", other.root / "run_all.sh"]
        environment = {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            command, user=65534, group=65534, cwd="/", env=environment, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_failed_installation_names_its_log_and_mends_itself(clone):
    (clone.root / "requirements.txt").write_text("tiny==2.0\n")
    status, out, err = clone.run()
    log = clone.root / ".venv" / "setup.log"
    assert (status, out) == (2, "")
    assert "could not be installed" in err
    assert str(log) in err
    assert "tiny==2.0" in log.read_text()
    wheel(clone.wheels, "tiny", "2.0", tiny="VERSION = '2.0'")
    assert clone.run()[:2] == (0, clone.said(version="2.0"))


def test_an_interrupted_set_up_mends_itself(clone):
    process = clone.start(fake="no_slow")
    end = time.monotonic() + 30
    while not (clone.home / "slow").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start again" in err
    assert clone.run()[:2] == (0, clone.said())


def test_changed_requirements_and_a_broken_environment_are_set_up_again(clone):
    clone.run()
    (clone.root / ".venv" / "mine").touch()
    wheel(clone.wheels, "tiny", "1.1", tiny="VERSION = '1.1'")
    (clone.root / "requirements.txt").write_text("tiny==1.1\n")
    assert clone.run()[:2] == (0, clone.said(version="1.1"))
    assert (clone.root / ".venv" / "mine").exists()  # filled up, not made anew
    (clone.root / ".venv" / "bin" / "python3").unlink()
    assert clone.run()[:2] == (0, clone.said(version="1.1"))


def test_two_starts_at_once_set_up_once(clone):
    ended = [process.communicate(timeout=60) for process in [clone.start("1"), clone.start("2")]]
    assert [out for out, _ in ended] == [clone.said("1"), clone.said("2")]
    assert sum("Setting up once" in err for _, err in ended) == 1


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_where_it_has_the_packages(clone, variable):
    mine = clone.home / "mine"
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", mine], check=True)
    status, out, err = clone.run(**{variable: str(mine)})
    assert (status, out) == (0, clone.said())
    assert "lacks tiny 1.0; .venv is used" in err
    shutil.rmtree(clone.root / ".venv")
    with zipfile.ZipFile(clone.wheels / "tiny-1.0-py3-none-any.whl") as archive:
        archive.extractall(next(mine.glob("lib/python3*/site-packages")))
    assert clone.run(**{variable: str(mine)}) == (0, clone.said(prefix=mine), "")
    assert not (clone.root / ".venv").exists()


def test_run_tests_checks_style_and_notebooks_and_hands_its_arguments_to_pytest(clone):
    clone.run()
    (clone.root / "notebooks" / "01_x.ipynb").touch()
    status, out, _ = clone.run("-k", "one or two", script="run_tests.sh")
    assert status == 0
    checks, called = out.rsplit("\n", 2)[:2]
    assert checks == "ruff check\nnbstripout --verify notebooks/01_x.ipynb"
    assert called == "pytest -n 2 --dist loadfile --no-loadscope-reorder -k one or two"
    assert clone.run()[2] == ""
    module = next(clone.root.glob(".venv/lib/python3*/site-packages/nbstripout.py"))
    module.write_text("raise SystemExit(1)")
    status, out, err = clone.run(script="run_tests.sh")
    assert (status, out) == (2, "ruff check\n")
    assert "stored with outputs" in err


def test_requirements_and_environment_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.txt"]
    assert "python>=3.11,<3.14" in environment["dependencies"]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-extra.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned(name):
    lines = (ROOT / name).read_text().split("\n")
    assert all(line.count("==") == 1 for line in lines if line and not line.startswith("-r requirements"))


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh", "explore.sh", ".ci/run"])
def test_scripts_can_be_started(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)
