"""`maetok-analyze`: what the latents of tokenizers are like, side by side. See `examples/analyze_latents.py`."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from ..analysis.options import AnalysisOptions
from ..analysis.report import to_markdown
from ..analysis.run import MARKDOWN_FILE, REPORT_FILE, run_analysis
from .command_line import parse_words
from .processes import Processes


DESCRIPTION = """
Compare the latents of tokenizers: a linear probe, Gaussian mixtures of several sizes, a picture by UMAP, statistics of
the channels and effective ranks, on the same images for all. Prints a table, and writes it with the protocol, JSON and
pictures. The same command continues what was stopped, and measures nothing twice.
"""


def parse_options(words: Sequence[str] | None = None) -> AnalysisOptions:
    """
    The command line: one flag for every field of [`AnalysisOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`AnalysisOptions`]: What is asked for.
    """
    return parse_words("maetok-analyze", DESCRIPTION, AnalysisOptions, words)


def check_launcher() -> None:
    """
    Refuse several processes, each of which would measure the same.

    Raises:
        ValueError: If this is one of several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ValueError(
            f"maetok-analyze runs as one process, and there are {size}: launch it with `--num_processes 1`, or "
            "without a launcher. To encode by several, cache the latents with "
            "examples/cache_latents.py and give that folder."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.
    """
    options = parse_options(argv)
    check_launcher()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("maetok_hf").setLevel(logging.INFO)
    processes = Processes(options.device)
    processes.release()  # what is done is on the disk, so that a signal may end the process at once
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        report = run_analysis(options, processes.device, processes.metric_device)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(to_markdown(report))
    print(f"{REPORT_FILE}, {MARKDOWN_FILE} and pictures are in {options.output_dir}.")


if __name__ == "__main__":
    main()
