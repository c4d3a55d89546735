"""Run code blocks of a page one after the other in the current folder: `python run_blocks.py < BLOCKS`, a JSON list.

Each block is a language and its code, and each command runs in a copy of this process, which has imported what takes
long: what `accelerate launch` starts is started directly, as one process.
"""

import json
import os
import runpy
import sys
from importlib.metadata import entry_points

from tests.copies import end_as_a_program


def run_command(words: list[str]) -> None:
    """A console command, or a script behind `accelerate launch`."""
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        assert words[0].endswith(".py"), words
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
    else:
        (entry,) = entry_points(group="console_scripts", name=words[0])
        sys.argv = words
        entry.load()()


def run_in_a_copy(work) -> int:
    """The exit status of a piece of work."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    end_as_a_program(work)


def main() -> None:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import torchmetrics  # noqa: F401
    import transformers  # noqa: F401

    import maetok_hf  # noqa: F401
    from tests.documentation import read_commands

    for language, code in json.load(sys.stdin):
        works = [lambda code=code: exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})]
        if language == "bash":
            works = [lambda words=words: run_command(words) for words in read_commands(code)]
        for work in works:
            if status := run_in_a_copy(work):
                sys.exit(f"Status {status} of\n{code}")


if __name__ == "__main__":
    main()
