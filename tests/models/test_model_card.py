"""A pushed model says what it is, and comes back as it was; what the repository said already is kept."""

import ast

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from maetok_hf import AutoencoderMAE, LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.models.model_card import make_model_card
from tests.loopback_hub import check_card
from tests.testing_utils import tiny_autoencoder, tiny_transformer


MODELS = {
    "tokenizer": (AutoencoderMAE, tiny_autoencoder),
    "sit": (SiTTransformer1DModel, tiny_transformer),
    "lightning_dit": (LightningDiTTransformer1DModel, None),
    "usit": (USiTTransformer1DModel, None),
}
SIZES = {"sample_size": 6, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_classes": 10}


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_by_its_name_with_a_card(hub, name):
    cls, build = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build() if build else cls(num_layers=3 if name == "usit" else 2, **SIZES)
    url = model.push_to_hub(f"user/{name}")
    assert url.startswith(hub.endpoint)
    loaded = cls.from_pretrained(f"user/{name}")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    card = check_card(f"user/{name}")
    assert card.data.library_name == "diffusers" and "maetok" in card.data.tags
    assert f"`{cls.__name__}`" in card.text and f'{cls.__name__}.from_pretrained("user/{name}")' in card.text
    assert "None" not in card.text.split("## Limits")[0]
    ast.parse(code_of(card.text))


def test_saving_and_pushing_at_once_writes_the_same_card(hub, tmp_path):
    tiny_autoencoder().push_to_hub("user/alpha")
    tiny_autoencoder().save_pretrained(str(tmp_path / "omega"), push_to_hub=True, repo_id="user/omega")
    cards = [hub.repositories[f"user/{name}"].files["README.md"].decode() for name in ("alpha", "omega")]
    assert cards[0].replace("alpha", "omega") == cards[1] == (tmp_path / "omega" / "README.md").read_text()


def test_the_card_of_a_repository_is_kept(hub):
    HfApi().create_repo("tokenizer")
    ModelCard("---\nlicense: mit\n---\n# By hand\n").push_to_hub("user/tokenizer")
    tiny_autoencoder().push_to_hub("user/tokenizer", variant="fp16")
    files = hub.repositories["user/tokenizer"].files
    card = ModelCard(files["README.md"].decode())
    assert card.text.strip() == "# By hand" and card.data.license == "mit"
    assert "diffusion_pytorch_model.fp16.safetensors" in files


def test_a_push_into_a_folder_writes_no_card(hub):
    tiny_autoencoder().push_to_hub("user/pipeline", subfolder="vae")
    assert {"vae/config.json"} <= hub.repositories["user/pipeline"].files.keys()
    assert not any("README" in path for path in hub.repositories["user/pipeline"].files)


def test_a_private_repository_and_a_pull_request(hub):
    tiny_autoencoder().push_to_hub("user/tokenizer", private=True)
    assert hub.repositories["user/tokenizer"].private
    tiny_autoencoder(seed=1).push_to_hub("user/tokenizer", create_pr=True, commit_message="Better")
    repository = hub.repositories["user/tokenizer"]
    assert repository.messages == ["Upload AutoencoderMAE", "Better"]
    assert repository.refs["refs/pr/1"] != repository.sha
    revised = AutoencoderMAE.from_pretrained("user/tokenizer", revision="refs/pr/1")
    assert not torch.equal(revised.decoder.proj_out.weight, tiny_autoencoder().decoder.proj_out.weight)


def test_values_cannot_break_the_table():
    card = make_model_card(
        "user/model",
        summary="A model.",
        code="pass",
        settings={"names": ["a|b", "c"], "many": list(range(9)), "text": "two\nlines"},
        limits=["It is small."],
        tags=["small"],
    )
    rows = [line for line in card.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows[1:] == ["| names | ['a\\|b', 'c'] |", "| many | 9 values |", "| text | two lines |"]
