"""SiT, LightningDiT and USiT on the demonstration's latents, guided in every way that the pipeline knows.

    python -m benchmarks.study_generators

Takes the demonstration's tokenizer (trained here by the demonstration's commands if `--demo_dir` has none), caches its
latents once, and trains on them, by the commands that also train on ImageNet, the three architectures and a
guidance-free fine-tuning (GFT) of the trained SiT. Each is sampled as the demonstration is, with its seeds, its solver
and its number of samples, and measured by its recognition and diversity. The weak model of autoguidance is the moving
average after a quarter of the same training.

Trainings are kept in `--output_dir`: one that was interrupted continues, and one that is finished is not run again,
nor is a set that is measured, when the same command is given again. The tables go to `--results_dir`. The exit status
is not zero if a model misses the demonstration's bars with classifier-free guidance, or SiT after GFT misses them in
one pass per step.
"""

import argparse
import importlib.util
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from maetok_hf import MAETokDiffusionPipeline
from maetok_hf.data import export_mnist
from maetok_hf.training.checkpointing import model_digest, write_json
from maetok_hf.training.interruption import RunLock
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results


def load_demo() -> ModuleType:
    """The demonstration as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()

COMMAND = "python -m benchmarks.study_generators"
DEMO_DIR, OUTPUT_DIR = Path("outputs/demo"), Path("outputs/study-generators")
SEED = 0
NUM_CLASSES = 10
# Complete checkpoints that are kept: the one after a quarter of the training, and those of stopped runs.
CHECKPOINTS_LIMIT = 20


@dataclass(frozen=True)
class Model:
    """
    A generator of the study.

    Args:
        title (`str`): Its name in the tables.
        recipe (`str`): Its recipe.
        base (`str`, *optional*): The model whose fine-tuning it is.
    """

    title: str
    recipe: str
    base: str | None = None


# in the order of training
MODELS = {
    "sit": Model("SiT", "demo-sit"),
    "sit-gft": Model("SiT, GFT", "demo-sit-gft", base="sit"),
    "lightningdit": Model("LightningDiT", "demo-lightningdit"),
    "usit": Model("USiT", "demo-usit"),
}


@dataclass(frozen=True)
class Row:
    """
    A way to sample a model.

    Args:
        model (`str`): Name among `MODELS`.
        guidance (`str`): Name of the guidance, for files and tables.
        arguments (`dict`): What replaces arguments of the demonstration's call of the pipeline.
        must_pass (`bool`): Whether the study fails if it misses the bars.
    """

    model: str
    guidance: str
    arguments: dict[str, Any]
    must_pass: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.guidance}"

    @property
    def needs_weak_model(self) -> bool:
        return self.arguments["guidance_method"] == "autoguidance"

    @property
    def is_guidance_free(self) -> bool:
        return self.arguments["guidance_method"] == "gft"

    @property
    def title(self) -> str:
        """The guidance in words."""
        arguments = {"guidance_scale": demo.GUIDANCE_SCALE} | self.arguments
        if self.is_guidance_free:
            return f"trained, temperature {arguments['guidance_temperature']:.3g}"
        if arguments["guidance_scale"] == 1:
            return "none"
        method = "classifier-free" if arguments["guidance_method"] == "cfg" else arguments["guidance_method"]
        return f"{method}, scale {arguments['guidance_scale']:g}"


def make_rows() -> list[Row]:
    """The study's rows, in the order of its models."""
    rows = []
    for name, model in MODELS.items():
        if model.base is not None:
            gft = {"guidance_method": "gft", "guidance_scale": None}
            guided = gft | {"guidance_temperature": 1 / demo.GUIDANCE_SCALE}
            rows.append(Row(name, "temperature-1", gft | {"guidance_temperature": 1.0}))
            rows.append(Row(name, "temperature-low", guided, must_pass=True))
        else:
            rows.append(Row(name, "none", {"guidance_method": "cfg", "guidance_scale": 1.0}))
            rows.append(Row(name, "cfg", {"guidance_method": "cfg"}, must_pass=True))
            rows.append(Row(name, "autoguidance", {"guidance_method": "autoguidance"}))
    return rows


ROWS = make_rows()


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="Where trainings and samples are kept.")
    parser.add_argument("--demo_dir", type=Path, default=DEMO_DIR, help="Folder of the demonstration.")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads of training and sampling.")
    parser.add_argument(
        "--samples_per_class", type=int, default=demo.SAMPLES_PER_CLASS, help="Digits sampled of each class and row."
    )
    parser.add_argument(
        "--max_train_steps",
        type=int,
        help="Cut every training short, also of the tokenizer, to try out the machinery; the bars then do not apply.",
    )
    args = parser.parse_args(words)
    # two samples of a class are the fewest that have a distance
    for name, minimum in (("num_threads", 1), ("samples_per_class", 2), ("max_train_steps", 1)):
        value = getattr(args, name)
        if value is not None and value < minimum:
            parser.error(f"`--{name}` must be at least {minimum}, got {value}.")
    if args.max_train_steps is not None and args.results_dir == RESULTS:
        parser.error("`--max_train_steps` needs another `--results_dir` than that of the full study.")
    return args


def recipe_of(model: Model, max_train_steps: int | None) -> SiTRecipe:
    """The recipe of a model, as the demonstration cuts it."""
    overrides = {} if max_train_steps is None else {"max_train_steps": max_train_steps, "lr_warmup_steps": 0}
    return load_recipe(SiTRecipe, ROOT / "examples" / "recipes" / f"{model.recipe}.yaml", overrides)


def weak_step(model: Model, max_train_steps: int | None) -> int:
    """Steps after which the moving average is the weak model of autoguidance: a quarter of the training."""
    return max(1, recipe_of(model, max_train_steps).max_train_steps // 4)


def cache_flags(demo_dir: Path) -> list[str]:
    """Flags of `cache_latents.py` besides its folder."""
    return [
        *("--tokenizer_name_or_path", str(demo_dir / "tokenizer-finetuned"), "--dataset_name", str(demo_dir / "data")),
        *("--resolution", "32", "--random_flip", "false"),
    ]


def train_flags(model: Model, demo_dir: Path, output_dir: Path, max_train_steps: int | None) -> list[str]:
    """Flags of `train_sit.py` besides its folder, recipe and seed."""
    flags = ["--tokenizer_name_or_path", str(demo_dir / "tokenizer-finetuned")]
    flags += ["--latents_name_or_path", str(output_dir / "latents"), "--report_to", "none"]
    flags += ["--checkpointing_steps", str(weak_step(model, max_train_steps))]
    flags += ["--checkpoints_total_limit", str(CHECKPOINTS_LIMIT)]
    if model.base is not None:
        flags += ["--pretrained_model_name_or_path", str(output_dir / model.base)]
    return flags


def stage_settings(args: argparse.Namespace) -> argparse.Namespace:
    """What the demonstration's functions read of its own arguments."""
    return argparse.Namespace(
        output_dir=args.demo_dir, num_threads=args.num_threads, seed=SEED, max_train_steps=args.max_train_steps
    )


def train_tokenizer(args: argparse.Namespace) -> float:
    """Train the demonstration's tokenizer as the demonstration does, unless that is done; the seconds it took."""
    args.demo_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(args.demo_dir, patience=300.0)  # for a demonstration that is just ending
    settings = stage_settings(args)
    tokenizer, finetuned = args.demo_dir / "tokenizer", args.demo_dir / "tokenizer-finetuned"
    images = ("--dataset_name", str(export_mnist(args.demo_dir / "data", seed=SEED)), "--validation_split", "test")
    start = ("--pretrained_model_name_or_path", str(tokenizer))
    reports = [
        demo.train("train_maetok.py", TokenizerRecipe, "demo-tokenizer", tokenizer, settings, *images),
        demo.train(
            *("train_maetok.py", TokenizerRecipe, "demo-decoder", finetuned, settings, *images, *start),
            tokenizer=tokenizer,
        ),
    ]
    lock.release()
    return sum(report["training_seconds"] for report in reports)


def train_generator(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a model, unless that is done; what the tables say of its training."""
    model, folder = MODELS[name], args.output_dir / name
    report = demo.train(
        *("train_sit.py", SiTRecipe, model.recipe, folder, stage_settings(args)),
        *train_flags(model, args.demo_dir, args.output_dir, args.max_train_steps),
        tokenizer=args.demo_dir / "tokenizer-finetuned",
    )
    if model.base is not None:
        check_base(model, folder, report, args)
    return {
        "title": model.title,
        "recipe": model.recipe,
        "base": model.base,
        "num_parameters": report["num_parameters"],
        "num_steps": report["recipe"]["max_train_steps"],
        "training_seconds": report["training_seconds"],
        "weak_step": None if model.base else weak_step(model, args.max_train_steps),
    }


def check_base(model: Model, folder: Path, report: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse a fine-tuned model whose base has been trained again since."""
    base = args.output_dir / model.base
    given = MAETokDiffusionPipeline.from_pretrained(base).transformer
    if report["given_transformer"] != model_digest(given, exclude="temperature_embed"):
        sys.exit(f"{folder} was fine-tuned from another model than the one in {base}: remove it.")


def load_pipeline(row: Row, args: argparse.Namespace) -> MAETokDiffusionPipeline:
    """The pipeline of a row's model, with the weak model if the row needs it."""
    folder = args.output_dir / row.model
    pipe = MAETokDiffusionPipeline.from_pretrained(folder)
    if row.needs_weak_model:
        checkpoint = folder / f"checkpoint-{weak_step(MODELS[row.model], args.max_train_steps)}"
        if not checkpoint.is_dir():
            sys.exit(f"{checkpoint}, the weak model of autoguidance, is missing: remove {folder} to train it again.")
        pipe.guidance_transformer = type(pipe.transformer).from_pretrained(checkpoint / "transformer_ema")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def sample(
    pipe: MAETokDiffusionPipeline, arguments: dict[str, Any], num_images: int
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """
    The demonstration's samples, with other guidance.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        arguments (`dict`): What replaces arguments of the demonstration's call.
        num_images (`int`): Images, of all classes in turn.

    Returns:
        `tuple`: Images (uint8 NHWC), labels, and `sampling_seconds` and `passes_per_step`: how many images went
        through any of the networks, in whichever batch, by images and solver steps.
    """
    counted = 0

    def count(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal counted
        counted += len(inputs[0])

    def call(**asked: Any) -> Any:
        return pipe(**(asked | arguments))

    networks = [network for network in (pipe.transformer, pipe.guidance_transformer) if network is not None]
    hooks = [network.register_forward_hook(count) for network in networks]
    start = time.perf_counter()
    images, labels = demo.generate(call, num_images, pipe.transformer.config.num_classes)
    seconds = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    passes = counted / (num_images * pipe.num_timesteps)
    return images, labels, {"sampling_seconds": seconds, "passes_per_step": passes}


class Digits:
    """
    The real digits that samples are compared with.

    Args:
        args (`argparse.Namespace`): The study's arguments; the demonstration's folder must have data and a tokenizer.
        pipe ([`MAETokDiffusionPipeline`]): A pipeline with this tokenizer.
    """

    def __init__(self, args: argparse.Namespace, pipe: MAETokDiffusionPipeline):
        settings = stage_settings(args)
        self.train = demo.load_split(settings, "train")
        self.test = demo.load_split(settings, "test")
        reconstructions, _ = demo.reconstruct(pipe, self.test[0])
        self.distance = demo.within_class_distance(reconstructions, self.test[1])

    def recognition(self, images: np.ndarray, labels: np.ndarray) -> float:
        return demo.recognition(*self.train, images, labels)

    def measure(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Recognition and diversity of samples, as the demonstration defines them."""
        return {
            "recognition": self.recognition(images, labels),
            "diversity": demo.within_class_distance(images, labels) / self.distance,
        }


def measured_row(row: Row, args: argparse.Namespace, digits: Digits) -> dict[str, Any]:
    """Sample and measure a row, unless that has been done with the same models and settings."""
    pipe = load_pipeline(row, args)
    networks = {"vae": pipe.vae, "transformer": pipe.transformer, "guidance_transformer": pipe.guidance_transformer}
    settings = {
        "arguments": row.arguments,
        "guidance_scale": demo.GUIDANCE_SCALE,
        "guidance_interval": list(demo.GUIDANCE_INTERVAL),
        "num_inference_steps": demo.NUM_INFERENCE_STEPS,
        "samples_per_class": args.samples_per_class,
        "num_threads": args.num_threads,
        "device": pipe.device.type,
        "digests": {name: model_digest(network) for name, network in networks.items() if network is not None},
    }
    folder = args.output_dir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.name}.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if record.get("settings") != settings:
        print(f"{row.name}: sampling", flush=True)
        images, labels, found = sample(pipe, row.arguments, args.samples_per_class * NUM_CLASSES)
        demo.write_atomically(folder / f"{row.name}.npz", lambda path: np.savez_compressed(path, images, labels))
        record = {"settings": settings, "measured": found | digits.measure(images, labels)}
        write_json(file, record)
    measured = record["measured"]
    print(f"{row.name}: {', '.join(f'{name} {value:.4g}' for name, value in measured.items())}", flush=True)
    return {
        "model": row.model,
        "guidance": row.guidance,
        "title": row.title,
        "arguments": row.arguments,
        "must_pass": row.must_pass,
        **measured,
        "passes": passes_bars(measured, row.is_guidance_free),
    }


def passes_bars(measured: dict[str, float], one_pass: bool) -> bool:
    """Whether a row reaches the demonstration's bars, and with `one_pass` whether it did so in one pass per step."""
    enough = measured["recognition"] >= demo.MIN_RECOGNITION and measured["diversity"] >= demo.MIN_DIVERSITY
    return enough and (measured["passes_per_step"] == 1 or not one_pass)


def missed_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that must reach the bars and do not."""
    return [f"{row['model']} ({row['title']})" for row in rows if row["must_pass"] and not row["passes"]]


def training_commands(args: argparse.Namespace) -> dict[str, str]:
    """The commands of the study after the tokenizer's, with its usual folders."""
    words = {"latents": ["examples/cache_latents.py", *cache_flags(DEMO_DIR)]}
    for name, model in MODELS.items():
        flags = train_flags(model, DEMO_DIR, OUTPUT_DIR, args.max_train_steps)
        words[name] = ["examples/train_sit.py", "--recipe", model.recipe, "--seed", str(SEED), *flags]
        if args.max_train_steps is not None:
            words[name] += ["--max_train_steps", str(args.max_train_steps), "--lr_warmup_steps", "0"]
    launch = ["accelerate", "launch", "--num_processes", "1", "--num_cpu_threads_per_process", str(args.num_threads)]
    return {
        name: shlex.join([*launch, *flags, "--output_dir", str(OUTPUT_DIR / name)]) for name, flags in words.items()
    }


def report_of(
    args: argparse.Namespace,
    tokenizer_seconds: float,
    models: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    real_recognition: float,
) -> dict[str, Any]:
    """Everything about the study, in plain types."""
    command = f"{COMMAND} --num_threads {args.num_threads} --samples_per_class {args.samples_per_class}"
    if args.max_train_steps is not None:
        command += f" --max_train_steps {args.max_train_steps}"
    seconds = [tokenizer_seconds, *(model["training_seconds"] for model in models.values())]
    return {
        "command": command,
        "training_commands": training_commands(args),
        "machine": machine("accelerate", "diffusers", "datasets", "scikit-learn"),
        "num_threads": args.num_threads,
        "sampling": {
            "scheduler": "FlowMatchEulerMaruyamaScheduler",
            "num_inference_steps": demo.NUM_INFERENCE_STEPS,
            "guidance_interval": list(demo.GUIDANCE_INTERVAL),
            "samples_per_class": args.samples_per_class,
        },
        "bars": {"recognition": demo.MIN_RECOGNITION, "diversity": demo.MIN_DIVERSITY},
        "recognition_of_held_out_real_images": real_recognition,
        "tokenizer_training_seconds": tokenizer_seconds,
        "total_seconds": sum(seconds) + sum(row["sampling_seconds"] for row in rows),
        "models": models,
        "rows": rows,
        "missed": missed_rows(rows),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    models, sampling, bars = report["models"], report["sampling"], report["bars"]
    low, high = sampling["guidance_interval"]
    trainings = [
        [
            model["title"],
            f"`{model['recipe']}`",
            f"{model['num_parameters'] / 1e6:.2f}",
            str(model["num_steps"]),
            f"{model['training_seconds']:.0f}",
            f"{1000 * model['training_seconds'] / model['num_steps']:.0f}",
        ]
        for model in models.values()
    ]
    rows = [
        [
            models[row["model"]]["title"],
            row["title"],
            f"{row['passes_per_step']:.2f}",
            f"{row['sampling_seconds']:.1f}",
            f"{row['recognition']:.3f}",
            f"{row['diversity']:.3f}",
            ("yes" if row["passes"] else "no") + (", must" if row["must_pass"] else ""),
        ]
        for row in report["rows"]
    ]
    weak = "; ".join(
        f"{model['title']} after {model['weak_step']} steps" for model in models.values() if model["weak_step"]
    )
    missed = f"Missed by {', '.join(report['missed'])}." if report["missed"] else "All that must reach them do."
    return "\n".join(
        [
            "# Generators of the demonstration's digits: architectures and guidance",
            "",
            f"{sampling['samples_per_class']} samples of each class, the same seeds in every row, "
            f"{sampling['num_inference_steps']} Euler-Maruyama steps; guidance, or a temperature below 1, on "
            f"[{low:g}, {high:g}]. Recognition is the share of samples in which a classifier, trained on real digits, "
            "sees the intended one; diversity is their mean distance within a class, by that of reconstructions of "
            "held-out real digits. Passes are counted: images that go through a network, by images and steps.",
            "",
            f"Bars: recognition of at least {bars['recognition']:g} and diversity of at least {bars['diversity']:g}, "
            f"for GFT in one pass per step. {missed} Of held-out real digits the classifier recognises "
            f"{report['recognition_of_held_out_real_images']:.3f}.",
            "",
            *table(
                [
                    "model",
                    "guidance",
                    "passes per step",
                    "sampling (s)",
                    "recognition",
                    "diversity",
                    "passes the bars",
                ],
                rows,
            ),
            "## Training",
            "",
            *table(["model", "recipe", "parameters (M)", "steps", "seconds", "ms per step"], trainings),
            "GFT continues from the trained SiT, whose training comes on top. The weak models of autoguidance are "
            f"earlier checkpoints of the same training: {weak}.",
            "",
            f"Training, that of the tokenizer included, and sampling took {report['total_seconds'] / 60:.0f} minutes "
            f"on {report['num_threads']} threads. Written by `{report['command']}` on "
            f"{machine_line(report['machine'])}. After the demonstration's tokenizer it runs",
            "",
            "```",
            *report["training_commands"].values(),
            "```",
        ]
    )


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(args.output_dir, patience=300.0)  # for an earlier study that is just ending
    torch.set_num_threads(args.num_threads)
    tokenizer_seconds = train_tokenizer(args)
    demo.launch("cache_latents.py", args.output_dir / "latents", stage_settings(args), *cache_flags(args.demo_dir))
    # each model is measured when it is trained: if the study is interrupted, its samples are there
    models, rows, digits = {}, [], None
    for name in MODELS:
        models[name] = train_generator(name, args)
        own_rows = [row for row in ROWS if row.model == name]
        digits = digits or Digits(args, load_pipeline(own_rows[0], args))
        rows += [measured_row(row, args, digits) for row in own_rows]
    report = report_of(args, tokenizer_seconds, models, rows, digits.recognition(*digits.test))
    text = to_markdown(report)
    write_results(args.results_dir, "study_generators", report, text)
    print(f"\n{text}")
    lock.release()
    if report["missed"] and args.max_train_steps is None:
        sys.exit(f"The study missed its bars for {', '.join(report['missed'])}.")


if __name__ == "__main__":
    main()
