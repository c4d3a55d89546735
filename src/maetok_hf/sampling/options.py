"""How the images of a set are sampled from a pipeline, and what `generate.py` is asked for."""

from dataclasses import dataclass, field
from typing import Literal


FORMATS = ("png", "npz")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """
    What to sample from, how many images of which classes, and by which solver.

    Args:
        pretrained_model_name_or_path (`str`):
            Pipeline to sample from: a folder or a Hub repository.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        guidance_transformer_name_or_path (`str`, *optional*):
            Weaker transformer for autoguidance, a folder or a Hub repository, such as `transformer_ema` of an early
            checkpoint of the training; by default the pipeline's own, if it has one.
        num_images (`int`, *optional*, defaults to 50000):
            Images of the set.
        class_labels (`list[str]`, *optional*, defaults to `["all"]`):
            `all`, or class indices and names, separated by spaces or commas.
        label_draw (`str`, *optional*, defaults to `"balanced"`):
            `"balanced"` gives each class equally many images (the first classes one more if that is not possible),
            `"random"` draws the class of every image; a FID on balanced labels is about 0.1 lower.
        seed (`int`, *optional*, defaults to 0):
            Noise and class of image i are functions of it and of i.
        batch_size (`int`, *optional*, defaults to 64):
            Images in one forward pass of one process. Changes images by rounding errors: hardly in float32, visibly
            for a measurement in low precision, where a set is continued with the same one only.
        num_inference_steps (`int`, *optional*):
            Steps of the solver; by default the pipeline's, which are 250 if nothing else was saved with it.
        scheduler (`str`, *optional*):
            Solver: `"euler-maruyama"` (the paper's), `"euler"`, `"heun"`, `"unipc"` or `"dpm-solver++"`, with the time
            shift of the pipeline's own one, which is the default.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`, in which the models compute; the solver's state is float32.
        rounding (`str`, *optional*, defaults to `"nearest"`):
            How pixels become 8-bit: `"nearest"`, as in DiT and SiT, or `"truncate"`, as in ADM, whose images are
            darker by half a level on average.
    """

    pretrained_model_name_or_path: str
    revision: str | None = None
    guidance_transformer_name_or_path: str | None = None
    num_images: int = 50_000
    class_labels: list[str] = field(default_factory=lambda: ["all"])
    label_draw: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    batch_size: int = 64
    num_inference_steps: int | None = None
    scheduler: Literal["euler-maruyama", "euler", "heun", "unipc", "dpm-solver++"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rounding: Literal["nearest", "truncate"] = "nearest"

    def __post_init__(self):
        for name in ("num_images", "batch_size", "num_inference_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """
    How samples are guided.

    Args:
        guidance_method (`str`, *optional*):
            `"cfg"`, `"autoguidance"` or `"gft"`; by default what the pipeline was made for.
        guidance_scale (`float`, *optional*):
            Scale of guidance, 1 for none; by default the pipeline's.
        guidance_temperature (`float`, *optional*):
            Temperature of `"gft"` in (0, 1], instead of `guidance_scale`.
        guidance_interval (`list[float]`, *optional*):
            Lowest and highest time of guidance, noise at 1; by default the pipeline's.
    """

    guidance_method: Literal["cfg", "autoguidance", "gft"] | None = None
    guidance_scale: float | None = None
    guidance_temperature: float | None = None
    guidance_interval: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(GuidanceOptions, SamplingOptions):
    """
    Options of `generate.py`.

    Args:
        output_dir (`str`):
            Folder of the set, on a file system that all processes share.
        format (`list[str]`, *optional*, defaults to `["png"]`):
            `png` for a folder of files, `npz` for one file for the evaluation suite of ADM, or both.
    """

    output_dir: str
    format: list[str] = field(default_factory=lambda: ["png"])

    def __post_init__(self):
        super().__post_init__()
        if not self.format or not set(self.format) <= set(FORMATS) or len(set(self.format)) < len(self.format):
            raise ValueError(f"`format` must name one or both of {', '.join(FORMATS)}, got {self.format}.")
