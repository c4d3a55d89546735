"""Run a training script in which one process sends itself a signal at a chosen moment.

    accelerate launch faulty_launch.py MOMENT:COUNT:SIGNAL:RANK script.py flags...

sends SIGNAL (KILL, TERM, INT) in process RANK just before the COUNT-th call of what MOMENT names; FAIL raises an
error there.
"""

import os
import runpy
import signal
import sys

import torch
from accelerate import Accelerator

from maetok_hf.training import checkpointing


MOMENTS = {
    "backward": (Accelerator, "backward"),  # within a step
    "write": (torch, "save"),  # within a checkpoint: models are written, the optimiser or random states are not
    "flush": (checkpointing, "flush_to_disk"),  # all files are written, not yet flushed
    "rename": (checkpointing, "_complete"),  # all but the state file and the rename
    "export": (checkpointing, "export"),  # after the last checkpoint
}


def install(fault: str) -> None:
    moment, count, name, rank = fault.split(":")
    if rank != os.environ.get("RANK", "0"):
        return
    owner, attribute = MOMENTS[moment]
    original, calls = getattr(owner, attribute), []

    def wrapped(*arguments, **keywords):
        calls.append(moment)
        if len(calls) == int(count) and name == "FAIL":
            raise RuntimeError("a fault for this test")
        if len(calls) == int(count):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return original(*arguments, **keywords)

    setattr(owner, attribute, wrapped)


if __name__ == "__main__":
    fault, script, *flags = sys.argv[1:]
    install(fault)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
