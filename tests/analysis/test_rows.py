"""Passes over data sets in chunks, and moments that no division of the rows changes."""

import pytest
import torch

from maetok_hf.analysis import rows
from maetok_hf.analysis.rows import iterate_chunks, iterate_rows, moments_of
from maetok_hf.moments import RunningMoments


def samples(count: int = 50, seed: int = 0) -> torch.Tensor:
    return 100 + torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_every_kind_of_data_gives_the_same_rows_on_each_pass(monkeypatch):
    data = samples()
    monkeypatch.setattr(rows, "_CHUNK_NUMEL", 6 * 8)
    for source in (data, data.split(20), lambda: (part for part in data.split(20))):
        for _ in range(2):
            parts = list(iterate_rows(source))
            assert max(map(len, parts)) == 8
            assert torch.equal(torch.cat(parts), data.flatten(1).double())
    assert {part.shape for part in iterate_chunks(data)} == {(8, 2, 3), (2, 2, 3)}
    assert {len(part) for part in iterate_rows(data, width=24)} == {2}


def test_half_precision_and_empty_chunks_are_rows_too():
    data = samples().to(torch.bfloat16)
    parts = list(iterate_rows([data[:0], data]))
    assert len(parts) == 1
    assert torch.equal(parts[0], data.flatten(1).double())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([torch.zeros(2, 3)]), "can be gone through once"),
        (torch.zeros(3), "shape \\(num_samples, ...\\)"),
        (torch.zeros(3, 2, dtype=torch.int64), "torch.int64"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], "4 features after others of 2"),
        (torch.tensor([[0.0, torch.inf]]), "`latents` is not finite"),
    ],
)
def test_what_is_no_data_set_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        list(iterate_rows(data, name="latents"))


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_of_samples_are_those_of_their_rows(diagonal):
    data = samples().flatten(1).double()
    expected = RunningMoments.zeros(6, diagonal=diagonal)
    expected.update(data)
    for given in (samples(), samples().split(7), lambda: samples().split(30)):
        moments = moments_of(given, diagonal=diagonal)
        torch.testing.assert_close(moments.state(), expected.state(), rtol=1e-11, atol=1e-11)


def test_no_samples_have_no_moments():
    with pytest.raises(ValueError, match="`latents` has no samples"):
        moments_of([], name="latents")
