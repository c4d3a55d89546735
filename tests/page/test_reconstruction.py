"""Uploads of every kind are read rightly or refused with a message, and what is told of them is true."""

import io
import math
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.page.reconstruction import (
    Upload,
    format_psnr,
    open_upload,
    reconstruct,
    seen_by_generator,
    token_effects,
    token_maps,
)
from tests.page.images import drawing
from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import seeded_normal


def written(folder, image, name="image.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height):
    """A valid head of a PNG file that would decode to any number of pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# Uploads


def test_a_plain_image_is_itself(tmp_path):
    upload = open_upload(written(tmp_path, drawing()))
    assert upload.notes == () and upload.image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(upload.image), np.asarray(drawing()))


@pytest.mark.parametrize(
    ("mode", "name", "note"),
    [
        ("RGBA", "a.png", "put on white"),
        ("L", "a.png", "gray"),
        ("1", "a.png", "gray"),
        ("I;16", "a.png", "16 bits"),
        ("P", "a.gif", "palette"),
        ("CMYK", "a.jpg", "CMYK"),
        ("RGB", "a.webp", None),
        ("RGB", "a.bmp", None),
        ("CMYK", "a.tiff", "CMYK"),
    ],
)
def test_images_of_every_mode_are_read(mode, name, note, tmp_path):
    if mode == "RGBA":
        image = drawing().convert("RGBA")
        image.putalpha(PIL.Image.new("L", image.size, 0))
    elif mode == "I;16":
        image = PIL.Image.fromarray(np.full((30, 40), 65535, dtype=np.uint16))
    else:
        image = drawing().convert(mode)
    upload = open_upload(written(tmp_path, image, name))
    assert upload.image.mode == "RGB" and upload.image.size == (40, 30)
    assert any(note in text for text in upload.notes) if note else upload.notes == ()
    if mode in ("RGBA", "I;16"):
        assert (np.asarray(upload.image) == 255).all()


def test_a_photograph_is_turned_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upload = open_upload(written(tmp_path, drawing(), "a.jpg", exif=exif, quality=95))
    assert upload.image.size == (30, 40)
    assert upload.notes == ("It was turned upright, as its EXIF data say.",)
    difference = np.asarray(upload.image).astype(int) - np.asarray(drawing().rotate(-90, expand=True)).astype(int)
    assert np.abs(difference).mean() < 4


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [PIL.Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    path = written(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    upload = open_upload(path)
    assert "the first of 3 was taken" in upload.notes[0]
    assert upload.image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "This file is empty"),
        (b"not an image at all", "no image that can be read: choose a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "no image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
        (png_of(20_000, 20_000), "more than the 67 million pixels allowed"),
        (png_of(9_000, 9_000), "9000 × 9000 pixels, more than the 67 million allowed"),
        (png_of(100, 100), "damaged"),
        (png_of(0, 10), "(damaged|no image that can be read)"),
    ],
    ids=["empty", "text", "postscript", "svg", "bomb", "too large", "truncated", "no pixels"],
)
def test_what_is_no_image_is_refused(content, message, tmp_path, recwarn):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_upload(path)
    assert str(tmp_path) not in str(error.value)
    assert not recwarn.list


def test_half_a_file_is_refused(tmp_path):
    buffer = io.BytesIO()
    drawing(300, 300).save(buffer, "JPEG")
    path = tmp_path / "half.jpg"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match="damaged"):
        open_upload(path)


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path, monkeypatch):
    path = written(tmp_path, drawing())
    monkeypatch.setattr("maetok_hf.page.reconstruction.MAX_FILE_SIZE", 2**4)
    with pytest.raises(ValueError, match="more than the 0 MB allowed"):
        open_upload(path)


# Reconstructions


def test_a_reconstruction_is_what_the_tokenizer_gives():
    pipe = tiny_pipeline()
    result = reconstruct(pipe, Upload(image=drawing(64, 48), notes=("It is gray.",)))
    original = torch.from_numpy(np.asarray(result.original)).permute(2, 0, 1)
    pixels = original[None] / 127.5 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent
        decoded = pipe.vae.decode(latent).sample
    torch.testing.assert_close(result.latent, latent[0])
    levels = (127.5 * decoded[0] + 127.5).round().clamp(0, 255)
    found = torch.from_numpy(np.asarray(result.reconstruction)).permute(2, 0, 1)
    assert (found - levels).abs().max() <= 1
    error = (found.double() - original.double()) / 255
    assert result.psnr == pytest.approx(-10 * math.log10(error.square().mean()), abs=1e-6)
    assert result.largest_difference == round((255 * error).abs().mean(dim=0).max().item())
    assert result.original.size == result.reconstruction.size == result.difference.size == (32, 32)
    assert result.notes == ("It is gray.",)


def test_small_and_long_images_are_named():
    notes = reconstruct(tiny_pipeline(), Upload(image=drawing(400, 10))).notes
    assert any("enlarged" in note for note in notes) and any("very long" in note for note in notes)


@pytest.mark.parametrize("form", [{"gaussian_posterior": True}, {"num_latent_tokens": 0}], ids=str)
def test_other_tokenizers_are_shown_too(form):
    tokens = 16 if form.get("num_latent_tokens") == 0 else 6
    pipe = tiny_pipeline(vae=form, transformer={"sample_size": tokens})
    result = reconstruct(pipe, Upload(image=drawing()))
    assert result.latent.shape == (tokens, 4)
    torch.testing.assert_close(reconstruct(pipe, Upload(image=drawing())).latent, result.latent)
    assert np.concatenate(list(token_effects(pipe, result.latent))).shape == (tokens, 32, 32)


def test_psnr_in_words():
    assert format_psnr(23.456) == "23.46 dB PSNR"
    assert format_psnr(math.inf) == "no difference at all"


# Tokens


def test_tokens_as_the_generator_sees_them():
    pipe = tiny_pipeline(vae={"latents_mean": 1.0, "latents_std": 2.0})
    raw = seeded_normal(6, 4)
    torch.testing.assert_close(seen_by_generator(pipe, raw), (raw - 1) / 2)


def test_the_effect_of_a_token_is_what_changes_without_it():
    pipe = tiny_pipeline(vae={"num_latent_tokens": 20}, transformer={"sample_size": 20})
    raw = seeded_normal(20, 4)
    raw[17] = 0.1  # the mean: nothing changes without it
    effects = np.concatenate(list(token_effects(pipe, raw)))  # in two parts
    assert effects.shape == (20, 32, 32) and effects[17].max() == 0
    without = raw.clone()
    without[3] = 0.1
    with torch.no_grad():
        pair = pipe.vae.decode(torch.stack([raw, without])).sample
    levels = (127.5 * pair.clamp(-1, 1)).round()
    expected = (levels[0] - levels[1]).abs().mean(dim=0)
    assert np.abs(effects[3] - expected.numpy()).max() <= 1 and effects[3].max() > 2
    maps = token_maps(effects)
    assert [caption.split(":")[0] for _, caption in maps] == [f"token {i}" for i in range(20)]
    assert not np.asarray(maps[17][0]).max(axis=(0, 1)).tolist()[0]
