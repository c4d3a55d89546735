"""Generate a set of images from a trained pipeline, for an evaluation or to look at.

The published protocol on ImageNet at 256 pixels (50 images of each class, 250 steps of the SDE sampler, guidance 1.9
in [0, 0.75]), by 8 processes, into the file that the evaluation suite of ADM reads:

    accelerate launch --num_processes 8 --mixed_precision no examples/generate.py \
        --pretrained_model_name_or_path outputs/sit-xl --output_dir outputs/sit-xl-50k \
        --scheduler euler-maruyama --num_inference_steps 250 --guidance_method cfg --guidance_scale 1.9 \
        --guidance_interval 0 0.75 --dtype bfloat16 --format npz

Some classes, by index or name, as PNG files, by another solver:

    accelerate launch examples/generate.py --pretrained_model_name_or_path outputs/demo/pipeline \
        --output_dir outputs/demo-samples --class_labels 7,9 --num_images 20 --scheduler heun --num_inference_steps 25

Autoguidance, by the moving average of an early checkpoint of the same training:

    accelerate launch examples/generate.py --pretrained_model_name_or_path outputs/sit-xl \
        --guidance_transformer_name_or_path outputs/sit-xl/checkpoint-1000000/transformer_ema --guidance_scale 1.5 \
        --output_dir outputs/sit-xl-autoguided

What lies in `output_dir` at the end:

- `settings.json`: the protocol, which every number measured on the set should be printed with; written before the
  first image.
- `images/000000.png`, ..., and `images/metadata.jsonl` with their classes (`load_dataset("imagefolder", ...)` reads
  both), with `--format png`.
- `samples.npz`: `arr_0`, uint8 images (N, height, width, 3), and `arr_1`, int64 classes, with `--format npz`. It is
  made from the PNG files, which are then removed unless `--format` names both.

The noise and the class of image i depend on `--seed` and i alone, for any batch size and any number of processes.
Batches are blocks of consecutive images, so the pixels are bit for bit the same for any number of processes, and
however often the run was interrupted, as long as the batch size, the kind of device, the number of threads and the
libraries are. Another batch size may change how matrix products are rounded: in float32 an image then differs by one
level in a pixel here and there (fewer than one of 20,000), but in bfloat16 a third of all pixels differ, by up to four
levels. There the batch size is one of the settings of a set, which is continued with no other.

A run that was stopped (Ctrl-C and SIGTERM end it after the batch at hand) or killed continues with the same command,
on any number of processes; a folder with a set of other settings is refused. Processes wait for each other at the
start only.
"""

import argparse
import logging
import time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list

from maetok_hf.sampling import (
    GenerateOptions,
    ImageSet,
    check_free_space,
    describe_counts,
    draw_labels,
    generate_images,
    image_shape,
    load_pipeline,
    record_settings,
    resolve_sampling,
    run_settings,
    sampling_settings,
    select_classes,
    split_into_batches,
    to_uint8,
    write_npz,
)
from maetok_hf.training.configuration import add_flags, build, given_flags
from maetok_hf.training.interruption import RunLock, StopRequest, end_process
from maetok_hf.training.progress import ProgressBar


# for processes that wait at the start while another one downloads the pipeline
START_TIMEOUT = timedelta(days=1)
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_REPORTS = 10.0


def parse_options() -> GenerateOptions:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, GenerateOptions, "what to generate, and how")
    try:
        return build(GenerateOptions, given_flags(parser.parse_args(), GenerateOptions))
    except ValueError as error:
        parser.error(str(error))


class Generation:
    """One set of images: what is asked for, what is there, and what this process has to do."""

    def __init__(self, options: GenerateOptions):
        self.options, self.output_dir = options, Path(options.output_dir)
        # Before there is a process group: each process stops for itself, so that none waits for a slower one.
        self.stop = StopRequest()
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=START_TIMEOUT)])
        self.is_main = self.accelerator.is_main_process
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"`mixed_precision` of the launcher is {self.accelerator.mixed_precision!r}, which has no effect here:"
                " launch with `--mixed_precision no`, and give the script `--dtype bfloat16`."
            )
        logging.basicConfig(format="%(message)s")
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.output_dir) if self.is_main else None
        self.images = ImageSet(self.output_dir / "images", options.num_images)
        self.npz = self.output_dir / "samples.npz"

        with self.accelerator.local_main_process_first():
            self.pipe = load_pipeline(options, self.accelerator.device)
        self.classes = select_classes(options.class_labels, self.pipe)
        self.sampling = resolve_sampling(options, self.pipe, self.classes)
        self.labels = draw_labels(options.num_images, self.classes, options.label_draw, options.seed)
        self.shape = (options.num_images, *image_shape(self.pipe))

    @property
    def needs_npz(self) -> bool:
        return "npz" in self.options.format and not self.npz.is_file()

    def prepare(self) -> list[range]:
        """On the main process: check the folder and the disk, record the settings, and find what is to be done."""
        options = self.options
        if not (self.output_dir / "settings.json").is_file() and (self.images.folder.exists() or self.npz.exists()):
            raise ValueError(
                f"`output_dir` {self.output_dir} has images but no settings.json: it is not a set of this script. "
                "Choose another folder."
            )
        self.images.remove_partial()
        missing = self.images.missing() if "png" in options.format or self.needs_npz else []
        check_free_space(self.output_dir, self.shape, len(missing), self.needs_npz)
        record_settings(
            self.output_dir,
            sampling_settings(options, self.pipe, self.classes, self.sampling),
            run_settings(options, self.accelerator.num_processes, self.accelerator.device),
        )
        print(f"{describe_counts(options.num_images, len(self.classes), options.label_draw)}.", flush=True)
        print(f"{options.num_images - len(missing)} are done, {len(missing)} are to be made.", flush=True)
        return split_into_batches(options.num_images, options.batch_size, missing)

    def run(self) -> None:
        """Make this process's share of the missing images; on the main process, also what is made of all of them."""
        # The only time that processes wait for each other: all must divide the same list.
        batches = broadcast_object_list([self.prepare() if self.is_main else None])[0]
        own = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        bar = ProgressBar(len(own), 0, "batches of this process", enabled=self.is_main)
        start = reported = time.monotonic()
        num_images = 0
        for done, batch in enumerate(own, 1):
            self.leave_if_asked()
            self.make(batch)
            bar.advance()
            num_images += len(batch)
            now = time.monotonic()
            if now - reported >= SECONDS_BETWEEN_REPORTS or done == len(own):
                bar.report(done, {"images/s": num_images / (now - start)})
                reported = now
        bar.close()
        self.leave_if_asked()
        if self.is_main:
            self.finish()
            made = sum(map(len, batches))
            seconds = time.monotonic() - start
            print(f"Saved to {self.output_dir}: {made} images in {seconds:.0f} s, {made / seconds:.3g} per second.")
            self.lock.release()

    def make(self, batch: range) -> None:
        """Generate a batch, and write what is missing of it."""
        labels = self.labels[batch.start : batch.stop].tolist()
        images = generate_images(self.pipe, batch, labels, self.options.seed, **self.sampling)
        for index, pixels in zip(batch, to_uint8(images, self.options.rounding).numpy(), strict=True):
            if not self.images.path(index).exists():
                self.images.write(index, pixels)

    def finish(self) -> None:
        """Wait for the images of all processes, and make of them what is asked for."""
        if self.needs_npz or "png" in self.options.format:
            # Not a barrier, which would end with an error if another process took longer than its timeout.
            if missing := self.images.missing():
                print(f"Waiting for {len(missing)} images of the other processes.", flush=True)
            while self.images.missing():
                self.leave_if_asked()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.needs_npz:
            print(f"Writing {self.npz}.", flush=True)
            write_npz(self.npz, self.all_images(), self.shape, self.labels.numpy())
        if "png" in self.options.format:
            self.images.write_metadata(self.labels.tolist())
        else:
            self.images.remove()

    def all_images(self):
        """The images of the whole set, as long as no signal comes."""
        for pixels in self.images.read():
            self.leave_if_asked()
            yield pixels

    def leave_if_asked(self) -> None:
        """End the process after a stop signal; what is written stays."""
        number = self.stop.agreed()
        if number:
            if self.is_main:
                print(f"Stopped by signal {number}: the same command continues.", flush=True)
            raise SystemExit(128 + number)


def main():
    Generation(parse_options()).run()


if __name__ == "__main__":
    main()
    end_process()
