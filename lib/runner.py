"""One notebook in a kernel of its own: its execution, and the watch over its kernel."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LOOK_SECONDS = 0.2
STATE_SECONDS = 15  # between two kept states of a line that overwrites itself


@dataclass(frozen=True)
class Outcome:
    """How a notebook went: `status` done, failed or interrupted; `error` has `cell`, `name` and `message`."""

    status: str
    seconds: float
    peak_memory_gb: float
    error: dict | None


@dataclass(frozen=True)
class State:
    """How far a notebook is: the code cell it is in, from 1, of how many, and the last line it said."""

    cell: int = 0
    cells: int = 0
    said: str = ""


Tell = Callable[[State], None]


def execute(source: Path, target: Path, log: Path, values: dict, *, kernel: str, root: Path, tell: Tell) -> Outcome:
    """Run a notebook with `values` for its parameters; `target` and `log` are written while it runs.

    Every cell must have run. SIGTERM and a `tell` that nobody hears any more (OSError) end the kernel: `interrupted`.
    The process must have no other children.
    """
    started = time.monotonic()
    with _Log(log) as text, _Watch(tell, text, _count_cells(source) + bool(values)) as watch:
        try:
            with contextlib.chdir(root):
                error = _run(source, target, values, kernel, root, text, watch)
        except RuntimeError:  # nbclient's DeadKernelError, and its plain one where the kernel dies at its start
            error = _death(watch)
            _mark(target, watch.index, error)
        if error:
            text.write(f"\n{error['name']}: {error['message']}\n")
    status = "interrupted" if watch.stopped else "failed" if error else "done"
    return Outcome(status, round(time.monotonic() - started, 2), round(watch.peak / 1e9, 3), error)


def _count_cells(source: Path) -> int:
    return sum(c["cell_type"] == "code" and bool(c["source"]) for c in json.loads(source.read_bytes())["cells"])


def _run(source, target, values, kernel, root, text, watch) -> dict | None:
    import papermill  # a second and a half

    papermill.log.logger.setLevel("CRITICAL")
    paths = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ["COURSE_NOTEBOOK"] = source.stem  # whose times scoring notes
    source, target = (os.path.relpath(path, root) for path in (source, target))  # as the notebook will say them
    try:
        notebook = papermill.execute_notebook(
            source, target, values, kernel_name=kernel, language="python", progress_bar=False,
            start_timeout=120, stdout_file=text, stderr_file=text, on_cell_start=watch.enter,
            extra_arguments=["--log-level=CRITICAL"],
        )  # fmt: skip
    except papermill.PapermillExecutionError as failure:
        text.write("\n" + ANSI.sub("", "\n".join(failure.traceback)) + "\n")
        return {"cell": failure.exec_count, "name": failure.ename, "message": ANSI.sub("", failure.evalue)}
    return _unrun(notebook)


def _unrun(notebook) -> dict | None:
    """papermill takes `sys.exit(0)` for success and calls the cells behind it completed."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    last = max((c.execution_count or 0 for c in cells), default=0)
    rest = sum(c.execution_count is None for c in cells)
    exits = any(output.output_type == "error" for c in cells for output in c.outputs)
    if not rest and not exits:
        return None
    message = f"The cell ended the notebook; {rest} of its cells did not run."
    return {"cell": last, "name": "SystemExit", "message": message}


def _death(watch: "_Watch") -> dict:
    if watch.stopped:
        return {"cell": watch.cell or None, "name": "Interrupted", "message": "The run was interrupted here."}
    if not watch.cell:
        return {"cell": None, "name": "NoKernel", "message": "The kernel did not start."}
    total = psutil.virtual_memory().total / 1e9
    used = f"it had used up to {watch.peak / 1e9:.1f} GB of the machine's {total:.1f} GB of memory"
    return {"cell": watch.cell, "name": "KernelDied", "message": f"The kernel was killed in this cell; {used}."}


def _mark(target: Path, index: int, error: dict) -> None:
    """Show in the executed notebook where it stopped, when the kernel could not."""
    import nbformat

    notebook = nbformat.read(target, as_version=4)
    message = f"{error['name']}: {error['message']}"
    shown = nbformat.v4.new_output("error", ename=error["name"], evalue=error["message"], traceback=[message])
    cell = next(c for c in notebook.cells[index:] if c.cell_type == "code")
    cell.outputs.append(shown)
    nbformat.write(notebook, target)


class _Log:
    """A notebook's text, written as it comes; of a line that overwrites itself, a state now and then and the last."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._open, self._kept, self.last = "", time.monotonic(), ""

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        self.write("\n" if self._open.strip() else "")
        self._file.close()

    def write(self, text: str) -> None:
        *lines, self._open = (self._open + text).split("\n")
        for line in lines:
            self._keep(line)
        state = self._open.rstrip("\r").rpartition("\r")[2]
        self.last = state.strip() or self.last
        if "\r" in self._open and time.monotonic() - self._kept > STATE_SECONDS:
            self._keep(state)
            self._open = ""

    def flush(self) -> None:
        self._file.flush()

    def _keep(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2]
        self._kept, self.last = time.monotonic(), line.strip() or self.last
        self._file.write(line + "\n")


class _Watch:
    """Looks at a kernel while it works: `peak` memory in bytes, the cell it is in; tells how far it is; can end it."""

    def __init__(self, tell: Tell, log: _Log, cells: int):
        self.peak, self.cell, self.index, self.stopped = 0, 0, 0, False
        self._tell, self._log, self._cells = tell, log, cells
        self._seen: set[psutil.Process] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "_Watch":
        self._before = signal.signal(signal.SIGTERM, self.stop)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        self._kill(self._seen)
        signal.signal(signal.SIGTERM, self._before)

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._measure()
            try:
                self._tell(State(self.cell, self._cells, self._log.last))
            except OSError:
                self.stop()

    def enter(self, cell, cell_index: int) -> None:
        """nbclient's call before each cell."""
        if self.stopped:
            raise RuntimeError("interrupted before this cell")
        if cell.cell_type == "code" and cell.source.strip():
            self.cell, self.index = self.cell + 1, cell_index

    def stop(self, *_) -> None:
        """The handler of SIGTERM: without its kernel the execution ends by itself."""
        self.stopped = True
        self._kill(self._processes())

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process().children(recursive=True)
        return []

    @staticmethod
    def _kill(processes) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _measure(self) -> None:
        together = 0
        for process in self._processes():
            self._seen.add(process)
            with contextlib.suppress(psutil.Error, OSError):
                together += process.memory_info().rss
                self.peak = max(self.peak, _most_memory(process.pid))
        self.peak = max(self.peak, together)


def _most_memory(pid: int) -> int:
    """The kernel's own record of a process's peak resident memory, in bytes; 0 where the system keeps none."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
