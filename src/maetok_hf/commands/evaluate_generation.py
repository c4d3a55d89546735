"""`maetok-eval generation`: scores of generated images. See `examples/evaluate_generation.py`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import open_images
from ..evaluation import (
    DatasetImages,
    EvaluationProtocol,
    FeatureCollector,
    FeatureExtractor,
    ImageReader,
    save_moments,
)
from ..evaluation.distances import NUM_KID_SUBSETS
from ..evaluation.extractors import extractor_identity, load_extractor
from ..evaluation.feature_run import FEATURES_FILE, FeatureRun
from ..evaluation.hub_results import Benchmark, ResultsUpload
from ..evaluation.image_sets import image_set_identity, open_image_set
from ..evaluation.options import GenerationScoreOptions, ScoreOptions
from ..evaluation.pipeline_images import PipelineImages
from ..evaluation.protocol import CENTER_CROP, without_folders
from ..evaluation.reference import DEFAULT_SPLIT, Reference, open_reference
from ..evaluation.scores import (
    LABELS,
    check_counts,
    check_layers,
    compute_scores,
    needed_reference_layers,
)
from ..sampling import load_pipeline
from ..sampling.protocol import SETTINGS_FILE
from ..training.checkpointing import write_json
from .command_line import parse_words, run_evaluation, table
from .processes import Processes


PROG = "maetok-eval generation"
DESCRIPTION = """\
Score generated images: FID, sFID, Inception Score, KID, precision and recall, or the Fréchet distance in DINOv2's
features. Of images that are there, or of a pipeline's as they are sampled. Prints a table with its protocol, and
writes both as JSON. The same command continues what was stopped, on any number of processes.
"""
EXAMPLES = f"""\
  {PROG} --samples runs/samples --reference VIRTUAL_imagenet256_labeled.npz --output_dir runs/scores
  {PROG} --pretrained_model_name_or_path runs/generator --num_images 50000 --dtype bfloat16 \\
      --reference VIRTUAL_imagenet256_labeled.npz --output_dir runs/scores
  {PROG} --samples runs/samples --reference path/to/images --reference_resolution 256 --metrics fid kid \\
      --extractor dinov2 --output_dir runs/scores-dinov2
"""
REPORT_FILE = "generation.json"
STATISTICS_FILE = "statistics.npz"
KEY_LENGTH = 12


def parse_options(words: Sequence[str] | None = None) -> GenerationScoreOptions:
    """
    The command line: one flag for every field of [`GenerationScoreOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`GenerationScoreOptions`]: What is asked for.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, GenerationScoreOptions, words)


class ReferenceRun:
    """
    A reference, and the computation of what its file does not hold, kept for other evaluations.

    Args:
        options ([`ScoreOptions`]): What is asked for.
        extractor ([`FeatureExtractor`]): What gives features.
        layers (`Sequence[str]`): Names of what it gives.
        processes ([`Processes`]): This one and the others.

    Attributes:
        identity: What scores depend on, in plain values.
        num_images: Its images, if that is known.

    Raises:
        ValueError: If there is nothing to compare with, or it lacks what a metric needs.
    """

    def __init__(
        self, options: ScoreOptions, extractor: FeatureExtractor, layers: Sequence[str], processes: Processes
    ):
        self.extractor, self.processes = extractor, processes
        self.needed = needed_reference_layers(options.metrics)
        self.reference = open_reference(options, extractor)
        self.identity = self.reference.identity
        self.num_images = self.reference.num_images
        statistics, features = self.reference.missing(*self.needed)
        self.run: FeatureRun | None = None
        if not (statistics or features):
            return
        # all statistics that there may be, so that evaluations with other metrics find them
        statistics = [name for name in ("pool", "spatial") if name in layers]
        protocol = extractor_identity(extractor) | {"images": self.identity["images"]}
        key = json.dumps([protocol, statistics, features], sort_keys=True)
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()[:KEY_LENGTH]
        cache = Path(options.reference_cache_dir or Path(options.output_dir) / "reference")
        shares = processes.shares()
        num_images = len(self.reference.images)
        self.run = FeatureRun(
            cache / name, num_images, protocol, statistics, features, **shares, description="reference images"
        )

    def collect(self, batch_size: int) -> None:
        """
        Compute this process' share.

        Args:
            batch_size (`int`): Images at a time.
        """
        if self.run is not None:
            self.run.collect(self.reference.images, self.extractor, batch_size, stop=self.processes.stop)

    def result(self) -> Reference:
        """
        On the main process: wait for the others.

        Returns:
            [`Reference`]: With all that metrics need.
        """
        if self.run is not None:
            self.reference.add(self.run.result(stop=self.processes.stop))
            self.run = None
        return self.reference

    def describe(self, size: str) -> tuple[str, int | None]:
        """
        For the protocol, on the main process, at the end.

        Args:
            size (`str`): Height and width of the images that are compared with it, in pixels.

        Returns:
            `tuple[str, int | None]`: What it is, and how many images it has, if that is known and one number.
        """
        of_statistics, of_features = self.reference.counts(*self.needed)
        text = without_folders(self.reference.description)
        if self.reference.images is not None:
            own = size_in_words(self.reference.images)
            text += "" if own == size else f" of {own} pixels"
            text += f", {CENTER_CROP}" if isinstance(self.reference.images, DatasetImages) else ""
        if self.needed[0] and of_features is not None and of_features != of_statistics:
            return f"{text}, {of_features} images for precision, recall and KID", of_statistics
        return text, of_statistics or of_features


def open_extractor(options: ScoreOptions, device: torch.device) -> FeatureExtractor:
    """
    The network that gives features, on its device.

    Args:
        options ([`ScoreOptions`]): What is asked for.
        device (`torch.device`): Where it shall be.

    Returns:
        [`FeatureExtractor`]: In evaluation mode.

    Raises:
        OSError: If weights are missing; says which file to put where.
        ValueError: If there is no such module or function.
    """
    extractor = load_extractor(options.extractor, options.extractor_weights)
    return extractor.to(device) if isinstance(extractor, torch.nn.Module) else extractor


def layers_of(extractor: FeatureExtractor, shape: Sequence[int]) -> list[str]:
    """
    What an extractor gives, tried on a black image.

    Args:
        extractor ([`FeatureExtractor`]): The network.
        shape (`Sequence[int]`): Channels, height and width of the images.

    Returns:
        `list[str]`: Names of its layers.

    Raises:
        ValueError: If it gives anything but a row of features for each.
    """
    layers = extractor(torch.zeros(1, *shape, dtype=torch.uint8))
    shapes = {name: tuple(values.shape) for name, values in layers.items()} if isinstance(layers, Mapping) else None
    if not shapes or any(len(shape) != 2 or shape[0] != 1 for shape in shapes.values()):
        found = f"a {type(layers).__name__}" if shapes is None else f"those of {shapes} for one"
        raise ValueError(
            f"the extractor {extractor.name!r} must give a dict of features of shape (n, dim) for n images, got "
            f"{found}."
        )
    return list(layers)


class GenerationEvaluation:
    """
    What one process of an evaluation knows and does.

    Args:
        options ([`GenerationScoreOptions`]): What is asked for.
        processes ([`Processes`]): This one and the others.

    Raises:
        OSError: If weights are missing; says which file to put where.
        ValueError: If options do not fit together, or the folder holds another evaluation.
    """

    def __init__(self, options: GenerationScoreOptions, processes: Processes):
        self.options, self.processes = options, processes
        self.folder = Path(options.output_dir)
        self.extractor = open_extractor(options, processes.device)
        self.images, self.settings = self._open_images()
        layers = layers_of(self.extractor, image_size(self.images))
        check_layers(options.metrics, layers, self.extractor.name)
        self.reference = None
        if any(needed_reference_layers(options.metrics)):
            self.reference = ReferenceRun(options, self.extractor, layers, processes)
        num_reference = None if self.reference is None else self.reference.num_images
        check_counts(options.metrics, len(self.images), num_reference, options.kid_subset_size)
        # All layers that there are: another metric of the same images then needs neither network nor images.
        statistics = [name for name in ("pool", "spatial") if name in layers]
        kept = [name for name in ("pool", "logits") if name in layers]
        identity = extractor_identity(self.extractor) | {"images": self._identity()}
        shares = processes.shares()
        self.run = FeatureRun(self.folder / "features", len(self.images), identity, statistics, kept, **shares)

    def measure(self) -> dict[str, Any] | None:
        """
        Score this process' share of the images; on the main process wait for the others and write the report.

        Returns:
            `dict[str, Any]`, *optional*: On the main process, the numbers as `results`, the conditions as `protocol`,
            and all settings of the sampling as `settings`, if they are known.
        """
        options, stop = self.options, self.processes.stop
        self.run.collect(self.images, self.extractor, options.batch_size, stop=stop)
        if self.reference is not None:
            self.reference.collect(options.batch_size)
        if not self.processes.is_main:
            return None
        generated = self.run.result(stop=stop)
        reference = None if self.reference is None else self.reference.result()
        results = compute_scores(
            options.metrics,
            generated,
            reference,
            extractor=options.extractor,
            kid_subset_size=options.kid_subset_size,
            device=self.processes.metric_device,
        )
        report = {"results": results, "protocol": self._protocol().to_dict(), "settings": self.settings}
        self._save_statistics(generated)
        write_json(self.folder / REPORT_FILE, report)
        return report

    def _open_images(self) -> tuple[ImageReader, dict[str, Any] | None]:
        options = self.options
        if options.samples_resolution is not None:
            split, cache_dir = options.samples_split or DEFAULT_SPLIT, options.cache_dir
            source = open_images(options.samples, split=split, use_labels=False, cache_dir=cache_dir)
            return DatasetImages(source, options.samples_resolution, options.num_images), None
        if options.samples is not None:
            settings = find_settings(Path(options.samples))
            images = open_image_set(options.samples, options.num_images)
            if settings is not None:
                check_settings(options.samples, settings, images.num_available)
            return images, settings
        generation = options.generation()
        images = PipelineImages(load_pipeline(generation, self.processes.device), generation)
        return images, images.settings

    def _identity(self) -> dict[str, Any]:
        if isinstance(self.images, PipelineImages):
            return {"settings": self.settings, "batch_size": self.options.batch_size}
        return image_set_identity(self.images)

    def _protocol(self) -> EvaluationProtocol:
        return protocol_of(self.options, self.extractor, self.reference, self.images, self.settings)

    def _save_statistics(self, generated: FeatureCollector) -> None:
        """The statistics of these images alone, a small file that may be the reference of others."""
        statistics = {name: generated.moments(name) for name in generated.layers[0]}
        identity = extractor_identity(self.extractor) | {"images": self._identity()}
        save_moments(self.folder / STATISTICS_FILE, statistics, identity)


def protocol_of(
    options: ScoreOptions,
    extractor: FeatureExtractor,
    reference: ReferenceRun | None,
    images: ImageReader,
    settings: Mapping[str, Any] | None,
) -> EvaluationProtocol:
    """
    Under which conditions images were scored, on the main process, at the end.

    Args:
        options ([`ScoreOptions`]): What was asked for.
        extractor ([`FeatureExtractor`]): What gave features.
        reference ([`ReferenceRun`], *optional*): What the images were compared with.
        images ([`ImageReader`]): The images.
        settings (`Mapping[str, Any]`, *optional*): How they were sampled, if that is known.

    Returns:
        [`EvaluationProtocol`]: For reports.
    """
    size = size_in_words(images)
    description, count = ("none", None) if reference is None else reference.describe(size)
    subsets = f"{NUM_KID_SUBSETS} of {options.kid_subset_size}" if "kid_subsets" in options.metrics else "none"
    return EvaluationProtocol.of(
        *(extractor, description, len(images), count, settings),
        images=without_folders(images.description),
        size=size,
        crop=CENTER_CROP if isinstance(images, DatasetImages) else "none",
        kid_subsets=subsets,
    )


def image_size(images: ImageReader) -> tuple[int, ...]:
    """
    Channels, height and width of the images of a set.

    Args:
        images ([`ImageReader`]): The set. A pipeline is not asked for one.

    Returns:
        `tuple[int, ...]`: Three numbers.
    """
    return images.shape if isinstance(images, PipelineImages) else tuple(images.read(range(1)).shape[1:])


def size_in_words(images: ImageReader) -> str:
    """
    Height and width of the images of a set, for protocols.

    Args:
        images ([`ImageReader`]): The set.

    Returns:
        `str`: In pixels, such as `256 x 256`.
    """
    return " x ".join(map(str, image_size(images)[1:]))


def find_settings(samples: Path) -> dict[str, Any] | None:
    """
    How a set was sampled, if `generate.py` has written it.

    Args:
        samples (`Path`): Its folder, the folder `images` in it, or its `samples.npz`.

    Returns:
        `dict[str, Any]`, *optional*: The `settings` of its `settings.json`.
    """
    folder = samples if samples.is_dir() else samples.parent
    for path in (folder / SETTINGS_FILE, folder.parent / SETTINGS_FILE):
        if path.is_file() and (path.parent == folder or folder.name == "images"):
            return json.loads(path.read_text(encoding="utf-8"))["settings"]
    return None


def check_settings(samples: str, settings: Mapping[str, Any], num_available: int) -> None:
    """
    Make sure that a set of `generate.py` is whole.

    Args:
        samples (`str`): Its place.
        settings (`Mapping[str, Any]`): Its settings.
        num_available (`int`): Images that are there.

    Raises:
        ValueError: If there are more or fewer than it was asked for.
    """
    if num_available != settings["num_images"]:
        raise ValueError(
            f"`samples` {samples!r} has {num_available} images, but its {SETTINGS_FILE} says "
            f"{settings['num_images']}: finish the set with the command that made it."
        )


def to_table(report: Mapping[str, Any]) -> str:
    """
    What is printed of a report.

    Args:
        report (`Mapping[str, Any]`): Of [`~GenerationEvaluation.measure`].

    Returns:
        `str`: A Markdown table and the protocol line.
    """
    rows = [(LABELS[name], f"{value:.4f}") for name, value in report["results"].items()]
    return f"{table(('metric', 'value'), rows)}\n\n{EvaluationProtocol(**report['protocol']).line()}"


def push_results(options: GenerationScoreOptions, upload: ResultsUpload, report: Mapping[str, Any]) -> str:
    """
    Upload a report and put its numbers into the card of the model.

    Args:
        options ([`GenerationScoreOptions`]): What was asked for.
        upload ([`ResultsUpload`]): The repository.
        report (`Mapping[str, Any]`): Of [`~GenerationEvaluation.measure`].

    Returns:
        `str`: Address of the report.
    """
    of_dataset = options.reference_resolution is not None
    benchmark = Benchmark(
        task_type="unconditional-image-generation",
        task_name="Class-conditional image generation",
        dataset_name=report["protocol"]["reference"],
        dataset_id=options.reference if of_dataset else None,
        dataset_config=options.reference_config_name,
        dataset_split=options.reference_split or (DEFAULT_SPLIT if of_dataset else None),
    )
    file = Path(options.output_dir) / REPORT_FILE
    return upload.push([file], report["protocol"], benchmark, report["results"], LABELS)


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.
    """
    options = parse_options(argv)
    files = f"{REPORT_FILE}, {STATISTICS_FILE} and features/{FEATURES_FILE} are in {options.output_dir}."
    run_evaluation(
        PROG,
        lambda processes: GenerationEvaluation(options, processes),
        options.device,
        to_table,
        files,
        options.push_to_hub,
        lambda upload, report: push_results(options, upload, report),
    )


if __name__ == "__main__":
    main()
