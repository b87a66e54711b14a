"""Reading ahead in other processes, which signals do not reach, and which end when this one does."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What asks a program to end: Ctrl-C, job queues, a terminal that is closed. Windows has no SIGHUP."""

_WORKERS: WeakSet[BaseProcess] = WeakSet()


def read_ahead(dataset: Dataset[Any], *, workers: int, **options: Any) -> Iterator[Any]:
    """The batches of a DataLoader with these options; workers leave signals to the main process, and end with it."""
    ahead: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _leave_signals_to_the_main_process}
    others = set(multiprocessing.active_children())
    batches = iter(DataLoader(dataset, num_workers=workers, **options, **(ahead if workers else {})))
    _WORKERS.update(set(multiprocessing.active_children()) - others)
    return _without_tracebacks(batches)


def _without_tracebacks(batches: Iterator[Any]) -> Iterator[Any]:
    """A mistake that a worker has found, as it would be said here: without the lines of code that led to it."""
    try:
        yield from batches
    except ValueError as error:
        *code, said = str(error).strip().splitlines() or [""]
        if not code:
            raise
        raise ValueError(said.removeprefix("ValueError: ")) from error


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, `timeout` and job queues signal workers too, whose end would be an error where they are read.

    The main process saves where it stands. A worker that is still being started does not know of this yet, which takes
    seconds where processes are not forked.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Workers can outlive an exception, and ignore SIGTERM, with which Python would end them; so they are killed."""
    left = [worker for worker in _WORKERS if worker.is_alive()]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for worker in left:
        worker.kill()
