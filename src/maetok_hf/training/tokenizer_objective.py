"""The tokenizer's objective: pixels and auxiliary features from masked images (MAETok, sections 3.2 and 3.3)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..models.autoencoder_mae import AutoencoderMAE, TokenGaussianDistribution
from .auxiliary import AuxiliaryDecoder
from .targets import FeatureTarget, feature_loss


RESERVED_TERMS = ("loss", "reconstruction", "kl")
DEFAULT_KL_WEIGHT = 1e-6


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    Mean over the masked positions of a batch.

    Args:
        values (`torch.Tensor` of shape `(batch_size, N)`): One value per patch.
        mask (`torch.BoolTensor` of shape `(batch_size, N)`, *optional*):
            True at the positions that count. `None` counts all. If no position is True the result is 0 (and so are its
            gradients): nothing was masked, so nothing was asked.

    Returns:
        `torch.Tensor`: Scalar.
    """
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


class TokenizerObjective(nn.Module):
    """
    Loss of a training step of the tokenizer. It holds the tokenizer, its auxiliary decoders and their targets, so that
    preparing and forwarding the objective is what synchronises gradients between processes. It draws nothing itself.

    Terms, returned by name and unweighted:

    - `"reconstruction"`: squared error of the pixels, mean over the *whole* image.
    - one per target, under the target's name: its `feature_loss` (MSE for HOG, as in the released code), mean over the
      *masked* positions of the batch.
    - `"kl"`, for a tokenizer with a Gaussian posterior: divergence from the standard normal in nats, summed over
      tokens and channels, mean over the batch.

    Args:
        tokenizer ([`AutoencoderMAE`]): The tokenizer to train.
        targets (`Mapping[str, FeatureTarget]`, *optional*): Feature targets by name. They are frozen and stay in
            evaluation mode.
        auxiliary_decoders (`Mapping[str, AuxiliaryDecoder]`, *optional*): One decoder for each target, by the same
            names.
        loss_weights (`Mapping[str, float]`, *optional*): Weights of terms by name; terms that are not named weigh 1.0,
            `"kl"` 1e-6.
        decoder_only (`bool`, *optional*, defaults to `False`): Fine-tune the pixel decoder (stage 2): the encoder, and
            with it everything before the latent, is frozen and runs without gradient; there are no auxiliary decoders
            and no KL term.

    Raises:
        ValueError: If names of targets, decoders and weights do not fit each other, a decoder and its target differ in
            `feature_dim`, a weight is negative or not finite, or `decoder_only` is combined with targets.
    """

    def __init__(
        self,
        tokenizer: AutoencoderMAE,
        targets: Mapping[str, FeatureTarget] | None = None,
        auxiliary_decoders: Mapping[str, AuxiliaryDecoder] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        decoder_only: bool = False,
    ):
        super().__init__()
        targets, auxiliary_decoders = dict(targets or {}), dict(auxiliary_decoders or {})
        if decoder_only and (targets or auxiliary_decoders):
            raise ValueError(
                f"`decoder_only` trains no auxiliary decoder, got targets {sorted(targets)} and decoders "
                f"{sorted(auxiliary_decoders)}: leave both out."
            )
        _check_auxiliary(targets, auxiliary_decoders)

        self.tokenizer = tokenizer
        self.targets = nn.ModuleDict(targets)
        self.auxiliary_decoders = nn.ModuleDict(auxiliary_decoders)
        self.decoder_only = decoder_only
        self.loss_weights = self._resolve_weights(loss_weights or {})
        self.targets.requires_grad_(False)
        if decoder_only:
            tokenizer.encoder.requires_grad_(False)
        self.train(self.training)

    def _resolve_weights(self, loss_weights: Mapping[str, float]) -> dict[str, float]:
        weights = {"reconstruction": 1.0} | dict.fromkeys(self.targets, 1.0)
        if self.tokenizer.config.gaussian_posterior and not self.decoder_only:
            weights["kl"] = DEFAULT_KL_WEIGHT
        for name, value in loss_weights.items():
            if name not in weights:
                raise ValueError(
                    f"`loss_weights` names {name!r}, which is no term of this objective: it has {', '.join(weights)}."
                )
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`loss_weights[{name!r}]` must be finite and not negative, got {value}.")
        return weights | {name: float(value) for name, value in loss_weights.items()}

    def train(self, mode: bool = True) -> "TokenizerObjective":
        """Like `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode)
        self.targets.eval()
        if self.decoder_only:
            self.tokenizer.encoder.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that this objective trains, for the optimiser and for gradient clipping."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(
        self,
        pixel_values: torch.Tensor,
        mask: torch.Tensor | None = None,
        posterior_noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Run the encoder once, the decoders on its latents, and sum the weighted terms.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Clean images in `[-1, 1]`.
            mask (`torch.BoolTensor` of shape `(batch_size, N)`, *optional*):
                True where a patch is replaced by the mask token; see [`~maetok_hf.training.masking.sample_masks`].
                Auxiliary terms count these positions only, and are 0 if there is none. `None` trains without masking
                (an ablation of the paper): auxiliary terms then count every position.
            posterior_noise (`torch.Tensor` of shape `(batch_size, num_latent_tokens or N, latent_channels)`,
                *optional*): Standard normal noise of the Gaussian posterior, see
                [`~maetok_hf.training.draws.sample_noise`]; needed if, and only if, the tokenizer has one. Zeros give
                the posterior's mode.

        Returns:
            `dict[str, torch.Tensor]`: Scalars in float32. `"loss"` carries the gradient; the terms are detached.

        Raises:
            ValueError: If an input has the wrong shape or type, `posterior_noise` is missing or superfluous, or a
                target does not give one vector per patch.
        """
        if self.decoder_only:
            with torch.no_grad():
                latent, _ = self._encode(pixel_values, mask, posterior_noise)
            kl = None
        else:
            latent, kl = self._encode(pixel_values, mask, posterior_noise)

        terms = self._pixel_terms(latent, pixel_values) | self._auxiliary_terms(latent, pixel_values, mask)
        if kl is not None:
            terms["kl"] = kl
        loss = sum(self.loss_weights[name] * term for name, term in terms.items())
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _encode(
        self, pixel_values: torch.Tensor, mask: torch.Tensor | None, posterior_noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The raw latents and, for a Gaussian posterior, the KL term."""
        gaussian = self.tokenizer.config.gaussian_posterior
        if gaussian != (posterior_noise is not None):
            raise ValueError(
                "`posterior_noise` is needed for a tokenizer with `gaussian_posterior`: draw it or pass zeros."
                if gaussian
                else "`posterior_noise` has no meaning for a tokenizer without `gaussian_posterior`: leave it out."
            )
        if mask is None:
            # equal to no mask, but keeps the mask token in the graph, as distributed training wants of every parameter
            num_patches = math.prod(self._grid(pixel_values))
            mask = torch.zeros(pixel_values.shape[0], num_patches, dtype=torch.bool, device=pixel_values.device)
        encoded = self.tokenizer.encode(pixel_values, mask, return_dict=False)[0]
        if not gaussian:
            return encoded, None

        # a variance is the exponential of a prediction: low precision is for the matrices, not for this
        posterior = TokenGaussianDistribution(encoded.parameters.float())
        if posterior_noise.shape != posterior.mean.shape:
            raise ValueError(
                f"`posterior_noise` must have the shape of the latents, {tuple(posterior.mean.shape)}, got "
                f"{tuple(posterior_noise.shape)}."
            )
        return posterior.mean + posterior.std * posterior_noise, posterior.kl().mean()

    def _pixel_terms(self, latent: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        height, width = pixel_values.shape[-2:]
        reconstruction = self.tokenizer.decode(latent, height, width, return_dict=False)[0]
        return {"reconstruction": F.mse_loss(reconstruction.float(), pixel_values.float())}

    def _auxiliary_terms(
        self, latent: torch.Tensor, pixel_values: torch.Tensor, mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        terms = {}
        for name, target in self.targets.items():
            with torch.no_grad():
                features = target(pixel_values)
            prediction = self.auxiliary_decoders[name](latent, self._grid(pixel_values))
            terms[name] = masked_mean(feature_loss(prediction, features, target.feature_loss), mask)
        return terms

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches; the tokenizer checks that they are whole."""
        patch_size = self.tokenizer.config.patch_size
        return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def _check_auxiliary(targets: Mapping[str, FeatureTarget], decoders: Mapping[str, AuxiliaryDecoder]) -> None:
    """Refuse targets and decoders that do not belong together, before a step is spent on them."""
    if targets.keys() != decoders.keys():
        raise ValueError(
            "`targets` and `auxiliary_decoders` must have the same names, got "
            f"{sorted(targets)} and {sorted(decoders)}."
        )
    for name, target in targets.items():
        if name in RESERVED_TERMS:
            raise ValueError(f"{name!r} cannot name a target: it is a term of its own.")
        if target.feature_dim != decoders[name].feature_dim:
            raise ValueError(
                f"target {name!r} gives {target.feature_dim} features per patch but its auxiliary decoder predicts "
                f"{decoders[name].feature_dim}: build it with `feature_dim={target.feature_dim}`."
            )
