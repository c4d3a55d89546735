"""The page can be laid out for every kind of pipeline, and its controls ask for what they show."""

import threading
from types import SimpleNamespace

import gradio as gr
import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.page import compare_tab, widgets
from maetok_hf.page.abilities import LoadedPipeline
from maetok_hf.page.comparison import Comparison
from maetok_hf.page.generation import GenerationSettings
from maetok_hf.page.layout import build_page, page_css
from maetok_hf.page.server import private_folder
from maetok_hf.page.widgets import RunControls, abilities_of, as_files, literal, with_messages
from tests.pipelines.helpers import Passes, tiny_pipeline


@pytest.fixture(autouse=True)
def temporary_folder():
    with private_folder() as folder:
        yield folder


def loaded(name="a", **components):
    return LoadedPipeline(pipe=tiny_pipeline("sde", **components), name=name)


def called(page, event, label=None):
    """What an event calls: one of the page, or of the button of this label."""
    for function in page.fns.values():
        for block, name in function.targets:
            if name == event and (label is None or page.blocks[block].value == label):
                return function
    raise LookupError(f"nothing is called by {event} of {label}")


def labels(page):
    return {block.label for block in page.blocks.values() if isinstance(block, gr.Tab)}


def test_the_page_has_a_tab_for_everything_and_a_comparison_only_of_two():
    first, second = loaded(), loaded("b", guidance_transformer={})
    page = build_page([first])
    assert labels(page) == {"Generate", "Reconstruct", "Interpolate", "Two images", "Two classes"}
    with_choice = build_page([first, second], other=second)
    assert "Compare" in labels(with_choice)
    # what computes waits in one queue, and no program may call it by name
    assert not page.analytics_enabled
    assert all(function.api_visibility == "private" for function in with_choice.fns.values())
    leave = called(page, "unload")
    ids = {one.concurrency_id for one in page.fns.values() if one.queue is not False and one is not leave}
    assert ids == {"models"}


def test_small_images_are_shown_with_their_pixels():
    assert "pixelated" in page_css([loaded()])
    large = loaded(vae={"sample_size": 256, "patch_size": 64})
    assert "pixelated" not in page_css([loaded(), large])


def test_controls_start_as_the_pipelines_config_says():
    one = loaded()
    one.pipe.register_to_config(default_num_inference_steps=33, default_guidance_scale=2.5)
    with gr.Blocks():
        controls = RunControls(abilities_of(one.pipe), num_images=4)
    values = {name: component.value for name, component in controls.components.items()}
    assert (values["num_inference_steps"], values["scale"], values["scheme"]) == (33, 2.5, "cfg")
    settings = controls.settings(*values.values())
    assert settings == GenerationSettings(
        class_index=0, num_images=4, num_inference_steps=33, scheme="cfg", scale=2.5, interval=(0.0, 0.75)
    )
    empty = [None if name == "seed" else value for name, value in values.items()]
    with pytest.raises(ValueError, match="The field 'Seed' is empty"):
        controls.settings(*empty)


@pytest.mark.parametrize(
    ("error", "message"),
    [(ValueError("wrong"), "wrong"), (torch.OutOfMemoryError("CUDA"), "ask for fewer images")],
    ids=["wrong", "memory"],
)
def test_what_is_wrong_is_told_and_nothing_else_changes(error, message, monkeypatch):
    told = []
    monkeypatch.setattr(widgets.gr, "Warning", lambda text, **options: told.append(text))

    def call():
        raise error

    def generate():
        yield 1
        raise error

    assert with_messages(call)() == gr.skip()
    assert list(with_messages(generate)()) == [1, gr.skip()]
    assert len(told) == 2 and all(message in text for text in told)


def test_a_mistake_of_the_program_is_not_hidden():
    def call():
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        with_messages(call)()


def test_pictures_are_written_once_each_without_loss(temporary_folder):
    image = PIL.Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    paths = as_files({"seed-3": image}) + as_files({"seed-3": image})
    assert len(set(paths)) == 2 and all(path.startswith(temporary_folder) for path in paths)
    for path in paths:
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(path)), np.asarray(image))


def test_a_seed_that_is_no_seed_is_told_by_the_page():
    with gr.Blocks():
        controls = RunControls(abilities_of(loaded().pipe))
    values = {name: component.value for name, component in controls.components.items()}
    for seed in (-1, 1.5, 2**32, 10**20):
        values["seed"] = controls.components["seed"].preprocess(seed)  # which Gradio neither rounds nor refuses
        with pytest.raises(ValueError, match="The seed must be a whole number from 0 to 4294967295, got"):
            controls.settings(*values.values())


@pytest.mark.parametrize("label", ["Show a pair", "Interpolate classes"])
def test_nothing_is_computed_for_a_page_that_was_closed(label, monkeypatch):
    monkeypatch.setattr(widgets.gr, "Warning", lambda text, **options: None)
    one = loaded()
    page = build_page([one], other=one)

    click = called(page, "click", label)
    first = [Comparison(names=("a", "b"))] if label == "Show a pair" else [0, 1, 8]
    rest = [component.value for component in click.inputs[len(first) :]]
    here, gone = SimpleNamespace(session_hash="here"), SimpleNamespace(session_hash="gone")
    called(page, "unload").fn(gone)
    passes = Passes(one.pipe)
    assert click.fn(*first, gone, lambda *args, **options: None, *rest) == gr.skip()
    assert len(passes.times) == 1
    assert click.fn(*first, here, lambda *args, **options: None, *rest) != gr.skip()


def test_runs_end_with_the_server(monkeypatch):
    with gr.Blocks() as page:
        visitors = widgets.Visitors(page)
    here = SimpleNamespace(session_hash="here")
    visitors.check(here)
    ended = threading.Thread()
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    with pytest.raises(ValueError, match="closed"):
        visitors.check(here)


def test_words_of_others_are_no_markup():
    assert literal("digit 7") == "digit 7"
    assert literal("<img src=x> **a** [b](c)\n| `d` & \\") == (r"\<img src\=x\> \*\*a\*\* \[b\]\(c\) \| \`d\` \& \\")


def test_words_and_files_of_a_comparison():
    start = Comparison(names=("a", "b"))
    classes = {0: "tench"}
    comparison = start.next_pair(GenerationSettings(class_index=0), classes).vote("tie")
    first_is_left = comparison.pairs[0].first_is_left
    left, right = ("a", "b") if first_is_left else ("b", "a")
    assert compare_tab.reveal(comparison) == (
        f"You preferred **neither**. Left was <code>{left}</code>, right was <code>{right}</code>."
    )
    assert compare_tab.tally_table(comparison).splitlines()[-2:] == [
        f"| <code>{name}</code> | 0 | 1 | 0 |" for name in "ab"
    ]
    for path in compare_tab.write_results(comparison):
        assert "tench" in open(path, encoding="utf-8").read()
