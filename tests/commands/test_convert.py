"""`maetok-convert`: what it writes is what the authors' checkpoints are, and what is wrong leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from maetok_hf import AutoencoderMAE, MAETokDiffusionPipeline, __version__, convert_autoencoder, convert_transformer
from maetok_hf.commands import convert as command
from maetok_hf.conversion import revert_transformer_config, revert_transformer_state_dict
from maetok_hf.conversion.card import published_cards
from maetok_hf.training import hub as hub_module
from tests.loopback_hub import READ_TOKEN, check_card
from tests.testing_utils import GOLDEN, tiny_transformer


TOKENIZER, TRANSFORMER = GOLDEN / "tokenizer_rope_modulated", GOLDEN / "sit"
UPSTREAM_CARD = b"---\nlicense: apache-2.0\n---\n"


def convert(*words) -> None:
    command.main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """What the command says when it fails: a text as the status is printed and makes it 1."""
    with pytest.raises(SystemExit) as ended:
        convert(*words)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("maetok-convert: error: ")
    return f"{capsys.readouterr().err}{ended.value.code}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a tokenizer that a test may damage."""
    shutil.copytree(TOKENIZER, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({**weights, **changes}, folder / "model.safetensors")


def assert_same(first, second):
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(got[key], value) for key, value in expected.items())


def assert_nothing_is_left(here):
    assert list(here.iterdir()) == []


# What is written


def test_a_pipeline_is_as_published(here, capsys):
    convert(TOKENIZER, "--transformer", TRANSFORMER, "--output", "new/pipeline")
    assert [path.name for path in (here / "new").iterdir()] == ["pipeline"]
    pipe = DiffusionPipeline.from_pretrained("new/pipeline")
    assert type(pipe) is MAETokDiffusionPipeline
    assert_same(pipe.vae, convert_autoencoder(TOKENIZER))
    assert_same(pipe.transformer, convert_transformer(TRANSFORMER))
    assert (pipe.vae.config.latents_mean, pipe.vae.config.latents_std) == (0.0123, 1.234)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerMaruyamaScheduler"
    assert pipe.config.default_num_inference_steps == 250
    assert (pipe.config.default_guidance_scale, pipe.config.default_guidance_interval) == (1.9, [0.0, 0.75])
    assert len(pipe.id2label) == 1000 and pipe.get_label_ids("golden retriever") == [207]
    card = (here / "new" / "pipeline" / "README.md").read_text()
    assert f"`maetok_hf` {__version__}" in card and 'class_labels="golden retriever"' in card
    assert str(GOLDEN) not in card
    printed = capsys.readouterr()
    assert "Every tensor comes back" in printed.out and "velocities: " in printed.out and printed.err == ""


def test_a_call_without_settings_samples_with_the_ones_that_were_asked_for(here):
    settings = ("--num_inference_steps", 3, "--guidance_scale", 1.5, "--guidance_interval", 0, 0.7)
    convert(TOKENIZER, "--transformer", TRANSFORMER, "--output", "pipeline", *settings)
    pipe = MAETokDiffusionPipeline.from_pretrained("pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = [
        pipe(class_labels=label, generator=torch.Generator().manual_seed(0), output_type="pt", **arguments).images
        for label, arguments in (
            (207, {}),
            ("golden retriever", {"num_inference_steps": 3, "guidance_scale": 1.5, "guidance_interval": (0, 0.7)}),
            (207, {"guidance_scale": 1.9}),
        )
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    assert (
        "3 steps and classifier-free guidance of scale 1.5 at times in [0.0, 0.7]"
        in (here / "pipeline" / "README.md").read_text()
    )


def test_images_of_512_pixels_have_the_guidance_published_for_them(here, checkpoint, monkeypatch):
    conversion = command.Conversion(
        command.parse_options([str(checkpoint), "--transformer", str(TRANSFORMER), "--output", "x"])
    )
    conversion.checkpoints["tokenizer"].config["image_size"] = 512
    assert conversion.sampling == {
        "num_inference_steps": 250,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 0.7],
        "recommended": True,
    }


def test_a_tokenizer_alone(here):
    convert(TOKENIZER, "--output", "vae")
    assert sorted(path.name for path in (here / "vae").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert_same(AutoencoderMAE.from_pretrained("vae"), convert_autoencoder(TOKENIZER))
    assert "image-feature-extraction" in (here / "vae" / "README.md").read_text()


def test_training_checkpoints_are_read_too(here, tmp_path):
    weights = load_file(TOKENIZER / "model.safetensors")
    torch.save({"ema": weights, "model": {}}, tmp_path / "0100000.pt")
    shutil.copy(TOKENIZER / "config.json", tmp_path)
    convert(tmp_path / "0100000.pt", "--output", "vae")
    assert_same(AutoencoderMAE.from_pretrained("vae"), convert_autoencoder(TOKENIZER))
    assert "a local checkpoint, `0100000.pt`" in (here / "vae" / "README.md").read_text()


def test_dtypes_are_weights_and_variants(here):
    convert(TOKENIZER, "--output", "vae", "--dtype", "bfloat16", "float32", "float16")
    weights = {name: load_file(here / "vae" / f"diffusion_pytorch_model{name}.safetensors") for name in ("", ".fp32")}
    assert weights[""]["decoder.proj_in.weight"].dtype == torch.bfloat16
    assert weights[""]["decoder.rope.freqs"].dtype == torch.float32  # which loading keeps so, too
    assert {tensor.dtype for tensor in weights[".fp32"].values()} == {torch.float32}
    expected = convert_autoencoder(TOKENIZER)
    assert_same(AutoencoderMAE.from_pretrained("vae", variant="fp32"), expected)
    assert_same(AutoencoderMAE.from_pretrained("vae", variant="fp16", dtype=torch.float32), expected)
    loaded = AutoencoderMAE.from_pretrained("vae", dtype=torch.bfloat16)
    assert torch.equal(loaded.decoder.proj_in.weight, expected.decoder.proj_in.weight.bfloat16())
    card = (here / "vae" / "README.md").read_text()
    assert 'in bfloat16, and in float32 with `variant="fp32"`, and in float16 with `variant="fp16"`' in card


def test_pipelines_have_variants_too(here):
    convert(TOKENIZER, "--transformer", TRANSFORMER, "--output", "x", "--dtype", "float32", "float16")
    half = MAETokDiffusionPipeline.from_pretrained("x", variant="fp16", dtype=torch.float16)
    assert half.transformer.dtype == half.vae.dtype == torch.float16
    assert_same(half.transformer, convert_transformer(TRANSFORMER).half())
    assert_same(MAETokDiffusionPipeline.from_pretrained("x").transformer, convert_transformer(TRANSFORMER))


def test_an_empty_folder_and_the_rest_of_a_killed_conversion_are_replaced(here):
    (here / "vae").mkdir()
    (here / ".vae.partial").mkdir()
    (here / ".vae.partial" / "half").write_text("")
    convert(TOKENIZER, "--output", "vae")
    assert [path.name for path in here.iterdir()] == ["vae"]
    assert not (here / "vae" / "half").exists()


HOLD = """
import sys
from maetok_hf.training.interruption import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_another_conversion_into_the_same_folder_is_left_alone(here, capsys):
    (here / ".vae.partial").mkdir()
    (here / ".vae.partial" / "half").write_text("")
    command_line = [sys.executable, "-c", HOLD, here / ".vae.partial"]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert "is being written by another process" in refused(capsys, TOKENIZER, "--output", "vae")
        assert sorted(path.name for path in (here / ".vae.partial").iterdir()) == [".lock", "half"]
        other.stdin.close()
    convert(TOKENIZER, "--output", "vae")
    assert [path.name for path in here.iterdir()] == ["vae"] and not (here / "vae" / ".lock").exists()


def test_a_link_in_the_place_of_the_unfinished_folder_is_not_followed(here, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    (here / ".vae.partial").symlink_to(tmp_path / "mine")
    convert(TOKENIZER, "--output", "vae")
    assert [path.name for path in here.iterdir()] == ["vae"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


# Names of classes


@pytest.fixture
def ten_classes(tmp_path):
    """A SiT of ten classes in the authors' format."""
    model = tiny_transformer(sample_size=8, in_channels=8, attention_head_dim=64)
    (tmp_path / "sit").mkdir()
    save_file(revert_transformer_state_dict(model.state_dict()), tmp_path / "sit" / "model.safetensors")
    (tmp_path / "sit" / "config.json").write_text(json.dumps(revert_transformer_config(model.config)))
    return tmp_path / "sit"


def test_only_a_thousand_classes_are_taken_for_imagenets(here, ten_classes, tmp_path, capsys):
    words = (TOKENIZER, "--transformer", ten_classes, "--output")
    convert(*words, "plain")
    assert MAETokDiffusionPipeline.from_pretrained("plain").id2label is None
    assert "class_labels=0" in (here / "plain" / "README.md").read_text()
    (tmp_path / "names.json").write_text(json.dumps({str(index): f"digit {index}" for index in range(10)}))
    convert(*words, "named", "--id2label", tmp_path / "names.json")
    assert MAETokDiffusionPipeline.from_pretrained("named").get_label_ids("digit 7") == [7]
    assert "has 1000 classes; the transformer has 10" in refused(capsys, *words, "x", "--id2label", "imagenet")
    (tmp_path / "names.json").write_text('{"10": "ten"}')
    assert "names classes [10]" in refused(capsys, *words, "x", "--id2label", tmp_path / "names.json")
    (tmp_path / "names.json").write_text('["zero"]')
    assert "must map class indices" in refused(capsys, *words, "x", "--id2label", tmp_path / "names.json")
    assert "there is no file none.json" in refused(capsys, *words, "x", "--id2label", "none.json")
    assert sorted(path.name for path in here.iterdir()) == ["named", "plain"]


def test_names_can_be_declined(here):
    convert(TOKENIZER, "--transformer", TRANSFORMER, "--output", "x", "--id2label", "none")
    assert MAETokDiffusionPipeline.from_pretrained("x").id2label is None


def test_timm_is_missed_before_the_weights_are_read(here, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    (checkpoint / "model.safetensors").unlink()
    error = refused(capsys, checkpoint, "--transformer", TRANSFORMER, "--output", "x")
    assert "install `maetok_hf[conversion]`" in error and "--id2label none" in error
    assert_nothing_is_left(here)
    convert(TOKENIZER, "--transformer", TRANSFORMER, "--output", "x", "--id2label", "none")


# What is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, image_size=10**9), "`image_size` = 1000000000"),
        (lambda folder: edit_config(folder, num_latent_tokens="8"), "`num_latent_tokens` = '8'"),
        (lambda folder: edit_config(folder, vq_std=-1.0), "`vq_std` = -1.0"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: edit_weights(folder, surprise=torch.zeros(1)), "unknown keys ['surprise']"),
        (lambda folder: edit_weights(folder, **{"../../etc/x": torch.zeros(1)}), "unknown keys ['../../etc/x']"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "download it again"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (
            lambda folder: edit_weights(folder, **{"encoder.mask_token": torch.full((1, 1, 128), 1e6)}),
            "encoder.mask_token has values that torch.float16 cannot hold",
        ),
    ],
    ids=["size", "type", "negative", "json", "key", "path", "truncated", "absent", "range"],
)
def test_damaged_checkpoints_leave_nothing(here, checkpoint, damage, message, capsys):
    damage(checkpoint)
    error = refused(capsys, checkpoint, "--output", "x", "--dtype", "float16")
    assert message in error and (f"tokenizer {checkpoint}: " in error or "dtype" in error)
    assert_nothing_is_left(here)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_does_not_run(here, tmp_path, capsys):
    shutil.copy(TOKENIZER / "config.json", tmp_path)
    torch.save({"model": Malice(tmp_path / "ran")}, tmp_path / "last.pt")
    assert "nothing in it was run" in refused(capsys, tmp_path / "last.pt", "--output", "x")
    assert not (tmp_path / "ran").exists()
    assert_nothing_is_left(here)


def test_a_conversion_that_went_wrong_is_not_given_out(here, monkeypatch, capsys):
    save = command.Conversion._save

    def save_another(self, folder, models, variant):
        with torch.no_grad():
            models["tokenizer"].decoder.proj_out.bias[0] += 1e-3
        save(self, folder, models, variant)

    monkeypatch.setattr(command.Conversion, "_save", save_another)
    error = refused(capsys, TOKENIZER, "--output", "x")
    assert "changes 1 tensors: decoder.to_pixel.model.bias" in error
    assert_nothing_is_left(here)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_whatever_ends_a_conversion_leaves_nothing(here, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(command.Conversion, "_write_card", fail)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        convert(TOKENIZER, "--output", "x")
    assert ended.value.code == (f"maetok-convert: error: {error}" if isinstance(error, OSError) else 130)
    assert_nothing_is_left(here)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_there_must_be_room_for_all_weights(here, monkeypatch, capsys):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda folder: usage._replace(free=10**6))
    assert "takes 0.01 GB, and 0.00 GB are free there" in refused(
        capsys, TOKENIZER, "--output", "x", "--dtype", "float32", "float16", "bfloat16"
    )
    assert_nothing_is_left(here)


def test_what_is_there_is_not_replaced(here, capsys):
    (here / "full").mkdir()
    (here / "full" / "mine").write_text("mine")
    (here / "file").write_text("mine")
    for output, message in (("full", "is not empty"), ("file", "is a file"), (".", "is the current folder")):
        assert message in refused(capsys, TOKENIZER, "--output", output)
    assert (here / "full" / "mine").read_text() == (here / "file").read_text() == "mine"


def test_parts_that_do_not_belong_together_are_refused(here, capsys):
    assert "the config has no `num_heads`" in refused(
        capsys, TOKENIZER, "--transformer", TOKENIZER, "--output", "x"
    )  # fmt: skip
    words = ("MAETok/maetok-b-128", "--transformer", "MAETok/sit-xl_maetok-b-128-512", "--output", "x")
    assert "was trained on latents of MAETok/maetok-b-512" in refused(capsys, *words)
    assert_nothing_is_left(here)


def test_transformers_of_other_latents_are_refused(here, tmp_path, capsys):
    model = tiny_transformer(sample_size=6, in_channels=8, attention_head_dim=64)
    (tmp_path / "sit").mkdir()
    save_file(revert_transformer_state_dict(model.state_dict()), tmp_path / "sit" / "model.safetensors")
    (tmp_path / "sit" / "config.json").write_text(json.dumps(revert_transformer_config(model.config)))
    assert "these two were not trained together" in refused(
        capsys, TOKENIZER, "--transformer", tmp_path / "sit", "--output", "x"
    )
    assert_nothing_is_left(here)


def test_a_pipeline_needs_the_statistics_of_its_latents(here, checkpoint, capsys):
    edit_config(checkpoint, vq_mean=None, vq_std=None)
    words = (checkpoint, "--transformer", TRANSFORMER, "--output", "x")
    assert "pass --latents_mean and --latents_std" in refused(capsys, *words)
    convert(*words, "--latents_mean", 0.5, "--latents_std", 2)
    config = MAETokDiffusionPipeline.from_pretrained("x").vae.config
    assert (config.latents_mean, config.latents_std) == (0.5, 2.0)
    convert(checkpoint, "--output", "vae")
    assert "has no mean and standard deviation" in (here / "vae" / "README.md").read_text()


# The Hub


@pytest.fixture
def upstream(hub):
    """The authors' repositories, with tiny weights."""

    def files(folder):
        names = ("config.json", "model.safetensors")
        return {"README.md": UPSTREAM_CARD} | {name: (folder / name).read_bytes() for name in names}

    hub.add("MAETok/maetok-b-128", files(TOKENIZER))
    hub.add("MAETok/sit-xl_maetok-b-128", files(TRANSFORMER))
    return hub


def test_published_checkpoints_go_from_the_hub_to_the_hub(here, upstream, capsys):
    words = ("MAETok/maetok-b-128", "--transformer", "MAETok/sit-xl_maetok-b-128", "--output", "x")
    convert(*words, "--push_to_hub", "converted", "--hub_private_repo", "--dtype", "float32", "float16")
    repository = upstream.repositories["user/converted"]
    assert repository.private and repository.messages == ["Converted by maetok-convert"]
    pipe = DiffusionPipeline.from_pretrained("user/converted")
    assert_same(pipe.transformer, convert_transformer(TRANSFORMER))
    half = MAETokDiffusionPipeline.from_pretrained("user/converted", variant="fp16")
    assert half.get_label_ids("golden retriever") == [207]
    assert "It is on the Hub: user/converted" in capsys.readouterr().out
    card = check_card("user/converted")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["MAETok/maetok-b-128", "MAETok/sit-xl_maetok-b-128"]
    assert f"| {upstream.repositories['MAETok/maetok-b-128'].sha} |" in card.text
    # but for what only this conversion knows, it is the card of the published checkpoint
    expected = published_cards()["sit-xl-maetok-b-128-256"].split("\n## ")
    shown = card.content.split("\n## ")
    same = {part.partition("\n")[0]: part.strip() for part in expected[1:]}
    got = {part.partition("\n")[0]: part.strip() for part in shown[1:]}
    assert got.keys() == same.keys()
    assert {name for name in got if got[name] != same[name]} == {"Use", "Training", "Results", "Conversion"}
    assert got["Results"].replace("user/converted", "sit-xl-maetok-b-128-256") == same["Results"]


def test_revisions_are_of_each_repository(here, upstream):
    first = upstream.repositories["MAETok/maetok-b-128"].sha
    upstream.repositories["MAETok/maetok-b-128"].commit("broken", {"model.safetensors": b"broken"})
    convert("MAETok/maetok-b-128", "--output", "vae", "--revision", first)
    assert_same(AutoencoderMAE.from_pretrained("vae"), convert_autoencoder(TOKENIZER))
    assert f"| {first} |" in (here / "vae" / "README.md").read_text()


def test_all_files_are_of_one_commit(here, upstream, monkeypatch):
    repository = upstream.repositories["MAETok/maetok-b-128"]
    read = command.AuthorsCheckpoint.read

    def push_meanwhile(self):
        repository.commit("broken", {"model.safetensors": b"broken"})
        read(self)

    monkeypatch.setattr(command.AuthorsCheckpoint, "read", push_meanwhile)
    convert("MAETok/maetok-b-128", "--output", "vae")
    assert_same(AutoencoderMAE.from_pretrained("vae"), convert_autoencoder(TOKENIZER))


def test_an_upload_that_cannot_succeed_is_refused_before_weights_are_read(here, upstream, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    error = refused(capsys, "MAETok/maetok-b-128", "--output", "x", "--push_to_hub", "user/x")
    assert "Nothing can be uploaded to `push_to_hub` = 'user/x'" in error and "hf auth login" in error
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in refused(capsys, "MAETok/maetok-b-128", "--output", "x", "--push_to_hub", "user/x")
    assert upstream.count("config.json") > 0 and upstream.count("model.safetensors") == 0
    assert_nothing_is_left(here)


def test_a_misspelt_source_makes_no_repository(here, upstream, capsys):
    before = set(upstream.repositories)
    refused(capsys, "MAETok/another", "--output", "x", "--push_to_hub", "user/x")
    assert set(upstream.repositories) == before


def test_an_upload_that_fails_leaves_the_output_and_says_how_to_go_on(here, upstream, monkeypatch, capsys):
    monkeypatch.setattr(hub_module, "RETRY_WAITS", (0.0,))
    upstream.fail("POST .*/commit/", 403)
    error = refused(capsys, TOKENIZER, "--output", "vae", "--push_to_hub", "user/x")
    assert f"hf upload user/x {here / 'vae'} ." in error
    assert_same(AutoencoderMAE.from_pretrained("vae"), convert_autoencoder(TOKENIZER))


def test_repositories_that_are_not_there_are_named(here, upstream, capsys):
    assert "tokenizer MAETok/another: " in refused(capsys, "MAETok/another", "--output", "x")
    upstream.add("user/diffusers", {"model_index.json": b"{}"})
    error = refused(capsys, "user/diffusers", "--output", "x")
    assert "the Hub repo user/diffusers has no config.json; it is not in the authors' format" in error
    assert "tokenizer ./nowhere: ./nowhere is neither a folder" in refused(capsys, "./nowhere", "--output", "x")
    assert_nothing_is_left(here)


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x"], "required: TOKENIZER"),
        (["t"], "needs a value for 'output'"),
        (["t", "--output", "x", "--push_to_hub", "a/b/c"], "`push_to_hub`: Repo id must"),
        (["t", "--output", "x", "--push_to_hub", "../x"], "`push_to_hub`: Repo id must"),
        (
            ["t", "--output", "x", "--hub_private_repo"],
            "`hub_private_repo` = True has no effect without `push_to_hub`",
        ),
        (
            ["t", "--output", "x", "--guidance_scale", "2"],
            "`guidance_scale` = 2.0 has no effect without `transformer`",
        ),
        (["t", "--output", "x", "--id2label", "none"], "`id2label` = 'none' has no effect without `transformer`"),
        (["t", "--output", "x", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["t", "--output", "x", "--dtype"], "`dtype` must name one or more dtypes"),
        (["t", "--output", "x", "--dtype", "float16", "float16"], "each once"),
        (["t", "--output", "x", "--transformer", "s", "--guidance_scale", "nan"], "`guidance_scale` must be a finite"),
        (["t", "--output", "x", "--transformer", "s", "--guidance_interval", "1", "0"], "`guidance_interval` must be"),
        (["t", "--output", "x", "--transformer", "s", "--num_inference_steps", "0"], "must be at least 1, got 0"),
        (["t", "--output", "x", "--latents_std", "-1"], "`latents_std` must be positive and finite, got -1.0"),
        (["t", "--output", "x", "--latents_mean", "nan"], "`latents_mean` must be finite, got nan"),
        (["t", "--output", "x", "--license", "My Own: 1"], "`license` must be an identifier of the Hub"),
        (["t", "--output", "x", "--tokenizer", "u"], "unrecognized arguments: --tokenizer"),
    ],
)
def test_wrong_command_lines_end_with_2_and_their_message(here, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert_nothing_is_left(here)


def test_help_and_version(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as ended:
            command.main([flag])
        assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.strip().endswith(__version__)
    assert "maetok-convert MAETok/maetok-b-128 --transformer MAETok/sit-xl_maetok-b-128 --output" in printed
    assert "exit codes: 0 when all is done" in printed


def test_the_examples_of_the_help_are_command_lines():
    lines = command.EXAMPLES.replace("\\\n", " ").splitlines()
    examples = [line.split() for line in lines if line.startswith("  maetok-convert ")]
    assert len(examples) == 4
    for words in examples:
        command.parse_options(words[1:])


def test_errors_of_the_hub_are_errors_of_the_system():
    """Which `main` relies on to tell them in a line."""
    assert issubclass(HfHubHTTPError, OSError)
