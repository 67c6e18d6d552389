"""Processes that run notebooks: what becomes of them reaches the run, whatever it is."""

import pytest

from lib import jobs
from lib.jobs import Job, Jobs, Place
from lib.runner import State


def begun(tmp_path) -> Jobs:
    """One at work on a notebook that is not there."""
    at_work = Jobs(quiet=True)
    there = {"source": tmp_path / "none.ipynb", "target": tmp_path / "x.ipynb", "log": tmp_path / "x.log"}
    at_work.start(Place("01_none", "1/1"), 1, **there, values={}, kernel="python3", root=tmp_path)
    return at_work


def test_an_error_in_the_process_is_raised_in_the_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        begun(tmp_path).next()


def test_a_process_that_is_killed_is_a_failure_and_one_that_is_ended_an_interruption(tmp_path):
    at_work = begun(tmp_path)
    next(iter(at_work._at_work.values())).process.kill()
    place, outcome = at_work.next()
    assert (place.name, outcome.status, outcome.error["name"]) == ("01_none", "failed", "NoRunner")
    assert len(at_work) == 0
    assert [outcome.status for _, outcome in begun(tmp_path).stop()] == ["interrupted"]


def test_the_line_of_a_job_says_where_it_is_and_what_is_left(monkeypatch):
    monkeypatch.setattr(jobs.time, "monotonic", lambda: 120.0)
    job = Job(Place("03_x", "2/7", later=600.0), None, State(5, 9, "epoch 3"), started=0.0)
    assert job.line() == "2/7 03_x · cell 5 of 9 · 2:00 · about 2:30 left · 12:30 for the course · epoch 3"
    known = Job(Place("03_x", "2/7", seconds=150.0), None, State(), started=0.0)
    assert known.line() == "2/7 03_x · starting · 2:00 · about 0:30 left"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (75, "1:15"), (3671, "1:01:11")])
def test_clock(seconds, text):
    assert jobs.clock(seconds) == text
