"""Gradient checkpointing of a share of the blocks: which ones, and that it changes no bit."""

import copy
import math

import pytest
import torch
from torch import nn

from maetok_hf.models.layers import TransformerBlock
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing, recomputed_blocks
from maetok_hf.training.lora_recipe import LoraRunOptions
from maetok_hf.training.run_options import SiTRunOptions, TokenizerRunOptions
from tests.models.cases import AUTOENCODER_CASES, MODEL_CASES


def build(name, num_layers=5):
    case = MODEL_CASES[name]
    random = {"decoder_drop_path_rate": 0.3} if name in AUTOENCODER_CASES else {}  # which recomputing must repeat
    model = case.build(num_layers=num_layers, **random)
    return model.train(), case.inputs()


def passes(model, inputs, autocast=False):
    """Output and gradients of a pass, and how often each block ran."""
    model.zero_grad()
    counts = {block: 0 for block in model.modules() if isinstance(block, TransformerBlock)}

    def count(block, args):
        counts[block] += 1

    handles = [block.register_forward_pre_hook(count) for block in counts]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs).sample
    output.float().square().mean().backward()
    for handle in handles:
        handle.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.detach(), gradients, list(counts.values())


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, []),
        (0.01, [0]),
        (0.25, [0, 4, 8]),
        (1 / 3, [0, 3, 6, 9]),
        (0.5, [0, 2, 4, 6, 8, 10]),
        (0.75, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        (11 / 12, list(range(11))),
        (1, list(range(12))),
    ],
)
def test_recomputed_blocks_are_spread_and_the_last_is_kept(share, expected):
    assert recomputed_blocks(12, share) == expected


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 28, 29])
def test_every_part_of_a_stack_has_its_share(num_blocks):
    for count in range(1, num_blocks + 1):
        chosen = recomputed_blocks(num_blocks, count / num_blocks)
        assert len(chosen) == count
        for start in range(num_blocks):
            for end in range(start, num_blocks + 1):
                part = sum(start <= index < end for index in chosen)
                assert abs(part - (end - start) * count / num_blocks) < 1


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ValueError, match=r"`share` must be in \[0, 1\], got"):
        enable_gradient_checkpointing(build("sit")[0], share)


def test_a_module_without_blocks_is_refused():
    with pytest.raises(ValueError, match="`model` is a Linear, which has no blocks"):
        enable_gradient_checkpointing(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "autocast"), [*((name, False) for name in MODEL_CASES), ("rope_modulated", True), ("usit", True)]
)
def test_no_share_changes_a_bit_and_every_share_recomputes_its_blocks(name, autocast):
    model, inputs = build(name)
    plain = passes(model, inputs, autocast)
    stacks = [len(module.transformer_blocks) for module in model.modules() if hasattr(module, "transformer_blocks")]
    for share in (0, 0.25, 0.5, 1):
        enable_gradient_checkpointing(model, share)
        found = passes(model, inputs, autocast)
        assert_same(plain, found)
        chosen = [recomputed_blocks(length, share) for length in stacks]
        expected = [
            [1 + (index in own) for index in range(length)] for own, length in zip(chosen, stacks, strict=True)
        ]
        assert found[2] == sum(expected, [])
        assert model.is_gradient_checkpointing == (share > 0)


def test_the_switches_of_diffusers_take_all_blocks_and_none():
    model, inputs = build("sit")
    enable_gradient_checkpointing(model, 0.5)
    model.enable_gradient_checkpointing()
    assert passes(model, inputs)[2] == [2] * 5
    enable_gradient_checkpointing(model, 0.5)
    assert sum(passes(model, inputs)[2]) == 7
    model.disable_gradient_checkpointing()
    assert passes(model, inputs)[2] == [1] * 5


def test_a_copy_recomputes_its_own_blocks():
    model, inputs = build("sit")
    enable_gradient_checkpointing(model, 0.5)
    plain, copied = passes(model, inputs), copy.deepcopy(model)
    del model
    found = passes(copied, inputs)
    assert found[2] == plain[2] and max(found[2]) == 2
    assert_same(plain, found)


@pytest.mark.parametrize("name", ["sit", "usit"])
def test_compiled_blocks_are_recomputed_as_well(name):
    torch._dynamo.reset()  # its limit of graphs per function counts all models of a process
    model, inputs = build(name)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    plain = passes(model, inputs)
    for share in (0.5, 1):
        enable_gradient_checkpointing(model, share)
        found = passes(model, inputs)
        assert_same(plain, found)
        assert sum(found[2]) == 5 + len(recomputed_blocks(5, share))
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [TokenizerRunOptions, SiTRunOptions, LoraRunOptions])
def test_the_option_is_a_positive_share_of_what_is_switched_on(options):
    given = {"output_dir": "o", "dataset_name": "d"}
    given |= {"tokenizer_name_or_path": "t"} if options is SiTRunOptions else {}
    given |= {"pretrained_model_name_or_path": "p"} if options is LoraRunOptions else {}
    assert options(**given, gradient_checkpointing=True, gradient_checkpointing_share=0.5)
    with pytest.raises(ValueError, match="`gradient_checkpointing_share` = 0.5 has no effect without"):
        options(**given, gradient_checkpointing_share=0.5)
    for share in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"`gradient_checkpointing_share` must be in \(0, 1\], got"):
            options(**given, gradient_checkpointing=True, gradient_checkpointing_share=share)
