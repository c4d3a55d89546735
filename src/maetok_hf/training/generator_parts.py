"""From a recipe to the modules of a generator's training run."""

import torch
from diffusers import ModelMixin

from ..seeding import keyed_seed
from .alignment import FeatureAlignment, check_patches_per_token
from .flow_matching import FlowMatchingObjective
from .flow_recipe import FlowRecipe
from .sit_recipe import SiTRecipe
from .teachers import load_teacher


def make_transformer(
    recipe: SiTRecipe,
    latent_shape: tuple[int, int],
    num_classes: int | None,
    seed: int,
    pretrained_model_name_or_path: str | None = None,
) -> ModelMixin:
    """
    The transformer to train: freshly initialised, or for fine-tuning an existing one.

    A trained transformer that is fine-tuned for sampling without guidance gets its temperature embedding here, which
    begins at zero: its outputs are what they were.

    Args:
        recipe ([`SiTRecipe`]): The recipe.
        latent_shape (`tuple[int, int]`): Tokens and channels of the tokenizer's latents.
        num_classes (`int`, *optional*): Classes of the data set, if it says.
        seed (`int`): Seed of the initialisation.
        pretrained_model_name_or_path (`str`, *optional*): Pipeline (folder or Hub repository) with the transformer
            that fine-tuning begins with.

    Returns:
        `ModelMixin`: Of the recipe's architecture, on the CPU, in float32.

    Raises:
        ValueError: If a pipeline to start from is missing or superfluous, the number of classes is unknown or
            contradictory, or the trained transformer does not fit the recipe, the latents or the data set.
    """
    if recipe.finetuning != (pretrained_model_name_or_path is not None):
        raise ValueError(
            "`pretrained_model_name_or_path` names the pipeline that fine-tuning starts from; it is "
            f"{pretrained_model_name_or_path!r} and the recipe's `finetuning` is {recipe.finetuning}."
        )
    if pretrained_model_name_or_path is not None:
        transformer = _trained_transformer(recipe, latent_shape, num_classes, seed, pretrained_model_name_or_path)
        check_samples(recipe, transformer)
        return transformer

    settings = dict(recipe.model)
    given = settings.pop("num_classes", None)
    if num_classes is None and given is None:
        raise ValueError("The data set does not say how many classes it has: give `--model num_classes=...`.")
    if num_classes is not None and given is not None and num_classes != given:
        raise ValueError(f"`model` sets num_classes={given}, but the data set has {num_classes} classes.")
    torch.manual_seed(keyed_seed(seed, "initialisation"))
    transformer = recipe.transformer_class(
        sample_size=latent_shape[0],
        in_channels=latent_shape[1],
        num_classes=num_classes or given,
        temperature_embedding=recipe.guidance_free,
        **settings,
    )
    check_samples(recipe, transformer)
    return transformer


def check_samples(recipe: FlowRecipe, transformer: ModelMixin) -> None:
    """
    Args:
        recipe ([`FlowRecipe`]): The recipe.
        transformer (`ModelMixin`): What it trains.

    Raises:
        ValueError: If the samples that the run is to show need guidance that the transformer does not learn. Better
            now than at the first picture.
    """
    if recipe.guidance_scale != 1 and transformer.config.class_dropout_prob == 0:
        raise ValueError(
            f"`guidance_scale` is {recipe.guidance_scale}, but the transformer is trained without dropping classes "
            "(its `class_dropout_prob` is 0), so that its samples cannot be guided: set it to 1."
        )


def _trained_transformer(
    recipe: SiTRecipe, latent_shape: tuple[int, int], num_classes: int | None, seed: int, source: str
) -> ModelMixin:
    """The transformer of a pipeline, with a temperature embedding if the recipe asks for one."""
    transformer_class = recipe.transformer_class
    saved = transformer_class.load_config(source, subfolder="transformer")["_class_name"]
    if saved != transformer_class.__name__:
        raise ValueError(
            f"`architecture` is {recipe.architecture!r}, a {transformer_class.__name__}, but the transformer of "
            f"{source} is a {saved}: choose the recipe of its architecture."
        )
    transformer = transformer_class.from_pretrained(source, subfolder="transformer", dtype=torch.float32)
    config = transformer.config
    if (config.sample_size, config.in_channels) != tuple(latent_shape):
        raise ValueError(
            f"the transformer of {source} is made for {config.sample_size} tokens of {config.in_channels} channels, "
            f"but the tokenizer has {latent_shape[0]} of {latent_shape[1]}: use the tokenizer it was trained with."
        )
    if num_classes is not None and num_classes != config.num_classes:
        raise ValueError(
            f"the transformer of {source} is made for {config.num_classes} classes, but the data set has "
            f"{num_classes}."
        )
    if recipe.guidance_free:
        if config.class_dropout_prob == 0:
            raise ValueError(
                f"the transformer of {source} was trained without dropping classes (`class_dropout_prob` is 0), so it "
                "has no unguided velocity to learn from: `guidance_free` needs one that was."
            )
        torch.manual_seed(keyed_seed(seed, "initialisation"))
        transformer.enable_temperature_embedding()
    return transformer


def make_flow_objective(
    recipe: SiTRecipe, transformer: ModelMixin, patch_size: int, seed: int, cached_feature_dim: int | None = None
) -> FlowMatchingObjective:
    """
    The objective of a generator; with an alignment, a fresh projector and the frozen model are part of it.

    With features that are cached the frozen model is neither needed nor loaded; the projector is the same one.

    Args:
        recipe ([`SiTRecipe`]): The recipe.
        transformer (`ModelMixin`): From [`make_transformer`].
        patch_size (`int`): Side in pixels of the tokenizer's patches, which are those of the alignment.
        seed (`int`): Seed of the initialisation.
        cached_feature_dim (`int`, *optional*): Features of a token where they come with the batches, see
            [`~maetok_hf.training.token_features`].

    Returns:
        [`FlowMatchingObjective`]: On the CPU.

    Raises:
        OSError: If the frozen model cannot be found or read.
        ValueError: If the transformer does not fit the recipe.
    """
    alignment = None
    if recipe.alignment_weight > 0:
        check_patches_per_token((recipe.resolution // patch_size) ** 2, transformer.config.sample_size)
        target = None
        if cached_feature_dim is None:
            dtype = getattr(torch, recipe.alignment_dtype)
            target = load_teacher("dinov2", recipe.alignment_model, patch_size, dtype=dtype)
        torch.manual_seed(keyed_seed(seed, "initialisation of the projector"))
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        alignment = FeatureAlignment(
            target, width, recipe.alignment_layer, recipe.alignment_hidden_size, cached_feature_dim
        )
    return FlowMatchingObjective(
        transformer,
        density=recipe.time_density,
        time_shift=recipe.time_shift,
        direction_weight=recipe.direction_weight,
        guidance_free=recipe.guidance_free,
        alignment=alignment,
        alignment_weight=recipe.alignment_weight,
    )
