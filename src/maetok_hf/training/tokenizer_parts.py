"""
From a recipe to the modules of a tokenizer's training run: what is trained, and the frozen networks beside it. Weights
are initialised from seeds of their own, and the random state of the caller stays what it is.
"""

import torch

from ..models.autoencoder_mae import AutoencoderMAE
from ..seeding import keyed_seed
from .auxiliary import AuxiliaryDecoder
from .discriminator import Discriminator
from .discriminator_objective import DiscriminatorObjective
from .perceptual import PerceptualLoss
from .targets import FeatureTarget, HOGTarget
from .teachers import load_teacher
from .text_target import CaptionTokenizer, TextDecoder
from .tokenizer_objective import TokenizerObjective
from .tokenizer_recipe import TokenizerRecipe


@torch.random.fork_rng(devices=[])
def make_tokenizer(recipe: TokenizerRecipe, seed: int, pretrained_model_name_or_path: str | None) -> AutoencoderMAE:
    """
    The tokenizer to train: freshly initialised in stage 1, an existing one in stage 2.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        seed (`int`): Seed of the initialisation.
        pretrained_model_name_or_path (`str`, *optional*): Where stage 2 begins.

    Returns:
        [`AutoencoderMAE`]: On the CPU, in float32.

    Raises:
        ValueError: If a tokenizer to start from is missing or superfluous, or does not fit the recipe's resolutions.
    """
    if (recipe.stage == "decoder_finetuning") != (pretrained_model_name_or_path is not None):
        raise ValueError(
            "`pretrained_model_name_or_path` names the tokenizer that stage 'decoder_finetuning' starts from; it is "
            f"{pretrained_model_name_or_path!r} and the recipe's `stage` is {recipe.stage!r}."
        )
    if pretrained_model_name_or_path is None:
        torch.default_generator.manual_seed(keyed_seed(seed, "initialisation"))
        tokenizer = AutoencoderMAE(sample_size=recipe.resolution, **recipe.model)
    else:
        tokenizer = AutoencoderMAE.from_pretrained(pretrained_model_name_or_path)
        if tokenizer.config.sample_size != recipe.resolution:
            raise ValueError(
                f"`resolution` is {recipe.resolution}, but {pretrained_model_name_or_path} is built for "
                f"{tokenizer.config.sample_size}: use the recipe of that size."
            )
    for resolution in recipe.training_resolutions:
        if resolution % tokenizer.config.patch_size:
            raise ValueError(
                f"a resolution of the recipe is {resolution}, but must be a multiple of the tokenizer's patches of "
                f"{tokenizer.config.patch_size} pixels."
            )
    return tokenizer


def make_targets(recipe: TokenizerRecipe, patch_size: int) -> dict[str, FeatureTarget]:
    """
    The feature targets that a recipe names.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        patch_size (`int`): Side in pixels of the tokenizer's patches.

    Returns:
        `dict[str, FeatureTarget]`: Targets by name.
    """
    targets: dict[str, FeatureTarget] = {}
    for name in recipe.feature_targets:
        if name == "hog":
            targets[name] = HOGTarget(patch_size)
        else:
            model = recipe.dinov2_model if name == "dinov2" else recipe.siglip_model
            dtype = getattr(torch, recipe.teacher_dtype)
            targets[name] = load_teacher(name, model, patch_size, feature_loss=recipe.teacher_loss, dtype=dtype)
    return targets


def make_caption_tokenizer(recipe: TokenizerRecipe) -> CaptionTokenizer | None:
    """What turns captions into the tokens that the text decoder predicts, if the recipe has it predict any."""
    if not recipe.predicts_text:
        return None
    return CaptionTokenizer.from_pretrained(recipe.text_tokenizer, max_length=recipe.text_length)


@torch.random.fork_rng(devices=[])
def make_discriminator_objective(recipe: TokenizerRecipe, seed: int) -> DiscriminatorObjective | None:
    """
    The discriminator and its losses, `None` if the recipe trains without.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        seed (`int`): Seed of the initialisation of the heads.
    """
    if recipe.adversarial_weight == 0:
        return None
    torch.default_generator.manual_seed(keyed_seed(seed, "initialisation of the discriminator"))
    discriminator = Discriminator.from_timm(
        recipe.discriminator_model, recipe.discriminator_input, recipe.discriminator_image_size
    )
    return DiscriminatorObjective(
        discriminator,
        loss=recipe.adversarial_loss,
        lecam_weight=recipe.lecam_weight,
        lecam_decay=recipe.lecam_decay,
        consistency_weight=recipe.consistency_weight,
        diffaugment=recipe.diffaugment,
        diffaugment_probability=recipe.diffaugment_probability,
        diffaugment_cutout=recipe.diffaugment_cutout,
    )


@torch.random.fork_rng(devices=[])
def make_tokenizer_objective(
    recipe: TokenizerRecipe,
    tokenizer: AutoencoderMAE,
    seed: int,
    discriminator: DiscriminatorObjective | None = None,
    caption_tokenizer: CaptionTokenizer | None = None,
) -> TokenizerObjective:
    """
    The objective of a tokenizer, with fresh auxiliary decoders.

    Args:
        recipe ([`TokenizerRecipe`]): The recipe.
        tokenizer ([`AutoencoderMAE`]): From [`make_tokenizer`].
        seed (`int`): Seed of the initialisation.
        discriminator ([`DiscriminatorObjective`], *optional*): From [`make_discriminator_objective`].
        caption_tokenizer ([`CaptionTokenizer`], *optional*): From [`make_caption_tokenizer`].

    Returns:
        [`TokenizerObjective`]: On the CPU.
    """
    sizes = {
        "hidden_size": recipe.auxiliary_hidden_size,
        "num_layers": recipe.auxiliary_num_layers,
        "num_attention_heads": recipe.auxiliary_num_attention_heads,
    }
    weights = {"reconstruction": recipe.reconstruction_weight}
    targets = make_targets(recipe, tokenizer.config.patch_size)
    decoders, text_decoder, perceptual = {}, None, None
    for name, target in targets.items():
        # each from a seed of its own, so that an ablation leaves the others as they were
        torch.default_generator.manual_seed(keyed_seed(seed, f"initialisation of the {name} decoder"))
        decoders[name] = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, target.feature_dim, **sizes)
        weights[name] = getattr(recipe, f"{name}_weight")
    if caption_tokenizer is not None:
        torch.default_generator.manual_seed(keyed_seed(seed, "initialisation of the text decoder"))
        text_decoder = TextDecoder.from_tokenizer_config(
            tokenizer.config, caption_tokenizer.vocab_size, caption_tokenizer.max_length, **sizes
        )
        weights["text"] = recipe.text_weight
    if tokenizer.config.gaussian_posterior and recipe.stage == "mask_modelling":
        weights["kl"] = recipe.kl_weight
    if recipe.perceptual_weight > 0:
        perceptual = PerceptualLoss.from_pretrained(recipe.perceptual_network)
        weights["perceptual"] = recipe.perceptual_weight
    if discriminator is not None:
        weights["adversarial"] = recipe.adversarial_weight
    return TokenizerObjective(
        tokenizer,
        targets,
        decoders,
        weights,
        decoder_only=recipe.stage == "decoder_finetuning",
        text_decoder=text_decoder,
        perceptual=perceptual,
        adversary=None if discriminator is None else discriminator.generator_loss,
        adaptive_adversarial_weight=recipe.adaptive_adversarial_weight,
    )
