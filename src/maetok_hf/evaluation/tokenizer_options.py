"""Options of `evaluate_tokenizer`."""

from dataclasses import dataclass
from typing import Literal


DEFAULT_RESOLUTION = 256


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluationOptions:
    """
    Which images are reconstructed by which tokenizer, and what is measured of them.

    Args:
        tokenizer_name_or_path (`str`):
            Tokenizer (folder or Hub repository): AutoencoderMAE, or diffusers' AutoencoderKL, AutoencoderDC,
            AutoencoderRAE and the like. Its config says which class it is.
        tokenizer_subfolder (`str`, *optional*):
            Folder of the tokenizer in there, such as `vae` in a pipeline.
        tokenizer_revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer on the Hub.
        output_dir (`str`):
            Folder of the results, on a file system that all processes share.
        dataset_name (`str`, *optional*):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it; images are resized and
            cropped at the centre as ADM does.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the data set on the Hub.
        split (`str`, *optional*):
            Split of the data set, which the tokenizer was not trained on; `validation` by default.
        image_column (`str`, *optional*):
            Column with the images; found from the data set's features by default.
        cache_dir (`str`, *optional*):
            Folder in which the row counts of the data set are kept; `datasets`' own cache folder by default.
        dataloader_num_workers (`int`, *optional*, defaults to 0):
            Processes per device that read and decode images of the data set.
        resolution (`int`, *optional*):
            Height and width of the data set's images in pixels, 256 by default.
        images (`str`, *optional*):
            In place of `dataset_name`, a folder of images of one size or an `.npz` file of ADM's suite, as they are.
        num_images (`int`, *optional*):
            Images to reconstruct, the first ones; by default all.
        extractor (`str`, *optional*, defaults to `"inception"`):
            Network that gives features for rFID: `inception`, `dinov2`, `module:function` that returns a
            `FeatureExtractor` and is called without arguments, or `none` for PSNR and SSIM alone.
        extractor_weights (`str`, *optional*):
            File of Inception's weights, or folder or Hub repository of a DINOv2; by default the published Inception,
            and `facebook/dinov2-large`.
        reference (`str`, *optional*):
            Statistics of the originals, the `originals.npz` in the `output_dir` of another tokenizer on the same
            images; by default they are computed.
        lpips (`str`, *optional*):
            Measure LPIPS with this network: `vgg`, `alex` or `squeeze`, whose weights torchvision downloads once.
        authors_ssim (`bool`, *optional*, defaults to `False`):
            Report `ssim_data_range_2`, too: the authors of MAETok took a data range of 2.0 for images in [0, 1], which
            gives higher numbers.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, `"bfloat16"` or `"float16"`, in which the tokenizer computes.
        rounding (`str`, *optional*, defaults to `"nearest"`):
            How pixels become 8-bit, before anything is measured: `"nearest"`, or `"truncate"`, half a level darker.
        batch_size (`int`, *optional*, defaults to 32):
            Images in one forward pass of one process.
        device (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"cpu"` or `"cuda"`.
        push_to_hub (`str`, *optional*):
            Model or pipeline on the Hub, with or without a namespace, to which the report is uploaded; its numbers
            become results in the card's metadata, with their protocol.
    """

    tokenizer_name_or_path: str
    tokenizer_subfolder: str | None = None
    tokenizer_revision: str | None = None
    output_dir: str
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    split: str | None = None
    image_column: str | None = None
    cache_dir: str | None = None
    dataloader_num_workers: int = 0
    resolution: int | None = None
    images: str | None = None
    num_images: int | None = None
    extractor: str = "inception"
    extractor_weights: str | None = None
    reference: str | None = None
    lpips: Literal["vgg", "alex", "squeeze"] | None = None
    authors_ssim: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    rounding: Literal["nearest", "truncate"] = "nearest"
    batch_size: int = 32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    push_to_hub: str | None = None

    def __post_init__(self):
        if (self.dataset_name is None) == (self.images is None):
            raise ValueError("Give either `dataset_name`, or `images`: a folder or an .npz file.")
        if self.images is not None:
            names = ("dataset_config_name", "dataset_revision", "split", "image_column", "cache_dir", "resolution")
            for name in (*names, "dataloader_num_workers"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}` = {getattr(self, name)!r} has no effect with `images`, which are taken as they "
                        "are: remove it, or give `dataset_name`."
                    )
        for name, least in (("resolution", 1), ("num_images", 2), ("batch_size", 1), ("dataloader_num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.extractor not in ("inception", "dinov2", "none") and ":" not in self.extractor:
            raise ValueError(
                f"`extractor` must be 'inception', 'dinov2', 'module:function' or 'none', got {self.extractor!r}."
            )
        if self.extractor_weights is not None and self.extractor not in ("inception", "dinov2"):
            raise ValueError(f"`extractor_weights` has no effect with `extractor` {self.extractor!r}: remove it.")
        if self.reference is not None and self.extractor == "none":
            raise ValueError("`reference` has no effect with `extractor` 'none': remove it.")
