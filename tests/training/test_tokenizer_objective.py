import pytest
import torch
from torch import nn

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.training.auxiliary import AuxiliaryDecoder
from maetok_hf.training.draws import sample_noise
from maetok_hf.training.gradient_checkpointing import enable_gradient_checkpointing
from maetok_hf.training.masking import sample_masks
from maetok_hf.training.optim import weight_decay_groups
from maetok_hf.training.targets import HOGTarget
from maetok_hf.training.text_target import TextDecoder
from maetok_hf.training.tokenizer_objective import TokenizerObjective, masked_mean


class CountingTarget(nn.Module):
    """A target with a parameter and a train mode, as a teacher has."""

    feature_dim = 2
    feature_loss = "cosine"

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(48, 2)
        self.inputs = []

    def forward(self, pixel_values):
        self.inputs.append((pixel_values, self.training, torch.is_grad_enabled()))
        patches = nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
        return self.features(patches)


def tiny_tokenizer(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"sample_size": 16, "patch_size": 4, "latent_channels": 4, "num_latent_tokens": 3}
    widths = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "layer_scale_init_value": 0.5}
    tokenizer = AutoencoderMAE(**sizes | widths | kwargs)
    with torch.no_grad():
        for (
            parameter
        ) in tokenizer.parameters():  # fresh weights of 0.02 would hide the image, and the mask, from the loss
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return tokenizer


def objective_with_hog(weights=None, **kwargs):
    tokenizer, target = tiny_tokenizer(**kwargs), HOGTarget(4)
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, target.feature_dim, 16, 1, 2)
    return TokenizerObjective(tokenizer, {"hog": target}, {"hog": decoder}, weights)


def terms_of(objective, *inputs, **kwargs):
    return objective(*inputs, **kwargs)[0]


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def mask():
    return sample_masks(0, 0, [0, 1], 16, 0.5)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_encoder_runs_once_and_each_decoder_once(images, mask):
    objective = objective_with_hog()
    tokenizer = objective.tokenizer
    calls = [count_calls(m) for m in (tokenizer.encoder, tokenizer.decoder, objective.auxiliary_decoders["hog"])]
    terms_of(objective, images, mask)["loss"].backward()
    assert [len(c) for c in calls] == [1, 1, 1]


def test_loss_is_the_weighted_sum_of_its_terms(images, mask):
    objective = objective_with_hog({"hog": 0.25, "reconstruction": 2.0})
    output = terms_of(objective, images, mask)
    assert set(output) == {"loss", "reconstruction", "hog"}
    assert torch.allclose(output["loss"], 2.0 * output["reconstruction"] + 0.25 * output["hog"])
    assert output["loss"].requires_grad and not output["reconstruction"].requires_grad
    assert all(value.shape == () and value.dtype == torch.float32 for value in output.values())


def test_terms_are_what_they_say(images, mask):
    objective = objective_with_hog().eval()
    output = terms_of(objective, images, mask)
    tokenizer = objective.tokenizer
    latent = tokenizer.encode(images, mask).latent
    pixels = (tokenizer.decode(latent).sample - images).square().mean()
    errors = (objective.auxiliary_decoders["hog"](latent) - HOGTarget(4)(images)).square().mean(-1)
    assert torch.allclose(output["reconstruction"], pixels) and torch.allclose(output["hog"], errors[mask].mean())


def test_the_encoder_sees_the_masked_image(images, mask):
    objective = objective_with_hog().eval()
    latents = []
    objective.tokenizer.encoder.register_forward_hook(lambda m, i, output: latents.append(output))
    terms_of(objective, images, mask)
    hidden = torch.where(mask.reshape(2, 1, 4, 1, 4, 1), 0.0, images.reshape(2, 3, 4, 4, 4, 4)).reshape(images.shape)
    terms_of(objective, hidden, mask)
    terms_of(objective, images)
    assert torch.equal(latents[0], latents[1])  # what is masked does not matter
    assert (latents[0] - latents[2]).abs().max() > 1e-2


def test_pixels_count_everywhere_and_features_at_masked_patches_only(images, mask):
    objective = objective_with_hog()
    decoder, shift = objective.auxiliary_decoders["hog"], torch.zeros(2, 16, 108)
    decoder.register_forward_hook(lambda module, inputs, output: output + shift)
    before = terms_of(objective, images, mask)
    shift[~mask] = 100.0
    unmasked = terms_of(objective, images, mask)
    assert torch.equal(unmasked["hog"], before["hog"]) and torch.equal(unmasked["loss"], before["loss"])
    shift[~mask] = 0.0
    shift[0, mask[0].nonzero()[0]] = 100.0
    assert terms_of(objective, images, mask)["hog"] > before["hog"] + 1

    pixel_shift = torch.zeros(2, 16, 48)
    objective.tokenizer.decoder.register_forward_hook(lambda module, inputs, output: output + pixel_shift)
    shift.zero_()
    pixel_shift[~mask] = 100.0
    assert terms_of(objective, images, mask)["reconstruction"] > before["reconstruction"] + 1


def test_features_at_unmasked_patches_get_no_gradient(images, mask):
    objective = objective_with_hog({"reconstruction": 0.0})
    captured = []

    def keep(module, inputs, output):
        output.retain_grad()
        captured.append(output)

    objective.auxiliary_decoders["hog"].register_forward_hook(keep)
    terms_of(objective, images, mask)["loss"].backward()
    gradient = captured[0].grad
    assert not gradient[~mask].any() and gradient[mask].abs().sum(-1).all()


def test_masked_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert masked_mean(values, mask).item() == 8.0  # over the batch's positions, not per image
    assert masked_mean(values, None).item() == 11.0
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0
    values[0, 1] = float("inf")
    assert masked_mean(values, mask).item() == 8.0


def test_without_a_mask_every_position_counts_and_nothing_is_replaced(images):
    objective = objective_with_hog().eval()
    output = terms_of(objective, images)
    latent = objective.tokenizer.encode(images).latent
    errors = (objective.auxiliary_decoders["hog"](latent) - HOGTarget(4)(images)).square()
    assert torch.allclose(output["hog"], errors.mean())
    empty = terms_of(objective, images, torch.zeros(2, 16, dtype=torch.bool))
    assert torch.equal(empty["reconstruction"], output["reconstruction"]) and empty["hog"].item() == 0.0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("modulated", [True, False])
def test_every_parameter_is_in_the_graph(images, mask, masked, modulated):
    objective = objective_with_hog(modulated_decoder=modulated)
    terms_of(objective, images, mask if masked else None)["loss"].backward()
    assert [name for name, parameter in objective.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("term", ["reconstruction", "hog"])
def test_each_term_trains_the_encoder(images, mask, term):
    objective = objective_with_hog({"reconstruction": 0.0, "hog": 0.0} | {term: 1.0})
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.05)
    before = terms_of(objective, images, mask)
    before["loss"].backward()
    assert objective.tokenizer.encoder.latent_tokens.grad.abs().sum() > 0
    optimizer.step()
    assert terms_of(objective, images, mask)[term] < before[term]


def test_targets_see_the_clean_image_frozen_in_eval_mode_without_gradient(images, mask):
    tokenizer, target = tiny_tokenizer(), CountingTarget()
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 2, 16, 1, 2)
    objective = TokenizerObjective(tokenizer, {"teacher": target}, {"teacher": decoder}).train()
    output = terms_of(objective, images, mask)
    output["loss"].backward()
    ((seen, training, grad_enabled),) = target.inputs
    assert torch.equal(seen, images) and not training and not grad_enabled
    assert target.features.weight.grad is None and decoder.decoder.proj_out.weight.grad is not None
    assert target.features.weight not in set(objective.trainable_parameters())
    assert -1.0 <= output["teacher"] <= 1.0


def test_images_of_another_size_train_with_the_same_objective():
    objective = objective_with_hog()
    images = torch.rand(1, 3, 24, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = sample_masks(0, 0, [0], 18, 0.5)
    assert torch.isfinite(terms_of(objective, images, mask)["loss"])


def test_image_tokens_as_latents_train(images, mask):
    objective = objective_with_hog(num_latent_tokens=0)
    terms_of(objective, images, mask)["loss"].backward()
    assert objective.tokenizer.encoder.proj_out.weight.grad.abs().sum() > 0


def test_objective_draws_nothing(images, mask):
    objective = objective_with_hog().train()
    state = torch.random.get_rng_state()
    assert torch.equal(terms_of(objective, images, mask)["loss"], terms_of(objective, images, mask)["loss"])
    assert torch.equal(state, torch.random.get_rng_state())


def test_auxiliary_decoders_are_not_saved(images, mask, tmp_path):
    objective = objective_with_hog()
    objective.tokenizer.save_pretrained(tmp_path)
    loaded = AutoencoderMAE.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_tokenizer().state_dict().keys()


# --- Gaussian posterior -------------------------------------------------------------------------------------------


def test_kl_by_hand_and_posterior_noise(images, mask):
    objective = TokenizerObjective(tiny_tokenizer(gaussian_posterior=True), loss_weights={"kl": 0.5}).eval()
    noise = sample_noise(0, "posterior", 0, [0, 1], (3, 4))
    output = terms_of(objective, images, mask, noise)
    posterior = objective.tokenizer.encode(images, mask).latent_dist
    kl = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum(dim=(1, 2)).mean()
    pixels = objective.tokenizer.decode(posterior.mean + posterior.std * noise).sample
    assert torch.allclose(output["kl"], kl)
    assert torch.allclose(output["reconstruction"], (pixels - images).square().mean())
    assert torch.allclose(output["loss"], output["reconstruction"] + 0.5 * kl)


def test_kl_weighs_1e_6_by_default(images):
    objective = TokenizerObjective(tiny_tokenizer(gaussian_posterior=True))
    output = terms_of(objective, images, posterior_noise=torch.zeros(2, 3, 4))
    assert objective.loss_weights == {"reconstruction": 1.0, "kl": 1e-6}
    assert torch.allclose(output["loss"], output["reconstruction"] + 1e-6 * output["kl"])


def test_kl_pulls_the_posterior_to_the_standard_normal(images):
    objective = TokenizerObjective(
        tiny_tokenizer(gaussian_posterior=True), loss_weights={"kl": 1.0, "reconstruction": 0.0}
    )
    optimizer = torch.optim.Adam(objective.trainable_parameters(), lr=0.01)
    values = []
    for _ in range(30):
        output = terms_of(objective, images, posterior_noise=torch.zeros(2, 3, 4))
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        values.append(output["kl"].item())
    assert values[-1] < 0.2 * values[0]


def test_posterior_noise_is_needed_exactly_where_there_is_a_posterior(images):
    gaussian = TokenizerObjective(tiny_tokenizer(gaussian_posterior=True))
    with pytest.raises(ValueError, match="`posterior_noise` is needed"):
        terms_of(gaussian, images)
    with pytest.raises(ValueError, match=r"`posterior_noise` must have the shape of the latents, \(2, 3, 4\)"):
        terms_of(gaussian, images, posterior_noise=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="`posterior_noise` has no meaning"):
        terms_of(TokenizerObjective(tiny_tokenizer()), images, posterior_noise=torch.zeros(2, 3, 4))


# --- Decoder fine-tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gaussian", [False, True])
def test_decoder_finetuning_leaves_latents_bit_identical(images, mask, gaussian):
    tokenizer = tiny_tokenizer(gaussian_posterior=gaussian)
    objective = TokenizerObjective(tokenizer, decoder_only=True).train()
    noise = torch.zeros(2, 3, 4) if gaussian else None

    def latents():
        encoded = tokenizer.encode(images, return_dict=False)[0]
        return encoded.parameters if gaussian else encoded

    before = latents().clone()
    optimizer = torch.optim.AdamW(weight_decay_groups(objective, 0.1), lr=1e-2)
    losses = []
    for _ in range(3):
        output = terms_of(objective, images, mask, noise)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert set(output) == {"loss", "reconstruction"} and losses[-1] < losses[0]
    assert torch.equal(latents(), before)
    assert all(parameter.grad is None for parameter in tokenizer.encoder.parameters())
    assert all(parameter.grad is not None for parameter in tokenizer.decoder.parameters())


def test_decoder_finetuning_trains_the_decoder_and_nothing_else():
    objective = TokenizerObjective(tiny_tokenizer(), decoder_only=True)
    assert set(objective.trainable_parameters()) == set(objective.tokenizer.decoder.parameters())
    objective.train()
    assert objective.tokenizer.decoder.training and not objective.tokenizer.encoder.training
    full = objective_with_hog()
    assert set(full.trainable_parameters()) == set(full.parameters()) and full.tokenizer.encoder.training


def test_decoder_finetuning_builds_no_graph_through_the_encoder(images, mask):
    objective = TokenizerObjective(tiny_tokenizer(), decoder_only=True)
    seen = []
    objective.tokenizer.encoder.register_forward_hook(lambda m, i, output: seen.append(output.requires_grad))
    assert terms_of(objective, images.requires_grad_(), mask)["loss"].requires_grad
    assert seen == [False]


# --- Perceptual and adversarial terms -----------------------------------------------------------------------------


def distance(reconstruction, images):
    """A perceptual distance that can be computed by hand."""
    return (reconstruction.float() - images).abs().mean(dim=(1, 2, 3))


class Adversary:
    """Dislikes bright reconstructions, by as much as it is told."""

    def __init__(self):
        self.calls = []

    def __call__(self, reconstruction, draws):
        self.calls.append(draws)
        return draws["strength"] * reconstruction.float().mean()


def objective_with_pixel_terms(weights=None, **kwargs):
    adversary = Adversary()
    objective = TokenizerObjective(
        tiny_tokenizer(), loss_weights=weights, perceptual=distance, adversary=adversary, **kwargs
    )
    return objective, adversary


DRAWS = {"strength": torch.tensor(3.0)}


def test_pixel_terms_by_hand_and_the_reconstruction_they_judged(images, mask):
    weights = {"reconstruction": 2.0, "perceptual": 0.5, "adversarial": 0.25}
    objective, _ = objective_with_pixel_terms(weights, adaptive_adversarial_weight=False)
    terms, reconstruction = objective(images, mask, adversarial_draws=DRAWS)
    expected = objective.tokenizer.decode(objective.tokenizer.encode(images, mask).latent).sample
    assert torch.equal(reconstruction, expected) and not reconstruction.requires_grad
    assert set(terms) == {"loss", "reconstruction", "perceptual", "adversarial"}
    assert torch.allclose(terms["perceptual"], (expected - images).abs().mean())
    assert torch.allclose(terms["adversarial"], 3 * expected.mean())
    total = 2 * (expected - images).square().mean() + 0.5 * terms["perceptual"] + 0.25 * terms["adversarial"]
    assert torch.allclose(terms["loss"], total)


def test_adaptive_weight_is_the_ratio_of_the_gradients_of_the_last_weight(images, mask):
    objective, _ = objective_with_pixel_terms({"perceptual": 0.5, "adversarial": 0.25})
    terms, _ = objective(images, mask, adversarial_draws=DRAWS)
    reconstruction = objective.tokenizer.decode(objective.tokenizer.encode(images, mask).latent).sample
    weight = objective.tokenizer.decoder.proj_out.weight
    pixels = (reconstruction - images).square().mean() + 0.5 * distance(reconstruction, images).mean()
    norms = [
        torch.autograd.grad(term, weight, retain_graph=True)[0].norm() for term in (pixels, 3 * reconstruction.mean())
    ]
    assert torch.allclose(terms["adaptive_weight"], norms[0] / (norms[1] + 1e-4), rtol=1e-4)
    assert torch.allclose(
        terms["loss"], pixels + 0.25 * terms["adaptive_weight"] * 3 * reconstruction.mean(), rtol=1e-4
    )


def test_adaptive_weight_gets_no_gradient(images, mask):
    objective, _ = objective_with_pixel_terms()
    terms, _ = objective(images, mask, adversarial_draws=DRAWS)
    terms["loss"].backward()
    factor = terms["adaptive_weight"].item()
    fixed, _ = objective_with_pixel_terms({"adversarial": 0.4 * factor}, adaptive_adversarial_weight=False)
    fixed(images, mask, adversarial_draws=DRAWS)[0]["loss"].backward()
    for one, other in zip(objective.parameters(), fixed.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_scales_multiply_weights_and_zero_leaves_a_term_out(images, mask):
    objective, adversary = objective_with_pixel_terms(adaptive_adversarial_weight=False)
    terms, _ = objective(images, mask, scales={"perceptual": 0.5, "adversarial": 0.0})
    assert set(terms) == {"loss", "reconstruction", "perceptual"} and adversary.calls == []
    assert torch.allclose(terms["loss"], terms["reconstruction"] + 0.5 * terms["perceptual"])
    with pytest.raises(ValueError, match="`scales` may name 'perceptual' and 'adversarial', got 'hog'"):
        objective(images, mask, scales={"hog": 1.0}, adversarial_draws=DRAWS)
    with pytest.raises(ValueError, match="must be finite and not negative, got -1.0"):
        objective(images, mask, scales={"perceptual": -1.0}, adversarial_draws=DRAWS)


@pytest.mark.parametrize("term", ["perceptual", "adversarial"])
def test_a_step_down_the_gradient_lowers_the_pixel_term(images, mask, term):
    weights = {"reconstruction": 0.0, "perceptual": 0.0, "adversarial": 0.0} | {term: 1.0}
    objective, _ = objective_with_pixel_terms(weights, adaptive_adversarial_weight=False)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.02)
    before, _ = objective(images, mask, adversarial_draws=DRAWS)
    before["loss"].backward()
    assert objective.tokenizer.encoder.latent_tokens.grad.abs().sum() > 0
    optimizer.step()
    assert objective(images, mask, adversarial_draws=DRAWS)[0][term] < before[term]


def test_encoder_and_decoder_run_once_with_every_term(images, mask):
    objective, _ = objective_with_pixel_terms()
    calls = [count_calls(module) for module in (objective.tokenizer.encoder, objective.tokenizer.decoder)]
    objective(images, mask, adversarial_draws=DRAWS)[0]["loss"].backward()
    assert [len(call) for call in calls] == [1, 1]


def test_what_is_frozen_is_no_part_of_the_module(images, mask):
    tokenizer, target, perceptual = tiny_tokenizer(), CountingTarget(), nn.Linear(2, 2)
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 2, 16, 1, 2)
    objective = TokenizerObjective(tokenizer, {"teacher": target}, {"teacher": decoder}, perceptual=perceptual)
    parameters = set(objective.parameters())
    assert not parameters & {*target.parameters(), *perceptual.parameters()}
    assert all(name.startswith(("tokenizer.", "auxiliary_decoders.")) for name in objective.state_dict())
    assert not any(parameter.requires_grad for parameter in target.parameters())
    objective.move_frozen("meta")
    assert {p.device.type for p in (*target.parameters(), *perceptual.parameters())} == {"meta"}
    assert {p.device.type for p in parameters} == {"cpu"}


def test_draws_are_needed_exactly_where_they_have_an_effect(images, mask):
    objective, _ = objective_with_pixel_terms()
    with pytest.raises(ValueError, match="`adversarial_draws` is needed by the adversary"):
        objective(images, mask)
    with pytest.raises(ValueError, match="`adversarial_draws` has no effect"):
        objective(images, mask, scales={"adversarial": 0.0}, adversarial_draws=DRAWS)
    with pytest.raises(ValueError, match="`adversarial_draws` has no effect"):
        TokenizerObjective(tiny_tokenizer())(images, mask, adversarial_draws=DRAWS)


def test_gradient_checkpointing_reaches_every_decoder_and_changes_nothing(images, mask):
    plain, checkpointed = objective_with_hog(), objective_with_hog()
    checkpointed.load_state_dict(plain.state_dict())
    enable_gradient_checkpointing(checkpointed)
    auxiliary = checkpointed.auxiliary_decoders["hog"].decoder
    stacks = [checkpointed.tokenizer.encoder, checkpointed.tokenizer.decoder, auxiliary]
    assert all(stack.gradient_checkpointing for stack in stacks)
    calls = []  # a pre-hook: the second run ends as soon as it has what it needs
    auxiliary.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for objective in (plain, checkpointed):
        terms_of(objective, images, mask)["loss"].backward()
    assert len(calls) == 2  # once more in the backward pass
    for one, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_decoder_finetuning_has_the_same_pixel_terms(images, mask):
    objective, _ = objective_with_pixel_terms(decoder_only=True)
    terms, _ = objective(images, mask, adversarial_draws=DRAWS)
    assert set(terms) == {"loss", "reconstruction", "perceptual", "adversarial", "adaptive_weight"}


# --- Captions -----------------------------------------------------------------------------------------------------


def test_captions_train_the_text_decoder_and_the_encoder(images, mask):
    tokenizer = tiny_tokenizer()
    decoder = TextDecoder.from_tokenizer_config(tokenizer.config, 11, 5, 16, 1, 2)
    objective = TokenizerObjective(tokenizer, loss_weights={"text": 1.0, "reconstruction": 0.0}, text_decoder=decoder)
    tokens = torch.tensor([[1, 2, 3, -100, -100], [4, -100, -100, -100, -100]])
    before = terms_of(objective, images, mask, token_indices=tokens)
    logits = decoder(tokenizer.encode(images, mask).latent)
    assert torch.allclose(before["text"], nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    before["loss"].backward()
    assert tokenizer.encoder.latent_tokens.grad.abs().sum() > 0
    torch.optim.SGD(objective.trainable_parameters(), lr=0.05).step()
    assert terms_of(objective, images, mask, token_indices=tokens)["text"] < before["text"]
    with pytest.raises(ValueError, match="`token_indices` is needed by the `text_decoder`"):
        objective(images, mask)
    with pytest.raises(ValueError, match="`token_indices` has no meaning"):
        TokenizerObjective(tokenizer)(images, mask, token_indices=tokens)


# --- Errors -------------------------------------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_refused():
    tokenizer, target = tiny_tokenizer(), HOGTarget(4)
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 108, 16, 1, 2)
    wrong = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 100, 16, 1, 2)
    with pytest.raises(ValueError, match="same names"):
        TokenizerObjective(tokenizer, {"hog": target})
    with pytest.raises(ValueError, match="gives 108 features per patch but its auxiliary decoder predicts 100"):
        TokenizerObjective(tokenizer, {"hog": target}, {"hog": wrong})
    with pytest.raises(ValueError, match="'kl' cannot name a target"):
        TokenizerObjective(tokenizer, {"kl": target}, {"kl": decoder})
    with pytest.raises(ValueError, match="`decoder_only` trains no auxiliary decoder"):
        TokenizerObjective(tokenizer, {"hog": target}, {"hog": decoder}, decoder_only=True)
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"hogg": 1.0}, "'hogg'"),
        ({"kl": 1.0}, "'kl'"),
        ({"hog": -1.0}, "not negative"),
        ({"hog": float("nan")}, "nan"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        objective_with_hog(weights)


def test_bad_masks_and_targets_are_named(images):
    objective = objective_with_hog()
    with pytest.raises(ValueError, match="`mask`"):
        terms_of(objective, images, torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiple of `patch_size`"):
        terms_of(objective, torch.zeros(1, 3, 18, 16))
    tokenizer = tiny_tokenizer()
    decoder = AuxiliaryDecoder.from_tokenizer_config(tokenizer.config, 108, 16, 1, 2)
    coarse = TokenizerObjective(tokenizer, {"hog": HOGTarget(8)}, {"hog": decoder})
    with pytest.raises(ValueError, match="one feature vector for each image token"):
        terms_of(coarse, images)
