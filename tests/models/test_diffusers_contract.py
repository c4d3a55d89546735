"""What diffusers expects of every model: configuration, saving and loading, attention processors, training."""

import copy
import json
import os
import pickle

import pytest
import torch
from diffusers import AutoModel
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.training_utils import EMAModel
from diffusers.utils import constants
from diffusers.utils import logging as diffusers_logging

from maetok_hf.models import layers
from maetok_hf.models.layers import MAETokAttention, MAETokAttnProcessor, TransformerBlock
from tests.models.cases import MODEL_CASES
from tests.testing_utils import seeded_normal


@pytest.fixture(params=MODEL_CASES.values(), ids=MODEL_CASES.keys())
def case(request):
    return request.param


def assert_same_weights(first, second):
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def shard_size(model):
    """A maximum shard size that makes at least two shards."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return f"{int(size * 0.6 / 1000)}KB"


# Outputs


def test_output_has_the_documented_shape(case):
    for batch_size in (1, 3):
        assert case.run(case.build(), batch_size=batch_size).shape == (batch_size, *case.output_shape)


def test_tuple_and_dataclass_outputs_are_equal(case):
    model = case.build()
    with torch.no_grad():
        by_name, by_index = model(**case.inputs()), model(**case.inputs(), return_dict=False)
    assert isinstance(by_index, tuple) and len(by_index) == 1
    assert torch.equal(by_name.sample, by_index[0])
    assert by_name["sample"] is by_name.sample and by_name[0] is by_name.sample


def test_evaluation_draws_nothing(case):
    model = case.build()
    torch.manual_seed(0)
    first = case.run(model)
    before = torch.get_rng_state()
    second = case.run(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


def test_a_sample_does_not_depend_on_its_batch(case):
    model, inputs = case.build(), case.inputs(batch_size=3)
    with torch.no_grad():
        whole = model(**inputs).sample
        for i in range(3):
            single = model(**{name: value[i : i + 1] for name, value in inputs.items()}).sample
            torch.testing.assert_close(single[0], whole[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_run_and_agree(case, dtype):
    model, expected = case.build(), case.run(case.build())
    output = case.run(model.to(dtype), dtype=dtype)
    assert output.dtype == dtype
    error = (output.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)


def test_autocast_runs_and_agrees(case):
    model, expected = case.build(), case.run(case.build())
    with torch.autocast("cpu", torch.bfloat16):
        output = case.run(model)
    assert (output.float() - expected).abs().max() / expected.abs().max() < 0.1


# Configuration


def test_config_round_trips_through_json(case, tmp_path):
    model = case.build()
    model.save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == case.model_class.__name__
    rebuilt = case.model_class.from_config(case.model_class.load_config(tmp_path))
    assert public(rebuilt.config) == public(model.config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_unknown_attributes_raise_and_config_names_warn(case):
    model = case.build()
    with pytest.raises(
        AttributeError, match=f"^'{case.model_class.__name__}' object has no attribute 'no_such_name'$"
    ):
        model.no_such_name  # noqa: B018
    model.register_to_config(another_entry=5)
    with pytest.warns(FutureWarning):
        assert model.another_entry == 5


def test_unknown_config_arguments_are_refused(case):
    with pytest.raises(TypeError, match="hiden_size"):
        case.model_class(hiden_size=32)


def test_models_can_be_copied_and_pickled(case):
    model = case.build()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_weights(model, clone)
        assert torch.equal(case.run(clone), case.run(model))


# Saving and loading


def test_saving_and_loading_is_bitwise(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    # diffusers loads float32 islands in a model of lower precision through the low-memory path only
    low_memory = [True] if case.model_class._keep_in_fp32_modules else [True, False]
    for loaded in (
        *(case.model_class.from_pretrained(tmp_path, low_cpu_mem_usage=value) for value in low_memory),
        AutoModel.from_pretrained(str(tmp_path)),
    ):
        assert isinstance(loaded, case.model_class) and not loaded.training
        assert all(p.requires_grad for p in loaded.parameters())
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
        assert_same_weights(model, loaded)
        assert torch.equal(case.run(loaded), case.run(model))


def test_pickled_weights_can_be_saved_and_loaded(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert_same_weights(model, case.model_class.from_pretrained(tmp_path, use_safetensors=False))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_checkpoints(case, variant, tmp_path, monkeypatch):
    model = case.build()
    model.save_pretrained(tmp_path, max_shard_size=shard_size(model), variant=variant)
    shards = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert len(shards) >= 2
    assert_same_weights(model, case.model_class.from_pretrained(tmp_path, variant=variant))
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", True)
    assert_same_weights(model, case.model_class.from_pretrained(tmp_path, variant=variant))
    if variant is not None:
        with pytest.raises(OSError, match="no file named"):
            case.model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_loading_keeps_float32_modules(case, dtype, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    kept = ["freqs"]  # angles are frequencies times positions: half precision would rotate far tokens elsewhere
    assert (case.model_class._keep_in_fp32_modules or []) == [k for k in kept if hasattr(case.model_class, "encode")]
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if set(kept) & set(name.split(".")) else dtype
        assert parameter.dtype == expected, name
        if expected == torch.float32:
            assert torch.equal(parameter, model.get_parameter(name))
    assert case.run(loaded, dtype=dtype).dtype == dtype

    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(loaded, case.model_class.from_pretrained(tmp_path / "again", dtype=dtype))


def test_casting_float32_modules_warns(case, caplog):
    if not case.model_class._keep_in_fp32_modules:
        assert not hasattr(case.build(), "rope")
        return
    diffusers_logging.enable_propagation()
    try:
        case.build().to(torch.float16)
    finally:
        diffusers_logging.disable_propagation()
    assert "should be kept in float32: ['freqs']" in caplog.text


def test_default_dtype_changes_no_table(case):
    torch.manual_seed(0)
    expected = case.model_class(**case.build().config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        model = case.model_class(**expected.config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, expected.get_buffer(name)), name
    for name, parameter in model.named_parameters():
        if name.endswith("freqs"):
            assert parameter.dtype == torch.float32, name
            torch.testing.assert_close(parameter.norm(dim=0), expected.get_parameter(name).norm(dim=0))


def test_models_build_on_the_meta_device(case):
    with torch.device("meta"):
        model = case.model_class(**case.build().config)
    assert all(p.is_meta for p in model.parameters())


def test_missing_and_unexpected_keys_are_noticed(case, tmp_path):
    model = case.build()
    state_dict = model.state_dict()
    name = next(iter(state_dict))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in state_dict.items() if k != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state_dict, "extra": torch.zeros(1)})


def test_no_two_tensors_share_memory(case):
    pointers = [t.data_ptr() for t in case.build().state_dict().values()]
    assert len(pointers) == len(set(pointers))


# Attention


def attention_modules(model):
    return [module for module in model.modules() if isinstance(module, AttentionModuleMixin)]


def test_every_block_is_the_one_block_class(case):
    model = case.build()
    assert case.model_class._repeated_blocks == case.model_class._no_split_modules == [TransformerBlock.__name__]
    stacks = [m for name, m in model.named_modules() if name.endswith("transformer_blocks")]
    assert stacks and all(type(block) is TransformerBlock for stack in stacks for block in stack)
    num_blocks = sum(len(stack) for stack in stacks)
    assert sum(type(m) is MAETokAttention for m in model.modules()) == num_blocks == len(attention_modules(model))


def test_attention_processors_can_be_read_and_replaced(case):
    model = case.build()
    processors = model.attn_processors
    assert len(processors) == len(attention_modules(model)) > 1
    assert all(name.endswith(".attn.processor") for name in processors)

    expected = case.run(model)
    calls = []

    class Spy(MAETokAttnProcessor):
        def __call__(self, *args, **kwargs):
            calls.append(self)
            return super().__call__(*args, **kwargs)

    replacements = {name: Spy() for name in processors}
    model.set_attn_processor(dict(replacements))
    assert model.attn_processors == replacements
    assert torch.equal(case.run(model), expected)
    assert sorted(map(id, calls)) == sorted(map(id, replacements.values()))
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(processors)): Spy()})


def test_attention_backend_reaches_every_layer(case):
    model = case.build()
    expected = case.run(model)
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model.set_attention_backend("_native_math")
        backends = [module.processor._attention_backend for module in attention_modules(model)]
        assert all(backend is not None and backend.value == "_native_math" for backend in backends)
        torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=1e-5)
        model.reset_attention_backend()
        assert all(module.processor._attention_backend is None for module in attention_modules(model))
    finally:
        # upstream: the reset leaves the process-wide backend behind
        _AttentionBackendRegistry.set_active_backend(active)
    with attention_backend("_native_math"):
        torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=1e-5)


def test_attention_runs_on_the_backend_of_its_processor(case, monkeypatch):
    model, used = case.build(), []

    def spy(*args, backend=None, **kwargs):
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **kwargs)

    monkeypatch.setattr(layers, "dispatch_attention_fn", spy)
    for module in attention_modules(model):
        module.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    case.run(model)
    assert used == [AttentionBackendName._NATIVE_MATH] * len(attention_modules(model))


def test_fusing_and_unfusing_projections_changes_nothing(case):
    model = case.build()
    expected, keys = case.run(model), set(model.state_dict())
    model.fuse_qkv_projections()
    assert all(module.fused_projections and hasattr(module, "to_qkv") for module in attention_modules(model))
    torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=1e-5)
    # the fused weights are what is used
    with torch.no_grad():
        attention_modules(model)[0].to_qkv.weight.zero_()
    assert not torch.allclose(case.run(model), expected, atol=1e-3)

    model.unfuse_qkv_projections()
    assert not any(module.fused_projections or hasattr(module, "to_qkv") for module in attention_modules(model))
    assert set(model.state_dict()) == keys
    assert torch.equal(case.run(model), expected)


# Training


def output_in_training(model, case, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.train()(**case.inputs(**kwargs)).sample


def test_training_reaches_every_parameter(case):
    model = case.build()
    output = output_in_training(model, case)
    target = seeded_normal(*output.shape, seed=1)
    torch.nn.functional.mse_loss(output, target).backward()
    for name, parameter in model.named_parameters():
        # nothing is masked in a plain forward, so the encoder's mask token is the one parameter without a part in it
        if name == "encoder.mask_token":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_training_with_ema(case):
    model = case.build()
    ema = EMAModel(model.parameters(), model_cls=case.model_class, model_config=model.config)
    output_in_training(model, case).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.step(model.parameters())
    ema.copy_to(model.parameters())
    assert case.run(model.eval()).isfinite().all()


def test_gradient_checkpointing_switches(case):
    model = case.build()
    holders = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert holders and case.model_class._supports_gradient_checkpointing
    for enabled in (False, True, False):
        if enabled:
            model.enable_gradient_checkpointing()
        else:
            model.disable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == enabled
        assert all(module.gradient_checkpointing == enabled for module in holders)


def test_gradient_checkpointing_recomputes_blocks_and_changes_nothing(case):
    plain, checkpointed = case.build(), case.build()
    checkpointed.enable_gradient_checkpointing()
    counts = {}

    def count(block, args):
        counts[block] = counts.get(block, 0) + 1

    blocks = [m for m in checkpointed.modules() if isinstance(m, TransformerBlock)]
    for block in blocks:
        block.register_forward_pre_hook(count)

    outputs = [output_in_training(model, case) for model in (plain, checkpointed)]
    assert torch.equal(*outputs)
    assert [counts[block] for block in blocks] == [1] * len(blocks)
    for output in outputs:
        (output * seeded_normal(*output.shape, seed=1)).mean().backward()
    assert [counts[block] for block in blocks] == [2] * len(blocks), "blocks must run again in the backward pass"

    gradients = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, msg=name)
    # without gradients there is nothing to recompute
    case.run(checkpointed)
    assert [counts[block] for block in blocks] == [3] * len(blocks)


def test_gradient_checkpointing_under_autocast(case):
    model = case.build()
    model.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = output_in_training(model, case).float().square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
