"""Tiny images, tokenizers and options for whole analyses."""

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.analysis.options import AnalysisOptions
from tests.testing_utils import tiny_autoencoder


CLASSES = ("cat", "dog", "fox")
NUM_TRAIN, NUM_HELD_OUT = 16, 6  # of each class


def write_images(folder, split, name, numbers, shade, prefix=""):
    """Squares at random places on a background whose shade leans to the class."""
    target = folder / split / name
    target.mkdir(parents=True)
    for number in numbers:
        rng = np.random.default_rng([shade, number])
        pixels = np.full((16, 16, 3), 60 * shade, dtype=np.uint8) + rng.integers(0, 60, 3, dtype=np.uint8)
        top, left = rng.integers(0, 10, 2)
        pixels[top : top + 6, left : left + 6] = rng.integers(0, 256, 3)
        PIL.Image.fromarray(pixels).save(target / f"{prefix}{number:03d}.png")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for shade, name in enumerate(CLASSES):
        write_images(folder, "train", name, range(NUM_TRAIN), shade)
        write_images(folder, "test", name, range(100, 100 + NUM_HELD_OUT), shade)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """One of 6 tokens of 4 channels, one of 2 channels."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, seed, channels in (("wide", 0, 4), ("narrow", 1, 2)):
        tiny_autoencoder(seed, sample_size=16, latent_channels=channels).save_pretrained(folder / name)
    return folder / "wide", folder / "narrow"


@pytest.fixture
def make_options(image_folder, tokenizer_folders, tmp_path):
    """`make_options(**overrides)`: both tokenizers, everything but UMAP, which takes long to compile."""

    def make(**overrides):
        settings = {
            "tokenizer": [str(folder) for folder in tokenizer_folders],
            "dataset": str(image_folder),
            "held_out_split": "test",
            "cache_dir": str(tmp_path / "cache"),
            "resolution": 16,
            "batch_size": 5,
            "parts": ["statistics", "probe", "mixtures"],
            "mixture_sizes": [2, 4],
            "mixture_seeds": [0, 1],
            "output_dir": str(tmp_path / "out"),
        }
        chosen = settings | overrides
        idle = set() if "mixtures" in chosen["parts"] else {"mixture_sizes", "mixture_seeds"}
        if chosen["dataset"] is None:
            idle |= {"cache_dir", "resolution", "batch_size"}
        return AnalysisOptions(
            **{name: value for name, value in chosen.items() if name not in idle - overrides.keys()}
        )

    return make
