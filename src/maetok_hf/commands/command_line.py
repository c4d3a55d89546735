"""What commands have in common: flags from a dataclass, a run on some processes, and tables."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ..evaluation.hub_results import ResultsUpload
from ..training.configuration import add_flags, build, given_flags
from ..training.interruption import end_process
from .processes import Processes


T = TypeVar("T")


class Evaluation(Protocol):
    """What one process of a command does; `measure` returns a report on the main process, and `None` on others."""

    def measure(self) -> dict[str, Any] | None: ...


def parse_words(prog: str, description: str, cls: type[T], words: Sequence[str] | None = None) -> T:
    """
    Read a command line with one flag for every field of a dataclass.

    Args:
        prog (`str`): The command.
        description (`str`): What it does, for `--help`.
        cls (`type`): The dataclass.
        words (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.

    Returns:
        The dataclass, checked.

    Raises:
        SystemExit: With a message, if a flag or its value is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add_flags(parser, cls, "options", defaults=True)
    try:
        return build(cls, given_flags(parser.parse_args(words), cls))
    except ValueError as error:
        parser.error(str(error))


def run_evaluation(
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
        make (`Callable[[Processes], Evaluation]`): Makes what this process does.
        device (`str`): `"auto"`, `"cpu"` or `"cuda"`.
        show (`Callable[[Mapping[str, Any]], str]`): What is printed of a report.
        files (`str`): What was written, and where, in words.
        repo_id (`str`, *optional*): Repository on the Hub for the results.
        push (`Callable[[ResultsUpload, Mapping[str, Any]], str]`): Uploads a report, and returns its address.

    Raises:
        ValueError: If the Hub refuses, before any work.
        OSError: If the results are not uploaded, after they have been printed.
    """
    logging.basicConfig(format="%(message)s")
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
