"""What `maetok-analyze` is asked for."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ..training.configuration import refuse_effectless
from .curve import MixtureSettings


HELD_OUT_SHARE = 0.1
LABELED_PARTS = ("probe", "umap")
MIXTURE_PREFIXES = ("mixture_", "same_dimension", "num_dimensions")
# of images that are encoded here: caches of latents have their own
ENCODING_OPTIONS = (
    "dataset_config_name",
    "dataset_revision",
    "split",
    "image_column",
    "label_column",
    "cache_dir",
    "resolution",
    "batch_size",
    "dataloader_num_workers",
    "latents_dtype",
)


@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """
    Options of `maetok-analyze`.

    Args:
        tokenizer (`list[str]`):
            What to compare, side by side. Each is a folder of a tokenizer with an `encode` method for images
            (AutoencoderMAE, or diffusers' AutoencoderKL, AutoencoderDC, AutoencoderRAE); a folder of a pipeline, whose
            `vae` is taken; a folder of cached latents that `cache_latents.py` has filled; or on the Hub `user/name`,
            `user/name/vae` for a folder in there, `user/name@revision/vae`, and `datasets/user/name` for cached
            latents.
        names (`list[str]`, *optional*):
            What tables and pictures call them, one for each tokenizer; by default the names of repositories and
            folders.
        dataset (`str`, *optional*):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it. Needed unless all tokenizers
            are cached latents.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split with the training images, to which probes, principal components and mixtures are fitted.
        held_out_split (`str`, *optional*):
            Split with the held-out images; by default a share of `split` is held out.
        held_out_share (`float`, *optional*):
            Without `held_out_split`, the share of `split` that is held out, drawn by `seed`; by default 0.1.
        num_train_images (`int`, *optional*):
            Training images, drawn by `seed`; by default all.
        num_held_out_images (`int`, *optional*):
            Held-out images, drawn by `seed`; by default all of `held_out_split`, or `held_out_share`.
        image_column (`str`, *optional*):
            Column with the images; found from the data set's features by default.
        label_column (`str`, *optional*):
            Column with the class labels; found from the data set's features by default. Images without a class are
            left out.
        cache_dir (`str`, *optional*):
            Folder in which the row counts of the data set are kept; `datasets`' own cache folder by default.
        resolution (`int`, *optional*, defaults to 256):
            Height and width of the images in pixels, cropped at the centre. Cached latents have their own.
        batch_size (`int`, *optional*, defaults to 32):
            Images in one forward pass. The last bits of the latents may depend on it.
        dataloader_num_workers (`int`, *optional*, defaults to 0):
            Processes that read and decode images.
        latents_dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"` or `"float16"`: type of the latents on disk. 1.28 million of 4096 numbers take 21 GB in
            float32. Cached latents keep theirs.
        keep_latents (`bool`, *optional*, defaults to `True`):
            `False` removes the latents of a tokenizer when all of its numbers are there; another setting then encodes
            the images again.
        parts (`list[str]`, *optional*, defaults to `["statistics", "probe", "mixtures", "umap"]`):
            What to measure: `statistics` of the channels with effective ranks, a linear `probe`, `mixtures` of
            Gaussians, a `umap` picture.
        seed (`int`, *optional*, defaults to 0):
            Key of the draws of images and of the picture by UMAP.
        probe_l2 (`float`, *optional*, defaults to 1e-3):
            Weight of the probe's penalty on squared weights.
        probe_tolerance (`float`, *optional*, defaults to 1e-6):
            Largest derivative of the probe's objective at which its search ends.
        probe_max_iterations (`int`, *optional*, defaults to 1000):
            Iterations at which it ends in any case; each goes through all training latents a little more than once.
        mixture_sizes (`list[int]`, *optional*, defaults to `[50, 100, 150, 200, 250, 300]`):
            Numbers of components.
        mixture_seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the initial parameters of each size.
        mixture_covariance (`str`, *optional*, defaults to `"diag"`):
            `"diag"` or `"full"`.
        mixture_variance (`float`, *optional*, defaults to 0.9):
            Fraction of the variance of the training latents that the principal components must exceed.
        mixture_reg_covar (`float`, *optional*, defaults to 1e-6):
            Added to all variances.
        mixture_tolerance (`float`, *optional*, defaults to 1e-3):
            Change of the mean log-likelihood at which expectation maximisation ends.
        mixture_max_iterations (`int`, *optional*, defaults to 100):
            Iterations at which it ends in any case.
        same_dimension (`bool`, *optional*, defaults to `True`):
            Give all tokenizers the same number of principal components, without which likelihoods cannot be compared:
            the largest that one of them needs for `mixture_variance`, or all that the others have if that is fewer.
            `False` gives each its own.
        num_dimensions (`int`, *optional*):
            This number of principal components for all, instead.
        umap_num_images (`int`, *optional*, defaults to 5000):
            Training images in the picture by UMAP, drawn by `seed`.
        umap_num_classes (`int`, *optional*, defaults to 10):
            Classes in that picture, drawn by `seed` if there are more.
        umap_num_neighbors (`int`, *optional*, defaults to 15):
            Neighbours of an image that UMAP considers.
        device (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"cpu"` or `"cuda"`.
        output_dir (`str`):
            Folder of latents, numbers and pictures.
    """

    tokenizer: list[str]
    names: list[str] | None = None
    dataset: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    held_out_share: float | None = None
    num_train_images: int | None = None
    num_held_out_images: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None
    resolution: int = 256
    batch_size: int = 32
    dataloader_num_workers: int = 0
    latents_dtype: Literal["float32", "float16"] = "float32"
    keep_latents: bool = True
    parts: list[Literal["statistics", "probe", "mixtures", "umap"]] = field(
        default_factory=lambda: ["statistics", "probe", "mixtures", "umap"]
    )
    seed: int = 0
    probe_l2: float = 1e-3
    probe_tolerance: float = 1e-6
    probe_max_iterations: int = 1000
    mixture_sizes: list[int] = field(default_factory=lambda: [50, 100, 150, 200, 250, 300])
    mixture_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    mixture_covariance: Literal["diag", "full"] = "diag"
    mixture_variance: float = 0.9
    mixture_reg_covar: float = 1e-6
    mixture_tolerance: float = 1e-3
    mixture_max_iterations: int = 100
    same_dimension: bool = True
    num_dimensions: int | None = None
    umap_num_images: int = 5000
    umap_num_classes: int = 10
    umap_num_neighbors: int = 15
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output_dir: str

    def __post_init__(self):
        for name in ("tokenizer", "names", "parts", "mixture_sizes", "mixture_seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"`{name}` must name at least one value, and none twice, got {values}.")
        if self.names is not None and len(self.names) != len(self.tokenizer):
            raise ValueError(f"`names` must be one for each of {len(self.tokenizer)} tokenizers, got {self.names}.")
        self._check_ranges()
        self._check_held_out()
        self._check_effects()
        if self.num_dimensions is not None and not self.same_dimension:
            raise ValueError("`num_dimensions` gives all tokenizers the same dimension: remove `same_dimension`.")

    def _check_ranges(self) -> None:
        smallest = {
            "num_train_images": 2,
            "num_held_out_images": 1,
            "resolution": 1,
            "batch_size": 1,
            "dataloader_num_workers": 0,
            "probe_max_iterations": 1,
            "mixture_max_iterations": 1,
            "num_dimensions": 1,
            "umap_num_images": 3,
            "umap_num_classes": 1,
            "umap_num_neighbors": 2,
        }
        for name, low in smallest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        if min(self.mixture_sizes) < 1:
            raise ValueError(f"`mixture_sizes` must be at least 1, got {self.mixture_sizes}.")
        for name in ("probe_l2", "probe_tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("mixture_reg_covar", "mixture_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("mixture_variance", "held_out_share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"`{name}` must lie in (0, 1), got {value}.")

    def _check_effects(self) -> None:
        names = [entry.name for entry in fields(self)]
        for part, prefixes in (("probe", ("probe_",)), ("mixtures", MIXTURE_PREFIXES), ("umap", ("umap_",))):
            if part not in self.parts:
                # the spectrum has the number of dimensions of this share of the variance
                own = [name for name in names if name.startswith(prefixes) and name != "mixture_variance"]
                refuse_effectless(self, own, f"without {part!r} among `parts`")
        if self.dataset is None:
            refuse_effectless(self, ENCODING_OPTIONS, "without `dataset`, whose images are encoded")

    def _check_held_out(self) -> None:
        if self.held_out_share is None:
            return
        for name in ("held_out_split", "num_held_out_images"):
            if getattr(self, name) is not None:
                raise ValueError(f"`held_out_share` has no effect with `{name}`: remove one of them.")

    @property
    def needs_labels(self) -> bool:
        """Whether a part cannot do without classes."""
        return any(part in self.parts for part in LABELED_PARTS)

    def mixture_settings(self) -> MixtureSettings:
        """How the mixtures are fitted."""
        return MixtureSettings(
            covariance=self.mixture_covariance,
            reg_covar=self.mixture_reg_covar,
            tolerance=self.mixture_tolerance,
            max_iterations=self.mixture_max_iterations,
            variance=self.mixture_variance,
        )
