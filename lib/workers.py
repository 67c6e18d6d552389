"""The same work for many subjects: in processes of this machine, or on a Dask cluster that is given by its address."""

import contextlib
import hashlib
import logging
import os
import platform
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from lib.errors import CourseError
from lib.progress import bar

FEW = 4  # items for which no further process is worth its start
ADDRESS = re.compile(r"(tcp|tls)://[^/]+:\d+")
ANSWER_SECONDS = 10  # that a scheduler and its workers have to answer
SAME = ("numpy", "scipy", "scikit-image", "nibabel", "joblib", "distributed")  # or results and messages may differ
START = "README.md, under 'Many scans', says how workers are started."


def each(
    function: Callable,
    items: Iterable,
    *,
    what: str,
    unit: str,
    cluster: str = "",
    needs: Sequence[Path] = (),
    writes: Path | None = None,
) -> Iterator:
    """What `function` returns for each of the items, in their order, under a bar that says `what`.

    `cluster`: address of a Dask scheduler, as tcp://HOST:8786; "" for processes of this machine, a core and a thread
    each, where that is worth their start. `needs`: paths that a worker of the cluster must see; `writes`: a folder that
    is the same one there, and can be written. Work of a worker that dies is done again by another.
    Raises CourseError where the cluster is not to be used, or processes die again and again.
    """
    items = list(items)
    if not items:
        return
    with contextlib.ExitStack() as stack:
        if cluster:
            client = stack.enter_context(_client(cluster))
            _check(client, cluster, needs, writes)
            found = _on_cluster(client, partial(_within, os.getcwd(), function), items)
        else:
            found = _in_processes(function, items)
        stack.enter_context(_told(cluster, what))
        yield from bar(found, what, total=len(items), unit=unit)


def _in_processes(function: Callable, items: list) -> Iterator:
    workers = min(os.cpu_count() or 1, max(1, len(items) // FEW))
    with parallel_config("loky", inner_max_num_threads=1):
        return Parallel(n_jobs=workers, return_as="generator")(delayed(function)(item) for item in items)


def _on_cluster(client, function: Callable, items: list) -> Iterator:
    """By distributed itself: joblib's backend for it (1.6) works in this process where the cluster has a single worker,
    and waits for ever where a task cannot begin."""
    for future in client.map(function, items, pure=False):
        while not future.done():
            with contextlib.suppress(TimeoutError):
                future.exception(timeout=ANSWER_SECONDS)
            if not future.done():  # it takes long, or nobody is left to do it
                client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        yield future.result()


def check(cluster: str) -> None:
    """Raise CourseError where there is no cluster at an address that works as this machine does."""
    with _client(cluster) as client:
        _check(client, cluster, (), None)


def _within(folder: str, function: Callable, item):
    """Paths are relative to the folder where the work was asked for."""
    os.chdir(folder)
    return function(item)


@contextlib.contextmanager
def _client(address: str):
    nobody = f"No Dask scheduler answers at {address!r}."
    cure = f"Give --cluster the address that it prints, tcp://HOST:PORT. {START}"
    if not ADDRESS.fullmatch(address):
        raise CourseError(nobody, cure)
    try:
        from distributed import Client
    except ImportError as error:
        what = "A cluster needs the package distributed, which is not installed."
        raise CourseError(what, "Install it by: pip install -r requirements-extra.txt") from error
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is said by _check and _told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other versions are told of in _check
        try:
            client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
        except (OSError, ValueError, AssertionError) as error:  # the last where its thread does not start in time
            raise CourseError(nobody, cure) from error
    with client:
        yield client


def _check(client, address: str, needs: Sequence[Path], writes: Path | None) -> None:
    """Refuse a cluster without workers, or a member that has another version or does not see the same folders."""
    for member, (versions, lack) in _members(client, address, needs, writes):
        other = {name: version for name, version in versions.items() if version != about().get(name)}
        if other:
            cure = "Give all machines the same versions, and start scheduler and workers again."
            unlike = ", ".join(f"{name} {version} instead of {about()[name]}" for name, version in other.items())
            raise CourseError(f"The {member} has {unlike}.", cure)
        if lack:
            cure = "Mount it under the same path on every machine, for the same user."
            raise CourseError(f"The {member} {lack}.", cure)


def _members(client, address: str, needs: Sequence[Path], writes: Path | None) -> Iterator[tuple[str, tuple]]:
    """What `_look` finds at the scheduler and each worker, by their names for people."""
    try:
        scheduler = client.run_on_scheduler(about)
    except Exception as error:
        raise CourseError(f"The scheduler {address} cannot use lib: {error}.", START) from error
    yield f"scheduler {address}", (scheduler, "")
    mark = writes / f".{uuid.uuid4().hex}" if writes else None
    try:
        if mark:
            writes.mkdir(parents=True, exist_ok=True)
            mark.touch()
        found = client.run(_look, os.getcwd(), [str(path) for path in needs], mark, on_error="return")
    finally:
        if mark:
            mark.unlink(missing_ok=True)
    if not found:
        raise CourseError(f"The Dask scheduler at {address} has no workers.", START)
    for worker, seen in found.items():
        if isinstance(seen, Exception):
            raise CourseError(f"The worker {worker} cannot use lib: {seen}.", START)
        yield f"worker {worker}", seen


def _look(folder: str, needs: list[str], mark: Path | None) -> tuple[dict[str, str], str]:
    """What a worker is, and what it lacks, in words; "" for nothing."""
    lost = next((path for path in (folder, *needs) if not os.access(path, os.R_OK)), None)
    if lost:
        return about(), f"cannot read {lost}"
    if mark:
        if not mark.exists():
            return about(), f"does not see the same {mark.parent}"
        try:
            beside = mark.with_name(f"{mark.name}-{uuid.uuid4().hex}")
            beside.touch()
            beside.unlink()
        except OSError as error:
            return about(), f"cannot write {mark.parent}: {error.strerror}"
    return about(), ""


@cache
def about() -> dict[str, str]:
    """Versions that must be the same wherever the work is done, and a checksum of this library."""
    here = Path(__file__).parent
    code = b"".join(path.read_bytes() for path in sorted(here.rglob("*.py")))
    versions = {"python": platform.python_version()} | {name: version(name) for name in SAME}
    return versions | {"the library": hashlib.sha256(code).hexdigest()[:12], "the path of lib": str(here)}


@contextlib.contextmanager
def _told(cluster: str, what: str):
    """The end of processes that had work, in words."""
    try:
        yield
    except TerminatedWorkerError as error:
        said = f"A process was ended from outside while {what}, as happens where memory runs out."
        raise CourseError(said, "Close other programs and start again; what is finished is kept.") from error
    except Exception as error:
        lost = isinstance(error, TimeoutError) or type(error).__module__.startswith("distributed.")
        if not cluster or not lost:
            raise
        said = f"The cluster at {cluster} was lost while {what}: {type(error).__name__}."
        raise CourseError(said, "See to its workers' memory and start again; what is finished is kept.") from error
