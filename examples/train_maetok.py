"""Train a MAETok tokenizer: mask modelling (stage 1), then fine-tuning of its decoder (stage 2).

The whole published recipe on ImageNet (log in first: the data set is gated), 8 processes:

    accelerate launch --num_processes 8 examples/train_maetok.py --recipe maetok-b-128-256 \
        --validation_split validation --validation_steps 5000 --output_dir outputs/maetok-b-128 \
        --mixed_precision bf16 --dataloader_num_workers 8

    accelerate launch --num_processes 8 examples/train_maetok.py --recipe maetok-b-128-256-decoder \
        --pretrained_model_name_or_path outputs/maetok-b-128 \
        --validation_split validation --validation_steps 5000 --output_dir outputs/maetok-b-128-decoder \
        --mixed_precision bf16 --dataloader_num_workers 8

On a folder of images of your own, where every recipe value has a flag of its name:

    accelerate launch examples/train_maetok.py --recipe maetok-b-128-256 --dataset_name path/to/folder \
        --output_dir outputs/mine --total_batch_size 64 --gradient_accumulation_steps 4 --max_train_steps 50000

Sharded over several machines, or several GPUs that are too small for one copy: see examples/accelerate_configs.
torch's launcher gives several processes 30 s to save when it is told to stop: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
in its environment if a step and a checkpoint take longer.

A run that was stopped (Ctrl-C and SIGTERM save a checkpoint first) or killed continues with the same command, exactly.
The result in `output_dir` is loaded by `AutoencoderMAE.from_pretrained(output_dir)`; beside it lie the checkpoints,
`training_log.jsonl` (losses), `validation/` (pictures), `logs/` (TensorBoard's) and `train_report.json` (timings,
final losses, held-out measurements).
"""

import argparse
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from maetok_hf.data import (
    HeldOutImages,
    RowCounts,
    StreamingImages,
    open_images,
    to_pixel_values,
)
from maetok_hf.models import AutoencoderMAE
from maetok_hf.seeding import keyed_seed
from maetok_hf.training.checkpointing import data_identity, export, model_digest, write_json
from maetok_hf.training.discriminator_objective import sample_adversarial_draws
from maetok_hf.training.draws import sample_noise, seed_global_generator
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.interruption import end_process
from maetok_hf.training.latent_statistics import measure_latents
from maetok_hf.training.masking import sample_masks
from maetok_hf.training.model_card import write_model_card
from maetok_hf.training.optim import clip_gradients, create_ema, set_learning_rate
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run import TrainingRun
from maetok_hf.training.run_options import TokenizerRunOptions
from maetok_hf.training.sharding import average_gradients, whole_copy
from maetok_hf.training.stability import StepGuard
from maetok_hf.training.tokenizer_parts import (
    make_caption_tokenizer,
    make_discriminator_objective,
    make_tokenizer,
    make_tokenizer_objective,
)
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from maetok_hf.training.validation import ReconstructionMetrics, reconstruction_grid, write_png


MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "tokenizer_template.md"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICTURE_IMAGES = 16


def open_data(recipe: TokenizerRecipe, options: TokenizerRunOptions, accelerator: Accelerator):
    """The training stream, the same images unaugmented for statistics, and the held-out images or `None`."""
    data = {
        "name": options.dataset_config_name,
        "image_column": options.image_column,
        "caption_column": options.caption_column,
        "cache_dir": options.cache_dir,
        "use_labels": False,
    }
    source = open_images(options.dataset_name, split=options.train_split, **data)
    settings = {
        "batch_size": options.micro_batch_size(recipe.total_batch_size, accelerator.num_processes),
        "seed": options.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_workers": options.dataloader_num_workers,
        "num_streams": options.num_streams,
    }
    stream = StreamingImages(
        source,
        resolution=recipe.training_resolutions,
        resolution_weights=recipe.mixed_resolution_weights or None,
        crop=recipe.crop,
        random_flip=recipe.random_flip,
        **settings,
    )
    # Small blocks: statistics want few images, and these from everywhere.
    unaugmented = StreamingImages(
        source, resolution=recipe.resolution, random_flip=False, block_size=stream.batch_size, **settings
    )
    if options.validation_split is None:
        return stream, unaugmented, None
    held_out_source = open_images(options.dataset_name, split=options.validation_split, **data)
    num_images = options.num_validation_images or 500
    if options.num_validation_images is not None and num_images > held_out_source.num_rows:
        accelerator.print(
            f"`num_validation_images` is {num_images}, but {held_out_source.description} has "
            f"{held_out_source.num_rows}: all of these are measured."
        )
    held_out = HeldOutImages(
        held_out_source,
        resolution=recipe.resolution,
        batch_size=stream.batch_size,
        num_samples=min(num_images, held_out_source.num_rows),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return stream, unaugmented, held_out


def check_statistics_unused(recipe: TokenizerRecipe, options: TokenizerRunOptions) -> None:
    """Refuse settings of a measurement that a run whose latents have their statistics already does not make."""
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    names = ["latent_statistics", "latent_statistics_images"]
    given = [name for name in names if getattr(recipe, name) != defaults[name]]
    given += ["checkpoint_statistics_images"] if options.checkpoint_statistics_images is not None else []
    if given:
        raise ValueError(
            f"`{given[0]}` has no effect: the latents of {options.pretrained_model_name_or_path} have statistics, and "
            f"the stage {recipe.stage!r} keeps them. Remove it."
        )


class TokenizerTraining:
    """One training run of a tokenizer: what is trained, and what happens in a step."""

    def __init__(self, recipe: TokenizerRecipe, options: TokenizerRunOptions):
        self.recipe, self.options = recipe, options
        if recipe.predicts_text != (options.caption_column is not None):
            raise ValueError(
                "`caption_column` names the captions that the auxiliary target 'text' predicts: it is "
                f"{options.caption_column!r} and the recipe's `auxiliary_targets` are {recipe.auxiliary_targets}."
            )
        if not MODEL_CARD.is_file():
            raise ValueError(f"The model card's template {MODEL_CARD} is missing: run this script where it lies.")
        self.run = TrainingRun(recipe, options, f"tokenizer, {recipe.stage}")
        self.accelerator, self.device = self.run.accelerator, self.run.device

        # Models. Frozen networks (teachers, LPIPS, the discriminator's trunk) are no part of what is prepared.
        self.tokenizer = make_tokenizer(recipe, options.seed, options.pretrained_model_name_or_path)
        self.captions_to_tokens = make_caption_tokenizer(recipe)
        self.discriminator = make_discriminator_objective(recipe, options.seed)
        self.objective = make_tokenizer_objective(
            recipe, self.tokenizer, options.seed, self.discriminator, self.captions_to_tokens
        )
        # Only of a tokenizer that was given: the last bits of what is drawn may differ from processor to processor.
        self.given_digest = options.pretrained_model_name_or_path and model_digest(self.tokenizer)
        # Stage 2 leaves the latents as they are, and a generator may have been trained on them already.
        self.latents_change = recipe.stage == "mask_modelling" or self.tokenizer.config.latents_mean is None
        if not self.latents_change:
            check_statistics_unused(recipe, options)
        if options.gradient_checkpointing:
            enable_gradient_checkpointing(self.objective, options.gradient_checkpointing_share)
        if options.torch_compile:
            self.objective.compile_repeated_blocks()
            if self.discriminator is not None:
                self.discriminator.discriminator.compile_repeated_blocks()

        # Data: micro-batches in an order that depends on the seed, not on processes, workers or restarts
        self.stream, self.unaugmented, self.held_out = open_data(recipe, options, self.accelerator)
        self.steps_per_epoch = self.stream.micro_batches_per_epoch // options.gradient_accumulation_steps
        self.row_counts = RowCounts(self.run.sum)

        # Optimisers and the moving average, of parameters that may be sharded by now
        self.model, self.optimizer = self.accelerator.prepare(self.objective, recipe.make_optimizer(self.objective))
        self.objective.move_frozen(self.device)
        self.parameters = self.objective.trainable_parameters()
        self.ema = create_ema(self.tokenizer, recipe.ema_decay)
        self.saved = {"tokenizer": None, "tokenizer_ema": self.ema}  # folders of a checkpoint, and whose weights
        if self.discriminator is not None:
            # It is small, and called from within the tokenizer's forward pass: its gradients are averaged here instead
            # of by a wrapper. Its heads compute in float32 whatever the precision, so its gradients are not scaled.
            self.discriminator.to(self.device).discriminator.move_frozen(self.device)
            self.discriminator_optimizer = self.accelerator.prepare_optimizer(
                recipe.make_optimizer(self.discriminator, recipe.peak_discriminator_learning_rate)
            )
            self.discriminator_optimizer.scaler = None

    def begin(self) -> int:
        """Continue from the newest checkpoint, or begin; the number of steps done."""
        modules, optimizers = {"auxiliary_decoders": self.objective.auxiliary_decoders}, [self.optimizer]
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
            optimizers.append(self.discriminator_optimizer)
        first_step = self.run.begin(
            {
                "data": data_identity(self.stream.source),
                "given_tokenizer": self.given_digest,
                "micro_batch_size": self.stream.batch_size,
                "num_streams": self.stream.num_streams,
            },
            models={"tokenizer": self.tokenizer},
            ema={"tokenizer": self.ema},
            modules=modules,
            optimizers=optimizers,
        )
        if self.accelerator.is_main_process and "row_counts" in self.run.extra:
            self.row_counts.load(self.run.extra["row_counts"])  # those of all processes
        self.accelerator.print(
            f"{self.tokenizer.num_parameters() / 1e6:.1f} M parameters, {self.stream.source.num_rows} images, "
            f"{self.steps_per_epoch} steps per epoch ({self.stream.num_dropped} images left out), "
            f"{self.accelerator.num_processes} processes of {torch.get_num_threads()} threads, "
            f"beginning at step {first_step}"
        )
        return first_step

    def train(self) -> None:
        """Run to the end of the recipe, from wherever an earlier run stopped."""
        recipe, options, run = self.recipe, self.options, self.run
        first_step = self.begin()
        self.stream.set_start(first_step * options.gradient_accumulation_steps)
        micro_batches = iter(self.stream.dataloader(pin_memory=self.device.type == "cuda"))
        self.model.train()
        if first_step > 0:  # what the run was stopped before
            self.measure_latents(first_step)
            self.examine(first_step, saved=False)
        for step in range(first_step, recipe.max_train_steps):
            learning_rate = recipe.learning_rate_at(step)
            set_learning_rate(self.optimizer, learning_rate)
            mask_ratio = recipe.mask_ratio_at(step, options.seed)
            for part in range(options.gradient_accumulation_steps):
                batch = next(micro_batches)
                self.row_counts.add(batch["counts"])
                # Drop-path is the only draw that is left to the global generator.
                micro_batch = part * self.accelerator.num_processes + self.accelerator.process_index
                seed_global_generator(keyed_seed(options.seed, "dropout", step, micro_batch), self.device)
                with self.accelerator.accumulate(self.model):
                    self.micro_step(step, batch, mask_ratio)
            done = step + 1
            save = run.end_step(step, {"learning_rate": learning_rate, "mask_ratio": mask_ratio})
            if done % self.steps_per_epoch == 0:
                epoch = done // self.steps_per_epoch
                self.accelerator.print(f"Epoch {epoch} of the images is over: {self.row_counts.report()}")
            elif run.leaving or done == recipe.max_train_steps:
                epoch = done // self.steps_per_epoch + 1
                self.accelerator.print(f"The run ends in epoch {epoch} of the images: {self.row_counts.describe()}")
            if save:
                run.save(step, {"row_counts": self.row_counts.state()})
                self.measure_latents(done)
            if not run.stopping:
                self.examine(done, save)
            run.leave_if_asked(step)
        run.end()
        self.finish()

    def micro_step(self, step: int, batch: dict, mask_ratio: float) -> None:
        """Forward and backward passes of a micro-batch, and the optimisers' steps if it is the last of the step."""
        scales = self.recipe.loss_scales_at(step)
        judged = self.discriminator is not None and scales["adversarial"] > 0
        inputs = self.make_inputs(step, batch, mask_ratio)
        with self.accelerator.autocast():
            draws = self.adversarial_draws("generator", step, batch, ["fake"]) if judged else None
            terms, reconstructions = self.model(**inputs, scales=scales, adversarial_draws=draws)
        self.run.backward(terms["loss"])
        if judged:
            with self.accelerator.autocast():
                draws = self.adversarial_draws("discriminator", step, batch, self.discriminator.looks)
                opinion = self.discriminator(inputs["pixel_values"], reconstructions, draws)
            loss = StepGuard.expose(opinion.pop("loss"))
            (loss / self.options.gradient_accumulation_steps).backward()
            terms |= opinion
        self.run.monitor.add(terms)
        if not self.accelerator.sync_gradients:
            return

        # Not `accelerator.clip_grad_norm_`, which would unscale the gradients of both optimisers under fp16.
        norms = {}
        if judged:
            heads = list(self.discriminator.parameters())
            average_gradients(heads)
            norms["discriminator_gradient_norm"] = clip_gradients(heads, self.recipe.max_grad_norm)
            if self.optimizer.scaler is not None:
                # The scaler skips by the tokenizer's gradients alone: one of them must show what is wrong with these.
                finite = norms["discriminator_gradient_norm"].isfinite()
                self.parameters[0].grad.mul_(torch.where(finite, 1.0, torch.nan))
        self.accelerator.unscale_gradients(self.optimizer)
        norms["gradient_norm"] = clip_gradients(self.parameters, self.recipe.max_grad_norm)
        self.run.admit(norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if judged:
            set_learning_rate(self.discriminator_optimizer, self.recipe.discriminator_learning_rate_at(step))
            self.discriminator_optimizer.step()
            self.discriminator_optimizer.zero_grad()
            self.discriminator.end_step(self.run.average)

    def make_inputs(self, step: int, batch: dict, mask_ratio: float) -> dict[str, torch.Tensor]:
        """A micro-batch and its draws as the objective takes them, on the device."""
        config, seed, indices = self.tokenizer.config, self.options.seed, batch["indices"]
        inputs = {"pixel_values": to_pixel_values(batch["images"], self.device)}
        num_patches = math.prod(side // config.patch_size for side in batch["images"].shape[-2:])
        if mask_ratio > 0:
            inputs["mask"] = sample_masks(seed, step, indices, num_patches, mask_ratio)
        if config.gaussian_posterior:
            shape = (config.num_latent_tokens or num_patches, config.latent_channels)
            inputs["posterior_noise"] = sample_noise(seed, "posterior", step, indices, shape)
        if self.captions_to_tokens is not None:
            inputs["token_indices"] = self.captions_to_tokens(batch["captions"])
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    def adversarial_draws(self, side: str, step: int, batch: dict, looks: Sequence[str]) -> dict[str, torch.Tensor]:
        """What is random in looks of the discriminator, on the device."""
        draws = sample_adversarial_draws(self.options.seed, side, step, batch["indices"], looks)
        return {name: draw.to(self.device, non_blocking=True) for name, draw in draws.items()}

    def latent_statistics(self, tokenizers: dict[str, AutoencoderMAE], num_images: int) -> dict[str, dict[str, Any]]:
        """Config values of each: mean and standard deviation of its latents of at least `num_images` images."""
        per_round = self.unaugmented.batch_size * self.accelerator.num_processes
        rounds = min(-(-num_images // per_round), self.unaugmented.micro_batches_per_epoch)
        batches = zip(range(rounds), self.unaugmented.dataloader(), strict=False)
        pixel_values = (to_pixel_values(batch["images"], self.device) for _, batch in batches)
        return measure_latents(tokenizers, pixel_values, self.recipe.latent_statistics, self.accelerator.gather)

    def measure_latents(self, done: int) -> None:
        """Statistics of the latents of a checkpoint's models, for their configs; the checkpoint is whole by then."""
        folder = self.run.checkpoint(done) / "tokenizer_ema"
        # asked of one process: what the others see of the file may be older
        missing = self.accelerator.is_main_process and folder.is_dir()
        missing = missing and AutoencoderMAE.load_config(folder)["latents_mean"] is None
        if not self.latents_change or not self.run.sum(torch.tensor(int(missing))):
            return
        copies = {name: whole_copy(self.tokenizer, ema, self.device) for name, ema in self.saved.items()}
        configs = self.latent_statistics(copies, self.options.checkpoint_statistics_images or 1024)
        self.run.add_to_configs(done, configs)

    def examine(self, done: int, saved: bool) -> None:
        """What is due after a step and may take long: measurements on held-out images, an upload."""
        every, metrics = self.options.validation_steps, None
        if every and done % every == 0 and done < self.recipe.max_train_steps:
            metrics = self.validate(whole_copy(self.tokenizer, self.ema, self.device), done)
        if saved:
            folder = self.run.checkpoint(done) / "tokenizer_ema"
            self.run.publish(lambda: self.with_card(folder, done, metrics), done)

    def with_card(self, folder: Path, step: int, metrics: dict[str, float] | None = None) -> dict[str, Path]:
        """The files of a saved tokenizer, its card and the newest picture, by their names in a Hub repository."""
        files = {path.name: path for path in folder.iterdir() if path.name in ("config.json", WEIGHTS_NAME)}
        pictures = sorted(self.run.output_dir.glob("validation/step-*.png"), key=lambda path: path.stat().st_mtime)
        if pictures:
            files["reconstructions.png"] = pictures[-1]
        files["README.md"] = write_model_card(
            self.run.output_dir,
            MODEL_CARD,
            repo_id=self.run.repo_id,
            recipe=dataclasses.asdict(self.recipe),
            step=step,
            model_config=AutoencoderMAE.load_config(folder),
            dataset_name=self.options.dataset_name,
            train_split=self.options.train_split,
            base_model=self.options.pretrained_model_name_or_path,
            validation_split=self.options.validation_split,
            metrics=metrics,
            picture="reconstructions.png" if pictures else None,
        )
        return files

    @torch.no_grad()
    def validate(self, tokenizer: AutoencoderMAE, step: int) -> dict[str, float] | None:
        """PSNR, SSIM and, with its network, LPIPS of unmasked held-out reconstructions, and a picture of the first."""
        metrics, picture = ReconstructionMetrics(self.objective.perceptual), None
        row_counts = RowCounts(self.run.sum)
        for batch in self.held_out:
            row_counts.add(batch["counts"])
            pixel_values = to_pixel_values(batch["images"], self.device)
            reconstructions = tokenizer(pixel_values).sample
            metrics.update(reconstructions, pixel_values)
            if picture is None:
                picture = reconstruction_grid(pixel_values[:PICTURE_IMAGES], reconstructions[:PICTURE_IMAGES])
        unusual = row_counts.report()
        metrics = ReconstructionMetrics.merged(self.accelerator.gather(metrics.state()[None].to(self.device)))
        if metrics.num_images == 0:
            logging.warning("Held-out images after step %d: not one can be used.", step)
            return None
        result = metrics.result()
        if picture is not None and self.accelerator.is_main_process:
            write_png(self.run.output_dir / "validation" / f"step-{step}.png", picture)
            self.run.trackers.log_image("validation/reconstructions", picture, step)
        self.run.trackers.log({f"validation/{name}": value for name, value in result.items()}, step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        self.accelerator.print(f"Held-out images after step {step}: {shown} ({unusual})")
        return result

    def finish(self) -> None:
        """Export the averaged weights with the statistics of their latents, and say what they achieve."""
        steps, output_dir = self.recipe.max_train_steps, self.run.output_dir
        tokenizer = whole_copy(self.tokenizer, self.ema, self.device)
        if self.latents_change:
            configs = self.latent_statistics({"tokenizer": tokenizer}, self.recipe.latent_statistics_images)
            tokenizer.register_to_config(**configs.get("tokenizer", {}))
        if self.accelerator.is_main_process:
            export(output_dir, tokenizer.save_pretrained)
        metrics = None if self.held_out is None else self.validate(tokenizer, steps)
        row_counts = self.row_counts.of_run()
        if self.accelerator.is_main_process:
            report = self.run.report() | {
                "num_parameters": tokenizer.num_parameters(),
                "given_tokenizer": self.given_digest,
                "row_counts": row_counts,
                "held_out": metrics,
                "latents_mean": tokenizer.config.latents_mean,
                "latents_std": tokenizer.config.latents_std,
            }
            write_json(output_dir / "train_report.json", report)
            self.with_card(output_dir, steps, metrics)  # also for an upload by hand
        self.run.publish(lambda: self.with_card(output_dir, steps, metrics), steps)
        self.accelerator.print(f"Saved to {output_dir}")
        self.run.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe, options = parse_arguments(parser, TokenizerRecipe, TokenizerRunOptions, Path(__file__).parent / "recipes")
    TokenizerTraining(recipe, options).train()


if __name__ == "__main__":
    main()
    end_process()
