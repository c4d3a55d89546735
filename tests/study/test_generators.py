"""A generator while it was trained: each point of its curve is of the model at that step."""

import shutil

import pytest
import torch

from maetok_hf import SiTTransformer1DModel
from maetok_hf.study import measures
from maetok_hf.study.classifier import ImageClassifier
from maetok_hf.study.generators import measure_generator
from tests.study.small import BUDGET, NUM_CLASSES, SIZE, coloured_images, write_generator
from tests.testing_utils import seeded_normal, tiny_autoencoder


@pytest.fixture
def arguments(tmp_path):
    tokenizer = tiny_autoencoder(sample_size=SIZE)
    write_generator(tmp_path / "generator", tokenizer)
    classifier = ImageClassifier(NUM_CLASSES, SIZE, "colour classifier").requires_grad_(False)
    return {
        "folder": tmp_path / "generator",
        "tokenizer": tokenizer,
        "latents": seeded_normal(9, 6, 4),
        "labels": torch.arange(9) % NUM_CLASSES,
        "counts": [4, 4, 1],
        "real": classifier.extract(coloured_images(24)[0], 24)["pool"],
        "classifier": classifier,
        "budget": BUDGET,
        "batch_size": 5,
        "device": torch.device("cpu"),
    }


def test_each_point_is_of_the_moving_average_after_its_step(arguments, monkeypatch):
    wanted, draw = [], measures.sample
    monkeypatch.setattr(
        measures, "sample", lambda pipe, labels, steps: wanted.append(labels) or draw(pipe, labels, steps)
    )
    found = measure_generator(**arguments)
    assert [point["step"] for point in found["curve"]] == [1, 2, 3, 4]
    for point in found["curve"]:
        path = arguments["folder"] / f"checkpoint-{point['step']}" / "transformer_ema"
        model = SiTTransformer1DModel.from_pretrained(path)
        loss = measures.held_out_loss(model, arguments["latents"], arguments["labels"], 1, batch_size=9)
        assert point["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["loss"] == found["curve"][-1]["loss"] and found["num_parameters"] == model.num_parameters()
    assert len({point["loss"] for point in found["curve"]}) == len({p["distance"] for p in found["curve"]}) == 4
    assert [sorted(labels) for labels in wanted] == [[0, 0, 0, 1, 1, 2]] * 4 or wanted == [wanted[0]] * 4
    assert len(wanted[0]) == BUDGET.num_curve_samples
    # four steps in twenty parts: those without an entry are left out
    assert found["training_loss"] == [[step, pytest.approx(1 / step)] for step in (1.0, 2.0, 3.0, 4.0)]


def test_the_model_at_the_end_is_the_one_that_was_exported(arguments):
    expected = measure_generator(**arguments)
    shutil.rmtree(arguments["folder"] / "checkpoint-4")
    assert measure_generator(**arguments) == expected


def test_a_missing_checkpoint_is_named(arguments):
    shutil.rmtree(arguments["folder"] / "checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-3/transformer_ema is missing: remove .* to train it again"):
        measure_generator(**arguments)
