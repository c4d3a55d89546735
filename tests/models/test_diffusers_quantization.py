"""diffusers' ways to quantise the transformers' weights: torchao's configs, alone and for a pipeline."""

import json

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
)
from torchao.utils import TorchAOBaseTensor

from maetok_hf import MAETokDiffusionPipeline
from tests.models.cases import TRANSFORMER_CASES
from tests.pipelines.helpers import generator, tiny_pipeline


KEPT = ["proj_in", "proj_out", "time_embed", "temperature_embed"]
# each with the largest relative error of a velocity by random weights
CONFIGS = {
    "int8": (Int8WeightOnlyConfig, 0.05),
    "int8_dynamic": (Int8DynamicActivationInt8WeightConfig, 0.06),
    "float8": (Float8WeightOnlyConfig, 0.2),
}


@pytest.fixture(params=TRANSFORMER_CASES.values(), ids=TRANSFORMER_CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def quantised_names(model):
    return {name for name, tensor in model.named_parameters() if isinstance(tensor, TorchAOBaseTensor)}


def load(case, folder, config, **kwargs):
    quantization = TorchAoConfig(config(), modules_to_not_convert=list(KEPT))
    return case.model_class.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, **kwargs
    ).eval()


def test_linear_layers_but_those_kept_are_quantised_and_velocities_stay_near(case, config, tmp_path):
    config, bound = config
    model = case.build()
    model.save_pretrained(tmp_path)
    expected = case.run(model)
    quantised = load(case, tmp_path, config)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised_names(quantised) == {name for name in linears if name.split(".")[0] not in KEPT}
    assert quantised.dtype == torch.bfloat16
    error = (case.run(quantised, dtype=torch.bfloat16).float() - expected).norm() / expected.norm()
    assert 0 < error < bound


def test_a_quantised_transformer_comes_back_from_safetensors(case, config, tmp_path):
    case.build().save_pretrained(tmp_path / "full")
    model = load(case, tmp_path / "full", config[0])
    model.save_pretrained(tmp_path / "quantised")
    assert not list((tmp_path / "quantised").glob("*.bin"))
    settings = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == KEPT
    # without a word of quantisation
    loaded = case.model_class.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16).eval()
    assert quantised_names(loaded) == quantised_names(model) != set()
    assert torch.equal(case.run(loaded, dtype=torch.bfloat16), case.run(model, dtype=torch.bfloat16))


def test_quantised_weights_can_be_offloaded(case, config, tmp_path):
    case.build().save_pretrained(tmp_path)
    model = load(case, tmp_path, config[0])
    expected = case.run(model, dtype=torch.bfloat16)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(case.run(model, dtype=torch.bfloat16), expected)


def test_a_pipeline_quantises_its_transformer_alone_and_saves_it(config, tmp_path):
    tiny_pipeline("sde").save_pretrained(tmp_path / "full")
    quantization = PipelineQuantizationConfig(
        quant_mapping={"transformer": TorchAoConfig(config[0](), modules_to_not_convert=list(KEPT))}
    )
    pipes = [
        MAETokDiffusionPipeline.from_pretrained(
            tmp_path / "full", dtype=torch.bfloat16, quantization_config=quantization
        )
    ]
    assert quantised_names(pipes[0].transformer) and not quantised_names(pipes[0].vae)
    pipes[0].save_pretrained(tmp_path / "quantised")
    pipes.append(MAETokDiffusionPipeline.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16))
    images = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        found = pipe(class_labels=[1, 2], num_inference_steps=3, generator=generator(), output_type="pt")
        images.append(found.images)
    assert torch.equal(*images) and images[0].isfinite().all()


def test_float8_activations_need_a_gpu(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    config = Float8DynamicActivationFloat8WeightConfig
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        assert quantised_names(load(case, tmp_path, config))
    else:
        with pytest.raises(AssertionError, match="requires CUDA compute capability"):
            load(case, tmp_path, config)


def test_a_model_stored_in_float8_comes_back(case, tmp_path):
    model = case.build().to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = case.run(model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(case.run(loaded, dtype=torch.bfloat16), expected)
    loaded.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.equal(case.run(loaded, dtype=torch.bfloat16), expected)
