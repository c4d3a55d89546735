"""Fine-tune a generator on a small folder of images by a LoRA adapter: classes it knows, new classes, or both.

The images lie in one folder per class, `birds/robin/1.jpg` and so on. A folder with a name of the pipeline's
`id2label` trains that class further; any other becomes a new class of that name:

    accelerate launch examples/train_sit_lora.py --recipe sit-lora --pretrained_model_name_or_path outputs/sit-xl \
        --dataset_name birds --output_dir outputs/birds-lora --rank 16 --mixed_precision bf16 --validation_steps 250

A run that was stopped (Ctrl-C and SIGTERM save a checkpoint first) or killed continues with the same command, exactly.
The result in `output_dir` is the moving average of the adapter, `pytorch_lora_weights.safetensors` and
`lora_info.json`:

    pipe = MAETokDiffusionPipeline.from_pretrained("outputs/sit-xl")
    name = load_lora_into(pipe, "outputs/birds-lora")  # from maetok_hf.pipelines.lora
    pipe.transformer.set_adapters(name, 0.8)
    image = pipe("robin").images[0]

Beside it lie the checkpoints, `training_log.jsonl` (losses), `validation/` (samples), `logs/` (TensorBoard's) and
`train_report.json` (classes, timings, final loss). The `adapter_ema` of a checkpoint is an adapter like the result: an
early one may be the better one of a small folder.
"""

import argparse
import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from maetok_hf.data import ImageSource, RowCounts, StreamingImages, open_images, to_pixel_values
from maetok_hf.models.latents import check_latent_statistics, normalize_latents
from maetok_hf.models.lora import LoraInfo
from maetok_hf.pipelines import MAETokDiffusionPipeline
from maetok_hf.pipelines.lora import ClassMatch, add_named_classes, match_classes
from maetok_hf.seeding import keyed_generator, keyed_seed
from maetok_hf.training.checkpointing import data_identity, export, model_digest, write_json
from maetok_hf.training.draws import seed_global_generator
from maetok_hf.training.flow_matching import FlowMatchingObjective, sample_flow_draws
from maetok_hf.training.generator_parts import check_samples
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.interruption import end_process
from maetok_hf.training.latent_encoding import encode_tokens
from maetok_hf.training.lora import LoraAdapter, add_lora
from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions
from maetok_hf.training.model_card import write_model_card
from maetok_hf.training.optim import clip_gradients, create_ema, set_learning_rate
from maetok_hf.training.recipes import parse_arguments
from maetok_hf.training.run import TrainingRun
from maetok_hf.training.sharding import whole_copy
from maetok_hf.training.validation import image_grid, write_png


MODEL_CARD = Path(__file__).resolve().parents[1] / "model_cards" / "lora_template.md"


def load_pipeline(options: LoraRunOptions, recipe: LoraRecipe) -> MAETokDiffusionPipeline:
    """The pipeline to fine-tune, in float32; a guidance transformer would not be used."""
    pipeline = MAETokDiffusionPipeline.from_pretrained(
        options.pretrained_model_name_or_path, guidance_transformer=None
    ).to(torch.float32)
    check_latent_statistics(pipeline.vae.config)
    if recipe.resolution != pipeline.vae.config.sample_size:
        raise ValueError(
            f"`resolution` is {recipe.resolution}, but {options.pretrained_model_name_or_path} generates images of "
            f"{pipeline.vae.config.sample_size} pixels: give `--resolution {pipeline.vae.config.sample_size}`."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_data(options: LoraRunOptions) -> ImageSource:
    """The images, which must have a class each."""
    images = open_images(
        options.dataset_name,
        split=options.train_split,
        name=options.dataset_config_name,
        image_column=options.image_column,
        label_column=options.label_column,
        cache_dir=options.cache_dir,
    )
    if images.columns.label is None:
        raise ValueError(
            f"{images.description} has no label column: put the images into one folder per class, or name the column "
            "with `label_column`."
        )
    return images


def describe_classes(match: ClassMatch, names: list[str]) -> str:
    """Which classes of the data set the pipeline knows, a line for each."""
    lines = []
    for name, label in zip(map(str.strip, names), match.labels, strict=True):
        kind = "new class" if name in match.new_names else "known class"
        hint = f" (the pipeline has {match.similar[name]!r}: is it misspelt?)" if name in match.similar else ""
        lines.append(f"  {name!r}: {kind} {label}{hint}")
    return "\n".join(["Classes of the images:", *lines])


class LoraTraining:
    """One training run of an adapter: what is trained, and what happens in a step."""

    def __init__(self, recipe: LoraRecipe, options: LoraRunOptions):
        self.recipe, self.options = recipe, options
        if not MODEL_CARD.is_file():
            raise ValueError(f"The model card's template {MODEL_CARD} is missing: run this script where it lies.")
        self.run = TrainingRun(recipe, options, "LoRA adapter", supports_deepspeed=True)
        self.accelerator, self.device = self.run.accelerator, self.run.device
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError(
                f"`distributed_type` of the launcher is {self.accelerator.distributed_type.value}, but an adapter "
                "has too few parameters for that: launch with `--config_file examples/accelerate_configs/ddp.yaml`."
            )

        # Frozen pipeline and data, whose order depends on the seed, not on processes, workers or restarts
        self.pipeline = load_pipeline(options, recipe)
        self.tokenizer, self.transformer = self.pipeline.vae.requires_grad_(False).eval(), self.pipeline.transformer
        check_samples(recipe, self.transformer)
        self.given_digests = {name: model_digest(self.pipeline.components[name]) for name in ("vae", "transformer")}
        source = open_data(options)
        self.stream = StreamingImages(
            source,
            resolution=recipe.resolution,
            batch_size=options.micro_batch_size(recipe.total_batch_size, self.accelerator.num_processes),
            seed=options.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            num_workers=options.dataloader_num_workers,
            num_streams=options.num_streams,
            random_flip=recipe.random_flip,
            require_labels=True,
        )
        self.steps_per_epoch = self.stream.micro_batches_per_epoch // options.gradient_accumulation_steps
        self.row_counts = RowCounts(self.run.sum)

        # Classes of the images in the model, which may get new ones
        class_names, num_classes = source.columns.class_names, self.transformer.config.num_classes
        match = match_classes(class_names, self.pipeline.id2label, num_classes)
        self.accelerator.print(describe_classes(match, class_names))
        self.new_names, self.class_of = match.new_names, torch.tensor(match.labels)
        add_named_classes(self.pipeline, match.new_names)

        # Adapter, optimiser, moving average
        add_lora(self.transformer, recipe, bool(match.new_names), options.seed)
        objective = FlowMatchingObjective(
            self.transformer,
            density=recipe.time_density,
            time_shift=recipe.time_shift,
            direction_weight=recipe.direction_weight,
            guidance_free=self.transformer.config.temperature_embedding,
        )
        if options.gradient_checkpointing:
            enable_gradient_checkpointing(self.transformer, options.gradient_checkpointing_share)
        if options.torch_compile:
            self.transformer.compile_repeated_blocks()
        self.pipeline.to(self.device)
        self.model, self.optimizer = self.accelerator.prepare(objective, recipe.make_optimizer(objective))
        base = options.pretrained_model_name_or_path
        info = {
            "base_model": Path(base).resolve().name if Path(base).exists() else base,  # no paths of this machine
            "transformer": LoraInfo.sizes_of(self.transformer),
            "num_base_classes": num_classes,
            "id2label": {str(index): name for index, name in self.pipeline.id2label.items()},
            "trained_classes": sorted(set(match.labels)),
        }
        self.adapter = LoraAdapter.of(self.transformer, info)
        self.parameters = list(self.adapter.parameters())
        self.ema = create_ema(self.adapter, recipe.ema_decay)

    def begin(self) -> int:
        """Continue from the newest checkpoint, or begin; the number of steps done."""
        source = self.stream.source
        first_step = self.run.begin(
            {
                "data": data_identity(source),
                "pipeline": self.given_digests,
                "classes": self.class_of.tolist(),
                "micro_batch_size": self.stream.batch_size,
                "num_streams": self.stream.num_streams,
            },
            models={"adapter": self.adapter},
            ema={"adapter": self.ema},
            modules={},
            optimizers=[self.optimizer],
        )
        if self.accelerator.is_main_process and "row_counts" in self.run.extra:
            self.row_counts.load(self.run.extra["row_counts"])  # those of all processes
        self.accelerator.print(
            f"{self.adapter.num_parameters() / 1e6:.2f} of {self.transformer.num_parameters() / 1e6:.1f} M parameters "
            f"are trained, {source.num_rows} images, {self.steps_per_epoch} steps per epoch "
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
        for step in range(first_step, recipe.max_train_steps):
            learning_rate = recipe.learning_rate_at(step)
            set_learning_rate(self.optimizer, learning_rate)
            for part in range(options.gradient_accumulation_steps):
                batch = next(micro_batches)
                self.row_counts.add(batch["counts"])
                micro_batch = part * self.accelerator.num_processes + self.accelerator.process_index
                seed_global_generator(keyed_seed(options.seed, "dropout", step, micro_batch), self.device)
                with self.accelerator.accumulate(self.model):
                    self.micro_step(step, batch)
            done = step + 1
            save = run.end_step(step, {"learning_rate": learning_rate})
            if done % self.steps_per_epoch == 0:
                report = self.row_counts.report()
                if done == self.steps_per_epoch:  # those of a small folder are many and alike
                    self.accelerator.print(f"Epoch 1 is over: {report}")
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
        self.accelerator.unscale_gradients(self.optimizer)
        self.run.admit({"gradient_norm": clip_gradients(self.parameters, self.recipe.max_grad_norm)})
        self.optimizer.step()
        self.optimizer.zero_grad()

    def make_inputs(self, step: int, batch: dict) -> dict[str, torch.Tensor]:
        """A micro-batch and its draws as the objective takes them, on the device."""
        config = self.transformer.config
        draws = sample_flow_draws(
            self.options.seed,
            step,
            batch["indices"],
            (config.sample_size, config.in_channels),
            self.recipe.time_density,
            config.class_dropout_prob,
            guidance_free=config.temperature_embedding,
        )
        inputs = {name: draw for name, draw in draws._asdict().items() if draw is not None}
        inputs["class_labels"] = self.class_of[batch["class_labels"]]
        with self.accelerator.autocast():
            latents = encode_tokens(self.tokenizer, to_pixel_values(batch["images"], self.device))
        inputs["latents"] = normalize_latents(latents.float(), self.tokenizer.config)
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}

    def examine(self, done: int, saved: bool) -> None:
        """What is due after a step and may take long: samples and an upload."""
        every = self.options.validation_steps
        if every and done % every == 0 and done < self.recipe.max_train_steps:
            self.validate(done)
        if saved:
            self.publish(done)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The transformer has the moving average of the adapter."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """A picture of samples, whose classes and noise are the same at every step and on any number of processes."""
        count, trained = self.options.num_validation_images, sorted(set(self.class_of.tolist()))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        # Every process has as many, so that they can be gathered: the last one may come twice.
        mine = [min(index, count - 1) for index in range(rank, -(-count // world) * world, world)]
        with self.averaged(), self.accelerator.autocast():
            samples = self.pipeline(
                class_labels=[trained[index % len(trained)] for index in mine],
                generator=[keyed_generator(self.options.seed, "validation", index) for index in mine],
                output_type="pt",
                **self.recipe.sampling_arguments,
            ).images
        gathered = self.accelerator.gather(samples.float()).unflatten(0, (world, len(mine)))
        if self.accelerator.is_main_process:
            picture = image_grid(gathered.transpose(0, 1).flatten(0, 1)[:count] * 2 - 1)
            write_png(self.run.output_dir / "validation" / f"step-{step}.png", picture)
            self.run.trackers.log_image("validation/samples", picture, step)

    def publish(self, step: int) -> None:
        """Upload the adapter, its card and the newest picture, if the run does that."""
        folder = self.run.output_dir / ".upload.partial"

        def write() -> dict[str, Path]:
            whole_copy(self.adapter, self.ema).save_pretrained(folder)
            return {".": folder} | self.write_card(step)

        self.run.publish(write, step)
        if self.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # the upload has files of its own

    def write_card(self, step: int) -> dict[str, Path]:
        """The card and the newest picture, by their names in a Hub repository."""
        files = {}
        pictures = sorted(self.run.output_dir.glob("validation/step-*.png"), key=lambda path: path.stat().st_mtime)
        if pictures:
            files["samples.png"] = pictures[-1]
        trained = {index: self.pipeline.id2label[index] for index in sorted(set(self.class_of.tolist()))}
        files["README.md"] = write_model_card(
            self.run.output_dir,
            MODEL_CARD,
            repo_id=self.run.repo_id,
            recipe=dataclasses.asdict(self.recipe),
            step=step,
            model_config=self.transformer.config | {"new_names": self.new_names, "trained": trained},
            dataset_name=self.options.dataset_name,
            train_split=self.options.train_split,
            base_model=self.options.pretrained_model_name_or_path,
            picture="samples.png" if pictures else None,
        )
        return files

    def finish(self) -> None:
        """Export the averaged adapter, and show what the pipeline generates with it."""
        steps, output_dir = self.recipe.max_train_steps, self.run.output_dir
        if self.accelerator.is_main_process:
            export(output_dir, whole_copy(self.adapter, self.ema).save_pretrained)
        self.validate(steps)
        row_counts = self.row_counts.of_run()
        if self.accelerator.is_main_process:
            report = self.run.report() | {
                "num_parameters": self.adapter.num_parameters(),
                "row_counts": row_counts,
                "given_pipeline": self.given_digests,
                "new_classes": self.new_names,
                "trained_classes": sorted(set(self.class_of.tolist())),
            }
            write_json(output_dir / "train_report.json", report)
            self.write_card(steps)  # also for an upload by hand
        self.publish(steps)
        self.accelerator.print(f"Saved to {output_dir}")
        self.run.close()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    recipe, options = parse_arguments(parser, LoraRecipe, LoraRunOptions, Path(__file__).parent / "recipes")
    LoraTraining(recipe, options).train()


if __name__ == "__main__":
    main()
    end_process()
