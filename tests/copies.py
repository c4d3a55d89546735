"""Python commands run as copies of a process that has imported what takes long.

When a training is tiny, most seconds of its command go to imports. Here the command is forked instead of started anew,
and so is every Python command that it starts in turn: `accelerate launch`, torch's elastic
agent and the scripts' processes are the real ones, with their environment, their signals and their exit statuses.
Copies share the seed of Python's hashes; tests that compare two runs start one of them anew.

What a library reads of the environment when it is imported, as `huggingface_hub` does, stays what it was.
"""

import atexit
import importlib
import inspect
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

from tests.testing_utils import kill_with_children


ROOT = Path(__file__).parents[1]
TIMEOUT = 600.0  # seconds of a command


class Copies:
    """
    Runs commands: `copies.run([sys.executable, ...])`. The process that is copied is started on first use and ends
    with the block.
    """

    def __init__(self):
        self._server = None

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, *exception) -> None:
        if self._server is not None:
            self._server.stdin.close()
            try:
                self._server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                kill_with_children(self._server.pid)
            self._server.stdout.close()

    def run(self, command: list, env: dict[str, str] | None = None, cwd=None) -> subprocess.CompletedProcess:
        """
        Run a command to its end.

        Args:
            command (`list`): `sys.executable`, then a script or `-m` and a module, then their words.
            env (`dict`, *optional*): The environment, this process's own by default.
            cwd (`str` or `Path`, *optional*): The folder to run in.

        Returns:
            `subprocess.CompletedProcess`: The status, and everything printed as `stdout`.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.copies"],
                cwd=ROOT,
                # threads that are there already would be missing in the copies
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        words = list(map(str, command))
        request = {"words": words, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The process that is copied has ended with status {self._server.wait()}: see its stderr."
            )
        answer = json.loads(line)
        return subprocess.CompletedProcess(words, answer["status"], answer["output"])


def script_of(words: list) -> list[str] | None:
    """The words after the interpreter of a command that a copy can run."""
    words = list(map(str, words))
    if words[:1] != [sys.executable]:
        return None
    words = words[2:] if words[1:2] == ["-u"] else words[1:]
    return words if words[:1] == ["-m"] or (words and words[0].endswith(".py")) else None


def run_script(words: list[str]) -> None:
    """A script, or `-m` and a module, as the main program of this process."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        sys.modules.pop(words[1], None)  # an imported module would run with a warning
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


def end_as_a_program(work) -> NoReturn:
    """Do the work and end this process as the interpreter would, but for the frames that it has from its original."""
    status = 1
    try:
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def copy_python_commands() -> None:
    """From now on this process, and its copies, fork for a Python command that inherits their streams."""
    # in the class: torch's elastic agent has imported it by its name
    start = subprocess.Popen._execute_child

    def copy_or_start(self, *settings):
        given = inspect.signature(start).bind(self, *settings).arguments
        words = script_of(given["args"]) if isinstance(given["args"], (list, tuple)) else None
        if words is None or any(given[name] != -1 for name in ("p2cread", "c2pwrite", "errwrite")):
            start(self, *settings)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            end_as_a_program(lambda: become(words, given["env"], given["cwd"], given["start_new_session"]))
        self._child_created = True

    subprocess.Popen._execute_child = copy_or_start


def become(words: list[str], env: dict[str, str] | None, cwd: str | None, new_session: bool) -> None:
    """Turn a fork into what a new process would be, and run its command."""
    for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)
    if new_session:
        os.setsid()
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    random.seed()  # or all copies would draw the same numbers where they must not draw any
    np.random.seed()
    run_script(words)


def answer(request: dict) -> dict:
    """Run one command and collect what is printed until the last process that could print has ended."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.close(write)
        copy_python_commands()
        end_as_a_program(lambda: become(script_of(request["words"]), request["env"], request["cwd"], True))
    os.close(write)
    output, deadline = [], time.monotonic() + TIMEOUT
    while select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
        output.append(os.read(read, 1 << 16))
        if not output[-1]:
            break
    else:
        kill_with_children(process)
        output.append(f"\nended after {TIMEOUT:g} seconds\n".encode())
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"status": status, "output": b"".join(output).decode(errors="replace")}


def import_everything() -> None:
    import accelerate.commands.launch  # noqa: F401
    import datasets  # noqa: F401
    import sklearn.linear_model  # noqa: F401
    import torch.distributed.run  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchao.quantization  # noqa: F401
    import torchmetrics  # noqa: F401
    import transformers  # noqa: F401

    import maetok_hf.training

    for name in maetok_hf.__all__:
        getattr(maetok_hf, name)
    for info in pkgutil.iter_modules(maetok_hf.training.__path__):
        importlib.import_module(f"maetok_hf.training.{info.name}")


def main() -> None:
    import_everything()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
