"""`maetok-analyze`: what the latents of tokenizers are like, side by side. See `examples/analyze_latents.py`."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from ..analysis.options import AnalysisOptions
from ..analysis.report import to_markdown
from ..analysis.run import MARKDOWN_FILE, REPORT_FILE, run_analysis
from .command_line import parse_words, quiet_others, reported_errors
from .processes import Processes


PROG = "maetok-analyze"
DESCRIPTION = """\
Compare the latents of tokenizers: a linear probe, Gaussian mixtures of several sizes, a picture by UMAP, statistics of
the channels and effective ranks, on the same images for all. Prints a table, and writes it with the protocol, JSON and
pictures. The same command continues what was stopped, and measures nothing twice.
"""
EXAMPLES = f"""\
  {PROG} --tokenizer runs/tokenizer stabilityai/sd-vae-ft-ema --dataset ILSVRC/imagenet-1k \\
      --held_out_split validation --output_dir runs/analysis
  {PROG} --tokenizer runs/autoencoder runs/maetok --names AE MAETok --dataset path/to/images --resolution 64 \\
      --mixture_sizes 10 20 50 --output_dir runs/analysis
  {PROG} --tokenizer runs/latents runs/latents-vae --output_dir runs/analysis
"""


def parse_options(words: Sequence[str] | None = None) -> AnalysisOptions:
    """
    The command line: one flag for every field of [`AnalysisOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`AnalysisOptions`]: What is asked for.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, AnalysisOptions, words)


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
    logging.basicConfig(format="%(message)s")
    logging.getLogger("maetok_hf").setLevel(logging.INFO)
    quiet_others()
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with reported_errors(PROG):
            check_launcher()
            processes = Processes(options.device)
            processes.release()  # what is done is on the disk, so that a signal may end the process at once
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            report = run_analysis(options, processes.device, processes.metric_device)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(to_markdown(report))
    print(f"{REPORT_FILE}, {MARKDOWN_FILE} and pictures are in {options.output_dir}.")


if __name__ == "__main__":
    main()
