"""A request to stop is heard between two steps; a folder belongs to one run at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from maetok_hf.training.interruption import RunLock, StopRequest


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    request = StopRequest()
    yield request
    request.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_remembered_until_the_loop_asks(stop, number):
    assert stop.agreed() == 0
    os.kill(os.getpid(), number)
    assert stop.agreed() == number


def test_interrupts_at_once_are_one(stop):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed() == signal.SIGINT


def test_second_interrupt_does_not_wait_for_the_step(stop, monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    later = time.monotonic() + 5.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_launcher_that_passes_on_an_interrupt_as_sigterm_does_not_abort_the_step(stop):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed() == signal.SIGTERM


def test_release_gives_the_signals_their_former_effect(monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    request = StopRequest()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    request.release()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("launched", [True, False])
def test_launched_run_stops_when_its_launcher_is_gone(monkeypatch, launched):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    request = StopRequest()
    try:
        assert request.agreed() == 0
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert request.agreed() == (signal.SIGTERM if launched else 0)
    finally:
        request.release()


HOLDER = """
import sys, time
from maetok_hf.training.interruption import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_second_run_is_kept_out_until_the_first_is_gone_however_it_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by another process"):
            RunLock(tmp_path, patience=0.0)
        holder.kill()
        holder.wait()
        RunLock(tmp_path, patience=0.0).release()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_end_of_a_process_does_what_was_registered_and_succeeds(processes):
    code = """
import atexit
from maetok_hf.training.interruption import end_process
atexit.register(print, "registered")
print("printed ", end="")
end_process()
print("the interpreter's own end")
"""
    environment = os.environ | {"WORLD_SIZE": str(processes)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, timeout=60
    )
    expected = {1: "printed the interpreter's own end\nregistered\n", 2: "printed registered\n"}
    assert (result.returncode, result.stdout) == (0, expected[processes])
