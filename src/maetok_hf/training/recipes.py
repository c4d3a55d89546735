"""What defines a training run's result: what the recipes of tokenizers and generators share, and how they are read.

A recipe holds everything that changes what is learned (sizes, losses, schedules) and nothing about where and on how
many devices it is learned; that is [`RunOptions`](run_options). The defaults are the published values of MAETok (arXiv
2502.03444) unless said otherwise; what a recipe's `model` leaves out has the defaults of the model's class.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .configuration import add_flags, build, check_value, closest, given_flags, read_yaml
from .optim import learning_rate_at, scale_learning_rate, weight_decay_groups


R = TypeVar("R", bound="OptimizationRecipe")
Options = TypeVar("Options")


def check_positive(recipe: Any, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(recipe, name)}.")


def check_at_least_zero(recipe: Any, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) >= 0:
            raise ValueError(f"`{name}` must be 0 or more, got {getattr(recipe, name)}.")


def check_finite(recipe: Any, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(recipe, name)):
            raise ValueError(f"`{name}` must be finite, got {getattr(recipe, name)}.")


def check_fraction(recipe: Any, *names: str, below_one: bool = False) -> None:
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
            `"constant"`, or `"cosine"` for a half cosine from the end of the warm-up to `max_train_steps`.
        lr_warmup_steps (`int`, *optional*):
            Steps over which the learning rate rises linearly from 0.
        final_learning_rate_fraction (`float`, *optional*, defaults to 0.0):
            Where a cosine ends, as a fraction of `learning_rate`.
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
    final_learning_rate_fraction: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        check_positive(self, "resolution", "total_batch_size", "max_train_steps", "learning_rate", "adam_epsilon")
        check_positive(self, "max_grad_norm")
        check_at_least_zero(self, "lr_warmup_steps", "weight_decay")
        check_finite(self, "learning_rate", "adam_epsilon", "weight_decay")  # an infinite norm is one without clipping
        check_fraction(self, "final_learning_rate_fraction")
        check_fraction(self, "adam_beta1", "adam_beta2", "ema_decay", below_one=True)
        self.learning_rate_at(0)  # refuses a cosine that is all warm-up

    @property
    def peak_learning_rate(self) -> float:
        """`float`: Learning rate after the warm-up, scaled with the batch if the recipe says so."""
        if not self.scale_learning_rate:
            return self.learning_rate
        return scale_learning_rate(self.learning_rate, self.total_batch_size)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0; see [`~maetok_hf.training.optim.learning_rate_at`]."""
        final = self.peak_learning_rate * self.final_learning_rate_fraction if self.lr_scheduler == "cosine" else 0.0
        return learning_rate_at(
            step, self.peak_learning_rate, self.lr_scheduler, self.lr_warmup_steps, self.max_train_steps, final
        )

    def make_optimizer(self, module: torch.nn.Module, learning_rate: float | None = None) -> torch.optim.AdamW:
        """
        Fused AdamW over the trainable parameters of a module, with weight decay on its matrices only.

        Args:
            module (`torch.nn.Module`): The objective or the model.
            learning_rate (`float`, *optional*): Its first rate, `peak_learning_rate` by default.
        """
        return torch.optim.AdamW(
            weight_decay_groups(module, self.weight_decay),
            lr=self.peak_learning_rate if learning_rate is None else learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            fused=True,
        )

    def unused_settings(self) -> dict[str, str]:
        """Settings that this recipe's other choices leave without effect, with the reason; setting one is an error."""
        if self.lr_scheduler == "constant":
            return {"final_learning_rate_fraction": "`lr_scheduler` is 'constant'"}
        return {}


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

    A file may begin with `extends: other-recipe`, the name of a file beside it (or a relative path): it then holds
    only what differs. Later settings may leave earlier ones without effect, which then take their defaults; but a
    setting that has no effect where it stands is an error.

    Args:
        cls (`type`): [`TokenizerRecipe`] or [`SiTRecipe`].
        path (`str` or `Path`): A YAML file of field names and values.
        overrides (`Mapping[str, Any]`, *optional*): Values that replace the file's; `model` is merged key by key.

    Returns:
        The recipe.

    Raises:
        ValueError: If a file cannot be read, if a name is unknown (the closest one is named), if a value has a wrong
            type or lies outside its range, or if a setting has no effect in this recipe.
    """
    try:
        recipe, values = cls(), {}
        for layer in [*_read_layers(Path(path)), dict(overrides or {})]:
            if isinstance(values.get("model"), dict) and isinstance(layer.get("model"), dict):
                layer = layer | {"model": values["model"] | layer["model"]}
            values = values | layer
            unused = build(cls, values).unused_settings()
            for name, reason in unused.items():
                if name in layer:
                    raise ValueError(f"`{name}` is set but has no effect, since {reason}: remove it.")
            values = {name: value for name, value in values.items() if name not in unused}
            recipe = build(cls, values)
    except ValueError as error:
        raise ValueError(f"Recipe {path}: {error}") from error
    return recipe


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The settings of a recipe file and of those it extends, the most basic first."""
    if path.resolve() in seen:
        raise ValueError(f"{path} extends itself by way of {', '.join(map(str, seen[1:])) or 'nothing else'}.")
    values = read_yaml(path)
    if "extends" not in values:
        return [values]
    base = values.pop("extends")
    if not isinstance(base, str):
        raise ValueError(f"`extends` must be the name of another recipe, got {base!r}.")
    return [*_read_layers(path.parent / f"{base.removesuffix('.yaml')}.yaml", (*seen, path.resolve())), values]


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
    names = ", ".join(sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")))
    parser.add_argument("--recipe", required=True, help=f"YAML file with a recipe, or the name of one: {names}.")
    add_flags(parser, options_class, "where and on what to train")
    add_flags(parser, recipe_class, "recipe (each flag replaces the value in the file)")
    arguments = parser.parse_args(words)
    path = Path(arguments.recipe)
    if not path.is_absolute() and not path.is_file():  # a name, such as `ablations/autoencoder`
        path = folder / f"{arguments.recipe.removesuffix('.yaml')}.yaml"
    try:
        options = build(options_class, given_flags(arguments, options_class))
        return load_recipe(recipe_class, path, given_flags(arguments, recipe_class)), options
    except ValueError as error:
        parser.error(str(error))
