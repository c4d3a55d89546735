"""
Losses between a tokenizer and its discriminator, as pure functions of logits in float32 (MAETok, arXiv 2502.03444).

With real logits `r` and fake logits `f`, means over batch and positions:

| `loss_type` | discriminator | tokenizer |
| --- | --- | --- |
| `"hinge"` | `(relu(1 - r) + relu(1 + f)) / 2` | `-f` |
| `"non_saturating"` | `(softplus(-r) + softplus(f)) / 2` | `softplus(-f)` |
"""

import torch
import torch.nn.functional as F


ADVERSARIAL_LOSSES = ("hinge", "non_saturating")
MAX_ADAPTIVE_WEIGHT = 1e4


def check_loss_type(loss_type: str, argument: str = "loss_type") -> None:
    """
    Args:
        loss_type (`str`): Name to check.
        argument (`str`, *optional*, defaults to `"loss_type"`): What the message calls it.

    Raises:
        ValueError: If `loss_type` is neither `"hinge"` nor `"non_saturating"`.
    """
    if loss_type not in ADVERSARIAL_LOSSES:
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, ADVERSARIAL_LOSSES))}, got {loss_type!r}.")


def discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor, loss_type: str = "hinge") -> torch.Tensor:
    """
    What the discriminator minimises: logits of real images up, those of reconstructions down.

    Args:
        logits_real (`torch.Tensor` of any shape): Logits of real images.
        logits_fake (`torch.Tensor` of any shape): Logits of reconstructions.
        loss_type (`str`, *optional*, defaults to `"hinge"`): `"hinge"` or `"non_saturating"`.

    Returns:
        `torch.FloatTensor`: Scalar, not negative.

    Raises:
        ValueError: If `loss_type` is unknown.
    """
    check_loss_type(loss_type)
    logits_real, logits_fake = logits_real.float(), logits_fake.float()
    if loss_type == "hinge":
        return (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()) / 2
    return (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()) / 2


def generator_loss(logits_fake: torch.Tensor, loss_type: str = "hinge") -> torch.Tensor:
    """
    What the tokenizer minimises: logits of its reconstructions up.

    Args:
        logits_fake (`torch.Tensor` of any shape): Logits of reconstructions.
        loss_type (`str`, *optional*, defaults to `"hinge"`): `"hinge"` or `"non_saturating"`.

    Returns:
        `torch.FloatTensor`: Scalar; not negative for `"non_saturating"`, of any sign for `"hinge"`.

    Raises:
        ValueError: If `loss_type` is unknown.
    """
    check_loss_type(loss_type)
    logits_fake = logits_fake.float()
    return -logits_fake.mean() if loss_type == "hinge" else F.softplus(-logits_fake).mean()


def lecam_regularization(
    logits_real: torch.Tensor, logits_fake: torch.Tensor, mean_real: torch.Tensor, mean_fake: torch.Tensor
) -> torch.Tensor:
    """
    LeCam regularisation (arXiv 2104.03310): keeps the logits of one side close to the moving average of the other.
    As in the code released with that paper, and in MAETok's, only the sides that have drawn apart are pulled back:
    `relu(r - mean_fake)^2 + relu(mean_real - f)^2`; the paper's equation squares without the ReLU.

    Args:
        logits_real (`torch.Tensor` of any shape): Logits of real images.
        logits_fake (`torch.Tensor` of any shape): Logits of reconstructions.
        mean_real (`torch.Tensor`): Scalar, moving average of the mean logit of real images.
        mean_fake (`torch.Tensor`): Scalar, moving average of the mean logit of reconstructions.

    Returns:
        `torch.FloatTensor`: Scalar, not negative.
    """
    real = F.relu(logits_real.float() - mean_fake).square().mean()
    return real + F.relu(mean_real - logits_fake.float()).square().mean()


def consistency_loss(logits: torch.Tensor, logits_again: torch.Tensor) -> torch.Tensor:
    """
    Consistency of a discriminator under augmentation (bCR, arXiv 2002.04724), for one side.

    Args:
        logits (`torch.Tensor` of any shape): Logits of augmented images.
        logits_again (`torch.Tensor` of the same shape): Logits of the same images augmented differently.

    Returns:
        `torch.FloatTensor`: Scalar, mean of the squared difference.
    """
    return F.mse_loss(logits.float(), logits_again.float())


def output_gradient(loss: torch.Tensor, layer_output: torch.Tensor, loss_scale: float = 1.0) -> torch.Tensor:
    """
    Gradient of a loss with respect to the output of a layer. The graph from there to the loss is gone afterwards, and
    with it what it held in memory.

    Args:
        loss (`torch.Tensor`): Scalar that depends on `layer_output`.
        layer_output (`torch.Tensor`): What the layer returned, part of the graph of `loss`.
        loss_scale (`float`, *optional*, defaults to 1.0): The loss is multiplied by it before, and the gradient
            divided by it after the backward pass. In float16 a mean over pixels has gradients below the smallest
            number.

    Returns:
        `torch.FloatTensor` of the shape of `layer_output`: Detached.
    """
    (gradient,) = torch.autograd.grad(loss * loss_scale, layer_output)
    return gradient.detach().float() / loss_scale


def weight_gradient_norm(layer_input: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """
    Frobenius norm of the gradient of a loss with respect to the weight of a linear layer, found from the layer's input
    `h` and the gradient `g` at its output as the norm of `g^T h`. The weight itself is not touched, so it may be
    sharded or wrapped. The loss must depend on the layer through this output alone.

    Args:
        layer_input (`torch.Tensor` of shape `(..., in_features)`): What the layer was given.
        gradient (`torch.Tensor` of shape `(..., out_features)`): Gradient at its output, see [`output_gradient`].

    Returns:
        `torch.FloatTensor`: Scalar, detached. Not finite if the gradient is not.
    """
    gradient = gradient.detach().float().flatten(0, -2)
    with torch.autocast(gradient.device.type, enabled=False):
        return torch.linalg.matrix_norm(gradient.T @ layer_input.detach().float().flatten(0, -2))


def adaptive_weight(reconstruction_norm: torch.Tensor, adversarial_norm: torch.Tensor) -> torch.Tensor:
    """
    Weight that brings the adversarial gradient at the last layer to the size of the reconstruction gradient (VQGAN,
    arXiv 2012.09841, equation 7).

    Args:
        reconstruction_norm (`torch.Tensor`): Norm of the gradient of the reconstruction and perceptual terms.
        adversarial_norm (`torch.Tensor`): Norm of the gradient of the adversarial term.

    Returns:
        `torch.FloatTensor`: Scalar in `[0, 1e4]`, detached; NaN if a norm is not finite. Clamping an infinite norm
        would give a plausible weight (0 or 1e4) for a broken step, whereas a NaN makes the loss NaN, which the step
        guard of a training script sees and skips.
    """
    norms = torch.stack([reconstruction_norm.detach().float(), adversarial_norm.detach().float()])
    weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, MAX_ADAPTIVE_WEIGHT)
    return torch.where(norms.isfinite().all(), weight, torch.nan)


def with_gradient(value: torch.Tensor, layer_output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """
    A value whose gradient is known already, so that the backward pass need not go through what computed it once more.

    Args:
        value (`torch.Tensor`): Scalar; its own graph is cut off.
        layer_output (`torch.Tensor`): What the gradient is passed to.
        gradient (`torch.Tensor` of the shape of `layer_output`): Gradient of `value`, see [`output_gradient`].

    Returns:
        `torch.Tensor`: `value`.
    """
    return _WithGradient.apply(layer_output, value.detach(), gradient)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer_output, value, gradient):
        ctx.save_for_backward(gradient)
        ctx.dtype = layer_output.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, scale):
        (gradient,) = ctx.saved_tensors
        return (scale * gradient).to(ctx.dtype), None, None
