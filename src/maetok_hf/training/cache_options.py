"""Options of `cache_latents.py`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """
    Which images are encoded by which tokenizer, and how their latents are stored.

    Args:
        output_dir (`str`):
            Folder for the latents; on a file system that all processes share.
        tokenizer_name_or_path (`str`):
            Tokenizer (folder or Hub repository) with an `encode` method for images: AutoencoderMAE, or diffusers'
            AutoencoderKL, AutoencoderDC, AutoencoderRAE. Its config says which class it is.
        tokenizer_subfolder (`str`, *optional*):
            Folder of the tokenizer in there, such as `vae` in a pipeline.
        tokenizer_revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer on the Hub.
        dataset_name (`str`):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of the data set on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the data set to encode.
        image_column (`str`, *optional*):
            Column with the images; found from the data set's features by default.
        label_column (`str`, *optional*):
            Column with the class labels; found from the data set's features by default.
        cache_dir (`str`, *optional*):
            Folder in which the row counts of the data set are kept; `datasets`' own cache folder by default.
        resolution (`int`, *optional*, defaults to 256):
            Height and width of the images in pixels, cropped at the centre.
        random_flip (`bool`, *optional*, defaults to `True`):
            Encode each image's mirror image as well, for training with random flips.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Type in which latents are stored. float16 rounds each value by at most 1/2048 of its own size, about 0.0003
            standard deviations of the latents on average (the card says what it was); float32 takes twice the room.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            `"no"`, `"fp16"` or `"bf16"`: type in which the tokenizer computes. bf16 changes the latents by several
            times what float16 storage does.
        alignment_model (`str`, *optional*):
            DINOv2 model (folder or Hub repository) whose features are stored beside the latents, for generators that
            are aligned with them (`alignment_weight` of `train_sit.py`): tokens x features x 2 bytes for each view,
            which is 504 GB for ImageNet with both views at 128 tokens of `facebook/dinov2-base`. By default none are.
        alignment_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision in which it computes: `"bfloat16"`, `"float16"` or `"float32"`.
        batch_size (`int`, *optional*, defaults to 32):
            Images in one forward pass. The last bits of the latents may depend on it, so it must stay the same when a
            run continues.
        rows_per_shard (`int`, *optional*):
            Images per file, which is what an interruption loses at most in each process; by default a power of two for
            files of up to 256 MiB.
        dataloader_num_workers (`int`, *optional*, defaults to 0):
            Processes per device that read and decode images.
        push_to_hub (`str`, *optional*):
            Data set on the Hub, with or without a namespace, that the latents and their card are uploaded to when all
            are there. The command of a complete folder uploads it without encoding anything.
        hub_private_repo (`bool`, *optional*, defaults to `False`):
            Make that data set private when it is created.
    """

    output_dir: str
    tokenizer_name_or_path: str
    tokenizer_subfolder: str | None = None
    tokenizer_revision: str | None = None
    dataset_name: str
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    cache_dir: str | None = None
    resolution: int = 256
    random_flip: bool = True
    dtype: Literal["float16", "float32"] = "float16"
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    alignment_model: str | None = None
    alignment_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch_size: int = 32
    rows_per_shard: int | None = None
    dataloader_num_workers: int = 0
    push_to_hub: str | None = None
    hub_private_repo: bool = False

    def __post_init__(self):
        for name in ("resolution", "batch_size", "rows_per_shard"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"`dataloader_num_workers` must be 0 or more, got {self.dataloader_num_workers}.")
        if self.alignment_dtype != "bfloat16" and self.alignment_model is None:
            raise ValueError("`alignment_dtype` has no effect without `alignment_model`: remove it.")
        if self.hub_private_repo and self.push_to_hub is None:
            raise ValueError("`hub_private_repo` has no effect without `push_to_hub`: remove it.")
