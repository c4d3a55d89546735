"""Keyed draws of a batch, and the generator of dropout."""

import torch

from maetok_hf.training.draws import sample_noise, seed_global_generator


def test_noise_of_an_image_does_not_depend_on_its_batch():
    whole = sample_noise(0, "noise", 3, [5, 6, 7], (2, 3))
    assert whole.shape == (3, 2, 3)
    assert torch.equal(whole[1:], sample_noise(0, "noise", 3, torch.tensor([6, 7]), (2, 3)))
    assert not torch.equal(whole, sample_noise(0, "noise", 4, [5, 6, 7], (2, 3)))


def test_dropout_follows_the_seed_alone():
    images = torch.ones(64)
    drops = []
    for seed in (1, 2, 1):
        seed_global_generator(seed, torch.device("cpu"))
        drops.append(torch.nn.functional.dropout(images))
    assert torch.equal(drops[0], drops[2]) and not torch.equal(drops[0], drops[1])
    torch.manual_seed(1)
    assert torch.equal(drops[0], torch.nn.functional.dropout(images))
