import pytest
import torch

from maetok_hf.seeding import keyed_generator, keyed_seed


def test_seeds_have_63_bits_and_follow_every_part_of_their_key():
    keys = [(0, "mask", 1, 2), (1, "mask", 1, 2), (0, "noise", 1, 2), (0, "mask", 2, 2), (0, "mask", 12), (0, "mask")]
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [keyed_seed(*key) for key in keys]
    assert max(keyed_seed(0, "mask", index) for index in range(100)) >= 2**62


def test_a_generator_on_the_cpu_takes_the_low_32_bits():
    for seed in (5, keyed_seed(0, "mask", 1)):
        draws = [torch.rand(100, generator=torch.Generator().manual_seed(value)) for value in (seed, seed % 2**32)]
        assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(100, generator=keyed_generator(0, "mask", 2)))


@pytest.mark.parametrize("key", [(0.0, "mask"), (0, "mask", 1.0), (True, "mask"), (0, "mask", torch.tensor(1))])
def test_only_integers_are_keys(key):
    with pytest.raises(TypeError, match="seeds and indices of a keyed draw must be `int`"):
        keyed_seed(*key)
