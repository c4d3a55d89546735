"""Any image autoencoder gives token sequences of raw latents, and its encoder is recognised whatever its decoder."""

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderRAE

from maetok_hf.training.latent_encoding import (
    ViewEncoder,
    check_same_encoder,
    encode_grid,
    encode_tokens,
    encoder_digest,
    load_tokenizer,
    resolve_commit,
    to_tokens,
)
from tests.testing_utils import seeded_normal, tiny_autoencoder


def tiny_kl():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=16,
    )


def tiny_dc():
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"block_out_channels": (8, 8), "layers_per_block": (1, 1)}.items()
    }
    attention = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **sides, **attention)


def tiny_rae():
    return AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        encoder_input_size=16,
        patch_size=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        latents_mean=torch.full((64, 1, 1), 0.5),
        latents_std=torch.full((64, 1, 1), 2.0),
    )


# what makes each, and tokens and channels for 16 x 16 pixels, and for a grid its sides
TOKENIZERS = {
    "mae": (lambda: tiny_autoencoder(sample_size=16), (6, 4), None),
    "mae_image_tokens": (lambda: tiny_autoencoder(sample_size=16, num_latent_tokens=0), (4, 4), None),
    "mae_gaussian": (lambda: tiny_autoencoder(sample_size=16, gaussian_posterior=True), (6, 4), None),
    "kl": (tiny_kl, (64, 3), (8, 8)),
    "dc": (tiny_dc, (64, 4), (8, 8)),
    "rae": (tiny_rae, (16, 64), (4, 4)),
}


@pytest.fixture(params=TOKENIZERS)
def case(request):
    make, shape, grid = TOKENIZERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), shape, grid


@pytest.fixture
def images():
    return seeded_normal(2, 3, 16, 16).clamp(-1, 1)


def test_latents_are_sequences_of_what_decode_takes(case, images):
    tokenizer, shape, grid = case
    tokens, latents = encode_tokens(tokenizer, images), encode_grid(tokenizer, images)
    assert tokens.shape == (2, *shape) and not tokens.requires_grad
    if grid is None:
        assert torch.equal(tokens, latents)
    else:
        assert latents.shape == (2, shape[1], *grid)
        for row, column in ((0, 0), (0, 1), (grid[0] - 1, 2)):
            assert torch.equal(tokens[:, row * grid[1] + column], latents[:, :, row, column])
    with torch.no_grad():
        decoded = tokenizer.decode(latents, return_dict=False)[0]
    assert decoded.shape == images.shape


def test_gaussian_latents_are_the_mode_without_scaling(images):
    tokenizer = tiny_kl().eval()
    with torch.no_grad():
        posterior = tokenizer.encode(images).latent_dist
    assert tokenizer.config.scaling_factor != 1
    assert torch.equal(encode_grid(tokenizer, images), posterior.mean)


def test_the_tokenizer_that_expects_images_from_0_to_1_gets_them(images):
    tokenizer = tiny_rae().eval()
    with torch.no_grad():
        expected = tokenizer.encode((images + 1) / 2).latent
    assert torch.equal(encode_grid(tokenizer, images), expected)


def test_latents_that_are_no_sequence_are_refused(images):
    class Video(torch.nn.Module):
        def encode(self, images, return_dict):
            return (torch.zeros(len(images), 4, 1, 8, 8),)

    with pytest.raises(ValueError, match=r"Video gives latents of shape \(2, 4, 1, 8, 8\)"):
        encode_tokens(Video(), images)


def test_a_saved_tokenizer_is_loaded_by_the_class_in_its_config(case, images, tmp_path):
    tokenizer, *_ = case
    tokenizer.save_pretrained(tmp_path / "vae")
    loaded = load_tokenizer(str(tmp_path), subfolder="vae")
    assert type(loaded) is type(tokenizer) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(encode_tokens(loaded, images), encode_tokens(tokenizer, images))
    assert encoder_digest(loaded) == encoder_digest(tokenizer)


def test_a_local_tokenizer_has_the_revision_that_is_given(tmp_path):
    assert resolve_commit(str(tmp_path)) is None
    assert resolve_commit(str(tmp_path), revision="v1") == "v1"  # which loading refuses


@torch.no_grad()
def test_the_digest_follows_the_encoder_and_not_the_decoder(case):
    tokenizer, *_ = case
    before = encoder_digest(tokenizer)
    for parameter in tokenizer.decoder.parameters():
        parameter.add_(1)
    tokenizer.register_to_config(latents_mean=7.0, latents_std=3.0)
    assert encoder_digest(tokenizer) == before
    next(iter(tokenizer.encoder.parameters())).add_(1)
    assert encoder_digest(tokenizer) != before


def test_the_digest_follows_settings_that_hold_no_weights():
    one, other = (tiny_autoencoder(rope_theta=theta) for theta in (10.0, 20.0))
    other.load_state_dict(one.state_dict())
    assert encoder_digest(one) != encoder_digest(other)


def test_latents_of_another_encoder_are_refused():
    tokenizer = tiny_autoencoder()
    known = {"class": "AutoencoderMAE", "name_or_path": "user/other", "digest": encoder_digest(tokenizer)}
    check_same_encoder(tokenizer, {"tokenizer": known})
    with pytest.raises(ValueError, match="another encoder .*'user/other'"):
        check_same_encoder(tiny_autoencoder(seed=1), {"tokenizer": known})


def test_views_are_the_image_and_its_mirror_image(images):
    tokenizer = tiny_autoencoder(sample_size=16)
    stored, error = ViewEncoder(tokenizer, 2, "float32")(images)
    assert stored.dtype == torch.float32 and error == 0
    assert torch.equal(stored[0], encode_tokens(tokenizer, images))
    assert torch.equal(stored[1], encode_tokens(tokenizer, images.flip(-1)))
    assert not torch.allclose(stored[0], stored[1])
    assert torch.equal(ViewEncoder(tokenizer, 1, "float32")(images)[0], stored[:1])


def test_float16_rounds_by_at_most_one_part_in_2048_and_says_by_how_much(images):
    tokenizer = tiny_autoencoder(sample_size=16)
    exact, _ = ViewEncoder(tokenizer, 2, "float32")(images)
    stored, error = ViewEncoder(tokenizer, 2, "float16")(images)
    assert stored.dtype == torch.float16
    difference = (stored.double() - exact.double()).abs()
    assert difference.max() > 0 and (difference <= exact.abs() / 2048 + 2**-25).all()
    assert error == pytest.approx(difference.square().sum().item())


class Constant(torch.nn.Module):
    """Gives the same value for every image."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def encode(self, images, return_dict):
        return (torch.full((len(images), 2, 3), self.value),)


def test_latents_that_do_not_fit_are_refused(images):
    assert ViewEncoder(Constant(1e5), 1, "float32")(images)[0].eq(1e5).all()
    with pytest.raises(ValueError, match=r"1e\+05, too much for `dtype` float16"):
        ViewEncoder(Constant(1e5), 1, "float16")(images)
    with pytest.raises(ValueError, match="not finite"):
        ViewEncoder(Constant(float("nan")), 1, "float16")(images)


def test_grids_become_sequences_row_by_row():
    grid = torch.arange(12).reshape(1, 2, 2, 3)
    assert to_tokens(grid).tolist() == [[[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]]
