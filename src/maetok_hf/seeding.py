"""Keyed random draws.

Every random draw of the library is a function of `(seed, purpose, step or epoch, global sample index)` and never of a
global or a worker's random state. A run therefore gives the same numbers for any batch size, any number of processes
and data workers, and after any number of stops.
"""

import hashlib

import torch


def keyed_seed(seed: int, purpose: str, *indices: int) -> int:
    """
    Derive an independent 63-bit seed from a run's seed and the name of a draw.

    A CPU generator of torch takes the low 32 bits of its seed only, so that streams of different keys may coincide: of
    `n` draws about `n**2 / 2**33` pairs do, among a million some 116, at places that have nothing to do with the keys.

    Args:
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw, for example `"mask"`. Draws with different names are independent.
        *indices (`int`): Coordinates of the draw, for example the epoch and the global index of the sample.

    Returns:
        `int`: A value in `[0, 2**63)`.

    Raises:
        TypeError: If `seed` or an index is not an integer (a float or a tensor would silently hash differently).
    """
    for value in (seed, *indices):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"seeds and indices of a keyed draw must be `int`, got {value!r} of {type(value)}.")
    key = "/".join([str(seed), purpose, *map(str, indices)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """
    A CPU generator whose whole stream is determined by its key; see [`keyed_seed`] for the arguments, and for how many
    different streams there are.

    Returns:
        `torch.Generator`: A freshly seeded generator on the CPU.

    Raises:
        TypeError: If `seed` or an index is not an integer.
    """
    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *indices))
