"""Linear probe: how well a linear classifier tells the classes apart from flattened latents.

MAETok reports its accuracy as a measure of how discriminative a latent space is. The number depends on how the
classifier is trained, so this one is defined by what it minimises and not by a training run. With x the flattened
latent of an image, each feature standardised by its mean and standard deviation over the training latents, y its
class, and softmax probabilities p over K classes,

    (1 / N) sum_i -log p(y_i | W x_i + b)  +  (l2 / 2) sum_kj W_kj^2

is minimised over all N training latents together. The objective is convex, so its minimum depends on no initial value,
batch order or random draw. `l2 = 1 / (C N)` is scikit-learn's `LogisticRegression(C=C)` on standardised features.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


logger = logging.getLogger(__name__)

# numbers of a chunk of latents, or of its logits, held in memory at once: 8 MiB in float64
_CHUNK_NUMEL = 2**20
# steps that L-BFGS remembers: more of them save passes over the data, each costs two copies of the weights
_HISTORY = 10
# what a strong Wolfe line search needs at most, as in torch
_EVALUATIONS_PER_ITERATION = 25


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearProbe:
    """
    A fitted linear classifier of latents, from [`fit_linear_probe`].

    Args:
        weight (`torch.Tensor` of shape `(num_classes, num_features)`): W, on standardised features, float64.
        bias (`torch.Tensor` of shape `(num_classes,)`): b, float64; minus infinity for a class that no training latent
            has.
        mean (`torch.Tensor` of shape `(num_features,)`): Means of the training latents, float64.
        std (`torch.Tensor` of shape `(num_features,)`): Their standard deviations, float64; 1 where a feature is
            constant.
        dtype (`torch.dtype`): Precision of the products.
        l2 (`float`): Weight of the penalty.
        objective (`float`): The minimum that was reached.
        gradient (`float`): Largest absolute derivative of the objective there.
        iterations (`int`): Iterations of L-BFGS it took.
        converged (`bool`): Whether `gradient` is within the tolerance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    dtype: torch.dtype
    l2: float
    objective: float
    gradient: float
    iterations: int
    converged: bool

    def logits(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Unnormalised log probabilities of the classes.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, ...)`): Latents, flattened from the second dimension on.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_classes)`: In the probe's `dtype`, on its device.

        Raises:
            ValueError: If the latents have another number of features than those of the training.
        """
        latents = latents.flatten(1)
        if latents.shape[1] != len(self.mean):
            raise ValueError(
                f"`latents` have {latents.shape[1]} features, but the probe was fitted to {len(self.mean)}."
            )
        return _logits(latents, self.weight, self.bias, self.mean, self.std, self.dtype)

    @torch.no_grad()
    def accuracy(self, latents: torch.Tensor, labels: torch.Tensor, top_k: int = 1) -> float:
        """
        Fraction of latents whose class is among the `top_k` most probable ones.

        Args:
            latents (`torch.Tensor` of shape `(num_images, ...)`): Held-out latents; they may be mapped from a file.
            labels (`torch.Tensor` of shape `(num_images,)`): Their classes.
            top_k (`int`, *optional*, defaults to 1): How many guesses count.

        Returns:
            `float`: In `[0, 1]`.

        Raises:
            ValueError: If `top_k` is not in `[1, num_classes]`, or latents and labels do not fit each other or the
                probe.
        """
        num_classes = len(self.bias)
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"`top_k` must lie in [1, {num_classes}], the number of classes, got {top_k}.")
        latents, labels = _checked(latents, labels, num_classes)
        hits = 0
        for part, classes in _chunks(latents, labels, num_classes, self.weight.device):
            guesses = self.logits(part).topk(top_k, dim=1).indices
            hits += (guesses == classes[:, None]).sum().item()
        return hits / len(labels)

    @torch.no_grad()
    def cross_entropy(self, latents: torch.Tensor, labels: torch.Tensor) -> float:
        """
        Mean of minus the log probability of the right class, without the penalty: finer than the accuracy of few
        images.

        Args:
            latents (`torch.Tensor` of shape `(num_images, ...)`): Held-out latents; they may be mapped from a file.
            labels (`torch.Tensor` of shape `(num_images,)`): Their classes.

        Returns:
            `float`: In nats; `log(num_classes)` for a probe that knows nothing.

        Raises:
            ValueError: If latents and labels do not fit each other or the probe.
        """
        num_classes = len(self.bias)
        latents, labels = _checked(latents, labels, num_classes)
        total = 0.0
        for part, classes in _chunks(latents, labels, num_classes, self.weight.device):
            total += F.cross_entropy(self.logits(part), classes, reduction="sum").item()
        return total / len(labels)


def fit_linear_probe(
    latents: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    l2: float = 1e-3,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> LinearProbe:
    """
    Fit a linear classifier to latents by L-BFGS from zero, see the head of this module for what it minimises.

    Each evaluation of the objective is one pass over all latents in chunks of bounded size, so that latents mapped
    from a file ([`collect_latents`], `torch.from_file`) are never in memory as a whole, and the result is the same as
    if they were. An iteration takes a little more than one pass. The weights and all sums are kept in float64, and
    the search holds about thirty copies of the weights.

    Args:
        latents (`torch.Tensor` of shape `(num_images, ...)`): Training latents of any floating-point type, flattened
            from the second dimension on.
        labels (`torch.Tensor` of shape `(num_images,)`): Their classes, integers in `[0, num_classes)`.
        num_classes (`int`): Number of classes; one that no training latent has is never predicted.
        l2 (`float`, *optional*, defaults to 1e-3): Weight of the penalty on the weights (not on the bias).
        tolerance (`float`, *optional*, defaults to 1e-6): Stop when no derivative of the objective is larger.
        max_iterations (`int`, *optional*, defaults to 1000): Stop there, with a warning.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`): Precision of the products of features and
            weights. `torch.float32` is faster on most GPUs, but its rounding ends the search at a gradient of about
            1e-5: give it such a `tolerance`.
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the latents are.

    Returns:
        [`LinearProbe`]: The classifier.

    Raises:
        ValueError: If latents and labels do not fit each other, latents are not finite, labels are out of range or of
            one class only, or a setting is out of range.
    """
    for name, value in (("l2", l2), ("tolerance", tolerance), ("max_iterations", max_iterations)):
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}.")
    latents, labels = _checked(latents, labels, num_classes)
    counts = labels.bincount(minlength=num_classes).cpu()
    if (counts > 0).sum() < 2:
        raise ValueError(f"`labels` are all of class {labels[0].item()}: a classifier needs two classes or more.")
    device = latents.device if device is None else torch.device(device)
    mean, std = _feature_statistics(latents, labels, num_classes, device)

    weight = torch.zeros(num_classes, latents.shape[1], dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, device=device, requires_grad=True)
    # The best bias of a class that never occurs is minus infinity: put there, not approached for ever.
    never = torch.where(counts > 0, 0.0, -torch.inf).to(device, torch.float64)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=max_iterations * _EVALUATIONS_PER_ITERATION,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,  # of the objective: the gradient decides, unless nothing moves any more
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part, classes in _chunks(latents, labels, num_classes, device):
            logits = _logits(part, weight, bias + never, mean, std, dtype)
            loss = F.cross_entropy(logits.double(), classes, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        penalty = l2 / 2 * weight.square().sum()
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(objective)
    reached = objective().item()
    gradient = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    iterations = optimizer.state[weight]["n_iter"]
    if gradient > tolerance:
        logger.warning(
            "The linear probe stopped after %d iterations at a gradient of %.1e, above the tolerance of %.1e: raise "
            "`max_iterations`, `l2` or `tolerance`, or set `dtype=torch.float64`.",
            *(iterations, gradient, tolerance),
        )
    return LinearProbe(
        weight=weight.detach(),
        bias=bias.detach() + never,
        mean=mean,
        std=std,
        dtype=dtype,
        l2=l2,
        objective=reached,
        gradient=gradient,
        iterations=iterations,
        converged=gradient <= tolerance,
    )


def _logits(
    latents: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    # Centred in float64, where a small spread around a large mean keeps its digits; the scale goes into the weights,
    # of which there are fewer.
    features = latents.to(mean.device) - mean
    return F.linear(features.to(dtype), (weight / std).to(dtype), bias.to(dtype))


def _checked(latents: torch.Tensor, labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattened latents and int64 labels that fit each other."""
    if latents.ndim < 2 or labels.shape != latents.shape[:1] or latents.numel() == 0:
        raise ValueError(
            "`latents` must have shape (num_images, ...) and `labels` (num_images,), with at least one image, got "
            f"{tuple(latents.shape)} and {tuple(labels.shape)}."
        )
    if not latents.is_floating_point():
        raise ValueError(f"`latents` must be floating-point numbers, got {latents.dtype}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be integers, got {labels.dtype}.")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"`labels` must lie in [0, {num_classes}), `num_classes` being {num_classes}, got values from {low} to "
            f"{high}: leave out images without a class, or correct `num_classes`."
        )
    return latents.detach().flatten(1), labels.to(torch.int64)


def _chunks(
    latents: torch.Tensor, labels: torch.Tensor, num_classes: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Consecutive rows on `device`, never more than fit into a chunk."""
    rows = max(1, _CHUNK_NUMEL // max(latents.shape[1], num_classes))
    for part, classes in zip(latents.split(rows), labels.split(rows), strict=True):
        yield part.to(device), classes.to(device)


def _feature_statistics(
    latents: torch.Tensor, labels: torch.Tensor, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each feature in float64, 1 for that of a constant feature."""
    # Differences from one row keep the digits of a small spread around a large mean, and are 0 for a constant feature.
    origin = latents[0].to(device, torch.float64)
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for part, _ in _chunks(latents, labels, num_classes, device):
        difference = part.double() - origin
        if not difference.isfinite().all():
            raise ValueError("`latents` are not finite: the tokenizer is broken or its training diverged.")
        total += difference.sum(dim=0)
        squares += difference.square().sum(dim=0)
    mean = total / len(latents)
    std = (squares / len(latents) - mean.square()).clamp(min=0).sqrt()
    return origin + mean, torch.where(std > 0, std, 1.0)
