"""Pictures of numbers have the colors of their numbers."""

import numpy as np
import torch

from maetok_hf.page.pictures import heat_map, latent_picture


def test_a_latent_has_a_picture_whose_colors_are_its_values():
    high, low = latent_picture(torch.full((6, 4), 3.0)), latent_picture(torch.full((6, 4), -3.0))
    middle = (high.width // 2, high.height // 2)
    red, blue = high.getpixel(middle), low.getpixel(middle)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0]
    # what lies outside has the color of the end
    assert latent_picture(torch.full((6, 4), 50.0)).getpixel(middle) == red


def test_a_heat_map_goes_from_dark_to_light():
    picture = np.asarray(heat_map(np.array([[0.0, 1.0], [2.0, 9.0]]), 2.0)).astype(int).sum(axis=-1)
    assert picture[0, 0] < picture[0, 1] < picture[1, 0] == picture[1, 1]
    heat_map(np.zeros((2, 2)), 0.0)
