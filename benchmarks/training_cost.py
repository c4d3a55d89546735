"""How much computing each recipe of a tokenizer asks for: computed, not measured.

Floating-point operations of the forward and backward passes of one image are counted by torch's `FlopCounterMode`,
while the recipe's own networks, at their published sizes, run on tensors without values. A multiply-add is two
operations; matrix products, attention and convolutions count, elementwise work (norms, activations, HOG, DiffAugment,
the optimiser) does not, nor does what attention recomputes in fused kernels. Times follow from an assumed share of the
devices' peak.

    python -m benchmarks.training_cost --update_recipes

writes `training_cost.json` and `.md`, and the `# Cost:` lines of the recipes.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import RESULTS, machine, machine_line, table, write_results
from .training_step import RECIPES, TrainingStep, keys_as_on_a_gpu, read_recipe, tokenizer_recipes


COMMAND = "python -m benchmarks.training_cost --update_recipes"
UTILIZATION = 0.4
SHARE = f"{100 * UTILIZATION:.0f} %"
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # dense bfloat16, SXM, data sheets
SECONDS_PER_DAY = 86400

ADVERSARIAL = ("adversarial term", "discriminator's step", "adaptive weight")
MAIN_RECIPES = ("maetok-b-128-256", "maetok-b-128-256-decoder", "maetok-b-128-512", "maetok-b-128-512-decoder")


def count(work: Callable[[], Any]) -> int:
    """Operations of a piece of work."""
    # the plain kernel of attention: its two products forward, four backward, whatever a device would use
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), keys_as_on_a_gpu():
        work()
    return counter.get_total_flops()


def count_parts(step: TrainingStep, resolution: int) -> dict[str, int]:
    """
    Operations of the parts of a step for one image, forward and backward.

    Args:
        step ([`TrainingStep`]): Allocated, in `FakeTensorMode`.
        resolution (`int`): Height and width of the image in pixels.

    Returns:
        `dict[str, int]`: By part. They sum to what `step.passes(1, resolution)` takes.
    """
    inputs = step.inputs(1, resolution)
    images = inputs["pixel_values"]
    trains_encoder = step.recipe.stage == "mask_modelling"
    config, grid = step.tokenizer.config, (resolution // step.tokenizer.config.patch_size,) * 2
    shape = (1, config.num_latent_tokens or grid[0] * grid[1], config.latent_channels)
    latent = torch.zeros(shape, requires_grad=trains_encoder)
    reconstruction = torch.zeros_like(images, requires_grad=True)

    def passes(network: Callable[..., torch.Tensor], *arguments: Any) -> int:
        return count(lambda: network(*arguments).sum().backward())

    def encode() -> None:
        with torch.set_grad_enabled(trains_encoder):
            encoded = step.tokenizer.encode(images, inputs["mask"], return_dict=False)[0]
        if trains_encoder:
            (encoded.parameters if config.gaussian_posterior else encoded).sum().backward()

    parts = {"encoder": count(encode), "decoder": passes(step.tokenizer.decoder, latent, grid)}
    for name, decoder in step.objective.auxiliary_decoders.items():
        parts[f"{name} decoder"] = passes(decoder, latent, *([] if name == "text" else [grid]))
    for name, target in step.objective.targets.items():
        parts[f"{name} target"] = count(functools.partial(target, images))
    if step.objective.perceptual is not None:
        parts["LPIPS"] = passes(step.objective.perceptual, reconstruction, images)
    if step.discriminator is not None:
        draws = step.draws(1)
        parts["adversarial term"] = passes(step.discriminator.generator_loss, reconstruction, draws)
        parts["discriminator's step"] = passes(lambda: step.discriminator(images, images, draws)["loss"])
        # gradients at the last pixel layer's weight, for their norms: one product each
        if step.recipe.adaptive_adversarial_weight:
            layer = step.tokenizer.decoder.proj_out
            parts["adaptive weight"] = 2 * 2 * grid[0] * grid[1] * layer.in_features * layer.out_features
    return parts


def per_image(name: str) -> dict[int, dict[str, int]]:
    """Operations of a step for one image by resolution and part."""
    recipe, stage_one = read_recipe(name)
    step, found = TrainingStep(recipe, stage_one), {}
    with FakeTensorMode():
        step.allocate("cpu")
        for resolution in recipe.training_resolutions:
            found[resolution] = count_parts(step, resolution)
            whole = count(functools.partial(step.passes, 1, resolution))
            assert sum(found[resolution].values()) == whole, f"{name}: the parts are not the whole, {whole}"
    return found


def training_flops(recipe: TokenizerRecipe, parts: dict[int, dict[str, int]]) -> float:
    """
    Operations of the whole training.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        parts (`dict[int, dict[str, int]]`): Operations for one image by resolution and part.

    Returns:
        `float`: Means over the recipe's resolutions, times images; the discriminator counts from its first step on.
    """
    resolutions = recipe.training_resolutions
    weights = recipe.mixed_resolution_weights or [1.0] * len(resolutions)
    adversarial_steps = recipe.max_train_steps - recipe.adversarial_start_step
    total = 0.0
    for resolution, weight in zip(resolutions, weights, strict=True):
        adversarial = sum(value for name, value in parts[resolution].items() if name in ADVERSARIAL)
        always = sum(parts[resolution].values()) - adversarial
        total += weight / sum(weights) * (always * recipe.max_train_steps + adversarial * adversarial_steps)
    return total * recipe.total_batch_size


def device_days(flops: float) -> dict[str, float]:
    """Days of one accelerator by its name, at the assumed share of its peak."""
    return {name: flops / (UTILIZATION * peak) / SECONDS_PER_DAY for name, peak in PEAK_FLOPS.items()}


def rounded(value: float) -> str:
    """Two digits that count, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def scientific(value: float) -> str:
    """Two digits that count, with an exponent."""
    return f"{value:.1e}".replace("e+", "e")


def cost_lines(flops: float) -> list[str]:
    """What a recipe says of its cost."""
    days = " or ".join(f"{rounded(value)} {name} days" for name, value in device_days(flops).items())
    return [
        f"# Cost: computed, not measured: {scientific(flops)} FLOPs, about {days} at {SHARE} of the dense bf16 peak",
        "# (python -m benchmarks.training_cost).",
    ]


def with_cost(text: str, flops: float) -> str:
    """The text of a recipe with its cost, which is the paragraph that begins with `# Cost:`."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("# Cost:"))
    last = next(number for number in range(first, len(lines)) if lines[number] == "#")
    return "\n".join([*lines[:first], *cost_lines(flops), *lines[last:]]) + "\n"


def measure(names: list[str]) -> dict[str, Any]:
    """The costs of recipes."""
    found = {}
    for name in names:
        recipe, parts = read_recipe(name)[0], per_image(name)
        flops = training_flops(recipe, parts)
        found[name] = {
            "flops_per_image": {str(resolution): values for resolution, values in parts.items()},
            "images": recipe.max_train_steps * recipe.total_batch_size,
            "training_flops": flops,
            "days_of_one_device": device_days(flops),
        }
        print(f"{name}: {flops:.3g} FLOPs", flush=True)
    return found


def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    rows = []
    for name, cost in report["recipes"].items():
        sums = [f"{sum(values.values()) / 1e9:.0f}" for values in cost["flops_per_image"].values()]
        rows.append(
            [
                name,
                " / ".join(cost["flops_per_image"]),
                " / ".join(sums),
                f"{cost['images'] / 1e6:.0f} M",
                scientific(cost["training_flops"]),
                *(rounded(cost["days_of_one_device"][device]) for device in PEAK_FLOPS),
            ]
        )
    main = [name for name in MAIN_RECIPES if name in report["recipes"]]
    columns = [next(iter(report["recipes"][name]["flops_per_image"].values())) for name in main]
    parts = list(dict.fromkeys(part for column in columns for part in column))
    by_part = [
        [part, *(f"{column[part] / 1e9:.1f}" if part in column else "" for column in columns)] for part in parts
    ]
    by_part.append(["all", *(f"{sum(column.values()) / 1e9:.1f}" for column in columns)])
    head = ["recipe", "image size", "GFLOP per image", "images", "FLOPs in all", *(f"{d} days" for d in PEAK_FLOPS)]
    return "\n".join(
        [
            "# What training a tokenizer costs",
            "",
            "Computed, not measured. GFLOP per image are those of a step with all losses, forward and backward. The "
            "steps before the discriminator begins have less, which the sum over the training takes into account. "
            "Days are those of one device; several share them.",
            "",
            *table(head, rows),
            "## GFLOP of one image by part",
            "",
            "Encoder (of stage 2: forward only) and decoders forward and backward; teachers (`target`) forward; LPIPS "
            "on both images, backward to the reconstruction. The adversarial term is the discriminator's look at a "
            "reconstruction and back; its own step looks at four images (an image and its reconstruction, each "
            "augmented twice).",
            "",
            *table(["part", *main], by_part),
            "## What is assumed",
            "",
            *(f"- {text}" for text in report["assumptions"]),
            f"- {machine_line(report['machine'])}",
            "",
            "```",
            report["command"],
            "```",
        ]
    )


def report_of(names: list[str]) -> dict[str, Any]:
    """Everything about the costs of recipes, in plain types."""
    peaks = ", ".join(f"{value / 1e12:g} TFLOP/s ({name})" for name, value in PEAK_FLOPS.items())
    return {
        "command": COMMAND,
        "assumptions": [
            "a multiply-add is 2 operations; matrix products, convolutions and attention (without recomputation) "
            "count, elementwise work does not",
            f"{SHARE} of the dense bfloat16 peak is used: of {peaks}; not measured, and LPIPS and the heads "
            "of the discriminator compute in float32, at a lower peak",
            "no gradient checkpointing, which would repeat the forward passes of encoder and decoder",
            "checkpoints, validation and statistics of the latents are not counted",
        ],
        "machine": machine("transformers", "timm", "lpips"),
        "recipes": measure(names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="Where the tables are written.")
    parser.add_argument("--update_recipes", action="store_true", help="Write the cost into the recipes.")
    args = parser.parse_args()
    report = report_of(tokenizer_recipes())
    write_results(args.results_dir, "training_cost", report, to_markdown(report))
    if args.update_recipes:
        for name, cost in report["recipes"].items():
            path = RECIPES / f"{name}.yaml"
            path.write_text(with_cost(path.read_text(encoding="utf-8"), cost["training_flops"]), encoding="utf-8")
    print(f"\n{to_markdown(report)}")


if __name__ == "__main__":
    main()
