"""Cards of converted checkpoints: valid, filled, and with numbers only where they were published."""

import re
from pathlib import Path

import PIL.Image
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from maetok_hf import MAETokDiffusionPipeline
from maetok_hf.conversion import published
from maetok_hf.conversion.card import make_card, published_cards
from maetok_hf.conversion.source import Source
from tests.documentation import check_command, read_blocks, read_commands
from tests.loopback_hub.cards import errors_in
from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import AUTOENCODER_CONFIG, TRANSFORMER_CONFIG, tiny_autoencoder


FOLDER = Path(__file__).resolve().parents[2] / "model_cards"
CARDS = published_cards()
TOKENIZER = Source(part="tokenizer", name="MAETok/maetok-b-128", on_hub=True, stated_licence="apache-2.0")
LOCAL = Source(part="tokenizer", name="tokenizer", on_hub=False)
SAMPLING = {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_interval": [0.0, 0.5], "recommended": False}
VAE = AUTOENCODER_CONFIG
TRANSFORMER = TRANSFORMER_CONFIG | {"_class_name": "SiTTransformer1DModel", "class_dropout_prob": 0.1}


def metadata(card: str) -> dict:
    return yaml.safe_load(card.removeprefix("---\n").partition("\n---")[0])


def test_cards_of_published_checkpoints_are_up_to_date():
    """If not: `python -m maetok_hf.conversion.card model_cards`."""
    assert set(CARDS) == {
        "maetok-b-128-256",
        "maetok-b-128-512",
        "sit-xl-maetok-b-128-256",
        "sit-xl-maetok-b-128-512",
    }
    for name, card in CARDS.items():
        assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == card, name


@pytest.mark.parametrize("name", CARDS)
def test_their_metadata_is_valid(name):
    card = CARDS[name]
    block = metadata(card)
    assert errors_in(card) == [] and ModelCardData(**block).to_dict() == block == ModelCard(card).data.to_dict()
    assert block["license"] == "apache-2.0" and block["library_name"] == "diffusers"
    model, results = model_index_to_eval_results(block["model-index"])
    assert model == name and eval_results_to_model_index(model, results) == block["model-index"]
    for result in results:
        assert (result.source_name, result.source_url) == (
            "the authors' paper",
            "https://huggingface.co/papers/2502.03444",
        )
        assert result.verified is None and result.metric_args["protocol"]


@pytest.mark.parametrize("name", CARDS)
def test_they_credit_the_authors_and_claim_nothing_of_their_own(name):
    card = CARDS[name]
    assert "Hao Chen, Yujin Han, Fangyi Chen, Xiang Li" in card and "@inproceedings{chen2025maetok" in card
    assert "The authors' published numbers. None was measured with `maetok_hf`" in card
    assert "| tokenizer | none | apache-2.0 |" in card and "has no licence file either" in card
    for section in ("Use", "Intended use", "Training", "Results", "Conversion", "Limits", "Licence", "Citation"):
        assert f"\n## {section}\n" in card
    for hole in ("{{", "{%", " None ", "| |", "\n\n\n", "[]"):
        assert hole not in card.replace("numbers. None was", ""), hole


@pytest.mark.parametrize("name", CARDS)
def test_they_give_the_command_that_measures(name):
    (block,) = (block for block in read_blocks(FOLDER / f"{name}.md") if block.language == "bash")
    (words,) = read_commands(block.code)
    check_command(words)
    assert block.section == "Results" and name in words
    assert ("512" if "512" in name else "256") in " ".join(words).replace(name, "")


def test_numbers_are_those_of_the_paper():
    values = {
        name: [(m["type"], m["value"]) for r in metadata(card)["model-index"][0]["results"] for m in r["metrics"]]
        for name, card in CARDS.items()
    }
    assert values == {
        "maetok-b-128-256": [("rfid", 0.48), ("psnr", 23.61), ("ssim", 0.763)],
        "maetok-b-128-512": [("rfid", 0.62)],
        "sit-xl-maetok-b-128-256": [("fid", 2.31), ("inception_score", 216.5), ("fid", 1.67)],
        "sit-xl-maetok-b-128-512": [("fid", 2.79), ("fid", 1.69)],
    }
    assert "classifier-free guidance 1.9 at times in [0, 0.75]" in CARDS["sit-xl-maetok-b-128-256"]
    assert "classifier-free guidance 1.5 at times in [0, 0.7]" in CARDS["sit-xl-maetok-b-128-512"]


@pytest.mark.parametrize(
    "sources",
    [
        [LOCAL],
        [Source(part="tokenizer", name="user/maetok-b-128", on_hub=True)],
        [Source(part="tokenizer", name="MAETok/maetok-b-128", on_hub=False)],
    ],
)
def test_numbers_are_stated_of_the_published_checkpoints_only(sources):
    card = make_card("name", sources=sources, vae=VAE)
    assert "model-index" not in metadata(card) and "datasets" not in metadata(card)
    assert "Nothing was measured." in card and "| metric |" not in card and "0.48" not in card
    assert "These are the weights that the authors" not in card and "Hao Chen" in card
    mixed = make_card(
        "name",
        sources=[TOKENIZER, Source(part="transformer", name="user/sit", on_hub=True)],
        vae=VAE,
        transformer=TRANSFORMER,
        sampling=SAMPLING,
    )
    assert "model-index" not in metadata(mixed) and "Nothing was measured." in mixed


def test_the_licence_is_stated_as_it_was_found():
    def licences(*sources, **arguments):
        card = make_card("name", sources=sources, vae=VAE, transformer=TRANSFORMER, sampling=SAMPLING, **arguments)
        return metadata(card).get("license"), card

    transformer = Source(
        part="transformer", name="user/sit", on_hub=True, licence_file="LICENSE", stated_licence="mit"
    )
    found, card = licences(TOKENIZER, transformer)
    assert found is None and "| tokenizer | none | apache-2.0 |\n| transformer | LICENSE | mit |" in card
    assert licences(TOKENIZER, transformer, license="other")[0] == "other"
    unknown = Source(part="transformer", name="user/sit", on_hub=True, licence_looked_up=False)
    found, card = licences(TOKENIZER, unknown)
    assert found is None and "| transformer | not looked up | not looked up |" in card


def test_what_a_conversion_finds_out_is_in_the_card():
    source = Source(part="tokenizer", name="MAETok/maetok-b-128", on_hub=True, revision="abc123")
    card = make_card(
        "user/name",
        sources=[source],
        vae=VAE,
        dtypes=["float32", "bfloat16"],
        variants={"bf16": "bfloat16"},
        differences={"latents": 3.14e-7},
        version="1.2.3",
    )
    assert "(https://huggingface.co/MAETok/maetok-b-128) | abc123 |" in card
    assert 'Weights are in float32, and in bfloat16 with `variant="bf16"`.' in card
    assert "`maetok_hf` 1.2.3" in card and "latents 3.1e-07." in card
    assert "no mean and standard deviation" in make_card("n", sources=[source], vae=VAE | {"latents_mean": None})


def run_code(card: str) -> dict:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found = {}
    exec(code, found)
    return found


def test_the_lines_of_a_tokenizers_card_load_and_use_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = tiny_autoencoder()
    vae.save_pretrained("user/model")
    PIL.Image.new("RGB", (40, 30), "green").save("image.png")
    found = run_code(make_card("user/model", sources=[LOCAL], vae=dict(vae.config)))
    assert found["latents"].shape == (1, 6, 4) and found["reconstruction"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("names", [None, {3: 'a "so-called" cat, kitty'}])
def test_the_lines_of_a_pipelines_card_load_and_use_it(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline("sde")
    MAETokDiffusionPipeline(**pipe.components, id2label=names, default_num_inference_steps=2).save_pretrained("a/b")
    card = make_card(
        "a/b", sources=[LOCAL], vae=VAE, transformer=TRANSFORMER, sampling=SAMPLING, id2label=names
    )  # fmt: skip
    assert ("Classes have an index or a name." in card) == (names is not None)
    assert run_code(card)["image"].size == (32, 32)


def test_published_generators_name_their_tokenizers():
    assert {known.tokenizer for known in published.TRANSFORMERS.values()} == set(published.TOKENIZERS)
    assert published.recommended_guidance(256) == (1.9, (0.0, 0.75))
    assert published.recommended_guidance(512) == (1.5, (0.0, 0.7))
    assert published.recommended_guidance(64) == (1.9, (0.0, 0.75))
    assert published.recommended_guidance(64, "MAETok/sit-xl_maetok-b-128-512") == (1.5, (0.0, 0.7))
    published.check_pair("MAETok/maetok-b-128", "MAETok/sit-xl_maetok-b-128")
    published.check_pair("runs/tokenizer", "MAETok/sit-xl_maetok-b-128")
    with pytest.raises(ValueError, match="was trained on latents of MAETok/maetok-b-512, not of MAETok/maetok-b-128"):
        published.check_pair("MAETok/maetok-b-128", "MAETok/sit-xl_maetok-b-128-512")


def test_the_template_is_part_of_the_package():
    assert '"conversion/*.md"' in (FOLDER.parent / "setup.py").read_text(encoding="utf-8")
