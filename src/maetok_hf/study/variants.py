"""The tokenizers that the study compares (MAETok sections 3 and 4.3), and what was published of them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Variant:
    """
    One tokenizer of the study: what distinguishes its training from the others'.

    Args:
        name (`str`): For files and flags.
        title (`str`): For tables and pictures.
        masked (`bool`): Whether patches are masked in training.
        learnable_tokens (`bool`, *optional*, defaults to `True`): Learnable latent tokens, or else the image tokens.
        targets (`bool`): Whether auxiliary decoders predict HOG features; else the pixels are the only target.
        posterior (`bool`, *optional*, defaults to `False`): A Gaussian posterior with a KL term: the KL-VAE.
        positions (`str`, *optional*): `"rope"` or `"absolute"`, for a training at two resolutions; the recipe's
            positions and its one resolution by default.
        base (`str`, *optional*): The variant whose decoder is fine-tuned. Its encoder, its latents and therefore the
            generator on them are the same, bit for bit.
        core (`bool`, *optional*, defaults to `False`): Whether it is part of the study without `--full`.
        published (`tuple[float | None, float | None]`, *optional*): rFID and gFID of the paper's counterpart on
            ImageNet, without guidance; for training at two resolutions, rFID at the first and the second.
    """

    name: str
    title: str
    masked: bool
    learnable_tokens: bool = True
    targets: bool
    posterior: bool = False
    positions: str | None = None
    base: str | None = None
    core: bool = False
    published: tuple[float | None, float | None] = (None, None)

    @property
    def has_generator(self) -> bool:
        """`bool`: Whether a generator is trained on its latents; positions are compared by reconstructions alone."""
        return self.positions is None

    @property
    def factors(self) -> tuple[bool, bool, bool] | None:
        """`tuple[bool, bool, bool]`, *optional*: Masks, learnable tokens and targets, if it is one of these eight."""
        if self.posterior or self.positions or self.base:
            return None
        return self.masked, self.learnable_tokens, self.targets

    def flags(self, image_token_channels: int, resolutions: tuple[int, int]) -> list[str]:
        """
        What replaces settings of the preset's recipe, which has masks, learnable tokens and the HOG target.

        Args:
            image_token_channels (`int`): Channels of image tokens with which a latent has as many numbers as with
                learnable tokens.
            resolutions (`tuple[int, int]`): Image sizes of a training at two of them.

        Returns:
            `list[str]`: Words of the command line of `train_maetok.py`.
        """
        model, words = [], []
        if not self.learnable_tokens:
            # image tokens are read by the plain decoder only
            model += ["num_latent_tokens=0", f"latent_channels={image_token_channels}", "modulated_decoder=false"]
        if self.posterior:
            model += ["gaussian_posterior=true"]
            words += ["--kl_weight", "1e-6"]
        if self.positions is not None:
            model += [f"position_embedding={self.positions}"]
            words += ["--mixed_resolutions", *map(str, resolutions)]
        if not self.masked:
            words += ["--mask_ratio_min", "0", "--mask_ratio_max", "0"]
        if not self.targets:
            words += ["--auxiliary_targets"]
        return [*(["--model", *model] if model else []), *words]


_ALL = (
    Variant(name="autoencoder", title="AE", masked=False, targets=False, core=True, published=(0.67, 24.47)),
    Variant(
        name="kl-vae", title="KL-VAE", masked=False, targets=False, posterior=True, core=True, published=(1.22, 22.17)
    ),
    Variant(name="maetok", title="MAETok (masks, HOG)", masked=True, targets=True, core=True, published=(None, 13.54)),
    Variant(
        name="maetok-finetuned",
        title="MAETok + decoder fine-tuning",
        masked=True,
        targets=True,
        base="maetok",
        core=True,
    ),
    Variant(name="masked-pixels", title="masked AE, pixels only", masked=True, targets=False, published=(1.15, 17.18)),
    Variant(name="targets", title="HOG without masks", masked=False, targets=True, published=(0.64, 8.44)),
    Variant(
        name="image-tokens",
        title="image tokens, masks, HOG",
        masked=True,
        learnable_tokens=False,
        targets=True,
        published=(1.01, 6.85),
    ),
    Variant(
        name="image-tokens-targets",
        title="image tokens, HOG without masks",
        masked=False,
        learnable_tokens=False,
        targets=True,
        published=(0.43, 9.88),
    ),
    Variant(
        name="image-tokens-masked-pixels",
        title="image tokens, masks, pixels only",
        masked=True,
        learnable_tokens=False,
        targets=False,
        published=(0.96, 18.23),
    ),
    Variant(
        name="image-tokens-autoencoder",
        title="image tokens, AE",
        masked=False,
        learnable_tokens=False,
        targets=False,
    ),
    Variant(
        name="kl-vae-masked",
        title="KL-VAE with masks",
        masked=True,
        targets=False,
        posterior=True,
        published=(1.75, 18.17),
    ),
    Variant(
        name="two-sizes-rope",
        title="two resolutions, rotary positions",
        masked=True,
        targets=True,
        positions="rope",
        published=(0.51, 0.72),
    ),
    Variant(
        name="two-sizes-absolute",
        title="two resolutions, absolute positions",
        masked=True,
        targets=True,
        positions="absolute",
        published=(0.73, 1.43),
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}
