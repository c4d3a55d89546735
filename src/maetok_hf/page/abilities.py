"""What a pipeline can be asked for on the page: classes, schemes of guidance and solvers, by what it consists of."""

from dataclasses import dataclass

from diffusers import SchedulerMixin

from ..pipelines import MAETokDiffusionPipeline
from ..pipelines.components import check_scheduler
from ..pipelines.guidance import has_temperature
from ..sampling import make_scheduler


NO_CLASS = -1  # the null class, by which a pipeline samples without a class
NO_GUIDANCE = "none"
SCHEMES = {
    NO_GUIDANCE: "No guidance",
    "cfg": "Classifier-free guidance",
    "autoguidance": "Autoguidance",
    "gft": "Guidance-free training (GFT)",
}
OWN_SOLVER = "own"
SOLVERS = {
    "euler-maruyama": "Euler-Maruyama (SDE)",
    "euler": "Euler",
    "heun": "Heun",
    "unipc": "UniPC",
    "dpm-solver++": "DPM-Solver++",
}


@dataclass(frozen=True, kw_only=True)
class LoadedPipeline:
    """
    A pipeline that the page shows.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, on its device.
        name (`str`): Folder or Hub repository it was loaded from.
        revision (`str`, *optional*): Revision it was loaded from.
    """

    pipe: MAETokDiffusionPipeline
    name: str
    revision: str | None = None

    @property
    def label(self) -> str:
        """`str`: What it is called on the page."""
        return self.name if self.revision is None else f"{self.name} @ {self.revision}"


def classes_of(pipe: MAETokDiffusionPipeline) -> dict[int, str]:
    """
    The classes that a pipeline can be asked for.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        `dict[int, str]`: Names by class index, numbers where it has no names; with `NO_CLASS` last if its transformer
        was trained without a class now and then.
    """
    config = pipe.transformer.config
    names = pipe.id2label or {}
    classes = {index: names.get(index, str(index)) for index in range(config.num_classes)}
    return classes | ({NO_CLASS: "no class (unconditional)"} if config.class_dropout_prob > 0 else {})


def schemes_of(pipe: MAETokDiffusionPipeline) -> list[str]:
    """
    The schemes of guidance that a pipeline has the components for.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        `list[str]`: Some of `SCHEMES`, in their order.
    """
    can = {
        NO_GUIDANCE: True,
        "cfg": pipe.transformer.config.class_dropout_prob > 0,
        "autoguidance": pipe.guidance_transformer is not None,
        "gft": has_temperature(pipe.transformer),
    }
    return [scheme for scheme in SCHEMES if can[scheme]]


def default_scheme(pipe: MAETokDiffusionPipeline) -> str:
    """
    The scheme that a call of a pipeline takes if none is named.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        `str`: One of [`schemes_of`].
    """
    schemes = schemes_of(pipe)
    return next(scheme for scheme in ("gft", "autoguidance", "cfg", NO_GUIDANCE) if scheme in schemes)


def solvers_of(pipe: MAETokDiffusionPipeline) -> dict[str, str]:
    """
    The solvers that follow the path of a pipeline's transformer.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        `dict[str, str]`: What they are called by name: `OWN_SOLVER` first, then those of
        [`~maetok_hf.sampling.make_scheduler`] that are of another class.
    """
    own = type(pipe.scheduler)
    found, own_name = {}, own.__name__
    for name, words in SOLVERS.items():
        scheduler = make_scheduler(name, pipe)
        if type(scheduler) is own:
            own_name = words
            continue
        try:
            check_scheduler(scheduler, pipe.transformer.config.path)
        except ValueError:
            continue
        found[name] = words
    return {OWN_SOLVER: f"{own_name}, the pipeline's own"} | found


def solver_for(pipe: MAETokDiffusionPipeline, name: str) -> SchedulerMixin:
    """
    A solver of its own for one run.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline; its scheduler is left alone.
        name (`str`): One of [`solvers_of`].

    Returns:
        [`SchedulerMixin`]: A new one.

    Raises:
        ValueError: If the name is none of these.
    """
    if name == OWN_SOLVER:
        return type(pipe.scheduler).from_config(pipe.scheduler.config)
    return make_scheduler(name, pipe)


def describe(pipe: MAETokDiffusionPipeline) -> str:
    """
    What a pipeline is, in a line.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        `str`: Its transformer, classes, latents, size of images, and where it computes in which type.
    """
    transformer, vae = pipe.transformer, pipe.vae
    kind, count = type(transformer).__name__.removesuffix("Transformer1DModel"), transformer.config.num_classes
    return (
        f"{kind} · {count} class{'es' if count > 1 else ''} · "
        f"{vae.latent_sequence_length} tokens of {vae.config.latent_channels} channels · "
        f"{vae.config.sample_size} × {vae.config.sample_size} pixels · "
        f"{str(transformer.dtype).removeprefix('torch.')} on {transformer.device.type}"
    )
