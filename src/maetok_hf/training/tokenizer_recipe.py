"""[`TokenizerRecipe`]: how a tokenizer is trained. Its defaults, except in `model`, are the published values."""

import math
from dataclasses import dataclass, field
from typing import Literal

from .masking import linear_mask_ratio, sample_step_mask_ratio
from .recipes import (
    OptimizationRecipe,
    check_at_least_zero,
    check_finite,
    check_fraction,
    check_model_settings,
    check_positive,
)


TEACHERS = ("dinov2", "siglip")

# settings of one stage only
_MASK_MODELLING = ("mask_ratio_mean", "mask_ratio_std", "mask_ratio_min", "mask_ratio_max", "mask_ratio_density")
_DECODER_FINETUNING = ("mask_ratio_start", "mask_ratio_end", "mask_ratio_decay_steps")


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe(OptimizationRecipe):
    """
    How an [`AutoencoderMAE`] is trained (MAETok sections 3.2 and 3.3, table of hyper-parameters in the appendix).
    Where the paper and the released code differ, one setting chooses, and its description names both.

    Args:
        stage (`str`, *optional*, defaults to `"mask_modelling"`):
            `"mask_modelling"` trains everything with masked patches and auxiliary targets; `"decoder_finetuning"`
            continues from a trained tokenizer whose encoder is frozen.
        model (`dict`, *optional*, defaults to `{}`):
            Arguments of [`AutoencoderMAE`]. Flags are merged into it. `sample_size` is `resolution`, the latent
            statistics are measured.
        mixed_resolutions (`list[int]`, *optional*, defaults to `[]`):
            Image sizes of a run with several: each step takes one of them. `resolution`, which is among them, is the
            size the model is built for and measured at. Empty for `resolution` alone.
        mixed_resolution_weights (`list[float]`, *optional*, defaults to `[]`):
            Relative frequency of each of these sizes; empty for equal ones.
        crop (`str`, *optional*, defaults to `"center"`):
            `"center"` (the paper), or `"random"`: a random crop of 0.8 to 1 of the short side (the released code).
        mask_ratio_density (`str`, *optional*, defaults to `"truncated_normal"`):
            Density of each step's mask ratio between its bounds: `"truncated_normal"` (the released code) or
            `"uniform"` (the paper names the bounds only).
        mask_ratio_mean (`float`, *optional*, defaults to 0.6):
            Mean of the normal before truncation.
        mask_ratio_std (`float`, *optional*, defaults to 0.25):
            Standard deviation of the normal before truncation.
        mask_ratio_min (`float`, *optional*, defaults to 0.4):
            Lower bound of the mask ratio.
        mask_ratio_max (`float`, *optional*, defaults to 0.6):
            Upper bound of the mask ratio; 0 for both bounds trains without masks, and auxiliary targets then count
            every patch.
        mask_ratio_start (`float`, *optional*, defaults to 0.6):
            Mask ratio of decoder fine-tuning at its first step.
        mask_ratio_end (`float`, *optional*, defaults to 0.0):
            Mask ratio of decoder fine-tuning at the last step of its decay and after it.
        mask_ratio_decay_steps (`int`, *optional*, defaults to 50000):
            Steps over which that ratio falls linearly, both ends included: with 0 at the end, the last of them is the
            first that masks nothing.
        reconstruction_weight (`float`, *optional*, defaults to 1.0):
            Weight of the pixel mean squared error.
        kl_weight (`float`, *optional*, defaults to 1e-6):
            Weight of the Kullback-Leibler term of the KL-VAE baseline (`gaussian_posterior` in `model`).
        perceptual_weight (`float`, *optional*, defaults to 1.0):
            Weight of LPIPS; 0 leaves it out, and its network is not loaded.
        perceptual_network (`str`, *optional*, defaults to `"vgg"`):
            Network of LPIPS: `"vgg"` (published), `"alex"` or `"squeeze"`.
        perceptual_warmup_steps (`int`, *optional*, defaults to 10000):
            Steps over which `perceptual_weight` rises linearly from 0 (the released code; 0 for the paper, which names
            no warm-up of it).
        adversarial_weight (`float`, *optional*, defaults to 0.4):
            Weight of the adversarial term; 0 trains without a discriminator.
        adversarial_loss (`str`, *optional*, defaults to `"hinge"`):
            `"hinge"` (published) or `"non_saturating"`, for both sides.
        adversarial_start_step (`int`, *optional*, defaults to 30000):
            Step at which the discriminator begins, to learn and to be heard; nothing of it is computed before.
        adversarial_warmup_steps (`int`, *optional*, defaults to 0):
            Steps from there over which `adversarial_weight` rises linearly from 0.
        adaptive_adversarial_weight (`bool`, *optional*, defaults to `True`):
            Multiply the adversarial term by the ratio of gradient norms of the other pixel terms and of itself at the
            last pixel layer (VQGAN, arXiv 2012.09841, equation 7).
        discriminator_model (`str`, *optional*, defaults to `"vit_small_patch16_224.dino"`):
            Frozen trunk of the discriminator: a ViT of timm by name, `hf-hub:` or `local-dir:` (released code: DINO
            ViT-S/16; paper: DINOv2-S, `vit_small_patch14_dinov2.lvd142m`).
        discriminator_input (`str`, *optional*, defaults to `"resize"`):
            Images reach the trunk's size by `"resize"`, or by a random `"crop"`.
        discriminator_image_size (`int`, *optional*, defaults to 224):
            Side in pixels of what the trunk sees.
        discriminator_learning_rate (`float`, *optional*, defaults to 1e-4):
            Peak learning rate of the discriminator's heads; scaled and scheduled like `learning_rate`.
        diffaugment (`list[str]`, *optional*, defaults to `["color", "translation", "cutout"]`):
            Differentiable augmentations of all images the discriminator sees; empty for none.
        diffaugment_probability (`float`, *optional*, defaults to 0.5):
            Probability of each of them, for an image that is judged real or fake (the released code, which decides for
            a whole batch; 1 for DiffAugment as its authors, whom the paper cites, define it). The second look of the
            consistency term always has all of them.
        diffaugment_cutout (`float`, *optional*, defaults to 0.2):
            Sides of the rectangle that `"cutout"` hides there, as a fraction of the image's (the released code; 0.5
            for DiffAugment as its authors define it). In the second look of the consistency term it is always 0.5.
        lecam_weight (`float`, *optional*, defaults to 1e-3):
            Weight of the LeCam regularisation of the discriminator; 0 for none.
        lecam_decay (`float`, *optional*, defaults to 0.999):
            Decay per step of the mean logits that it compares with.
        consistency_weight (`float`, *optional*, defaults to 4.0):
            Weight of the discriminator's consistency under two augmentations; 0 for none. 4 is the number in the
            released configurations, whose code multiplies the discriminator's other terms by `adversarial_weight`: in
            its balance, 4 with 0.4 is 10 here.
        auxiliary_targets (`list[str]`, *optional*, defaults to `["hog", "dinov2", "siglip"]`):
            What shallow auxiliary decoders predict: features at masked patches, or `"text"`, the tokens of the
            caption. Empty for none.
        auxiliary_num_layers (`int`, *optional*, defaults to 3):
            Depth of each auxiliary decoder; 0 is a single linear layer.
        auxiliary_hidden_size (`int`, *optional*, defaults to 192):
            Width of each auxiliary decoder.
        auxiliary_num_attention_heads (`int`, *optional*, defaults to 3):
            Attention heads of each auxiliary decoder.
        hog_weight (`float`, *optional*, defaults to 1.0):
            Weight of the HOG target's mean squared error.
        dinov2_weight (`float`, *optional*, defaults to 1.0):
            Weight of the DINOv2 target's loss.
        dinov2_model (`str`, *optional*, defaults to `"facebook/dinov2-large"`):
            Folder or Hub repository of the DINOv2 teacher.
        siglip_weight (`float`, *optional*, defaults to 1.0):
            Weight of the SigLIP target's loss.
        siglip_model (`str`, *optional*, defaults to `"google/siglip-so400m-patch14-224"`):
            Folder or Hub repository of the SigLIP teacher (released code: so400m; paper: Large,
            `google/siglip-large-patch16-256`).
        teacher_loss (`str`, *optional*, defaults to `"cosine"`):
            Distance to the teachers' features: `"cosine"`, negative cosine similarity (the released code), or `"mse"`
            (the paper).
        teacher_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision of the teachers: `"bfloat16"`, `"float16"` or `"float32"`.
        text_weight (`float`, *optional*, defaults to 1.0):
            Weight of the cross-entropy of the caption's tokens.
        text_tokenizer (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Folder or Hub repository of the caption tokenizer.
        text_length (`int`, *optional*, defaults to 77):
            Tokens of a caption that are predicted; longer captions are cut.
        latent_statistics (`str`, *optional*, defaults to `"scalar"`):
            Whether the exported mean and standard deviation of the latents are one number each (published) or one
            per `"channel"`.
        latent_statistics_images (`int`, *optional*, defaults to 50000):
            Training images over which they are measured at the end, or all when there are fewer.
    """

    total_batch_size: int = 512
    max_train_steps: int = 500_000
    scale_learning_rate: bool = True
    lr_scheduler: Literal["constant", "cosine"] = "cosine"
    lr_warmup_steps: int = 10_000
    adam_beta2: float = 0.95
    weight_decay: float = 1e-4

    stage: Literal["mask_modelling", "decoder_finetuning"] = "mask_modelling"
    model: dict = field(default_factory=dict)
    mixed_resolutions: list[int] = field(default_factory=list)
    mixed_resolution_weights: list[float] = field(default_factory=list)
    crop: Literal["center", "random"] = "center"
    mask_ratio_density: Literal["truncated_normal", "uniform"] = "truncated_normal"
    mask_ratio_mean: float = 0.6
    mask_ratio_std: float = 0.25
    mask_ratio_min: float = 0.4
    mask_ratio_max: float = 0.6
    mask_ratio_start: float = 0.6
    mask_ratio_end: float = 0.0
    mask_ratio_decay_steps: int = 50_000
    reconstruction_weight: float = 1.0
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    perceptual_network: Literal["vgg", "alex", "squeeze"] = "vgg"
    perceptual_warmup_steps: int = 10_000
    adversarial_weight: float = 0.4
    adversarial_loss: Literal["hinge", "non_saturating"] = "hinge"
    adversarial_start_step: int = 30_000
    adversarial_warmup_steps: int = 0
    adaptive_adversarial_weight: bool = True
    discriminator_model: str = "vit_small_patch16_224.dino"
    discriminator_input: Literal["resize", "crop"] = "resize"
    discriminator_image_size: int = 224
    discriminator_learning_rate: float = 1e-4
    diffaugment: list[Literal["color", "translation", "cutout"]] = field(
        default_factory=lambda: ["color", "translation", "cutout"]
    )
    diffaugment_probability: float = 0.5
    diffaugment_cutout: float = 0.2
    lecam_weight: float = 1e-3
    lecam_decay: float = 0.999
    consistency_weight: float = 4.0
    auxiliary_targets: list[Literal["hog", "dinov2", "siglip", "text"]] = field(
        default_factory=lambda: ["hog", "dinov2", "siglip"]
    )
    auxiliary_num_layers: int = 3
    auxiliary_hidden_size: int = 192
    auxiliary_num_attention_heads: int = 3
    hog_weight: float = 1.0
    dinov2_weight: float = 1.0
    dinov2_model: str = "facebook/dinov2-large"
    siglip_weight: float = 1.0
    siglip_model: str = "google/siglip-so400m-patch14-224"
    teacher_loss: Literal["cosine", "mse"] = "cosine"
    teacher_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    text_weight: float = 1.0
    text_tokenizer: str = "openai/clip-vit-large-patch14"
    text_length: int = 77
    latent_statistics: Literal["scalar", "channel"] = "scalar"
    latent_statistics_images: int = 50_000

    def __post_init__(self):
        super().__post_init__()
        from ..models.autoencoder_mae import AutoencoderMAE

        if self.stage == "decoder_finetuning" and self.model:
            raise ValueError(
                f"`model` must be empty when `stage` is 'decoder_finetuning', got {self.model}: the sizes come from "
                "the tokenizer that is fine-tuned."
            )
        derived = {"sample_size": "`resolution`", "latents_mean": "the training", "latents_std": "the training"}
        check_model_settings(AutoencoderMAE, self.model, derived)
        if self.model.get("position_embedding") == "absolute" and "rope_theta" in self.model:
            raise ValueError(
                f"`model` sets 'rope_theta' to {self.model['rope_theta']}, but has no rotary positions, since "
                "'position_embedding' is 'absolute': leave it out."
            )
        for name in ("in_channels", "out_channels"):
            if self.model.get(name, 3) != 3:
                raise ValueError(
                    f"`model` sets {name!r} to {self.model[name]}, but the images of a training have 3 channels: "
                    "leave it out."
                )
        check_positive(self, "mask_ratio_std", "mask_ratio_decay_steps", "auxiliary_hidden_size", "text_length")
        check_positive(self, "auxiliary_num_attention_heads", "latent_statistics_images", "reconstruction_weight")
        check_positive(self, "discriminator_learning_rate", "discriminator_image_size")
        weights = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        check_at_least_zero(self, *weights, "auxiliary_num_layers", "perceptual_warmup_steps")
        check_at_least_zero(self, "adversarial_start_step", "adversarial_warmup_steps")
        check_fraction(self, "mask_ratio_mean", "mask_ratio_min", "mask_ratio_max")
        check_fraction(self, "mask_ratio_start", "mask_ratio_end")
        check_fraction(self, "diffaugment_probability", "diffaugment_cutout")
        check_fraction(self, "lecam_decay", below_one=True)
        if self.mask_ratio_min > self.mask_ratio_max:
            raise ValueError(
                f"`mask_ratio_min` must not exceed `mask_ratio_max`, got {self.mask_ratio_min} and "
                f"{self.mask_ratio_max}."
            )
        for name in ("auxiliary_targets", "diffaugment", "mixed_resolutions"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` names something twice: {values}.")
        check_finite(self, *weights, "discriminator_learning_rate")
        self.mask_ratio_at(0, 0)  # refuses a normal without mass between the bounds
        self._check_mixed_resolutions()
        self._check_auxiliary_decoders()
        self._check_discriminator()

    def _check_auxiliary_decoders(self) -> None:
        width, heads = self.auxiliary_hidden_size, self.auxiliary_num_attention_heads
        if width % heads or width // heads % 4:
            raise ValueError(
                f"`auxiliary_hidden_size` ({width}) must be `auxiliary_num_attention_heads` ({heads}) heads of equal "
                "size, a multiple of 4."
            )
        unweighted = [name for name in self.auxiliary_targets if getattr(self, f"{name}_weight") == 0]
        if self.stage == "mask_modelling" and unweighted:
            raise ValueError(
                f"`{unweighted[0]}_weight` is 0, but {unweighted[0]!r} is one of the `auxiliary_targets`, which would "
                "be predicted for nothing: remove it from these."
            )
        if self.predicts_text and self.auxiliary_num_layers == 0:
            raise ValueError(
                "`auxiliary_num_layers` = 0, a linear decoder, cannot predict 'text': use at least 1, or leave it out."
            )

    def _check_discriminator(self) -> None:
        if self.adversarial_weight == 0:
            return
        if self.adversarial_start_step >= self.max_train_steps:
            raise ValueError(
                f"`adversarial_start_step` = {self.adversarial_start_step} is not before the end of the run, "
                f"`max_train_steps` = {self.max_train_steps}: lower it, or leave the discriminator out with "
                "`adversarial_weight` 0."
            )
        if self.consistency_weight > 0 and not self.diffaugment:
            raise ValueError(
                "`consistency_weight` compares two augmentations of an image, but `diffaugment` is empty: name some, "
                "or set the weight to 0."
            )

    def _check_mixed_resolutions(self) -> None:
        sizes, weights = self.mixed_resolutions, self.mixed_resolution_weights
        if sizes and self.resolution not in sizes:
            raise ValueError(
                f"`mixed_resolutions` must contain `resolution`, got {sizes} and {self.resolution}: it is the size "
                "that the model is built for and measured at."
            )
        if weights and len(sizes) > 1 and len(weights) != len(sizes):
            raise ValueError(
                f"`mixed_resolution_weights` must have one weight for each of `mixed_resolutions`, got {weights} and "
                f"{sizes}."
            )
        if any(not (weight > 0 and math.isfinite(weight)) for weight in weights):
            raise ValueError(f"`mixed_resolution_weights` must be positive, got {weights}.")
        if len(sizes) > 1 and self.predicts_text and not self._has_latent_tokens:
            raise ValueError(
                f"`mixed_resolutions` {sizes} give different numbers of image tokens, which the decoder of 'text' "
                "cannot read: use `num_latent_tokens` above 0, or leave 'text' out."
            )
        if len(sizes) > 1 and self.feature_targets and self.auxiliary_num_layers == 0 and self._has_latent_tokens:
            raise ValueError(
                "`auxiliary_num_layers` = 0, a linear decoder, is tied to one image size: use at least 1 with "
                f"`mixed_resolutions` {sizes}."
            )

    @property
    def _has_latent_tokens(self) -> bool:
        return self.model.get("num_latent_tokens", 128) > 0

    @property
    def training_resolutions(self) -> list[int]:
        """`list[int]`: Sizes of the training images."""
        return self.mixed_resolutions or [self.resolution]

    @property
    def feature_targets(self) -> list[str]:
        """`list[str]`: The auxiliary targets that are features of patches."""
        if self.stage == "decoder_finetuning":
            return []
        return [name for name in self.auxiliary_targets if name != "text"]

    @property
    def predicts_text(self) -> bool:
        """`bool`: Whether the tokens of captions are predicted."""
        return self.stage == "mask_modelling" and "text" in self.auxiliary_targets

    def mask_ratio_at(self, step: int, seed: int) -> float:
        """Share of the patches that are masked in a step: drawn in stage 1 (section 3.2), falling in stage 2 (3.3)."""
        if self.stage == "decoder_finetuning":
            return linear_mask_ratio(step, self.mask_ratio_decay_steps, self.mask_ratio_start, self.mask_ratio_end)
        return sample_step_mask_ratio(
            seed,
            step,
            self.mask_ratio_mean,
            self.mask_ratio_std,
            self.mask_ratio_min,
            self.mask_ratio_max,
            density=self.mask_ratio_density,
        )

    def loss_scales_at(self, step: int) -> dict[str, float]:
        """
        What the weights of the pixel terms are multiplied by in a step.

        Args:
            step (`int`): Optimiser step, counted from 0.

        Returns:
            `dict[str, float]`: Factors in `[0, 1]` of `"perceptual"` and `"adversarial"`; 0 leaves the term out.
        """
        adversarial = 0.0
        if step >= self.adversarial_start_step:
            adversarial = _warm_up(step - self.adversarial_start_step, self.adversarial_warmup_steps)
        return {"perceptual": _warm_up(step, self.perceptual_warmup_steps), "adversarial": adversarial}

    @property
    def peak_discriminator_learning_rate(self) -> float:
        """`float`: Learning rate of the discriminator's heads after the warm-up, scaled like the tokenizer's."""
        return self.peak_learning_rate * self.discriminator_learning_rate / self.learning_rate

    def discriminator_learning_rate_at(self, step: int) -> float:
        """Learning rate of the discriminator's heads in a step: the schedule is the tokenizer's."""
        return self.learning_rate_at(step) * self.discriminator_learning_rate / self.learning_rate

    def unused_settings(self) -> dict[str, str]:
        names = self.__dataclass_fields__
        auxiliary = [name for name in names if name.startswith(("auxiliary_", "hog_", "dinov2_", "siglip_", "text_"))]
        auxiliary += ["teacher_loss", "teacher_dtype"]
        unused = super().unused_settings()

        def leave(reason: str, *settings: str) -> None:
            for name in settings:
                unused.setdefault(name, reason)

        if self.stage == "mask_modelling":
            leave("`stage` is 'mask_modelling'", *_DECODER_FINETUNING)
            if not self.model.get("gaussian_posterior", False):
                leave("`model` has no `gaussian_posterior`", "kl_weight")
            if self.mask_ratio_density == "uniform" or self.mask_ratio_min == self.mask_ratio_max:
                leave("the mask ratio is not drawn from a normal", "mask_ratio_mean", "mask_ratio_std")
            if self.mask_ratio_min == self.mask_ratio_max:
                leave("the mask ratio is fixed", "mask_ratio_density")
        else:
            leave("`stage` is 'decoder_finetuning'", *_MASK_MODELLING, *auxiliary)
            leave("the frozen encoder has no KL term", "kl_weight")
        sizes = [name for name in auxiliary if name.startswith("auxiliary_") and name != "auxiliary_targets"]
        if not self.auxiliary_targets:
            leave("`auxiliary_targets` is empty", *sizes)
        if self.auxiliary_num_layers == 0:
            leave("linear auxiliary decoders have no width", "auxiliary_hidden_size", "auxiliary_num_attention_heads")
        for target in ("hog", "dinov2", "siglip", "text"):
            if target not in self.auxiliary_targets:
                leave(
                    f"{target!r} is not in `auxiliary_targets`",
                    *[name for name in auxiliary if name.startswith(f"{target}_")],
                )
        if not set(TEACHERS) & set(self.auxiliary_targets):
            leave("no teacher is in `auxiliary_targets`", "teacher_loss", "teacher_dtype")
        if self.perceptual_weight == 0:
            leave("`perceptual_weight` is 0", "perceptual_network", "perceptual_warmup_steps")
        if self.adversarial_weight == 0:
            prefixes = ("adversarial_", "discriminator_", "diffaugment", "lecam_")
            adversarial = [name for name in names if name.startswith(prefixes)]
            adversarial += ["adaptive_adversarial_weight", "consistency_weight"]
            adversarial.remove("adversarial_weight")
            leave("`adversarial_weight` is 0", *adversarial)
        if not self.diffaugment:
            leave("`diffaugment` is empty", "diffaugment_probability")
        if "cutout" not in self.diffaugment:
            leave("'cutout' is not in `diffaugment`", "diffaugment_cutout")
        if self.lecam_weight == 0:
            leave("`lecam_weight` is 0", "lecam_decay")
        if len(self.mixed_resolutions) < 2:
            leave("`mixed_resolutions` has fewer than two sizes", "mixed_resolution_weights")
        return unused


def _warm_up(step: int, num_steps: int) -> float:
    return min((step + 1) / num_steps, 1.0) if num_steps > 0 else 1.0
