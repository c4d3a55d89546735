"""LoRA adapters: what is trained, what is saved, and how a pipeline takes an adapter up and gives it back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maetok_hf import (
    AutoencoderMAE,
    FlowMatchEulerMaruyamaScheduler,
    LightningDiTTransformer1DModel,
    MAETokDiffusionPipeline,
    SiTTransformer1DModel,
    USiTTransformer1DModel,
)
from maetok_hf.models.lora import LoraInfo
from maetok_hf.pipelines.lora import WEIGHT_NAME, add_named_classes, load_lora_into, match_classes
from maetok_hf.training.lora import LoraAdapter, add_lora
from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions
from maetok_hf.training.optim import create_ema
from maetok_hf.training.sharding import whole_copy
from tests.testing_utils import randomize_parameters


NAMES = {0: "cat, felis", 1: "dog", 2: "crane", 3: "crane"}
SIZES = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4}
ARCHITECTURES = [SiTTransformer1DModel, LightningDiTTransformer1DModel, USiTTransformer1DModel]


def make_transformer(architecture=SiTTransformer1DModel, **settings):
    torch.manual_seed(0)
    return randomize_parameters(architecture(sample_size=4, in_channels=2, **SIZES | settings)).eval()


def make_pipeline(architecture=SiTTransformer1DModel, id2label=NAMES, weak=False, **settings):
    torch.manual_seed(0)
    vae = AutoencoderMAE(
        sample_size=16, patch_size=4, hidden_size=16, num_layers=1, num_attention_heads=1, num_latent_tokens=4,
        latent_channels=2, latents_mean=0.0, latents_std=1.0,
    )  # fmt: skip
    weak = make_transformer(architecture, num_layers=1) if weak else None
    pipeline = MAETokDiffusionPipeline(
        vae, make_transformer(architecture, **settings), FlowMatchEulerMaruyamaScheduler(), id2label, weak
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_adapter(folder, new_names=("owl",), seed=0, architecture=SiTTransformer1DModel, rank=3):
    """An adapter with random weights in a folder, and the transformer it was made in."""
    pipeline = make_pipeline(architecture)
    add_named_classes(pipeline, new_names)
    add_lora(pipeline.transformer, LoraRecipe(rank=rank), bool(new_names), seed)
    info = {
        "base_model": "base",
        "transformer": LoraInfo.sizes_of(pipeline.transformer),
        "num_base_classes": 4,
        "id2label": pipeline.id2label,
        "trained_classes": [0],
    }
    adapter = LoraAdapter.of(pipeline.transformer, info)
    randomize_parameters(adapter, seed=seed + 1)
    adapter.save_pretrained(folder)
    return pipeline.transformer, adapter


@torch.no_grad()
def run(transformer, labels=(0, 1, 2)):
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(len(labels), 4, 2, generator=generator)
    time = torch.linspace(0.1, 0.9, len(labels))
    return transformer.eval()(hidden_states, time, torch.tensor(labels), return_dict=False)[0]


# Classes


def test_names_and_synonyms_are_found_and_others_become_new_classes_in_their_order():
    match = match_classes(["wren", "felis", "owl", " dog "], NAMES, 4)
    assert match.labels == [4, 0, 5, 1]
    assert match.new_names == ["wren", "owl"]
    assert match_classes(["dogs"], NAMES, 4).similar == {"dogs": "dog"} and match.similar == {}


def test_classes_without_or_with_ambiguous_names_are_refused():
    with pytest.raises(ValueError, match="data set does not name its classes"):
        match_classes(None, NAMES, 4)
    with pytest.raises(ValueError, match="the pipeline has no `id2label`"):
        match_classes(["owl"], None, 4)
    with pytest.raises(ValueError, match=r"'crane' is the name of classes \[2, 3\]"):
        match_classes(["crane"], NAMES, 4)


def test_new_classes_are_the_mean_of_the_old_ones_until_they_are_trained():
    pipeline = make_pipeline(weak=True)
    before, table = run(pipeline.transformer), pipeline.transformer.class_embed.weight.detach().clone()
    add_named_classes(pipeline, ["owl", "wren"])
    assert pipeline.id2label == NAMES | {4: "owl", 5: "wren"}
    assert pipeline.guidance_transformer.config.num_classes == pipeline.transformer.config.num_classes == 6
    torch.testing.assert_close(pipeline.transformer.class_embed.weight[4], table[:4].mean(dim=0))
    assert torch.equal(run(pipeline.transformer), before)
    assert torch.equal(run(pipeline.transformer, [6]), run(make_transformer(), [4]))  # the null class


# The adapter


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(architecture):
    transformer = make_transformer(architecture)
    before = run(transformer)
    add_lora(transformer, LoraRecipe(rank=2), True, seed=0)
    assert torch.equal(run(transformer), before)
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].split(".", 2)[-1] for name in trained if "class_embed" not in name}
    assert layers == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"}


def test_rank_and_alpha_scale_the_update():
    outputs = []
    for rank, alpha in ((2, None), (2, 6.0)):
        transformer = make_transformer(num_layers=1)
        add_lora(transformer, LoraRecipe(rank=rank, lora_alpha=alpha, lora_layers=["to_q"]), False, seed=0)
        layer = transformer.transformer_blocks[0].attn.to_q
        assert layer.lora_A["default"].weight.shape == (rank, 16)
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(0.1)
            outputs.append(layer(torch.ones(1, 16)) - layer.base_layer(torch.ones(1, 16)))
    torch.testing.assert_close(outputs[1], 3 * outputs[0])


def test_the_initialisation_is_a_function_of_the_seed():
    weights = []
    for seed in (0, 0, 1):
        transformer = make_transformer()
        add_lora(transformer, LoraRecipe(rank=2), True, seed)
        weights.append({name: p.detach() for name, p in transformer.named_parameters() if "lora_" in name})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_unknown_layers_and_earlier_adapters_are_refused():
    transformer = make_transformer()
    with pytest.raises(ValueError, match=r"names 'to_w', but no linear layer of the SiT.*'attn.to_q'"):
        add_lora(transformer, LoraRecipe(lora_layers=["to_q", "to_w"]), False, 0)
    assert not hasattr(transformer, "peft_config")
    with pytest.raises(ValueError, match="names 'out.0'"):  # part of a name, but not of a word
        add_lora(transformer, LoraRecipe(lora_layers=["out.0"]), False, 0)
    add_lora(transformer, LoraRecipe(), False, 0)
    with pytest.raises(ValueError, match=r"has the adapters \['default'\] already"):
        add_lora(transformer, LoraRecipe(), False, 0)


def test_rows_of_classes_that_are_not_trained_on_stay():
    transformer = make_transformer()
    add_lora(transformer, LoraRecipe(rank=2), True, seed=0)
    optimizer = LoraRecipe(learning_rate=0.1, weight_decay=0.1).make_optimizer(transformer)
    table = transformer.class_embed
    before = table(torch.arange(5)).detach()
    for _ in range(3):
        run.__wrapped__(transformer, [1, 3]).square().mean().backward()
        optimizer.step()
    changed = (table(torch.arange(5)) != before).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]


# Files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_is_the_one_that_diffusers_writes(architecture, tmp_path):
    transformer, _ = make_adapter(tmp_path / "ours", architecture=architecture)
    transformer.save_lora_adapter(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / WEIGHT_NAME) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    metadata = []
    for name in ("ours", "theirs"):
        with safe_open(tmp_path / name / WEIGHT_NAME, framework="pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
            metadata.append(settings | {"target_modules": sorted(settings["target_modules"])})
    assert metadata[0] == metadata[1]


def test_the_adapter_shares_its_parameters_with_the_transformer_and_survives_copy_and_file(tmp_path):
    transformer, adapter = make_adapter(tmp_path / "a")
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in transformer.parameters() if p.requires_grad}
    average = create_ema(adapter, 0.5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    whole_copy(adapter, average).save_pretrained(tmp_path / "b")
    files = [load_file(tmp_path / name / WEIGHT_NAME) for name in "ab"]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    loaded = LoraAdapter.from_pretrained(tmp_path / "b")
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert dict(loaded.config.peft_config) == dict(adapter.config.peft_config)
    assert loaded.config.info["id2label"]["4"] == "owl"


# In a pipeline


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("new_names", [(), ("owl", "wren")])
def test_a_loaded_adapter_gives_the_outputs_it_was_saved_with_and_unloads_to_those_of_before(
    architecture, new_names, tmp_path
):
    trained, _ = make_adapter(tmp_path, new_names, architecture=architecture)
    pipeline = make_pipeline(architecture)
    before = run(pipeline.transformer)
    name = load_lora_into(pipeline, tmp_path)
    labels = [0, 1, *range(4, 4 + len(new_names)), trained.config.num_classes]
    torch.testing.assert_close(run(pipeline.transformer, labels), run(trained, labels))
    assert pipeline.id2label == NAMES | dict(enumerate(new_names, start=4))
    assert not torch.allclose(run(pipeline.transformer), before, atol=1e-2)

    pipeline.transformer.set_adapters(name, 0.0)
    torch.testing.assert_close(run(pipeline.transformer), before, rtol=0, atol=0)
    pipeline.transformer.unload_lora()
    assert torch.equal(run(pipeline.transformer), before)


def test_an_adapter_is_scaled_in_every_layer_with_the_class_table(tmp_path):
    make_adapter(tmp_path)
    pipeline = make_pipeline()
    plain = make_pipeline()
    add_named_classes(plain, ["owl"])
    name = load_lora_into(pipeline, tmp_path)
    table, old = pipeline.transformer.class_embed, plain.transformer.class_embed
    labels = torch.tensor([1, 4])
    full = table(labels) - old(labels)
    pipeline.transformer.set_adapters(name, 0.25)
    torch.testing.assert_close(table(labels) - old(labels), 0.25 * full)
    assert full.abs().max() > 0.1


def test_a_fused_adapter_gives_the_same_outputs_and_comes_out_again(tmp_path):
    make_adapter(tmp_path)
    pipeline = make_pipeline()
    load_lora_into(pipeline, tmp_path)
    labels = [0, 4, 5]
    adapted = run(pipeline.transformer, labels)
    pipeline.transformer.fuse_lora()
    torch.testing.assert_close(run(pipeline.transformer, labels), adapted, atol=1e-4, rtol=1e-4)
    pipeline.transformer.unfuse_lora()
    torch.testing.assert_close(run(pipeline.transformer, labels), adapted, atol=1e-4, rtol=1e-4)

    pipeline.transformer.fuse_lora()
    pipeline.transformer.unload_lora()
    pipeline.save_pretrained(tmp_path / "fused")
    loaded = MAETokDiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert loaded.id2label[4] == "owl"
    torch.testing.assert_close(run(loaded.transformer, labels), adapted, atol=1e-4, rtol=1e-4)


def test_the_scale_of_fusing_holds_for_a_new_class(tmp_path):
    make_adapter(tmp_path)
    pipeline = make_pipeline()
    name = load_lora_into(pipeline, tmp_path)
    full = run(pipeline.transformer, [0, 4])
    pipeline.transformer.set_adapters(name, 0.5)
    half = run(pipeline.transformer, [0, 4])
    pipeline.transformer.set_adapters(name)
    pipeline.transformer.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(run(pipeline.transformer, [0, 4]), half, atol=1e-4, rtol=1e-4)
    pipeline.transformer.unfuse_lora()
    torch.testing.assert_close(run(pipeline.transformer, [0, 4]), full, atol=1e-4, rtol=1e-4)


def test_adapters_of_the_same_base_live_side_by_side(tmp_path):
    first, _ = make_adapter(tmp_path / "owl")
    make_adapter(tmp_path / "again", seed=5)
    make_adapter(tmp_path / "known", new_names=(), seed=7)
    pipeline = make_pipeline()
    names = [load_lora_into(pipeline, tmp_path / name) for name in ("owl", "again", "known")]
    assert names == ["default_0", "default_1", "default_2"]
    assert pipeline.transformer.config.num_classes == 5
    pipeline.transformer.set_adapters(names, [1.0, 0.0, 0.0])
    torch.testing.assert_close(run(pipeline.transformer, [1, 4]), run(first, [1, 4]))
    pipeline.transformer.delete_adapters(names[1:])
    pipeline.transformer.set_adapters(names[0])
    torch.testing.assert_close(run(pipeline.transformer, [1, 4]), run(first, [1, 4]))


def test_a_new_class_is_generated_by_name_and_guided_by_a_weak_model(tmp_path):
    make_adapter(tmp_path)
    pipeline = make_pipeline(weak=True)
    load_lora_into(pipeline, tmp_path, adapter_name="birds")
    assert pipeline.transformer.active_adapters() == ["birds"]
    images = pipeline("owl", num_inference_steps=2, output_type="pt", guidance_scale=1.5).images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


def test_an_adapter_in_low_precision_is_near_that_in_full(tmp_path):
    trained, _ = make_adapter(tmp_path)
    pipeline = make_pipeline().to(torch.bfloat16)
    load_lora_into(pipeline, tmp_path)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 4, 2, generator=generator), torch.tensor([0.2, 0.8]), torch.tensor([1, 4])
    with torch.no_grad():
        low = pipeline.transformer(inputs[0].bfloat16(), *inputs[1:]).sample
        full = trained.eval()(*inputs).sample
    assert low.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([low.float().flatten(), full.flatten()]))[0, 1] > 0.99


def test_an_adapter_of_another_model_is_refused_and_the_pipeline_stays_as_it_was(tmp_path):
    make_adapter(tmp_path / "owl")
    make_adapter(tmp_path / "wren", new_names=("wren",))
    make_adapter(tmp_path / "known", new_names=())

    def refused(pipeline, name, message, **kwargs):
        before = pipeline.transformer.config.num_classes, pipeline.id2label
        with pytest.raises(ValueError, match=message):
            load_lora_into(pipeline, tmp_path / name, **kwargs)
        assert (pipeline.transformer.config.num_classes, pipeline.id2label) == before

    refused(make_pipeline(num_layers=2), "owl", "belongs to 'base', a .*load it into the pipeline it was trained on")
    refused(make_pipeline(id2label=NAMES | {1: "wolf"}), "owl", "class 1 is 'dog' in the adapter .* but 'wolf'")
    refused(make_pipeline(id2label=None, num_classes=7), "owl", "of 4 classes and adds 1, but the pipeline's has 7")
    refused(make_pipeline(id2label=None, num_classes=3), "known", "of 4 classes, but the pipeline's has 3")
    pipeline = make_pipeline()
    load_lora_into(pipeline, tmp_path / "owl", adapter_name="birds")
    refused(pipeline, "wren", "class 4 is 'wren' in the adapter .* but 'owl' in the pipeline")
    refused(pipeline, "owl", r"`adapter_name` is 'birds', but the transformer has \['birds'\]", adapter_name="birds")


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "layer", "half", "table"])
def test_damaged_weights_are_refused_and_the_pipeline_stays_as_it_was(damage, tmp_path):
    make_adapter(tmp_path)
    path, pipeline = tmp_path / WEIGHT_NAME, make_pipeline(weak=True)
    weights, layer = load_file(path), "transformer_blocks.0.attn.to_q"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        factor = weights.pop(f"{layer}.lora_A.weight")
        if damage == "shape":
            weights[f"{layer}.lora_A.weight"] = factor[:, 1:].clone()
        elif damage == "layer":
            weights["transformer_blocks.7.attn.to_q.lora_A.weight"] = factor
        elif damage == "table":
            weights[f"{layer}.lora_A.weight"] = factor
            weights["class_embed.lora_embedding_A"] = torch.zeros(3, 9)
        save_file({} if damage == "empty" else weights, path)
    before = run(pipeline.transformer)
    with pytest.raises(OSError if damage == "cut" else ValueError, match="weights"):
        load_lora_into(pipeline, tmp_path)
    assert pipeline.id2label == NAMES and torch.equal(run(pipeline.transformer), before)
    assert pipeline.transformer.config.num_classes == pipeline.guidance_transformer.config.num_classes == 4
    assert type(pipeline.transformer.class_embed) is torch.nn.Embedding


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "`rank` must be positive, got 0"),
        ({"lora_alpha": 0.0}, "`lora_alpha` must be positive"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must lie in \[0, 1\)"),
        ({"lora_layers": []}, "`lora_layers` is empty"),
        ({"lora_layers": ["class_embed"]}, "adapted for new classes only"),
        ({"time_shift": 0.0}, "`time_shift` must be positive"),
        ({"direction_weight": float("inf")}, "`direction_weight` must be finite"),
        ({"guidance_scale": 0.5}, "`guidance_scale` must be at least 1"),
        ({"guidance_interval": [0.7, 0.2]}, "`guidance_interval` must be two times"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraRecipe(**settings)


@pytest.mark.parametrize("name", ["validation_steps", "num_validation_images"])
def test_counts_of_pictures_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        LoraRunOptions(output_dir="a", dataset_name="b", pretrained_model_name_or_path="c", **{name: 0})
