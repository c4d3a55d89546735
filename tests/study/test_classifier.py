"""The classifier of the real images: it learns, it is the same each time, and its file holds it exactly."""

import pytest
import torch

from maetok_hf.study import classifier as module
from maetok_hf.study.classifier import (
    ImageClassifier,
    accuracy,
    describe_classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from tests.study.small import NUM_CLASSES, SIZE, coloured_images


EPOCHS = 8


def new() -> ImageClassifier:
    return ImageClassifier(NUM_CLASSES, SIZE, "colour classifier")


@pytest.fixture(scope="module")
def trained():
    return train_classifier(new(), *coloured_images(150), EPOCHS)


def test_it_learns_what_can_be_told_apart(trained):
    others = coloured_images(60, seed=1)
    assert accuracy(trained, *others, batch_size=25) == 1.0
    assert accuracy(trained, others[0], (others[1] + 1) % NUM_CLASSES, batch_size=25) == 0.0
    assert accuracy(new(), *others, batch_size=25) < 0.7
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_it_is_the_same_each_time_and_its_digest_tells_others_apart(trained):
    torch.manual_seed(5)
    again = train_classifier(new(), *coloured_images(150), EPOCHS)
    assert again.digest == trained.digest
    others = [
        new(),
        train_classifier(new(), *coloured_images(150), 1),
        train_classifier(new(), *coloured_images(149), 1),
    ]
    assert len({trained.digest, *(other.digest for other in others)}) == 4


def test_making_one_depends_on_no_global_generator_and_leaves_it_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = new()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert new().digest == first.digest


def test_its_file_holds_it_exactly(trained, tmp_path):
    path = tmp_path / "new" / "classifier.safetensors"
    save_classifier(trained, path)
    found, images = load_classifier(new(), path), coloured_images(10, seed=2)[0]
    assert found.digest == trained.digest
    for name, values in trained.extract(images, 10).items():
        assert torch.equal(found.extract(images, 10)[name], values)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing half-written"
    assert path.stat().st_mode & 0o777 == 0o644
    assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training


def test_batches_change_no_features(trained):
    images = coloured_images(10, seed=2)[0]
    whole, parts = trained.extract(images, 10), trained.extract(images, 3)
    assert whole["pool"].shape == (10, module.NUM_FEATURES) and whole["logits"].shape == (10, NUM_CLASSES)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_images_of_other_sizes_are_resized(trained):
    """A uniform image stays what it is at every size, and only the right size is taken as it is."""
    images, _ = coloured_images(6)
    colours = images[:, :, :1, :1]
    expected = trained.extract(colours.expand(-1, -1, SIZE, SIZE), 6)["pool"]
    for size in (SIZE // 2, 2 * SIZE):
        found = trained.extract(colours.expand(-1, -1, size, size), 6)["pool"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    values = images.float() / 127.5 - 1
    pool = torch.nn.functional.gelu(trained.features(trained.convolutions(values).flatten(1)))
    torch.testing.assert_close(trained.extract(images, 6)["pool"], pool)


def test_shifts_are_small_keyed_by_image_and_epoch_and_repeat_the_border():
    images, rows = coloured_images(12)[0], torch.arange(12)
    shifted = module._shifted(images, 0, rows)
    assert torch.equal(module._shifted(images[4:7], 0, rows[4:7]), shifted[4:7])
    assert not torch.equal(module._shifted(images, 1, rows), shifted)
    padded = torch.nn.functional.pad(images.float(), [2] * 4, mode="replicate").to(torch.uint8)
    windows = padded.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (12, 3, 5, 5, SIZE, SIZE)
    same = (windows == shifted[:, :, None, None]).flatten(4).all(dim=4).all(dim=1)
    assert same.flatten(1).any(dim=1).all()
    assert len({tuple(place.nonzero()[0].tolist()) for place in same}) > 4, "not all the same way"


def test_it_is_described_by_what_it_knows_of_both_sets():
    train, held_out = coloured_images(150), coloured_images(30, seed=1)
    wrong = held_out[0], (held_out[1] + 1) % NUM_CLASSES
    found = describe_classifier(new(), train, wrong, EPOCHS, batch_size=64)
    assert found["train_accuracy"] == 1.0 and found["held_out_accuracy"] == 0.0
    assert found["name"] == "colour classifier" and found["num_epochs"] == EPOCHS and found["seconds"] > 0
    assert found["digest"] == train_classifier(new(), *train, EPOCHS).digest
