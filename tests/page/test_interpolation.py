"""Pictures between two are decoded from the straight line between their latents."""

import numpy as np
import pytest
import torch

from maetok_hf.page.generation import GenerationSettings, sample
from maetok_hf.page.interpolation import between, interpolate_classes, interpolate_images, weights
from maetok_hf.page.reconstruction import Upload, encode_upload, reconstruct
from tests.page.images import drawing
from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import seeded_normal


def test_points_on_a_line():
    assert weights(5) == [0, 0.25, 0.5, 0.75, 1]
    first, second = seeded_normal(1, 6, 4, seed=1), seeded_normal(1, 6, 4, seed=2)
    points = between(first, second, 3)
    torch.testing.assert_close(points, torch.cat([first, (first + second) / 2, second]))
    for number in (2, 17, 3.5, True):
        with pytest.raises(ValueError, match="The number of pictures"):
            weights(number)


def test_between_two_images():
    pipe = tiny_pipeline()
    ends = [Upload(image=drawing()), Upload(image=drawing().rotate(180))]
    pictures = interpolate_images(pipe, *ends, 5)
    assert len(pictures) == 5
    for picture, end in ((pictures[0], ends[0]), (pictures[-1], ends[1])):
        difference = np.asarray(picture).astype(int) - np.asarray(reconstruct(pipe, end).reconstruction).astype(int)
        assert np.abs(difference).max() <= 1
    middle = sum(encode_upload(pipe, end)[1] for end in ends) / 2
    with torch.no_grad():
        decoded = pipe.vae.decode(middle).sample
    expected = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    assert np.abs(np.asarray(pictures[2]).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_between_two_classes_the_ends_are_images_of_the_same_noise():
    pipe, calls = tiny_pipeline("sde"), []
    asked = GenerationSettings(class_index=2, seed=9, num_images=4, num_inference_steps=5)
    pictures = interpolate_classes(pipe, asked, 7, 4, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 10) for done in range(1, 11)]
    for picture, index in ((pictures[0], 2), (pictures[-1], 7)):
        end = GenerationSettings(class_index=index, seed=9, num_inference_steps=5)
        expected = np.asarray(sample(pipe, end)[0]).astype(int)
        assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 1
    with pytest.raises(ValueError, match="no class 77"):
        interpolate_classes(pipe, asked, 77, 4)
