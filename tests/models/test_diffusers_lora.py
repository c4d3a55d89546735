"""PEFT adapters on the generator: add, save, load, scale, fuse, hotswap."""

import re

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from tests.models.cases import TRANSFORMER_CASES
from tests.testing_utils import randomize_parameters


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {
    "attention": ATTENTION,
    "mlp": ["ff.net.0.proj", "ff.net.2"],
    "others": ["proj_in", "modulation.linear", "skip_proj"],  # no model has them all
}


@pytest.fixture(params=TRANSFORMER_CASES.values(), ids=TRANSFORMER_CASES.keys())
def case(request):
    return request.param


def lora_config(rank=4, targets=ATTENTION, **kwargs):
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, **kwargs)


def adapted(case, seed=0, name="default", **kwargs):
    model = case.build()
    torch.manual_seed(seed)
    model.add_adapter(lora_config(**kwargs), adapter_name=name)
    return model


def has_lora(model):
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
def test_adapter_is_saved_and_loaded(case, use_dora, targets, tmp_path):
    plain = case.run(case.build())
    model = adapted(case, targets=targets, use_dora=use_dora)
    output = case.run(model)
    assert not torch.allclose(output, plain, atol=1e-3)
    metadata = model.peft_config["default"].to_dict()
    model.save_lora_adapter(tmp_path)
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights and all(".lora_" in key for key in weights)

    model.unload_lora()
    assert not has_lora(model)
    assert torch.equal(case.run(model), plain)

    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert model.peft_config["default_0"].to_dict() == metadata
    torch.testing.assert_close(case.run(model), output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["adapted", "saved_whole"])
def test_an_adapter_carries_new_classes(case, way, tmp_path):
    """Through low-rank factors of the class table, or with the whole table among the adapter's weights."""
    where = {"targets": ["to_q", "class_embed"]} if way == "adapted" else {"modules_to_save": ["class_embed"]}

    def extended():
        model = case.build()
        model.add_classes(2)
        return model

    model, inputs = extended(), {**case.inputs(), "class_labels": torch.tensor([10, 11])}
    model.add_adapter(lora_config(**where))
    model(**inputs).sample.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
        output = model(**inputs).sample
        assert not torch.allclose(output, extended()(**inputs).sample, atol=1e-3)
        model.save_lora_adapter(tmp_path)

        loaded = extended()
        loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(loaded(**inputs).sample, output, atol=1e-5, rtol=1e-5)
        loaded.fuse_lora()
        loaded.unload_lora()
        torch.testing.assert_close(loaded(**inputs).sample, output, atol=1e-5, rtol=1e-5)


def test_adapters_scale_switch_and_disable(case):
    plain = case.run(case.build())
    model = adapted(case, seed=0, name="first")
    first = case.run(model)
    torch.manual_seed(1)
    model.add_adapter(lora_config(), adapter_name="second")
    model.set_adapters("second")
    second = case.run(model)
    assert not torch.allclose(first, second, atol=1e-3)

    model.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(case.run(model), first, atol=1e-5, rtol=1e-5)
    model.set_adapters(["first", "second"], [0.0, 0.0])
    torch.testing.assert_close(case.run(model), plain, atol=1e-5, rtol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(case.run(model), plain, atol=1e-5, rtol=1e-5)
    model.enable_adapters()
    model.delete_adapters("second")
    model.set_adapters("first")
    torch.testing.assert_close(case.run(model), first, atol=1e-5, rtol=1e-5)


def test_fusing_an_adapter_keeps_its_effect(case):
    model = adapted(case)
    output = case.run(model)
    model.fuse_lora()
    torch.testing.assert_close(case.run(model), output, atol=1e-5, rtol=1e-5)
    model.unload_lora()
    torch.testing.assert_close(case.run(model), output, atol=1e-5, rtol=1e-5)


def test_fusing_scales_every_layer_and_unfusing_gives_the_strengths_back(case):
    def run(model):
        return model(**{**case.inputs(), "class_labels": torch.tensor([3, 10])}, return_dict=False)[0].detach()

    model = case.build()
    model.add_classes(1)
    torch.manual_seed(0)
    for name in ("first", "second"):
        model.add_adapter(lora_config(targets=["to_q", "class_embed"]), adapter_name=name)
    model.set_adapters(["first", "second"], [0.8, 0.3])
    before, scalings = run(model), [dict(layer.scaling) for layer in model._adapted_layers()]
    model.set_adapters(["first", "second"], [0.4, 0.15])
    half = run(model)
    assert not torch.allclose(before, half, atol=1e-2)

    model.set_adapters(["first", "second"], [0.8, 0.3])
    model.fuse_lora(lora_scale=0.5, adapter_names=["first"])
    model.fuse_lora(lora_scale=0.5, adapter_names=["second"])
    torch.testing.assert_close(run(model), half, atol=1e-5, rtol=1e-5)
    model.unfuse_lora()
    torch.testing.assert_close(run(model), before, atol=1e-5, rtol=1e-5)
    assert [dict(layer.scaling) for layer in model._adapted_layers()] == scalings


def test_only_the_adapter_trains(case):
    model = adapted(case).train()
    model(**case.inputs()).sample.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("ranks", [(5, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("targets", [ATTENTION, ["to_q", "proj_in"]])
def test_hotswapping_an_adapter(case, ranks, targets, tmp_path):
    outputs = []
    for index, rank in enumerate(ranks):
        model = adapted(case, seed=index, name=f"adapter{index}", rank=rank, targets=targets)
        outputs.append(case.run(model))
        model.save_lora_adapter(tmp_path / str(index), adapter_name=f"adapter{index}")
    assert not torch.allclose(*outputs, atol=1e-3)

    model = case.build()
    model.enable_lora_hotswap(target_rank=max(ranks))
    files = [tmp_path / str(index) / "pytorch_lora_weights.safetensors" for index in range(2)]
    model.load_lora_adapter(files[0], adapter_name="adapter", prefix=None)
    torch.testing.assert_close(case.run(model), outputs[0], atol=1e-4, rtol=1e-4)
    model.load_lora_adapter(files[1], adapter_name="adapter", hotswap=True, prefix=None)
    torch.testing.assert_close(case.run(model), outputs[1], atol=1e-4, rtol=1e-4)
    message = "Trying to hotswap LoRA adapter 'unknown' but there is no existing adapter by that name"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_lora_adapter(files[1], adapter_name="unknown", hotswap=True, prefix=None)


def test_hotswap_must_be_prepared_before_the_first_adapter(case):
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        adapted(case).enable_lora_hotswap(target_rank=8)


def test_saving_an_unknown_adapter_raises(case, tmp_path):
    with pytest.raises(ValueError, match="Adapter name unknown not found"):
        adapted(case).save_lora_adapter(tmp_path, adapter_name="unknown")


def test_adapters_work_with_layerwise_casting_and_fp8_storage(case):
    model = adapted(case)
    output = case.run(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    correlation = torch.corrcoef(torch.stack([case.run(model).flatten(), output.flatten()]))[0, 1]
    assert correlation > 0.9


def test_adapters_work_with_gradient_checkpointing(case):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(case)
        randomize_parameters(model, seed=1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()(**case.inputs(), class_drop_mask=torch.tensor([True, False])).sample.square().mean().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora_" in name])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
