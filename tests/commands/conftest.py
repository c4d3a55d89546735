"""Commands run here in one process after another: each finds the state of processes as in a new one."""

import PIL.Image
import pytest
import torch
from accelerate.state import PartialState


@pytest.fixture(autouse=True)
def fresh_state():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    PartialState._reset_state()
    yield
    PartialState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture
def write_images():
    """Writes images of shape `(n, 3, height, width)` into a new folder."""

    def write(folder, images):
        folder.mkdir(parents=True)
        for number, pixels in enumerate(images):
            PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{number:06d}.png")
        return folder

    return write
