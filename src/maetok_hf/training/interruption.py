"""Stopping a run between two steps when it is asked to, on all processes at once."""

import atexit
import fcntl
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Seconds within which SIGINTs are one: Ctrl-C reaches a process both from the terminal and from its launcher.
REPEATED_AFTER = 2.0


class StopRequest:
    """
    Turns SIGTERM and SIGINT into a request that the training loop reads between two steps.

    A second SIGINT, some seconds later, raises `KeyboardInterrupt` at once. A run started by `accelerate launch` also
    stops when its launcher disappears, which a signal sent to the launcher alone would otherwise turn into a run that
    nobody knows of.
    """

    def __init__(self):
        self.signal_number, self._received = 0, 0.0
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        # A group of its own on the CPU: asking must neither wait for the accelerator nor disturb its collectives.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group = torch.distributed.new_group(backend="gloo") if distributed else None
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def release(self) -> None:
        """Give the signals their former effect, once there is nothing left to save."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._group = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal_number == signal.SIGINT and now - self._received > REPEATED_AFTER:
            raise KeyboardInterrupt
        self.signal_number, self._received = number, now

    def agreed(self) -> int:
        """
        The number of the signal that any process has received, the same on all of them, or 0.

        Every process must call this at the same point of its loop.
        """
        if self._launcher is not None and os.getppid() != self._launcher:
            self.signal_number = self.signal_number or signal.SIGTERM
        if self._group is None:
            return int(self.signal_number)
        number = torch.tensor([int(self.signal_number)])
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number)


def end_process() -> None:
    """
    End this process after a run that is over and closed, as one of several without the end of the interpreter.

    Threads of torch's process groups and of its autograd engine outlive `destroy_process_group`. One that asks for the
    interpreter while that shuts down aborts the process, and the launcher would report a finished run as failed. What
    is registered with `atexit` is done, and everything printed is flushed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class RunLock:
    """
    Keeps a second run out of an output folder for as long as this process lives.

    The lock belongs to the process and not to its children, so it ends with the process, however that ends.

    Args:
        output_dir (`str` or `Path`): The folder.
        patience (`float`, *optional*, defaults to 60.0): Seconds to wait for a run that is just saving its last
            checkpoint.

    Raises:
        ValueError: If another process still holds the folder.
    """

    def __init__(self, output_dir: str | Path, patience: float = 60.0):
        self._file = open(Path(output_dir) / LOCK_FILE, "w")
        deadline = time.monotonic() + patience
        waiting = False
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ValueError(
                        f"`output_dir` {output_dir} is in use by another process: wait for it, or choose another."
                    ) from None
                if not waiting:
                    logger.warning("%s is in use by another process: waiting up to %g s.", output_dir, patience)
                    waiting = True
                time.sleep(min(0.5, patience))

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()
