"""Reading the authors' checkpoints: folders, the Hub, training files, and what must be refused."""

import argparse
import json
import os
import pickle
import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel, convert_autoencoder, convert_transformer
from maetok_hf.conversion import convert as convert_module
from maetok_hf.conversion.state_dict import revert_autoencoder_state_dict, revert_transformer_state_dict
from tests.testing_utils import GOLDEN


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]
FOLDERS = [*[(name, convert_autoencoder) for name in TOKENIZERS], ("sit", convert_transformer)]


@pytest.fixture(params=FOLDERS, ids=[name for name, _ in FOLDERS])
def checkpoint(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden checkpoint that a test may damage."""
    target = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "tokenizer_rope", target)
    (target / "io.safetensors").unlink()
    return target


def edit_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()  # the loaded tensors map the file: write a new one
    save_file({**weights, **changes}, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def assert_same(first, second):
    assert dict(first.config) == dict(second.config)
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(got[key], value) for key, value in expected.items())


# What comes back


def test_models_come_back_ready_to_use(checkpoint, tmp_path):
    name, convert = checkpoint
    model = convert(GOLDEN / name)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert not any(t.is_meta for t in model.state_dict().values())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    model.train().requires_grad_(True)
    torch.optim.SGD(model.parameters(), lr=0.1)


def test_half_precision_weights_are_converted_exactly(checkpoint):
    name, convert = checkpoint
    stored = load_file(GOLDEN / name / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    revert = revert_transformer_state_dict if name == "sit" else revert_autoencoder_state_dict
    for key, value in revert(convert(GOLDEN / name).state_dict()).items():
        assert value.dtype == torch.float32 and torch.equal(value, stored[key].float()), key


def test_models_share_no_memory_with_each_other_or_the_weights(checkpoint, tmp_path):
    """In float32 too, where a conversion without a copy would leave query, key and value in one storage."""
    name, convert = checkpoint
    config = json.loads((GOLDEN / name / "config.json").read_text())
    weights = {key: value.float() for key, value in load_file(GOLDEN / name / "model.safetensors").items()}
    torch.save(weights, tmp_path / "weights.pt")
    for path in (GOLDEN / name, tmp_path / "weights.pt"):
        first, second = convert(path, config=config), convert(path, config=config)
        storages = [t.untyped_storage().data_ptr() for m in (first, second) for t in m.state_dict().values()]
        assert len(storages) == len(set(storages))
        assert all(t.is_contiguous() for t in first.state_dict().values())
        with torch.no_grad():
            for tensor in first.state_dict().values():
                tensor.fill_(7.0)
        assert_same(second, convert(path, config=config))


def test_paths_may_be_strings(checkpoint, monkeypatch):
    name, convert = checkpoint
    expected = convert(GOLDEN / name)
    assert_same(convert(str(GOLDEN / name)), expected)
    monkeypatch.chdir(GOLDEN)
    assert_same(convert(name), expected)


def test_a_given_config_replaces_the_file(folder):
    config = json.loads((folder / "config.json").read_text())
    expected = convert_autoencoder(folder)
    (folder / "config.json").unlink()
    assert_same(convert_autoencoder(folder, config=config), expected)
    assert convert_autoencoder(folder, config={**config, "vq_mean": 2.0}).config.latents_mean == 2.0


# What is refused


def test_missing_files_are_named(folder, tmp_path):
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(OSError, match=r"has no config\.json"):
        convert_autoencoder(folder)
    (folder / "other.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        convert_autoencoder(folder)
    for path in (tmp_path / "nowhere", "./nowhere", folder / "config.json"):
        with pytest.raises(OSError, match="neither a folder nor a Hub repo id"):
            convert_autoencoder(path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '"text"', "\x00\xff"])
def test_broken_configs_are_refused(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        convert_autoencoder(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "pickle", "text"])
def test_corrupt_weights_are_refused(folder, damage):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "header": b"\xff" * 8 + content[8:],
        "pickle": pickle.dumps({"a": 1}),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }[damage]
    path.unlink()
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="not a readable safetensors file.*download it again"):
        convert_autoencoder(folder)


def test_tensors_of_the_wrong_shape_are_listed(folder):
    edit_weights(
        folder,
        **{"encoder.mask_token": torch.zeros(1, 1, 64), "decoder.model.norm.bias": torch.zeros(64)},
    )
    with pytest.raises(ValueError) as error:
        convert_autoencoder(folder)
    assert "encoder.mask_token: (1, 1, 64) instead of (1, 1, 128)" in str(error.value)
    assert "decoder.norm.bias: (64,) instead of (128,)" in str(error.value)
    edit_weights(folder, **{"encoder.model.pos_embed": torch.zeros(1, 18, 128)})
    with pytest.raises(ValueError, match="`image_size` = 64 asks for 17 entries .*, which has 18"):
        convert_autoencoder(folder)


@pytest.mark.parametrize(
    "entry", [{"image_size": 128}, {"num_latent_tokens": 4}, {"use_rope": False}, {"decoder_model": "movq"}]
)
def test_configs_that_contradict_the_weights_are_refused(folder, entry):
    edit_config(folder, **entry)
    with pytest.raises(ValueError, match="do not fit|missing keys"):
        convert_autoencoder(folder)


def test_impossible_statistics_are_refused(folder):
    edit_config(folder, vq_std=0.0)
    with pytest.raises(ValueError, match="`vq_std` = 0.0, expected a positive"):
        convert_autoencoder(folder)
    edit_config(folder, vq_std=float("nan"))
    with pytest.raises(ValueError, match="`vq_std` = nan, expected a finite"):
        convert_autoencoder(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_tensors_that_are_not_floating_are_refused(folder, dtype):
    edit_weights(folder, **{"encoder.mask_token": torch.zeros(1, 1, 128, dtype=dtype)})
    with pytest.raises(ValueError, match=f"not floating-point numbers: encoder.mask_token: {dtype}"):
        convert_autoencoder(folder)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such type")
def test_packed_tensors_are_refused(folder):
    packed = torch.zeros(1, 1, 128, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(ValueError, match="not floating-point numbers: encoder.mask_token: torch.float4"):
        convert_autoencoder(save_pt(folder, load_file(folder / "model.safetensors") | {"encoder.mask_token": packed}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_floating_tensors_become_float32(folder, dtype):
    edit_weights(folder, **{"encoder.mask_token": torch.full((1, 1, 128), 0.5, dtype=dtype)})
    token = convert_autoencoder(folder).encoder.mask_token
    assert token.dtype == torch.float32 and torch.equal(token.detach(), torch.full((1, 1, 128), 0.5))


def test_unknown_keys_are_refused_from_files_too(folder):
    edit_weights(folder, surprise=torch.zeros(1))
    with pytest.raises(ValueError, match=r"unknown keys \['surprise'\]"):
        convert_autoencoder(folder)


def test_checkpoints_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match="not in the authors' format"):
        convert_autoencoder(GOLDEN / "sit")
    with pytest.raises(ValueError, match="not in the authors' format"):
        convert_transformer(GOLDEN / "tokenizer_rope")


# What strangers may send


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_size": 10**9}, "`image_size` = 1000000000 asks for .* entries"),
        ({"image_size": 10**40}, "`image_size` = a number of 41 digits, expected a finite number"),
        ({"image_size": -16}, "`image_size` = -16, expected a positive number"),
        ({"num_latent_tokens": 10**9}, "`num_latent_tokens` = 1000000000 asks for 1000000000 entries"),
        ({"num_latent_tokens": -8}, "`num_latent_tokens` = -8, expected 0 or more"),
        ({"codebook_embed_dim": "8"}, "`codebook_embed_dim` = '8'"),
        ({"enc_patch_size": [16]}, r"`enc_patch_size` = \[16\]"),
        ({"dec_patch_size": {"size": 16}}, "`dec_patch_size` = {'size': 16}"),
        ({"rope_theta": float("inf")}, "`rope_theta` = inf"),
        ({"rope_theta": float("nan")}, "`rope_theta` = nan"),
        ({"rope_theta": -1.0}, "`rope_theta` must be positive"),
        ({"dec_drop_path_rate": 1.5}, r"must lie in \[0, 1\), got 1.5"),
        ({"vq_mean": 10**400}, "`vq_mean` = a number of 401 digits"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_of_strangers_build_nothing_that_the_weights_do_not_hold(folder, entry, message):
    edit_config(folder, **entry)
    with pytest.raises(ValueError, match=message):
        convert_autoencoder(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hidden_size": 10**9}, "`hidden_size` = 1000000000, the weights have 128"),
        ({"depth": 3}, "`depth` = 3, the weights have 2"),
        ({"in_channels": 4}, "`in_channels` = 4, the weights have 8"),
        ({"input_size": 128}, "`input_size` = 128, the weights have 8"),
        ({"mlp_ratio": 8.0}, "`mlp_ratio` = 8.0, the weights have 4"),
        ({"depth": "2"}, "`depth` = '2'"),
        ({"num_classes": 10**9}, "`num_classes` = 1000000000, but the class table has 1001 rows"),
        ({"num_heads": -2}, "`num_heads` = -2, expected a positive number"),
        ({"path_type": "../linear"}, "`path_type` = '../linear', expected 'linear' or 'cosine'"),
        ({"class_dropout_prob": float("nan")}, "`class_dropout_prob` = nan"),
        ({"class_dropout_prob": 2}, r"`class_dropout_prob` = 2, not in \[0, 1\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_transformer_configs_of_strangers_are_refused(entry, message):
    config = json.loads((GOLDEN / "sit" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        convert_transformer(GOLDEN / "sit", config={**config, **entry})


def test_a_config_is_refused_before_the_weights_are_asked_for(folder):
    (folder / "model.safetensors").unlink()
    edit_config(folder, dec_patch_size="16")
    with pytest.raises(ValueError, match="`dec_patch_size` = '16'"):
        convert_autoencoder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"image_size": ' + "9" * 5000 + "}", "not valid JSON"),
        (" " * 2**20 + "{}", "has 1048578 bytes"),
    ],
    ids=["depth", "digits", "size"],
)
def test_configs_that_would_choke_a_parser_are_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_autoencoder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    edit_weights(folder, **{"encoder.mask_token": torch.full((1, 1, 128), value)})
    with pytest.raises(ValueError, match="hold NaN or infinity: encoder.mask_token"):
        convert_autoencoder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "last.pt"])
def test_links_out_of_a_folder_are_refused(folder, tmp_path, name):
    if name == "last.pt":
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    (folder / name).rename(tmp_path / "private")
    (folder / name).symlink_to("../private")
    with pytest.raises(OSError, match=f"{name} is a link to .*private, out of its folder"):
        convert_autoencoder(folder)


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(folder, tmp_path):
    expected = convert_autoencoder(folder)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert_same(convert_autoencoder(folder), expected)
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "weights"):
        (folder / name).rename(blobs / name)
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    assert_same(convert_autoencoder(snapshot), expected)
    (tmp_path / "linked").symlink_to(snapshot)
    assert_same(convert_autoencoder(tmp_path / "linked"), expected)


def test_what_is_no_file_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")  # reading would wait forever
    with pytest.raises(OSError, match=r"has no model\.safetensors"):
        convert_autoencoder(folder)


@pytest.mark.parametrize("name", ["org/../name", "../name", "org/name/../../x", "org//name", "a" * 200 + "/b"])
def test_names_that_are_no_repositories_ask_nobody(name, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", fail)
    with pytest.raises((OSError, ValueError)):
        convert_autoencoder(name)


# Training checkpoints


def save_pt(folder, content, name="0100000.pt"):
    torch.save(content, folder / name)
    return folder / name


def shifted(weights, amount):
    return {key: value + amount for key, value in weights.items()}


def test_ema_weights_are_preferred_in_training_checkpoints(folder):
    weights = load_file(folder / "model.safetensors")
    plain, other = convert_autoencoder(folder), shifted(weights, 1.0)
    assert_same(convert_autoencoder(save_pt(folder, weights)), plain)
    assert_same(convert_autoencoder(save_pt(folder, {"model": weights, "steps": 5})), plain)
    assert_same(convert_autoencoder(save_pt(folder, {"model": other, "ema": weights, "optimizer": {"lr": 1}})), plain)
    assert_same(convert_autoencoder(save_pt(folder, {"model": weights, "ema": None})), plain)
    assert_same(convert_autoencoder(str(save_pt(folder, weights, "last.pth"))), plain)


def test_a_folder_may_hold_one_training_checkpoint_instead(folder):
    weights, plain = load_file(folder / "model.safetensors"), convert_autoencoder(folder)
    save_pt(folder, {"model": shifted(weights, 1.0)})
    assert_same(convert_autoencoder(folder), plain)
    (folder / "model.safetensors").unlink()
    save_pt(folder, {"model": weights})
    assert_same(convert_autoencoder(folder), plain)
    save_pt(folder, {"model": weights}, "last.pth")
    with pytest.raises(ValueError, match=r"several training checkpoints, 0100000\.pt, last\.pth: pass the path"):
        convert_autoencoder(folder)


def test_parsed_flags_beside_the_weights_are_harmless(folder):
    weights = load_file(folder / "model.safetensors")
    content = {"ema": weights, "args": argparse.Namespace(image_size=64, betas=[0.9, 0.95], name=None), "steps": 5}
    assert_same(convert_autoencoder(save_pt(folder, content)), convert_autoencoder(folder))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(folder, prefix):
    weights = load_file(folder / "model.safetensors")
    wrapped = {prefix + key: value for key, value in weights.items()}
    assert_same(convert_autoencoder(save_pt(folder, {"model": wrapped})), convert_autoencoder(folder))


def test_keys_that_differ_by_a_wrapper_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    both = {**weights, "module.encoder.mask_token": weights["encoder.mask_token"] + 1}
    with pytest.raises(ValueError, match="differ only by a prefix"):
        convert_autoencoder(save_pt(folder, both))


def test_transformers_have_training_checkpoints_too(tmp_path):
    weights = load_file(GOLDEN / "sit" / "model.safetensors")
    config = json.loads((GOLDEN / "sit" / "config.json").read_text())
    path = save_pt(tmp_path, {"model": shifted(weights, 1.0), "ema": weights})
    assert_same(convert_transformer(path, config=config), convert_transformer(GOLDEN / "sit"))
    with pytest.raises(ValueError, match="needs the model's config"):
        convert_transformer(path)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("hidden_in", ["top", "args", "weight"])
def test_training_checkpoints_run_no_code(folder, tmp_path, hidden_in):
    weights = load_file(folder / "model.safetensors")
    malice = Malice(tmp_path / "ran")
    content = {
        "top": malice,
        "args": {"model": weights, "args": malice},
        "weight": {**weights, "encoder.mask_token": malice},
    }[hidden_in]
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert_autoencoder(save_pt(folder, content))
    assert not (tmp_path / "ran").exists()


CORRUPT = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1",
    "zip": b"PK\x03\x04" + b"\x00" * 100,
    "truncated": pickle.dumps({"a": 1}, protocol=2)[:-5],
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_training_checkpoints_are_refused(folder, content):
    (folder / "last.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt"):
        convert_autoencoder(folder / "last.pt")


NO_STATE_DICT = [
    [1, 2],
    {"model": [1]},
    {"steps": 3},
    {"model": {"a": 1}},
    {"ema": {1: torch.ones(1)}},
    torch.zeros(3),
]


@pytest.mark.parametrize("content", NO_STATE_DICT)
def test_files_without_a_state_dict_are_refused(folder, content):
    with pytest.raises(ValueError, match="holds no state dict"):
        convert_autoencoder(save_pt(folder, content))


ODD_TENSORS = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "meta": lambda tensor: tensor.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:torch.quantize_per_tensor", "ignore:TypedStorage is")
@pytest.mark.parametrize("make", ODD_TENSORS.values(), ids=ODD_TENSORS.keys())
def test_tensors_of_another_layout_are_refused(folder, make):
    weights = load_file(folder / "model.safetensors") | {"encoder.mask_token": make(torch.zeros(1, 1, 128))}
    with pytest.raises(ValueError, match=r"sparse, nested, quantised or without data: encoder\.mask_token"):
        convert_autoencoder(save_pt(folder, weights))


def test_the_reason_is_told_and_not_the_advice_to_run_what_is_in_the_file(folder, tmp_path):
    with pytest.raises(ValueError, match="posix.system") as caught:
        convert_autoencoder(save_pt(folder, {"model": Malice(tmp_path / "ran")}))
    assert "set to `False`" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_training_checkpoint_is_named(folder):
    with pytest.raises(OSError, match=r"there is no file .*absent\.pt"):
        convert_autoencoder(folder / "absent.pt")


# The Hub


def test_repo_ids_are_downloaded(checkpoint, monkeypatch):
    name, convert = checkpoint
    calls = []

    def download(repo_id, filename, revision=None, token=None):
        calls.append((repo_id, filename, revision, token))
        return str(GOLDEN / name / filename)

    monkeypatch.setattr(convert_module, "hf_hub_download", download)
    assert_same(convert("org/name", revision="abc", token="secret"), convert(GOLDEN / name))
    assert calls == [("org/name", file, "abc", "secret") for file in ("config.json", "model.safetensors")]


def test_repos_of_another_format_and_an_absent_network_are_told_apart(monkeypatch):
    def missing(*args, **kwargs):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(convert_module, "hf_hub_download", missing)
    with pytest.raises(OSError, match=r"the Hub repo org/name has no config\.json"):
        convert_autoencoder("org/name")

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("the connection failed")

    monkeypatch.setattr(convert_module, "hf_hub_download", offline)
    with pytest.raises(OSError, match="there is no folder org/name, .*the connection failed"):
        convert_autoencoder("org/name")


# Published sizes


def full_size_checkpoint(folder, name, model, **config):
    """A checkpoint of a published size in the authors' format: half-precision ones, as the values do not matter."""
    revert = revert_transformer_state_dict if name == "sit" else revert_autoencoder_state_dict
    weights = {k: torch.ones(v.shape, dtype=torch.float16) for k, v in revert(model.state_dict()).items()}
    save_file(weights, folder / "model.safetensors")
    authors = json.loads((GOLDEN / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**authors, **config}))


@pytest.mark.slow
@pytest.mark.parametrize("sample_size", [256, 512])
@pytest.mark.parametrize("modulated", [False, True])
def test_full_size_tokenizers_convert(sample_size, modulated, tmp_path):
    with torch.device("meta"):
        model = AutoencoderMAE(
            sample_size=sample_size, modulated_decoder=modulated, decoder_class_token=not modulated
        )  # fmt: skip
    name = "tokenizer_rope_modulated" if modulated else "tokenizer_rope"
    sizes = {"image_size": sample_size, "num_latent_tokens": 128, "codebook_embed_dim": 32}
    full_size_checkpoint(tmp_path, name, model, **sizes)
    converted = convert_autoencoder(tmp_path)
    assert (converted.config.hidden_size, converted.config.num_layers, converted.config.num_attention_heads) == (
        768,
        12,
        12,
    )
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.slow
def test_full_size_sit_converts(tmp_path):
    with torch.device("meta"):
        model = SiTTransformer1DModel(num_layers=24, attention_head_dim=64)
    sizes = {"hidden_size": 1024, "depth": 24, "num_heads": 16, "in_channels": 32, "input_size": 128}
    full_size_checkpoint(tmp_path, "sit", model, **sizes)
    converted = convert_transformer(tmp_path)
    assert sum(p.numel() for p in converted.parameters()) == sum(p.numel() for p in model.parameters())
    assert (converted.config.num_layers, converted.config.attention_head_dim, converted.config.in_channels) == (
        24,
        64,
        32,
    )
