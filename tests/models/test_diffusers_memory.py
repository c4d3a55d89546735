"""diffusers' and accelerate's ways of running a model that does not fit: offloading, device maps, layerwise casting.

On a machine without an accelerator both devices of an offload are the CPU, so that a forgotten transfer would go
unnoticed; offloading to disk leaves empty tensors behind and notices it.
"""

import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from torch import nn

from maetok_hf.models.layers import TransformerBlock
from tests.models.cases import MODEL_CASES
from tests.testing_utils import tiny_autoencoder


@pytest.fixture(params=MODEL_CASES.values(), ids=MODEL_CASES.keys())
def case(request):
    return request.param


OFFLOADS = {
    "block_level_1": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "block_level_2": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf_level": {"offload_type": "leaf_level"},
}


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_group_offload_to_disk_brings_every_tensor_back(case, offload, tmp_path):
    model, expected = case.build(), case.run(case.build())
    model.enable_group_offload(
        torch.device("cpu"), offload_device=torch.device("cpu"), offload_to_disk_path=str(tmp_path), **offload
    )
    assert list(tmp_path.glob("*.safetensors"))
    for tensor in tensors(model):  # what stays in memory after an offload is undefined: make it unusable
        tensor.data.fill_(float("nan"))
    for _ in range(2):
        assert torch.equal(case.run(model), expected)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_group_offload_through_encode_and_decode(offload, tmp_path):
    plain, model = tiny_autoencoder(), tiny_autoencoder()
    sample = MODEL_CASES["rope"].inputs()["sample"]
    model.enable_group_offload(
        torch.device("cpu"), offload_device=torch.device("cpu"), offload_to_disk_path=str(tmp_path), **offload
    )
    for tensor in tensors(model):
        tensor.data.fill_(float("nan"))
    with torch.no_grad():
        latent = plain.encode(sample).latent
        assert torch.equal(model.encode(sample).latent, latent)
        assert torch.equal(model.decode(latent).sample, plain.decode(latent).sample)


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_group_offload_with_layerwise_casting(case, offload):
    model = case.build()
    model.enable_group_offload(torch.device("cpu"), **offload)
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(case.run(model), case.run(case.build()), atol=0.05, rtol=0.05)


def test_block_level_groups_hold_one_block_each(case):
    model = case.build()
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    for block in model.modules():
        if isinstance(block, TransformerBlock):
            group = block._diffusers_hook.get_hook("group_offloading").group
            assert group.modules == [block]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_automatic_device_map_with_disk_offload(case, share, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    size = sum(t.numel() * t.element_size() for t in tensors(model))
    loaded = case.model_class.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": int(share * size)}, offload_folder=str(tmp_path / "offload")
    )
    devices = set(loaded.hf_device_map.values())
    assert "disk" in devices and (share < 0.6 or "cpu" in devices)
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.equal(case.run(loaded), case.run(model))


def test_whole_device_map(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert not any(t.is_meta for t in tensors(loaded))
    assert torch.equal(case.run(loaded), case.run(model))


def test_blocks_are_not_split_by_a_device_map(case, tmp_path):
    model = case.build()
    model.save_pretrained(tmp_path)
    size = sum(t.numel() * t.element_size() for t in tensors(model))
    loaded = case.model_class.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": int(0.45 * size)}, offload_folder=str(tmp_path / "offload")
    )
    blocks = [name for name, module in model.named_modules() if isinstance(module, TransformerBlock)]
    for key in loaded.hf_device_map:
        assert not any(key.startswith(f"{block}.") for block in blocks)


STORAGES = [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("storage_dtype", STORAGES)
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_layerwise_casting(case, storage_dtype, compute_dtype):
    model, expected = case.build(), case.run(case.build())
    model.to(compute_dtype)
    before = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=compute_dtype)
    assert model.get_memory_footprint() < before or storage_dtype.itemsize == compute_dtype.itemsize
    assert model.dtype == compute_dtype
    output = case.run(model, dtype=compute_dtype)
    assert output.dtype == compute_dtype
    # two or three bits of mantissa: the outcome is near, not equal
    correlation = torch.corrcoef(torch.stack([output.float().flatten(), expected.flatten()]))[0, 1]
    assert correlation > 0.9


def test_layerwise_casting_leaves_positions_times_and_norms_alone(case):
    model = case.build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "pos_embed" in name or "norm" in name or "freqs" in name or "patch_embed" in name:
            assert tensor.dtype == torch.float32, name
        if name.split(".")[0] in ("time_embed", "temperature_embed"):
            assert tensor.dtype == torch.float32, name
        if name.endswith("to_q.weight"):
            assert tensor.dtype == torch.float8_e4m3fn, name


@pytest.mark.parametrize("storage_dtype", STORAGES)
def test_layerwise_casting_trains(case, storage_dtype):
    model = case.build().train()
    model.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**case.inputs()).sample.float().square().mean()
    loss.backward()
    assert loss.isfinite()


def test_layerwise_casting_of_everything_still_runs(case):
    """A user may cast by hand, without the default skip patterns: no code may read a weight's dtype to cast with."""
    model = case.build()
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=None)
    assert case.run(model).isfinite().all()
    assert sum(isinstance(m, nn.Linear) and m.weight.dtype == torch.float8_e4m3fn for m in model.modules()) > 10
