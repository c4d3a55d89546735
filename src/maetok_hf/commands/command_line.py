"""What commands have in common: flags from a dataclass, a run on some processes, and tables."""

import argparse
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

from ..evaluation.hub_results import ResultsUpload
from ..training.configuration import add_flags, build, given_flags
from ..training.interruption import end_process
from .processes import Processes


EXIT_CODES = """
exit codes: 0 when all is done, 1 if something cannot be read, measured or written, 2 for a wrong command line, 128 and
the number of the signal that stopped it; after 1 and a signal, the same command goes on with what is there.
"""
T = TypeVar("T")


class Evaluation(Protocol):
    """What one process of a command does; `measure` returns a report on the main process, and `None` on others."""

    def measure(self) -> dict[str, Any] | None: ...


def quiet_others() -> None:
    """Third parties' noise: no bars of loading, none of downloads in logs, no message twice, and not the warning that
    diffusers makes huggingface_hub give for every download. What else they warn of stays."""
    from diffusers.utils.logging import disable_progress_bar
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import disable_propagation

    disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    disable_propagation()  # it has a handler of its own
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


@contextmanager
def reported_errors(prog: str) -> Iterator[None]:
    """
    End the process with a line, not a traceback, if what the user gave or the machine is the cause.

    Args:
        prog (`str`): The command, for the line.

    Raises:
        SystemExit: With the line, which makes the status 1, in place of an `ImportError`, `OSError` or `ValueError`;
            with 130 after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"{prog}: error: {error}") from error


def parse_words(
    prog: str,
    description: str,
    examples: str,
    cls: type[T],
    words: Sequence[str] | None = None,
    positional: Sequence[str] = (),
    notes: str = EXIT_CODES,
) -> T:
    """
    Read a command line with one flag for every other field of a dataclass.

    Args:
        prog (`str`): The command.
        description (`str`): What it does, for `--help`.
        examples (`str`): Command lines, for `--help`.
        cls (`type`): The dataclass.
        words (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.
        positional (`Sequence[str]`, *optional*): Fields that are given without a flag, in their order.
        notes (`str`, *optional*): What stands below the examples; by default what its statuses mean.

    Returns:
        The dataclass, checked.

    Raises:
        SystemExit: With a message, if a flag or its value is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}{notes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version("maetok_hf"))
    add_flags(parser, cls, "options", defaults=True, positional=positional)
    try:
        return build(cls, given_flags(parser.parse_args(words), cls))
    except ValueError as error:
        parser.error(str(error))


def run_evaluation(
    prog: str,
    make: Callable[[Processes], Evaluation],
    device: str,
    show: Callable[[Mapping[str, Any]], str],
    files: str,
    repo_id: str | None,
    push: Callable[[ResultsUpload, Mapping[str, Any]], str],
) -> None:
    """
    Evaluate, print what was measured, upload it if that is asked for, and end the process.

    Args:
        prog (`str`): The command, for the line of an error.
        make (`Callable[[Processes], Evaluation]`): Makes what this process does.
        device (`str`): `"auto"`, `"cpu"` or `"cuda"`.
        show (`Callable[[Mapping[str, Any]], str]`): What is printed of a report.
        files (`str`): What was written, and where, in words.
        repo_id (`str`, *optional*): Repository on the Hub for the results.
        push (`Callable[[ResultsUpload, Mapping[str, Any]], str]`): Uploads a report, and returns its address.

    Raises:
        SystemExit: With a message, if something cannot be read, measured or written, or the Hub refuses, which it is
            asked before any work. If the upload fails later, the results have been printed.
    """
    logging.basicConfig(format="%(message)s")
    quiet_others()
    with reported_errors(prog):
        processes = Processes(device)
        try:
            upload = ResultsUpload(repo_id) if repo_id is not None and processes.is_main else None
            report = make(processes).measure()
        finally:
            processes.release()
        if report is not None:
            print(f"{show(report)}\n{files}")
            if upload is not None:
                print(f"The results are on the Hub: {push(upload, report)}")
    end_process()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A Markdown table.

    Args:
        head (`Sequence[str]`): Titles of the columns.
        rows (`Sequence[Sequence[str]]`): Entries.

    Returns:
        `str`: Lines without an end of line.
    """
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
