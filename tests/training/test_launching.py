"""A training that another program runs ends with that program, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from maetok_hf.training.interruption import RunLock


# Like a training process: holds the folder, and takes a while to save when it is told to stop
TRAINING = """
import signal, sys, time
from pathlib import Path
from maetok_hf.training.interruption import RunLock
folder = Path(sys.argv[1])
lock = RunLock(folder)
def save(number, frame):
    time.sleep(1)
    (folder / "saved").write_text(str(number))
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
(folder / "begun").touch()
time.sleep(600)
"""
# Like `accelerate launch`: passes no signal on
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
"""
PROGRAM = """
import sys
from pathlib import Path
from maetok_hf.training.launching import run_command
launcher, training, folder = sys.argv[1:]
sys.exit(run_command([sys.executable, "-c", launcher, training, folder], Path(folder)))
"""
# Like `make`: waits for its recipe
MAKER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
print(process.pid, flush=True)
process.wait()
"""


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "name"),
    # a terminal sends SIGINT to `make` and to the program
    [("program", "INT"), ("program", "TERM"), ("program", "KILL"), ("make", "TERM"), ("make", "KILL")],
)
def test_training_saves_and_ends_when_the_program_is_stopped_or_killed(tmp_path, whom, name):
    command = [sys.executable, "-c", MAKER, PROGRAM, LAUNCHER, TRAINING, str(tmp_path)]
    environment = os.environ | {"MAKELEVEL": "1"}
    maker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        program = int(maker.stdout.readline())
        wait_for((tmp_path / "begun").exists)
        os.kill(program if whom == "program" else maker.pid, getattr(signal, f"SIG{name}"))
        maker.wait(timeout=60)
        if whom == "program" and name != "KILL":
            # a stop that is obeyed has been waited for
            assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
        RunLock(tmp_path, patience=60.0).release()
        assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(maker.pid, signal.SIGKILL)
        maker.stdout.close()
