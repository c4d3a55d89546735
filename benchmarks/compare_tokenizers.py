"""What mask modelling and the HOG target do to the latents, measured on the demonstration's images.

    python -m benchmarks.compare_tokenizers --max_train_steps 1500

Trains each variant of the demonstration's tokenizer with each seed by the command `accelerate launch
examples/train_maetok.py`, with equal steps, batches and learning rates, and measures on held-out digits the PSNR of
reconstructions and the accuracy of a linear probe of the latents. Training runs are kept in `--output_dir`: one that
was interrupted is resumed, and one that is measured is not run again, when the same command is given again. The table
goes to `--results_dir`, as JSON with every run and as Markdown.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
from datasets import load_dataset

import maetok_hf
from maetok_hf import AutoencoderMAE, normalize_latents
from maetok_hf.analysis import collect_latents, fit_linear_probe
from maetok_hf.data import export_mnist
from maetok_hf.training.latent_encoding import encode_tokens
from maetok_hf.training.recipes import load_recipe, recipe_to_dict
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from maetok_hf.training.validation import peak_signal_to_noise_ratio


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

# variant: what it is, its recipe, and what replaces settings of the recipe
VARIANTS = {
    "autoencoder": ("plain autoencoder", "demo-tokenizer-autoencoder", {}),
    "mask": ("masks, no target", "demo-tokenizer", {"auxiliary_targets": []}),
    "hog": ("HOG target, no masks", "demo-tokenizer", {"mask_ratio_min": 0.0, "mask_ratio_max": 0.0}),
    "mask-hog": ("masks and HOG target", "demo-tokenizer", {}),
}
DEFAULT_VARIANTS = ["autoencoder", "mask-hog"]
DATA_SEED = 0
NUM_CLASSES = 10
BATCH_SIZE = 250
PROBE_L2 = 1e-3
OTHER_PROBE_L2 = (1e-4, 1e-2)
# columns of the table: name in the JSON, heading, digits after the point
COLUMNS = (
    ("psnr_db", "PSNR (dB)", 2),
    ("probe_accuracy_percent", "linear probe (%)", 1),
    ("probe_cross_entropy", "its cross-entropy (nats)", 3),
    *((f"probe_accuracy_percent_l2_{l2:g}", f"linear probe, l2 = {l2:g} (%)", 1) for l2 in OTHER_PROBE_L2),
)

Split = tuple[torch.Tensor, torch.Tensor]


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=VARIANTS, help="What to compare.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the training runs.")
    parser.add_argument("--max_train_steps", type=int, help="Steps of every run, instead of the recipes' 3500.")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads of each run.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/compare_tokenizers"), help="Where the runs are kept."
    )
    parser.add_argument(
        "--results_dir", type=Path, default=ROOT / "benchmarks" / "results", help="Where the table is written."
    )
    args = parser.parse_args(words)
    for name, values in (("variants", args.variants), ("seeds", args.seeds)):
        if len(set(values)) < len(values):
            parser.error(f"`--{name}` names something twice: {values}.")
    for name in ("max_train_steps", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"`--{name}` must be at least 1, got {value}.")
    return args


def recipe_of(variant: str, max_train_steps: int | None) -> tuple[TokenizerRecipe, list[str]]:
    """The recipe of a variant at a budget, and the words of the command line that choose it."""
    _, name, overrides = VARIANTS[variant]
    path = EXAMPLES / "recipes" / f"{name}.yaml"
    overrides = dict(overrides)
    if max_train_steps is not None:
        overrides["max_train_steps"] = max_train_steps
        warmup = load_recipe(TokenizerRecipe, path).lr_warmup_steps
        if warmup > max_train_steps // 10:  # a cosine that is all warm-up is refused
            overrides["lr_warmup_steps"] = max_train_steps // 10
    words = ["--recipe", name]
    for setting, value in overrides.items():
        words += [f"--{setting}", *map(str, value if isinstance(value, list) else [value])]
    return load_recipe(TokenizerRecipe, path, overrides), words


def train_command(
    variant: str, seed: int, args: argparse.Namespace, script: str, data: str, output_dir: str
) -> list[str]:
    """The words after `accelerate` of one training run."""
    return [
        *("launch", "--num_processes", "1", "--num_cpu_threads_per_process", str(args.num_threads)),
        # what `accelerate config` may have set on this machine for other runs
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(script, *recipe_of(variant, args.max_train_steps)[1]),
        *("--dataset_name", data, "--output_dir", output_dir, "--seed", str(seed), "--report_to", "none"),
    ]


def load_split(folder: Path, split: str) -> Split:
    """Images in `[-1, 1]`, NCHW, and classes."""
    rows = load_dataset(str(folder), split=split)
    images = np.stack([np.asarray(row["image"].convert("RGB")) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(rows["label"])


def batches(split: Split) -> Iterator[Split]:
    return zip(*(part.split(BATCH_SIZE) for part in split), strict=True)


def probe(train: Split, held_out: Split) -> dict[str, float]:
    """Accuracy of linear probes, fitted to training features, on held-out ones."""
    measured = {}
    for l2 in (PROBE_L2, *OTHER_PROBE_L2):
        fitted = fit_linear_probe(*train, NUM_CLASSES, l2=l2)
        suffix = "" if l2 == PROBE_L2 else f"_l2_{l2:g}"
        measured[f"probe_accuracy_percent{suffix}"] = 100 * fitted.accuracy(*held_out)
        if l2 == PROBE_L2:
            measured["probe_cross_entropy"] = fitted.cross_entropy(*held_out)
            measured["probe_accuracy_percent_of_training"] = 100 * fitted.accuracy(*train)
    return measured


@torch.no_grad()
def measure(tokenizer: AutoencoderMAE, train: Split, held_out: Split) -> dict[str, float]:
    """What is compared: everything on held-out images, without masks."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        return normalize_latents(encode_tokens(tokenizer, images.to(tokenizer.device)), tokenizer.config)

    psnr = [
        peak_signal_to_noise_ratio(tokenizer(images.to(tokenizer.device)).sample, images)
        for images, _ in batches(held_out)
    ]
    latents = [collect_latents(batches(split), encode) for split in (train, held_out)]
    return {"psnr_db": torch.cat(psnr).mean().item(), **probe(*latents)}


def pixel_accuracy_percent(train: Split, held_out: Split) -> float:
    """The same probe of the pixels of one of the three equal channels."""
    fitted = fit_linear_probe(train[0][:, 0], train[1], NUM_CLASSES, l2=PROBE_L2)
    return 100 * fitted.accuracy(held_out[0][:, 0], held_out[1])


def measured_run(variant: str, seed: int, args: argparse.Namespace, data: Path, splits: tuple[Split, Split]) -> dict:
    """Train and measure one tokenizer, unless that has been done."""
    folder = args.output_dir / f"{variant}-seed{seed}"
    settings = {
        "recipe": recipe_to_dict(recipe_of(variant, args.max_train_steps)[0]),
        "seed": seed,
        "probe_l2": [PROBE_L2, *OTHER_PROBE_L2],
    }
    file = folder / "measurements.json"
    if not file.is_file():
        if not (folder / "train_report.json").is_file():
            script = str(EXAMPLES / "train_maetok.py")
            words = train_command(variant, seed, args, script, str(data), str(folder))
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words]
            print(f"\n=== {variant}, seed {seed}\n{shlex.join(command)}\n", flush=True)
            status = subprocess.run(command).returncode
            if status != 0:
                sys.exit(f"Training ended with status {status}; give the same command again to go on.")
        report = json.loads((folder / "train_report.json").read_text(encoding="utf-8"))
        trained = {"recipe": report["recipe"], "seed": report["options"]["seed"]}
        if trained != {name: settings[name] for name in trained}:
            sys.exit(f"{folder} was trained with other settings: remove it, or choose another --output_dir.")
        tokenizer = AutoencoderMAE.from_pretrained(folder).to(report["device"])
        values = measure(tokenizer, *splits)
        values |= {"training_seconds": report["training_seconds"], "num_parameters": report["num_parameters"]}
        device = "CPU" if report["device"] == "cpu" else torch.cuda.get_device_name(report["device"])
        write_json(file, {"settings": settings, "device": device, "measured": values})
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        sys.exit(f"{folder} was measured with other settings: remove it, or choose another --output_dir.")
    print(f"{variant}, seed {seed}: {', '.join(f'{k} {v:.4g}' for k, v in result['measured'].items())}", flush=True)
    return {"variant": variant, "seed": seed, "device": result["device"], **result["measured"]}


def summarise(runs: list[dict]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Mean and sample standard deviation (None for one seed) of each measurement of each variant."""
    summary = {}
    for variant in dict.fromkeys(run["variant"] for run in runs):
        summary[variant] = {}
        for name, _, _ in COLUMNS:
            values = [run[name] for run in runs if run["variant"] == variant]
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary[variant][name] = {"mean": statistics.fmean(values), "std": spread}
    return summary


def device_line(args: argparse.Namespace, runs: list[dict]) -> str:
    """What it ran on, without names of machines or places."""
    devices = sorted({run["device"] for run in runs})
    return (
        f"{' and '.join(devices)}; {os.cpu_count()} CPU cores ({platform.machine()}), {args.num_threads} "
        "threads for each run"
    )


def report_of(args: argparse.Namespace, runs: list[dict], pixel_accuracy: float) -> dict:
    """Everything about the comparison, in plain types."""
    command = ["python", "-m", "benchmarks.compare_tokenizers", "--variants", *args.variants]
    command += ["--seeds", *map(str, args.seeds), "--num_threads", str(args.num_threads)]
    if args.max_train_steps is not None:
        command += ["--max_train_steps", str(args.max_train_steps)]
    recipe = recipe_of(args.variants[0], args.max_train_steps)[0]
    training = {
        variant: shlex.join(
            ["accelerate", *train_command(variant, 0, args, "examples/train_maetok.py", "data", f"{variant}-seed0")]
        )
        for variant in args.variants
    }
    return {
        "command": shlex.join(command),
        "training_commands": training,
        "protocol": {
            "data": f"export_mnist(seed={DATA_SEED}): 4500 training and 500 held-out digits, 32 x 32",
            "budget": f"{recipe.max_train_steps} steps of {recipe.total_batch_size} images, peak learning rate "
            f"{recipe.peak_learning_rate:g}, {recipe.lr_scheduler} with {recipe.lr_warmup_steps} warm-up steps",
            "weights": f"moving average of decay {recipe.ema_decay:g}",
            "psnr": "mean over the held-out images of 10 log10(4 / MSE), no mask, reconstruction clamped to [-1, 1]",
            "linear_probe": "multinomial logistic regression to convergence on the flattened, normalised latents of "
            "the training images, each feature standardised; cross-entropy + l2 / 2 |W|^2, where l2 = "
            f"{PROBE_L2:g} was chosen beforehand; accuracy on the held-out latents",
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "maetok_hf": maetok_hf.__version__,
        },
        "device": device_line(args, runs),
        "training_seconds": sum(run["training_seconds"] for run in runs),
        "summary": summarise(runs),
        "runs": runs,
        "probe_accuracy_percent_of_the_pixels": pixel_accuracy,
    }


def to_markdown(report: dict) -> str:
    """The report as tables."""

    def table(head: list[str], rows: list[list[str]]) -> list[str]:
        lines = [head, ["---"] * len(head), *rows]
        return [*("| " + " | ".join(line) + " |" for line in lines), ""]

    def with_spread(value: dict[str, float], digits: int) -> str:
        spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{spread}"

    headings = [heading for _, heading, _ in COLUMNS]
    means = [
        [
            VARIANTS[variant][0],
            *(with_spread(values[name], digits) for name, _, digits in COLUMNS),
        ]
        for variant, values in report["summary"].items()
    ]
    single = [
        [VARIANTS[run["variant"]][0], str(run["seed"]), *(f"{run[name]:.{digits}f}" for name, _, digits in COLUMNS)]
        for run in report["runs"]
    ]
    pixels = report["probe_accuracy_percent_of_the_pixels"]
    num_seeds = len({run["seed"] for run in report["runs"]})
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            "# Tokenizers of the demonstration's images, compared",
            "",
            f"Mean ± sample standard deviation over {num_seeds} seeds.",
            "",
            *table(["tokenizer", *headings], means),
            f"For comparison, the same probe of the pixels themselves: {pixels:.1f} %. One held-out digit is 0.2 %.",
            "",
            "## Every run",
            "",
            *table(["tokenizer", "seed", *headings], single),
            "## Protocol",
            "",
            *(f"- {name.replace('_', ' ')}: {text}" for name, text in report["protocol"].items()),
            f"- device: {report['device']}; {report['training_seconds'] / 60:.0f} minutes for all training",
            f"- versions: {versions}",
            "",
            "```",
            report["command"],
            "```",
            "",
            "which runs, for each seed,",
            "",
            "```",
            *report["training_commands"].values(),
            "```",
            "",
        ]
    )


def write_text(path: Path, text: str) -> None:
    """Write a file that appears when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    for folder in (args.output_dir, args.results_dir):
        folder.mkdir(parents=True, exist_ok=True)
    data = export_mnist(args.output_dir / "data", seed=DATA_SEED)
    splits = load_split(data, "train"), load_split(data, "test")
    # seeds outside: if it is interrupted, what there is can be compared
    runs = [measured_run(variant, seed, args, data, splits) for seed in args.seeds for variant in args.variants]
    runs.sort(key=lambda run: (args.variants.index(run["variant"]), args.seeds.index(run["seed"])))
    report = report_of(args, runs, pixel_accuracy_percent(*splits))
    write_json(args.results_dir / "compare_tokenizers.json", report)
    write_text(args.results_dir / "compare_tokenizers.md", to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
