"""The tokenizer: parity with the authors' code, masking, sizes, forms, posterior, errors."""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Independent, Normal, kl_divergence

from maetok_hf import AutoencoderMAE, convert_autoencoder
from maetok_hf.models.autoencoder_mae import TokenGaussianDistribution
from maetok_hf.models.layers import DropPath
from tests.testing_utils import AUTOENCODER_FORMS, GOLDEN, seeded_normal, tiny_autoencoder


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]
PATCHES = 16  # of a 32 x 32 image with patches of 8


@pytest.fixture(params=AUTOENCODER_FORMS.values(), ids=AUTOENCODER_FORMS.keys())
def form(request):
    return request.param


def image(batch_size=2, height=32, width=32, seed=0):
    return seeded_normal(batch_size, 3, height, width, seed=seed).clamp(-1, 1)


def encode(model, sample, mask=None):
    with torch.no_grad():
        output = model.encode(sample, mask)
    return output.latent_dist.mode() if model.config.gaussian_posterior else output.latent


def decode(model, latent, **size):
    with torch.no_grad():
        return model.decode(latent, **size).sample


# Parity


@pytest.mark.parametrize("name", TOKENIZERS)
def test_outputs_match_golden(name):
    model, golden = convert_autoencoder(GOLDEN / name), load_file(GOLDEN / name / "io.safetensors")
    latent = encode(model, golden["image"])
    errors = {
        "latent": latent - golden["latent"],
        "latent_masked": encode(model, golden["image"], golden["mask"]) - golden["latent_masked"],
        "decode": decode(model, golden["latent"]) - golden["reconstruction"],
        "forward": model(golden["image"]).sample.detach() - golden["reconstruction"],
    }
    assert {key: error.abs().max().item() for key, error in errors.items() if error.abs().max() >= 1e-5} == {}
    assert (golden["latent"] - golden["latent_masked"]).abs().max() > 0.01


# Masking


def patches_of(mask, height=32, width=32, side=8):
    """(B, N) bool to (B, 1, H, W) bool."""
    grid = mask.unflatten(1, (height // side, width // side)).unsqueeze(1)
    return grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def test_masked_patches_do_not_reach_the_latent(form):
    model, sample = tiny_autoencoder(**form), image()
    mask = torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.5
    disturbed = torch.where(patches_of(mask), image(seed=1), sample)
    assert torch.equal(encode(model, sample, mask), encode(model, disturbed, mask))
    # and every visible patch does
    for patch in range(PATCHES):
        only = torch.zeros(2, PATCHES, dtype=torch.bool)
        only[:, patch] = True
        disturbed = torch.where(patches_of(only), image(seed=1), sample)
        changed = (encode(model, sample, mask) != encode(model, disturbed, mask)).flatten(1).any(1)
        assert torch.equal(changed, ~mask[:, patch])


def test_no_mask_equals_all_false_mask(form):
    model, sample = tiny_autoencoder(**form), image()
    none = torch.zeros(2, PATCHES, dtype=torch.bool)
    assert torch.equal(encode(model, sample), encode(model, sample, none))
    assert not torch.equal(encode(model, sample), encode(model, sample, ~none))


def test_masked_patches_keep_their_positions():
    """The mask token enters before the positions: where a patch is masked still matters."""
    model, sample = tiny_autoencoder(), torch.zeros(1, 3, 32, 32)
    masks = torch.eye(PATCHES, dtype=torch.bool)
    latents = torch.cat([encode(model, sample, mask[None]) for mask in masks])
    assert len({tuple(latent.flatten().tolist()) for latent in latents}) == PATCHES


def test_mask_counts_may_differ_within_a_batch():
    model, sample = tiny_autoencoder(), image()
    mask = torch.zeros(2, PATCHES, dtype=torch.bool)
    mask[0, :3], mask[1, 5:] = True, True
    both = encode(model, sample, mask)
    for i in range(2):
        torch.testing.assert_close(encode(model, sample[i : i + 1], mask[i : i + 1])[0], both[i], atol=1e-5, rtol=1e-5)


def test_training_mode_masks_nothing_by_itself():
    model, sample = tiny_autoencoder(), image()
    assert torch.equal(encode(model.train(), sample), encode(model.eval(), sample))


def test_the_mask_token_learns_from_masked_patches_only():
    model, mask = tiny_autoencoder(), torch.zeros(2, PATCHES, dtype=torch.bool)
    model.encode(image(), mask).latent.sum().backward()
    assert model.encoder.mask_token.grad.abs().max() == 0
    mask[0, 0] = True
    model.encode(image(), mask).latent.square().sum().backward()
    assert model.encoder.mask_token.grad.abs().max() > 0


# Sizes


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (64, 32), (8, 8), (72, 40)])
def test_other_sizes_encode_and_decode(form, height, width):
    model, sample = tiny_autoencoder(**form), image(height=height, width=width)
    tokens = form.get("num_latent_tokens", 6) or height * width // 64
    latent = encode(model, sample)
    assert latent.shape == (2, tokens, 4)
    decoded = decode(model, latent, height=height, width=width)
    assert decoded.shape == (2, model.config.out_channels, height, width)
    assert torch.equal(decoded, model(sample).sample.detach())
    mask = torch.zeros(2, height * width // 64, dtype=torch.bool)
    mask[:, -1] = True
    assert not torch.equal(encode(model, sample, mask), latent)


def test_a_model_built_for_another_size_gives_what_it_gave_there(form, tmp_path):
    model, sample = tiny_autoencoder(**form), image(height=48, width=48)
    latent = encode(model, sample)
    before = decode(model, latent, height=48, width=48)
    model.set_sample_size(48)
    model.save_pretrained(tmp_path)
    for changed in (model, AutoencoderMAE.from_pretrained(tmp_path).eval()):
        assert changed.config.sample_size == 48 and changed.latent_sequence_length == latent.shape[1]
        assert torch.equal(encode(changed, sample), latent)
        assert torch.equal(decode(changed, latent), before)
    with pytest.raises(ValueError, match=r"`sample_size` must be a positive multiple of `patch_size` \(8\), got 36"):
        model.set_sample_size(36)


def test_decode_defaults_to_the_built_size_in_each_dimension():
    model, latent = tiny_autoencoder(), seeded_normal(1, 6, 4)
    assert decode(model, latent).shape[-2:] == (32, 32)
    assert decode(model, latent, height=16).shape[-2:] == (16, 32)
    assert decode(model, latent, width=16).shape[-2:] == (32, 16)


def test_rows_and_columns_are_told_apart():
    """Transposing the image is no symmetry: x and y have their own frequencies, and tokens run row by row."""
    model, latent = tiny_autoencoder(), seeded_normal(1, 6, 4)
    wide_decoded, tall_decoded = decode(model, latent, height=16, width=48), decode(model, latent, height=48, width=16)
    assert not torch.allclose(wide_decoded, tall_decoded.mT, atol=1e-3)
    wide, tall = image(1, 16, 48), image(1, 16, 48).mT.contiguous()
    assert not torch.allclose(encode(model, wide), encode(model, tall), atol=1e-3)


def test_pixels_of_a_patch_come_from_its_own_token():
    """The inverse of patching, per (row, column, channel): a decoder that copies its bias paints every patch alike."""
    model = tiny_autoencoder()
    with torch.no_grad():
        model.decoder.proj_out.weight.zero_()
        model.decoder.proj_out.bias.copy_(torch.arange(8 * 8 * 3))
    decoded = decode(model, seeded_normal(1, 6, 4), height=16, width=24)
    expected = torch.arange(8 * 8 * 3, dtype=torch.float32).reshape(8, 8, 3).permute(2, 0, 1)
    for row in range(2):
        for column in range(3):
            patch = decoded[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert torch.equal(patch, expected)


def test_a_token_decodes_into_its_patch():
    """With image tokens as latents and all mixing switched off, latent (i, j) paints patch (i, j) and no other."""
    model = tiny_autoencoder(num_latent_tokens=0)
    with torch.no_grad():
        for block in model.decoder.transformer_blocks:
            block.scale1.gamma.zero_()
            block.scale2.gamma.zero_()
    latent = seeded_normal(1, 6, 4)
    before = decode(model, latent, height=16, width=24)
    for token in range(6):
        changed = latent.clone()
        changed[:, token] += 1
        difference = (decode(model, changed, height=16, width=24) != before).any(1)[0]
        row, column = divmod(token, 3)
        expected = torch.zeros(16, 24, dtype=torch.bool)
        expected[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
        assert torch.equal(difference & expected, difference) and difference.any()


# Forms


def test_image_tokens_are_one_latent_per_patch():
    model = tiny_autoencoder(num_latent_tokens=0)
    assert encode(model, image()).shape == (2, PATCHES, 4)
    assert model.latent_sequence_length == PATCHES and tiny_autoencoder().latent_sequence_length == 6
    absent = ("latent_tokens", "latent_pos_embed", "decoder.mask_token")
    assert not any(name in key for key in model.state_dict() for name in absent)


def test_positions_exist_where_the_form_has_them():
    keys = {name: set(tiny_autoencoder(**form).state_dict()) for name, form in AUTOENCODER_FORMS.items()}
    for name, form_keys in keys.items():
        absolute = name.startswith("absolute")
        assert "encoder.pos_embed" in form_keys
        assert ("decoder.pos_embed" in form_keys) == absolute
        for stack in ("encoder", "decoder"):
            assert (f"{stack}.rope.freqs" in form_keys) != absolute
    assert "encoder.class_token" not in keys["asymmetric"]
    assert "decoder.class_token" not in keys["rope_modulated"]
    # the modulated form has norms without weights and no LayerScale
    assert not any(("norm1" in k or "gamma" in k) and k.startswith("decoder") for k in keys["rope_modulated"])


def test_unused_modulation_gets_a_zero_gradient_and_not_none():
    model = tiny_autoencoder(modulated_decoder=True)
    (model(image()).sample * seeded_normal(2, 3, 32, 32, seed=1)).sum().backward()
    linear = model.decoder.norm_modulation.linear
    assert linear.weight.grad is not None and linear.weight.grad.abs().max() == 0
    assert linear.bias.grad is not None and linear.bias.grad.abs().max() == 0
    first, last = model.decoder.transformer_blocks[0], model.decoder.transformer_blocks[-1]
    shift1, scale1, shift2, scale2 = last.modulation.linear.weight.grad.chunk(4)
    assert shift2.abs().max() == scale2.abs().max() == 0
    assert min(part.abs().max() for part in (shift1, scale1, *first.modulation.linear.weight.grad.chunk(4))) > 0


def test_fresh_modulated_decoder_sees_the_latents():
    """A modulation that starts at scale 0 would hide the latents from the image tokens."""
    torch.manual_seed(0)
    model = AutoencoderMAE(**{**tiny_autoencoder(modulated_decoder=True).config})
    latent = seeded_normal(1, 6, 4).requires_grad_()
    model.decode(latent).sample.square().sum().backward()
    assert latent.grad.abs().max() > 0


def test_decoder_sizes_default_to_the_encoders():
    default = AutoencoderMAE(sample_size=32, hidden_size=32, num_layers=1, num_attention_heads=2, mlp_ratio=2.0)
    assert default.decoder.proj_in.out_features == 32 and len(default.decoder.transformer_blocks) == 1
    assert default.decoder.transformer_blocks[0].ff.net[0].proj.out_features == 64
    apart = tiny_autoencoder(**AUTOENCODER_FORMS["asymmetric"])
    assert apart.decoder.proj_in.out_features == 48 and len(apart.decoder.transformer_blocks) == 3
    assert apart.decoder.transformer_blocks[0].attn.heads == 3
    assert apart.decoder.transformer_blocks[0].ff.net[0].proj.out_features == 96


@pytest.mark.parametrize("modulated", [False, True])
def test_published_size_has_the_published_number_of_parameters(modulated):
    with torch.device("meta"):
        model = AutoencoderMAE(modulated_decoder=modulated)
    count = sum(p.numel() for p in model.parameters())
    assert 170e6 < count < 178e6
    assert len(model.encoder.transformer_blocks) == len(model.decoder.transformer_blocks) == 12
    assert model.encoder.rope.freqs.shape == (2, 12, 12 * 32)


def test_stochastic_depth_acts_in_training_only():
    model, latent = tiny_autoencoder(decoder_drop_path_rate=0.5), seeded_normal(4, 6, 4)
    assert torch.equal(decode(model, latent), decode(tiny_autoencoder(), latent))
    model.train()
    torch.manual_seed(0)
    first = decode(model, latent)
    torch.manual_seed(0)
    assert torch.equal(decode(model, latent), first)
    assert not torch.equal(decode(model, latent), first)
    assert not any(isinstance(module, DropPath) for module in model.encoder.modules())


# Gaussian posterior


def test_posterior_matches_torch_distributions():
    parameters = seeded_normal(3, 6, 8)
    posterior = TokenGaussianDistribution(parameters)
    mean, logvar = parameters.chunk(2, dim=-1)
    reference = Independent(Normal(mean, (0.5 * logvar).exp()), 2)
    torch.testing.assert_close(posterior.mode(), mean)
    torch.testing.assert_close(posterior.std, (0.5 * logvar).exp())
    standard = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 2)
    torch.testing.assert_close(posterior.kl(), kl_divergence(reference, standard))
    other = TokenGaussianDistribution(seeded_normal(3, 6, 8, seed=1))
    other_reference = Independent(Normal(other.mean, other.std), 2)
    torch.testing.assert_close(posterior.kl(other), kl_divergence(reference, other_reference))
    value = seeded_normal(3, 6, 4, seed=2)
    torch.testing.assert_close(posterior.nll(value), -reference.log_prob(value))


def test_posterior_samples_have_its_moments_and_follow_the_generator():
    posterior = TokenGaussianDistribution(seeded_normal(1, 3, 4).repeat(4000, 1, 1))
    draws = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(draws, posterior.sample(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(draws.mean(0), posterior.mean[0], atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std[0], atol=0.0, rtol=0.1)


def test_deterministic_posterior_is_its_mean():
    posterior = TokenGaussianDistribution(seeded_normal(2, 6, 8), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert torch.equal(posterior.kl(), torch.zeros(2)) and torch.equal(posterior.nll(posterior.mean), torch.zeros(2))


def test_gaussian_tokenizer_returns_a_posterior():
    model, sample = tiny_autoencoder(gaussian_posterior=True), image()
    with torch.no_grad():
        posterior = model.encode(sample).latent_dist
        assert posterior.mean.shape == posterior.std.shape == (2, 6, 4)
        assert model.encode(sample, return_dict=False)[0].mean.shape == (2, 6, 4)
        assert torch.equal(model(sample).sample, model.decode(posterior.mode()).sample)
        draws = [
            model(sample, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample
            for seed in (0, 0, 1)
        ]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        expected = model.decode(posterior.sample(torch.Generator().manual_seed(0))).sample
        assert torch.equal(draws[0], expected)


# AutoencoderMixin


def test_slicing_changes_nothing(form):
    model, sample = tiny_autoencoder(**form), image(3)
    mask = torch.rand(3, PATCHES, generator=torch.Generator().manual_seed(0)) < 0.5
    outputs = []
    calls = []
    model.encoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    model.decoder.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for slicing in (False, True, False):
        model.enable_slicing() if slicing else model.disable_slicing()
        assert model.use_slicing == slicing
        latent = encode(model, sample, mask)
        outputs.append((latent, decode(model, latent)))
    assert calls == [3, 3, *[1] * 6, 3, 3]
    for latent, decoded in outputs[1:]:
        torch.testing.assert_close(latent, outputs[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoded, outputs[0][1], atol=1e-5, rtol=1e-5)


def test_tiling_is_refused():
    with pytest.raises(NotImplementedError, match="Tiling"):
        tiny_autoencoder().enable_tiling()


def test_encode_and_decode_move_an_offloaded_model_in():
    """diffusers' offloading calls `_hf_hook.pre_forward` from the entry points that are no `forward`."""
    model, calls = tiny_autoencoder(), []

    class Hook:
        def pre_forward(self, module):
            calls.append(module)

    model._hf_hook = Hook()
    encode(model, image())
    decode(model, seeded_normal(1, 6, 4))
    assert calls == [model, model]


# Errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 0}, "`sample_size` must be positive, got 0"),
        ({"patch_size": -8}, "`patch_size` must be positive, got -8"),
        ({"in_channels": 0}, "`in_channels`"),
        ({"out_channels": 0}, "`out_channels`"),
        ({"latent_channels": 0}, "`latent_channels`"),
        ({"hidden_size": 0}, "`hidden_size`"),
        ({"num_layers": 0}, "`num_layers`"),
        ({"num_attention_heads": 0}, "`num_attention_heads`"),
        ({"mlp_ratio": 0}, "`mlp_ratio`"),
        ({"decoder_hidden_size": 0}, "`decoder_hidden_size`"),
        ({"decoder_num_layers": 0}, "`decoder_num_layers`"),
        ({"decoder_num_attention_heads": 0}, "`decoder_num_attention_heads`"),
        ({"decoder_mlp_ratio": -1.0}, "`decoder_mlp_ratio`"),
        ({"rope_theta": 0.0}, "`rope_theta`"),
        ({"rope_theta": float("nan")}, "`rope_theta`"),
        ({"sample_size": 36}, r"`sample_size` \(36\) must be a multiple of `patch_size` \(8\)"),
        ({"num_latent_tokens": -1}, "`num_latent_tokens`.*got -1"),
        ({"position_embedding": "sincos"}, "`position_embedding`.*rope.*absolute.*'sincos'"),
        (
            {"modulated_decoder": True, "num_latent_tokens": 0},
            "`modulated_decoder=True` needs `num_latent_tokens` > 0",
        ),
        ({"decoder_drop_path_rate": 1.0}, r"`decoder_drop_path_rate` must lie in \[0, 1\), got 1.0"),
        ({"num_attention_heads": 3}, r"`hidden_size` \(32\).*`num_attention_heads` \(3\)"),
        ({"num_attention_heads": 16}, "heads of 2 channels"),
        ({"decoder_num_attention_heads": 5}, r"`decoder_hidden_size` \(32\).*\(5\)"),
        ({"latents_mean": [0.0, 0.0]}, r"`latents_mean`.*channel \(4\), got 2 values"),
        ({"latents_mean": float("inf")}, "`latents_mean`.*finite"),
        ({"latents_std": 0.0}, "`latents_std`.*positive"),
        ({"latents_std": [1.0, 1.0, -1.0, 1.0]}, "`latents_std`.*positive"),
        ({"latents_mean": torch.zeros(4)}, "`latents_mean` must be a float or a list of floats"),
        ({"latents_std": "1"}, "`latents_std` must be a float or a list of floats"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder(**config)


def test_absolute_positions_allow_any_head_size():
    assert tiny_autoencoder(position_embedding="absolute", num_attention_heads=16)(image()).sample.shape[-1] == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(3, 32, 32)), r"`sample` must have shape \(batch, 3, height, width\)"),
        (lambda m: m.encode(torch.zeros(1, 1, 32, 32)), r"got \(1, 1, 32, 32\)"),
        (lambda m: m.encode(torch.zeros(1, 3, 30, 32)), r"height must be.*`patch_size` \(8\), got 30"),
        (lambda m: m(torch.zeros(1, 3, 32, 36)), "width must be.*got 36"),
        (lambda m: m.encode(torch.zeros(1, 3, 0, 32)), "height must be.*got 0"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 16)), "`mask` must be a bool tensor.*float32"),
        (lambda m: m.encode(torch.zeros(1, 3, 32, 32), torch.zeros(1, 15).bool()), r"\(1, 16\).*\(1, 15\)"),
        (lambda m: m.encode(torch.zeros(2, 3, 32, 32), torch.zeros(1, 16).bool()), r"\(2, 16\).*\(1, 16\)"),
        (lambda m: m.decode(torch.zeros(1, 6, 5)), r"`latent` must have shape \(batch, 6, 4\), got \(1, 6, 5\)"),
        (lambda m: m.decode(torch.zeros(1, 7, 4)), r"got \(1, 7, 4\)"),
        (lambda m: m.decode(torch.zeros(6, 4)), r"got \(6, 4\)"),
        (lambda m: m.decode(torch.zeros(1, 6, 4), height=30), "height must be.*got 30"),
        (lambda m: m.decode(torch.zeros(1, 6, 4), width=-8), "width must be.*got -8"),
        (lambda m: m(torch.zeros(1, 3, 32, 32), sample_posterior=True), "gaussian_posterior=True"),
    ],
    ids=range(14),
)
def test_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_autoencoder())


def test_image_token_latents_must_fit_the_size():
    with pytest.raises(ValueError, match=r"\(batch, 12, 4\), got \(1, 16, 4\)"):
        tiny_autoencoder(num_latent_tokens=0).decode(torch.zeros(1, 16, 4), height=24)
