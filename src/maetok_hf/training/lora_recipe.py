"""[`LoraRecipe`] and [`LoraRunOptions`]: how a trained pipeline is fine-tuned by a LoRA adapter, and where and on
what."""

from dataclasses import dataclass, field

from .flow_recipe import FlowRecipe
from .recipes import check_fraction, check_positive
from .run_options import RunOptions, validated_at_the_end_only


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(FlowRecipe):
    """
    How a LoRA adapter (arXiv 2106.09685) of a generator is trained; every default is ours.

    The generator itself, whose weights stay as they are, is the pipeline's: its architecture, its path, and whether it
    was trained for sampling without guidance (GFT), which its adapter then is, too. Times and terms of the objective
    are best those of the generator's own training.

    Args:
        total_batch_size (`int`, *optional*, defaults to 8):
            Images per optimisation step, over all processes and accumulated micro-batches.
        max_train_steps (`int`, *optional*, defaults to 1000):
            Optimisation steps of the whole run.
        ema_decay (`float`, *optional*, defaults to 0.99):
            Constant decay per step of the moving average of the adapter, which is what the run exports; 0 for none.
        rank (`int`, *optional*, defaults to 16):
            Rank of the update of every adapted layer.
        lora_alpha (`float`, *optional*):
            The update is scaled by `lora_alpha / rank`; `rank` by default.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Probability with which an input of an update is dropped.
        lora_layers (`list[str]`, *optional*):
            Layers that are adapted, by the end of their names; by default the linear ones of attention and MLP. The
            class table is adapted if, and only if, there are new classes.
        num_inference_steps (`int`, *optional*, defaults to 50):
            Solver steps of the samples that the run shows.
    """

    total_batch_size: int = 8
    max_train_steps: int = 1000
    ema_decay: float = 0.99
    rank: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_layers: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    )
    num_inference_steps: int = 50

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "rank")
        if self.lora_alpha is not None:
            check_positive(self, "lora_alpha")
        check_fraction(self, "lora_dropout", below_one=True)
        if not self.lora_layers:
            raise ValueError("`lora_layers` is empty: name the layers to adapt, or leave it out for the usual ones.")
        if any(name.split(".")[-1] == "class_embed" for name in self.lora_layers):
            raise ValueError("`lora_layers` names 'class_embed', which is adapted for new classes only: remove it.")


@dataclass(frozen=True, kw_only=True)
class LoraRunOptions(RunOptions):
    """
    Options of `train_sit_lora.py`.

    Args:
        pretrained_model_name_or_path (`str`):
            Trained pipeline (folder or Hub repository) whose transformer gets an adapter.
        dataset_name (`str`):
            Hub repository or local folder of images, as `datasets.load_dataset` takes it, with named classes: a folder
            with one folder of images per class, for example. Classes that the pipeline's `id2label` knows by that name
            are trained on further, others are new.
        label_column (`str`, *optional*):
            Column with the class labels; found from the data set's features by default.
        checkpointing_steps (`int`, *optional*, defaults to 250):
            Steps between checkpoints.
        checkpoints_total_limit (`int`, *optional*, defaults to 4):
            Complete checkpoints to keep, the newest ones. The `adapter_ema` of each is an adapter that can be loaded.
        logging_steps (`int`, *optional*, defaults to 10):
            Steps between entries of `training_log.jsonl`.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Upload the adapter with its card to the Hub at every checkpoint, in the background, and at the end.
        validation_steps (`int`, *optional*):
            Steps between pictures of samples of the moving average, always of the same noise and of the classes that
            are trained on; by default there is one at the end only.
        num_validation_images (`int`, *optional*, defaults to 16):
            Samples of a picture.
    """

    pretrained_model_name_or_path: str
    label_column: str | None = None
    checkpointing_steps: int = 250
    checkpoints_total_limit: int = 4
    logging_steps: int = 10
    validation_steps: int | None = None
    num_validation_images: int = 16

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_validation_images", "validation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def unused_settings(self, max_train_steps: int) -> dict[str, str]:
        return validated_at_the_end_only(self.validation_steps, max_train_steps)
