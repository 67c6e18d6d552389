"""Workers: the same results wherever the work is done, and every end of a worker in words."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from lib import workers
from lib.errors import CourseError

TELL = {"what": "testing", "unit": "item"}


def square(number):
    return number * number


def refuse(number):
    raise CourseError(f"{number}.flair is empty.", "Copy it again.")


def where(_):
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")


def end(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)


@pytest.mark.parametrize("number", [0, 1, 3, 40])
def test_results_come_in_the_order_of_the_items(two_cores, number):
    assert list(workers.each(square, range(number), **TELL)) == [n * n for n in range(number)]


def test_few_items_are_done_here_and_many_by_processes_of_one_thread(two_cores):
    assert {pid for pid, _ in workers.each(where, range(3), **TELL)} == {os.getpid()}
    pids, threads = zip(*workers.each(where, range(40), **TELL), strict=True)
    assert os.getpid() not in pids
    assert set(threads) == {"1"}


@pytest.mark.parametrize("number", [1, 40])
def test_a_refusal_arrives_as_it_was_raised(two_cores, number):
    with pytest.raises(CourseError) as caught:
        list(workers.each(refuse, range(number), **TELL))
    assert caught.value.what.endswith(".flair is empty.")
    assert caught.value.cure == "Copy it again."


def test_a_killed_process_is_told_in_words(two_cores):
    with pytest.raises(CourseError, match="ended from outside while testing") as caught:
        list(workers.each(end, range(40), **TELL))
    assert "is kept" in caught.value.cure


def test_without_work_nobody_is_asked():
    assert list(workers.each(square, [], cluster="tcp://nowhere:1", **TELL)) == []


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense", "smoke://127.0.0.1:1"])
def test_an_address_where_nobody_answers_is_refused(monkeypatch, address):
    pytest.importorskip("distributed", reason="the extra package distributed is not installed")
    monkeypatch.setattr(workers, "ANSWER_SECONDS", 1)
    with pytest.raises(CourseError, match=f"No Dask scheduler answers at '{address}'"):
        workers.check(address)


def test_a_missing_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CourseError, match=r"package distributed.*\n.*requirements-extra\.txt"):
        workers.check("tcp://127.0.0.1:8786")


class Members:
    """A scheduler and its workers, as a client of Dask shows them."""

    def __init__(self, scheduler=None, found=()):
        self.scheduler, self.found = scheduler or workers.about(), dict(found)

    def run_on_scheduler(self, function):
        if isinstance(self.scheduler, Exception):
            raise self.scheduler
        return self.scheduler

    def run(self, function, *arguments, on_error):
        return {name: answer(*arguments) if callable(answer) else answer for name, answer in self.found.items()}


LIKE = {"w": workers._look}
WITHOUT_LIB = ModuleNotFoundError("No module named 'lib'")
UNFIT = {
    "no workers": (Members(), "has no workers"),
    "a scheduler without lib": (Members(WITHOUT_LIB, LIKE), "scheduler tcp://x cannot use lib: No module"),
    "a worker without lib": (Members(None, {"w": WITHOUT_LIB}), "worker w cannot use lib: No module"),
    "another scheduler": (Members(workers.about() | {"numpy": "1.0"}, LIKE), "tcp://x has numpy 1.0 instead"),
    "another worker": (
        Members(None, {"w": (workers.about() | {"the library": "0"}, "")}),
        "has the library 0 inst",
    ),
    "a worker that writes elsewhere": (
        Members(None, {"w": lambda a, b, mark: workers._look(a, b, mark.with_name("other"))}),
        "worker w does not see the same",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_cluster_is_refused_before_work_begins(monkeypatch, tmp_path, kind):
    members, said = UNFIT[kind]

    @contextmanager
    def reached(_):
        yield members

    monkeypatch.setattr(workers, "_client", reached)
    with pytest.raises(CourseError, match=said) as caught:
        list(workers.each(square, [1], cluster="tcp://x", writes=tmp_path / "place", **TELL))
    assert caught.value.cure
    assert list(tmp_path.glob("place/.*")) == []


def test_a_worker_says_what_it_cannot_reach(tmp_path):
    here, gone = str(tmp_path), str(tmp_path / "gone")
    mark = tmp_path / ".mark"
    mark.touch()
    assert workers._look(here, [here], mark) == (workers.about(), "")
    assert workers._look(here, [gone], None)[1] == f"cannot read {gone}"
    assert workers._look(gone, [], None)[1] == f"cannot read {gone}"
    assert [path.name for path in tmp_path.iterdir()] == [".mark"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    mark = tmp_path / ".mark"
    mark.touch()
    tmp_path.chmod(0o500)
    assert "cannot write" in workers._look(str(tmp_path), [], mark)[1]


def test_what_a_worker_is_names_this_library():
    assert Path(workers.about()["the path of lib"]) == Path(workers.__file__).parent
