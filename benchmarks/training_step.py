"""A step of `examples/train_maetok.py` without its data, processes and reports, for benchmarks that count its cost.

Networks have their published sizes and random weights, or none: nothing is downloaded.
"""

import contextlib
import functools
import math
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from maetok_hf import AutoencoderMAE
from maetok_hf.models import layers
from maetok_hf.training.discriminator_objective import sample_adversarial_draws
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.optim import clip_gradients, create_ema
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.tokenizer_parts import (
    make_caption_tokenizer,
    make_discriminator_objective,
    make_tokenizer,
    make_tokenizer_objective,
)
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe

from .machine import ROOT


RECIPES = ROOT / "examples" / "recipes"

# published sizes, from the `config.json` of the repositories
TEACHERS = {
    "facebook/dinov2-large": (
        "Dinov2Config",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "image_size": 518},
    ),
    "google/siglip-so400m-patch14-224": (
        "SiglipVisionConfig",
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
        },
    ),
    "google/siglip-large-patch16-256": (
        "SiglipVisionConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 16,
            "image_size": 256,
        },
    ),
}
CAPTION_VOCABULARY = 49408  # CLIP's
WEIGHT_STD = 0.02


@contextlib.contextmanager
def random_networks(teachers: Mapping[str, tuple[str, dict[str, Any]]] = TEACHERS) -> Iterator[None]:
    """
    Give everything that asks for published weights a network of the same shape with random ones.

    Args:
        teachers (`Mapping[str, tuple[str, dict]]`, *optional*): Class and arguments of the configs of teachers.
    """
    import lpips
    import timm
    import transformers

    def config(name: str, **_: Any) -> Any:
        kind, sizes = teachers[name]
        return getattr(transformers, kind)(**sizes)

    def model(name: str, config: Any, dtype: torch.dtype, **_: Any) -> tuple[torch.nn.Module, dict]:
        return transformers.AutoModel.from_config(config, dtype=dtype), {"missing_keys": []}

    statistics = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}, {}
    captions = types.SimpleNamespace(get_vocab=lambda: {"": CAPTION_VOCABULARY - 1})
    trunk = timm.create_model
    perceptual = functools.partial(lpips.LPIPS, pnet_rand=True, pretrained=False)
    with (
        patch("transformers.AutoConfig.from_pretrained", config),
        patch("transformers.AutoModel.from_pretrained", model),
        patch("transformers.AutoTokenizer.from_pretrained", lambda name: captions),
        patch("transformers.ImageProcessingMixin.get_image_processor_dict", lambda name: statistics),
        patch("timm.create_model", lambda name, **settings: trunk(name, **(settings | {"pretrained": False}))),
        patch("lpips.LPIPS", perceptual),
    ):
        yield


def read_recipe(name: str) -> tuple[TokenizerRecipe, TokenizerRecipe]:
    """A recipe by its name, and the one whose tokenizer it trains: of stage 1, itself."""
    recipe = load_recipe(TokenizerRecipe, RECIPES / f"{name}.yaml")
    if recipe.stage == "mask_modelling":
        return recipe, recipe
    return recipe, load_recipe(TokenizerRecipe, RECIPES / f"{name.removesuffix('-decoder')}.yaml")


def tokenizer_recipes() -> list[str]:
    """Names of the recipes of tokenizers that are not the demonstration's."""
    paths: list[Path] = [*RECIPES.glob("maetok-*.yaml"), *(RECIPES / "ablations").glob("*.yaml")]
    return [str(path.relative_to(RECIPES).with_suffix("")) for path in sorted(paths)]


def allocate(module: torch.nn.Module, device: str) -> None:
    """Replace parameters and buffers by zeros on a device."""
    # `to_empty` does not take fake tensors in the place of those that it finds
    for part in module.modules():
        for name, old in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device).zero_()
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, old.requires_grad)
            setattr(part, name, new)


@torch.no_grad()
def set_values(module: torch.nn.Module) -> None:
    """Give weights that are made without values normal ones: zeros would gate parts away, and cost less power."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(std=WEIGHT_STD, generator=generator))
    for buffer in module.buffers():
        buffer.fill_(float(buffer.is_floating_point()))  # variances among them; integers are places, and zero


class TrainingStep:
    """
    What a recipe trains, and a step of it. It is built without memory: call `allocate`. Within torch's
    `FakeTensorMode` that takes no memory either, and steps compute nothing but shapes.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        stage_one ([`TokenizerRecipe`]): The recipe that describes the tokenizer; `recipe` itself in stage 1.
        checkpointing_share (`float`, *optional*, defaults to 0.0): Share of the blocks that are recomputed.
    """

    def __init__(self, recipe: TokenizerRecipe, stage_one: TokenizerRecipe, checkpointing_share: float = 0.0):
        self.recipe = recipe
        with random_networks(), torch.device("meta"):
            self.tokenizer: AutoencoderMAE = make_tokenizer(stage_one, 0, None)
            captions = make_caption_tokenizer(recipe)
            self.discriminator = make_discriminator_objective(recipe, 0)
            self.objective = make_tokenizer_objective(recipe, self.tokenizer, 0, self.discriminator, captions)
        self.objective.train()
        enable_gradient_checkpointing(self.objective, checkpointing_share)

    def allocate(self, device: str, random_weights: bool = False) -> "TrainingStep":
        """
        Give everything memory, and make the optimisers and the moving average.

        Args:
            device (`str`): Where it computes from now on, in bfloat16 by autocast.
            random_weights (`bool`, *optional*, defaults to `False`): Whether weights are those of [`set_values`], for
                what is timed, or zeros, for what is computed.
        """
        self.device = device
        for module in (self.objective, *self.frozen, *filter(None, [self.discriminator])):
            allocate(module, device)
            if random_weights:
                set_values(module)
        self.optimizers = [self.recipe.make_optimizer(self.objective)]
        if self.discriminator is not None:
            rate = self.recipe.peak_discriminator_learning_rate
            self.optimizers.append(self.recipe.make_optimizer(self.discriminator, rate))
        self.ema = create_ema(self.tokenizer, self.recipe.ema_decay)
        return self

    @property
    def frozen(self) -> list[torch.nn.Module]:
        """Networks that are used and not trained."""
        networks = [*self.objective.targets.values(), self.objective.perceptual]
        if self.discriminator is not None:
            networks.append(self.discriminator.discriminator.trunk)
        return [network for network in networks if network is not None]

    def inputs(self, batch_size: int, resolution: int) -> dict[str, torch.Tensor]:
        """A batch as the objective takes it."""
        num_patches = (resolution // self.tokenizer.config.patch_size) ** 2
        shapes = {"pixel_values": (batch_size, 3, resolution, resolution), "mask": (batch_size, num_patches)}
        if self.tokenizer.config.gaussian_posterior:
            tokens = self.tokenizer.config.num_latent_tokens or num_patches
            shapes["posterior_noise"] = (batch_size, tokens, self.tokenizer.config.latent_channels)
        if self.recipe.predicts_text:
            shapes["token_indices"] = (batch_size, self.recipe.text_length)
        types_of = {"mask": torch.bool, "token_indices": torch.int64}
        return {
            name: torch.zeros(shape, dtype=types_of.get(name, torch.float32), device=self.device)
            for name, shape in shapes.items()
        }

    def random_inputs(self, batch_size: int, resolution: int) -> dict[str, torch.Tensor]:
        """The like with values: pixels from -1 to 1, two fifths of the patches masked."""
        generator = torch.Generator().manual_seed(1)
        inputs = self.inputs(batch_size, resolution)
        for name, tensor in inputs.items():
            if name == "mask":
                values = torch.rand(tensor.shape, generator=generator) < 0.4
            elif name == "token_indices":
                values = torch.randint(CAPTION_VOCABULARY - 1, tensor.shape, generator=generator)
            else:
                values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.clamp(-1, 1) if name == "pixel_values" else values)
        return inputs

    def draws(self, batch_size: int) -> dict[str, torch.Tensor]:
        """What is random in a look of the discriminator."""
        draws = sample_adversarial_draws(0, "benchmark", 0, range(batch_size))
        return {name: draw.to(self.device) for name, draw in draws.items()}

    def passes(
        self,
        batch_size: int,
        resolution: int,
        adversarial: bool = True,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """
        Forward and backward passes of one batch.

        Args:
            batch_size (`int`): Images.
            resolution (`int`): Their height and width in pixels.
            adversarial (`bool`, *optional*, defaults to `True`): Whether the discriminator has begun, if there is one.
            inputs (`Mapping[str, torch.Tensor]`, *optional*): The batch; `None` for zeros.
        """
        judged = adversarial and self.discriminator is not None
        inputs = self.inputs(batch_size, resolution) if inputs is None else inputs
        draws = self.draws(batch_size) if judged else None
        with torch.autocast(self.device, torch.bfloat16):
            scales = {"adversarial": float(adversarial)}
            terms, reconstructions = self.objective(**inputs, scales=scales, adversarial_draws=draws)
        terms["loss"].backward()
        if judged:
            with torch.autocast(self.device, torch.bfloat16):
                opinion = self.discriminator(inputs["pixel_values"], reconstructions, draws)
            opinion["loss"].backward()

    def __call__(self, batch_size: int, resolution: int, inputs: Mapping[str, torch.Tensor] | None = None) -> None:
        """A whole step with all losses, also the optimisers' and the moving average's part."""
        self.passes(batch_size, resolution, inputs=inputs)
        clip_gradients(self.objective.trainable_parameters(), self.recipe.max_grad_norm)
        if self.discriminator is not None:
            clip_gradients(self.discriminator.parameters(), self.recipe.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.discriminator is not None:
            self.discriminator.end_step()
        self.ema.step(self.tokenizer.parameters())


def keys_as_on_a_gpu() -> contextlib.AbstractContextManager:
    """While it is open, no keys are padded, which only CPUs gain by: for what is computed and not measured."""
    return patch.object(layers, "_PADDED_KEYS", ())


def num_bytes(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
