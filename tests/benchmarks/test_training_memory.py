"""Peak memory: what is counted, and that counting it needs no memory."""

import contextlib
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import mse_loss, smooth_l1_loss

from benchmarks import training_memory
from benchmarks.training_memory import ComputedMemory, LiveBytes, largest_batch, tokenizer_only
from benchmarks.training_step import TrainingStep, read_recipe


@pytest.fixture
def recipe():
    """The published recipe without networks beside the tokenizer, at a small size."""
    model = {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "num_latent_tokens": 16}
    return dataclasses.replace(
        tokenizer_only(read_recipe("maetok-b-128-256")[0]), model=model | {"modulated_decoder": True}, resolution=64
    )


def test_a_storage_counts_once_from_when_it_is_made_until_nothing_uses_it():
    with LiveBytes() as memory:
        one = torch.zeros(100)
        assert memory.live == 400
        view = one.view(10, 10)[2:]
        one.add_(1)
        assert memory.live == 400
        two = view * 2
        assert memory.live == 400 + 320
        del one
        assert memory.live == 400 + 320, "the view is still there"
        del view, two
    assert (memory.live, memory.peak) == (0, 720)


def test_what_the_backward_pass_needs_counts_until_it_has_been():
    with LiveBytes() as memory:
        weight = torch.zeros(100, requires_grad=True)
        loss = (weight.exp() * 2).sum()
        assert memory.live == 400 + 400 + 4, "the weight, its exponential, the loss"
        loss.backward()
        assert memory.live == 400 + 400 + 4, "the weight, its gradient, the loss"


@pytest.mark.parametrize("loss", [mse_loss, smooth_l1_loss])
def test_a_loss_that_keeps_the_storage_of_its_elements_counts_it_also_without_values(loss):
    lives = []
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode, LiveBytes() as memory:
            images = torch.zeros(2, 50)
            value = loss(images, images)
            lives.append(memory.live)
            del images
            assert memory.live == 400, "the scalar's"
            del value
        assert memory.live == 0
    assert lives == [800, 800]


def test_memory_is_the_same_whether_or_not_anything_is_computed(recipe):
    computed = ComputedMemory(TrainingStep(recipe, recipe), recipe.resolution)
    step = TrainingStep(recipe, recipe)
    with LiveBytes() as memory:
        step.allocate("cpu")
        step(1, 64)
        assert memory.live == computed.between_steps()
        memory.peak = memory.live
        step(4, 64)
    assert memory.peak == pytest.approx(computed.peak(4), rel=0.01)


def test_between_steps_there_are_weights_moments_and_the_average(recipe):
    memory = ComputedMemory(TrainingStep(recipe, recipe), recipe.resolution)
    parts = training_memory.parts_between_steps(memory.step)
    weights = 4 * memory.step.tokenizer.num_parameters()
    assert parts == {
        "trained weights": weights,
        "moments of AdamW": 2 * weights,
        "moving average": weights,
        "frozen networks": 0,
        "gradients, in a step": weights,
    }
    # and the count of steps of each parameter
    assert memory.between_steps() == pytest.approx(4 * weights, rel=1e-3)
    assert memory.peak(1) > 5 * weights


def test_checkpointing_takes_less_in_a_step_and_as_much_between_steps(recipe):
    without, with_it = (ComputedMemory(TrainingStep(recipe, recipe, share), recipe.resolution) for share in (0, 1))
    assert with_it.between_steps() == without.between_steps()
    assert with_it.peak(64) < 0.7 * without.peak(64)


def test_largest_batch_is_the_last_that_fits():
    asked = []

    def peak(batch):
        asked.append(batch)
        return max(50, 10 + 3 * batch)

    assert largest_batch(peak, 100) == 30
    assert largest_batch(peak, 99) == 29
    assert len(asked) < 30, "it need not try all"
