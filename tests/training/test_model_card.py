"""The cards say what was trained and measured, nothing else, and are valid on the Hub."""

import re
from pathlib import Path

import PIL.Image
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from maetok_hf.training.model_card import write_model_card
from tests.testing_utils import AUTOENCODER_CONFIG, TRANSFORMER_CONFIG, tiny_autoencoder, tiny_transformer


TEMPLATES = Path(__file__).resolve().parents[2] / "model_cards"
RECIPE = {
    "max_train_steps": 500_000,
    "total_batch_size": 512,
    "model": {"hidden_size": 768},
    "auxiliary_targets": ["hog", "dinov2"],
    "perceptual_network": None,
}
KINDS = ["tokenizer", "sit"]


def make_card(folder, kind: str, **settings) -> ModelCard:
    model = tiny_autoencoder() if kind == "tokenizer" else tiny_transformer()
    defaults = {
        "repo_id": "user/model",
        "recipe": RECIPE,
        "step": 5000,
        "model_config": dict(model.config) | {"_class_name": type(model).__name__},
        "dataset_name": "ILSVRC/imagenet-1k",
        "train_split": "train",
        "base_model": None if kind == "tokenizer" else "user/tokenizer",
    }
    return ModelCard.load(write_model_card(folder, TEMPLATES / f"{kind}_template.md", **(defaults | settings)))


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_of_an_unmeasured_model_is_complete_and_claims_nothing(tmp_path, kind):
    card = make_card(tmp_path, kind)
    tag = {"tokenizer": "image-feature-extraction", "sit": "unconditional-image-generation"}[kind]
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == tag
    assert card.data.license == "apache-2.0" and card.data.datasets == ["ILSVRC/imagenet-1k"]
    assert "maetok" in card.data.tags
    assert card.data.base_model == (None if kind == "tokenizer" else "user/tokenizer")
    assert card.data.eval_results is None and "| metric |" not in card.text and "Nothing was measured" in card.text
    assert "![" not in card.text
    block = yaml.safe_load(card.content.split("---")[1])
    assert ModelCardData(**block).to_dict() == block


@pytest.mark.parametrize("kind", KINDS)
def test_card_shows_the_recipe_and_how_to_load_and_leaves_no_hole(tmp_path, kind):
    text = make_card(tmp_path, kind).text
    assert '.from_pretrained("user/model")' in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {"| model.hidden_size | 768 |", '| auxiliary_targets | ["hog", "dinov2"] |'} <= set(rows)
    assert len(rows) == len(RECIPE) + 2, "one row for each setting, after the two of the head"
    assert "5000 of 500000 steps of 512 images" in text
    assert "2502.03444" in text and "@inproceedings{chen2025maetok" in text
    for hole in ("{{", "{%", "``", "None", "  \n", "[]"):
        assert hole not in text.replace("```", ""), hole
    config = AUTOENCODER_CONFIG if kind == "tokenizer" else TRANSFORMER_CONFIG
    shown = {"tokenizer": f"{config.get('num_latent_tokens')} tokens of {config.get('latent_channels')} channels"}
    assert shown.get(kind, "2 layers of width 32, 10 classes") in text


@pytest.mark.parametrize("gaussian_posterior", [False, True])
def test_the_lines_of_a_tokenizers_card_load_and_use_it(tmp_path, monkeypatch, gaussian_posterior):
    monkeypatch.chdir(tmp_path)
    vae = tiny_autoencoder(gaussian_posterior=gaussian_posterior)
    vae.save_pretrained("user/model")
    PIL.Image.new("RGB", (40, 30), "green").save("image.png")
    text = make_card(tmp_path, "tokenizer", model_config=dict(vae.config)).text
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(lines, found)
    assert found["latents"].shape == (1, vae.config.num_latent_tokens, vae.config.latent_channels)
    assert found["reconstruction"].shape == found["pixels"].shape


def test_measured_values_become_evaluation_results(tmp_path):
    card = make_card(
        tmp_path,
        "tokenizer",
        metrics={"psnr": 21.23456, "ssim": 0.5, "lpips": float("nan"), "num_images": 500},
        validation_split="validation",
        picture="reconstructions.png",
    )
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results.keys() == {"psnr", "ssim"}, "what is not a number was not measured"
    assert results["psnr"].metric_value == 21.23456
    assert (results["ssim"].dataset_type, results["ssim"].dataset_split) == ("ILSVRC/imagenet-1k", "validation")
    assert card.data.model_name == "model"
    assert "| PSNR in dB | 21.23 |\n| SSIM | 0.5 |\n" in card.text
    assert "first 500 images of the split `validation` of ILSVRC/imagenet-1k" in card.text
    assert "32 pixels" in card.text and "](reconstructions.png)" in card.text


def test_metrics_of_a_generator_come_with_their_protocol(tmp_path):
    card = make_card(tmp_path, "sit", metrics={"fid": 2.5}, protocol="50 000 samples, 250 steps.")
    assert "| fid | 2.5 |\n\n50 000 samples, 250 steps.\n" in card.text
    assert card.data.eval_results[0].task_type == "unconditional-image-generation"


@pytest.mark.parametrize("kind", KINDS)
def test_local_names_are_not_published(tmp_path, kind):
    data, teacher = tmp_path / "private" / "photos", tmp_path / "private" / "teacher"
    data.mkdir(parents=True)
    recipe = RECIPE | {"teacher": str(teacher), "discriminator_model": f"local-dir:{teacher}", "note": "a|b/c"}
    card = make_card(
        tmp_path, kind, dataset_name=str(data), base_model=str(tmp_path / "private" / "base"), recipe=recipe
    )
    assert "private" not in card.content and str(tmp_path) not in card.content
    assert "a local data set, `photos`" in card.text and "`base`" in card.text
    assert card.data.datasets is None and card.data.base_model is None
    assert "| teacher | teacher |\n| discriminator_model | local-dir:teacher |\n| note | a\\|b/c |" in card.text


def test_an_existing_folder_is_local_even_if_its_name_could_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "photos").mkdir(parents=True)
    assert make_card(tmp_path, "tokenizer", dataset_name="data/photos").data.datasets is None
    assert make_card(tmp_path, "tokenizer", dataset_name="data/paintings").data.datasets == ["data/paintings"]


def test_a_card_is_replaced_as_a_whole(tmp_path):
    make_card(tmp_path, "tokenizer")
    before = (tmp_path / "README.md").read_bytes()
    broken = tmp_path / "template.md"
    broken.write_text("---\n- a list\n---\n# No metadata\n")
    with pytest.raises(ValueError, match="metadata"):
        write_model_card(
            tmp_path,
            broken,
            repo_id="user/model",
            recipe=RECIPE,
            step=1,
            model_config={},
            dataset_name="a/b",
            train_split="train",
        )
    assert (tmp_path / "README.md").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "template.md"]


def test_continued_training_names_what_it_continues(tmp_path):
    assert "continuing" not in make_card(tmp_path, "sit").text
    assert "continuing `first`" in make_card(tmp_path, "sit", continued_from=str(tmp_path / "first")).text
    assert "continuing `user/first`" in make_card(tmp_path, "sit", continued_from="user/first").text


@pytest.mark.parametrize("name", ["user/my model", "nutzer/müll", "a/b/c", "mnist", "a--b/c"])
def test_names_that_no_repository_can_have_are_no_part_of_the_metadata(tmp_path, name):
    card = make_card(tmp_path, "sit", dataset_name=name, base_model=name)
    assert card.data.datasets is None and card.data.base_model is None
