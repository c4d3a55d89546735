import io

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.data import ImageTransform, to_pixel_values, to_rgb
from maetok_hf.data.transforms import MAX_ASPECT_RATIO, resize_short_side
from maetok_hf.seeding import keyed_generator


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def to_uint8(tensor: torch.Tensor) -> np.ndarray:
    return ((tensor + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


def reopened(image: PIL.Image.Image, format: str, **options) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def test_an_image_of_the_right_size_keeps_its_pixels():
    pixels = noise(16, 16)
    result = ImageTransform(16)(PIL.Image.fromarray(pixels))
    assert result.dtype == torch.float32 and result.shape == (3, 16, 16)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float64) / 127.5 - 1
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_black_is_minus_one_and_white_is_one():
    image = PIL.Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]] * 2, dtype=np.uint8))
    result = ImageTransform(2)(image)
    assert result[:, :, 0].eq(-1).all() and result[:, :, 1].eq(1).all()


def test_halving_averages_boxes_of_two_by_two_pixels():
    pixels = noise(32, 32)
    result = to_uint8(ImageTransform(16)(PIL.Image.fromarray(pixels)))
    boxes = pixels.reshape(16, 2, 16, 2, 3).astype(np.float64).mean(axis=(1, 3))
    assert np.abs(result - boxes).max() <= 1


@pytest.mark.parametrize("size", [(16, 40), (41, 16), (17, 16)])
def test_centre_crop_takes_the_middle(size):
    height, width = size
    pixels = noise(height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    result = to_uint8(ImageTransform(16)(PIL.Image.fromarray(pixels)))
    np.testing.assert_array_equal(result, pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize(
    ("size", "expected"), [((500, 375), (341, 256)), ((1100, 2300), (256, 535)), ((3, 5), (256, 427))]
)
def test_short_side_becomes_the_target_and_the_ratio_is_kept(size, expected):
    assert resize_short_side(PIL.Image.new("RGB", size), 256).size == expected


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 7), (31, 33), (64, 700)])
def test_any_size_gives_the_resolution(size, crop):
    image = PIL.Image.fromarray(noise(size[1], size[0]))
    result = ImageTransform(32, crop=crop, random_flip=True)(image, keyed_generator(0, "augment", 0, 0))
    assert result.shape == (3, 32, 32)
    assert result.min() >= -1 and result.max() <= 1


def test_extreme_ratios_are_cut_around_the_centre_before_resizing():
    strip = np.zeros((2, 1001, 3), dtype=np.uint8)
    strip[:, 495:506] = 255
    resized = resize_short_side(PIL.Image.fromarray(strip), 8)
    assert resized.size == (8 * MAX_ASPECT_RATIO, 8)
    assert to_uint8(ImageTransform(8)(PIL.Image.fromarray(strip))).min() == 255


def test_random_crop_takes_squares_of_080_to_100_of_the_short_side():
    # A ramp along each axis shows which part was cut: its ends are the first and last column and row.
    ramp = np.zeros((200, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(200)[:, None]
    transform, image = ImageTransform(100, crop="random"), PIL.Image.fromarray(ramp)
    widths, lefts = [], []
    for index in range(300):
        result = to_uint8(transform(image, keyed_generator(0, "augment", 0, index))).astype(int)
        columns, rows = result[50, :, 0], result[:, 50, 1]
        assert abs((columns[-1] - columns[0]) - (rows[-1] - rows[0])) <= 2, "the crop must be square"
        widths.append((columns[-1] - columns[0] + 2) / 200)
        lefts.append(columns[0])
    assert min(widths) >= 0.79 and max(widths) <= 1.01
    assert min(widths) < 0.82 and max(widths) > 0.98 and max(lefts) > 30


def test_draws_depend_on_the_generator_only():
    image = PIL.Image.fromarray(noise(50, 70))
    transform = ImageTransform(32, crop="random", random_flip=True)
    torch.manual_seed(0)
    first = transform(image, keyed_generator(3, "augment", 1, 7))
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, transform(image, keyed_generator(3, "augment", 1, 7)))
    assert not torch.equal(first, transform(image, keyed_generator(3, "augment", 2, 7)))
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_flip_mirrors_half_of_the_images_and_leaves_the_crops_alone():
    image = PIL.Image.fromarray(noise(50, 70))
    plain, flipping = ImageTransform(32, crop="random"), ImageTransform(32, crop="random", random_flip=True)
    flipped = 0
    for index in range(200):
        without = plain(image, keyed_generator(0, "augment", 0, index))
        result = flipping(image, keyed_generator(0, "augment", 0, index))
        mirrored = torch.equal(result, without.flip(-1))
        assert mirrored or torch.equal(result, without)
        flipped += mirrored
    assert 70 < flipped < 130


def test_flip_is_independent_of_where_the_crop_lies():
    ramp = np.zeros((200, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(200)[:, None]
    transform, image = ImageTransform(100, crop="random", random_flip=True), PIL.Image.fromarray(ramp)
    results = [to_uint8(transform(image, keyed_generator(0, "augment", 0, i))).astype(int) for i in range(400)]
    flipped = [float(result[0, 0, 0] > result[0, -1, 0]) for result in results]
    places = [
        [result[0, :, 0].min() for result in results],
        [result[0, 0, 1] for result in results],
        [np.ptp(result[:, 0, 1]) for result in results],
    ]
    for place in places:
        assert abs(np.corrcoef(flipped, place)[0, 1]) < 0.2


def test_a_random_transform_without_generator_is_refused():
    for transform in (ImageTransform(8, random_flip=True), ImageTransform(8, crop="random")):
        with pytest.raises(ValueError, match="generator"):
            transform(PIL.Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(("argument", "value"), [("resolution", 0), ("resolution", 8.0), ("crop", "middle")])
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`.*{value}"):
        ImageTransform(**{"resolution": 8, argument: value})


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBA", "LA", "PA", "LAB"])
def test_every_mode_shows_the_same_picture(mode):
    # Left half black, right half white: every colour space can say that.
    image = PIL.Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (4, 0, 8, 8))
    if mode == "LAB":
        converted = PIL.Image.merge("LAB", [image.convert("L"), *[PIL.Image.new("L", (8, 8), 128)] * 2])
    elif mode == "PA":
        converted = image.convert("P").convert("PA")
    else:
        converted = image.convert(mode)
    assert converted.mode == mode
    result = np.asarray(to_rgb(converted)).astype(int)
    assert np.abs(result[:, :4]).max() <= 2 and np.abs(result[:, 4:] - 255).max() <= 2


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_to_eight(mode):
    values = np.array([[0, 257, 128 * 257, 65535]] * 4, dtype=np.uint16)
    if mode == "I":
        image = PIL.Image.fromarray(values.astype(np.int32))
    else:
        order = ">u2" if mode == "I;16B" else "<u2"
        image = PIL.Image.frombytes(mode, (4, 4), values.astype(order).tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[0], [[0] * 3, [1] * 3, [128] * 3, [255] * 3])


def test_a_sixteen_bit_png_file_is_not_washed_out():
    image = reopened(PIL.Image.fromarray(np.full((4, 4), 100 * 257, dtype=np.uint16)), "PNG")
    assert np.asarray(to_rgb(image)).tolist() == [[[100, 100, 100]] * 4] * 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_is_composited_on_white(mode):
    straight = {"RGBA": "RGBA", "RGBa": "RGBA", "LA": "LA", "La": "LA"}[mode]
    black = (0,) * (len(straight) - 1)
    image = PIL.Image.new(straight, (3, 1))
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (*black, alpha))
    result = np.asarray(to_rgb(image.convert(mode)))[0]
    np.testing.assert_allclose(result.astype(int), [[255] * 3, [204] * 3, [0] * 3], atol=1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_becomes_white(mode):
    image = PIL.Image.new("RGB", (4, 4), (10, 10, 10))
    image.paste((200, 200, 200), (0, 0, 2, 4))
    if mode == "P":
        image = image.quantize(2)
        transparent = image.getpixel((3, 0))
    else:
        image = image.convert(mode)
        transparent = 10 if mode == "L" else (10, 10, 10)
    result = np.asarray(to_rgb(reopened(image, "PNG", transparency=transparent)))
    assert result[0, 3].tolist() == [255, 255, 255] and result[0, 0].tolist() == [200, 200, 200]


def test_a_cmyk_jpeg_keeps_its_brightness():
    image = PIL.Image.new("RGB", (16, 16), (250, 250, 250)).convert("CMYK")
    reread = reopened(image, "JPEG")
    assert reread.mode == "CMYK"
    assert np.asarray(to_rgb(reread)).min() > 230


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = noise(4, 6)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = reopened(PIL.Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), upright)


def test_an_unreadable_exif_block_does_not_cost_the_image():
    pixels = noise(4, 6)
    image = reopened(PIL.Image.fromarray(pixels), "PNG", exif=b"Exif\x00\x00this is no TIFF header")
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize(
    "size",
    [(16, 16), (16, 40), (40, 16), (15, 16), (20, 21), (31, 33), (33, 31), (50, 70), (64, 700), (300, 7), (1, 1)],
)
def test_skipping_what_is_cut_off_leaves_every_pixel_as_it_is(size, crop):
    image = PIL.Image.fromarray(noise(*size))
    for index in range(20):
        draws = torch.rand(4, generator=keyed_generator(0, "augment", 0, index)).tolist()
        result = ImageTransform(16, crop=crop).to_uint8(image, keyed_generator(0, "augment", 0, index))
        resized = resize_short_side(image, 16 + (int(draws[0] * 5) if crop == "random" else 0))
        left, top = (resized.width - 16) // 2, (resized.height - 16) // 2
        if crop == "random":
            left, top = int(draws[1] * (resized.width - 15)), int(draws[2] * (resized.height - 15))
        expected = np.asarray(resized)[top : top + 16, left : left + 16]
        np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_call_gives_the_floats_of_the_8_bit_pixels(mode):
    image = PIL.Image.fromarray(noise(50, 70)).convert(mode)
    transform = ImageTransform(32, crop="random", random_flip=True)
    pixels = transform.to_uint8(image, keyed_generator(0, "augment", 0, 1))
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(to_pixel_values(pixels), transform(image, keyed_generator(0, "augment", 0, 1)))
    out = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    transform.write(image, out[1], keyed_generator(0, "augment", 0, 1))
    assert torch.equal(out[1], pixels) and not out[0].any()


def test_pixel_values_are_x_over_127_5_minus_1_to_the_bit():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    values = to_pixel_values(images)
    assert values.dtype == torch.float32 and values.shape == images.shape
    assert torch.equal(values, images.to(torch.float32) / 127.5 - 1)
    assert values.min() == -1 and values.max() == 1
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), images)
    assert images.flatten().tolist() == list(range(256)), "the images themselves are left alone"


def test_pixel_values_of_another_type_are_rounded_once():
    images = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(to_pixel_values(images, dtype=dtype), to_pixel_values(images).to(dtype))


def test_pixel_values_go_to_the_device_that_is_named():
    assert to_pixel_values(torch.zeros(2, dtype=torch.uint8), "meta").device.type == "meta"


def test_pixel_values_are_not_made_of_floats():
    with pytest.raises(ValueError, match=r"`images` must be uint8.*torch\.float32"):
        to_pixel_values(torch.zeros(2))
