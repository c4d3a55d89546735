"""What int8 and float8 weights of the transformer cost in quality, and save in memory and time.

    python -m benchmarks.quantization --pipeline outputs/demo/pipeline
    python -m benchmarks.quantization --parts times

The first command measures errors. On the demonstration's pipeline: bytes of the transformer, error of its velocity on
noised latents of held-out digits over times and classes, and samples with the same noise, compared with those of
float32 and read by the study's classifier. On models of published sizes, where nothing trained is at hand: errors with
random weights, none of them zero and with gates about as large as the trained ones of the demonstration. And what
single groups of layers add, each quantised alone, in float32.

The second command measures the time of a forward pass of SiT-B: every way is called once in each round, in turn, and
compared with bfloat16 in the same round. It needs idle cores. What the other command measured is kept.

Both write `quantization.json` and `.md`. The weights are quantised by torchao through diffusers, or cast by diffusers
itself.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, TorchAoConfig
from diffusers.hooks import apply_layerwise_casting
from torch import nn
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)

from maetok_hf import (
    LightningDiTTransformer1DModel,
    MAETokDiffusionPipeline,
    SiTTransformer1DModel,
    USiTTransformer1DModel,
)
from maetok_hf.data import export_mnist
from maetok_hf.models.layers import Modulation, compile_apart
from maetok_hf.study import measures
from maetok_hf.study.classifier import ImageClassifier, load_classifier
from maetok_hf.study.images import Split, load_split
from maetok_hf.study.presets import CPU
from tests.testing_utils import randomize_parameters, seeded_normal

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results
from .study_generators import demo
from .suite.timing import quartiles, seconds_of


COMMAND = "python -m benchmarks.quantization"
PARTS = ("errors", "times")
CLASSIFIER = ROOT / "docs" / "study" / "cells" / "cpu-classifier.safetensors"
# what the documentation tells users to leave as it is
KEPT = ("proj_in", "proj_out", "time_embed", "temperature_embed")
TIMES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
IMAGES_PER_TIME = 55  # of the demonstration's latents, five of each class and of none
SAMPLES_PER_CLASS = 50
GATE_STD = 0.25  # of the weights that make shifts, scales and gates
SIZE_B = {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}
GROUPED = ("SiT-B", "USiT of 13 layers, as wide")  # those whose layers differ
RANDOM_MODELS: dict[str, tuple[type[ModelMixin], dict[str, int]]] = {
    "SiT-B": (SiTTransformer1DModel, SIZE_B),
    "LightningDiT-B": (LightningDiTTransformer1DModel, SIZE_B),
    "USiT of 13 layers, as wide": (USiTTransformer1DModel, SIZE_B | {"num_layers": 13}),
}
TIMED_MODEL = "SiT-B"
BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class Way:
    """
    A way to hold the weights of a transformer.

    Args:
        title (`str`): Its name in the tables.
        config (*optional*): torchao's config of quantised linear layers.
        cast (`bool`, *optional*, defaults to `False`): Whether diffusers casts layers to float8 between uses.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): What it computes in.
        needs_gpu (`bool`, *optional*, defaults to `False`): Whether a CPU cannot.
    """

    title: str
    config: Any = None
    cast: bool = False
    dtype: torch.dtype = torch.bfloat16
    needs_gpu: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether it keeps all layers as they are."""
        return self.config is None and not self.cast

    def load(
        self, folder: Path, kept: Sequence[str], device: torch.device, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """
        Args:
            folder (`Path`): A saved transformer.
            kept (`Sequence[str]`): Names of modules that stay as they are.
            device (`torch.device`): Where it is put.
            dtype (`torch.dtype`, *optional*): What it computes in, by default what the way says.

        Returns:
            `torch.nn.Module`: The transformer, in evaluation mode.
        """
        dtype, model_class = dtype or self.dtype, model_class_of(folder)
        # diffusers changes the list
        config = None if self.config is None else TorchAoConfig(self.config, modules_to_not_convert=list(kept))
        model = model_class.from_pretrained(folder, dtype=dtype, quantization_config=config).eval().to(device)
        if self.cast:
            # by its function, not the method, which leaves out what the class names; norms are no layers that it casts
            patterns = tuple(f"^{name}$" for name in kept)
            apply_layerwise_casting(model, torch.float8_e4m3fn, dtype, skip_modules_pattern=patterns)
        return model


WAYS = {
    "float32": Way("float32", dtype=torch.float32),
    "bfloat16": Way("bfloat16"),
    "int8": Way("int8 weights", Int8WeightOnlyConfig()),
    "int8-dynamic": Way("int8 weights and activations", Int8DynamicActivationInt8WeightConfig()),
    "float8": Way("float8 weights", Float8WeightOnlyConfig()),
    "float8-cast": Way("float8 by layerwise casting", cast=True),
    "float8-dynamic": Way(
        "float8 weights and activations", Float8DynamicActivationFloat8WeightConfig(), needs_gpu=True
    ),
}


def can_run(way: Way, device: torch.device) -> bool:
    """Whether the device has what the way needs: for products of float8, compute capability 8.9."""
    return not way.needs_gpu or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def model_class_of(folder: Path) -> type[ModelMixin]:
    """The class that a folder's config names."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    known = (SiTTransformer1DModel, LightningDiTTransformer1DModel, USiTTransformer1DModel)
    return next(cls for cls in known if cls.__name__ == name)


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of those inside, if it is made of others, as quantised ones are."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers. (diffusers' `get_memory_footprint` counts quantised ones as bfloat16.)"""
    return sum(stored_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True, eq=False)
class Inputs:
    """
    What velocities are compared on: the same images at each of some times.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_times, n, num_tokens, channels)`): Noised latents.
        times (`torch.Tensor` of shape `(num_times,)`): Times.
        labels (`torch.Tensor` of shape `(n,)`): Classes.
    """

    hidden_states: torch.Tensor
    times: torch.Tensor
    labels: torch.Tensor

    @torch.no_grad()
    def velocities(self, model: nn.Module) -> torch.Tensor:
        """Velocities of the shape of `hidden_states`, float32, on the CPU."""
        labels = self.labels.to(model.device)
        found = []
        for states, time in zip(self.hidden_states, self.times, strict=True):
            states = states.to(model.device, model.dtype)
            found.append(model(states, time.expand(len(labels)).to(model.device), labels).sample.float().cpu())
        return torch.stack(found)

    def errors(self, found: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
        """Norm of the difference over that of the exact velocities: of all, and at the worst time and class."""
        difference, size = (part.double().square().sum(dim=(-2, -1)) for part in (found - exact, exact))
        ratios = {
            "error": difference.sum() / size.sum(),
            "worst_time": (difference.sum(dim=1) / size.sum(dim=1)).max(),
            "worst_class": max(
                difference[:, self.labels == label].sum() / size[:, self.labels == label].sum()
                for label in self.labels.unique()
            ),
        }
        return {name: ratio.sqrt().item() for name, ratio in ratios.items()}


def noised(latents: torch.Tensor, labels: torch.Tensor, times: Sequence[float] = TIMES) -> Inputs:
    """Latents `(n, num_tokens, channels)` on the linear path, at each of the times."""
    scale = torch.tensor(times).view(-1, 1, 1, 1)
    noise = seeded_normal(len(times), *latents.shape)
    return Inputs((1 - scale) * latents + scale * noise, torch.tensor(times), labels)


def random_transformer(name: str) -> ModelMixin:
    """One of `RANDOM_MODELS`, without a layer that begins as zero."""
    model_class, config = RANDOM_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(**config)
        for module in model.modules():
            if isinstance(module, Modulation):
                nn.init.normal_(module.linear.weight, std=GATE_STD)
        nn.init.xavier_uniform_(model.proj_out.weight)
    return randomize_parameters(model, std=0.01).eval()


def random_inputs(model: ModelMixin) -> Inputs:
    """Normal latents, of a class and of none, at every other of `TIMES`."""
    labels = torch.tensor([0, model.config.num_classes])
    latents = seeded_normal(len(labels), model.config.sample_size, model.config.in_channels, seed=1)
    return noised(latents, labels, TIMES[::2])


def groups_of(model: nn.Module) -> dict[str, list[str]]:
    """The linear layers of a transformer by what they do."""
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            first, *rest = name.split(".")
            group = f"transformer_blocks.*.{rest[1]}" if first == "transformer_blocks" else first
            groups.setdefault(group, []).append(name)
    return groups


def measure_ways(folder: Path, inputs: Inputs, device: torch.device) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Bytes and errors of all ways, with and without the layers of `KEPT`, each with the model."""
    exact = None
    for name, way in WAYS.items():
        for kept in ((),) if way.is_exact else ((), KEPT):
            row = {"way": name, "kept": list(kept)}
            if not can_run(way, device):
                continue
            model = way.load(folder, kept, device)
            found = inputs.velocities(model)
            exact = found if exact is None else exact
            yield row | {"bytes": model_bytes(model)} | inputs.errors(found, exact), model


def measure_groups(folder: Path, inputs: Inputs, device: torch.device) -> list[dict[str, Any]]:
    """What each group of layers adds if it alone is quantised, and everything else is float32."""
    plain = WAYS["float32"].load(folder, (), device)
    exact, groups = inputs.velocities(plain), groups_of(plain)
    total = sum(parameter.numel() for parameter in plain.parameters())
    linears, rows = [name for names in groups.values() for name in names], []
    for group, names in groups.items():
        kept = [name for name in linears if name not in names]
        weights = sum(plain.get_submodule(name).weight.numel() for name in names)
        row = {"group": group, "share": weights / total, "errors": {}}
        for way in (name for name, way in WAYS.items() if way.config is not None and not way.needs_gpu):
            found = inputs.velocities(WAYS[way].load(folder, kept, device, torch.float32))
            row["errors"][way] = inputs.errors(found, exact)["error"]
        rows.append(row)
    return rows


class Digits:
    """
    The real digits, and the classifier that reads generated ones.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): Of the demonstration, float32.
        folder (`Path`): Where the data set is written.
    """

    def __init__(self, pipe: MAETokDiffusionPipeline, folder: Path):
        export_mnist(folder)
        train, self.held_out = (load_split(folder, split, CPU.resolution) for split in ("train", "test"))
        self.classifier = load_classifier(ImageClassifier(10, CPU.resolution, CPU.classifier), CLASSIFIER)
        self.real = self.classifier.extract(train.images, CPU.batch_size)["pool"]
        images = self.held_out.images.permute(0, 2, 3, 1).numpy()
        self.distance = demo.within_class_distance(demo.reconstruct(pipe, images)[0], self.held_out.labels.numpy())
        self.first: np.ndarray | None = None  # the samples that others are compared with

    def inputs(self, pipe: MAETokDiffusionPipeline) -> Inputs:
        """Noised latents of held-out digits, as many of each class and of none."""
        each = IMAGES_PER_TIME // 11
        rows = [torch.nonzero(self.held_out.labels == label)[:each, 0] for label in range(10)]
        rows = torch.cat([*rows, torch.arange(each)])
        split = Split(self.held_out.images[rows], self.held_out.labels[rows], 10)
        labels = split.labels.clone()
        labels[-each:] = pipe.transformer.config.num_classes
        return noised(measures.encode(pipe.vae, split, CPU.batch_size), labels)

    def measure(self, pipe: MAETokDiffusionPipeline) -> dict[str, float]:
        """The demonstration's samples by a pipeline, against the first ones, and as digits."""
        images, labels = demo.generate(pipe, 10 * SAMPLES_PER_CLASS, 10)
        self.first = images if self.first is None else self.first
        difference = (images.astype(np.float64) - self.first) / 255
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        found = measures.measure_samples(pixels, labels.tolist(), self.real, self.classifier, CPU.batch_size)
        return {
            "pixel_difference": float(np.sqrt(np.mean(difference**2))),
            "recognition": found["recognition"],
            "diversity": demo.within_class_distance(images, labels) / self.distance,
            "distance": found["distance"],
        }


def pixel_difference_of_other_noise(images: np.ndarray) -> float:
    """How far samples of the same classes are from each other if their noise differs: the scale of the differences."""
    difference = (images[10:].astype(np.float64) - images[:-10]) / 255  # classes come in turn
    return float(np.sqrt(np.mean(difference**2)))


def measure_demo(pipeline: Path, device: torch.device) -> dict[str, Any]:
    """All ways on the demonstration's pipeline."""
    pipe = MAETokDiffusionPipeline.from_pretrained(pipeline).to(device)
    pipe.set_progress_bar_config(disable=True)
    num_parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    with tempfile.TemporaryDirectory() as folder:
        digits = Digits(pipe, Path(folder) / "digits")
    inputs, rows = digits.inputs(pipe), []
    for row, model in measure_ways(pipeline / "transformer", inputs, device):
        pipe.transformer = model
        rows.append(row | digits.measure(pipe))
        print(rows[-1], flush=True)
    return {
        "num_parameters": num_parameters,
        "num_samples": 10 * SAMPLES_PER_CLASS,
        "other_noise": pixel_difference_of_other_noise(digits.first),
        "rows": rows,
        "groups": measure_groups(pipeline / "transformer", inputs, device),
    }


def measure_random(name: str, device: torch.device) -> dict[str, Any]:
    """All ways on one of `RANDOM_MODELS`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), random_transformer(name)
        model.save_pretrained(folder)
        inputs = random_inputs(model)
        found = {"rows": [row for row, _ in measure_ways(folder, inputs, device)]}
        return found | ({"groups": measure_groups(folder, inputs, device)} if name in GROUPED else {})


def measure_errors(pipeline: Path, device: torch.device) -> dict[str, Any]:
    """The part `errors` of the report."""
    report = {"demo": measure_demo(pipeline, device), "random": {}}
    for name in RANDOM_MODELS:
        report["random"][name] = measure_random(name, device)
        print(name, report["random"][name], flush=True)
    return report


def compiled(model: nn.Module) -> nn.Module:
    """The model with compiled blocks; apart, since graphs of all ways together would pass torch's limit."""
    compile_apart(model.transformer_blocks, dynamic=False)
    return model


@torch.inference_mode()
def measure_times(device: torch.device, num_rounds: int) -> dict[str, Any]:
    """The part `times` of the report: one call of every way in every round."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_transformer(TIMED_MODEL).save_pretrained(folder)
        models = {}
        for name, way in WAYS.items():
            if can_run(way, device):
                kept = () if way.is_exact else KEPT
                models[name, False] = way.load(folder, kept, device)
                if not way.cast:  # the hooks that cast break the graph at every layer
                    models[name, True] = compiled(way.load(folder, kept, device))
    config = models["bfloat16", False].config
    for batch_size in BATCH_SIZES:
        states = seeded_normal(batch_size, config.sample_size, config.in_channels).to(device)
        time, labels = torch.full((batch_size,), 0.5, device=device), torch.arange(batch_size, device=device)

        def call(model: nn.Module, states=states, time=time, labels=labels) -> float:
            own = states.to(model.dtype)
            return seconds_of(lambda: model(own, time, labels), device)

        for model in models.values():
            call(model), call(model)  # compiles, and warms up
        seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in models}
        keys = list(models)
        for number in range(num_rounds):
            turn = number % len(keys)  # none is always the first
            for key in keys[turn:] + keys[:turn]:
                seconds[key].append(call(models[key]))
        for key, own in seconds.items():
            base = seconds["bfloat16", key[1]]
            rows.append(
                {
                    "way": key[0],
                    "compiled": key[1],
                    "batch_size": batch_size,
                    "seconds": quartiles(own),
                    "speedup": statistics.median(theirs / ours for theirs, ours in zip(base, own, strict=True)),
                }
            )
            print(rows[-1], flush=True)
    return {"num_rounds": num_rounds, "num_threads": torch.get_num_threads(), "rows": rows}


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def layers(row: dict[str, Any]) -> str:
    return "" if WAYS[row["way"]].is_exact else "but those kept" if row["kept"] else "all"


def groups_to_markdown(name: str, groups: list[dict[str, Any]]) -> list[str]:
    """The table of the groups of a model."""
    ways = list(groups[0]["errors"])
    rows = [
        [f"`{row['group']}`", percent(row["share"]), *(percent(row["errors"][way]) for way in ways)] for row in groups
    ]
    return [f"### {name}", "", *table(["layers", "share", *(WAYS[way].title for way in ways)], rows)]


def errors_to_markdown(errors: dict[str, Any]) -> list[str]:
    """The tables of errors."""
    demonstration, head = errors["demo"], ["weights", "layers", "MB", "error of the velocity"]

    def facts(row: dict[str, Any], digits: int) -> list[str]:
        return [WAYS[row["way"]].title, layers(row), f"{row['bytes'] / 1e6:.{digits}f}", percent(row["error"])]

    rows = [
        [
            *facts(row, 2),
            *(percent(row[name]) for name in ("worst_time", "worst_class")),
            f"{row['pixel_difference']:.4f}",
            f"{row['recognition']:.3f}",
            f"{row['diversity']:.3f}",
            f"{row['distance']:.2f}",
        ]
        for row in demonstration["rows"]
    ]
    lines = [
        f"Kept as they are, where it says so: {', '.join(f'`{name}`' for name in KEPT)}. Errors are relative to "
        "float32: norm of the difference over norm of the velocity. All ways but float32 compute in bfloat16.",
        "",
        f"## The demonstration's transformer ({demonstration['num_parameters'] / 1e6:.1f} M parameters)",
        "",
        f"{demonstration['num_samples']} samples with the demonstration's guidance, solver and seeds. Pixels in "
        "[0, 1]: root mean square distance from float32's samples of the same noise; it is "
        f"{demonstration['other_noise']:.3f} between samples of other noise. Recognition and distance by the study's "
        "classifier, the distance from real training digits; diversity by that of reconstructed held-out digits.",
        "",
        *table([*head, "worst time", "worst class", "pixels", "recognition", "diversity", "distance"], rows),
        "## Random weights",
        "",
    ]
    for name, found in errors["random"].items():
        lines += [f"### {name}", "", *table(head, [facts(row, 1) for row in found["rows"]])]
    lines += [
        "Random weights have no outliers, which trained ones of this size may have.",
        "",
        "## What to leave out",
        "",
        "Error of the velocity if one group of layers alone is quantised, all else in float32; the share is that of "
        "the group in all parameters.",
        "",
        *groups_to_markdown("The demonstration's transformer", demonstration["groups"]),
    ]
    for name, found in errors["random"].items():
        if "groups" in found:
            lines += groups_to_markdown(f"{name}, random weights", found["groups"])
    return lines


def times_to_markdown(times: dict[str, Any]) -> list[str]:
    """The table of times."""
    rows = []
    for row in times["rows"]:
        seconds = row["seconds"]
        rows.append(
            [
                WAYS[row["way"]].title,
                "compiled" if row["compiled"] else "eager",
                str(row["batch_size"]),
                f"{1000 * seconds['median']:.1f}",
                f"{1000 * seconds['quartile_1']:.1f} to {1000 * seconds['quartile_3']:.1f}",
                f"{row['speedup']:.2f}",
            ]
        )
    head = ["weights", "blocks", "batch", "ms", "quartiles", "times as fast as bfloat16"]
    return [
        f"{times['num_rounds']} rounds on {times['num_threads']} threads; every way but float32 and bfloat16 without "
        "the layers that are kept. The last column is the median over rounds, eager against eager and compiled "
        "against compiled. Layerwise casting is not compiled: its hooks break the graph at every layer.",
        "",
        *table(head, rows),
    ]


def measured_ways(report: dict[str, Any]) -> set[str]:
    """Names of the ways that are anywhere in the report."""
    found = {row["way"] for row in report.get("times", {}).get("rows", ())}
    return found | {row["way"] for row in report.get("errors", {}).get("demo", {}).get("rows", ())}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = ["# Quantised weights of the transformer: quality, memory, time", ""]
    if "errors" in report:
        lines += errors_to_markdown(report["errors"])
    lines += [f"## Time of a forward pass of {TIMED_MODEL}", ""]
    lines += times_to_markdown(report["times"]) if "times" in report else ["Not measured.", ""]
    for name in set(WAYS) - measured_ways(report):
        lines += [f"Not measured: {WAYS[name].title}, which need a GPU of compute capability 8.9 or newer.", ""]
    lines += ["## How it was measured", ""]
    for part in PARTS:
        if part in report:
            lines.append(f"- {part}: `{report[part]['command']}` on {machine_line(report[part]['machine'])}")
    return "\n".join(lines)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("outputs/demo/pipeline"), help="The demonstration's.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["errors"], help="What is measured.")
    parser.add_argument("--num_rounds", type=int, default=20, help="Calls of every way that are timed.")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    args = parser.parse_args(words)
    for name in ("num_rounds", "num_threads"):
        if getattr(args, name) < 1:
            parser.error(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if "errors" in args.parts and not (args.pipeline / "model_index.json").is_file():
        parser.error(f"`--pipeline`: {args.pipeline} holds no pipeline: run `make demo` first.")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = args.results_dir / "quantization.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in args.parts:
        measured = (
            measure_errors(args.pipeline, device) if part == "errors" else measure_times(device, args.num_rounds)
        )
        command = f"{COMMAND} --pipeline outputs/demo/pipeline" if part == "errors" else f"{COMMAND} --parts times"
        report[part] = {"command": command, "machine": machine("diffusers", "torchao"), **measured}
    write_results(args.results_dir, "quantization", report, to_markdown(report))
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
