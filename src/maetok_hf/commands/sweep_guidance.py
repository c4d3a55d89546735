"""`maetok-eval guidance`: scores over scales and intervals of guidance. See `examples/sweep_guidance.py`."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation import EvaluationProtocol
from ..evaluation.extractors import extractor_identity
from ..evaluation.feature_run import FeatureRun
from ..evaluation.hub_results import ResultsUpload
from ..evaluation.options import SweepOptions, generate_options
from ..evaluation.pipeline_images import PipelineImages
from ..evaluation.scores import (
    LABELS,
    check_counts,
    check_layers,
    compute_scores,
    needed_layers,
    needed_reference_layers,
)
from ..sampling import load_pipeline
from ..training.checkpointing import write_json, write_text
from .command_line import parse_words, run_evaluation, table
from .evaluate_generation import KEY_LENGTH, ReferenceRun, layers_of, open_extractor, protocol_of
from .processes import Processes


PROG = "maetok-eval guidance"
DESCRIPTION = """\
Score a pipeline's images over scales and intervals of guidance. Prints a table with its protocol, and writes both,
JSON and a picture. Each cell is kept when it is measured: the same command continues what was stopped, on any number
of processes, and one with more scales or intervals adds these.
"""
EXAMPLES = f"""\
  {PROG} --pretrained_model_name_or_path runs/generator --reference VIRTUAL_imagenet256_labeled.npz \\
      --guidance_scales 1 1.5 1.9 2.5 --guidance_intervals 0,1 0,0.75 --num_images 10000 --output_dir runs/guidance
"""
REPORT_FILE = "guidance.json"
MARKDOWN_FILE = "guidance.md"
PICTURE_FILE = "guidance.png"
DPI = 150


class Cell(NamedTuple):
    """
    One way to guide.

    Args:
        method (`str`, *optional*): `None` for the pipeline's own.
        scale (`float`): 1 is no guidance.
        interval (`tuple[float, float]`, *optional*): Lowest and highest time; `None` at scale 1.
    """

    method: str | None
    scale: float
    interval: tuple[float, float] | None

    @property
    def name(self) -> str:
        """`str`: For its folder and messages."""
        if self.interval is None:
            return "unguided"
        low, high = self.interval
        return f"{self.method or 'guidance'}-{self.scale:g}-{low:g}-{high:g}"


def make_cells(options: SweepOptions) -> list[Cell]:
    """
    All that is to be measured.

    Args:
        options ([`SweepOptions`]): What is asked for.

    Returns:
        `list[Cell]`: Scale 1 once, as that is no guidance by any method in any interval.
    """
    cells: list[Cell] = []
    for method in options.guidance_methods or [None]:
        for scale in options.guidance_scales:
            intervals = options.intervals() if scale != 1 else [None]
            cells += [Cell(method, scale, interval) for interval in intervals]
    unguided = [cell for cell in cells if cell.interval is None]
    return [cell for cell in cells if cell not in unguided[1:]]


def parse_options(words: Sequence[str] | None = None) -> SweepOptions:
    """
    The command line: one flag for every field of [`SweepOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`SweepOptions`]: What is asked for.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, SweepOptions, words)


class GuidanceSweep:
    """
    What one process of a sweep knows and does.

    Args:
        options ([`SweepOptions`]): What is asked for.
        processes ([`Processes`]): This one and the others.

    Raises:
        OSError: If weights are missing; says which file to put where.
        ValueError: If the pipeline cannot be guided so, or the folder holds another sweep.
    """

    def __init__(self, options: SweepOptions, processes: Processes):
        self.options, self.processes, self.folder = options, processes, Path(options.output_dir)
        self.extractor = open_extractor(options, processes.device)
        pipe = load_pipeline(options, processes.device)
        self.cells = make_cells(options)
        # All are checked, and all processes agree on what is missing, before the first image.
        digests: dict[str, str] = {}
        self.images = {cell: PipelineImages(pipe, self._generation(cell), digests) for cell in self.cells}
        layers = layers_of(self.extractor, self.images[self.cells[0]].shape)
        check_layers(options.metrics, layers, self.extractor.name)
        self.reference = None
        if any(needed_reference_layers(options.metrics)):
            self.reference = ReferenceRun(options, self.extractor, layers, processes)
        num_reference = None if self.reference is None else self.reference.num_images
        check_counts(options.metrics, options.num_images, num_reference, options.kid_subset_size)
        self.records: dict[Cell, dict[str, Any]] = {}
        self.runs: dict[Cell, FeatureRun] = {}
        for cell in self.cells:
            record = processes.share(self._find(cell) if processes.is_main else None)
            if record is not None:
                self.records[cell] = record
                continue
            where = self._place(cell) / "features"
            protocol = extractor_identity(self.extractor) | {"images": self._identity(cell)}
            arguments = (where, options.num_images, protocol, *needed_layers(options.metrics))
            self.runs[cell] = FeatureRun(*arguments, **processes.shares(), description=f"images of {cell.name}")

    def measure(self) -> dict[str, Any] | None:
        """
        Score this process' share of the images of all cells; on the main process write the report.

        Returns:
            `dict[str, Any]`, *optional*: On the main process, `cells` with their `results` and the `protocol`.
        """
        if self.reference is not None and self.runs:
            self.reference.collect(self.options.batch_size)
        for cell in list(self.runs):
            run = self.runs.pop(cell)  # what it has in memory goes with it
            run.collect(self.images[cell], self.extractor, self.options.batch_size, stop=self.processes.stop)
            if self.processes.is_main:
                self.records[cell] = self._score(cell, run)
        if not self.processes.is_main:
            return None
        report = {
            "cells": [
                {"method": cell.method, "scale": cell.scale, "interval": cell.interval, **self.records[cell]}
                for cell in self.cells
            ]
        }
        report = json.loads(json.dumps(report))
        write_json(self.folder / REPORT_FILE, report)
        write_text(self.folder / MARKDOWN_FILE, to_markdown(report))
        draw(self.folder / PICTURE_FILE, report)
        return report

    def _score(self, cell: Cell, run: FeatureRun) -> dict[str, Any]:
        options = self.options
        generated = run.result(stop=self.processes.stop)
        reference = None if self.reference is None else self.reference.result()
        results = compute_scores(
            options.metrics,
            generated,
            reference,
            extractor=options.extractor,
            kid_subset_size=options.kid_subset_size,
            device=self.processes.metric_device,
        )
        images = self.images[cell]
        protocol = protocol_of(options, self.extractor, self.reference, images, images.settings)
        record = {"results": results, "protocol": protocol.to_dict()}
        write_json(self._place(cell) / "record.json", {"identity": self._record_identity(cell), **record})
        run.remove()
        return record

    def _find(self, cell: Cell) -> dict[str, Any] | None:
        path = self._place(cell) / "record.json"
        if not path.is_file():
            return None
        shutil.rmtree(path.with_name("features"), ignore_errors=True)  # of a run that was killed after its record
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: record[name] for name in ("results", "protocol")}

    def _place(self, cell: Cell) -> Path:
        """A folder for the cell with these settings: with others it is another one."""
        key = json.dumps(self._record_identity(cell), sort_keys=True)
        return self.folder / "cells" / f"{cell.name}-{hashlib.blake2b(key.encode()).hexdigest()[:KEY_LENGTH]}"

    def _generation(self, cell: Cell) -> Any:
        guidance: dict[str, Any] = {"guidance_method": cell.method, "guidance_scale": cell.scale}
        if cell.interval is not None:
            guidance["guidance_interval"] = list(cell.interval)
        if cell.interval is None or cell.method not in (None, "autoguidance"):
            guidance["guidance_transformer_name_or_path"] = None  # which has no effect there
        return generate_options(self.options, **guidance)

    def _identity(self, cell: Cell) -> dict[str, Any]:
        return {"settings": self.images[cell].settings, "batch_size": self.options.batch_size}

    def _record_identity(self, cell: Cell) -> dict[str, Any]:
        return {
            **self._identity(cell),
            **extractor_identity(self.extractor),
            "metrics": self.options.metrics,
            "kid_subset_size": self.options.kid_subset_size,
            "reference": None if self.reference is None else self.reference.identity,
        }


def to_markdown(report: Mapping[str, Any]) -> str:
    """
    What is printed of a report.

    Args:
        report (`Mapping[str, Any]`): Of [`~GuidanceSweep.measure`].

    Returns:
        `str`: A Markdown table, and what all cells have in common in the protocol.
    """
    names = list(report["cells"][0]["results"])
    rows = []
    for cell in report["cells"]:
        numbers = [f"{cell['results'][name]:.4f}" for name in names]
        rows.append([cell["protocol"]["guidance"], f"{cell['scale']:g}", *numbers])
    protocol = EvaluationProtocol(**report["cells"][0]["protocol"] | {"guidance": "as in the table"})
    return f"{table(('guidance', 'scale', *(LABELS[name] for name in names)), rows)}\n\n{protocol.line()}\n"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """
    Every number over the scale, a line for each method and interval, from the point without guidance that all share.

    Args:
        path (`Path`): The PNG file; the same report gives the same bytes with the same matplotlib.
        report (`Mapping[str, Any]`): Of [`~GuidanceSweep.measure`].
    """
    from matplotlib.figure import Figure

    cells = report["cells"]
    names = [name for name in cells[0]["results"] if not name.endswith("_std")]
    # A figure of its own, with matplotlib's Agg canvas: neither a window system nor a global state is needed.
    figure = Figure(figsize=(4.5 * len(names), 3.5), layout="constrained")
    shared = [cell for cell in cells if cell["interval"] is None]
    series: dict[str, list[Any]] = {}
    for cell in cells:
        if cell["interval"] is not None:
            low, high = cell["interval"]
            method = cell["protocol"]["guidance"].split()[0]
            series.setdefault(f"{method} in [{low:g}, {high:g}]", []).append(cell)
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        for title, own in (series or {"no guidance": []}).items():
            points = sorted((cell["scale"], cell["results"][name]) for cell in [*shared, *own])
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=title)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(LABELS[name])
        axes.legend(fontsize="x-small")
    temporary = path.with_name(f".{path.name}")
    # without the version of matplotlib, which is no part of the result
    figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def push_results(folder: Path, upload: ResultsUpload, report: Mapping[str, Any]) -> str:
    """
    Upload the report, its table and its picture. A card holds the numbers of a model, not those of a search.

    Args:
        folder (`Path`): Where they are.
        upload ([`ResultsUpload`]): The repository.
        report (`Mapping[str, Any]`): Of [`~GuidanceSweep.measure`].

    Returns:
        `str`: Address of the report.
    """
    files = [folder / name for name in (REPORT_FILE, MARKDOWN_FILE, PICTURE_FILE)]
    return upload.push(files, [cell["protocol"] for cell in report["cells"]])


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.
    """
    options = parse_options(argv)
    files = f"{REPORT_FILE}, {MARKDOWN_FILE} and {PICTURE_FILE} are in {options.output_dir}."
    run_evaluation(
        PROG,
        lambda processes: GuidanceSweep(options, processes),
        options.device,
        to_markdown,
        files,
        options.push_to_hub,
        lambda upload, report: push_results(Path(options.output_dir), upload, report),
    )


if __name__ == "__main__":
    main()
