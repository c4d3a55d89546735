"""The page as a person sees it, in a real browser."""

import io
import json
import os
import re
import signal

import numpy as np
import PIL.Image
import pytest

from maetok_hf.page.reconstruction import Upload, reconstruct
from tests.page.browser import find_chromium, open_browser, serve_page
from tests.page.images import drawing
from tests.pipelines.helpers import generators, tiny_pipeline


pytestmark = pytest.mark.slow
NAMES = {index: f"digit {index}" for index in range(10)}
STEPS = 8


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Two pipelines of the same classes and their folders."""
    folder, made = tmp_path_factory.mktemp("pipelines"), {}
    for name, options in (("one", {"guidance_transformer": {}}), ("two", {"vae": {"seed": 1}})):
        pipe = tiny_pipeline("sde", id2label=NAMES, **options)
        pipe.register_to_config(default_num_inference_steps=STEPS)
        pipe.save_pretrained(folder / name)
        made[str(folder / name)] = pipe
    return made


@pytest.fixture(scope="module")
def server(pipelines):
    one, two = pipelines
    with serve_page("--pipeline", one, two, "--compare", two) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    chromium = find_chromium()
    if chromium is None:
        missing = "there is no chromium: apt-get install chromium, or name one by the variable CHROMIUM"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with open_browser(chromium, viewport={"width": 1280, "height": 800}, accept_downloads=True) as context:
        yield context


@pytest.fixture
def visit(browser, server):
    """Opens the page as another person, and makes sure that no page had errors or asked other addresses."""
    pages, wrong = [], []

    def open_page():
        page = browser.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.on(
            "request", lambda r: wrong.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else 0
        )
        page.goto(server.url)
        page.locator("#generate").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    page.get_by_role("tab", name=name, selected=True).wait_for()


def upload(page, file):
    """Into the last field that is there."""
    page.locator("div[role=tabpanel]:visible input[type=file]").last.set_input_files(file)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "image.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def pixels(page, selector):
    """Pixels of all images inside an element, as the server sent them."""
    found = []
    for image in page.locator(f"{selector} img").all():
        body = page.request.get(image.get_attribute("src")).body()
        found.append(np.asarray(PIL.Image.open(io.BytesIO(body)).convert("RGB")))
    return np.stack(found)


def choose(page, label, value):
    """Choose from a list by its words."""
    field = page.get_by_label(label, exact=True).locator("visible=true")
    field.click()
    own = page.locator(f"[id^='{field.get_attribute('aria-controls')}-']")  # the list of another field may still fade
    page.get_by_role("option", name=value, exact=True).and_(own).click()


def set_number(page, label, value):
    field = page.get_by_label(label, exact=True).locator("visible=true")
    field.fill(str(value))
    field.press("Tab")


# Generate


def test_generated_images_are_those_of_the_pipeline(visit, pipelines):
    page = visit()
    choose(page, "Class", "digit 7")
    choose(page, "Guidance", "Classifier-free guidance")
    set_number(page, "Seed", 11)
    page.locator("#generate").click()
    page.get_by_text(f"Done: {STEPS} steps").wait_for()
    page.wait_for_function("document.querySelectorAll('#generated img').length == 4")
    found = pixels(page, "#generated")
    pipe = next(iter(pipelines.values()))
    expected = pipe([7] * 4, generator=generators(11, 12, 13, 14), guidance_method="cfg").images
    np.testing.assert_array_equal(found, np.stack([np.asarray(image) for image in expected]))
    # the way there: a preview after every step but the last, and the end
    assert page.locator("#denoising img").count() == STEPS
    assert page.get_by_text("seed 14").count() == 1 and page.locator("#denoising").get_by_text("end").count() == 1
    page.get_by_text("The same in Python").click()
    page.locator("#code").get_by_text("class_labels=[7] * 4").wait_for()


def test_only_what_a_pipeline_can_do_is_offered(visit, pipelines):
    page, (_, two) = visit(), pipelines

    def offered():
        page.get_by_label("Guidance", exact=True).locator("visible=true").click()
        names = page.get_by_role("option").all_inner_texts()
        page.keyboard.press("Escape")
        page.get_by_role("option").first.wait_for(state="hidden")
        page.get_by_label("Guidance", exact=True).locator("visible=true").blur()
        return [name.strip().removeprefix("✓").strip() for name in names]

    assert offered() == ["No guidance", "Classifier-free guidance", "Autoguidance"]
    choose(page, "Pipeline", two)
    page.locator("#header").get_by_text(two).wait_for()
    assert offered() == ["No guidance", "Classifier-free guidance"]
    # scale and interval are there only with guidance
    slider = page.get_by_text("Scale (1 is no guidance)").locator("visible=true")
    slider.wait_for()
    choose(page, "Guidance", "No guidance")
    slider.wait_for(state="hidden")


def test_what_cannot_be_done_is_told(visit):
    page = visit()
    choose(page, "Class", "no class (unconditional)")
    choose(page, "Guidance", "Classifier-free guidance")
    page.locator("#generate").click()
    page.get_by_text("strengthens a class, and there is none").wait_for()
    assert page.get_by_text("Traceback").count() == 0


def test_two_people_at_once_get_their_own_images(visit, pipelines):
    pages = [visit(), visit()]
    pipe = next(iter(pipelines.values()))
    for page, digit in zip(pages, (2, 5), strict=True):
        choose(page, "Class", f"digit {digit}")
        choose(page, "Guidance", "No guidance")
        set_number(page, "number input for Steps", 60)
    for page in pages:
        page.locator("#generate").click()
    for page, digit in zip(pages, (2, 5), strict=True):
        page.get_by_text("Done: 60 steps").wait_for()
        page.wait_for_function("document.querySelectorAll('#generated img').length == 4")
        expected = pipe([digit] * 4, 1.0, num_inference_steps=60, generator=generators(0, 1, 2, 3)).images
        np.testing.assert_array_equal(pixels(page, "#generated"), np.stack([np.asarray(one) for one in expected]))


def test_a_run_can_be_stopped_and_the_next_one_starts_at_once(visit):
    page = visit()
    set_number(page, "number input for Steps", 1000)
    page.locator("#generate").click()
    page.get_by_text("predicted clean images at time").wait_for()
    page.locator("#stop").click()
    page.get_by_text("Stopped. The pictures are those of step").wait_for()
    assert page.get_by_text("Error").count() == 0
    set_number(page, "number input for Steps", 3)
    page.locator("#generate").click()
    page.get_by_text("Done: 3 steps").wait_for()


# Images of a person


def test_an_image_is_reconstructed(visit, pipelines):
    page = visit()
    tab(page, "Reconstruct")
    upload(page, png(drawing(64, 64)))
    expected = reconstruct(next(iter(pipelines.values())), Upload(image=drawing(64, 64)))
    page.get_by_text(f"{expected.psnr:.2f} dB PSNR").wait_for()
    page.locator("#reconstruction img").wait_for()
    np.testing.assert_array_equal(pixels(page, "#reconstruction")[0], np.asarray(expected.reconstruction))
    page.locator("#latent img").wait_for()
    page.locator("#explain").click()
    page.get_by_text("token 5:").wait_for()
    assert page.locator("#tokens img").count() == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image", "no image that can be read"),
        (b"", "This file is empty"),
        (png(drawing(300, 300))["buffer"][:500], "damaged"),
    ],
    ids=["text", "empty", "truncated"],
)
def test_a_bad_upload_gets_a_message_and_a_good_one_works_after_it(content, message, visit):
    page = visit()
    tab(page, "Reconstruct")
    upload(page, {"name": "image.png", "mimeType": "image/png", "buffer": content})
    page.locator("#reconstruct-status").get_by_text(message).wait_for()
    assert page.locator("#reconstruction img").count() == 0
    page.get_by_label("Remove Image").locator("visible=true").first.click()
    page.locator("#reconstruct-status").get_by_text("No image yet.").wait_for()
    upload(page, png(drawing()))
    page.get_by_text("dB PSNR").wait_for()


def test_pictures_between_images_and_between_classes(visit):
    page = visit()
    tab(page, "Interpolate")
    page.locator("#interpolate-images").click()
    page.get_by_text("Two images are needed").wait_for()
    upload(page, png(drawing()))
    filled = page.get_by_label("Remove Image").locator("visible=true")
    filled.first.wait_for()
    page.locator("div[role=tabpanel]:visible input[type=file]").first.set_input_files(png(drawing().rotate(180)))
    filled.nth(1).wait_for()
    page.locator("#interpolate-images").click()
    page.wait_for_function("document.querySelectorAll('#between-images img').length == 8")
    ends = pixels(page, "#between-images")[[0, -1]]
    assert (ends[0] != ends[1]).any()
    tab(page, "Two classes")
    page.locator("#interpolate-classes").click()
    page.wait_for_function("document.querySelectorAll('#between-classes img').length == 8")


# Comparison


def test_votes_are_counted_told_and_downloaded(visit, pipelines, tmp_path):
    page, other = visit(), visit()
    (one, _), results = pipelines, []
    tab(page, "Compare")
    choose(page, "Class", "digit 4")
    choose(page, "Guidance", "No guidance")
    for number in range(3):
        page.locator("#next-pair").click()
        page.get_by_text(f"Pair {number + 1}: class digit 4, seed {number}.").wait_for()
        page.locator("#vote-left:enabled").wait_for()
        # nothing names a side before the vote, and no other pair can be had
        assert page.locator("#next-pair:enabled").count() == 0
        assert one not in page.locator("#compare-status").inner_text()
        left = pixels(page, "#left")[0]
        page.locator("#vote-left").click()
        page.get_by_text("You preferred the left image").wait_for()
        told = re.search(r"Left was (\S+), right", page.locator("#compare-status").inner_text()).group(1)
        expected = pipelines[told](4, 1.0, generator=generators(number)).images[0]
        np.testing.assert_array_equal(left, np.asarray(expected))
        results.append(told == one)
        assert page.locator("#vote-left:enabled").count() == 0
    wins = sum(results)
    assert 0 < wins < 3, "the sides of these seeds differ"
    page.locator("#tally tr").nth(1).get_by_text(str(wins), exact=True).wait_for()
    with page.expect_download() as download:
        page.locator("#as-json").click()
    path = tmp_path / "votes.json"
    download.value.save_as(path)
    content = json.loads(path.read_text())
    assert content["tally_of_first"] == {"wins": wins, "ties": 0, "losses": 3 - wins} and len(content["pairs"]) == 3
    with page.expect_download() as download:
        page.locator("#as-csv").click()
    assert download.value.suggested_filename == "comparison.csv"
    # another person's tally is another one
    tab(other, "Compare")
    assert other.locator("#tally tr").nth(1).inner_text().split()[-3:] == ["0", "0", "0"]
    other.locator("#next-pair").click()
    other.get_by_text("Pair 1:").wait_for()


# Windows, and the end


def test_a_narrow_window_needs_no_scrolling_to_the_side(visit):
    page = visit()
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#generate").click()
    page.get_by_text("Done:").wait_for()
    for name in ("Generate", "Reconstruct"):
        tab(page, name)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
def test_the_server_ends_cleanly_in_the_middle_of_a_run_and_leaves_nothing(number, code, pipelines, browser, tmp_path):
    with serve_page("--pipeline", next(iter(pipelines)), temporary=str(tmp_path)) as server:
        page = browser.new_page()
        page.goto(server.url)
        tab(page, "Reconstruct")
        upload(page, png(drawing()))
        page.get_by_text("dB PSNR").wait_for()
        (folder,) = tmp_path.glob("maetok-demo-*")
        assert list(folder.rglob("image.png"))
        tab(page, "Generate")
        set_number(page, "number input for Steps", 1000)
        page.locator("#generate").click()
        page.get_by_text("predicted clean images at time").wait_for()
        assert server.stop(number) == code
        page.close()
    assert not folder.exists()
    text = "\n".join(server.lines)
    assert "Traceback" not in text and "Warning" not in text, text
    lines = [line for line in server.lines if line]
    # What stands before the first line is what packages say at their import, as diffusers does beside some torchao.
    assert lines[lines.index("Loading the pipelines ...") :] == [
        "Loading the pipelines ...",
        f"The page is at {server.url} (Ctrl-C ends it).",
        *(["Ended."] if code == 0 else []),
    ]
