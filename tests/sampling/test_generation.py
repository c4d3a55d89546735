"""Batches of a set: an image depends on its own index, not on its neighbors or on when it is made."""

import numpy as np
import pytest
import torch

from maetok_hf.sampling import generate_images, split_into_batches, to_uint8
from maetok_hf.seeding import keyed_generator
from tests.pipelines.helpers import Passes, tiny_pipeline


SAMPLING = {"num_inference_steps": 4, "guidance_scale": 1.5, "guidance_interval": (0.0, 0.75)}
LABELS = [0, 1, 2, 3, 4, 5, 6, 7]


def test_batches_are_blocks_of_indices_whatever_is_missing():
    assert split_into_batches(10, 4, range(10)) == [range(0, 4), range(4, 8), range(8, 10)]
    assert split_into_batches(10, 4, [9, 1, 2]) == [range(0, 4), range(8, 10)]
    assert split_into_batches(10, 4, []) == []


@pytest.mark.parametrize("scheduler", ["sde", "euler", "heun"])
def test_draws_do_not_depend_on_the_batch_and_pixels_only_by_rounding(scheduler):
    pipe = tiny_pipeline(scheduler)
    passes = Passes(pipe)
    whole = generate_images(pipe, range(8), LABELS, 3, **SAMPLING)
    assert passes.labels[0] == LABELS
    noise = passes.inputs[0]
    expected = torch.randn(1, 6, 4, generator=keyed_generator(3, "sampling", 5))
    assert torch.equal(noise[5:6], expected)

    passes.inputs.clear()
    parts = [generate_images(pipe, part, part, 3, **SAMPLING) for part in (range(3), range(3, 8))]
    assert torch.equal(passes.inputs[0], noise[:3])
    difference = to_uint8(torch.cat(parts)).int() - to_uint8(whole).int()
    assert difference.abs().max() <= 1
    assert (difference != 0).double().mean() < 0.01
    # another image of the same class is another image
    assert not torch.allclose(generate_images(pipe, [8], [5], 3, **SAMPLING)[0], whole[5], atol=0.01)


def test_same_batch_gives_the_same_bits():
    pipe = tiny_pipeline("sde")
    one, other = (generate_images(pipe, range(4, 8), LABELS[4:], 3, **SAMPLING) for _ in range(2))
    assert torch.equal(one, other)


def test_images_are_those_of_the_pipeline_in_the_decoders_range():
    pipe = tiny_pipeline("euler")
    images = generate_images(pipe, [2], [7], 0, **SAMPLING)
    assert images.shape == (1, 3, 32, 32)
    expected = pipe(7, generator=[keyed_generator(0, "sampling", 2)], output_type="np", **SAMPLING).images
    np.testing.assert_allclose((to_uint8(images) / 255).numpy(), expected, atol=0.51 / 255)


def test_low_precision_images_are_float32():
    pipe = tiny_pipeline("euler").to(torch.bfloat16)
    assert generate_images(pipe, [2], [7], 0, **SAMPLING).dtype == torch.float32
