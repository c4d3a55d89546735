"""Train a generator (SiT, LightningDiT or USiT) on the latents of a trained tokenizer.

On latents that examples/cache_latents.py has written, 8 processes:

    accelerate launch --num_processes 8 examples/train_sit.py --recipe sit-xl-256 \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder --latents_name_or_path outputs/latents \
        --output_dir outputs/sit-xl --mixed_precision bf16 --validation_steps 10000

A recipe with an alignment (sit-l-256-repa) takes its features from latents that were cached with `--alignment_model`.

On images, each batch encoded when it is needed (ImageNet is gated: log in first):

    accelerate launch --num_processes 8 examples/train_sit.py --recipe sit-xl-256 \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder --dataset_name ILSVRC/imagenet-1k \
        --output_dir outputs/sit-xl --mixed_precision bf16 --dataloader_num_workers 8

Fine-tuning of what that has trained, for sampling in one pass per step without guidance (GFT):

    accelerate launch --num_processes 8 examples/train_sit.py --recipe sit-xl-256-gft \
        --pretrained_model_name_or_path outputs/sit-xl \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder --latents_name_or_path outputs/latents \
        --output_dir outputs/sit-xl-gft --mixed_precision bf16

torch's launcher gives several processes 30 s to save when it is told to stop: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
in its environment if a step and a checkpoint take longer.

A run that was stopped (Ctrl-C and SIGTERM save a checkpoint first) or killed continues with the same command, exactly.
The result in `output_dir` is a whole pipeline, loaded by `MAETokDiffusionPipeline.from_pretrained(output_dir)`; beside
it lie the checkpoints, `training_log.jsonl` (losses), `validation/` (samples), `logs/` (TensorBoard's) and
`train_report.json` (timings, final loss). A checkpoint's `transformer_ema` is a model of its own: an early one can be
the `guidance_transformer` of autoguidance.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from maetok_hf.data import (
    LatentSource,
    RowCounts,
    StreamingImages,
    StreamingLatents,
    open_images,
    open_latents,
    to_pixel_values,
)
from maetok_hf.models import AutoencoderMAE
from maetok_hf.models.latents import check_latent_statistics, normalize_latents
from maetok_hf.pipelines import MAETokDiffusionPipeline
from maetok_hf.schedulers import FlowMatchEulerMaruyamaScheduler
from maetok_hf.seeding import keyed_generator, keyed_seed
from maetok_hf.training.checkpointing import data_identity, export, model_digest, write_json
from maetok_hf.training.draws import seed_global_generator
from maetok_hf.training.flow_matching import sample_flow_draws
from maetok_hf.training.generator_parts import make_flow_objective, make_transformer
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.interruption import end_process
from maetok_hf.training.latent_encoding import check_same_encoder, encode_tokens
from maetok_hf.training.model_card import write_model_card
from maetok_hf.training.optim import clip_gradients, create_ema, set_learning_rate
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run import TrainingRun
from maetok_hf.training.run_options import SiTRunOptions
from maetok_hf.training.sharding import configure_deepspeed, whole_copy
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.token_features import check_cached_features
from maetok_hf.training.validation import image_grid, write_png


MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "sit_template.md"


def load_tokenizer(options: SiTRunOptions, recipe: SiTRecipe) -> AutoencoderMAE:
    """The frozen tokenizer, refused before any work if its latents cannot be normalised."""
    tokenizer = AutoencoderMAE.from_pretrained(options.tokenizer_name_or_path)
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
    return whole_copy(tokenizer)  # which does not know from which folder it came


def open_data(recipe: SiTRecipe, options: SiTRunOptions, run: TrainingRun, tokenizer: AutoencoderMAE):
    """The training stream, of latents or of images."""
    settings = {
        "batch_size": options.micro_batch_size(recipe.total_batch_size, run.accelerator.num_processes),
        "seed": options.seed,
        "rank": run.accelerator.process_index,
        "world_size": run.accelerator.num_processes,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_workers": options.dataloader_num_workers,
        "num_streams": options.num_streams,
        "random_flip": recipe.random_flip,
        "require_labels": True,
    }
    if options.latents_name_or_path is not None:
        latents = open_latents(options.latents_name_or_path)
        check_same_encoder(tokenizer, latents.metadata)
        if latents.metadata["resolution"] != recipe.resolution:
            raise ValueError(
                f"`resolution` is {recipe.resolution}, but {latents.description} are of images of "
                f"{latents.metadata['resolution']} pixels: choose the recipe for these, or other latents."
            )
        aligned = recipe.alignment_weight > 0
        if aligned:
            place = (options.tokenizer_name_or_path, latents.description, tokenizer.config.patch_size)
            check_cached_features(latents.metadata, recipe, *place)
        statistics = {name: tokenizer.config[name] for name in ("latents_mean", "latents_std")}
        return StreamingLatents(latents, **statistics, **settings, with_features=aligned)
    images = open_images(
        options.dataset_name,
        split=options.train_split,
        name=options.dataset_config_name,
        image_column=options.image_column,
        label_column=options.label_column,
        cache_dir=options.cache_dir,
    )
    if images.columns.label is None:
        raise ValueError(f"{images.description} has no label column: name it with `label_column`.")
    return StreamingImages(images, resolution=recipe.resolution, **settings)


def same_classes(pretrained_model_name_or_path: str, id2label: dict[int, str] | None) -> dict[int, str] | None:
    """The names of the classes, of which a trained pipeline and the data set must not have different ones."""
    given = MAETokDiffusionPipeline.load_config(pretrained_model_name_or_path).get("id2label") or {}
    given = {int(index): name for index, name in given.items()}
    for index, name in (id2label or {}).items():
        known = {synonym.strip() for synonym in given.get(index, name).split(",")}
        if known.isdisjoint(synonym.strip() for synonym in name.split(",")):
            raise ValueError(
                f"class {index} is {name!r} in the data set, but {given[index]!r} in {pretrained_model_name_or_path}: "
                "fine-tune on the classes it was trained on, in their order."
            )
    return given or id2label


class GeneratorTraining:
    """One training run of a generator: what is trained, and what happens in a step."""

    def __init__(self, recipe: SiTRecipe, options: SiTRunOptions):
        self.recipe, self.options = recipe, options
        if not MODEL_CARD.is_file():
            raise ValueError(f"The model card's template {MODEL_CARD} is missing: run this script where it lies.")
        self.run = TrainingRun(recipe, options, f"generator, {recipe.architecture}", supports_deepspeed=True)
        self.accelerator, self.device = self.run.accelerator, self.run.device

        # Frozen tokenizer and data, whose order depends on the seed, not on processes, workers or restarts
        self.tokenizer = load_tokenizer(options, recipe).to(self.device)
        self.stream = open_data(recipe, options, self.run, self.tokenizer)
        self.tokenizer_digest = model_digest(self.tokenizer)  # as given
        if recipe.resolution != self.tokenizer.config.sample_size:
            self.accelerator.print(
                f"The tokenizer was built for images of {self.tokenizer.config.sample_size} pixels, those of the data "
                f"have {recipe.resolution}: make sure that it was trained at that size too."
            )
            self.tokenizer.set_sample_size(recipe.resolution)  # the size of what the pipeline generates
        self.steps_per_epoch = self.stream.micro_batches_per_epoch // options.gradient_accumulation_steps
        self.row_counts = RowCounts(self.run.sum)

        # Model, optimiser, moving average
        self.latent_shape = (self.tokenizer.latent_sequence_length, self.tokenizer.config.latent_channels)
        self.transformer = make_transformer(
            recipe,
            self.latent_shape,
            self.stream.source.num_classes,
            options.seed,
            options.pretrained_model_name_or_path,
        )
        self.given_digest, self.id2label = None, self.stream.source.id2label
        if options.pretrained_model_name_or_path is not None:
            # Without the new temperature embedding: the last bits of what is drawn may differ between processors.
            self.given_digest = model_digest(self.transformer, exclude="temperature_embed")
            self.id2label = same_classes(options.pretrained_model_name_or_path, self.id2label)
        objective = make_flow_objective(
            recipe,
            self.transformer,
            self.tokenizer.config.patch_size,
            options.seed,
            self.stream.source.feature_dim if isinstance(self.stream, StreamingLatents) else None,
        )
        self.alignment = objective.alignment
        if options.gradient_checkpointing:
            enable_gradient_checkpointing(self.transformer, options.gradient_checkpointing_share)
        if options.torch_compile:
            self.transformer.compile_repeated_blocks()
        configure_deepspeed(self.accelerator, self.stream.batch_size, recipe.max_grad_norm)
        self.model, self.optimizer = self.accelerator.prepare(objective, recipe.make_optimizer(objective))
        objective.move_frozen(self.device)
        self.parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.ema = create_ema(self.transformer, recipe.ema_decay)

    def begin(self) -> int:
        """Continue from the newest checkpoint, or begin; the number of steps done."""
        source = self.stream.source
        first_step = self.run.begin(
            {
                "data": self.stream.identity if isinstance(source, LatentSource) else data_identity(source),
                "tokenizer": self.tokenizer_digest,
                "given_transformer": self.given_digest,
                "micro_batch_size": self.stream.batch_size,
                "num_streams": self.stream.num_streams,
            },
            models={"transformer": self.transformer},
            ema={"transformer": self.ema},
            modules={} if self.alignment is None else {"alignment": self.alignment},
            optimizers=[self.optimizer],
        )
        if self.accelerator.is_main_process and "row_counts" in self.run.extra:
            self.row_counts.load(self.run.extra["row_counts"])  # those of all processes
        self.accelerator.print(
            f"{self.transformer.num_parameters() / 1e6:.1f} M parameters, {source.num_rows} images of "
            f"{self.transformer.config.num_classes} classes, {self.steps_per_epoch} steps per epoch "
            f"({self.stream.num_dropped} images left out), {self.accelerator.num_processes} processes of "
            f"{torch.get_num_threads()} threads, beginning at step {first_step}"
        )
        return first_step

    def train(self) -> None:
        """Run to the end of the recipe, from wherever an earlier run stopped."""
        recipe, options, run = self.recipe, self.options, self.run
        first_step = self.begin()
        self.stream.set_start(first_step * options.gradient_accumulation_steps)
        micro_batches = iter(self.stream.dataloader(pin_memory=self.device.type == "cuda"))
        self.model.train()
        if first_step > 0:
            self.examine(first_step, saved=False)  # what the run was stopped before
        for step in range(first_step, recipe.max_train_steps):
            learning_rate = recipe.learning_rate_at(step)
            set_learning_rate(self.optimizer, learning_rate)
            for part in range(options.gradient_accumulation_steps):
                batch = next(micro_batches)
                if "counts" in batch:
                    self.row_counts.add(batch["counts"])
                micro_batch = part * self.accelerator.num_processes + self.accelerator.process_index
                seed_global_generator(keyed_seed(options.seed, "dropout", step, micro_batch), self.device)
                with self.accelerator.accumulate(self.model):
                    self.micro_step(step, batch)
            done = step + 1
            save = run.end_step(step, {"learning_rate": learning_rate})
            if done % self.steps_per_epoch == 0:
                epoch = done // self.steps_per_epoch
                self.accelerator.print(f"Epoch {epoch} is over: {self.row_counts.report()}")
            elif run.leaving or done == recipe.max_train_steps:
                epoch = done // self.steps_per_epoch + 1
                self.accelerator.print(f"The run ends in epoch {epoch}: {self.row_counts.describe()}")
            if save:
                run.save(step, {"row_counts": self.row_counts.state()})
            if not run.stopping:
                self.examine(done, save)
            run.leave_if_asked(step)
        run.end()
        self.finish()

    def micro_step(self, step: int, batch: dict) -> None:
        """Forward and backward passes of a micro-batch, and the optimiser's step if it is the last of the step."""
        inputs = self.make_inputs(step, batch)
        with self.accelerator.autocast():
            terms = self.model(**inputs)
        self.run.backward(terms["loss"])
        self.run.monitor.add({name: term for name, term in terms.items() if name != "loss_per_image"})
        if not self.accelerator.sync_gradients:
            return
        if self.accelerator.distributed_type == "DEEPSPEED":  # has clipped them, and knows the norm
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)
        else:
            self.accelerator.unscale_gradients(self.optimizer)
            norm = clip_gradients(self.parameters, self.recipe.max_grad_norm)
        self.run.admit({"gradient_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad()

    def make_inputs(self, step: int, batch: dict) -> dict[str, torch.Tensor]:
        """A micro-batch and its draws as the objective takes them, on the device."""
        config = self.transformer.config
        if batch["class_labels"].max() >= config.num_classes:  # the first of these is the null class
            raise ValueError(
                f"The data set has the label {batch['class_labels'].max().item()}, but the model has "
                f"{config.num_classes} classes: labels go from 0 to num_classes - 1."
            )
        draws = sample_flow_draws(
            self.options.seed,
            step,
            batch["indices"],
            self.latent_shape,
            self.recipe.time_density,
            config.class_dropout_prob,
            guidance_free=self.recipe.guidance_free,
        )
        inputs = {name: draw for name, draw in draws._asdict().items() if draw is not None}
        inputs["class_labels"] = batch["class_labels"]
        if "images" in batch:
            pixel_values = to_pixel_values(batch["images"], self.device)
            with self.accelerator.autocast():
                latents = encode_tokens(self.tokenizer, pixel_values)
            inputs["latents"] = normalize_latents(latents.float(), self.tokenizer.config)
            if self.alignment is not None:
                inputs["pixel_values"] = pixel_values
        else:
            inputs |= {name: batch[name] for name in ("latents", "token_features") if name in batch}
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    def examine(self, done: int, saved: bool) -> None:
        """What is due after a step and may take long: samples and an upload."""
        every = self.options.validation_steps
        validated = every and done % every == 0 and done < self.recipe.max_train_steps
        if not validated and not (saved and self.options.push_to_hub):
            return
        average = whole_copy(self.transformer, self.ema, self.device)
        if validated:
            self.validate(average, done)
        if saved:
            self.publish(average, done)

    def make_pipeline(self, transformer: torch.nn.Module) -> MAETokDiffusionPipeline:
        """The pipeline of a trained transformer, with the paper's sampler, and the recipe's steps and guidance."""
        scheduler = FlowMatchEulerMaruyamaScheduler(path=transformer.config.path)
        return MAETokDiffusionPipeline(
            self.tokenizer,
            transformer,
            scheduler,
            id2label=self.id2label,
            default_num_inference_steps=self.recipe.num_inference_steps,
            default_guidance_scale=self.recipe.guidance_scale,
            default_guidance_interval=self.recipe.guidance_interval,
        )

    @torch.no_grad()
    def validate(self, transformer: torch.nn.Module, step: int) -> None:
        """A picture of samples, whose classes and noise are the same at every step and on any number of processes."""
        pipeline = self.make_pipeline(transformer)
        pipeline.set_progress_bar_config(disable=True)
        count, num_classes = self.options.num_validation_images, transformer.config.num_classes
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Every process has as many, so that they can be gathered: the last one may come twice.
        mine = [min(index, count - 1) for index in range(rank, -(-count // world) * world, world)]
        spread = [index * num_classes // count if count < num_classes else index % num_classes for index in mine]
        with self.accelerator.autocast():
            samples = pipeline(
                class_labels=spread,
                generator=[keyed_generator(self.options.seed, "validation", index) for index in mine],
                output_type="pt",
                **self.recipe.sampling_arguments,
            ).images
        gathered = self.accelerator.gather(samples.float()).unflatten(0, (world, len(mine)))
        if self.accelerator.is_main_process:
            picture = image_grid(gathered.transpose(0, 1).flatten(0, 1)[:count] * 2 - 1)
            write_png(self.run.output_dir / "validation" / f"step-{step}.png", picture)
            self.run.trackers.log_image("validation/samples", picture, step)

    def publish(self, transformer: torch.nn.Module, step: int) -> None:
        """Upload a pipeline, its card and the newest picture, if the run does that."""
        folder = self.run.output_dir / ".upload.partial"

        def write() -> dict[str, Path]:
            self.make_pipeline(transformer).save_pretrained(folder)
            return {".": folder} | self.write_card(transformer, step)

        self.run.publish(write, step)
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # the upload has files of its own

    def write_card(self, transformer: torch.nn.Module, step: int) -> dict[str, Path]:
        """The card and the newest picture, by their names in a Hub repository."""
        files, source = {}, self.stream.source
        dataset, split = self.options.dataset_name, self.options.train_split
        if isinstance(source, LatentSource):
            dataset, split = source.metadata["dataset"]["name"], source.metadata["split"]
        pictures = sorted(self.run.output_dir.glob("validation/step-*.png"), key=lambda path: path.stat().st_mtime)
        if pictures:
            files["samples.png"] = pictures[-1]
        files["README.md"] = write_model_card(
            self.run.output_dir,
            MODEL_CARD,
            repo_id=self.run.repo_id,
            recipe=dataclasses.asdict(self.recipe),
            step=step,
            model_config=dict(transformer.config) | {"_class_name": type(transformer).__name__},
            dataset_name=dataset,
            train_split=split,
            base_model=self.options.tokenizer_name_or_path,
            continued_from=self.options.pretrained_model_name_or_path,
            picture="samples.png" if pictures else None,
        )
        return files

    def finish(self) -> None:
        """Export a pipeline with the averaged weights, and show what it generates."""
        steps, output_dir = self.recipe.max_train_steps, self.run.output_dir
        transformer = whole_copy(self.transformer, self.ema, self.device)
        if self.accelerator.is_main_process:
            export(output_dir, self.make_pipeline(transformer).save_pretrained)
        self.validate(transformer, steps)
        row_counts = self.row_counts.of_run()
        if self.accelerator.is_main_process:
            report: dict[str, Any] = self.run.report() | {
                "num_parameters": transformer.num_parameters(),
                "row_counts": row_counts,
                "given_tokenizer": self.tokenizer_digest,
                "given_transformer": self.given_digest,
            }
            write_json(output_dir / "train_report.json", report)
            self.write_card(transformer, steps)  # also for an upload by hand
        self.publish(transformer, steps)
        self.accelerator.print(f"Saved to {output_dir}")
        self.run.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe, options = parse_arguments(parser, SiTRecipe, SiTRunOptions, Path(__file__).parent / "recipes")
    GeneratorTraining(recipe, options).train()


if __name__ == "__main__":
    main()
    end_process()
