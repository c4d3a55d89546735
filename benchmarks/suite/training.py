"""Steps of training, forward and backward passes with the optimiser and the moving average."""

from functools import partial
from typing import Any

import torch

from maetok_hf.training.flow_matching import FlowMatchingObjective, sample_flow_draws
from maetok_hf.training.optim import clip_gradients, create_ema
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from ..training_step import RECIPES, TrainingStep
from .cases import Case, Settings, Work
from .models import NUM_CHANNELS, NUM_TOKENS, TRANSFORMERS, transformer, transformer_inputs


TOKENIZER_RECIPE = "maetok-b-128-256"
WITHOUT_DISCRIMINATOR = {"adversarial_weight": 0.0}
LOSSES: dict[str, dict[str, Any]] = {
    "pixels": {"auxiliary_targets": [], "perceptual_weight": 0.0, **WITHOUT_DISCRIMINATOR},
    "pixels and auxiliary decoders": {"perceptual_weight": 0.0, **WITHOUT_DISCRIMINATOR},
    "all losses, discriminator": {},
}


def tokenizer_step(settings: Settings, losses: str, batch_size: int) -> Work:
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"{TOKENIZER_RECIPE}.yaml", LOSSES[losses])
    step = TrainingStep(recipe, recipe).allocate(settings.device)

    def compile_blocks() -> None:
        step.objective.compile_repeated_blocks(fullgraph=True)

    return Work(partial(step, batch_size, 256), batch_size, compile_blocks)


def generator_step(settings: Settings, size: str, batch_size: int) -> Work:
    recipe = load_recipe(SiTRecipe, RECIPES / f"{TRANSFORMERS[size]}.yaml")
    model = transformer(size).to(settings.torch_device).train()
    objective = FlowMatchingObjective(model, density=recipe.time_density, direction_weight=recipe.direction_weight)
    optimizer, ema = recipe.make_optimizer(objective), create_ema(model, recipe.ema_decay)
    latents, _, labels = transformer_inputs(batch_size, settings.torch_device, torch.float32)
    shape = (NUM_TOKENS, NUM_CHANNELS)

    def step() -> None:
        draws = sample_flow_draws(0, 0, range(batch_size), shape, recipe.time_density)
        draws = {name: value.to(settings.torch_device) for name, value in draws._asdict().items() if value is not None}
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            loss = objective(latents, labels, **draws)["loss"]
        loss.backward()
        clip_gradients(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return Work(step, batch_size, lambda: model.compile_repeated_blocks(fullgraph=True))


CASES = [
    *(
        Case(
            "training",
            f"tokenizer, ViT-B, 256 x 256, {losses}, batch {batch}",
            partial(tokenizer_step, losses=losses, batch_size=batch),
            dtypes=("bfloat16",),  # as it is trained
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
            devices=(device,),
        )
        for device, size, batch in (("cpu", "SiT-B", 8), ("cuda", "SiT-B", 256), ("cuda", "SiT-XL", 64))
    ),
]
