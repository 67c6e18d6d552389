"""Notebooks side by side, each run by a process of its own, and lines that say how far they are."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection

from lib.runner import LOOK_SECONDS, Outcome, State, execute

SPAWN = multiprocessing.get_context("spawn")  # a process that inherits nothing, so that no pipe outlives the run
LINE_SECONDS = 15  # between two lines of progress where there is no terminal
TERMINAL_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """A notebook's place in the course, for its line of progress.

    `seconds`, `later`: what it takes and what remains then of the course, as far as an earlier run tells.
    """

    name: str
    number: str
    seconds: float | None = None
    later: float | None = None


@dataclass
class Job:
    """A notebook at work."""

    place: Place
    process: SPAWN.Process
    state: State = field(default_factory=State)
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        return " · ".join(self._parts(time.monotonic() - self.started))

    def _parts(self, elapsed: float) -> Iterator[str]:
        state, left = self.state, self._left(elapsed)
        yield f"{self.place.number} {self.place.name}"
        yield f"cell {state.cell} of {state.cells}" if state.cell else "starting"
        yield clock(elapsed)
        if left is not None:
            yield f"about {clock(left)} left"
            if self.place.later:
                yield f"{clock(left + self.place.later)} for the course"
        if state.said:
            yield state.said

    def _left(self, elapsed: float) -> float | None:
        if self.place.seconds and self.place.seconds > elapsed:
            return self.place.seconds - elapsed
        done = self.state.cell - 1
        return elapsed * (self.state.cells - done) / done if done > 1 else None


class Jobs:
    """The notebooks at work, by the pipes on which their processes tell how far they are and at last the outcome."""

    def __init__(self, quiet: bool):
        self._quiet, self._shown, self._stopping = quiet, time.monotonic(), False
        self._at_work: dict[connection.Connection, Job] = {}

    def __len__(self) -> int:
        return len(self._at_work)

    def start(self, place: Place, threads: int, **call) -> None:
        """Begin `runner.execute(**call)` with so many threads of computation."""
        ours, theirs = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_work, args=(theirs, threads, call), daemon=True)
        with _deaf():
            process.start()
        theirs.close()
        self._at_work[ours] = Job(place, process)

    def next(self) -> tuple[Place, Outcome]:
        """Wait for one to end, showing meanwhile how far they are."""
        while True:
            for pipe in connection.wait(list(self._at_work), LOOK_SECONDS):
                said = self._hear(pipe)
                if isinstance(said, Outcome):
                    return self._ended(pipe), said
                self._at_work[pipe].state = said
            self._show()

    def stop(self) -> Iterator[tuple[Place, Outcome]]:
        """End them all."""
        self._stopping = True
        for job in self._at_work.values():
            job.process.terminate()
        while self._at_work:
            yield self.next()

    def _ended(self, pipe: connection.Connection) -> Place:
        job = self._at_work.pop(pipe)
        job.process.join()
        if sys.stderr.isatty() and not self._quiet:
            print("\r\033[J", end="", file=sys.stderr, flush=True)
        return job.place

    def _hear(self, pipe: connection.Connection) -> State | Outcome:
        try:
            said = pipe.recv()
            if isinstance(said, Exception):
                raise said
            return said
        except EOFError:
            status = "interrupted" if self._stopping else "failed"
            error = {"cell": None, "name": "NoRunner", "message": "The process that ran it was killed."}
            return Outcome(status, round(time.monotonic() - self._at_work[pipe].started, 2), 0.0, error)

    def _show(self) -> None:
        """A line each, over those before on a terminal, else now and then."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if self._quiet or now - self._shown < (TERMINAL_SECONDS if terminal else LINE_SECONDS):
            return
        self._shown = now
        width = shutil.get_terminal_size().columns - 1 if terminal else None
        lines = "\n".join(job.line()[:width] for job in self._at_work.values())
        back = "\033[A" * (len(self._at_work) - 1)
        sys.stderr.write(f"\r\033[J{lines}{back}" if terminal else f"{lines}\n")
        sys.stderr.flush()


def _work(pipe: connection.Connection, threads: int, call: dict) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        outcome = execute(**call, tell=pipe.send)
    except Exception as error:
        outcome = error
    with contextlib.suppress(BrokenPipeError):
        pipe.send(outcome)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """A process that starts here ignores a terminal's interrupt; it is ended by SIGTERM."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
