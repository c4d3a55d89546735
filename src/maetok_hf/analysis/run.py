"""
The analysis of several tokenizers side by side, part by part: `run_analysis`.

What lies in `output_dir`:

    analysis.json, analysis.md, *.png                     the result, made anew at the end of every run
    parts/<class>-<encoder>/latents-<key>/                latents on disk and their moments
    parts/<class>-<encoder>/{channels,probe,...}-<key>.json  a part that is done, with all that it depends on
    parts/<class>-<encoder>/mixtures-<key>/               each mixture by itself

A key is a digest of the part's settings, of the choice of images and of the encoder. So the same command goes on
where it was stopped and computes nothing twice, another setting computes what depends on it, and the results of a
former one are still there.

Memory: everything but the picture by UMAP goes through the latents in chunks of 8 MiB, and they are encoded in blocks
of 64 MiB at most. Besides the tokenizer and a batch of images, there are in memory a few matrices of the squared
number of features (134 MB each for 4096), about 30 copies of the probe's weights (33 MB each for 1000 classes), the
mixtures, some dozens of bytes an image for rows and classes, and `umap_num_images` latents. Pages of mapped files that
the system keeps besides are given back when memory is short.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..moments import RunningMoments
from ..training.checkpointing import write_json, write_text
from ..training.interruption import RunLock
from .chosen_images import SIDES, check_counts, check_num_classes
from .curve import mixture_curve
from .linear_probe import fit_linear_probe
from .options import AnalysisOptions
from .pictures import draw_pictures
from .principal_components import fit_principal_components
from .report import make_report, to_markdown
from .rows import moments_of
from .spectrum import channel_statistics
from .stored_latents import LatentFile, StoredLatents
from .subjects import Subject, open_subjects
from .umap_picture import project_umap


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
REPORT_FILE = "analysis.json"
MARKDOWN_FILE = "analysis.md"
SECONDS_BETWEEN_REPORTS = 10.0
_KEY_LENGTH = 12


def check_packages(parts: Iterable[str]) -> None:
    """
    Make sure, before any work, that what draws the pictures is installed.

    Args:
        parts (`Iterable[str]`): What is to be measured.

    Raises:
        ImportError: If a package is missing.
    """
    needed = {"matplotlib": "matplotlib", **({"umap": "umap-learn"} if "umap" in parts else {})}
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            hint = ", or leave 'umap' out of `parts`" if module == "umap" else ""
            raise ImportError(f"This needs `{package}`: install `maetok_hf[analysis]`{hint}.")


def digest_of(key: Any) -> str:
    """A short text that changes with anything in plain values."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class PartStore:
    """
    Results in JSON files, each with the key of what it depends on.

    Args:
        folder (`Path`): Where.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, name: str, key: Mapping[str, Any]) -> Path:
        """Where a part has files of its own; without ending."""
        return self.folder / f"{name}-{digest_of(key)[:_KEY_LENGTH]}"

    def find(self, name: str, key: Mapping[str, Any]) -> Any:
        """
        Args:
            name (`str`): Name of a part.
            key (`Mapping[str, Any]`): What it depends on, plain values.

        Returns:
            `Any`: Its result, `None` if it is not there.
        """
        file = self.place(name, key).with_suffix(".json")
        if not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["result"] if content["key"] == json.loads(json.dumps(key)) else None

    def compute(self, name: str, key: Mapping[str, Any], function: Callable[[], Any]) -> Any:
        """
        Args:
            name (`str`): Name of a part.
            key (`Mapping[str, Any]`): What it depends on.
            function (`Callable[[], Any]`): Computes it, in values for JSON.

        Returns:
            `Any`: The result, computed only if it is not there.
        """
        found = self.find(name, key)
        if found is None:
            found = json.loads(json.dumps(function()))  # as it will be read next time
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.place(name, key).with_suffix(".json"), {"key": key, "result": found})
        return found


class SubjectAnalysis:
    """
    One of the tokenizers that are compared. Latents are encoded when a part that is not there needs them.

    Args:
        name (`str`): What it is called.
        subject ([`~maetok_hf.analysis.subjects.EncodedImages`] or [`~maetok_hf.analysis.subjects.CachedLatents`]): Its
            latents.
        options ([`AnalysisOptions`]): What is asked for.
        device (`torch.device`): Where to compute in float64.
    """

    def __init__(self, name: str, subject: Subject, options: AnalysisOptions, device: torch.device):
        self.name, self.subject, self.options, self.device = name, subject, options, device
        rows = {
            side: {"num_rows": len(rows), "digest": hashlib.blake2b(rows.tobytes(), digest_size=16).hexdigest()}
            for side, rows in subject.rows.items()
        }
        self.key = {"format_version": FORMAT_VERSION, "latents": subject.identity, "rows": rows}
        self.latents_digest = digest_of(self.key)
        folder = f"{subject.class_name}-{subject.digest[:_KEY_LENGTH]}"
        self.store = PartStore(Path(options.output_dir) / "parts" / folder)
        self.folder = self.store.place("latents", self.key)

    def part_key(self, **settings: Any) -> dict[str, Any]:
        """What a part of these latents depends on."""
        return {"latents": self.latents_digest, **settings}

    @property
    def missing_bytes(self) -> int:
        """`int`: What the latents will take on the disk besides what is there, unless all is measured already."""
        if self.store.find("latents", self.key) is not None and not self.folder.is_dir():
            return 0
        return sum((len(self.subject.rows[side]) - file.num_rows) * file.row_bytes for side, file in self._files())

    def _files(self) -> list[tuple[str, LatentFile]]:
        return [(side, LatentFile(self.folder, side, self.subject.shape, self.subject.dtype)) for side in SIDES]

    @functools.cached_property
    def latents(self) -> dict[str, StoredLatents]:
        """`dict[str, StoredLatents]`: By side, encoded now as far as they are not on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = self._files()
        for side, file in files:
            if not file.complete:
                self._fill(side, file)
        check_counts(self.options, {side: file.num_rows for side, file in files})
        stored = {side: file.read() for side, file in files}
        check_num_classes(self.options, stored["train"].labels.unique().tolist())
        return stored

    def _fill(self, side: str, file: LatentFile) -> None:
        start = reported = time.monotonic()
        before, total = file.num_rows, len(self.subject.rows[side])
        for block in self.subject.blocks(side, file.next_block):
            file.append(block)
            now = time.monotonic()
            if now - reported > SECONDS_BETWEEN_REPORTS:
                reported = now
                rate = (file.num_rows - before) / (now - start)
                logger.info("%s: %d of %d latents (%s), %.1f/s", self.name, file.num_rows, total, side, rate)
        file.finish()
        logger.info("%s: all %d latents (%s) are there.", self.name, file.num_rows, side)

    def facts(self) -> dict[str, Any]:
        """What the latents are of, and how many."""
        return self.store.compute("latents", self.key, self._facts)

    def _facts(self) -> dict[str, Any]:
        labels = [stored.labels for stored in self.latents.values()]
        files = dict(self._files())
        known = self.subject.class_names
        return {
            "shape": list(self.subject.shape),
            "dtype": str(self.subject.dtype).removeprefix("torch."),
            "resolution": self.subject.resolution,
            "split": self.subject.split,
            "num_images": {side: file.num_rows for side, file in files.items()},
            "num_unlabeled": {side: file.num_unlabeled for side, file in files.items()},
            "num_corrupt": {
                side: len(self.subject.rows[side]) - file.num_rows - file.num_unlabeled for side, file in files.items()
            },
            "num_classes": int(torch.cat(labels).max()) + 1 if known is None else len(known),
            "class_names": None if known is None else list(known),
        }

    def channels(self) -> dict[str, Any]:
        """Statistics of the channels over the training latents."""
        key = self.part_key()
        return self.store.compute(
            "channels", key, lambda: asdict(channel_statistics(self.latents["train"].latents, device=self.device))
        )

    def spectrum(self) -> dict[str, Any]:
        """Variances of the flattened training latents along their principal components."""
        key = self.part_key(variance=self.options.mixture_variance)
        return self.store.compute("spectrum", key, self._spectrum)

    def _spectrum(self) -> dict[str, Any]:
        principal = fit_principal_components(self._moments(), self.options.mixture_variance)
        return {
            "num_features": len(principal.mean),
            "effective_rank": principal.effective_rank,
            "num_directions": int((principal.variances > 0).sum()),
            "num_dimensions": len(principal.components),
            "variances": principal.variances.tolist(),
        }

    def _moments(self) -> RunningMoments:
        """Of the flattened training latents; kept beside them."""
        file = self.folder / "moments.npy"
        if not file.is_file():
            state = moments_of(self.latents["train"].latents, self.device, name="latents").state()
            temporary = file.with_name(f".{file.name}")
            np.save(temporary, state.cpu().numpy())
            os.replace(temporary, file)
        return RunningMoments.merged([torch.from_numpy(np.load(file)).to(self.device)])

    def probe(self) -> dict[str, Any]:
        """A linear classifier of the training latents, and its scores on both sides."""
        options = self.options
        settings = {
            "l2": options.probe_l2,
            "tolerance": options.probe_tolerance,
            "max_iterations": options.probe_max_iterations,
        }
        return self.store.compute("probe", self.part_key(**settings), lambda: self._probe(settings))

    def _probe(self, settings: dict[str, Any]) -> dict[str, Any]:
        start, num_classes = time.perf_counter(), self.facts()["num_classes"]
        train, held_out = (self.latents[side] for side in SIDES)
        probe = fit_linear_probe(train.latents, train.labels, num_classes, device=self.device, **settings)
        seconds = time.perf_counter() - start
        logger.info("%s: linear probe, %d iterations in %.1f s.", self.name, probe.iterations, seconds)
        unseen = ~torch.isin(held_out.labels, train.labels)
        cross_entropy = probe.cross_entropy(held_out.latents, held_out.labels)
        return {
            "accuracy": probe.accuracy(held_out.latents, held_out.labels),
            "top5_accuracy": probe.accuracy(held_out.latents, held_out.labels, 5) if num_classes > 5 else None,
            # infinite, which JSON cannot say, if a class has no training image
            "cross_entropy": cross_entropy if math.isfinite(cross_entropy) else None,
            "num_unseen": int(unseen.sum()),
            "train_accuracy": probe.accuracy(train.latents, train.labels),
            "iterations": probe.iterations,
            "converged": probe.converged,
            "gradient": probe.gradient,
            "seconds": seconds,
            "device": self.device.type,
        }

    def umap(self) -> dict[str, Any]:
        """A picture's coordinates."""
        options = self.options
        key = self.part_key(
            seed=options.seed,
            num_images=options.umap_num_images,
            num_classes=options.umap_num_classes,
            num_neighbors=options.umap_num_neighbors,
        )
        return self.store.compute("umap", key, lambda: project_umap(*self.latents["train"][:2], options))

    def mixtures(self, num_dimensions: int) -> dict[str, Any]:
        """
        Curves of likelihood.

        Args:
            num_dimensions (`int`): Principal components.

        Returns:
            `dict[str, Any]`: A [`MixtureCurve`] in plain values.
        """
        options, settings = self.options, self.options.mixture_settings()
        key = self.part_key(settings=asdict(settings), num_dimensions=num_dimensions)
        folder = self.store.place("mixtures", key)
        key |= {"sizes": options.mixture_sizes, "seeds": options.mixture_seeds}

        def fit() -> dict[str, Any]:
            for scratch in folder.glob("reduced-*"):  # of a run that was killed
                shutil.rmtree(scratch)
            principal = fit_principal_components(self._moments(), num_components=num_dimensions)
            sides = (self.latents[side].latents for side in SIDES)
            sizes, seeds = options.mixture_sizes, options.mixture_seeds
            curve = mixture_curve(*sides, sizes, seeds, settings=settings, principal=principal, folder=folder)
            return curve.to_dict()

        return self.store.compute("mixtures", key, fit)

    def remove_latents(self) -> None:
        """Remove the latents, once nothing is to be computed of them."""
        self.__dict__.pop("latents", None)
        shutil.rmtree(self.folder, ignore_errors=True)


def common_dimension(options: AnalysisOptions, spectra: Iterable[Mapping[str, Any]]) -> int | None:
    """
    The number of principal components that all tokenizers get.

    Args:
        options ([`AnalysisOptions`]): What is asked for.
        spectra (`Iterable[Mapping[str, Any]]`): [`~SubjectAnalysis.spectrum`] of each.

    Returns:
        `int`, *optional*: The largest of the numbers that hold more than the wanted variance, so that it is exceeded
            for all of them, unless one has fewer directions of any variance; `None` if each has its own.

    Raises:
        ValueError: If a tokenizer has fewer than `num_dimensions`.
    """
    spectra = list(spectra)
    available = min(spectrum["num_directions"] for spectrum in spectra)
    if options.num_dimensions is not None:
        if options.num_dimensions > available:
            raise ValueError(
                f"`num_dimensions` is {options.num_dimensions}, but the latents of one tokenizer vary in {available} "
                "directions only: take fewer."
            )
        return options.num_dimensions
    return min(max(spectrum["num_dimensions"] for spectrum in spectra), available) if options.same_dimension else None


def check_room(folder: Path, analyses: Iterable[SubjectAnalysis]) -> None:
    """Refuse a disk on which not all latents will fit."""
    needed, free = sum(analysis.missing_bytes for analysis in analyses), shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"The latents need {needed / 1e9:.2f} GB more and `output_dir` {folder} has {free / 1e9:.2f} GB free: "
            "make room, choose a folder on another disk, fewer images, or `latents_dtype` float16."
        )


def run_analysis(
    options: AnalysisOptions, device: torch.device | str = "cpu", metric_device: torch.device | str | None = None
) -> dict[str, Any]:
    """
    Measure what is not measured yet, and write the report with its pictures.

    Args:
        options ([`AnalysisOptions`]): What is asked for.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where to encode.
        metric_device (`torch.device` or `str`, *optional*): Where to compute in float64; by default `device`.

    Returns:
        `dict[str, Any]`: The contents of `analysis.json`.

    Raises:
        ValueError: If the options do not fit each other, the tokenizers or the data; nearly always before anything is
            encoded.
        ImportError: If a package is missing.
        OSError: If a tokenizer or the data set cannot be reached.
    """
    check_packages(options.parts)
    folder = Path(options.output_dir)
    device = torch.device(device)
    metric_device = device if metric_device is None else torch.device(metric_device)
    subjects = open_subjects(options, device)
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        analyses = [SubjectAnalysis(name, subject, options, metric_device) for name, subject in subjects.items()]
        check_room(folder, analyses)
        results = _measure(options, analyses)
        report = make_report(options, results)
        write_json(folder / REPORT_FILE, report)
        pictures = draw_pictures(folder, results)
        write_text(folder / MARKDOWN_FILE, to_markdown(report, pictures))
    finally:
        lock.release()
    return report


def _measure(options: AnalysisOptions, analyses: list[SubjectAnalysis]) -> dict[str, dict[str, Any]]:
    """All parts of each tokenizer; the mixtures at last, since they need the spectra of all."""
    results: dict[str, dict[str, Any]] = {}
    for analysis in analyses:
        result = {
            "class": analysis.subject.class_name,
            "encoder": analysis.subject.digest,
            "latents": analysis.facts(),
        }
        if "statistics" in options.parts:
            result["channels"] = analysis.channels()
        if "statistics" in options.parts or "mixtures" in options.parts:
            result["spectrum"] = analysis.spectrum()
        for part, measure in (("probe", analysis.probe), ("umap", analysis.umap)):
            if part in options.parts:
                result[part] = measure()
        results[analysis.name] = result
    if "mixtures" in options.parts:
        common = common_dimension(options, (result["spectrum"] for result in results.values()))
        for analysis in analyses:
            result = results[analysis.name]
            result["mixtures"] = analysis.mixtures(common or result["spectrum"]["num_dimensions"])
    if not options.keep_latents:
        for analysis in analyses:
            analysis.remove_latents()
    return results
