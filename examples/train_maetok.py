"""Train a MAETok tokenizer: mask modelling (stage 1), then fine-tuning of its decoder (stage 2).

On ImageNet (log in first: the data set is gated), 8 processes:

    accelerate launch --num_processes 8 examples/train_maetok.py --recipe maetok-b-128-256 \
        --dataset_name ILSVRC/imagenet-1k --validation_split validation --output_dir outputs/maetok-b-128 \
        --mixed_precision bf16 --dataloader_num_workers 8

    accelerate launch --num_processes 8 examples/train_maetok.py --recipe maetok-b-128-256-decoder \
        --pretrained_model_name_or_path outputs/maetok-b-128 \
        --dataset_name ILSVRC/imagenet-1k --validation_split validation --output_dir outputs/maetok-b-128-decoder \
        --mixed_precision bf16 --dataloader_num_workers 8

On a folder of images of your own, where every recipe value has a flag of its name:

    accelerate launch examples/train_maetok.py --recipe maetok-b-128-256 --dataset_name path/to/folder \
        --output_dir outputs/mine --total_batch_size 64 --gradient_accumulation_steps 4 --max_train_steps 20000

A run that was stopped (Ctrl-C and SIGTERM save a checkpoint first) or killed continues with the same command, exactly.
The result in `output_dir` is loaded by `AutoencoderMAE.from_pretrained(output_dir)`; beside it lie the checkpoints,
`training_log.jsonl` (losses) and `train_report.json` (timings, final losses, held-out PSNR).
"""

import argparse
import dataclasses
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from maetok_hf.data import HeldOutImages, StreamingImages, open_images
from maetok_hf.models import AutoencoderMAE
from maetok_hf.seeding import keyed_seed
from maetok_hf.training.auxiliary import AuxiliaryDecoder
from maetok_hf.training.checkpointing import Checkpointer, data_identity, export, model_digest, write_json
from maetok_hf.training.draws import sample_noise
from maetok_hf.training.interruption import RunLock, StopRequest, outlive_stop_signal
from maetok_hf.training.latent_statistics import LatentStatistics, encode_latents
from maetok_hf.training.masking import linear_mask_ratio, sample_masks, sample_step_mask_ratio
from maetok_hf.training.optim import create_ema, set_learning_rate
from maetok_hf.training.progress import TrainingMonitor
from maetok_hf.training.recipes import TokenizerRecipe, parse_arguments
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.targets import HOGTarget
from maetok_hf.training.tokenizer_objective import TokenizerObjective
from maetok_hf.training.validation import peak_signal_to_noise_ratio


def make_objective(recipe: TokenizerRecipe, options: TokenizerRunOptions) -> TokenizerObjective:
    """The tokenizer, its auxiliary decoders and its losses, freshly initialised or from a trained tokenizer."""
    if (recipe.stage == "decoder_finetuning") != (options.pretrained_model_name_or_path is not None):
        raise ValueError(
            "`pretrained_model_name_or_path` names the tokenizer that stage 'decoder_finetuning' starts from; it is "
            f"{options.pretrained_model_name_or_path!r} and the recipe's `stage` is {recipe.stage!r}."
        )
    weights = {"reconstruction": recipe.reconstruction_weight}
    if recipe.stage == "decoder_finetuning":
        tokenizer = AutoencoderMAE.from_pretrained(options.pretrained_model_name_or_path)
        if recipe.resolution % tokenizer.config.patch_size:
            raise ValueError(
                f"`resolution` is {recipe.resolution}, but must be a multiple of the tokenizer's patches of "
                f"{tokenizer.config.patch_size} pixels."
            )
        return TokenizerObjective(tokenizer, loss_weights=weights, decoder_only=True)

    torch.manual_seed(keyed_seed(options.seed, "initialisation"))
    tokenizer = AutoencoderMAE(sample_size=recipe.resolution, **recipe.model)
    targets, decoders = {}, {}
    if "hog" in recipe.auxiliary_targets:
        targets["hog"] = HOGTarget(tokenizer.config.patch_size)
        weights["hog"] = recipe.hog_weight
    for name, target in targets.items():
        decoders[name] = AuxiliaryDecoder.from_tokenizer_config(
            tokenizer.config,
            target.feature_dim,
            hidden_size=recipe.auxiliary_hidden_size,
            num_layers=recipe.auxiliary_num_layers,
            num_attention_heads=recipe.auxiliary_num_attention_heads,
        )
    if tokenizer.config.gaussian_posterior:
        weights["kl"] = recipe.kl_weight
    return TokenizerObjective(tokenizer, targets, decoders, weights)


def mask_ratio_at(step: int, recipe: TokenizerRecipe, seed: int) -> float:
    """Share of the patches that are masked in a step: drawn in stage 1 (section 3.2), falling in stage 2 (3.3)."""
    if recipe.stage == "decoder_finetuning":
        return linear_mask_ratio(step, recipe.mask_ratio_decay_steps, recipe.mask_ratio_start, recipe.mask_ratio_end)
    return sample_step_mask_ratio(
        seed, step, recipe.mask_ratio_mean, recipe.mask_ratio_std, recipe.mask_ratio_min, recipe.mask_ratio_max
    )


def measure_latents(tokenizer: AutoencoderMAE, stream: StreamingImages, num_images: int, accelerator: Accelerator):
    """Statistics of the latents of training images: whole micro-batches, at least `num_images` or an epoch of them."""
    statistics = LatentStatistics(tokenizer.config.latent_channels)
    per_round = stream.batch_size * accelerator.num_processes
    rounds = min(-(-num_images // per_round), stream.micro_batches_per_epoch)
    for _, batch in zip(range(rounds), stream.dataloader(), strict=False):
        statistics.update(encode_latents(tokenizer, batch["pixel_values"].to(accelerator.device)))
    if accelerator.num_processes == 1:
        return statistics
    return LatentStatistics.merged(accelerator.gather(statistics.state()[None].to(accelerator.device)))


@torch.no_grad()
def held_out_psnr(tokenizer: AutoencoderMAE, images: HeldOutImages, accelerator: Accelerator) -> float:
    """Mean PSNR in dB of the unmasked reconstructions of held-out images."""
    total = torch.zeros(2, device=accelerator.device)
    for batch in images:
        pixel_values = batch["pixel_values"].to(accelerator.device)
        psnr = peak_signal_to_noise_ratio(tokenizer(pixel_values).sample, pixel_values)
        total += torch.tensor([psnr.sum().item(), len(psnr)], device=accelerator.device)
    total = accelerator.reduce(total)
    return (total[0] / total[1]).item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe, options = parse_arguments(parser, TokenizerRecipe, TokenizerRunOptions, Path(__file__).parent / "recipes")

    # 1. Processes and the output folder
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation_steps
    )
    logging.basicConfig(format="%(message)s", level=logging.INFO if accelerator.is_main_process else logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output_dir) if accelerator.is_main_process else None

    # 2. Data: micro-batches in an order that depends on the seed, not on processes, workers or restarts
    data = {
        "name": options.dataset_config_name,
        "image_column": options.image_column,
        "cache_dir": options.cache_dir,
        "use_labels": False,
    }
    with accelerator.main_process_first():
        source = open_images(options.dataset_name, split=options.train_split, **data)
    stream_settings = {
        "resolution": recipe.resolution,
        "batch_size": options.micro_batch_size(recipe.total_batch_size, accelerator.num_processes),
        "seed": options.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_workers": options.dataloader_num_workers,
        "num_streams": options.num_streams,
    }
    stream = StreamingImages(source, crop=recipe.crop, random_flip=recipe.random_flip, **stream_settings)
    held_out = None
    if options.validation_split is not None:
        held_out_source = open_images(options.dataset_name, split=options.validation_split, **data)
        held_out = HeldOutImages(
            held_out_source,
            resolution=recipe.resolution,
            batch_size=stream.batch_size,
            num_samples=min(options.num_validation_images or 500, held_out_source.num_rows),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )

    # 3. Model, optimiser, moving average
    objective = make_objective(recipe, options)
    tokenizer = objective.tokenizer
    if options.gradient_checkpointing:
        tokenizer.enable_gradient_checkpointing()
    initial_digest = model_digest(tokenizer)
    model, optimizer = accelerator.prepare(objective, recipe.make_optimizer(objective))
    ema = create_ema(tokenizer, recipe.ema_decay)

    # 4. Continue where an earlier run with the same settings stopped
    identity = {
        "recipe": dataclasses.asdict(recipe),
        "seed": options.seed,
        "data": data_identity(source),
        "initial_tokenizer": initial_digest,
        "micro_batch_size": stream.batch_size,
        "num_streams": stream.num_streams,
        "mixed_precision": accelerator.mixed_precision,
    }
    checkpointer = Checkpointer(
        accelerator,
        output_dir,
        identity,
        models={"tokenizer": tokenizer},
        ema={"tokenizer": ema},
        modules={"auxiliary_decoders": objective.auxiliary_decoders},
        total_limit=options.checkpoints_total_limit,
    )
    first_step, seconds = checkpointer.load(options.resume_from_checkpoint)
    stream.set_start(first_step * options.gradient_accumulation_steps)
    loader = stream.dataloader(pin_memory=accelerator.device.type == "cuda")
    loader.worker_init_fn = outlive_stop_signal
    accelerator.print(
        f"{tokenizer.num_parameters() / 1e6:.1f} M parameters, {source.num_rows} images, "
        f"{stream.micro_batches_per_epoch // options.gradient_accumulation_steps} steps per epoch "
        f"({stream.num_dropped} images left out), {accelerator.num_processes} processes of {torch.get_num_threads()} "
        f"threads, beginning at step {first_step}"
    )

    # 5. Training
    stop = StopRequest()
    monitor = TrainingMonitor(
        output_dir,
        f"tokenizer, {recipe.stage}",
        recipe.max_train_steps,
        first_step,
        reduce=lambda values: accelerator.reduce(values, reduction="mean"),
        enabled=accelerator.is_main_process,
    )
    num_patches = (recipe.resolution // tokenizer.config.patch_size) ** 2
    latent_shape = (tokenizer.latent_sequence_length, tokenizer.config.latent_channels)
    micro_batches = iter(loader)
    start = time.monotonic() - seconds
    model.train()
    for step in range(first_step, recipe.max_train_steps):
        learning_rate = recipe.learning_rate_at(step)
        set_learning_rate(optimizer, learning_rate)
        mask_ratio = mask_ratio_at(step, recipe, options.seed)
        for part in range(options.gradient_accumulation_steps):
            batch = next(micro_batches)
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            mask = noise = None
            if mask_ratio > 0:
                mask = sample_masks(options.seed, step, batch["indices"], num_patches, mask_ratio)
                mask = mask.to(accelerator.device, non_blocking=True)
            if tokenizer.config.gaussian_posterior:
                noise = sample_noise(options.seed, "posterior", step, batch["indices"], latent_shape)
                noise = noise.to(accelerator.device, non_blocking=True)
            # Drop-path is the only draw that is left to the global generator.
            micro_batch = part * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(keyed_seed(options.seed, "dropout", step, micro_batch))
            with accelerator.accumulate(model):
                terms = model(pixel_values, mask, noise)
                accelerator.backward(terms["loss"])
                replaced = batch["replaced"].float().mean().to(accelerator.device, non_blocking=True)
                monitor.add(terms | {"replaced_fraction": replaced})
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.trainable_parameters(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if not optimizer.step_was_skipped:  # fp16 skips a step whose gradient overflowed
            monitor.add({"gradient_norm": norm})
        ema.step(tokenizer.parameters())
        monitor.advance()

        done = step + 1
        signal_number = stop.agreed()
        save = bool(signal_number) or done % options.checkpointing_steps == 0 or done == recipe.max_train_steps
        if save or done % options.logging_steps == 0:
            seconds = time.monotonic() - start
            monitor.report(done, {"learning_rate": learning_rate, "mask_ratio": mask_ratio, "seconds": seconds})
        if save:
            checkpointer.save(done, seconds)
        if signal_number:
            accelerator.print(f"Stopped by signal {signal_number} after step {done}: the same command continues.")
            accelerator.end_training()
            raise SystemExit(128 + signal_number)

    # 6. Result: the averaged weights with the statistics of their latents, and what they achieve
    stop.release()
    monitor.close()
    ema.copy_to(tokenizer.parameters())
    model.eval()
    if recipe.stage == "mask_modelling" or tokenizer.config.latents_mean is None:
        # Stage 2 leaves the latents as they are, and a generator may have been trained on them already.
        unflipped = StreamingImages(source, random_flip=False, **stream_settings)
        statistics = measure_latents(tokenizer, unflipped, recipe.latent_statistics_images, accelerator)
        latents_mean, latents_std = statistics.result(recipe.latent_statistics)
        tokenizer.register_to_config(latents_mean=latents_mean, latents_std=latents_std)
    psnr = None if held_out is None else held_out_psnr(tokenizer, held_out, accelerator)
    if accelerator.is_main_process:
        export(output_dir, tokenizer.save_pretrained)
        report = {
            "recipe": dataclasses.asdict(recipe),
            "options": dataclasses.asdict(options),
            "num_processes": accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "num_parameters": tokenizer.num_parameters(),
            "training_seconds": seconds,
            "images_per_second": recipe.max_train_steps * recipe.total_batch_size / seconds,
            "final": monitor.last_entry(),
            "given_tokenizer": None if options.pretrained_model_name_or_path is None else initial_digest,
            "held_out_psnr": psnr,
            "latents_mean": tokenizer.config.latents_mean,
            "latents_std": tokenizer.config.latents_std,
        }
        write_json(output_dir / "train_report.json", report)
        lock.release()
    accelerator.print(f"Saved to {output_dir}" + ("" if psnr is None else f", held-out PSNR {psnr:.2f} dB"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
