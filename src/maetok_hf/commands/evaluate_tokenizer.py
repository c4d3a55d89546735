"""What a tokenizer loses: rFID, PSNR, SSIM and LPIPS of reconstructions. See `examples/evaluate_tokenizer.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import open_images
from ..evaluation import (
    DatasetImages,
    FeatureCollector,
    ImageReader,
    Moments,
    frechet_distance,
    load_extractor,
    load_moments,
    open_image_set,
    save_moments,
)
from ..evaluation.extractors import extractor_identity, weights_digest
from ..evaluation.feature_run import FeatureRun
from ..evaluation.hub_results import Benchmark, ResultsUpload
from ..evaluation.image_sets import image_set_identity
from ..evaluation.protocol import CENTER_CROP, DIGEST_LENGTH, without_folders
from ..evaluation.reconstruction import (
    ORIGINAL,
    SCORES,
    ReconstructionProtocol,
    TokenizerFeatures,
)
from ..evaluation.tokenizer_options import DEFAULT_RESOLUTION, TokenizerEvaluationOptions
from ..training.checkpointing import model_digest, write_json
from ..training.latent_encoding import load_tokenizer
from ..training.model_card import public_name
from ..training.perceptual import PerceptualLoss
from .command_line import parse_words, run_evaluation, table
from .processes import Processes


PROG = "maetok-eval tokenizer"
DESCRIPTION = """\
Reconstruct images by a tokenizer, and measure rFID, PSNR, SSIM and LPIPS. Prints a table with its protocol, and writes
both as JSON. The same command continues what was stopped, on any number of processes.
"""
EXAMPLES = f"""\
  {PROG} --tokenizer_name_or_path runs/tokenizer --dataset_name ILSVRC/imagenet-1k --lpips vgg \\
      --output_dir runs/reconstruction
  {PROG} --tokenizer_name_or_path stabilityai/sd-vae-ft-ema --dataset_name path/to/images --resolution 256 \\
      --split test --output_dir runs/reconstruction-vae
"""
REPORT_FILE = "reconstruction.json"
ORIGINALS_FILE = "originals.npz"
DEFAULT_SPLIT = "validation"
LABELS = {
    "rfid": "rFID",
    "rfd": "rFD",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "ssim_data_range_2": "SSIM, data range 2.0 as the authors'",
}


def parse_options(words: Sequence[str] | None = None) -> TokenizerEvaluationOptions:
    """
    The command line: one flag for every field of [`TokenizerEvaluationOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`TokenizerEvaluationOptions`]: What is asked for.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, TokenizerEvaluationOptions, words)


def open_originals(options: TokenizerEvaluationOptions) -> ImageReader:
    """
    The images to reconstruct.

    Args:
        options ([`TokenizerEvaluationOptions`]): What is asked for.

    Returns:
        [`ImageReader`]: In a fixed order.

    Raises:
        ValueError: If they cannot be found, or are too few.
    """
    if options.images is not None:
        return open_image_set(options.images, options.num_images)
    source = open_images(
        options.dataset_name,
        split=options.split or DEFAULT_SPLIT,
        name=options.dataset_config_name,
        revision=options.dataset_revision,
        image_column=options.image_column,
        use_labels=False,
        cache_dir=options.cache_dir,
    )
    resolution = options.resolution or DEFAULT_RESOLUTION
    return DatasetImages(source, resolution, options.num_images, options.dataloader_num_workers)


class TokenizerEvaluation:
    """
    What one process of an evaluation knows and does.

    Args:
        options ([`TokenizerEvaluationOptions`]): What is asked for.
        processes ([`Processes`]): This one and the others.

    Raises:
        OSError: If weights are missing; says which file to put where.
        ValueError: If options do not fit together, or the folder holds another evaluation.
    """

    def __init__(self, options: TokenizerEvaluationOptions, processes: Processes):
        self.options, self.processes, device = options, processes, processes.device
        self.images = open_originals(options)
        extractor = (
            None if options.extractor == "none" else load_extractor(options.extractor, options.extractor_weights)
        )
        self.extractor = extractor.to(device) if isinstance(extractor, torch.nn.Module) else extractor
        place = (options.tokenizer_name_or_path, options.tokenizer_subfolder, options.tokenizer_revision)
        tokenizer = load_tokenizer(*place)
        self.identity = image_set_identity(self.images)
        self.reference = self._read_reference()
        perceptual = None if options.lpips is None else PerceptualLoss.from_pretrained(options.lpips)
        self.protocol = self._protocol(tokenizer, perceptual)  # by the digest of the weights in float32
        if options.dtype != "float32":
            tokenizer = load_tokenizer(*place, dtype=getattr(torch, options.dtype))
        self.features = TokenizerFeatures(
            tokenizer.to(device),
            self.extractor,
            None if perceptual is None else perceptual.to(device),
            options.rounding,
            originals=self.reference is None,
            authors_ssim=options.authors_ssim,
        )

    def measure(self) -> dict[str, Any] | None:
        """
        Reconstruct this process' share of the images; on the main process wait for the others and write the report.

        Returns:
            `dict[str, Any]`, *optional*: On the main process, the numbers as `results` and the conditions as
            `protocol`.
        """
        layers = [SCORES]
        if self.extractor is not None:
            layers += ["pool"] if self.reference is not None else ["pool", f"{ORIGINAL}pool"]
        identity = self.protocol.to_dict() | {"scores": list(self.features.score_names)}
        folder = Path(self.options.output_dir) / "features"
        run = FeatureRun(folder, len(self.images), identity, layers, (), **self.processes.shares())
        run.collect(self.images, self.features, self.options.batch_size, stop=self.processes.stop)
        if not self.processes.is_main:
            return None
        collector = run.result(stop=self.processes.stop)
        report = {"results": self._results(collector), "protocol": self.protocol.to_dict()}
        write_json(Path(self.options.output_dir) / REPORT_FILE, report)
        return report

    def _results(self, collector: FeatureCollector) -> dict[str, float]:
        results = {}
        if self.extractor is not None:
            reference = self.reference
            if reference is None:
                reference = collector.moments(f"{ORIGINAL}pool")
                path = Path(self.options.output_dir) / ORIGINALS_FILE
                save_moments(path, {"pool": reference}, self._reference_protocol())
            name = "rfid" if self.options.extractor == "inception" else "rfd"
            results[name] = frechet_distance(collector.moments("pool"), reference)
        means = collector.moments(SCORES).mean.tolist()
        return results | dict(zip(self.features.score_names, means, strict=True))

    def _reference_protocol(self) -> dict[str, Any]:
        return extractor_identity(self.extractor) | {"images": self.identity}

    def _read_reference(self) -> Moments | None:
        """Statistics of these images, if they are given: those of other images, such as a training set's, would make
        another number of it."""
        if self.options.reference is None:
            return None
        moments, protocol = load_moments(self.options.reference, self._reference_protocol())
        if protocol is None:
            raise ValueError(
                f"`reference` {self.options.reference!r} does not say of which images it is: rFID compares with the "
                f"originals of the reconstructed images. Give the {ORIGINALS_FILE} of an earlier evaluation, or "
                "nothing."
            )
        return moments["pool"]

    def _protocol(self, tokenizer: Any, perceptual: PerceptualLoss | None) -> ReconstructionProtocol:
        options, extractor = self.options, self.extractor
        crop = "none" if options.images is not None else CENTER_CROP
        return ReconstructionProtocol(
            tokenizer=f"{type(tokenizer).__name__} {public_name(options.tokenizer_name_or_path)}",
            tokenizer_digest=model_digest(tokenizer),
            images=without_folders(self.images.description),
            images_digest=self.identity["digest"],
            num_images=len(self.images),
            size=" x ".join(map(str, self.identity["size"])),
            crop=crop,
            dtype=options.dtype,
            rounding=options.rounding,
            reference="none" if extractor is None else "the images themselves",
            extractor="none" if extractor is None else extractor.name,
            extractor_digest="none" if extractor is None else extractor.digest,
            resize="none" if extractor is None else extractor.resize,
            lpips="none" if perceptual is None else f"{options.lpips} {weights_digest(perceptual)[:DIGEST_LENGTH]}",
        )


def to_table(report: dict[str, Any]) -> str:
    """
    What is printed of a report.

    Args:
        report (`dict[str, Any]`): Of [`~TokenizerEvaluation.measure`].

    Returns:
        `str`: A Markdown table and the protocol line.
    """
    rows = [(LABELS[name], f"{value:.4f}") for name, value in report["results"].items()]
    return f"{table(('metric', 'value'), rows)}\n\n{ReconstructionProtocol(**report['protocol']).line()}"


def push_results(options: TokenizerEvaluationOptions, upload: ResultsUpload, report: dict[str, Any]) -> str:
    """
    Upload a report and put its numbers into the card of the model.

    Args:
        options ([`TokenizerEvaluationOptions`]): What was asked for.
        upload ([`ResultsUpload`]): The repository.
        report (`dict[str, Any]`): Of [`~TokenizerEvaluation.measure`].

    Returns:
        `str`: Address of the report.
    """
    benchmark = Benchmark(
        task_type="image-feature-extraction",
        task_name="Image reconstruction",
        dataset_name=report["protocol"]["images"],
        dataset_id=options.dataset_name,
        dataset_config=options.dataset_config_name,
        dataset_split=(options.split or DEFAULT_SPLIT) if options.dataset_name else None,
        dataset_revision=options.dataset_revision,
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
    files = f"{REPORT_FILE} is in {options.output_dir}."
    run_evaluation(
        PROG,
        lambda processes: TokenizerEvaluation(options, processes),
        options.device,
        to_table,
        files,
        options.push_to_hub,
        lambda upload, report: push_results(options, upload, report),
    )


if __name__ == "__main__":
    main()
