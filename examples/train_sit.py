"""Train a SiT generator on the latents of a trained MAETok tokenizer.

On ImageNet (log in first: the data set is gated), 8 processes:

    accelerate launch --num_processes 8 examples/train_sit.py --recipe sit-xl-256 \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder \
        --dataset_name ILSVRC/imagenet-1k --output_dir outputs/sit-xl --mixed_precision bf16 \
        --dataloader_num_workers 8

On images of your own, each encoded once before the training (32 KiB per image and mirror image at 128 x 32):

    accelerate launch examples/train_sit.py --recipe sit-b-256 --tokenizer_name_or_path outputs/mine \
        --dataset_name path/to/folder --output_dir outputs/sit-mine --cache_latents --total_batch_size 64

A run that was stopped (Ctrl-C and SIGTERM save a checkpoint first) or killed continues with the same command, exactly.
The result in `output_dir` is a whole pipeline, loaded by `MAETokDiffusionPipeline.from_pretrained(output_dir)`; beside
it lie the checkpoints, `training_log.jsonl` (losses) and `train_report.json` (timings, final loss).
"""

import argparse
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from maetok_hf.data import HeldOutImages, ImageSource, StreamingImages, open_images, to_pixel_values
from maetok_hf.models import AutoencoderMAE, SiTTransformer1DModel
from maetok_hf.models.latents import check_latent_statistics, normalize_latents
from maetok_hf.pipelines import MAETokDiffusionPipeline
from maetok_hf.schedulers import FlowMatchEulerMaruyamaScheduler
from maetok_hf.seeding import keyed_seed
from maetok_hf.training.checkpointing import Checkpointer, data_identity, export, model_digest, write_json
from maetok_hf.training.flow_matching import FlowMatchingObjective, sample_flow_draws
from maetok_hf.training.interruption import RunLock, StopRequest, end_process
from maetok_hf.training.latent_cache import LatentCache
from maetok_hf.training.latent_statistics import encode_latents
from maetok_hf.training.optim import create_ema, set_learning_rate
from maetok_hf.training.progress import TrainingMonitor
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run_options import SiTRunOptions
from maetok_hf.training.sharding import configure_deepspeed, configure_sharding, full_tensor, whole_copy
from maetok_hf.training.sit_recipe import SiTRecipe


def load_tokenizer(options: SiTRunOptions, recipe: SiTRecipe) -> AutoencoderMAE:
    """The frozen tokenizer, refused before any work if its latents cannot be normalised."""
    tokenizer = AutoencoderMAE.from_pretrained(options.tokenizer_name_or_path).requires_grad_(False)
    check_latent_statistics(tokenizer.config)
    if recipe.resolution % tokenizer.config.patch_size:
        raise ValueError(
            f"`resolution` is {recipe.resolution}, but must be a multiple of the tokenizer's patches of "
            f"{tokenizer.config.patch_size} pixels."
        )
    if tokenizer.config.num_latent_tokens == 0 and recipe.resolution != tokenizer.config.sample_size:
        raise ValueError(
            f"`resolution` is {recipe.resolution}, but a tokenizer without latent tokens has one latent per patch and "
            f"was built for {tokenizer.config.sample_size}."
        )
    return tokenizer


def make_transformer(recipe: SiTRecipe, source: ImageSource, tokenizer: AutoencoderMAE, seed: int):
    """A freshly initialised SiT that fits the tokenizer's latents and the data set's classes."""
    settings = dict(recipe.model)
    if source.columns.label is None:
        raise ValueError(f"{source.description} has no label column: name it with `label_column`.")
    known, given = source.num_classes, settings.pop("num_classes", None)
    if known is None and given is None:
        raise ValueError("The data set does not say how many classes it has: give `--model num_classes=...`.")
    if known is not None and given is not None and known != given:
        raise ValueError(f"`model` sets num_classes={given}, but the data set has {known} classes.")
    torch.manual_seed(keyed_seed(seed, "initialisation"))
    return SiTTransformer1DModel(
        sample_size=tokenizer.latent_sequence_length,
        in_channels=tokenizer.config.latent_channels,
        num_classes=known or given,
        **settings,
    )


def check_class_labels(class_labels: torch.Tensor, num_classes: int) -> None:
    """Refuse labels beyond a hand-set number of classes, the first of which would be taken for the null class."""
    if class_labels.max() >= num_classes:
        raise ValueError(
            f"The data set has the label {class_labels.max().item()}, but `model` sets num_classes={num_classes}: "
            "labels go from 0 to num_classes - 1."
        )


def encode(tokenizer: AutoencoderMAE, images: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Normalised latents of uint8 images, in float32."""
    with accelerator.autocast():
        latents = encode_latents(tokenizer, to_pixel_values(images, accelerator.device))
    return normalize_latents(latents.float(), tokenizer.config)


def cache_latents(
    folder: Path,
    source: ImageSource,
    tokenizer: AutoencoderMAE,
    recipe: SiTRecipe,
    options: SiTRunOptions,
    batch_size: int,
    identity: dict,
    accelerator: Accelerator,
) -> LatentCache:
    """Encode every image once, each process its share, unless an earlier run with the same settings has done so."""
    if not LatentCache.is_complete(folder, identity):
        accelerator.print(f"Encoding {source.num_rows} images once")
        if accelerator.is_main_process:
            shape = (tokenizer.latent_sequence_length, tokenizer.config.latent_channels)
            LatentCache.allocate(folder, source.num_rows, 2 if recipe.random_flip else 1, shape)
        accelerator.wait_for_everyone()
        images = HeldOutImages(
            source,
            resolution=recipe.resolution,
            batch_size=batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        loader = images.dataloader(options.dataloader_num_workers)
        LatentCache.fill(folder, loader, lambda pixels: encode(tokenizer, pixels, accelerator))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            LatentCache.complete(folder, identity)
        accelerator.wait_for_everyone()
    return LatentCache(folder)


def encoded_batches(loader, tokenizer: AutoencoderMAE, accelerator: Accelerator) -> Iterator[dict]:
    """Micro-batches of images to micro-batches of latents."""
    for batch in loader:
        yield batch | {"latents": encode(tokenizer, batch["images"], accelerator)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe, options = parse_arguments(parser, SiTRecipe, SiTRunOptions, Path(__file__).parent / "recipes")

    # 1. Processes and the output folder
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation_steps
    )
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    configure_sharding(accelerator, supports_deepspeed=True)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output_dir) if accelerator.is_main_process else None

    # 2. Frozen tokenizer and data, whose order depends on the seed, not on processes, workers or restarts
    tokenizer = load_tokenizer(options, recipe).to(accelerator.device)
    source = open_images(
        options.dataset_name,
        split=options.train_split,
        name=options.dataset_config_name,
        image_column=options.image_column,
        label_column=options.label_column,
        cache_dir=options.cache_dir,
    )
    micro_batch_size = options.micro_batch_size(recipe.total_batch_size, accelerator.num_processes)
    configure_deepspeed(accelerator, micro_batch_size, recipe.max_grad_norm)
    latent_identity = {
        "data": data_identity(source),
        "tokenizer": model_digest(tokenizer),
        "resolution": recipe.resolution,
        "random_flip": recipe.random_flip,
        "mixed_precision": accelerator.mixed_precision,
    }
    order = {
        "batch_size": micro_batch_size,
        "seed": options.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
    }

    # 3. Model, optimiser, moving average
    transformer = make_transformer(recipe, source, tokenizer, options.seed)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = FlowMatchingObjective(transformer, recipe.time_density, recipe.time_shift)
    model, optimizer = accelerator.prepare(objective, recipe.make_optimizer(objective))
    ema = create_ema(transformer, recipe.ema_decay)

    # 4. Continue where an earlier run with the same settings stopped
    identity = latent_identity | {
        "recipe": dataclasses.asdict(recipe),
        "seed": options.seed,
        "micro_batch_size": micro_batch_size,
        "cache_latents": options.cache_latents,
    }
    if not options.cache_latents:
        stream = StreamingImages(
            source,
            resolution=recipe.resolution,
            random_flip=recipe.random_flip,
            num_workers=options.dataloader_num_workers,
            num_streams=options.num_streams,
            require_labels=True,
            **order,
        )
        identity["num_streams"] = stream.num_streams
    checkpointer = Checkpointer(
        accelerator,
        output_dir,
        identity,
        models={"transformer": transformer},
        ema={"transformer": ema},
        total_limit=options.checkpoints_total_limit,
    )
    first_step, seconds, _ = checkpointer.load(options.resume_from_checkpoint)
    if first_step < recipe.max_train_steps:
        checkpointer.check_disk_space()
    start_micro_batch = first_step * options.gradient_accumulation_steps
    if options.cache_latents:
        cache = cache_latents(
            output_dir / "latents", source, tokenizer, recipe, options, micro_batch_size, latent_identity, accelerator
        )
        batches = cache.micro_batches(start_micro_batch=start_micro_batch, **order)
    else:
        stream.set_start(start_micro_batch)
        loader = stream.dataloader(pin_memory=accelerator.device.type == "cuda")
        batches = encoded_batches(loader, tokenizer, accelerator)
    accelerator.print(
        f"{transformer.num_parameters() / 1e6:.1f} M parameters, {source.num_rows} images of "
        f"{transformer.config.num_classes} classes, {accelerator.num_processes} processes of "
        f"{torch.get_num_threads()} threads, beginning at step {first_step}"
    )

    # 5. Training
    stop = StopRequest()
    monitor = TrainingMonitor(
        output_dir,
        "transformer",
        recipe.max_train_steps,
        first_step,
        reduce=lambda values: accelerator.reduce(values, reduction="mean"),
        enabled=accelerator.is_main_process,
    )
    latent_shape = (transformer.config.sample_size, transformer.config.in_channels)
    class_dropout_prob = transformer.config.class_dropout_prob
    start = time.monotonic() - seconds
    model.train()
    for step in range(first_step, recipe.max_train_steps):
        learning_rate = recipe.learning_rate_at(step)
        set_learning_rate(optimizer, learning_rate)
        for _ in range(options.gradient_accumulation_steps):
            batch = next(batches)
            check_class_labels(batch["class_labels"], transformer.config.num_classes)
            draws = sample_flow_draws(
                options.seed, step, batch["indices"], latent_shape, recipe.time_density, class_dropout_prob
            )
            inputs = (batch["latents"], batch["class_labels"], draws.draw, draws.noise, draws.class_drop_mask)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = model(*(value.to(accelerator.device, non_blocking=True) for value in inputs))["loss"]
                accelerator.backward(loss)
                monitor.add({"loss": loss})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.parameters(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # fp16 skips a step whose gradient overflowed
            monitor.add({"gradient_norm": full_tensor(torch.as_tensor(norm, device=accelerator.device))})
        ema.step(transformer.parameters())
        monitor.advance()

        done = step + 1
        signal_number = stop.agreed()
        save = bool(signal_number) or done % options.checkpointing_steps == 0 or done == recipe.max_train_steps
        if save or done % options.logging_steps == 0:
            seconds = time.monotonic() - start
            monitor.report(done, {"learning_rate": learning_rate, "seconds": seconds})
        if save:
            checkpointer.save(done, seconds)
        if signal_number:
            accelerator.print(f"Stopped by signal {signal_number} after step {done}: the same command continues.")
            accelerator.end_training()
            raise SystemExit(128 + signal_number)

    # 6. Result: a pipeline with the averaged weights
    stop.release()
    monitor.close()
    transformer = whole_copy(transformer, ema, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        scheduler = FlowMatchEulerMaruyamaScheduler(path=transformer.config.path)
        pipeline = MAETokDiffusionPipeline(tokenizer, transformer, scheduler, id2label=source.id2label)
        export(output_dir, pipeline.save_pretrained)
        report = {
            "recipe": dataclasses.asdict(recipe),
            "options": dataclasses.asdict(options),
            "num_processes": accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "num_parameters": transformer.num_parameters(),
            "training_seconds": seconds,
            "images_per_second": recipe.max_train_steps * recipe.total_batch_size / seconds,
            "given_tokenizer": latent_identity["tokenizer"],
            "final": monitor.last_entry(),
        }
        write_json(output_dir / "train_report.json", report)
        lock.release()
    accelerator.print(f"Saved to {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
    end_process()
