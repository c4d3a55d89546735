"""How few evaluations of the model are enough: solvers of the ODE and of the SDE against 250 Euler-Maruyama steps.

A trained pipeline of digits, the demonstration's, samples with guidance from the same noises by every solver. Two
kinds of error are measured:

- of the solvers of the ODE, how far they end from its solution for the same noise: Heun's method in many steps. Both
  distances, of latents and of decoded pixels, are relative to the norm of the solution.
- of all solvers, how far a set of images is from one of 250 Euler-Maruyama steps: the Fréchet distance in the 64
  features of the study's digit classifier. The two sets have different noises. That of two 250-step sets is the floor:
  what is below it is not resolved. Recognition is the share of images in which the classifier sees the intended digit;
  diversity is their mean distance within a class, by that of the 250-step set.

Guidance in an interval makes the velocity jump at the interval's highest time. A solver that sees the jump only at the
times of its steps puts it in the wrong place, by up to a step, and a multistep solver carries velocities from before
the jump over it. So errors are measured with guidance everywhere, where nothing jumps; on grids in which a step begins
at the jump; and on grids in which the jump is half-way between the beginnings of two steps. UniPC and DPM-Solver++ are
also measured with a history that starts anew at the jump.

    python -m benchmarks.few_steps --pipeline outputs/demo/pipeline --guidance_scale 1.9 --guidance_interval 0 0.75

writes `few_steps.json` and `.md`, and the picture `few-steps.png`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, MAETokDiffusionPipeline
from maetok_hf.models import denormalize_latents
from maetok_hf.pipelines.guidance import is_inside
from maetok_hf.sampling import generate_images, to_uint8
from maetok_hf.seeding import keyed_generator
from maetok_hf.study.classifier import ImageClassifier, load_classifier
from maetok_hf.study.measures import distance
from maetok_hf.training.checkpointing import model_digest

from .machine import RESULTS, ROOT, machine, machine_line, table, write_results
from .study_generators import demo


if TYPE_CHECKING:
    from matplotlib.axes import Axes


COMMAND = "python -m benchmarks.few_steps"
PICTURES = ROOT / "docs" / "images"
CLASSIFIER = ROOT / "docs" / "study" / "cells" / "cpu-classifier.safetensors"
NUM_CLASSES, RESOLUTION = 10, 32  # of the classifier
FLOW_MODE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
BATCH_SIZE = 100
REFERENCE_SEED, SEED = 0, 1
DPI = 120
TICKS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Solver:
    """
    A way to integrate.

    Args:
        title (`str`): Its name in tables.
        build (`Callable[[], SchedulerMixin]`): Makes the scheduler.
        stochastic (`bool`): Whether it draws noise, so that it has no end point.
        restarts (`bool`): Whether its history starts anew where guidance begins.
        color (`str`): Of its line.
    """

    title: str
    build: Callable[[], SchedulerMixin]
    color: str
    stochastic: bool = False
    restarts: bool = False


def build_unipc() -> SchedulerMixin:
    return UniPCMultistepScheduler(**FLOW_MODE)


def build_dpm() -> SchedulerMixin:
    return DPMSolverMultistepScheduler(**FLOW_MODE)


SOLVERS = {
    "sde": Solver("Euler-Maruyama", FlowMatchEulerMaruyamaScheduler, "C7", stochastic=True),
    "euler": Solver("Euler", FlowMatchEulerDiscreteScheduler, "C0"),
    "heun": Solver("Heun", FlowMatchHeunScheduler, "C1"),
    "unipc": Solver("UniPC", build_unipc, "C2"),
    "dpm": Solver("DPM-Solver++", build_dpm, "C3"),
    "unipc-restarted": Solver("UniPC, history anew", build_unipc, "C2", restarts=True),
    "dpm-restarted": Solver("DPM-Solver++, history anew", build_dpm, "C3", restarts=True),
}


# the grids of the ODE's solvers: where guidance begins, in steps after the last one that began before it
AT_A_STEP, HALF_WAY = 0.0, 0.5


@dataclass(frozen=True)
class Plan:
    """
    How much is measured.

    Args:
        targets (`tuple[int, ...]`): About how many steps the solvers of the ODE take.
        set_targets (`tuple[int, ...]`): The same for sets of images.
        heun_set_targets (`tuple[int, ...]`): The same for those of Heun's method, of two evaluations a step.
        sde_set_steps (`tuple[int, ...]`): Further numbers of steps of Euler-Maruyama.
        max_evaluations (`int`): Of a trajectory.
        reference_steps (`int`): Heun steps of the solution of the ODE, about.
        sde_steps (`int`): Euler-Maruyama steps of the set that others are compared with.
        num_trajectories (`int`): Noises, of all classes in turn.
        num_images (`int`): Images of a set, of all classes in turn.
    """

    targets: tuple[int, ...] = (4, 8, 12, 16, 20, 32, 64, 128, 250)
    set_targets: tuple[int, ...] = (6, 10, 14, 18, 50)
    heun_set_targets: tuple[int, ...] = (4, 8, 12, 24)
    sde_set_steps: tuple[int, ...] = (100,)
    max_evaluations: int = 256
    reference_steps: int = 504
    sde_steps: int = 250
    num_trajectories: int = 20
    num_images: int = 400


def steps_near(targets: tuple[int, ...], high: float, offset: float) -> list[int]:
    """
    Numbers of uniform steps in which guidance begins at a place of its own.

    Args:
        targets (`tuple[int, ...]`): About how many, at least 3; one is replaced by the best number from 0.6 to
            1.5 times of it.
        high (`float`): Time at which guidance begins.
        offset (`float`): Part of a step from the beginning of the last step before it, in [0, 1).

    Returns:
        `list[int]`: Increasing.
    """

    def misfit(steps: int) -> float:
        part = (steps * (1 - high) - offset) % 1
        return round(min(part, 1 - part), 6)

    found = set()
    for target in targets:
        candidates = range(max(3, round(0.6 * target)), round(1.5 * target) + 1)
        found.add(min(candidates, key=lambda steps: (misfit(steps), abs(steps - target))))
    return sorted(found)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="Folder of the demonstration's pipeline.")
    parser.add_argument("--guidance_scale", type=float, help="Defaults to the pipeline's own.")
    parser.add_argument(
        "--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="Defaults to the pipeline's own."
    )
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--picture_dir", type=Path, default=PICTURES, help="Where the picture is written.")
    parser.add_argument("--num_threads", type=int, default=2, help="CPU threads.")
    args = parser.parse_args(words)
    if args.num_threads < 1:
        parser.error(f"`--num_threads` must be at least 1, got {args.num_threads}.")
    if not (args.pipeline / "model_index.json").is_file():
        parser.error(f"`--pipeline` {args.pipeline} holds no pipeline: run `make demo` first.")
    return args


def load_pipeline(folder: Path, **defaults: Any) -> MAETokDiffusionPipeline:
    """The pipeline, which must be one of digits for the classifier to know its images, with its defaults replaced."""
    pipe = MAETokDiffusionPipeline.from_pretrained(folder, **defaults)
    found = (pipe.transformer.config.num_classes, pipe.vae.config.sample_size, pipe.transformer.config.path)
    if found != (NUM_CLASSES, RESOLUTION, "linear"):
        sys.exit(
            f"{folder} generates {found[0]} classes at {found[1]} pixels on the {found[2]} path: the digit classifier "
            f"knows {NUM_CLASSES} at {RESOLUTION} pixels, and the solvers of diffusers follow the linear path."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def load_digit_classifier() -> ImageClassifier:
    """The study's, trained on real digits."""
    return load_classifier(ImageClassifier(NUM_CLASSES, RESOLUTION, "digit classifier"), CLASSIFIER)


def restart_history(interval: tuple[float, float]) -> Callable[..., dict]:
    """A callback that lets a multistep scheduler forget its past where guidance begins or ends."""

    def forget(pipe: MAETokDiffusionPipeline, i: int, t: torch.Tensor, tensors: dict) -> dict:
        scheduler = pipe.scheduler
        now, then = (is_inside(time, interval) for time in scheduler.sigmas[i : i + 2].tolist())
        if now != then and i + 1 < len(scheduler.timesteps):
            scheduler.lower_order_nums = 0  # the next step is of first order
            scheduler.last_sample = None  # UniPC: and does not correct the one before
        return {}

    return forget


def solve(
    pipe: MAETokDiffusionPipeline, solver: Solver, steps: int, num_images: int, interval: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents and decoded pixels in [0, 1] of the first noises, on the CPU."""
    pipe.scheduler = solver.build()
    latents = pipe(
        class_labels=[index % NUM_CLASSES for index in range(num_images)],
        generator=[keyed_generator(SEED, "sampling", index) for index in range(num_images)],
        num_inference_steps=steps,
        guidance_interval=interval,
        callback_on_step_end=restart_history(interval) if solver.restarts else None,
        output_type="latent",
    ).images
    with torch.no_grad():
        pixels = pipe.vae.decode(denormalize_latents(latents, pipe.vae.config)).sample
    return latents.double().cpu(), (pixels.double().cpu().clamp(-1, 1) + 1) / 2


def relative(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of a difference by that of the reference."""
    return (torch.linalg.norm(values - reference) / torch.linalg.norm(reference)).item()


def evaluations_of(solver: Solver, steps: int) -> int:
    """Evaluations of the velocity; the last step of Heun's method has no corrector."""
    return 2 * steps - 1 if solver.build is FlowMatchHeunScheduler else steps


def measure_grids(
    pipe: MAETokDiffusionPipeline,
    plan: Plan,
    interval: tuple[float, float],
    numbers: dict[str, list[int]],
    solution: tuple[torch.Tensor, torch.Tensor],
) -> list[dict[str, Any]]:
    """Distances of solvers from the solution of the ODE, on grids of numbers of steps by solver."""
    lines = []
    for name, all_steps in numbers.items():
        points = []
        for steps in all_steps:
            if evaluations_of(SOLVERS[name], steps) > plan.max_evaluations:
                continue
            found = solve(pipe, SOLVERS[name], steps, plan.num_trajectories, interval)
            latents, pixels = (relative(*pair) for pair in zip(found, solution, strict=True))
            point = {"steps": steps, "evaluations": pipe.num_timesteps, "latents": latents, "pixels": pixels}
            print(f"guidance on {interval}: {name} {point}", flush=True)
            points.append(point)
        lines.append({"solver": name, "points": points})
    return lines


def measure_trajectories(pipe: MAETokDiffusionPipeline, plan: Plan) -> dict[str, Any]:
    """The solvers of the ODE with guidance everywhere, and on both kinds of grids with that of the pipeline."""
    interval, everywhere = tuple(pipe.config.default_guidance_interval), (0.0, 1.0)
    every = [name for name, solver in SOLVERS.items() if not solver.stochastic]
    plain = [name for name in every if not SOLVERS[name].restarts]
    high = interval[1]
    (reference_steps,) = steps_near((plan.reference_steps,), high, AT_A_STEP)
    at_a_step, half_way = (steps_near(plan.targets, high, offset) for offset in (AT_A_STEP, HALF_WAY))
    parts = {"everywhere": (everywhere, dict.fromkeys(plain, list(plan.targets)))}
    parts["at_a_step"] = (interval, dict.fromkeys(every, at_a_step))
    parts["half_way"] = (interval, dict.fromkeys(plain, half_way))
    solutions = {
        part: solve(pipe, SOLVERS["heun"], reference_steps, plan.num_trajectories, part)
        for part in {everywhere, interval}
    }
    found = {name: measure_grids(pipe, plan, on, steps, solutions[on]) for name, (on, steps) in parts.items()}
    return {"reference_steps": reference_steps, **found}


def make_images(pipe: MAETokDiffusionPipeline, solver: Solver, steps: int, seed: int, num_images: int) -> torch.Tensor:
    """A set of images, `(n, 3, height, width)` of bytes on the CPU."""
    pipe.scheduler = solver.build()
    parts = []
    for start in range(0, num_images, BATCH_SIZE):
        indices = range(start, min(start + BATCH_SIZE, num_images))
        images = generate_images(
            pipe, indices, [index % NUM_CLASSES for index in indices], seed, num_inference_steps=steps
        )
        parts.append(to_uint8(images).permute(0, 3, 1, 2).contiguous())
    return torch.cat(parts)


class Comparison:
    """
    A set of images that others are compared with.

    Args:
        images (`torch.ByteTensor` of shape `(n, 3, height, width)`): Of all classes in turn.
        classifier ([`ImageClassifier`]): Its features.
    """

    def __init__(self, images: torch.Tensor, classifier: ImageClassifier):
        self.classifier = classifier
        self.labels = torch.arange(len(images)) % NUM_CLASSES
        self.features = classifier.extract(images, BATCH_SIZE)["pool"]
        self.spread = self._spread(images)

    def _spread(self, images: torch.Tensor) -> float:
        return demo.within_class_distance(images.permute(0, 2, 3, 1).numpy(), self.labels.numpy())

    def measure(self, images: torch.Tensor) -> dict[str, float]:
        """Distance, recognition and diversity of another set of as many."""
        found = self.classifier.extract(images, BATCH_SIZE)
        return {
            "distance": distance(found["pool"], self.features),
            "recognition": (found["logits"].argmax(dim=1) == self.labels).double().mean().item(),
            "diversity": self._spread(images) / self.spread,
        }


def measure_sets(pipe: MAETokDiffusionPipeline, plan: Plan, classifier: ImageClassifier) -> dict[str, Any]:
    """Sets of images by all solvers, compared with one of many Euler-Maruyama steps."""
    sde = SOLVERS["sde"]
    images = make_images(pipe, sde, plan.sde_steps, REFERENCE_SEED, plan.num_images)
    comparison = Comparison(images, classifier)
    high = pipe.config.default_guidance_interval[1]
    numbers = {
        name: [min(plan.set_targets[0], 4), *steps_near(plan.set_targets, high, HALF_WAY)]
        for name, solver in SOLVERS.items()
        if not solver.restarts
    }
    numbers["heun"] = steps_near(plan.heun_set_targets, high, AT_A_STEP)
    numbers["sde"] += [*plan.sde_set_steps, plan.sde_steps]
    lines = []
    for name, all_steps in numbers.items():
        points = []
        for steps in all_steps:
            found = comparison.measure(make_images(pipe, SOLVERS[name], steps, SEED, plan.num_images))
            points.append({"steps": steps, "evaluations": pipe.num_timesteps, **found})
            print(f"sets: {name} {points[-1]}", flush=True)
        lines.append({"solver": name, "points": points})
    floor = lines[0]["points"][-1]["distance"]  # Euler-Maruyama, as many steps, other noises
    return {"sde_steps": plan.sde_steps, "reference": comparison.measure(images), "floor": floor, "lines": lines}


def measure_all(pipe: MAETokDiffusionPipeline, plan: Plan) -> dict[str, Any]:
    """Everything, in plain types."""
    scale, interval = pipe.config.default_guidance_scale, pipe.config.default_guidance_interval
    flags = f"--guidance_scale {scale:g} --guidance_interval {interval[0]:g} {interval[1]:g}"
    classifier = load_digit_classifier()
    return {
        "command": f"{COMMAND} --pipeline outputs/demo/pipeline {flags}",
        "machine": machine("diffusers"),
        "transformer": {
            "digest": model_digest(pipe.transformer),
            "num_parameters": pipe.transformer.num_parameters(),
        },
        "classifier": {"name": classifier.name, "digest": classifier.digest},
        "guidance_scale": scale,
        "guidance_interval": list(interval),
        "num_trajectories": plan.num_trajectories,
        "num_images": plan.num_images,
        "trajectories": measure_trajectories(pipe, plan),
        "sets": measure_sets(pipe, plan, classifier),
    }


def error_tables(lines: list[dict[str, Any]]) -> list[str]:
    """Tables of the errors of latents and pixels; a column is a number of steps."""
    columns = [point["steps"] for point in lines[0]["points"]]
    text = []
    for what, title in (("latents", "latents"), ("pixels", "pixels")):
        rows = []
        for line in lines:
            errors = {point["steps"]: f"{point[what]:.4f}" for point in line["points"]}
            rows.append([SOLVERS[line["solver"]].title, *(errors.get(steps, "") for steps in columns)])
        text += table([title, *(f"{steps} steps" for steps in columns)], rows)
    return text


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    (low, high), sets, trajectories = report["guidance_interval"], report["sets"], report["trajectories"]
    set_rows = [
        [
            SOLVERS[line["solver"]].title,
            str(point["steps"]),
            str(point["evaluations"]),
            f"{point['distance']:.2f}",
            f"{point['recognition']:.3f}",
            f"{point['diversity']:.3f}",
        ]
        for line in sets["lines"]
        for point in line["points"]
    ]
    lines = [
        "# Few steps: solvers against 250 Euler-Maruyama steps",
        "",
        f"The demonstration's digits, with classifier-free guidance of scale {report['guidance_scale']:g}, on "
        f"[{low:g}, {high:g}] unless said otherwise. An evaluation is one of the velocity, which takes two passes of "
        "the transformer where it is guided. A step of Heun's method takes two evaluations, its last step one; those "
        "of the others take one.",
        "",
        "## Distance from the solution of the ODE",
        "",
        f"For the same {report['num_trajectories']} noises, relative to the norm of the solution, that of "
        f"{trajectories['reference_steps']} Heun steps. Latents, then decoded pixels in [0, 1].",
        "",
        "### Guidance everywhere",
        "",
        "The velocity does not jump.",
        "",
        *error_tables(trajectories["everywhere"]),
        f"### A step begins at {high:g}, where guidance begins",
        "",
        'With "history anew", the velocities from before are forgotten there.',
        "",
        *error_tables(trajectories["at_a_step"]),
        f"### {high:g} is half-way between the beginnings of two steps",
        "",
        *error_tables(trajectories["half_way"]),
        f"## Distance from a set of {sets['sde_steps']} Euler-Maruyama steps",
        "",
        f"{report['num_images']} images a set. The distance is Fréchet's in the features of the "
        f"{report['classifier']['name']} ({report['classifier']['digest'][:12]}). Two sets of {sets['sde_steps']} "
        f"Euler-Maruyama steps with different noises are {sets['floor']:.2f} apart, the floor. Diversity is the mean "
        "distance within a class by that of the set compared with, of which "
        f"{100 * sets['reference']['recognition']:.1f} % are recognised.",
        "",
        *table(["solver", "steps", "evaluations", "distance", "recognised", "diversity"], set_rows),
        f"The transformer has {report['transformer']['num_parameters'] / 1e6:.2f} million parameters (digest "
        f"{report['transformer']['digest'][:12]}). Written by `{report['command']}` on "
        f"{machine_line(report['machine'])}.",
    ]
    return "\n".join(lines)


def _plot(axes: "Axes", lines: list[dict[str, Any]], what: str, title: str, label: str) -> None:
    """A line a solver, in logarithms."""
    for line in lines:
        solver, points = SOLVERS[line["solver"]], line["points"]
        xs, ys = ([point[name] for point in points] for name in ("evaluations", what))
        style = "--" if solver.restarts else "-"
        axes.plot(xs, ys, style, marker="o", markersize=3, color=solver.color, label=solver.title, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(TICKS, list(map(str, TICKS)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("evaluations of the velocity")
    axes.set_ylabel(label)


def draw(report: dict[str, Any], path: Path) -> None:
    """The picture. The same report gives the same file, with the same matplotlib."""
    from matplotlib.figure import Figure

    (low, high), sets, trajectories = report["guidance_interval"], report["sets"], report["trajectories"]
    titles = {
        "everywhere": "ODE, guidance everywhere",
        "at_a_step": f"ODE, guidance on [{low:g}, {high:g}], a step begins at {high:g}",
        "half_way": f"ODE, guidance on [{low:g}, {high:g}], {high:g} is half-way in a step",
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    *panels, last = figure.subplots(2, 2).flatten()
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        _plot(axes, trajectories[name], "latents", title, "relative error of the latents")
        axes.sharey(panels[0])
        axes.legend(fontsize="x-small")
    _plot(
        *(last, sets["lines"], "distance", f"Images against those of {sets['sde_steps']} Euler-Maruyama steps"),
        "Fréchet distance, classifier features",
    )
    last.axhline(sets["floor"], color="black", linestyle=":", linewidth=1, label="two such sets")
    last.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    defaults = {
        f"default_{name}": value
        for name in ("guidance_scale", "guidance_interval")
        if (value := getattr(args, name)) is not None
    }
    report = measure_all(load_pipeline(args.pipeline, **defaults), Plan())
    text = to_markdown(report)
    write_results(args.results_dir, "few_steps", report, text)
    draw(report, args.picture_dir / "few-steps.png")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
