"""The processes that read ahead for a data loader: how they begin, what they outlive, and how they end."""

import atexit
import contextlib
import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.process import BaseProcess

import torch


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # to be ended when this process ends


def enter_worker() -> tuple[int, int]:
    """
    Prepare a data worker's process for reading; does nothing outside of one.

    Returns:
        `tuple[int, int]`: Number of this worker and of all workers, `(0, 1)` outside of one.
    """
    info = torch.utils.data.get_worker_info()
    if info is None:
        return 0, 1
    import fsspec.asyn
    import pyarrow

    fsspec.asyn.reset_lock()  # a forked lock of a remote file system may be held for ever
    # Arrow's other pools give memory back so eagerly that rows are read at a page fault for every 4 KiB.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    # PIL warns in words that differ from file to file, of what is counted anyway or does not touch the pixels.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    return info.id, info.num_workers


def outlive_stop_signal(worker_id: int) -> None:
    """
    `worker_init_fn` of a data loader: SIGINT and SIGTERM do not end the worker, so that signals to the whole process
    group, which schedulers and launchers send more than once, leave the training process the batches it needs to
    finish its step and save.

    None is left behind: [`ending_at_exit`] kills the workers when the main process ends by itself, and torch's workers
    look every few seconds whether the main process is still there (`MP_STATUS_CHECK_INTERVAL`), and end if it was
    killed.

    Args:
        worker_id (`int`): Number of the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def ending_at_exit() -> Iterator[None]:
    """
    The processes that are started inside are killed when this process ends, however it fails. Otherwise
    multiprocessing would send them SIGTERM, which [`outlive_stop_signal`] ignores, and wait for ever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        _workers.update(set(multiprocessing.active_children()) - before)
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # anew, to be called before what was registered earlier


def _end_workers() -> None:
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each, after the error that matters
    for worker in alive:
        worker.kill()
