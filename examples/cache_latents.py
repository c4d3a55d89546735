"""Encode a data set of images once, and keep the latents for the training of generators.

On ImageNet (log in first: the data set is gated), 8 processes, 21 GB at 128 tokens of 32 channels:

    accelerate launch --num_processes 8 examples/cache_latents.py \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder --dataset_name ILSVRC/imagenet-1k \
        --output_dir outputs/latents --dataloader_num_workers 8

Any autoencoder of diffusers for images will do, here one of 32 x 32 tokens of 4 channels:

    accelerate launch examples/cache_latents.py --tokenizer_name_or_path stabilityai/sd-vae-ft-ema \
        --dataset_name path/to/folder --output_dir outputs/latents-vae

With `--alignment_model facebook/dinov2-base` the features that a generator is aligned with (REPA) are stored, too:
504 GB more for ImageNet, and no teacher in the training.

Each file holds the latents of a fixed range of images and is written by one process: whole, or not at all. A run that
was stopped or killed continues with the same command, on any number of processes, and the files are the same. Nothing
waits in a collective: a process that has written its files ends, and the first one completes the folder when the files
of all are there.

The result is read by `open_latents` and `StreamingLatents` of `maetok_hf.data`, and like any parquet data set by
`datasets.load_dataset`. `--push_to_hub user/name` shares it as a data set on the Hub, which both read by that name.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from maetok_hf.data import (
    COUNT_NAMES,
    ImageRanges,
    LatentLayout,
    ShardWriter,
    describe_counts,
    describe_shards,
    open_images,
    read_shard,
    to_pixel_values,
)
from maetok_hf.data.latent_shards import FORMAT_VERSION, METADATA_FILE, SETTINGS_FILE
from maetok_hf.training.cache_options import CacheOptions
from maetok_hf.training.checkpointing import data_identity, write_json
from maetok_hf.training.configuration import add_flags, build, given_flags
from maetok_hf.training.hub_files import check_upload, upload_files
from maetok_hf.training.interruption import RunLock, end_process
from maetok_hf.training.latent_card import write_latents_card
from maetok_hf.training.latent_encoding import (
    ViewEncoder,
    encode_grid,
    encoder_digest,
    load_tokenizer,
    resolve_commit,
    to_tokens,
)
from maetok_hf.training.latent_statistics import LatentStatistics, summarize_statistics
from maetok_hf.training.model_card import public_name
from maetok_hf.training.resumption import check_identity
from maetok_hf.training.targets import explained_loading
from maetok_hf.training.token_features import (
    TokenFeatureEncoder,
    find_stored_teacher,
    load_cached_teacher,
    stored_digest,
    teacher_identity,
)


logger = logging.getLogger("maetok_hf.cache_latents")

MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "latents_template.md"
UPLOADED = ["README.md", METADATA_FILE, "data/*.parquet"]
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_REPORTS = 600.0


def check_launcher(options: CacheOptions) -> None:
    """Refuse a setting of the launcher that would be ignored."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", options.mixed_precision):
        raise ValueError(
            f"`mixed_precision` of the launcher is {launched!r} and of this script {options.mixed_precision!r}: give "
            "it to the script, whose latents depend on it."
        )


def parse_options(words: list[str] | None = None) -> CacheOptions:
    """The command line: one flag for every field of [`CacheOptions`]."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, CacheOptions, "options")
    try:
        return build(CacheOptions, given_flags(parser.parse_args(words), CacheOptions))
    except ValueError as error:
        parser.error(str(error))


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the process at once: what that costs is the file it is writing, which is removed."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class LatentCaching:
    """What one process of a run that encodes a data set knows and does."""

    def __init__(self, options: CacheOptions):
        self.options = options
        self.state = PartialState()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("maetok_hf").setLevel(logging.INFO if self.state.is_main_process else logging.WARNING)
        self.folder = Path(options.output_dir)
        self.launcher = os.getppid()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.folder) if self.state.is_main_process else None
        self.repo_id = options.push_to_hub
        if self.repo_id is not None and self.state.is_main_process:
            self.repo_id = check_upload(self.repo_id, repo_type="dataset", private=options.hub_private_repo)
        address = (options.tokenizer_name_or_path, options.tokenizer_subfolder)
        self.tokenizer_commit = resolve_commit(*address, options.tokenizer_revision)
        tokenizer = load_tokenizer(*address, self.tokenizer_commit)
        self.encoder_digest = encoder_digest(tokenizer)
        self.tokenizer = tokenizer.to(self.state.device)
        self.teacher = self.alignment = self.teacher_commit = self.teacher_files = None
        if (name := options.alignment_model) is not None:
            with explained_loading(name):
                self.teacher_commit = resolve_commit(name)
            choice = (options.alignment_dtype, tokenizer, options.resolution)
            teacher = load_cached_teacher(name, *choice, revision=self.teacher_commit)
            self.alignment = teacher_identity(teacher, name)
            if (stored := find_stored_teacher(name, self.teacher_commit)) is not None:
                self.teacher_files = stored_digest(stored)
            self.teacher = teacher.to(self.state.device)
        self.source = open_images(
            options.dataset_name,
            split=options.split,
            name=options.dataset_config_name,
            revision=options.dataset_revision,
            image_column=options.image_column,
            label_column=options.label_column,
            cache_dir=options.cache_dir,
        )
        self.layout, self.grid = self.make_layout()
        self.settings = self.agree_on_settings()

    def make_layout(self) -> tuple[LatentLayout, list[int] | None]:
        """The layout of the files, from what the tokenizer makes of an empty image, and the shape of its grid."""
        options, shape = self.options, (1, 3, self.options.resolution, self.options.resolution)
        latents = encode_grid(self.tokenizer, torch.zeros(shape, device=self.state.device))
        _, num_tokens, num_channels = to_tokens(latents).shape
        layout = LatentLayout(
            num_images=self.source.num_rows,
            num_tokens=num_tokens,
            num_channels=num_channels,
            num_views=2 if options.random_flip else 1,
            dtype=options.dtype,
            split=options.split,
            rows_per_shard=options.rows_per_shard,
            class_names=self.source.columns.class_names,
            feature_dim=None if self.teacher is None else self.teacher.feature_dim,
        )
        return layout, list(latents.shape[2:]) if latents.ndim == 4 else None

    def agree_on_settings(self) -> str:
        """Write down what determines the files, or make sure that it is what was written down before; its digest."""
        path = self.folder / SETTINGS_FILE
        settings = {
            "data": data_identity(self.source),
            "encoder": self.encoder_digest,
            "resolution": self.options.resolution,
            "mixed_precision": self.options.mixed_precision,
            "batch_size": self.options.batch_size,
            "layout": self.layout.settings(),
        }
        if self.alignment is not None:
            settings["alignment"] = self.alignment
        text = json.dumps(settings, sort_keys=True)
        if self.state.is_main_process and not path.is_file():
            write_json(path, settings)
        self.wait(path.is_file, f"the first process writes {path}")
        check_identity(path, json.loads(path.read_text(encoding="utf-8")), json.loads(text))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def wait(self, ready: Callable[[], bool], description: str) -> None:
        """Look until something is there, however long it takes: a collective would give up after some minutes."""
        start = reported = time.monotonic()
        while not ready():
            if os.getppid() != self.launcher:
                raise SystemExit("The launcher is gone, and other processes may be: run the command again.")
            if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logger.info("Waiting for %.0f minutes until %s.", (reported - start) / 60, description)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def read(self, shard: int) -> dict[str, Any] | None:
        """What a shard says of itself if it is there."""
        return read_shard(self.folder, self.layout, shard, self.settings)

    def check_room(self) -> None:
        """Refuse a disk on which not all latents will fit."""
        missing = [self.layout.rows(shard) for shard in range(self.layout.num_shards) if self.read(shard) is None]
        needed, free = sum(map(len, missing)) * self.layout.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The latents need {needed / 1e9:.2f} GB more and `output_dir` {self.folder} has {free / 1e9:.2f} GB "
                "free: make room, or choose a folder on another disk."
            )

    def encode(self) -> None:
        """Encode this process' share of the shards, but for those that are there."""
        layout, options = self.layout, self.options
        if self.state.is_main_process:
            self.check_room()
        own = range(self.state.process_index, layout.num_shards, self.state.num_processes)
        missing = [shard for shard in own if self.read(shard) is None]
        logger.info("%d images in %d files; %d to be written here", layout.num_images, layout.num_shards, len(missing))
        images = ImageRanges(
            self.source,
            resolution=options.resolution,
            batch_size=options.batch_size,
            ranges=[layout.rows(shard) for shard in missing],
        )
        encoder = ViewEncoder(self.tokenizer, layout.num_views, layout.dtype, options.mixed_precision)
        features = None
        if self.teacher is not None:
            features = TokenFeatureEncoder(self.teacher, layout.num_views, layout.num_tokens)
        loader = images.dataloader(options.dataloader_num_workers)
        for number, batches in itertools.groupby(loader, key=lambda batch: batch["range"]):
            start = time.monotonic()
            with ShardWriter(self.folder, layout, missing[number], self.settings) as writer:
                self.encode_shard(writer, batches, encoder, features)
            rate = writer.num_rows / (time.monotonic() - start)
            logger.info("%s, %d of %d here, %.0f images/s", writer.path.name, number + 1, len(missing), rate)

    def encode_shard(
        self,
        writer: ShardWriter,
        batches: Iterable[dict[str, Any]],
        encoder: ViewEncoder,
        features: TokenFeatureEncoder | None,
    ) -> None:
        """Encode the batches of one shard into its file, with what is to be known of them."""
        statistics, squared_error = LatentStatistics(self.layout.num_channels), 0.0
        counts, left_out, num_unlabeled = torch.zeros(len(COUNT_NAMES), dtype=torch.int64), [], 0
        for batch in batches:
            counts += batch["counts"]
            left_out += batch["left_out"]
            if len(batch["indices"]) == 0:
                continue
            labels = batch.get("class_labels", torch.full_like(batch["indices"], -1))
            images = to_pixel_values(batch["images"], self.state.device)
            latents, error = encoder(images)
            columns = [latents, labels, batch["indices"]]
            if features is not None:
                columns.append(features(images))
            writer.add(*(column.numpy() for column in columns))
            statistics.update(latents.flatten(0, 1))
            squared_error += error
            num_unlabeled += int((labels < 0).sum())
        writer.finish(
            left_out=left_out,
            num_unlabeled=num_unlabeled,
            counts=counts.tolist(),
            statistics=statistics.state().tolist(),
            squared_error=squared_error,
        )

    def complete(self) -> dict[str, Any]:
        """Wait for the shards of all processes, then write the card and what [`open_latents`] reads."""
        found: dict[int, dict[str, Any]] = {}

        def all_there() -> bool:
            for shard in range(self.layout.num_shards):
                if shard not in found and (facts := self.read(shard)) is not None:
                    found[shard] = facts
            return len(found) == self.layout.num_shards

        self.wait(all_there, "the other processes have written their files")
        metadata = self.describe([found[shard] for shard in range(self.layout.num_shards)])
        for path in (self.folder / "data").glob(".*.tmp"):  # of processes that were killed
            path.unlink()
        name = self.repo_id or self.folder.resolve().name
        write_latents_card(self.folder, MODEL_CARD, repo_id=name, metadata=metadata)
        write_json(self.folder / METADATA_FILE, metadata)
        return metadata

    def push(self) -> None:
        """Upload the complete folder."""
        message, private = f"Latents of {self.layout.num_images} images", self.options.hub_private_repo
        place = {"repo_type": "dataset", "private": private, "allow_patterns": UPLOADED}
        print(f"The latents are on the Hub: {upload_files(self.folder, self.repo_id, message, **place)}")

    def describe(self, shards: list[dict[str, Any]]) -> dict[str, Any]:
        """The contents of `latents.json`."""
        options, metadata = self.options, describe_shards(self.layout, shards)
        statistics = summarize_statistics(shard["statistics"] for shard in shards)
        num_values = metadata["num_rows"] * self.layout.num_views * self.layout.num_tokens * self.layout.num_channels
        error = math.sqrt(math.fsum(shard["squared_error"] for shard in shards) / num_values)
        counts = [sum(column) for column in zip(*(shard["counts"] for shard in shards), strict=True)]
        described = {
            "format_version": FORMAT_VERSION,
            "tokenizer": {
                "class": type(self.tokenizer).__name__,
                "name_or_path": public_name(options.tokenizer_name_or_path),
                "subfolder": options.tokenizer_subfolder,
                "revision": self.tokenizer_commit,
                "digest": self.encoder_digest,
            },
            "dataset": {
                "name": public_name(options.dataset_name),
                "config_name": options.dataset_config_name,
                "revision": options.dataset_revision,
            },
            "resolution": options.resolution,
            "mixed_precision": options.mixed_precision,
            "grid": self.grid,
            "statistics": statistics,
            "rounding": error / statistics["scalar"]["latents_std"],
            "counts": dict(zip(COUNT_NAMES, counts, strict=True)),
        }
        if self.teacher is not None:
            num_patches = (options.resolution // self.teacher.patch_size) ** 2
            described["alignment"] = self.alignment | {
                "revision": self.teacher_commit,
                "stored_digest": self.teacher_files,
                "patches_per_token": num_patches // self.layout.num_tokens,
                "num_bytes": metadata["num_rows"] * self.layout.feature_bytes,
            }
        return described | metadata


def main():
    options = parse_options()
    check_launcher(options)
    with stopping_at_signals():
        caching = LatentCaching(options)
        caching.encode()
        if caching.state.is_main_process:
            metadata = caching.complete()
            counts = describe_counts(torch.tensor(list(metadata["counts"].values())))
            print(f"{options.output_dir} holds {metadata['num_rows']} of {metadata['num_images']} images ({counts})")
            if caching.repo_id is not None:
                caching.push()
            caching.lock.release()
        caching.state.destroy_process_group()
    end_process()


if __name__ == "__main__":
    main()
