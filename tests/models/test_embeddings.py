"""Position tables: fixed, resampled, rotary."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from maetok_hf.models.embeddings import (
    MixedRotaryEmbedding,
    resample_position_embedding,
    rotary_tables,
    sincos_position_embedding,
)
from maetok_hf.models.layers import apply_rotary_emb
from tests.testing_utils import seeded_normal, tiny_autoencoder


def test_sincos_matches_the_formula():
    table = sincos_position_embedding(200, 16)
    assert table.shape == (1, 200, 16) and table.dtype == torch.float32
    for position in (0, 1, 7, 199):
        for i in range(8):
            angle = position * 10000 ** (-2 * i / 16)
            assert abs(table[0, position, 2 * i].item() - math.sin(angle)) < 1e-6
            assert abs(table[0, position, 2 * i + 1].item() - math.cos(angle)) < 1e-6


CPU = torch.device("cpu")


def test_rotary_tables_match_the_formula():
    cos, sin = rotary_tables(130, 8, CPU)
    assert cos.shape == sin.shape == (130, 1, 4) and cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 129):
        for pair in range(4):
            angle = position * 10000 ** (-2 * pair / 8)
            assert abs(cos[position, 0, pair].item() - math.cos(angle)) < 2e-5
            assert abs(sin[position, 0, pair].item() - math.sin(angle)) < 2e-5
    assert rotary_tables(3, 8, CPU, torch.float64)[0].dtype == torch.float64


def test_attention_logits_depend_on_the_distance_of_tokens_only():
    query, key = seeded_normal(1, 6, 2, 8), seeded_normal(1, 6, 2, 8, seed=1)
    tables = rotary_tables(40, 8, CPU)

    def logits(first):
        rotary_emb = [table[first : first + 6] for table in tables]
        return torch.einsum("bqhd,bkhd->bhqk", *(apply_rotary_emb(t, *rotary_emb) for t in (query, key)))

    for shift in (1, 7, 34):
        torch.testing.assert_close(logits(shift), logits(0), atol=1e-4, rtol=1e-4)
    # and they do depend on it: the same tokens at other distances
    swapped = torch.einsum(
        "bqhd,bkhd->bhqk", apply_rotary_emb(query, *(t[:6] for t in tables)),
        apply_rotary_emb(key, *(t[6:12] for t in tables)),
    )  # fmt: skip
    assert not torch.allclose(swapped, logits(0), atol=0.1)


def test_resampling_at_the_own_size_is_the_very_table():
    table = seeded_normal(1, 17, 6)
    assert resample_position_embedding(table, (4, 4), (4, 4), 1) is table


@pytest.mark.parametrize("grid", [(8, 8), (2, 2), (4, 6), (3, 4), (1, 9)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_resampling_is_bicubic_and_antialiased_and_leaves_the_prefix(grid, prefix):
    table = seeded_normal(1, prefix + 16, 6)
    resampled = resample_position_embedding(table, (4, 4), grid, prefix)
    assert resampled.shape == (1, prefix + grid[0] * grid[1], 6)
    assert torch.equal(resampled[:, :prefix], table[:, :prefix])
    image = table[:, prefix:].reshape(1, 4, 4, 6).movedim(3, 1)
    expected = F.interpolate(image, grid, mode="bicubic", antialias=True).movedim(1, 3).flatten(1, 2)
    torch.testing.assert_close(resampled[:, prefix:], expected)
    if grid == (2, 2):
        plain = F.interpolate(image, grid, mode="bicubic").movedim(1, 3).flatten(1, 2)
        assert not torch.allclose(resampled[:, prefix:], plain, atol=1e-2)


def test_resampling_keeps_rows_and_columns_apart():
    ramp = torch.arange(4.0).repeat_interleave(4).reshape(1, 16, 1)  # the row index
    resampled = resample_position_embedding(ramp, (4, 4), (4, 8), 0).reshape(4, 8)
    torch.testing.assert_close(resampled, torch.arange(4.0)[:, None].expand(4, 8))


def test_resampling_keeps_dtype_and_gradients():
    table = seeded_normal(1, 17, 6).to(torch.bfloat16).requires_grad_()
    resampled = resample_position_embedding(table, (4, 4), (5, 3), 1)
    assert resampled.dtype == torch.bfloat16
    resampled.float().square().sum().backward()
    assert (table.grad != 0).any(-1).all()


@pytest.mark.parametrize("position_embedding", ["rope", "absolute"])
def test_models_use_their_table_unchanged_at_their_own_size(position_embedding, monkeypatch):
    model = tiny_autoencoder(position_embedding=position_embedding)

    def refuse(*args, **kwargs):
        raise AssertionError("a table was resampled at its own size")

    monkeypatch.setattr(F, "interpolate", refuse)
    model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(AssertionError, match="resampled"):
        model.encode(torch.zeros(1, 3, 32, 40))


def test_rotary_angles_are_column_times_x_plus_row_times_y():
    rope = MixedRotaryEmbedding(num_layers=3, num_attention_heads=2, attention_head_dim=8)
    tables = rope((2, 5), num_prefix_tokens=1, num_suffix_tokens=4)
    assert len(tables) == 3
    for layer, (cos, sin) in enumerate(tables):
        assert cos.shape == sin.shape == (1 + 10 + 4, 2, 4) and cos.dtype == torch.float32
        for rows in (slice(0, 1), slice(11, 15)):
            assert torch.equal(cos[rows], torch.ones_like(cos[rows]))
            assert torch.equal(sin[rows], torch.zeros_like(sin[rows]))
        for row in range(2):
            for column in range(5):
                for head in range(2):
                    pairs = slice(4 * head, 4 * head + 4)
                    angle = column * rope.freqs[0, layer, pairs] + row * rope.freqs[1, layer, pairs]
                    token = 1 + 5 * row + column
                    torch.testing.assert_close(cos[token, head], torch.cos(angle))
                    torch.testing.assert_close(sin[token, head], torch.sin(angle))


def test_larger_grids_extend_the_coordinates():
    rope = MixedRotaryEmbedding(1, 2, 8)
    (small, _), (large, _) = rope((2, 2), 0, 0)[0], rope((4, 4), 0, 0)[0]
    large = large.unflatten(0, (4, 4))
    assert torch.equal(small.unflatten(0, (2, 2)), large[:2, :2])


def test_initial_frequencies_are_one_rotation_of_the_axial_ones_per_head():
    torch.manual_seed(0)
    rope = MixedRotaryEmbedding(num_layers=50, num_attention_heads=4, attention_head_dim=8, theta=10.0)
    assert rope.freqs.shape == (2, 50, 16) and isinstance(rope.freqs, torch.nn.Parameter)
    x, y = rope.freqs.detach().unflatten(-1, (4, 4))
    # first half of a head's pairs point one way, the second half at a right angle to it
    magnitude = torch.tensor([1.0, 10**-0.5]).repeat(2)
    torch.testing.assert_close(torch.hypot(x, y), magnitude.expand(50, 4, 4))
    torch.testing.assert_close((x[..., 0] * x[..., 2] + y[..., 0] * y[..., 2]), torch.zeros(50, 4), atol=1e-6, rtol=0)
    angle = torch.atan2(y[..., :2], x[..., :2])
    torch.testing.assert_close(angle[..., 0], angle[..., 1])
    # rotations differ between heads and layers and cover the circle
    assert angle[..., 0].flatten().unique().numel() == 200
    assert angle.min() < -2.5 and angle.max() > 2.5


def test_frequencies_are_float32_under_any_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        rope = MixedRotaryEmbedding(1, 2, 8)
        cos, _ = rope((3, 40), 0, 0)[0]
        table = sincos_position_embedding(300, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rope.freqs.dtype == cos.dtype == table.dtype == torch.float32
    assert torch.equal(table, sincos_position_embedding(300, 8))
    # coordinates beyond 256 or fractions of them would already be rounded
    torch.testing.assert_close(cos[39], torch.cos(39 * rope.freqs[0, 0].unflatten(-1, (2, -1))))


def test_double_precision_tables():
    rope = MixedRotaryEmbedding(1, 2, 8).double()
    cos, sin = rope((2, 2), 0, 0)[0]
    assert cos.dtype == sin.dtype == torch.float64


def test_frequencies_learn():
    rope = MixedRotaryEmbedding(2, 2, 8)
    sum(cos.square().sum() + sin.sum() for cos, sin in rope((3, 3), 1, 1)).backward()
    assert rope.freqs.grad.isfinite().all() and (rope.freqs.grad != 0).all()


def test_tables_are_kept_for_a_shape_and_made_anew_for_another():
    rope = MixedRotaryEmbedding(2, 1, 8)
    with torch.no_grad():
        first = rope((2, 3), 1, 0)
        assert rope((2, 3), 1, 0) is first
        for shape in (((3, 2), 1, 0), ((2, 3), 0, 1)):
            tables = rope(*shape)
            assert not torch.equal(tables[0][0], first[0][0]) and rope(*shape) is tables
        again = rope((2, 3), 1, 0)
    assert all(map(torch.equal, *(sum(tables, ()) for tables in (first, again))))


def add_through_data(rope):
    rope.freqs.data.add_(1)  # as moving averages are copied to a model, which no version of the tensor counts


def load(rope):
    rope.load_state_dict({"freqs": rope.freqs + 1})


def train(rope):
    optimizer = torch.optim.SGD(rope.parameters(), lr=1.0)
    with torch.enable_grad():
        sum(cos.sum() + sin.sum() for cos, sin in rope((2, 3), 1, 0)).backward()
    optimizer.step()


def replace(rope):
    rope.freqs = torch.nn.Parameter(rope.freqs + 1)


CHANGES = [add_through_data, load, train, replace, torch.nn.Module.double, torch.nn.Module.bfloat16]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_kept_tables_follow_the_frequencies(change):
    torch.manual_seed(0)
    rope = MixedRotaryEmbedding(2, 1, 8)
    before = rope((2, 3), 1, 0)
    change(rope)
    fresh = MixedRotaryEmbedding(2, 1, 8)
    fresh.freqs = rope.freqs
    for kept, made, old in zip(rope((2, 3), 1, 0), fresh((2, 3), 1, 0), before, strict=True):
        for table, expected, former in zip(kept, made, old, strict=True):
            assert table.dtype == expected.dtype and torch.equal(table, expected)
            assert table.dtype != former.dtype or not torch.equal(table, former)


def test_tables_of_inference_mode_serve_other_passes_and_go_with_the_type():
    rope = MixedRotaryEmbedding(2, 2, 8)
    with torch.inference_mode():
        made = rope((2, 3), 1, 0)
    with torch.no_grad():
        kept = rope((2, 3), 1, 0)
    assert kept is made and not any(table.is_inference() or table.requires_grad for table in kept[0])
    rope.double()
    assert rope._kept is None


def test_tables_are_not_kept_for_gradients_transforms_or_copies():
    rope = MixedRotaryEmbedding(2, 1, 8)
    with torch.no_grad():
        kept = rope((2, 3), 1, 0)
        for copied in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
            assert copied._kept is None and torch.equal(copied((2, 3), 1, 0)[1][0], kept[1][0])
        several = torch.stack([rope.freqs, 2 * rope.freqs])

        def first_table(freqs):
            return torch.func.functional_call(rope, {"freqs": freqs}, ((2, 3), 1, 0))[0][0]

        both = torch.func.vmap(first_table)(several)
        assert torch.equal(both[0], kept[0][0]) and not torch.equal(both[1], kept[0][0])
    tables = rope((2, 3), 1, 0)
    assert tables is not kept and tables[0][0].requires_grad
