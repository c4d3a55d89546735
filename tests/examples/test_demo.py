"""`demo.py`: a stage ends with the demonstration, however that ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maetok_hf.training.interruption import RunLock


DEMO = Path(__file__).parents[2] / "examples" / "demo.py"

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
STAGE = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
launcher, training, folder = sys.argv[2:]
sys.exit(demo.run_stage([sys.executable, "-c", launcher, training, folder], Path(folder)))
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
    # a terminal sends SIGINT to `make` and to the demonstration
    [("demo", "INT"), ("demo", "TERM"), ("demo", "KILL"), ("make", "TERM"), ("make", "KILL")],
)
def test_training_saves_and_ends_when_the_demonstration_is_stopped_or_killed(tmp_path, whom, name):
    command = [sys.executable, "-c", MAKER, STAGE, str(DEMO), LAUNCHER, TRAINING, str(tmp_path)]
    environment = os.environ | {"MAKELEVEL": "1"}
    maker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        demo = int(maker.stdout.readline())
        wait_for((tmp_path / "begun").exists)
        os.kill(demo if whom == "demo" else maker.pid, getattr(signal, f"SIG{name}"))
        maker.wait(timeout=60)
        if whom == "demo" and name != "KILL":
            # a stop that is obeyed has been waited for
            assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
        RunLock(tmp_path, patience=60.0).release()
        assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(maker.pid, signal.SIGKILL)
        maker.stdout.close()
