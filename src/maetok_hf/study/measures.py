"""What is measured of a tokenizer and of the generator on its latents (MAETok sections 2.2, 4.1 and 4.3).

Latents are normalised by one mean and one deviation per tokenizer, as the generator sees them. The generator's
held-out loss is the mean of |v(x_t, t, class) - (noise - data)|^2 over all numbers of a latent, which may be compared
between latents with equally many numbers, up to what their covariance alone explains: for Gaussian data with the
eigenvalues l_i of the covariance, the best possible prediction has at time t, where x_t = (1 - t) x + t e, the loss
mean_i l_i / ((1 - t)^2 l_i + t^2), and over uniform times

    mean_i integral_0^1 l_i / ((1 - t)^2 l_i + t^2) dt = (pi / 2) mean_i sqrt(l_i)

A space whose variance lies in few directions, or in constants that differ from token to token, has a low loss by that
alone. So the loss is reported together with its ratio to this one.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..analysis import channel_statistics, fit_linear_probe, fit_principal_components, mixture_curve
from ..data import to_pixel_values
from ..evaluation import feature_moments, frechet_distance, precision_recall
from ..models import AutoencoderMAE, normalize_latents
from ..moments import RunningMoments
from ..pipelines import MAETokDiffusionPipeline
from ..sampling import generate_images, to_uint8
from ..training.flow_matching import FlowMatchingObjective, sample_flow_draws
from ..training.latent_encoding import encode_tokens
from ..training.validation import peak_signal_to_noise_ratio
from .classifier import ImageClassifier
from .images import Split
from .presets import Budget


LOSS_SEED = 0
SAMPLING_SEED = 0
NUM_NEIGHBORS = 3
SAMPLING_BATCH_SIZE = 100


def timed(compute: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same, with its `seconds`."""

    def run() -> dict[str, Any]:
        start = time.perf_counter()
        found = compute()
        return found | {"seconds": time.perf_counter() - start}

    return run


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Fréchet distance of two sets of features.

    Args:
        first (`torch.Tensor` of shape `(m, dim)`): One set.
        second (`torch.Tensor` of shape `(n, dim)`): The other.

    Returns:
        `float`: Not negative.
    """
    moments = []
    for features in (first, second):
        running = RunningMoments.zeros(features.shape[1])
        running.update(features)
        moments.append(feature_moments(running))
    return frechet_distance(*moments)


@torch.no_grad()
def measure_reconstruction(
    tokenizer: AutoencoderMAE, held_out: Split, classifier: ImageClassifier, batch_size: int
) -> dict[str, Any]:
    """
    How well held-out images come back, without masks.

    Args:
        tokenizer ([`AutoencoderMAE`]): In evaluation mode.
        held_out ([`Split`]): Images, of any size.
        classifier ([`ImageClassifier`]): Its features.
        batch_size (`int`): Images at a time.

    Returns:
        `dict[str, Any]`: `psnr`, the mean over the images in dB, and `distance`, between reconstructions and images.
    """
    psnr, features = [], {"images": [], "reconstructions": []}
    for images in held_out.images.split(batch_size):
        pixels = to_pixel_values(images, tokenizer.device)
        reconstructions = tokenizer(pixels).sample
        psnr.append(peak_signal_to_noise_ratio(reconstructions, pixels))
        levels = to_uint8(reconstructions).permute(0, 3, 1, 2)
        for name, of in (("images", images), ("reconstructions", levels)):
            features[name].append(classifier.extract(of, batch_size)["pool"])
    return {
        "psnr": torch.cat(psnr).mean().item(),
        "distance": distance(torch.cat(features["reconstructions"]), torch.cat(features["images"])),
        "num_images": len(held_out),
    }


@torch.no_grad()
def encode(tokenizer: AutoencoderMAE, split: Split, batch_size: int) -> torch.Tensor:
    """
    Latents as a generator sees them.

    Args:
        tokenizer ([`AutoencoderMAE`]): With statistics.
        split ([`Split`]): Images.
        batch_size (`int`): Images at a time.

    Returns:
        `torch.FloatTensor` of shape `(n, num_tokens, num_channels)`: On the CPU.
    """
    parts = [
        encode_tokens(tokenizer, to_pixel_values(images, tokenizer.device))
        for images in split.images.split(batch_size)
    ]
    return normalize_latents(torch.cat(parts).cpu().float(), tokenizer.config)


def gaussian_loss(eigenvalues: torch.Tensor) -> float:
    """
    The velocity loss of the best prediction for Gaussian data, over uniform times on the linear path.

    Args:
        eigenvalues (`torch.Tensor` of shape `(num_features,)`): Of the covariance of normalised latents.

    Returns:
        `float`: (pi / 2) times the mean of their roots.
    """
    return math.pi / 2 * eigenvalues.clamp(min=0).sqrt().mean().item()


def measure_latents(
    train: torch.Tensor, train_labels: torch.Tensor, held_out: torch.Tensor, labels: torch.Tensor, budget: Budget
) -> dict[str, Any]:
    """
    What latents are like. Mixtures are compared at the same number of standardised principal components for all
    tokenizers, and also, as in the paper, at the smallest number with more than 90 % of each one's variance.

    Args:
        train (`torch.Tensor` of shape `(n, num_tokens, num_channels)`): Normalised latents of the training images.
        train_labels (`torch.Tensor` of shape `(n,)`): Classes.
        held_out (`torch.Tensor` of shape `(m, num_tokens, num_channels)`): Those of other images.
        labels (`torch.Tensor` of shape `(m,)`): Their classes.
        budget ([`Budget`]): Dimensions, sizes, seeds and penalty.

    Returns:
        `dict[str, Any]`: Plain types.
    """
    probe = fit_linear_probe(train, train_labels, int(train_labels.max()) + 1, l2=budget.probe_l2)
    curves = {}
    for name, number in (("same", budget.mixture_dimensions), ("own", None)):
        principal = fit_principal_components(train, num_components=number)
        curve = mixture_curve(train, held_out, budget.mixture_sizes, budget.mixture_seeds, principal=principal)
        data = curve.data
        curves[name] = {
            "num_dimensions": data.num_dimensions,
            "explained_variance": data.explained_variance,
            "gaussian_held_out_nll": data.gaussian_held_out_nll,
            "held_out_nll": {str(size): value for size, value in curve.held_out_nll().items()},
        }
    channels = channel_statistics(train)
    return {
        "shape": list(train.shape[1:]),
        "probe_accuracy": probe.accuracy(held_out, labels),
        "probe_cross_entropy": probe.cross_entropy(held_out, labels),
        "probe_train_accuracy": probe.accuracy(train, train_labels),
        "mixtures": curves,
        # of 1 per number in total, constants of the tokens included
        "variance": (principal.variances.sum() / len(principal.variances)).item(),
        "effective_rank": principal.effective_rank,
        "channel_effective_rank": channels.effective_rank,
        "gaussian_loss": gaussian_loss(principal.variances),
    }


@torch.no_grad()
def held_out_loss(
    transformer: torch.nn.Module, latents: torch.Tensor, labels: torch.Tensor, num_draws: int, batch_size: int
) -> float:
    """
    The generator's loss on latents it was not trained on. Times and noises are keyed by image and draw, so all
    generators of latents of one shape see the same ones.

    Args:
        transformer (`torch.nn.Module`): The moving average.
        latents (`torch.Tensor` of shape `(n, num_tokens, num_channels)`): Normalised latents of held-out images.
        labels (`torch.Tensor` of shape `(n,)`): Classes.
        num_draws (`int`): Draws for each image.
        batch_size (`int`): Images at a time.

    Returns:
        `float`: Mean over images, draws, tokens and channels.
    """
    device = next(transformer.parameters()).device
    objective = FlowMatchingObjective(transformer.eval()).eval()
    losses = []
    for number in range(num_draws):
        for rows in torch.arange(len(latents)).split(batch_size):
            draws = sample_flow_draws(LOSS_SEED, number, rows, latents.shape[1:], class_dropout_prob=0.0)
            found = objective(
                *(latents[rows].to(device), labels[rows].to(device)),
                *(part.to(device) for part in (draws.draw, draws.noise)),
            )
            losses.append(found["loss_per_image"].cpu())
    return torch.cat(losses).double().mean().item()


def sample(pipe: MAETokDiffusionPipeline, labels: list[int], num_inference_steps: int) -> torch.Tensor:
    """
    Generated images without guidance, each by its own seed: the same noises for all generators of one shape.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        labels (`list[int]`): Their classes.
        num_inference_steps (`int`): Solver steps.

    Returns:
        `torch.ByteTensor` of shape `(n, 3, height, width)`: On the CPU.
    """
    parts = []
    for start in range(0, len(labels), SAMPLING_BATCH_SIZE):
        own = labels[start : start + SAMPLING_BATCH_SIZE]
        indices = range(start, start + len(own))
        images = generate_images(
            *(pipe, indices, own, SAMPLING_SEED),
            num_inference_steps=num_inference_steps,
            guidance_method="cfg",
            guidance_scale=1.0,
        )
        parts.append(to_uint8(images).permute(0, 3, 1, 2).contiguous())
    return torch.cat(parts)


def measure_samples(
    images: torch.Tensor, labels: list[int], real: torch.Tensor, classifier: ImageClassifier, batch_size: int
) -> dict[str, Any]:
    """
    Generated images against all training images.

    Args:
        images (`torch.ByteTensor` of shape `(n, 3, height, width)`): Generated.
        labels (`list[int]`): The classes that were asked for.
        real (`torch.Tensor` of shape `(m, dim)`): Features of the training images.
        classifier ([`ImageClassifier`]): Its features.
        batch_size (`int`): Images at a time.

    Returns:
        `dict[str, Any]`: `distance`, `precision`, `recall`, `recognition` (the share whose class is recognised as the
        one asked for) and `num_images`.
    """
    found = classifier.extract(images, batch_size)
    precision, recall = precision_recall(found["pool"], real, num_neighbors=NUM_NEIGHBORS)
    recognised = found["logits"].argmax(dim=1) == torch.tensor(labels)
    return {
        "distance": distance(found["pool"], real),
        "precision": precision,
        "recall": recall,
        "recognition": recognised.double().mean().item(),
        "num_images": len(images),
    }


def load_pipeline(generator: Path, tokenizer: AutoencoderMAE, device: torch.device) -> MAETokDiffusionPipeline:
    """
    A generator with a tokenizer, which may be the one it was trained with or one whose decoder was trained further.

    Args:
        generator (`Path`): Folder of the pipeline.
        tokenizer ([`AutoencoderMAE`]): The tokenizer.
        device (`torch.device`): Where to sample.

    Returns:
        [`MAETokDiffusionPipeline`]: Without a progress bar.
    """
    pipe = MAETokDiffusionPipeline.from_pretrained(generator, vae=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
