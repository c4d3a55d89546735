"""The parts of a study's distances are those of the right pairs of images."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import study_causes
from maetok_hf.study.classifier import ImageClassifier
from maetok_hf.study.images import Split
from tests.pipelines.helpers import tiny_pipeline


@pytest.fixture
def study(tmp_path):
    """What `measure` needs of a study, whose training images are what the tokenizer makes of some others."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    size, classes = pipe.vae.config.sample_size, pipe.transformer.config.num_classes
    images = torch.randint(256, (60, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(0)
    classifier = ImageClassifier(classes, size, "classifier").eval()
    return SimpleNamespace(
        preset=SimpleNamespace(batch_size=16, classifier="classifier"),
        budget=SimpleNamespace(num_samples=2 * classes, num_inference_steps=2),
        train=Split(images, torch.arange(60) % classes, classes),
        real=classifier.extract(study_causes.reconstruct(pipe.vae, images, 16), 16)["pool"],
        classifier=classifier,
        load_tokenizer=lambda cell: pipe.vae,
        root=tmp_path,
        device=torch.device("cpu"),
    )


def test_reconstructions_are_those_of_the_images_whatever_the_batch(study):
    images, tokenizer = study.train.images[:10], study.load_tokenizer(None)
    made = study_causes.reconstruct(tokenizer, images, 3)
    assert made.shape == images.shape and made.dtype == torch.uint8
    whole = study_causes.reconstruct(tokenizer, images, 10)
    assert (made.int() - whole.int()).abs().max() <= 1  # of rounding
    assert not torch.equal(made, images)


def test_where_the_decoder_loses_nothing_the_rest_is_the_generators(study):
    cell = SimpleNamespace(generator=lambda root: root)
    found = study_causes.measure(study, cell)
    assert found["decoder"] == pytest.approx(0, abs=1e-6)
    assert found["generator"] == pytest.approx(found["both"], rel=1e-9) and found["both"] > 0
    study.real = study.classifier.extract(study.train.images, 16)["pool"]
    other = study_causes.measure(study, cell)
    assert other["generator"] == found["generator"]
    assert other["decoder"] > 0 and other["both"] != found["both"]


def test_the_table_has_a_row_for_each_cell():
    cells = [{"variant": "AE", "seed": 2, "decoder": 0.333, "generator": 1.0, "both": 1.881}]
    facts = {"processors": 2, "architecture": "any", "accelerators": [], "python": "3", "packages": {"torch": "2"}}
    report = {"cells": cells, "classifier": "digit classifier", "machine": facts, "command": study_causes.COMMAND}
    text = study_causes.to_markdown(report)
    assert "| AE | 2 | 0.33 | 1.00 | 1.88 |" in text
    assert study_causes.COMMAND in text and "Distances do not add up." in text and "make study" not in text
