"""How much of the generation distance in the study of latent spaces is the decoder's, and how much the generator's.

gFD compares generated with real images, so it counts what the tokenizer loses as well. From what a study has left in
its folder, this measures in the same features of the same classifier

- the decoder's part: reconstructions of the training images against these images. Samples of a perfect generator on
  these latents would be that far from them;
- the generator's part: generated images against these reconstructions, in which all that the decoder does is on both
  sides.

Distances do not add up.

    make study
    python -m benchmarks.study_causes

writes `study_causes.json` and `.md`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from maetok_hf.data import to_pixel_values
from maetok_hf.models import AutoencoderMAE
from maetok_hf.sampling import to_uint8
from maetok_hf.study import measures
from maetok_hf.study.cells import Cell
from maetok_hf.study.images import proportional_labels
from maetok_hf.study.options import StudyOptions
from maetok_hf.study.running import Study

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results


COMMAND = "python -m benchmarks.study_causes"
COLUMNS = {
    "decoder": "reconstructed against real training images: the decoder's part",
    "generator": "generated against reconstructed training images: the generator's part",
    "both": "generated against real training images: gFD",
}


@torch.no_grad()
def reconstruct(tokenizer: AutoencoderMAE, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Reconstructions as `(n, 3, height, width)` of bytes, of images of the same form."""
    parts = [tokenizer(to_pixel_values(part, tokenizer.device)).sample for part in images.split(batch_size)]
    return torch.cat([to_uint8(part).permute(0, 3, 1, 2) for part in parts])


def measure(study: Study, cell: Cell) -> dict[str, float]:
    """The distances of a cell whose tokenizer and generator are there."""
    batch_size, extract = study.preset.batch_size, study.classifier.extract
    tokenizer = study.load_tokenizer(cell)
    reconstructed = extract(reconstruct(tokenizer, study.train.images, batch_size), batch_size)["pool"]
    pipe = measures.load_pipeline(cell.generator(study.root), tokenizer, study.device)
    labels = proportional_labels(study.train.counts, study.budget.num_samples)
    generated = extract(measures.sample(pipe, labels, study.budget.num_inference_steps), batch_size)["pool"]
    return {
        "decoder": measures.distance(reconstructed, study.real),
        "generator": measures.distance(generated, reconstructed),
        "both": measures.distance(generated, study.real),
    }


def measure_all(study: Study) -> list[dict[str, Any]]:
    """The distances of all cells of a study that have left their models."""
    study.prepare()
    found = []
    for cell in study.cells:
        models = (cell.tokenizer(study.root) / "config.json", cell.generator(study.root) / "model_index.json")
        if all(path.is_file() for path in models):
            found.append({"variant": cell.variant.title, "seed": cell.seed, **measure(study, cell)})
            print(found[-1], flush=True)
    if not found:
        raise SystemExit(f"{study.root / study.preset.name} holds no finished cell: run `make study` first.")
    return found


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        [cell["variant"], str(cell["seed"]), *(f"{cell[name]:.2f}" for name in COLUMNS)] for cell in report["cells"]
    ]
    lines = ["# The decoder's and the generator's part of the distances in the study", ""]
    lines += table(["tokenizer", "seed", *COLUMNS.values()], rows)
    lines += [f"Fréchet distances in the features of the {report['classifier']}, from cells whose models were there."]
    lines += ["", "## How it was measured", "", *str(__doc__).split("\n\n    make study")[0].splitlines()[2:], ""]
    lines += [f"- {machine_line(report['machine'])}", "", "```", report["command"], "```"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the table is written.")
    parser.add_argument("--output_dir", default=StudyOptions.output_dir, help="The folder of the study.")
    parser.add_argument("--study_dir", default=StudyOptions.results_dir, help="The folder of its document.")
    parser.add_argument("--preset", default=StudyOptions.preset, help="Which study.")
    args = parser.parse_args()
    options = StudyOptions(preset=args.preset, output_dir=args.output_dir, results_dir=args.study_dir)
    study = Study(options, ROOT / "examples")
    torch.set_num_threads(options.num_threads)
    report = {
        "command": COMMAND,
        "classifier": study.preset.classifier,
        "cells": measure_all(study),
        "machine": machine("diffusers"),
    }
    write_results(args.results_dir, "study_causes", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
