"""A small classifier of the real images, in whose features generated and reconstructed ones are compared with them.

Inception knows photographs. On digits or emoji the features of a network trained to tell their classes apart are the
better measure, but distances in them compare with nothing else, so they bear the classifier's name and digest.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ..evaluation import weights_digest
from ..evaluation.extractors import full_float32
from ..seeding import keyed_generator, keyed_seed
from ..training.draws import draw_rows


NUM_FEATURES = 64
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
MAX_SHIFT = 2
SEED = 0


class ImageClassifier(nn.Module):
    """
    Three convolutions, 64 features, and a linear layer. It is a [`~maetok_hf.evaluation.FeatureExtractor`].

    Args:
        num_classes (`int`): Classes.
        resolution (`int`): Side of the images it is trained on; others are resized.
        name (`str`): Its name, for protocols.
    """

    def __init__(self, num_classes: int, resolution: int, name: str):
        super().__init__()
        self.name, self.resolution = name, resolution
        self.resize = f"bilinear, antialiased, to {resolution}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_seed(SEED, "study classifier"))
            self.convolutions = nn.Sequential(
                *(nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
                *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU()),
                *(nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU()),
                nn.AdaptiveAvgPool2d(4),
            )
            self.features = nn.Linear(64 * 16, NUM_FEATURES)
            self.logits = nn.Linear(NUM_FEATURES, num_classes)

    @property
    def digest(self) -> str:
        """`str`: Changes with any weight."""
        return weights_digest(self)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.ByteTensor` of shape `(n, 3, height, width)`): On any device.

        Returns:
            `dict[str, torch.Tensor]`: `"pool"` of shape `(n, 64)` and `"logits"` of shape `(n, num_classes)`.
        """
        values = images.to(self.logits.weight.device).float() / 127.5 - 1
        if values.shape[-1] != self.resolution:
            size = (self.resolution, self.resolution)
            values = F.interpolate(values, size, mode="bilinear", antialias=True)
        pool = F.gelu(self.features(self.convolutions(values).flatten(1)))
        return {"pool": pool, "logits": self.logits(pool)}

    @torch.no_grad()
    def extract(self, images: torch.Tensor, batch_size: int) -> dict[str, torch.Tensor]:
        """
        Features of many images.

        Args:
            images (`torch.ByteTensor` of shape `(n, 3, height, width)`): The images.
            batch_size (`int`): Images at a time.

        Returns:
            `dict[str, torch.Tensor]`: As `forward`, on the CPU.
        """
        with full_float32(self.logits.weight.device):
            parts = [self(part) for part in images.split(batch_size)]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def train_classifier(
    classifier: ImageClassifier, images: torch.Tensor, labels: torch.Tensor, num_epochs: int
) -> ImageClassifier:
    """
    Train on real images, each shifted by up to 2 pixels. Orders and shifts are keyed. Weights end as numbers that
    float16 has, so that their file is small.

    Args:
        classifier ([`ImageClassifier`]): On the CPU or an accelerator.
        images (`torch.ByteTensor` of shape `(n, 3, height, width)`): Training images.
        labels (`torch.LongTensor` of shape `(n,)`): Their classes.
        num_epochs (`int`): Passes over them.

    Returns:
        [`ImageClassifier`]: The same, frozen.
    """
    device = classifier.logits.weight.device
    starts = range(0, len(images), BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * len(starts))
    for epoch in range(num_epochs):
        order = torch.randperm(len(images), generator=keyed_generator(SEED, "study classifier order", epoch))
        for start in starts:
            rows = order[start : start + BATCH_SIZE]
            logits = classifier(_shifted(images[rows], epoch, rows))["logits"]
            loss = F.cross_entropy(logits, labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for parameter in classifier.parameters():
        parameter.data = parameter.data.half().float()
    return classifier.requires_grad_(False).eval()


def _shifted(images: torch.Tensor, epoch: int, rows: torch.Tensor) -> torch.Tensor:
    """The images, each moved by its own keyed number of pixels; its border is repeated."""
    shifts = draw_rows(
        lambda generator: torch.randint(2 * MAX_SHIFT + 1, (2,), generator=generator),
        *(SEED, "study classifier shift", epoch, rows),
    )
    size = images.shape[-1]
    padded = F.pad(images.float(), [MAX_SHIFT] * 4, mode="replicate").to(torch.uint8)
    crops = [
        image[:, top : top + size, left : left + size]
        for image, (top, left) in zip(padded, shifts.tolist(), strict=True)
    ]
    return torch.stack(crops)


def accuracy(classifier: ImageClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> float:
    """
    Share of images whose class is recognised.

    Args:
        classifier ([`ImageClassifier`]): The classifier.
        images (`torch.ByteTensor` of shape `(n, 3, height, width)`): The images.
        labels (`torch.LongTensor` of shape `(n,)`): Their classes, or those that were intended.
        batch_size (`int`): Images at a time.

    Returns:
        `float`: In `[0, 1]`.
    """
    logits = classifier.extract(images, batch_size)["logits"]
    return (logits.argmax(dim=1) == labels).double().mean().item()


def save_classifier(classifier: ImageClassifier, path: Path) -> None:
    """
    Write its weights, which float16 must have; the file is whole or absent.

    Args:
        classifier ([`ImageClassifier`]): From [`train_classifier`].
        path (`Path`): The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: value.half().cpu().contiguous() for name, value in classifier.state_dict().items()}, temporary)
    temporary.chmod(0o644)  # safetensors makes it private
    temporary.replace(path)


def load_classifier(classifier: ImageClassifier, path: Path) -> ImageClassifier:
    """
    Read weights of [`save_classifier`].

    Args:
        classifier ([`ImageClassifier`]): Of the same sizes.
        path (`Path`): The file.

    Returns:
        [`ImageClassifier`]: The same, frozen.
    """
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return classifier.requires_grad_(False).eval()


def describe_classifier(
    classifier: ImageClassifier,
    train: tuple[torch.Tensor, torch.Tensor],
    held_out: tuple[torch.Tensor, torch.Tensor],
    num_epochs: int,
    batch_size: int,
) -> dict[str, Any]:
    """
    Train it, and say how well it knows the classes.

    Args:
        classifier ([`ImageClassifier`]): A new one.
        train (`tuple[torch.Tensor, torch.Tensor]`): Images and classes.
        held_out (`tuple[torch.Tensor, torch.Tensor]`): Others.
        num_epochs (`int`): Passes over the former.
        batch_size (`int`): Images at a time when measuring.

    Returns:
        `dict[str, Any]`: Digest, accuracies and seconds, in plain types.
    """
    start = time.perf_counter()
    train_classifier(classifier, *train, num_epochs)
    seconds = time.perf_counter() - start
    return {
        "name": classifier.name,
        "digest": classifier.digest,
        "num_epochs": num_epochs,
        "held_out_accuracy": accuracy(classifier, *held_out, batch_size),
        "train_accuracy": accuracy(classifier, *train, batch_size),
        "seconds": seconds,
    }
