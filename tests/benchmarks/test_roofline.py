"""What a block could reach: its operations, and shares formed within rounds."""

from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.suite.cases import Work, count_flops
from benchmarks.suite.timing import MATMUL_FLOPS
from maetok_hf.models.layers import TransformerBlock


SMALL = roofline.Block("small", 2, 16, 2, "none", head_dim=8)


def test_operations_are_those_of_a_block():
    block = TransformerBlock(SMALL.width, SMALL.heads, SMALL.head_dim, 4.0, layer_scale_init_value=0.1)
    tokens = torch.zeros(SMALL.batch_size, SMALL.tokens, SMALL.width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(tokens)
    assert sum(SMALL.flops().values()) == counter.get_total_flops()


def test_a_skeleton_has_the_operations_of_its_blocks_and_values_that_stay_normal():
    skeleton, tokens = roofline.Skeleton(SMALL, 24), torch.randn(SMALL.batch_size, SMALL.tokens, SMALL.width)
    with torch.no_grad():
        assert count_flops(lambda: skeleton(tokens)) == 24 * sum(SMALL.flops().values())
        output = skeleton(tokens)
    assert output.shape == tokens.shape and 0.1 < output.std() < 10


def test_shares_are_those_of_the_products_of_the_same_round():
    work = Work(lambda: None, images=1, compile=lambda: None, count=lambda: MATMUL_FLOPS)
    model = roofline.Model("small model", {SMALL: 3}, lambda settings: work)
    parts = {name: lambda: None for name in SMALL.flops()}
    # of a round: the product, the parts, the product, the skeleton, the product, the model, the product
    round_ = [1.0, *[0.5] * len(parts), 3.0, 8.0, 5.0, 20.0, 7.0]
    seconds = iter([9.0] * len(round_) + round_)  # the first does not count
    with (
        patch.object(roofline, "parts_of", lambda block, dtype: parts),
        patch.object(roofline, "compiled", lambda module, dtype: module),
        patch.object(roofline, "seconds_of", lambda work, device: next(seconds)),
    ):
        found = roofline.measure(model, "float32", num_rounds=1)
    total = sum(SMALL.flops().values())
    (attention,) = [part for part in found["parts"] if part["part"] == "attention"]
    assert attention["share"]["median"] == pytest.approx(SMALL.flops()["attention"] / 0.5 * 2 / MATMUL_FLOPS)
    skeleton = 3 * total / 8 * 4 / MATMUL_FLOPS
    assert found["shares"]["skeleton"]["median"] == pytest.approx(skeleton)
    assert found["shares"]["model"]["median"] == pytest.approx(6 / 20)  # 20 s for what the product does in 6
    assert found["shares"]["model, of the skeleton"]["median"] == pytest.approx(6 / 20 / skeleton)
    assert found["matmul_flops_per_second"]["median"] == MATMUL_FLOPS / 4
    facts = {"processors": 2, "architecture": "x", "accelerators": [], "python": "3", "packages": {}}
    report = {"command": "c", "num_rounds": 1, "num_threads": 1, "machine": facts}
    text = roofline.to_markdown(report | {"rows": [{"model": "small model", "dtype": "float32", **found}]})
    assert "| small model | float32 | 20000 | 8000 | 30 (30 to 30) |" in text
    assert "| small | float32 | 500.00 ms" in text


@pytest.mark.slow  # compiles
def test_every_part_has_the_shape_of_its_operations():
    with torch.no_grad():
        shapes = [tuple(call().shape) for call in roofline.parts_of(SMALL, torch.float32).values()]
    assert shapes == [(32, 48), (32, 16), (32, 64), (32, 16), (2, 2, 16, 8)]
