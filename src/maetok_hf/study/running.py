"""The study as a program: what is missing is trained and measured, and the document is written from the records.

Whatever is finished is found again: a cell by its record, in the output folder or among the results; a training by its
report; a training that was stopped or killed by its checkpoints; a part of the measures by its file.
"""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models import AutoencoderMAE
from ..training.checkpointing import write_json
from ..training.interruption import RunLock
from ..training.latent_encoding import encoder_digest
from ..training.launching import run_command
from ..training.resumption import complete_checkpoints
from ..training.validation import image_grid, write_png
from . import measures
from .cells import RECORDED_ROOT, Cell, Stage, launch_words, make_cells
from .classifier import ImageClassifier, describe_classifier, load_classifier, save_classifier
from .document import write_document
from .generators import measure_generator
from .images import Split, load_split, proportional_labels
from .options import StudyOptions
from .records import kept, machine, read_record
from .variants import VARIANTS


FINISHED = {"tokenizer": "train_report.json", "latents": "latents.json", "generator": "train_report.json"}
PICTURE_IMAGES = 20


class StudyFolders:
    """
    Where things of a study are.

    Args:
        options ([`StudyOptions`]): With the two folders.
    """

    def __init__(self, options: StudyOptions):
        self.root = Path(options.output_dir)
        self.results = Path(options.results_dir)
        # records are written to both, and looked for in both
        self.records = [self.root / "cells", self.results / "study" / "cells"]

    def find_record(self, cell: Cell, identity: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """
        The record of a finished cell.

        Args:
            cell ([`Cell`]): The cell.
            identity (`dict[str, Any]`, *optional*): What it must be; by default whatever its commands and settings
                say, with the data and the classifier of the record.

        Returns:
            `dict[str, Any]`, *optional*: The record, if there is one.
        """
        for folder in self.records:
            record = read_record(folder / f"{cell.name}.json")
            if record is not None:
                known = record["identity"]
                wanted = cell.identity(known["data"], known["classifier"]) if identity is None else identity
                if read_record(folder / f"{cell.name}.json", wanted) is not None:
                    return record
        return None


def describe_plan(cells: list[Cell], folders: StudyFolders, num_threads: int) -> str:
    """
    What would be run, and for how long.

    Args:
        cells (`list[Cell]`): The cells of the study.
        folders ([`StudyFolders`]): Where finished ones are.
        num_threads (`int`): CPU threads, for the commands.

    Returns:
        `str`: Lines of text.
    """
    lines, total = [], 0.0
    for cell in cells:
        if folders.find_record(cell) is not None:
            lines.append(f"{cell.name}: done")
            continue
        parts = cell.estimated_seconds()
        total += sum(parts.values())
        lines.append(f"{cell.name}: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()))
        lines += [f"    {stage.command(num_threads)}" for stage in cell.stages(RECORDED_ROOT)]
    preset = cells[0].preset
    basis = "by rates measured on 2 CPU cores" if preset.measured else "estimated, not measured"
    return "\n".join([*lines, f"{len(cells)} cells, {total / 60:.0f} minutes to go, {basis}."])


class Study:
    """
    A study that is run.

    Args:
        options ([`StudyOptions`]): What is asked for.
        scripts (`Path`): Folder of the training scripts and, in `recipes`, their recipes.
    """

    def __init__(self, options: StudyOptions, scripts: Path):
        self.options, self.scripts = options, scripts
        self.preset, self.budget = options.chosen_preset(), options.chosen_preset().budget
        self.folders = StudyFolders(options)
        self.root = self.folders.root
        self.cells = make_cells(self.preset, options.chosen_variants(), options.seeds, scripts / "recipes")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier: ImageClassifier | None = None

    def run(self) -> None:
        """Do what the options ask for."""
        if self.options.dry_run:
            print(describe_plan(self.cells, self.folders, self.options.num_threads))
            return
        if self.options.report_only:
            if self.report() is None:
                raise ValueError(f"{' and '.join(map(str, self.folders.records))} have no records of this study.")
            return
        (self.root / self.preset.name).mkdir(parents=True, exist_ok=True)
        lock = RunLock(self.root / self.preset.name, patience=300.0)  # for an earlier study that is just ending
        torch.set_num_threads(self.options.num_threads)
        self.prepare()
        for cell in self.cells:
            self.finish(cell)
        lock.release()

    def prepare(self) -> None:
        """Images and classifier."""
        folder = self.root / self.preset.name / "data"
        self.data_digest = self.preset.export(folder, self.options.package)
        self.train = load_split(folder, "train", self.preset.resolution)
        self.held_out = load_split(folder, self.preset.held_out_split, self.preset.resolution)
        self.classifier = self.make_classifier()
        self.real = self.classifier.extract(self.train.images, self.preset.batch_size)["pool"]

    def make_classifier(self) -> ImageClassifier:
        """The classifier of the records, or a new one."""
        preset, name = self.preset, f"{self.preset.name}-classifier"
        classifier = ImageClassifier(self.train.num_classes, preset.resolution, preset.classifier)
        facts = {"data": self.data_digest, "num_epochs": self.budget.classifier_epochs}
        # the results' one first: the records there were measured with it
        for folder in reversed(self.folders.records):
            known = read_record(folder / f"{name}.json", facts)
            if known is not None and (folder / f"{name}.safetensors").is_file():
                load_classifier(classifier, folder / f"{name}.safetensors")
                break
        else:
            print(f"Training the {preset.classifier}.", flush=True)
            splits = [(split.images, split.labels) for split in (self.train, self.held_out)]
            classifier.to(self.device)
            known = describe_classifier(classifier, *splits, self.budget.classifier_epochs, preset.batch_size)
            real = [classifier.extract(images, preset.batch_size)["pool"] for images, _ in splits]
            known["distance_of_held_out_images"] = measures.distance(*real)
            known = {"identity": facts, **known, "machine": machine(self.options.num_threads)}
        for folder in self.folders.records:
            weights = folder / f"{name}.safetensors"
            if not weights.is_file() or read_record(folder / f"{name}.json", facts) != known:
                save_classifier(classifier, weights)
                write_json(folder / f"{name}.json", known)
        print(f"The {preset.classifier} knows {known['held_out_accuracy']:.3f} of held-out images.", flush=True)
        return classifier.to(self.device)

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What a cell's numbers depend on."""
        return cell.identity(self.data_digest, self.classifier.digest)

    def finish(self, cell: Cell) -> None:
        """Train and measure a cell, unless its record is there, and write the document with it."""
        identity = self.identity(cell)
        record = self.folders.find_record(cell, identity)
        if record is None:
            for own in (cell.base, cell):
                if own is not None:
                    self.run_stages(own)
            print(f"{cell.name}: measuring", flush=True)
            parts = self.measure(cell)
            record = {
                "identity": identity,
                "title": cell.variant.title,
                "commands": cell.commands(self.options.num_threads),
                "seconds": self.seconds(cell, parts),
                "machine": machine(self.options.num_threads),
                "measured": parts,
            }
            self.write_record(cell, record)
            # Not before: what was measured of them is kept, but a base whose record came from elsewhere may have been
            # trained just now for what is fine-tuned from it.
            for own in (cell.base, cell):
                if own is not None:
                    self.remove_checkpoints(own)
        self.write_record(cell, record)
        self.report()
        print(f"{cell.name}: done", flush=True)

    def write_record(self, cell: Cell, record: dict[str, Any]) -> None:
        """Put a record, and the picture of the samples, where they are not yet."""
        for folder in self.folders.records:
            if read_record(folder / f"{cell.name}.json") != record:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / f"{cell.name}.json", record)
        source, target = (folder / f"{cell.name}.png" for folder in self.folders.records)
        if source.is_file():
            shutil.copyfile(source, target)

    def run_stages(self, cell: Cell) -> None:
        """Run what is missing of a cell's commands; this process ends if one fails."""
        folder = cell.folder(self.root)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"settings": cell.settings(), "data": self.data_digest}
        if read_record(folder / "settings.json") not in (None, settings):
            raise ValueError(f"{folder} was begun with other settings: remove it, or choose another `output_dir`.")
        write_json(folder / "settings.json", settings)
        for stage in cell.stages(self.root):
            if not (folder / stage.name / FINISHED[stage.name]).is_file():
                self.run_stage(cell, stage)

    def run_stage(self, cell: Cell, stage: Stage) -> None:
        """Run one command."""
        threads = self.options.num_threads
        words = [*launch_words(threads)[1:], str(self.scripts / stage.script), *stage.arguments(threads)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        print(f"\n=== {cell.name}, {stage.name}\n{shlex.join(command)}\n", flush=True)
        status = run_command(command, cell.folder(self.root) / stage.name)
        if status != 0:
            sys.exit(f"{stage.script} ended with status {status}: the same command goes on from where it was.")

    def part(self, cell: Cell, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part of a cell's measures, kept in its folder."""
        path = cell.folder(self.root) / "measures" / f"{name}.json"
        return kept(path, self.identity(cell), measures.timed(compute))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything that is measured of a cell, by part."""
        tokenizer = self.load_tokenizer(cell)
        batch_size = self.preset.batch_size

        def reconstruction(held_out: Split) -> dict[str, Any]:
            return measures.measure_reconstruction(tokenizer, held_out, self.classifier, batch_size)

        found = {"reconstruction": self.part(cell, "reconstruction", lambda: reconstruction(self.held_out))}
        if not cell.variant.has_generator:
            folder, resolution = cell.data(self.root), self.preset.second_resolution
            larger = load_split(folder, self.preset.held_out_split, resolution)
            second = self.part(cell, "second_reconstruction", lambda: reconstruction(larger))
            return found | {"second_reconstruction": second}

        latents = [measures.encode(tokenizer, split, batch_size) for split in (self.train, self.held_out)]
        found["latents"] = self.part(
            *(cell, "latents"),
            lambda: measures.measure_latents(
                latents[0], self.train.labels, latents[1], self.held_out.labels, self.budget
            ),
        )
        owner = cell.base or cell  # whose generator it is
        if cell.base is not None and encoder_digest(self.load_tokenizer(owner)) != encoder_digest(tokenizer):
            raise ValueError(f"The encoder of {cell.name} is not that of {owner.name}: its base was trained anew.")
        found["generator"] = self.part(
            *(owner, "generator"),
            lambda: measure_generator(
                *(owner.generator(self.root), self.load_tokenizer(owner), latents[1], self.held_out.labels),
                *(self.train.counts, self.real, self.classifier, self.budget, batch_size, self.device),
            ),
        )
        found["samples"] = self.part(cell, "samples", lambda: self.sample(cell, tokenizer))
        return found

    def sample(self, cell: Cell, tokenizer: AutoencoderMAE) -> dict[str, Any]:
        """Generate images, keep a picture of the first, and measure them."""
        pipe = measures.load_pipeline(cell.generator(self.root), tokenizer, self.device)
        labels = proportional_labels(self.train.counts, self.budget.num_samples)
        images = measures.sample(pipe, labels, self.budget.num_inference_steps)
        first = images[:PICTURE_IMAGES].float() / 127.5 - 1
        write_png(self.folders.records[0] / f"{cell.name}.png", image_grid(first, columns=PICTURE_IMAGES // 2))
        return measures.measure_samples(images, labels, self.real, self.classifier, self.preset.batch_size)

    def load_tokenizer(self, cell: Cell) -> AutoencoderMAE:
        """The tokenizer of a cell, ready to encode and decode."""
        tokenizer = AutoencoderMAE.from_pretrained(cell.tokenizer(self.root))
        return tokenizer.requires_grad_(False).eval().to(self.device)

    def seconds(self, cell: Cell, parts: dict[str, Any]) -> dict[str, float]:
        """What its own trainings and measures took."""
        found = {}
        for stage in cell.stages(self.root):
            report = read_record(cell.folder(self.root) / stage.name / "train_report.json")
            if report is not None:
                found[stage.name] = report["training_seconds"]
        own = {name: part["seconds"] for name, part in parts.items() if name != "generator" or cell.base is None}
        return found | {f"measuring {name}": seconds for name, seconds in own.items()}

    def remove_checkpoints(self, cell: Cell) -> None:
        """Checkpoints of a finished cell, which are large; what the trainings exported stays."""
        for stage in cell.stages(self.root):
            for path in complete_checkpoints(cell.folder(self.root) / stage.name):
                shutil.rmtree(path)

    def report(self) -> Path | None:
        """Write the document from all records of this preset, also of other variants and seeds, if there are any."""
        everything = make_cells(self.preset, list(VARIANTS), self._all_seeds(), self.scripts / "recipes")
        records = [record for cell in everything if (record := self.folders.find_record(cell)) is not None]
        if self.classifier is not None:  # records of another one are to be replaced
            digests = {"data": self.data_digest, "classifier": self.classifier.digest}
            records = [record for record in records if digests.items() <= record["identity"].items()]
        return write_document(self.folders.results, self.preset, records)

    def _all_seeds(self) -> list[int]:
        """Seeds of which there are records, and those that are asked for."""
        pattern = f"{self.preset.name}-*-seed*.json"
        names = [path.stem for folder in self.folders.records for path in folder.glob(pattern)]
        return sorted({int(name.rpartition("-seed")[2]) for name in names} | set(self.options.seeds))
