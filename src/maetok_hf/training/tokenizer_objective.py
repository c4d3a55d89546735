"""The tokenizer's objective: pixels and auxiliary features from masked images (MAETok, sections 3.2 and 3.3)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..models.autoencoder_mae import AutoencoderMAE, TokenGaussianDistribution
from ..models.vit import ViTDecoder, compile_blocks
from .adversarial import adaptive_weight, output_gradient, weight_gradient_norm, with_gradient
from .auxiliary import AuxiliaryDecoder
from .targets import FeatureTarget, feature_loss
from .text_target import TextDecoder, caption_loss


RESERVED_TERMS = ("loss", "reconstruction", "kl", "perceptual", "adversarial", "adaptive_weight", "text")
DEFAULT_KL_WEIGHT = 1e-6
DEFAULT_ADVERSARIAL_WEIGHT = 0.4
# Gradients of single pixels are below the smallest number of float16; a power of two goes in and comes out exactly.
FP16_GRADIENT_SCALE = 2.0**16


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
    Loss of a training step of the tokenizer. It holds the tokenizer and its auxiliary decoders, so that preparing and
    forwarding the objective is what synchronises gradients between processes. It draws nothing itself.

    What is used but not trained (targets, the perceptual network, the discriminator's side) stays outside the module
    tree, where nothing wraps, shards, averages or saves it; [`~TokenizerObjective.move_frozen`] moves it.

    Terms, returned by name and unweighted:

    - `"reconstruction"`: squared error of the pixels, mean over the *whole* image.
    - `"perceptual"`: mean over the batch of `perceptual(reconstruction, images)`.
    - `"adversarial"`: what `adversary(reconstruction, draws)` gives, and `"adaptive_weight"`, the factor by which it
      was multiplied before its weight: the norm of the gradient of the weighted pixel and perceptual terms over its
      own, both with respect to the last pixel layer (VQGAN, arXiv 2012.09841, equation 7).
    - one per target, under the target's name: its `feature_loss` (as in the released code, MSE for HOG and negative
      cosine similarity for teachers), mean over the *masked* positions of the batch.
    - `"text"`: cross-entropy of the caption's tokens, mean over the tokens of the batch.
    - `"kl"`, for a tokenizer with a Gaussian posterior: divergence from the standard normal in nats, summed over
      tokens and channels, mean over the batch.

    A step that is cut into micro-batches, on one process or several, has the mean of their terms. For two of them that
    is not the term of the whole batch: the adaptive weight, a ratio of norms, and `"text"`, a mean over tokens whose
    number varies. (Of the discriminator, see [`Discriminator`], the power iterations differ.)

    Args:
        tokenizer ([`AutoencoderMAE`]): The tokenizer to train.
        targets (`Mapping[str, FeatureTarget]`, *optional*): Feature targets by name. They are frozen and stay in
            evaluation mode.
        auxiliary_decoders (`Mapping[str, AuxiliaryDecoder]`, *optional*): One decoder for each target, by the same
            names.
        loss_weights (`Mapping[str, float]`, *optional*): Weights of terms by name; terms that are not named weigh 1.0,
            `"kl"` 1e-6 and `"adversarial"` 0.4.
        decoder_only (`bool`, *optional*, defaults to `False`): Fine-tune the pixel decoder (stage 2): the encoder, and
            with it everything before the latent, is frozen and runs without gradient; there are no auxiliary decoders
            and no KL term.
        text_decoder ([`TextDecoder`], *optional*): Predicts the tokens of captions.
        perceptual (`Callable`, *optional*): Distances of shape `(batch_size,)` between reconstructions and images, as
            [`PerceptualLoss`] gives them.
        adversary (`Callable`, *optional*): The adversarial loss of reconstructions, given the draws of the step; the
            `generator_loss` of a [`DiscriminatorObjective`].
        adaptive_adversarial_weight (`bool`, *optional*, defaults to `True`): Whether `"adaptive_weight"` is computed;
            otherwise the factor is 1 and no such term is returned.

    Raises:
        ValueError: If names of targets, decoders and weights do not fit each other, a decoder and its target differ in
            `feature_dim`, a weight is negative or not finite, or `decoder_only` is combined with auxiliary decoders.
    """

    def __init__(
        self,
        tokenizer: AutoencoderMAE,
        targets: Mapping[str, FeatureTarget] | None = None,
        auxiliary_decoders: Mapping[str, AuxiliaryDecoder] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        decoder_only: bool = False,
        text_decoder: TextDecoder | None = None,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        adversary: Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor] | None = None,
        adaptive_adversarial_weight: bool = True,
    ):
        super().__init__()
        targets, auxiliary_decoders = dict(targets or {}), dict(auxiliary_decoders or {})
        if decoder_only and (targets or auxiliary_decoders or text_decoder is not None):
            raise ValueError(
                f"`decoder_only` trains no auxiliary decoder, got targets {sorted(targets)}, decoders "
                f"{sorted(auxiliary_decoders)} and `text_decoder`={text_decoder is not None}: leave them out."
            )
        _check_auxiliary(targets, auxiliary_decoders)

        self.tokenizer = tokenizer
        self.auxiliary_decoders = nn.ModuleDict(auxiliary_decoders)
        if text_decoder is not None:
            self.auxiliary_decoders["text"] = text_decoder
        self.decoder_only = decoder_only
        self.adaptive_adversarial_weight = adaptive_adversarial_weight
        # a dictionary is not searched for modules
        self._frozen = {"targets": targets, "perceptual": perceptual, "adversary": adversary}
        self.loss_weights = self._resolve_weights(loss_weights or {})
        for target in targets.values():
            target.requires_grad_(False).eval()
        if decoder_only:
            tokenizer.encoder.requires_grad_(False)
        self.train(self.training)

    @property
    def targets(self) -> dict[str, FeatureTarget]:
        """`dict[str, FeatureTarget]`: The feature targets by name."""
        return self._frozen["targets"]

    @property
    def perceptual(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """The perceptual distance, if there is one."""
        return self._frozen["perceptual"]

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compile the transformer blocks of the tokenizer and of its auxiliary decoders, where nearly all of the time
        goes; what joins them (masks, losses, gradients of single layers) stays as it is.

        Args:
            args, kwargs: Passed on to `torch.compile`.
        """
        self.tokenizer.compile_repeated_blocks(*args, **kwargs)
        for decoder in self.auxiliary_decoders.modules():
            if isinstance(decoder, ViTDecoder):
                compile_blocks(decoder, *args, **kwargs)

    def _resolve_weights(self, loss_weights: Mapping[str, float]) -> dict[str, float]:
        weights = {"reconstruction": 1.0} | dict.fromkeys(self.auxiliary_decoders, 1.0)
        if self._frozen["perceptual"] is not None:
            weights["perceptual"] = 1.0
        if self._frozen["adversary"] is not None:
            weights["adversarial"] = DEFAULT_ADVERSARIAL_WEIGHT
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

    def move_frozen(self, device: torch.device | str) -> "TokenizerObjective":
        """
        Move what is not trained, which `.to()` does not reach, except the adversary: the discriminator's own objective
        moves it.

        Args:
            device (`torch.device` or `str`): Where the batches are.

        Returns:
            [`TokenizerObjective`]: Itself.
        """
        for module in (*self.targets.values(), self.perceptual):
            if isinstance(module, nn.Module):
                module.to(device)
        return self

    def train(self, mode: bool = True) -> "TokenizerObjective":
        """Like `nn.Module.train`, but a frozen encoder stays in evaluation mode."""
        super().train(mode)
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
        token_indices: torch.Tensor | None = None,
        scales: Mapping[str, float] | None = None,
        adversarial_draws: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
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
            token_indices (`torch.LongTensor` of shape `(batch_size, text_length)`, *optional*): The captions' tokens,
                needed if, and only if, there is a `text_decoder`.
            scales (`Mapping[str, float]`, *optional*): Factors of the weights of `"perceptual"` and `"adversarial"` in
                this step, 1 by default. At 0 the term is not computed.
            adversarial_draws (`Mapping[str, torch.Tensor]`, *optional*): What the adversary is given with the
                reconstructions.

        Returns:
            `tuple`: The terms by name, scalars in float32, where `"loss"` carries the gradient and the others are
            detached; and the reconstructions, detached, of the shape of `pixel_values`, for the discriminator's step.

        Raises:
            ValueError: If an input has the wrong shape or type, one that is needed is missing, one that has no effect
                is given, or a target does not give one vector per patch.
        """
        scales = self._check_scales(scales or {})
        self._check_text(token_indices)
        self._check_draws(adversarial_draws, scales["adversarial"])
        if self.decoder_only:
            with torch.no_grad():
                latent, _ = self._encode(pixel_values, mask, posterior_noise)
            kl = None
        else:
            latent, kl = self._encode(pixel_values, mask, posterior_noise)

        loss, terms, reconstruction = self._pixel_terms(latent, pixel_values, scales, adversarial_draws)
        others = self._auxiliary_terms(latent, pixel_values, mask)
        if token_indices is not None:
            others["text"] = caption_loss(self.auxiliary_decoders["text"](latent), token_indices)
        if kl is not None:
            others["kl"] = kl
        loss = loss + sum(self.loss_weights[name] * term for name, term in others.items())
        terms = {name: term.detach() for name, term in (terms | others).items()}
        return {"loss": loss} | terms, reconstruction.detach()

    def _check_scales(self, scales: Mapping[str, float]) -> dict[str, float]:
        for name, value in scales.items():
            if name not in ("perceptual", "adversarial"):
                raise ValueError(f"`scales` may name 'perceptual' and 'adversarial', got {name!r}.")
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`scales[{name!r}]` must be finite and not negative, got {value}.")
        return {"perceptual": 1.0, "adversarial": 1.0} | dict(scales)

    def _check_draws(self, draws: Mapping[str, torch.Tensor] | None, scale: float) -> None:
        if (self._frozen["adversary"] is not None and scale > 0) != (draws is not None):
            raise ValueError(
                "`adversarial_draws` is needed by the adversary: draw them, or set `scales['adversarial']` to 0."
                if draws is None
                else "`adversarial_draws` has no effect: there is no adversary, or `scales['adversarial']` is 0."
            )

    def _check_text(self, token_indices: torch.Tensor | None) -> None:
        if ("text" in self.auxiliary_decoders) != (token_indices is not None):
            raise ValueError(
                "`token_indices` is needed by the `text_decoder`: pass the tokens of the captions."
                if token_indices is None
                else "`token_indices` has no meaning without a `text_decoder`: leave it out."
            )

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

    def _pixel_terms(
        self,
        latent: torch.Tensor,
        pixel_values: torch.Tensor,
        scales: Mapping[str, float],
        adversarial_draws: Mapping[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """The weighted sum of the terms of the reconstruction, the terms, and the reconstruction."""
        perceptual, adversary = self.perceptual, self._frozen["adversary"]
        height, width = pixel_values.shape[-2:]
        with _input_and_output(self.tokenizer.decoder.proj_out) as last_layer:
            reconstruction = self.tokenizer.decode(latent, height, width, return_dict=False)[0]

        terms = {"reconstruction": F.mse_loss(reconstruction.float(), pixel_values.float())}
        loss = self.loss_weights["reconstruction"] * terms["reconstruction"]
        if perceptual is not None and scales["perceptual"] > 0:
            terms["perceptual"] = perceptual(reconstruction, pixel_values).mean()
            loss = loss + self.loss_weights["perceptual"] * scales["perceptual"] * terms["perceptual"]
        if adversary is not None and scales["adversarial"] > 0:
            terms["adversarial"] = adversary(reconstruction, adversarial_draws)
            weight = self.loss_weights["adversarial"] * scales["adversarial"]
            if self.adaptive_adversarial_weight and torch.is_grad_enabled():
                loss, terms["adaptive_weight"] = _balanced(loss, terms["adversarial"], weight, *last_layer)
            else:
                loss = loss + weight * terms["adversarial"]
        return loss, terms, reconstruction

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


@contextlib.contextmanager
def _input_and_output(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Record what a layer is given and what it makes of it while the context is open."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    try:
        yield seen
    finally:
        handle.remove()


def _balanced(
    loss: torch.Tensor,
    adversarial: torch.Tensor,
    weight: float,
    layer_input: torch.Tensor,
    layer_output: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the pixel loss and the adversarial term at its adaptive weight, and that weight."""
    scale = FP16_GRADIENT_SCALE if layer_output.dtype == torch.float16 else 1.0
    gradients = [output_gradient(term, layer_output, scale) for term in (loss, adversarial)]
    factor = adaptive_weight(*(weight_gradient_norm(layer_input, gradient) for gradient in gradients))
    # The gradients at the output are at hand, so the networks behind the terms are gone through once, not twice.
    gradient = gradients[0] + weight * factor * gradients[1]
    return with_gradient(loss + weight * factor * adversarial, layer_output, gradient), factor


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
