import pytest
import torch

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.models.vit import ViTDecoder
from maetok_hf.training.auxiliary import AuxiliaryDecoder, LinearDecoder


SIZES = {"feature_dim": 5, "latent_channels": 4, "num_latent_tokens": 3, "grid_size": (2, 4)}
WIDTH = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_published_form_by_default():
    decoder = AuxiliaryDecoder(**SIZES).decoder
    assert type(decoder) is ViTDecoder and len(decoder.transformer_blocks) == 3
    assert decoder.proj_in.out_features == 192 and decoder.transformer_blocks[0].attn.heads == 3
    assert decoder.class_token is not None and decoder.norm_modulation is not None


@pytest.mark.parametrize("position_embedding", ["rope", "absolute"])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_every_patch_gets_features_that_depend_on_every_latent_token(position_embedding, modulated, num_layers):
    decoder = AuxiliaryDecoder(
        **SIZES,
        **WIDTH | {"num_layers": num_layers},
        position_embedding=position_embedding,
        modulated=modulated,
        layer_scale_init_value=1.0,
    )
    latent = torch.randn(2, 3, 4, requires_grad=True)
    features = decoder(latent)
    assert features.shape == (2, 8, 5)
    for patch in range(8):
        (gradient,) = torch.autograd.grad(features[0, patch].sum(), latent, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all() and not gradient[1].any()


def test_the_decoder_follows_the_grid():
    decoder = AuxiliaryDecoder(**SIZES, **WIDTH)
    latent = torch.randn(1, 3, 4)
    assert decoder(latent, (3, 3)).shape == (1, 9, 5)
    assert torch.equal(decoder(latent, (2, 4)), decoder(latent))


def test_depth_0_is_one_affine_map_of_the_latents():
    decoder = AuxiliaryDecoder(**SIZES, num_layers=0)
    assert type(decoder.decoder) is LinearDecoder
    a, b = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    expected = 0.3 * decoder(a) + 0.7 * decoder(b)
    assert torch.allclose(decoder(0.3 * a + 0.7 * b), expected, atol=1e-6)
    linear = decoder.decoder
    by_hand = linear.token_mixing.weight @ a[0] @ linear.proj_out.weight.T + linear.proj_out.bias
    assert torch.allclose(decoder(a)[0], by_hand, atol=1e-6)


def test_depth_0_refuses_another_grid():
    decoder = AuxiliaryDecoder(**SIZES, num_layers=0)
    assert torch.equal(decoder(torch.ones(1, 3, 4), (2, 4)), decoder(torch.ones(1, 3, 4)))
    with pytest.raises(ValueError, match=r"tied to the \(2, 4\) patches"):
        decoder(torch.zeros(1, 3, 4), (4, 2))


@pytest.mark.parametrize("num_layers", [0, 2])
def test_image_tokens_are_read_at_their_patch_or_by_the_plain_decoder(num_layers):
    sizes = SIZES | {"num_latent_tokens": 0}
    decoder = AuxiliaryDecoder(**sizes, **WIDTH | {"num_layers": num_layers}, modulated=False)
    latent = torch.randn(1, 8, 4)
    assert decoder(latent).shape == (1, 8, 5)
    if num_layers == 0:
        assert torch.equal(decoder(latent.flip(1)), decoder(latent).flip(1))
        assert decoder(torch.randn(1, 9, 4), (3, 3)).shape == (1, 9, 5)


@pytest.mark.parametrize("num_latent_tokens", [3, 0])
def test_decoder_fits_its_tokenizer(num_latent_tokens):
    tokenizer = AutoencoderMAE(
        sample_size=8,
        patch_size=4,
        latent_channels=6,
        num_latent_tokens=num_latent_tokens,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        position_embedding="absolute",
        layer_scale_init_value=0.5,
    )
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 7, **WIDTH)
    latent = tokenizer.encode(torch.zeros(1, 3, 8, 8)).latent
    assert decoder(latent).shape == (1, 4, 7) and decoder.feature_dim == 7
    assert decoder.decoder.rope is None and decoder.decoder.pos_embed is not None
    assert (decoder.decoder.norm_modulation is not None) == (num_latent_tokens > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": -1}, "`num_layers`"),
        ({"feature_dim": 0}, "`feature_dim`"),
        ({"hidden_size": 0}, "`hidden_size`"),
        ({"hidden_size": 20, "num_attention_heads": 3}, "`hidden_size` .20."),
        ({"hidden_size": 18, "num_attention_heads": 3}, "a multiple of 4"),
        ({"num_latent_tokens": 0}, "modulated"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryDecoder(**SIZES | arguments)
