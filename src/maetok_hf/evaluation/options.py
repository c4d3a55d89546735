"""What `evaluate_generation` and `sweep_guidance` are asked for."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..sampling.options import GenerateOptions, GuidanceOptions, SamplingOptions
from ..training.configuration import refuse_effectless


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """
    Which numbers, in which features, against what.

    Args:
        metrics (`list[str]`, *optional*, defaults to `["fid", "sfid", "inception_score", "precision_recall"]`):
            `fid` and `sfid` (on other features than Inception's they are named `fd` and `sfd`), `inception_score`,
            `precision_recall`, `kid` over the whole sets, or `kid_subsets`, mean and spread over 100 random subsets.
        kid_subset_size (`int`, *optional*, defaults to 1000):
            Images of a subset of `kid_subsets`.
        reference (`str`, *optional*):
            What the images are compared with: an `.npz` file of ADM's suite, of statistics or features that an
            evaluation has written or of images; a folder of images of one size; or, with `reference_resolution`, a
            data set, a folder or the name of one on the Hub. Not needed for `inception_score` alone.
        reference_num_images (`int`, *optional*):
            Images of the reference, the first ones; by default all.
        reference_resolution (`int`, *optional*):
            Read `reference` as a data set, whose images are resized and cropped to this height and width as ADM does.
        reference_split (`str`, *optional*):
            Split of the data set; by default `train`, or the only one there is.
        reference_config_name (`str`, *optional*):
            Configuration of the data set.
        reference_num_workers (`int`, *optional*, defaults to 0):
            Processes that decode the images of the data set, for each process of the evaluation.
        reference_cache_dir (`str`, *optional*):
            Where features of reference images are kept, to be shared by evaluations; by default `reference` in
            `output_dir`.
        cache_dir (`str`, *optional*):
            Where row counts of data sets are kept; by default in the cache folder of `datasets`.
        extractor (`str`, *optional*, defaults to `"inception"`):
            Network that gives features: `inception`, `dinov2`, or `module:function` that returns a
            `FeatureExtractor` and is called without arguments.
        extractor_weights (`str`, *optional*):
            File of Inception's weights, or folder or Hub repository of a DINOv2; by default the published Inception,
            and `facebook/dinov2-large`.
        device (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"cpu"` or `"cuda"`.
        output_dir (`str`):
            Folder of the results, on a file system that all processes share.
        push_to_hub (`str`, *optional*):
            Model or pipeline on the Hub, with or without a namespace, to which the report is uploaded. Numbers of
            `generation` also become results in its card's metadata, with their protocol.
    """

    metrics: list[Literal["fid", "sfid", "inception_score", "precision_recall", "kid", "kid_subsets"]] = field(
        default_factory=lambda: ["fid", "sfid", "inception_score", "precision_recall"]
    )
    kid_subset_size: int = 1000
    reference: str | None = None
    reference_num_images: int | None = None
    reference_resolution: int | None = None
    reference_split: str | None = None
    reference_config_name: str | None = None
    reference_num_workers: int = 0
    reference_cache_dir: str | None = None
    cache_dir: str | None = None
    extractor: str = "inception"
    extractor_weights: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output_dir: str
    push_to_hub: str | None = None

    def __post_init__(self):
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"`metrics` must name at least one metric, and none twice, got {self.metrics}.")
        if self.kid_subset_size != 1000 and "kid_subsets" not in self.metrics:
            raise ValueError("`kid_subset_size` has no effect without 'kid_subsets' among `metrics`: remove it.")
        if self.kid_subset_size < 2:
            raise ValueError(f"`kid_subset_size` must be at least 2, got {self.kid_subset_size}.")
        if self.reference is None and self.metrics != ["inception_score"]:
            raise ValueError("`reference` is needed for all `metrics` but 'inception_score': name a file or folder.")
        if self.metrics == ["inception_score"]:
            names = [entry.name for entry in fields(ScoreOptions) if entry.name.startswith("reference")]
            refuse_effectless(self, names, "on 'inception_score', which compares with nothing")
        if self.reference_resolution is None:
            refuse_effectless(
                self,
                ("reference_split", "reference_config_name", "reference_num_workers"),
                "without `reference_resolution`, by which `reference` is read as a data set",
            )
            if self.cache_dir is not None and getattr(self, "samples_resolution", None) is None:
                raise ValueError("`cache_dir` has no effect without a data set: remove it.")
        if ":" in self.extractor and self.extractor_weights is not None:
            raise ValueError("`extractor_weights` has no effect with an `extractor` of your own: remove it.")
        if self.extractor not in ("inception", "dinov2") and ":" not in self.extractor:
            raise ValueError(
                f"`extractor` must be 'inception', 'dinov2' or 'module:function', got {self.extractor!r}."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationScoreOptions(ScoreOptions, GuidanceOptions, SamplingOptions):
    """
    Options of `evaluate_generation`.

    Args:
        samples (`str`, *optional*):
            Images that are scored: a folder of images of one size, an `.npz` file of ADM's suite, or, with
            `samples_resolution`, a data set, a folder or the name of one on the Hub.
        samples_resolution (`int`, *optional*):
            Read `samples` as a data set, whose images are resized and cropped to this height and width as ADM does.
        samples_split (`str`, *optional*):
            Split of the data set; by default `train`, or the only one there is.
        pretrained_model_name_or_path (`str`, *optional*):
            In place of `samples`, a pipeline, a folder or a Hub repository, whose images are scored as they are
            sampled and kept nowhere.
        num_images (`int`, *optional*):
            Images that are scored, the first ones; by default all of `samples`, or 50 000 from a pipeline.
    """

    samples: str | None = None
    samples_resolution: int | None = None
    samples_split: str | None = None
    pretrained_model_name_or_path: str | None = None
    num_images: int | None = None

    def __post_init__(self):
        if (self.samples is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError("Give either `samples`, images that are there, or `pretrained_model_name_or_path`.")
        if self.samples is not None:
            names = [field.name for base in (SamplingOptions, GuidanceOptions) for field in fields(base)]
            names = [name for name in names if name not in ("num_images", "batch_size")]
            refuse_effectless(self, names, "with `samples`, which are there")
        if self.samples is None or self.samples_resolution is None:
            names = ("samples_split",) if self.samples is not None else ("samples_resolution", "samples_split")
            refuse_effectless(self, names, "without `samples` and `samples_resolution`, by which they are a data set")
        SamplingOptions.__post_init__(self)
        ScoreOptions.__post_init__(self)

    def generation(self) -> GenerateOptions:
        """The set that is sampled from the pipeline, as `generate.py` is asked for it."""
        guidance = {field.name: getattr(self, field.name) for field in fields(GuidanceOptions)}
        return generate_options(self, **guidance)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ScoreOptions, SamplingOptions):
    """
    Options of `sweep_guidance`.

    Args:
        num_images (`int`, *optional*, defaults to 10000):
            Images of every cell, of the same noise and classes in all of them. FIDs of 10 000 images are 2.5 to 3
            higher than those of 50 000.
        metrics (`list[str]`, *optional*, defaults to `["fid", "inception_score"]`):
            `fid`, `sfid`, `inception_score`, `precision_recall`, `kid` or `kid_subsets`.
        guidance_scales (`list[float]`, *optional*, defaults to `[1.0, 1.5, 1.9, 2.5]`):
            Scales; 1 is no guidance, one cell for all methods and intervals.
        guidance_intervals (`list[str]`, *optional*, defaults to `["0,1", "0,0.75"]`):
            Lowest and highest time of guidance, noise at 1, with a comma between them.
        guidance_methods (`list[str]`, *optional*):
            `cfg`, `autoguidance` and `gft`; by default the one that the pipeline was made for.
    """

    num_images: int = 10_000
    metrics: list[Literal["fid", "sfid", "inception_score", "precision_recall", "kid", "kid_subsets"]] = field(
        default_factory=lambda: ["fid", "inception_score"]
    )
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 1.9, 2.5])
    guidance_intervals: list[str] = field(default_factory=lambda: ["0,1", "0,0.75"])
    guidance_methods: list[Literal["cfg", "autoguidance", "gft"]] | None = None

    def __post_init__(self):
        SamplingOptions.__post_init__(self)
        ScoreOptions.__post_init__(self)
        for name in ("guidance_scales", "guidance_intervals", "guidance_methods"):
            values = self.intervals() if name == "guidance_intervals" else getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"`{name}` must name at least one value, and none twice, got {getattr(self, name)}.")
        methods = self.guidance_methods
        if self.guidance_transformer_name_or_path is not None and methods and "autoguidance" not in methods:
            raise ValueError(
                f"`guidance_transformer_name_or_path` has no effect with `guidance_methods` {methods}: add "
                "'autoguidance', or remove it."
            )

    def intervals(self) -> list[tuple[float, float]]:
        """
        The intervals in numbers.

        Raises:
            ValueError: If a word is not two ordered times in [0, 1] with a comma between them.
        """
        return [_interval(word) for word in self.guidance_intervals]


def generate_options(options: SamplingOptions, **guidance: Any) -> GenerateOptions:
    """
    What `generate.py` would be asked for to make the same images.

    Args:
        options ([`SamplingOptions`]): What to sample.
        **guidance (`Any`): Fields of [`GuidanceOptions`], or such of `options` that shall differ.

    Returns:
        [`GenerateOptions`]: For the functions of `maetok_hf.sampling`.
    """
    given = {field.name: getattr(options, field.name) for field in fields(SamplingOptions)} | guidance
    given = {name: value for name, value in given.items() if value is not None}
    return GenerateOptions(output_dir=options.output_dir, **given)


def _interval(word: str) -> tuple[float, float]:
    try:
        low, high = map(float, word.split(","))
        if 0 <= low <= high <= 1:
            return low, high
    except ValueError:
        pass
    raise ValueError(f"`guidance_intervals` must be like 0,0.75: two times in [0, 1], the lower first, got {word!r}.")
