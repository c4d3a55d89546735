#!/usr/bin/env python
"""The paper's comparison of latent spaces: tokenizers of one budget, the same generator on each, tables and pictures.

    make study

or, with the package installed (`pip install '.[study]'`):

    python examples/study_latents.py                  # AE, KL-VAE, MAETok and MAETok with its decoder fine-tuned
    python examples/study_latents.py --full           # all tokenizers, after whatever is done already
    python examples/study_latents.py --dry_run        # what would be run, and for how long
    npm pack emoji-datasource-google
    python examples/study_latents.py --preset gpu --package emoji-datasource-google-16.0.0.tgz

Each tokenizer of each seed is a cell: it is trained by `accelerate launch examples/train_maetok.py`, its latents are
cached, a SiT is trained on them, and reconstructions, latents, generator and samples are measured. When a cell is
finished, its record is written to `study/cells` in `--results_dir` and in `--output_dir`, and the document
`study.md` is written anew from all records. A cell whose record is in one of them is not run again, and whatever
stopped or killed the study, the same command goes on: with the next step of a training, the next part of the measures.

The plan of the preset `cpu` without `--full` on 2 cores, at rates measured there (tokenizer 46 ms a step, AE 35;
fine-tuning 27; SiT 72; a sample of 50 steps 17.8 ms; a launch 9 s; other measures of a cell 25 s):

    9 tokenizers x (3000 steps x 46 ms + 9 s)                   =  1323 s
    3 fine-tunings x (500 steps x 27 ms + 9 s)                  =    68 s
    9 caches of latents                                         =    81 s
    9 SiTs x (2500 steps x 72 ms + 9 s)                         =  1701 s
    12 x 2000 + 9 x 3 x 500 samples x 17.8 ms                   =   668 s
    12 cells x 25 s                                             =   300 s
                                                                   4141 s, 69 minutes

The fine-tuned tokenizer has the encoder of its base and so, bit for bit, its latents: a tenth SiT trained on them with
the same seed would be the same network, so the generator of the base decodes by the fine-tuned decoder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from maetok_hf.study.options import StudyOptions
from maetok_hf.study.running import Study
from maetok_hf.training.configuration import add_flags, build, given_flags


SCRIPTS = Path(__file__).resolve().parent


def parse_options(words: Sequence[str] | None = None) -> StudyOptions:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, StudyOptions, "what to study")
    try:
        return build(StudyOptions, given_flags(parser.parse_args(words), StudyOptions))
    except ValueError as error:
        parser.error(str(error))


def main(words: Sequence[str] | None = None) -> None:
    options = parse_options(words)
    try:
        Study(options, SCRIPTS).run()
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
