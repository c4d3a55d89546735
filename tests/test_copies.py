"""Commands that run as copies of a process: what their processes have of their own, and how they end."""

import sys

import pytest


OUTER = """
import subprocess, sys
print("outer", "torch" in sys.modules, flush=True)
subprocess.run([sys.executable, "-u", sys.argv[1], sys.argv[2]], env={"NAME": "inner"}, start_new_session=True)
print("over", flush=True)
sys.exit(3)
"""
INNER = """
import atexit, os, sys
atexit.register(print, "at exit")
print(__name__, os.environ["NAME"], os.getcwd() == sys.argv[1], "torch" in sys.modules, os.getsid(0) == os.getpid())
print("LOST" in os.environ)
"""
ENDS = {
    "signal": "import os; os.kill(os.getpid(), 9)",
    "error": "raise ValueError('wrong')",
    "exit": "exit('because')",
}


@pytest.mark.slow
def test_a_command_and_those_that_it_starts_have_all_of_their_own_but_the_imports(copies, tmp_path, monkeypatch):
    monkeypatch.setenv("LOST", "yes")
    for name, text in (("outer", OUTER), ("inner", INNER)):
        (tmp_path / f"{name}.py").write_text(text)
    ended = copies.run([sys.executable, tmp_path / "outer.py", tmp_path / "inner.py", tmp_path], cwd=tmp_path)
    printed = ["outer True", "__main__ inner True True True", "False", "at exit", "over"]
    assert (ended.stdout.splitlines(), ended.returncode) == (printed, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "said"), [("signal", -9, ""), ("error", 1, "wrong"), ("exit", 1, "because")]
)
def test_it_ends_as_a_program_does(copies, tmp_path, how, status, said):
    (tmp_path / "script.py").write_text(ENDS[how])
    ended = copies.run([sys.executable, tmp_path / "script.py"])
    assert ended.returncode == status and said in ended.stdout
