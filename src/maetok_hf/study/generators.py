"""What is measured of a generator while it was trained: its held-out loss and the distance of a few samples."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from ..models import AutoencoderMAE
from . import measures
from .classifier import ImageClassifier
from .images import proportional_labels
from .presets import Budget


TRAINING_LOSS_POINTS = 20


def measure_generator(
    folder: Path,
    tokenizer: AutoencoderMAE,
    latents: torch.Tensor,
    labels: torch.Tensor,
    counts: list[int],
    real: torch.Tensor,
    classifier: ImageClassifier,
    budget: Budget,
    batch_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """
    Loss and distance after each quarter of the training, by the moving average there.

    Args:
        folder (`Path`): The generator's, with the checkpoints of its training.
        tokenizer ([`AutoencoderMAE`]): The one it was trained with.
        latents (`torch.Tensor` of shape `(n, num_tokens, num_channels)`): Normalised latents of held-out images.
        labels (`torch.Tensor` of shape `(n,)`): Their classes.
        counts (`list[int]`): Training images of each class.
        real (`torch.Tensor` of shape `(m, dim)`): Features of the training images.
        classifier ([`ImageClassifier`]): Its features.
        budget ([`Budget`]): Steps, samples and draws.
        batch_size (`int`): Images at a time.
        device (`torch.device`): Where to compute.

    Returns:
        `dict[str, Any]`: `loss` at the end, `curve` with `step`, `loss` and `distance` (of few samples, comparable
        within the curves only), `training_loss` as pairs of step and mean loss since the pair before, and
        `num_parameters`.

    Raises:
        ValueError: If a checkpoint is missing.
    """
    pipe = measures.load_pipeline(folder, tokenizer, device)
    wanted = proportional_labels(counts, budget.num_curve_samples)
    final, curve = pipe.transformer, []
    for step in [*budget.curve_steps(), budget.generator_steps]:
        transformer = final
        if step < budget.generator_steps:
            checkpoint = folder / f"checkpoint-{step}" / "transformer_ema"
            if not checkpoint.is_dir():
                raise ValueError(f"{checkpoint} is missing: remove {folder} to train it again.")
            transformer = type(final).from_pretrained(checkpoint).to(device)
        pipe.transformer = transformer
        loss = measures.held_out_loss(transformer, latents, labels, budget.loss_draws, batch_size)
        images = measures.sample(pipe, wanted, budget.num_inference_steps)
        features = classifier.extract(images, batch_size)["pool"]
        curve.append({"step": step, "loss": loss, "distance": measures.distance(features, real)})
    return {
        "loss": curve[-1]["loss"],
        "curve": curve,
        "training_loss": _training_loss(folder / "training_log.jsonl", budget.generator_steps),
        "num_parameters": final.num_parameters(),
    }


def _training_loss(log: Path, num_steps: int) -> list[list[float]]:
    """Means of the logged losses over equal parts of the training."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    points = []
    for part in range(TRAINING_LOSS_POINTS):
        low, high = (number * num_steps / TRAINING_LOSS_POINTS for number in (part, part + 1))
        losses = [entry["velocity"] for entry in entries if low < entry["step"] <= high]
        if losses:
            points.append([high, statistics.fmean(losses)])
    return points
