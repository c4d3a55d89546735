"""The measurements of quantised weights, on tiny models."""

import json

import numpy as np
import pytest
import torch

from benchmarks import quantization as benchmark
from benchmarks.machine import machine
from benchmarks.quantization import KEPT, WAYS, Inputs
from maetok_hf import SiTTransformer1DModel, USiTTransformer1DModel
from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import seeded_normal, tiny_transformer


CPU = torch.device("cpu")
ON_CPU = [name for name, way in WAYS.items() if not way.needs_gpu]
TINY = {"sample_size": 4, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 10}


@pytest.fixture
def tiny(monkeypatch):
    """Models of no size in the place of published ones, few samples, and short times."""
    models = {
        "SiT-B": (SiTTransformer1DModel, TINY | {"num_layers": 2}),
        "USiT": (USiTTransformer1DModel, TINY | {"num_layers": 3}),
    }
    monkeypatch.setattr(benchmark, "RANDOM_MODELS", models)
    monkeypatch.setattr(benchmark, "GROUPED", ("USiT",))
    monkeypatch.setattr(benchmark, "SAMPLES_PER_CLASS", 2)
    monkeypatch.setattr(benchmark.demo, "NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr(benchmark, "BATCH_SIZES", (1,))


def test_errors_are_relative_and_found_at_their_worst():
    labels = torch.tensor([3, 3, 10])
    inputs = Inputs(torch.zeros(2, 3, 4, 5), torch.tensor([0.1, 0.9]), labels)
    exact, found = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    assert inputs.errors(found, exact) == {"error": 0.0, "worst_time": 0.0, "worst_class": 0.0}
    found[1, 2] = 1.3
    errors = inputs.errors(found, exact)
    assert errors["error"] == pytest.approx(0.3 * (1 / 6) ** 0.5)
    assert errors["worst_time"] == pytest.approx(0.3 * (1 / 3) ** 0.5)
    assert errors["worst_class"] == pytest.approx(0.3 * (1 / 2) ** 0.5)
    assert inputs.errors(2 * found, 2 * exact) == pytest.approx(errors)


def test_inputs_lie_between_data_and_noise():
    latents = seeded_normal(2, 4, 3, seed=5)
    inputs = benchmark.noised(latents, torch.tensor([0, 1]), (0.0, 0.5, 1.0))
    assert torch.equal(inputs.hidden_states[0], latents)
    noise = 2 * inputs.hidden_states[1] - latents
    assert inputs.hidden_states[2].std() == pytest.approx(1, abs=0.5) and abs((noise * latents).mean()) < 1


def test_velocities_are_those_of_the_model():
    model = tiny_transformer()
    inputs = benchmark.random_inputs(model)
    found = inputs.velocities(model)
    assert inputs.labels.tolist() == [0, 10]
    with torch.no_grad():
        time = inputs.times[2].expand(2)
        assert torch.equal(found[2], model(inputs.hidden_states[2], time, inputs.labels).sample)


def test_random_models_have_no_silent_layer(tiny):
    for name in benchmark.RANDOM_MODELS:
        model = benchmark.random_transformer(name)
        assert all(parameter.abs().max() > 0 for parameter in model.parameters())
        inputs = benchmark.random_inputs(model)
        assert inputs.velocities(model).std() > 0.1


def test_every_linear_layer_is_in_one_group():
    model = tiny_transformer()
    groups = benchmark.groups_of(model)
    assert groups["transformer_blocks.*.modulation"] == [
        f"transformer_blocks.{number}.modulation.linear" for number in range(2)
    ]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(name for group in groups.values() for name in group) == sorted(names)


def test_ways_differ_in_bytes_and_leave_out_what_is_kept(tmp_path):
    model = tiny_transformer(temperature_embedding=True)
    model.save_pretrained(tmp_path)
    inputs = benchmark.random_inputs(model)
    rows = [row for row, _ in benchmark.measure_ways(tmp_path, inputs, CPU)]
    assert [row["way"] for row in rows if not row["kept"]] == ON_CPU
    size = {(row["way"], bool(row["kept"])): row["bytes"] for row in rows}
    error = {(row["way"], bool(row["kept"])): row["error"] for row in rows}
    assert size["float32", False] == benchmark.model_bytes(model) == 2 * size["bfloat16", False]
    assert error["float32", False] == 0 < error["bfloat16", False] < error["int8", False] < error["float8", False]
    for name in ON_CPU[2:]:
        assert size[name, False] < size[name, True] < size["bfloat16", False]
    kept = WAYS["float8-cast"].load(tmp_path, KEPT, CPU)
    types = {name.split(".")[0]: tensor.dtype for name, tensor in kept.named_parameters() if name.endswith("weight")}
    assert {name for name, dtype in types.items() if dtype == torch.float8_e4m3fn} == {
        *("class_embed", "transformer_blocks", "norm_out_modulation")
    }


def test_float8_products_are_measured_where_they_can_be(monkeypatch):
    way = WAYS["float8-dynamic"]
    assert not benchmark.can_run(way, CPU)
    for capability, expected in (((8, 9), True), ((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert benchmark.can_run(way, torch.device("cuda")) is expected


def test_samples_of_other_noise_are_of_the_same_class():
    images = np.zeros((20, 2, 2, 3), dtype=np.uint8)
    images[10:] = 51
    assert benchmark.pixel_difference_of_other_noise(images) == pytest.approx(0.2)


@pytest.mark.slow
def test_all_parts_run_and_keep_each_other(tiny, tmp_path, monkeypatch, capsys):
    pipe = tiny_pipeline(
        "sde", vae={"num_latent_tokens": 8, "latent_channels": 16}, transformer={"sample_size": 8, "in_channels": 16}
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    ways = {name: WAYS[name] for name in ("float32", "bfloat16", "int8", "float8-cast")}  # to compile no more of them
    monkeypatch.setattr(benchmark, "WAYS", ways)
    for part in benchmark.PARTS:
        words = ["--pipeline", tmp_path / "pipeline", "--parts", part, "--num_rounds", "2", "--num_threads", "1"]
        monkeypatch.setattr("sys.argv", ["quantization", *map(str, [*words, "--results_dir", tmp_path])])
        benchmark.main()
    report = json.loads((tmp_path / "quantization.json").read_text())
    assert report.keys() == set(benchmark.PARTS)
    rows = report["errors"]["demo"]["rows"]
    assert rows[0]["pixel_difference"] == 0 < rows[-1]["pixel_difference"] < report["errors"]["demo"]["other_noise"]
    assert len(report["times"]["rows"]) == 2 * len(ways) - 1  # one is not compiled
    text = (tmp_path / "quantization.md").read_text()
    assert "Not measured.\n" not in text and "| int8 weights | compiled | 1 |" in text
    assert str(tmp_path) not in text + json.dumps(report)


def test_what_was_not_measured_is_said():
    row = {"way": "int8", "kept": [], "bytes": 1_234_567, "error": 0.0123, "worst_time": 0.02, "worst_class": 0.03}
    row |= {"pixel_difference": 0.004, "recognition": 0.99, "diversity": 0.98, "distance": 1.5}
    groups = [{"group": "proj_in", "share": 0.001, "errors": {"int8": 0.005}}]
    demonstration = {"num_parameters": 4_000_000, "num_samples": 500, "other_noise": 0.2, "rows": [row]}
    errors = {
        "command": "the command",
        "machine": machine(),
        "demo": demonstration | {"groups": groups},
        "random": {"SiT-B": {"rows": [row]}},
    }
    text = benchmark.to_markdown({"errors": errors})
    assert "| int8 weights | all | 1.23 | 1.23 % | 2.00 % | 3.00 % | 0.0040 | 0.990 | 0.980 | 1.50 |" in text
    assert "| `proj_in` | 0.10 % | 0.50 % |" in text and "- errors: `the command` on" in text
    assert "SiT-B\n\nNot measured.\n" in text and "compute capability 8.9" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_rounds", "0"], "`--num_rounds` must be at least 1, got 0"),
        (["--pipeline", "nowhere"], "nowhere holds no pipeline: run `make demo` first"),
        (["--parts", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        benchmark.parse_args(words)
    assert message in capsys.readouterr().err
