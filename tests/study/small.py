"""A study that is small enough for tests: coloured images, budgets of a few numbers, and what a record looks like."""

import dataclasses
import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from maetok_hf import AutoencoderMAE, FlowMatchEulerMaruyamaScheduler, MAETokDiffusionPipeline
from maetok_hf.study.cells import Cell, Stage, make_cells
from maetok_hf.study.presets import CPU, Budget, Preset
from maetok_hf.study.running import FINISHED, Study
from tests.testing_utils import randomize_parameters, tiny_autoencoder, tiny_transformer


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
SIZE = 16
NUM_CLASSES = 3
BUDGET = Budget(
    tokenizer_steps=4,
    finetuning_steps=4,
    generator_steps=4,
    classifier_epochs=1,
    num_samples=9,
    num_curve_samples=6,
    num_inference_steps=2,
    loss_draws=1,
    mixture_dimensions=3,
    mixture_sizes=(1, 2),
    mixture_size=2,
    mixture_seeds=(0,),
)


def coloured_images(count: int, seed: int = 0, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of 8 bits, of which one channel is bright: images (count, 3, size, size) and this channel, their class."""
    labels = torch.arange(count) % NUM_CLASSES
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 100
    return images, labels


def write_images(
    folder: Path, splits: dict[str, int], with_classes: bool = True, broken_row: int | None = None
) -> Path:
    """A data set of [`coloured_images`] in parquet files."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    folder.mkdir(parents=True, exist_ok=True)
    kind = ClassLabel(names=["red", "green", "blue"]) if with_classes else Value("int64")
    for number, (split, count) in enumerate(splits.items()):
        images, labels = coloured_images(count, seed=number)
        column = []
        for pixels in images.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
            column.append({"bytes": b"broken" if len(column) == broken_row else file.getvalue(), "path": None})
        features = Features({"image": Image(), "label": kind})
        table = Dataset.from_dict({"image": column, "label": labels.tolist()}, features=features)
        table.to_parquet(folder / f"{split}-0.parquet")
    return folder


class SmallPreset(Preset):
    """Its data are [`coloured_images`]; its recipes are those of the CPU preset and are not run."""

    def export(self, folder: Path, package: str | None) -> str:
        if not folder.exists():
            write_images(folder, {"train": 24, "test": 9})
        return "coloured"


def small_preset(**changes: Any) -> Preset:
    settings = {field.name: getattr(CPU, field.name) for field in dataclasses.fields(Preset)}
    own = {"resolution": SIZE, "second_resolution": 2 * SIZE, "batch_size": 10, "budget": BUDGET}
    return SmallPreset(**(settings | own | changes))


def write_generator(folder: Path, tokenizer: AutoencoderMAE, seed: int = 0) -> None:
    """What four steps of a generator's training leave; the models of the steps are random and differ."""
    for step in (1, 2, 3, 4):
        transformer = tiny_transformer(seed + step, num_classes=NUM_CLASSES)
        transformer.save_pretrained(folder / f"checkpoint-{step}" / "transformer_ema")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    MAETokDiffusionPipeline(tokenizer, transformer, FlowMatchEulerMaruyamaScheduler()).save_pretrained(folder)
    log = [{"step": step, "velocity": 1.0 / step} for step in (1, 2, 3, 4)]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


class StandInTrainings:
    """Takes the place of `Study.run_stage`: leaves what a training leaves, of random weights, and keeps a list."""

    def __init__(self):
        self.ran: list[tuple[str, str]] = []

    def __call__(self, study: Study, cell: Cell, stage: Stage) -> None:
        self.ran.append((cell.name, stage.name))
        folder = cell.folder(study.root) / stage.name
        folder.mkdir(exist_ok=True)
        if stage.name == "tokenizer":
            self._tokenizer(study, cell).save_pretrained(folder)
            (folder / "checkpoint-4").mkdir()
            (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
        elif stage.name == "generator":
            write_generator(folder, AutoencoderMAE.from_pretrained(cell.tokenizer(study.root)), cell.seed)
        report = {"training_seconds": 2.0} if stage.name != "latents" else {}
        (folder / FINISHED[stage.name]).write_text(json.dumps(report))

    def _tokenizer(self, study: Study, cell: Cell) -> AutoencoderMAE:
        if cell.base is None:
            return tiny_autoencoder(cell.seed, sample_size=SIZE)
        tokenizer = AutoencoderMAE.from_pretrained(cell.base.tokenizer(study.root))
        randomize_parameters(tokenizer.decoder, seed=7)
        return tokenizer


def small_cell(name: str, seed: int = 0, preset: Preset | None = None) -> Cell:
    (cell,) = make_cells(preset or small_preset(), [name], [seed], RECIPES)
    return cell


def stand_in_pictures(folder: Path, preset: str, records: Sequence[Any], mixture_size: int) -> dict[str, str]:
    """Takes the place of `draw_pictures`, which takes a second."""
    if not any("samples" in record["measured"] for record in records):
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: f"{preset}-{name}.png" for name in ("modes", "probe-and-distance")}
    for file in files.values():
        (folder / file).write_bytes(b"picture")
    return files


@functools.cache
def _commands(name: str) -> list[str]:
    return small_cell(name).commands(2)


def made_up_record(cell: Cell, shift: float = 0.0, **identity: Any) -> dict[str, Any]:
    """
    What is shown of a cell's record, with numbers that follow from its seed and `shift`, which makes them larger.
    `identity` replaces entries of that, which lacks the settings.
    """
    budget, value = cell.preset.budget, 1 + 0.01 * cell.seed + shift
    nll = {str(size): value - 0.1 * number for number, size in enumerate(budget.mixture_sizes)}
    mixture = {"num_dimensions": 3, "explained_variance": 0.9, "gaussian_held_out_nll": value, "held_out_nll": nll}
    points = [*budget.curve_steps(), budget.generator_steps]
    curve = [{"step": step, "loss": value + 1 / step, "distance": 10 * value + 1 / step} for step in points]
    measured = {"reconstruction": {"psnr": 20 * value, "distance": 5 * value, "num_images": 9, "seconds": 30.0}}
    if cell.variant.has_generator:
        measured |= {
            "latents": {
                "probe_accuracy": 0.5 * value,
                "mixtures": {"same": mixture, "own": mixture},
                "variance": 0.9,
                "effective_rank": 3.0,
                "gaussian_loss": 0.5,
                "seconds": 30.0,
            },
            "generator": {"loss": value, "curve": curve, "seconds": 30.0},
            "samples": {"distance": 7 * value, "precision": 0.8, "recall": 0.7, "recognition": 0.9, "seconds": 30.0},
        }
    else:
        measured |= {"second_reconstruction": {"psnr": 18 * value, "distance": 6 * value, "seconds": 30.0}}
    facts = {"preset": cell.preset.name, "variant": cell.variant.name, "seed": cell.seed}
    facts |= {"data": "coloured", "classifier": "a classifier", "measures": budget.measures()}
    return {
        "identity": facts | identity,
        "title": cell.variant.title,
        "commands": _commands(cell.variant.name),
        "seconds": {name: 60.0 for name in measured},
        "machine": {
            "processors": 2,
            "threads": 2,
            "architecture": "x86_64",
            "accelerators": [],
            "python": "3.12.3",
            "packages": {"torch": "2.0"},
        },
        "measured": measured,
    }
