"""Data, recipes and budgets of the study: one preset for a CPU, one for a GPU."""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import export_mnist
from ..data.emoji import export_emoji


@dataclass(frozen=True, kw_only=True)
class Budget:
    """
    How long everything is trained, and how much is measured: the same for all cells of a study.

    Args:
        tokenizer_steps (`int`): Steps of each tokenizer.
        finetuning_steps (`int`): Steps of the decoder's fine-tuning, which come on top.
        generator_steps (`int`): Steps of each generator.
        classifier_epochs (`int`): Passes of the classifier over the training images.
        num_samples (`int`): Generated images that are compared with the training images.
        num_curve_samples (`int`): Those at each earlier point of the generator's training.
        num_inference_steps (`int`): Solver steps.
        loss_draws (`int`): Noises and times per held-out image in the generator's held-out loss.
        mixture_dimensions (`int`): Principal components in which mixtures are compared, the same for all tokenizers.
        mixture_sizes (`tuple[int, ...]`): Components of the mixtures.
        mixture_size (`int`): The one in the table.
        mixture_seeds (`tuple[int, ...]`): Seeds of the mixtures' initial parameters, over which likelihoods are
            averaged.
        probe_l2 (`float`): Penalty of the linear probe.
    """

    tokenizer_steps: int
    finetuning_steps: int
    generator_steps: int
    classifier_epochs: int = 10
    num_samples: int = 2000
    num_curve_samples: int = 500
    num_inference_steps: int = 50
    loss_draws: int = 16
    mixture_dimensions: int = 32
    mixture_sizes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    mixture_size: int = 50
    mixture_seeds: tuple[int, ...] = (0, 1, 2)
    probe_l2: float = 1e-3

    def curve_steps(self) -> list[int]:
        """Steps of the generator after which it is measured before its end: quarters of its training."""
        quarter = max(1, self.generator_steps // 4)
        return [step for step in (quarter, 2 * quarter, 3 * quarter) if step < self.generator_steps]

    def measures(self) -> dict[str, Any]:
        """All but the steps of the trainings, which their commands say, in plain types."""
        settings = dataclasses.asdict(self)
        for name in ("tokenizer_steps", "finetuning_steps", "generator_steps", "classifier_epochs"):
            del settings[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """
    A study.

    Args:
        name (`str`): For files and flags.
        data (`str`): The images, in a sentence.
        classifier (`str`): Name of the classifier in whose features distances are measured.
        document (`str`): File of the result.
        resolution (`int`): Side of the images.
        second_resolution (`int`): That of the second size, for positions.
        held_out_split (`str`): Split of the images that nothing is trained on.
        tokenizer_recipe (`str`): Recipe of the tokenizers, with masks, learnable tokens and HOG.
        decoder_recipe (`str`): Recipe of the decoder's fine-tuning.
        generator_recipe (`str`): Recipe of the generators.
        image_token_channels (`int`): Channels of image tokens with which a latent has as many numbers as with
            learnable tokens.
        batch_size (`int`): Images at a time when measuring.
        budget ([`Budget`]): Steps and numbers.
        precision (`str`, *optional*, defaults to `"no"`): Mixed precision of the trainings.
        seconds (`dict[str, float]`): Estimates for the plan: per step of `tokenizer`, `finetuning` and `generator`,
            per `sample`, and per `launch` and `measures` of a cell.
        measured (`bool`): Whether the estimates were measured.
    """

    name: str
    data: str
    classifier: str
    document: str
    resolution: int
    second_resolution: int
    held_out_split: str
    tokenizer_recipe: str
    decoder_recipe: str
    generator_recipe: str
    image_token_channels: int
    batch_size: int
    budget: Budget
    precision: str = "no"
    seconds: dict[str, float]
    measured: bool

    def export(self, folder: Path, package: str | None) -> str:
        """
        Write the images, unless they are there.

        Args:
            folder (`Path`): Where.
            package (`str`, *optional*): What `npm pack emoji-datasource-google` fetched, for the preset `gpu`.

        Returns:
            `str`: A digest of what they are: of their card, which names source, version and split.

        Raises:
            ValueError: If the preset needs a package and there is none, or has no use for one.
        """
        if (package is not None) != (self.name == "gpu"):
            raise ValueError(
                f"`package` = {package!r}: the preset {self.name!r} "
                + (
                    "needs what `npm pack emoji-datasource-google` fetches."
                    if package is None
                    else "has its own data."
                )
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.name == "gpu":
            export_emoji(package, folder, seed=0)
        else:
            export_mnist(folder, seed=0)
        return hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()[:16]


CPU = Preset(
    name="cpu",
    data="4500 training and 500 held-out MNIST digits, 32 x 32, 10 classes (`export_mnist(seed=0)`)",
    classifier="digit classifier",
    document="study.md",
    resolution=32,
    second_resolution=64,
    held_out_split="test",
    tokenizer_recipe="demo-tokenizer",
    decoder_recipe="demo-decoder",
    generator_recipe="demo-sit",
    image_token_channels=8,
    batch_size=250,
    budget=Budget(tokenizer_steps=3000, finetuning_steps=500, generator_steps=2500),
    seconds={
        "tokenizer": 0.046,
        "finetuning": 0.027,
        "generator": 0.072,
        "sample": 0.0178,
        "launch": 9.0,
        "measures": 25.0,
    },
    measured=True,
)
GPU = Preset(
    name="gpu",
    data="emoji of Google's font, 64 x 64, 10 classes, split by base emoji (`export_emoji(seed=0)`)",
    classifier="emoji classifier",
    document="study-gpu.md",
    resolution=64,
    second_resolution=128,
    held_out_split="validation",
    tokenizer_recipe="study-tokenizer-64",
    decoder_recipe="study-decoder-64",
    generator_recipe="study-sit-64",
    image_token_channels=8,
    batch_size=256,
    budget=Budget(
        tokenizer_steps=20_000,
        finetuning_steps=2_000,
        generator_steps=20_000,
        classifier_epochs=40,
        num_samples=10_000,
        num_curve_samples=2_000,
        num_inference_steps=100,
        mixture_dimensions=64,
    ),
    precision="bf16",
    seconds={
        "tokenizer": 0.03,
        "finetuning": 0.02,
        "generator": 0.03,
        "sample": 0.004,
        "launch": 15.0,
        "measures": 60.0,
    },
    measured=False,
)
PRESETS = {preset.name: preset for preset in (CPU, GPU)}
