"""What defines a training run's result: [`TokenizerRecipe`] and [`SiTRecipe`].

A recipe holds everything that changes what is learned (sizes, losses, schedules) and nothing about where and on how
many devices it is learned; that is [`RunOptions`](run_options). The defaults are the published values of MAETok (arXiv
2502.03444) unless said otherwise.
"""

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .configuration import add_flags, build, check_value, closest, given_flags, read_yaml
from .optim import learning_rate_at, scale_learning_rate, weight_decay_groups


R = TypeVar("R", bound="OptimizationRecipe")
Options = TypeVar("Options")


def _positive(recipe: Any, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(recipe, name)}.")


def _at_least_zero(recipe: Any, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) >= 0:
            raise ValueError(f"`{name}` must be 0 or more, got {getattr(recipe, name)}.")


def _fraction(recipe: Any, *names: str, below_one: bool = False) -> None:
    for name in names:
        value = getattr(recipe, name)
        if not (0 <= value < 1 if below_one else 0 <= value <= 1):
            interval = "[0, 1)" if below_one else "[0, 1]"
            raise ValueError(f"`{name}` must lie in {interval}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class OptimizationRecipe:
    """
    What both kinds of training share.

    Args:
        resolution (`int`, *optional*, defaults to 256):
            Height and width of the training images in pixels.
        random_flip (`bool`, *optional*, defaults to `True`):
            Mirror each image horizontally with probability 0.5.
        total_batch_size (`int`, *optional*):
            Images per optimisation step, over all processes and accumulated micro-batches.
        max_train_steps (`int`, *optional*):
            Optimisation steps of the whole run.
        learning_rate (`float`, *optional*, defaults to 1e-4):
            Learning rate after the warm-up.
        scale_learning_rate (`bool`, *optional*):
            Multiply `learning_rate` by `total_batch_size / 256`.
        lr_scheduler (`str`, *optional*):
            `"constant"`, or `"cosine"` for a half cosine from the end of the warm-up to 0 at `max_train_steps`.
        lr_warmup_steps (`int`, *optional*):
            Steps over which the learning rate rises linearly from 0.
        adam_beta1 (`float`, *optional*, defaults to 0.9):
            Decay of AdamW's first moment.
        adam_beta2 (`float`, *optional*):
            Decay of AdamW's second moment.
        adam_epsilon (`float`, *optional*, defaults to 1e-8):
            Added to the root of AdamW's second moment.
        weight_decay (`float`, *optional*):
            Decoupled weight decay of the matrices; norms, biases, tokens, positions and rotary frequencies have none.
        max_grad_norm (`float`, *optional*, defaults to 1.0):
            Gradients with a larger Euclidean norm are scaled down to it.
        ema_decay (`float`, *optional*, defaults to 0.9999):
            Constant decay per step of the moving average of the weights, which is what the run exports.
    """

    resolution: int = 256
    random_flip: bool = True
    total_batch_size: int = 256
    max_train_steps: int = 400_000
    learning_rate: float = 1e-4
    scale_learning_rate: bool = False
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        _positive(self, "resolution", "total_batch_size", "max_train_steps", "learning_rate", "adam_epsilon")
        _positive(self, "max_grad_norm")
        _at_least_zero(self, "lr_warmup_steps", "weight_decay")
        _fraction(self, "adam_beta1", "adam_beta2", "ema_decay", below_one=True)
        self.learning_rate_at(0)  # refuses a cosine that is all warm-up

    @property
    def peak_learning_rate(self) -> float:
        """`float`: Learning rate after the warm-up, scaled with the batch if the recipe says so."""
        if not self.scale_learning_rate:
            return self.learning_rate
        return scale_learning_rate(self.learning_rate, self.total_batch_size)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0; see [`~maetok_hf.training.optim.learning_rate_at`]."""
        return learning_rate_at(
            step, self.peak_learning_rate, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps
        )

    def make_optimizer(self, module: torch.nn.Module) -> torch.optim.AdamW:
        """AdamW over the trainable parameters of a module, with weight decay on its matrices only."""
        return torch.optim.AdamW(
            weight_decay_groups(module, self.weight_decay),
            lr=self.peak_learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
        )

    def unused_settings(self) -> dict[str, str]:
        """Settings that this recipe's other choices leave without effect, with the reason; setting one is an error."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(OptimizationRecipe):
    """
    How an [`AutoencoderMAE`] is trained (MAETok sections 3.2 and 3.3, table of hyper-parameters in the appendix).

    Args:
        stage (`str`, *optional*, defaults to `"mask_modelling"`):
            `"mask_modelling"` trains everything with masked patches and auxiliary targets; `"decoder_finetuning"`
            continues from a trained tokenizer whose encoder is frozen.
        model (`dict`, *optional*, defaults to `{}`):
            Arguments of [`AutoencoderMAE`]. Flags are merged into it. `sample_size` is `resolution`, the latent
            statistics are measured.
        crop (`str`, *optional*, defaults to `"center"`):
            `"center"` (the paper), or `"random"`: a random crop of 0.8 to 1 of the short side (the released code).
        mask_ratio_mean (`float`, *optional*, defaults to 0.6):
            Mean of the truncated normal from which each step's mask ratio is drawn.
        mask_ratio_std (`float`, *optional*, defaults to 0.25):
            Standard deviation of that normal before truncation.
        mask_ratio_min (`float`, *optional*, defaults to 0.4):
            Lower bound of the mask ratio.
        mask_ratio_max (`float`, *optional*, defaults to 0.6):
            Upper bound of the mask ratio; 0 for both bounds trains without masks, and auxiliary targets then count
            every patch.
        mask_ratio_start (`float`, *optional*, defaults to 0.6):
            Mask ratio of decoder fine-tuning at its first step.
        mask_ratio_end (`float`, *optional*, defaults to 0.0):
            Mask ratio of decoder fine-tuning once its decay is over.
        mask_ratio_decay_steps (`int`, *optional*, defaults to 50000):
            Steps over which that ratio falls linearly.
        reconstruction_weight (`float`, *optional*, defaults to 1.0):
            Weight of the pixel mean squared error.
        kl_weight (`float`, *optional*, defaults to 1e-6):
            Weight of the Kullback-Leibler term of the KL-VAE baseline (`gaussian_posterior` in `model`).
        auxiliary_targets (`list[str]`, *optional*, defaults to `["hog"]`):
            Features that shallow auxiliary decoders predict at masked patches.
        hog_weight (`float`, *optional*, defaults to 1.0):
            Weight of the HOG target's mean squared error.
        auxiliary_num_layers (`int`, *optional*, defaults to 3):
            Depth of each auxiliary decoder; 0 is a single linear layer.
        auxiliary_hidden_size (`int`, *optional*, defaults to 192):
            Width of each auxiliary decoder.
        auxiliary_num_attention_heads (`int`, *optional*, defaults to 3):
            Attention heads of each auxiliary decoder.
        latent_statistics (`str`, *optional*, defaults to `"scalar"`):
            Whether the exported mean and standard deviation of the latents are one number each (published) or one
            per `"channel"`.
        latent_statistics_images (`int`, *optional*, defaults to 50000):
            Training images over which they are measured, or all when there are fewer.
    """

    total_batch_size: int = 512
    max_train_steps: int = 500_000
    scale_learning_rate: bool = True
    lr_scheduler: Literal["constant", "cosine"] = "cosine"
    lr_warmup_steps: int = 10_000
    adam_beta2: float = 0.95
    weight_decay: float = 1e-4

    stage: Literal["mask_modelling", "decoder_finetuning"] = "mask_modelling"
    model: dict = field(default_factory=dict)
    crop: Literal["center", "random"] = "center"
    mask_ratio_mean: float = 0.6
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.4
    mask_ratio_max: float = 0.6
    mask_ratio_start: float = 0.6
    mask_ratio_end: float = 0.0
    mask_ratio_decay_steps: int = 50_000
    reconstruction_weight: float = 1.0
    kl_weight: float = 1e-6
    auxiliary_targets: list[Literal["hog"]] = field(default_factory=lambda: ["hog"])
    hog_weight: float = 1.0
    auxiliary_num_layers: int = 3
    auxiliary_hidden_size: int = 192
    auxiliary_num_attention_heads: int = 3
    latent_statistics: Literal["scalar", "channel"] = "scalar"
    latent_statistics_images: int = 50_000

    def __post_init__(self):
        super().__post_init__()
        from ..models.autoencoder_mae import AutoencoderMAE

        if self.stage == "decoder_finetuning" and self.model:
            raise ValueError(
                f"`model` must be empty when `stage` is 'decoder_finetuning', got {self.model}: the sizes come from "
                "the tokenizer that is fine-tuned."
            )
        derived = {"sample_size": "`resolution`", "latents_mean": "the training", "latents_std": "the training"}
        check_model_settings(AutoencoderMAE, self.model, derived)
        _positive(self, "mask_ratio_std", "mask_ratio_decay_steps", "auxiliary_hidden_size")
        _positive(self, "auxiliary_num_attention_heads", "latent_statistics_images", "reconstruction_weight")
        _at_least_zero(self, "kl_weight", "hog_weight", "auxiliary_num_layers")
        _fraction(self, "mask_ratio_mean", "mask_ratio_min", "mask_ratio_max", "mask_ratio_start", "mask_ratio_end")
        if self.mask_ratio_min > self.mask_ratio_max:
            raise ValueError(
                f"`mask_ratio_min` must not exceed `mask_ratio_max`, got {self.mask_ratio_min} and "
                f"{self.mask_ratio_max}."
            )
        if len(set(self.auxiliary_targets)) < len(self.auxiliary_targets):
            raise ValueError(f"`auxiliary_targets` names a target twice: {self.auxiliary_targets}.")

    def unused_settings(self) -> dict[str, str]:
        unused: dict[str, str] = {}
        mask_modelling = [name for name in self.__dataclass_fields__ if name.startswith("auxiliary_")]
        mask_modelling += ["mask_ratio_mean", "mask_ratio_std", "mask_ratio_min", "mask_ratio_max", "hog_weight"]
        decoder = ["mask_ratio_start", "mask_ratio_end", "mask_ratio_decay_steps"]
        for name in decoder if self.stage == "mask_modelling" else mask_modelling:
            unused[name] = f"`stage` is {self.stage!r}"
        if self.stage == "mask_modelling" and not self.auxiliary_targets:
            sizes = [name for name in mask_modelling if name.startswith("auxiliary_") and name != "auxiliary_targets"]
            unused |= dict.fromkeys(sizes, "`auxiliary_targets` is empty")
        if "hog" not in self.auxiliary_targets:
            unused.setdefault("hog_weight", "'hog' is not in `auxiliary_targets`")
        if self.stage == "mask_modelling" and not self.model.get("gaussian_posterior", False):
            unused["kl_weight"] = "`model` has no `gaussian_posterior`"
        if self.stage == "decoder_finetuning":
            unused["kl_weight"] = "the frozen encoder has no KL term"
        return unused


@dataclass(frozen=True, kw_only=True)
class SiTRecipe(OptimizationRecipe):
    """
    How a [`SiTTransformer1DModel`] is trained on a tokenizer's latents (MAETok section 4.1; SiT, arXiv 2401.08740).

    Args:
        model (`dict`, *optional*, defaults to `{}`):
            Arguments of [`SiTTransformer1DModel`]. Flags are merged into it. `sample_size` and `in_channels` come from
            the tokenizer; `num_classes` from the data set, unless that does not say.
        time_density (`str`, *optional*, defaults to `"uniform"`):
            Density of the training times: `"uniform"`, or `"lognormal"`, whose logarithm of noise over data is normal.
        time_shift (`float`, *optional*, defaults to 1.0):
            Factor s of t' = s t / (1 + (s - 1) t), the square root of latent size / 4096; 1 changes nothing.
    """

    model: dict = field(default_factory=dict)
    time_density: Literal["uniform", "lognormal"] = "uniform"
    time_shift: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        from ..models.transformer_sit import SiTTransformer1DModel

        derived = {"sample_size": "the tokenizer", "in_channels": "the tokenizer"}
        check_model_settings(SiTTransformer1DModel, self.model, derived)
        _positive(self, "time_shift")


def check_model_settings(model_class: type, settings: Mapping[str, Any], derived: Mapping[str, str]) -> None:
    """
    Check a recipe's `model` section against the model's constructor.

    Args:
        model_class (`type`): The model.
        settings (`Mapping[str, Any]`): Its arguments.
        derived (`Mapping[str, str]`): Arguments that are not free, with the place that determines them.

    Raises:
        ValueError: If an argument is unknown, not free, or of the wrong type.
    """
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    annotations = typing.get_type_hints(model_class.__init__)
    for name, value in settings.items():
        if name in derived:
            raise ValueError(f"`model` must not set {name!r}: it is determined by {derived[name]}.")
        if name not in known:
            raise ValueError(f"`model` sets {name!r}, which {model_class.__name__} lacks{closest(str(name), known)}")
        check_value(f"model: {name}", value, annotations[name])


def load_recipe(cls: type[R], path: str | Path, overrides: Mapping[str, Any] | None = None) -> R:
    """
    Read a recipe.

    Args:
        cls (`type`): [`TokenizerRecipe`] or [`SiTRecipe`].
        path (`str` or `Path`): A YAML file of field names and values.
        overrides (`Mapping[str, Any]`, *optional*): Values that replace the file's; `model` is merged key by key.

    Returns:
        The recipe.

    Raises:
        ValueError: If the file cannot be read, if a name is unknown (the closest one is named), if a value has a wrong
            type or lies outside its range, or if a setting has no effect in this recipe.
    """
    try:
        values = read_yaml(path)
        overrides = dict(overrides or {})
        if "model" in overrides and isinstance(values.get("model", {}), dict):
            overrides["model"] = values.get("model", {}) | overrides["model"]
        values |= overrides
        recipe = build(cls, values)
        for name, reason in recipe.unused_settings().items():
            if name in values:
                raise ValueError(f"`{name}` is set but has no effect, since {reason}: remove it.")
    except ValueError as error:
        raise ValueError(f"Recipe {path}: {error}") from error
    return recipe


def recipe_to_dict(recipe: OptimizationRecipe) -> dict[str, Any]:
    """All settings of a recipe in plain types, for reports and for recognising a run."""
    return dataclasses.asdict(recipe)


def parse_arguments(
    parser: Any,
    recipe_class: type[R],
    options_class: type[Options],
    recipe_folder: str | Path,
    words: list[str] | None = None,
) -> tuple[R, Options]:
    """
    The command line of a training script: `--recipe`, and one flag for every field of the recipe and of the options.

    Args:
        parser (`argparse.ArgumentParser`): The parser, as [`add_flags`] wants it; it exits with a message on bad
            input.
        recipe_class (`type`): [`TokenizerRecipe`] or [`SiTRecipe`].
        options_class (`type`): [`RunOptions`] or one derived from it.
        recipe_folder (`str` or `Path`): Where a recipe given by its bare name is looked up.
        words (`list[str]`, *optional*): The command line; the process's own by default.

    Returns:
        `tuple`: The recipe and the options.
    """
    folder = Path(recipe_folder)
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    parser.add_argument("--recipe", required=True, help=f"YAML file with a recipe, or the name of one: {names}.")
    add_flags(parser, options_class, "where and on what to train")
    add_flags(parser, recipe_class, "recipe (each flag replaces the value in the file)")
    arguments = parser.parse_args(words)
    path = Path(arguments.recipe)
    if path.name == arguments.recipe and not path.is_file():  # a bare name
        path = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    try:
        options = build(options_class, given_flags(arguments, options_class))
        return load_recipe(recipe_class, path, given_flags(arguments, recipe_class)), options
    except ValueError as error:
        parser.error(str(error))
