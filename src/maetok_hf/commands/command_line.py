"""What commands have in common: flags from a dataclass, and tables."""

import argparse
from collections.abc import Sequence
from typing import TypeVar

from ..training.configuration import add_flags, build, given_flags


T = TypeVar("T")


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
    add_flags(parser, cls, "options")
    try:
        return build(cls, given_flags(parser.parse_args(words), cls))
    except ValueError as error:
        parser.error(str(error))


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
