"""Running a training as a process that ends with this one, however that ends."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from .interruption import RunLock


def run_command(command: list[str], output_dir: Path) -> int:
    """
    Run a training command. Its processes get SIGTERM, upon which the training saves a checkpoint, on Ctrl-C or SIGTERM
    here (`accelerate launch` would not pass these on), and also if this process or the `make` that started it is
    killed. A second Ctrl-C kills them.

    Args:
        command (`list[str]`): Words of the command line.
        output_dir (`Path`): The training's folder.

    Returns:
        `int`: Its status; 128 and the number of the signal if this process got one.
    """
    process, received = None, []

    def forward() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if received.count(signal.SIGINT) > 1 else signal.SIGTERM)

    def receive(number: int, frame) -> None:
        received.append(number)
        if process is not None:
            forward()

    maker = os.getppid() if "MAKELEVEL" in os.environ else None
    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        # The end of this process, whatever its cause, is the end of the watcher's input.
        watch = f"read -r _; kill -s TERM -- -{process.pid}"
        watcher = subprocess.Popen(["sh", "-c", watch], stdin=subprocess.PIPE, start_new_session=True)
        if received:  # before there was a process
            forward()
        while process.poll() is None:
            if maker not in (None, os.getppid()) and not received:
                receive(signal.SIGTERM, None)
            time.sleep(0.2)
        watcher.kill()
        watcher.communicate()
        if received and (output_dir / ".lock").exists():
            RunLock(output_dir).release()  # the launcher is gone, but the training may still be saving
        return 128 + received[0] if received else process.returncode
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
