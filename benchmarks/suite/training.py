"""Steps of training, forward and backward passes with the optimiser and the moving average."""

from functools import partial
from typing import Any

from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from ..checkpointing_curve import GeneratorStep
from ..training_step import RECIPES, TrainingStep
from .cases import Case, Settings, Work
from .models import TRANSFORMERS


TOKENIZER_RECIPE = "maetok-b-128-256"
WITHOUT_DISCRIMINATOR = {"adversarial_weight": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "pixels": {"auxiliary_targets": [], "perceptual_weight": 0.0, **WITHOUT_DISCRIMINATOR},
    "pixels and auxiliary decoders": {"perceptual_weight": 0.0, **WITHOUT_DISCRIMINATOR},
    "all losses, discriminator": {},
}


def tokenizer_step(settings: Settings, losses: str, batch_size: int) -> Work:
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"{TOKENIZER_RECIPE}.yaml", LOSSES[losses])
    step = TrainingStep(recipe, recipe).allocate(settings.device, random_weights=True)
    inputs = step.random_inputs(batch_size, recipe.resolution)

    def compile_blocks() -> None:
        step.objective.compile_repeated_blocks(fullgraph=True)
        if step.discriminator is not None:
            step.discriminator.discriminator.compile_repeated_blocks(fullgraph=True)

    return Work(partial(step, batch_size, recipe.resolution, inputs), batch_size, compile_blocks)


def generator_step(settings: Settings, size: str, batch_size: int) -> Work:
    recipe = load_recipe(SiTRecipe, RECIPES / f"{TRANSFORMERS[size]}.yaml")
    step = GeneratorStep(recipe).allocate(settings.device, random_weights=True)
    return Work(
        partial(step, batch_size, step.random_inputs(batch_size)),
        batch_size,
        lambda: step.transformer.compile_repeated_blocks(fullgraph=True),
    )


CASES = [
    *(
        Case(
            "training",
            f"tokenizer, ViT-B, 256 x 256, {losses}, batch {batch}",
            partial(tokenizer_step, losses=losses, batch_size=batch),
            dtypes=("bfloat16",),  # as it is trained
            modes=("eager", "compiled"),
            devices=(device,),
        )
        for losses in LOSSES
        for device, batch in (("cpu", 2), ("cuda", 32))
    ),
    *(
        Case(
            "training",
            f"{size} on cached latents, batch {batch}",
            partial(generator_step, size=size, batch_size=batch),
            dtypes=("bfloat16",),
            modes=("eager", "compiled"),
            devices=(device,),
        )
        for device, size, batch in (("cpu", "SiT-B", 8), ("cuda", "SiT-B", 256), ("cuda", "SiT-XL", 64))
    ),
]
