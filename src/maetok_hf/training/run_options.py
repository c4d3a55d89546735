"""Where and on what a recipe is run: data set, folder, devices, checkpoints."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """
    Options that both training scripts share.

    Args:
        output_dir (`str`):
            Folder for checkpoints, logs and the exported model; on a file system that all processes share.
        dataset_name (`str`):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split of the data set to train on.
        image_column (`str`, *optional*):
            Column with the images; found from the data set's features by default.
        cache_dir (`str`, *optional*):
            Folder in which the row counts of the data set are kept; `datasets`' own cache folder by default.
        seed (`int`, *optional*, defaults to 0):
            Every random draw of the run is a function of it.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Micro-batches per optimisation step and process: each holds the recipe's `total_batch_size` divided by this
            and by the number of processes.
        dataloader_num_workers (`int`, *optional*, defaults to 0):
            Processes per device that read and decode images.
        num_streams (`int`, *optional*):
            Parts of the data set that are read side by side. The sample order depends on it, so it must stay the same
            when a run continues on another number of processes or workers. Defaults to processes times workers.
        mixed_precision (`str`, *optional*):
            `"no"`, `"fp16"` or `"bf16"`; by default what `accelerate launch` says.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Recompute activations in the backward pass: less memory, more time, the same result.
        gradient_checkpointing_share (`float`, *optional*, defaults to 1.0):
            With `gradient_checkpointing`, the share of the transformer blocks, in (0, 1], whose activations are
            recomputed, evenly spread over each stack: a smaller one takes less time and more memory. It may change
            when a run is resumed.
        checkpointing_steps (`int`, *optional*, defaults to 5000):
            Steps between checkpoints.
        checkpoints_total_limit (`int`, *optional*, defaults to 2):
            Complete checkpoints to keep, the newest ones.
        resume_from_checkpoint (`str`, *optional*, defaults to `"latest"`):
            `"latest"` continues from the newest complete checkpoint in `output_dir`, or starts if there is none;
            `"none"` starts anew and refuses a folder with checkpoints; a path continues from that one.
        logging_steps (`int`, *optional*, defaults to 50):
            Steps between entries of `training_log.jsonl`.
        max_skipped_steps (`int`, *optional*, defaults to 20):
            A step whose gradient is not finite is skipped; after this many in a row the run stops.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Compile the transformer blocks of what is trained, and of the discriminator's trunk, with `torch.compile`.
        report_to (`str`, *optional*, defaults to `"tensorboard"`):
            Tracker of losses and pictures: `"tensorboard"`, `"wandb"`, `"trackio"`, or `"none"`; `training_log.jsonl`
            is written in any case.
        tracker_project_name (`str`, *optional*):
            Project under which the tracker keeps the run; `"maetok_hf"` by default.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Upload the moving average with its card to the Hub at every checkpoint, in the background, and at the end.
        hub_model_id (`str`, *optional*):
            Hub repository of the upload; by default the name of `output_dir`, in the user's own namespace.
        hub_private_repo (`bool`, *optional*, defaults to `False`):
            Make that repository private when it is created.
    """

    output_dir: str
    dataset_name: str
    dataset_config_name: str | None = None
    train_split: str = "train"
    image_column: str | None = None
    cache_dir: str | None = None
    seed: int = 0
    gradient_accumulation_steps: int = 1
    dataloader_num_workers: int = 0
    num_streams: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    gradient_checkpointing: bool = False
    gradient_checkpointing_share: float = 1.0
    checkpointing_steps: int = 5000
    checkpoints_total_limit: int = 2
    resume_from_checkpoint: str = "latest"
    logging_steps: int = 50
    max_skipped_steps: int = 20
    torch_compile: bool = False
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    tracker_project_name: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False

    def __post_init__(self):
        for name in (
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 < self.gradient_checkpointing_share <= 1:
            raise ValueError(
                f"`gradient_checkpointing_share` must be in (0, 1], got {self.gradient_checkpointing_share}: for no "
                "checkpointing, leave out `gradient_checkpointing`."
            )
        if self.gradient_checkpointing_share != 1 and not self.gradient_checkpointing:
            raise ValueError(
                f"`gradient_checkpointing_share` = {self.gradient_checkpointing_share} has no effect without "
                "`gradient_checkpointing`: give both, or remove it."
            )
        if self.dataloader_num_workers < 0:
            raise ValueError(f"`dataloader_num_workers` must be 0 or more, got {self.dataloader_num_workers}.")
        if self.num_streams is not None and self.num_streams < 1:
            raise ValueError(f"`num_streams` must be at least 1, got {self.num_streams}.")
        if self.tracker_project_name is not None and self.report_to == "none":
            raise ValueError(
                f"`tracker_project_name` = {self.tracker_project_name!r} has no effect with `report_to` = 'none': "
                "remove it."
            )
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"`{name}` = {getattr(self, name)!r} has no effect without `push_to_hub`: remove it.")

    def unused_settings(self, max_train_steps: int) -> dict[str, str]:
        """Settings that a run of so many steps never comes to, with the reason: a warning, as trial runs are short."""
        return {}

    def micro_batch_size(self, total_batch_size: int, num_processes: int) -> int:
        """
        Images in one forward pass of one process.

        Raises:
            ValueError: If `total_batch_size` cannot be divided evenly.
        """
        parts = num_processes * self.gradient_accumulation_steps
        if total_batch_size % parts:
            raise ValueError(
                f"`total_batch_size` = {total_batch_size} must be a multiple of processes x "
                f"`gradient_accumulation_steps` = {num_processes} x {self.gradient_accumulation_steps}."
            )
        return total_batch_size // parts


def validated_at_the_end_only(validation_steps: int | None, max_train_steps: int) -> dict[str, str]:
    """What [`~RunOptions.unused_settings`] says of `validation_steps`."""
    if validation_steps is None or validation_steps < max_train_steps:
        return {}
    return {"validation_steps": f"the run has {max_train_steps} steps, and is validated at its end in any case"}


@dataclass(frozen=True, kw_only=True)
class TokenizerRunOptions(RunOptions):
    """
    Options of `train_maetok.py`.

    Args:
        dataset_name (`str`, *optional*, defaults to `"ILSVRC/imagenet-1k"`):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it.
        caption_column (`str`, *optional*):
            Column with the captions, for the auxiliary target `"text"`; required with it and not accepted without.
        pretrained_model_name_or_path (`str`, *optional*):
            Trained tokenizer (folder or Hub repository) to start from: required by the stage `"decoder_finetuning"`,
            not accepted by `"mask_modelling"`, whose recipe describes the model.
        validation_split (`str`, *optional*):
            Held-out split on which reconstructions are measured; without it nothing held out is measured.
        num_validation_images (`int`, *optional*):
            Images of the held-out split that are measured, the first ones; 500 by default, or all if it has fewer.
        validation_steps (`int`, *optional*):
            Steps between measurements of the moving average on the held-out images, with a picture of some; by default
            they are measured at the end only.
        checkpoint_statistics_images (`int`, *optional*):
            Training images on which the latents' mean and standard deviation are measured for every checkpoint: 1024
            by default, or all if there are fewer. The final export uses the recipe's `latent_statistics_images`. Not
            accepted where the latents stay as they are.
    """

    dataset_name: str = "ILSVRC/imagenet-1k"
    caption_column: str | None = None
    pretrained_model_name_or_path: str | None = None
    validation_split: str | None = None
    num_validation_images: int | None = None
    validation_steps: int | None = None
    checkpoint_statistics_images: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in (
            "num_validation_images",
            "validation_steps",
            "checkpoint_statistics_images",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("num_validation_images", "validation_steps"):
            if getattr(self, name) is not None and self.validation_split is None:
                raise ValueError(
                    f"`{name}` = {getattr(self, name)} has no effect without `validation_split`: name the split, or "
                    "remove it."
                )

    def unused_settings(self, max_train_steps: int) -> dict[str, str]:
        return validated_at_the_end_only(self.validation_steps, max_train_steps)


@dataclass(frozen=True, kw_only=True)
class SiTRunOptions(RunOptions):
    """
    Options of `train_sit.py`.

    Args:
        tokenizer_name_or_path (`str`):
            Trained tokenizer (folder or Hub repository) with latent statistics; it stays frozen.
        dataset_name (`str`, *optional*):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it; each batch is encoded when
            it is needed. Either this or `latents_name_or_path` is given.
        latents_name_or_path (`str`, *optional*):
            Folder or Hub data set of latents that `cache_latents.py` has made with this tokenizer.
        label_column (`str`, *optional*):
            Column with the class labels; found from the data set's features by default.
        pretrained_model_name_or_path (`str`, *optional*):
            Trained pipeline (folder or Hub repository) whose transformer is fine-tuned: required by recipes with
            `finetuning`, not accepted by others.
        validation_steps (`int`, *optional*):
            Steps between pictures of samples of the moving average, always of the same classes and noise; by default
            there is one at the end only.
        num_validation_images (`int`, *optional*, defaults to 16):
            Samples of a picture.
    """

    tokenizer_name_or_path: str
    dataset_name: str | None = None
    latents_name_or_path: str | None = None
    label_column: str | None = None
    pretrained_model_name_or_path: str | None = None
    validation_steps: int | None = None
    num_validation_images: int = 16

    def __post_init__(self):
        super().__post_init__()
        if (self.dataset_name is None) == (self.latents_name_or_path is None):
            raise ValueError(
                f"`dataset_name` = {self.dataset_name!r} and `latents_name_or_path` = {self.latents_name_or_path!r}: "
                "give one of the two, images or their latents."
            )
        if self.latents_name_or_path is not None:
            for name in ("dataset_config_name", "image_column", "label_column", "cache_dir", "train_split"):
                if getattr(self, name) not in (None, "train"):
                    raise ValueError(f"`{name}` has no effect with `latents_name_or_path`: remove it.")
        for name in ("num_validation_images", "validation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def unused_settings(self, max_train_steps: int) -> dict[str, str]:
        return validated_at_the_end_only(self.validation_steps, max_train_steps)
