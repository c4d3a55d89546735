"""`maetok-demo`: its options, what it refuses before the page is served, and its one way to the server."""

import json
import socket
import warnings

import pytest
import torch

from maetok_hf.commands import demo_page
from maetok_hf.commands.demo_page import PageOptions, load_all, main, parse_options
from maetok_hf.page.server import address_of, open_port, private_folder
from tests.commands.words import replaced
from tests.pipelines.helpers import tiny_pipeline


WORDS = ("--pipeline", "a", "b", "--port", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for name, options in (("one", {}), ("two", {}), ("three", {"transformer": {"num_classes": 3}})):
        tiny_pipeline("sde", **options).save_pretrained(folder / name)
    return folder


# Words


def test_words_become_options():
    options = parse_options([*WORDS, "--compare", "c", "--dtype", "bfloat16"])
    assert options == PageOptions(pipeline=["a", "b"], port=0, compare="c", dtype="bfloat16")
    assert parse_options(["--pipeline", "a"]).host == "127.0.0.1"  # no one else is let in unasked


def test_help_and_version(capsys):
    for flag in ("--help", "--version"):
        with pytest.raises(SystemExit) as end:
            parse_options([flag])
        assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "maetok-demo --pipeline outputs/demo/pipeline" in shown and "exit codes: 0 after Ctrl-C" in shown
    assert shown.strip().splitlines()[-1][0].isdigit()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline": None}, "pipeline"),
        ({"pipeline": ("a", "a")}, "names a pipeline twice: a a"),
        ({"port": 70000}, "`port` must be from 0 to 65535, got 70000"),
        ({"port": "x"}, "invalid int value"),
        ({"compare_revision": "v1"}, "has no effect without `compare`"),
        ({"share": "true"}, "unrecognized arguments"),
        ({"device": "tpu"}, "invalid choice"),
    ],
    ids=str,
)
def test_wrong_words_are_refused(values, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(replaced(WORDS, **values))
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        PageOptions(pipeline=["a"], device="cuda")


# Pipelines


def test_pipelines_are_loaded_quietly_and_once(folders, capfd):
    one, two = str(folders / "one"), str(folders / "two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demo_page.quiet_others()
        loaded, other = load_all(PageOptions(pipeline=[one, two], compare=two, dtype="bfloat16", device="cpu"))
    assert [one_of.name for one_of in loaded] == [one, two] and other is loaded[1]
    assert loaded[0].pipe.transformer.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")
    assert load_all(PageOptions(pipeline=[one], device="cpu"))[1] is None


def refusal(words, capsys):
    """What a command prints that ends before the page is served."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--port", "0", "--device", "cpu"])
    assert isinstance(end.value.code, str) and end.value.code.startswith("maetok-demo: error: ")
    return end.value.code


def test_what_is_no_pipeline_is_told_before_the_page_is_served(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no model_index.json" in refusal(["--pipeline", str(tmp_path / "empty")], capsys)
    assert "there is no folder" in refusal(["--pipeline", str(tmp_path / "nothing")], capsys)
    assert "there is no folder" in refusal(["--pipeline", "outputs/demo/nothing"], capsys)
    one = str(folders / "one")
    assert "no meaning for a local folder" in refusal(["--pipeline", one, "--revision", "v1"], capsys)
    assert "10 and 3 classes" in refusal(["--pipeline", one, "--compare", str(folders / "three")], capsys)


def test_a_damaged_or_foreign_pipeline_is_told(tmp_path, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    weights = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot load the pipeline" in refusal(["--pipeline", str(tmp_path / "pipeline")], capsys)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (foreign / "model_index.json").write_text(json.dumps(index))
    assert "cannot load the pipeline" in refusal(["--pipeline", str(foreign)], capsys)


def test_a_repository_that_is_not_there_is_told(hub, capsys):
    message = refusal(["--pipeline", "user/nothing"], capsys)
    assert "cannot load the pipeline user/nothing, neither as a folder nor as a Hub repository" in message


# The port and what is left


def test_a_taken_port_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(demo_page, "load_all", lambda options: pytest.fail("a pipeline was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1 port {port} .address already in use"):
            main(["--pipeline", "a/b", "--port", str(port)])
    with pytest.raises(ValueError, match="`host` 'no.such.host.invalid' is no address"):
        open_port("no.such.host.invalid", 0)


def test_the_address_is_one_that_a_browser_takes():
    for host, shown in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        with open_port(host, 0) as sock:
            assert address_of(sock) == f"{shown}{sock.getsockname()[1]}"


def test_ctrl_c_while_loading_is_no_error(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_page, "load_all", interrupt)
    main(["--pipeline", "a/b", "--port", "0"])
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_of_uploads_goes_with_the_server(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with private_folder() as folder:
        from gradio.utils import get_upload_folder

        assert get_upload_folder() == folder
    with pytest.raises(FileNotFoundError):
        open(folder)
    assert get_upload_folder() != folder
