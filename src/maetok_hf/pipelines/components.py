"""Whether the components of a pipeline were trained for each other."""

from collections.abc import Mapping

from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models.autoencoder_mae import AutoencoderMAE
from ..schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler


def check_transformer(transformer: ModelMixin, vae: AutoencoderMAE, id2label: Mapping[int, str] | None) -> None:
    """
    A transformer must take the vae's latents and know the named classes.

    Args:
        transformer ([`ModelMixin`]): Velocity model; its config has `sample_size`, `in_channels` and `num_classes`.
        vae ([`AutoencoderMAE`]): Tokenizer.
        id2label (`dict[int, str]`, *optional*): Names by class index.

    Raises:
        ValueError: If it does not; the message names both sizes.
    """
    config = transformer.config
    pairs = (
        ("tokens", "sample_size", vae.latent_sequence_length),
        ("channels", "in_channels", vae.config.latent_channels),
    )
    for what, name, gives in pairs:
        if config[name] != gives:
            raise ValueError(
                f"the transformer's `{name}` is {config[name]}, but the vae decodes latents of {gives} {what}: these "
                "two were not trained together."
            )
    unknown = [index for index in map(int, id2label or {}) if not 0 <= index < config.num_classes]
    if unknown:
        raise ValueError(f"`id2label` names classes {unknown}, but the transformer has {config.num_classes} classes.")


def check_guidance_transformer(guidance_transformer: ModelMixin, transformer: ModelMixin) -> None:
    """
    The weak model of autoguidance must predict the same quantity as the strong one.

    Args:
        guidance_transformer ([`ModelMixin`]): Weak model.
        transformer ([`ModelMixin`]): Strong model.

    Raises:
        ValueError: If their latents, classes or paths differ; the message names the difference.
    """
    for name in ("sample_size", "in_channels", "num_classes", "path"):
        weak, strong = guidance_transformer.config[name], transformer.config[name]
        if weak != strong:
            raise ValueError(
                f"the guidance_transformer's `{name}` is {weak!r}, but the transformer's is {strong!r}: it must be a "
                "weaker model of the same latents and classes on the same path, such as an earlier checkpoint."
            )


def check_scheduler(scheduler: SchedulerMixin, path: str) -> None:
    """
    A scheduler must integrate flow-matching models on the transformer's path.

    Args:
        scheduler ([`SchedulerMixin`]): Solver.
        path (`str`): Path the transformer was trained on.

    Raises:
        ValueError: If it belongs to another family, follows another path, or runs or shifts in another way.
    """
    config = scheduler.config
    if isinstance(scheduler, FlowMatchEulerMaruyamaScheduler):
        follows = config.path
    elif isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)) or (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    ):
        follows = "linear"
    else:
        raise ValueError(
            f"the scheduler {type(scheduler).__name__} does not integrate flow-matching models: use "
            "FlowMatchEulerMaruyamaScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunScheduler, or UniPC "
            "or DPM-Solver++ with `prediction_type='flow_prediction'` and `use_flow_sigmas=True`."
        )
    if follows != path:
        raise ValueError(
            f"the transformer was trained on the {path} path, but {type(scheduler).__name__} follows the {follows} "
            f"one: use FlowMatchEulerMaruyamaScheduler(path={path!r})."
        )
    if config.get("invert_sigmas"):
        raise ValueError("a scheduler with `invert_sigmas=True` runs towards the noise: set it to False.")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "a scheduler with `use_dynamic_shifting=True` shifts times by the size of 2D latents: set it to False "
            "and give a fixed `shift`."
        )
