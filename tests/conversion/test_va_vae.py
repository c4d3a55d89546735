"""VA-VAE: the converted network against one written from the architecture, and what must be refused."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from maetok_hf.conversion import convert as convert_module
from maetok_hf.conversion.va_vae import VA_VAE_WEIGHTS_NAME, convert_va_vae, convert_va_vae_state_dict, va_vae_config
from maetok_hf.training.latent_encoding import encode_tokens
from tests.testing_utils import seeded_normal


class Layout:
    """Names and shapes of the published keys for a width, multipliers, residual blocks and levels with attention."""

    def __init__(self, width=32, multipliers=(1, 1, 2), num_blocks=2, attention=(2,), up_attention=None, latent=4):
        self.channels = [width * multiplier for multiplier in multipliers]
        self.num_blocks = num_blocks
        self.attention = {"down": attention, "up": attention if up_attention is None else up_attention}
        self.shapes: dict[str, tuple[int, ...]] = {}
        last = self.channels[-1]
        self.conv("encoder.conv_in", 3, self.channels[0], 3)
        self.levels("encoder.down", "downsample", num_blocks, list(enumerate(self.channels)), self.channels[0])
        self.conv("decoder.conv_in", latent, last, 3)
        upwards = list(enumerate(self.channels))[::-1]
        self.levels("decoder.up", "upsample", num_blocks + 1, upwards, last)
        for part, end, out in (("encoder", last, 2 * latent), ("decoder", self.channels[0], 3)):
            self.resnet(f"{part}.mid.block_1", last, last)
            self.attend(f"{part}.mid.attn_1", last)
            self.resnet(f"{part}.mid.block_2", last, last)
            self.norm(f"{part}.norm_out", end)
            self.conv(f"{part}.conv_out", end, out, 3)
        self.conv("quant_conv", 2 * latent, 2 * latent, 1)
        self.conv("post_quant_conv", latent, latent, 1)

    def conv(self, name, inputs, outputs, size):
        self.shapes |= {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}

    def norm(self, name, channels):
        self.shapes |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}

    def resnet(self, name, inputs, outputs):
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs, 3)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            self.conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attend(self, name, channels):
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)

    def levels(self, name, resample, num_blocks, levels, inputs):
        for position, (level, outputs) in enumerate(levels):
            for block in range(num_blocks):
                self.resnet(f"{name}.{level}.block.{block}", inputs, outputs)
                inputs = outputs
                if level in self.attention[name.split(".")[1]]:
                    self.attend(f"{name}.{level}.attn.{block}", outputs)
            if position < len(levels) - 1:
                self.conv(f"{name}.{level}.{resample}.conv", outputs, outputs, 3)

    def draw(self, seed=0) -> dict[str, torch.Tensor]:
        """Weights of which none may be left out: norms and biases are not those of an initialisation."""
        result = {}
        for index, (key, shape) in enumerate(self.shapes.items()):
            values = seeded_normal(*shape, seed=1000 * seed + index)
            is_scale = len(shape) == 1 and key.endswith("weight")
            fan_in = values[0].numel() if len(shape) > 1 else 9
            result[key] = values / fan_in**0.5 + (1 if is_scale else 0)
        return result


class LatentDiffusion:
    """The network by functions of its published weights: residual levels, attention, moments of the latents."""

    def __init__(self, weights, layout):
        self.weights, self.layout = weights, layout

    def parameters(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, name, x, padding=0, stride=1):
        return F.conv2d(x, *self.parameters(name), padding=padding, stride=stride)

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.parameters(name), eps=1e-6)

    def resnet(self, name, x):
        hidden = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        hidden = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", hidden)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return hidden + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.weights else x)

    def attend(self, name, x):
        normed = self.norm(f"{name}.norm", x)
        query, key, value = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = (torch.einsum("bcq,bck->bqk", query, key) / x.shape[1] ** 0.5).softmax(dim=-1)
        mixed = torch.einsum("bqk,bck->bcq", weights, value).unflatten(2, x.shape[2:])
        return x + self.conv(f"{name}.proj_out", mixed)

    def level(self, name, num_blocks, x):
        for block in range(num_blocks):
            x = self.resnet(f"{name}.block.{block}", x)
            if f"{name}.attn.{block}.q.weight" in self.weights:
                x = self.attend(f"{name}.attn.{block}", x)
        return x

    def middle(self, part, x):
        x = self.attend(f"{part}.mid.attn_1", self.resnet(f"{part}.mid.block_1", x))
        return self.resnet(f"{part}.mid.block_2", x)

    def end(self, part, x):
        return self.conv(f"{part}.conv_out", F.silu(self.norm(f"{part}.norm_out", x)), padding=1)

    def encode(self, images):
        """Mean and logarithm of the variance."""
        x = self.conv("encoder.conv_in", images, padding=1)
        for level in range(len(self.layout.channels)):
            x = self.level(f"encoder.down.{level}", self.layout.num_blocks, x)
            if level < len(self.layout.channels) - 1:  # a row below and a column to the right of zeros
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x))).chunk(2, dim=1)

    def decode(self, latents):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", latents), padding=1))
        for level in reversed(range(len(self.layout.channels))):
            x = self.level(f"decoder.up.{level}", self.layout.num_blocks + 1, x)
            if level > 0:
                doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{level}.upsample.conv", doubled, padding=1)
        return self.end("decoder", x)


LAYOUTS = {
    "as published": {},
    "no attention in the levels": {"attention": ()},
    "attention in two levels": {"multipliers": (1, 2, 2, 1), "attention": (1, 3)},
    "in the encoder only": {"up_attention": ()},
    "one block, two levels": {"multipliers": (1, 2), "num_blocks": 1, "attention": (1,), "latent": 3},
}


@pytest.fixture
def file(tmp_path):
    """A published file: the network in a `state_dict`, among what training adds."""
    extra = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.1.num_batches_tracked": torch.tensor(3),
        "foundation_model.model.cls_token": torch.zeros(1, 1, 8),
        "linear_proj.weight": torch.zeros(8, 4, 1, 1),
        "model_ema.encoderconv_inweight": torch.zeros(32, 3, 3, 3),
    }
    content = {"state_dict": extra | Layout().draw(), "epoch": 49, "optimizer_states": [{"lr": 1e-4}]}
    torch.save(content, tmp_path / VA_VAE_WEIGHTS_NAME)
    return tmp_path / VA_VAE_WEIGHTS_NAME


def assert_same(first, second):
    configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (first, second)]
    assert configs[0] == configs[1]
    expected, got = first.state_dict(), second.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(got[key], value) for key, value in expected.items())


# The network


@torch.no_grad()
@pytest.mark.parametrize("options", LAYOUTS.values(), ids=list(LAYOUTS))
def test_it_computes_what_the_published_network_computes(options, tmp_path):
    layout = Layout(**options)
    weights = layout.draw(seed=1)
    torch.save(weights, tmp_path / "weights.pt")
    model, expected = convert_va_vae(tmp_path / "weights.pt"), LatentDiffusion(weights, layout)
    stride = 2 ** (len(layout.channels) - 1)
    images = seeded_normal(2, 3, 3 * stride, 4 * stride, seed=5)
    posterior, (mean, log_variance) = model.encode(images).latent_dist, expected.encode(images)
    assert mean.shape[2:] == (3, 4) and mean.std() > 0.1 and log_variance.std() > 0.1
    torch.testing.assert_close(posterior.mode(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, log_variance, rtol=1e-5, atol=1e-5)
    latents = seeded_normal(*mean.shape, seed=6)
    decoded = expected.decode(latents)
    assert decoded.shape == images.shape and decoded.std() > 0.1
    torch.testing.assert_close(model.decode(latents).sample, decoded, rtol=1e-5, atol=1e-5)


def test_the_published_size_maps_block_by_block():
    layout = Layout(width=128, multipliers=(1, 1, 2, 2, 4), attention=(4,), latent=32)
    weights = {key: torch.empty(shape, device="meta") for key, shape in layout.shapes.items()}
    config = va_vae_config(weights)
    assert config == {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 128, 256, 256, 512],
        "layers_per_block": 2,
        "latent_channels": 32,
        "sample_size": 256,
        "scaling_factor": 1.0,
    }
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    got = convert_va_vae_state_dict(weights, config)
    assert {key: value.shape for key, value in got.items()} == {key: value.shape for key, value in expected.items()}
    assert len(got) == len(weights)


# What comes back


def test_training_leftovers_change_nothing(file, tmp_path):
    weights = Layout().draw()
    torch.save(weights, tmp_path / "alone.pt")
    save_file(weights, tmp_path / "alone.safetensors")
    model = convert_va_vae(file)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    for other in (file.parent, str(file), tmp_path / "alone.pt", tmp_path / "alone.safetensors"):
        assert_same(convert_va_vae(other), model)
    model.save_pretrained(tmp_path / "converted")
    assert_same(AutoencoderKL.from_pretrained(tmp_path / "converted"), model)


def test_half_precision_weights_are_converted_exactly(tmp_path):
    weights = {key: value.half() for key, value in Layout().draw().items()}
    torch.save(weights, tmp_path / "half.pt")
    torch.save({key: value.float() for key, value in weights.items()}, tmp_path / "full.pt")
    assert_same(convert_va_vae(tmp_path / "half.pt"), convert_va_vae(tmp_path / "full.pt"))


def test_its_latents_are_tokens_as_those_of_any_tokenizer(file):
    model, images = convert_va_vae(file), seeded_normal(2, 3, 16, 8)
    tokens = encode_tokens(model, images)
    assert tokens.shape == (2, 4 * 2, 4)
    expected = model.encode(images).latent_dist.mode()
    torch.testing.assert_close(tokens[1, 3], expected[1, :, 1, 1])


def test_statistics_of_the_latents_come_with_the_config(file):
    mean, std = seeded_normal(1, 4, 1, 1), seeded_normal(1, 4, 1, 1, seed=1).exp()
    torch.save({"mean": mean, "std": std}, file.with_name("latents_stats.pt"))
    assert convert_va_vae(file).config.latents_mean is None
    for path in (file, file.parent):
        model = convert_va_vae(path, latents_stats="latents_stats.pt")
        assert model.config.latents_mean == mean.flatten().tolist()
        assert model.config.latents_std == std.flatten().tolist()
        assert model.config.scaling_factor == 1


def test_files_come_from_the_hub(file, monkeypatch):
    asked = []

    def download(repo_id, name, revision, token):
        asked.append((repo_id, name, revision, token))
        return str(file.with_name(name))

    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, file.with_name("latents_stats.pt"))
    monkeypatch.setattr(convert_module, "hf_hub_download", download)
    model = convert_va_vae("hustvl/vavae", latents_stats="latents_stats.pt", revision="main", token="t")
    assert asked == [("hustvl/vavae", name, "main", "t") for name in (VA_VAE_WEIGHTS_NAME, "latents_stats.pt")]
    assert_same(convert_va_vae(file, latents_stats="latents_stats.pt"), model)


# What is refused


def refused(tmp_path, weights, match):
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=match) as caught:
        convert_va_vae(tmp_path / "bad.pt")
    assert str(tmp_path / "bad.pt") in str(caught.value)


def test_missing_and_unknown_keys_are_listed(tmp_path):
    weights = Layout().draw()
    changed = {key: value for key, value in weights.items() if key != "decoder.up.2.attn.1.v.bias"}
    changed["encoder.down.0.block.0.temb_proj.weight"] = torch.zeros(32, 8)
    changed["colorize"] = torch.zeros(3, 1, 1, 1)
    refused(
        tmp_path,
        changed,
        r"missing keys \['decoder.up.2.attn.1.v.bias'\], unknown keys \['colorize', "
        r"'encoder.down.0.block.0.temb_proj.weight'\]",
    )
    refused(tmp_path, {"weight": torch.zeros(3)}, "has no `encoder.conv_in.weight`")
    refused(tmp_path, weights | {"encoder.conv_out.bias": torch.zeros(9)}, r"encoder.conv_out.bias: \(9,\) instead")
    wide = weights | {"encoder.mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}
    refused(tmp_path, wide, r"to_q.weight: \(64, 64, 3, 3\) instead of \(64, 64\)")


@pytest.mark.parametrize(
    "shapes",
    [
        {"quant_conv.weight": (6, 8, 1, 1), "post_quant_conv.weight": (4, 3, 1, 1)},  # sampled in another number
        {"quant_conv.weight": (4, 8, 1, 1)},  # a mean without a variance
        {"encoder.conv_out.weight": (4, 64, 3, 3)},
    ],
)
def test_latents_without_a_counterpart_are_refused(tmp_path, shapes):
    weights = Layout().draw() | {key: torch.zeros(shape) for key, shape in shapes.items()}
    refused(tmp_path, weights, "has no counterpart there")


def test_files_that_hold_no_weights_are_refused(tmp_path):
    refused(tmp_path, {"state_dict": Layout().draw(), "callbacks": print}, "nothing in it was run")
    refused(tmp_path, {"state_dict": {"a": 1}}, "holds no state dict")
    refused(tmp_path, [1, 2], "holds no state dict")
    torch.save(Layout().draw(), tmp_path / "bad.pt")
    (tmp_path / "bad.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bad\.pt.*nothing in it was run"):
        convert_va_vae(tmp_path / "bad.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.safetensors.*download it again"):
        convert_va_vae(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("statistics", "match"),
    [
        ({"mean": torch.zeros(4)}, "`std` must have one number for each of 4 channels, found None"),
        ({"mean": torch.zeros(3), "std": torch.ones(4)}, r"`mean` .* found \(3,\)"),
        ({"mean": torch.zeros(4), "std": torch.tensor([1.0, 1, 0, 1])}, "deviations positive"),
        ({"mean": torch.full((4,), torch.nan), "std": torch.ones(4)}, "means must be finite"),
    ],
)
def test_broken_statistics_are_refused(file, statistics, match):
    torch.save(statistics, file.with_name("stats.pt"))
    with pytest.raises(ValueError, match=f"stats.pt: .*{match}"):
        convert_va_vae(file, latents_stats="stats.pt")


def test_files_that_are_not_there_are_named(file):
    with pytest.raises(OSError, match=r"has no other\.pt: put it there"):
        convert_va_vae(file.parent, filename="other.pt")
    with pytest.raises(OSError, match=r"has no stats\.pt: put it there"):
        convert_va_vae(file, latents_stats="stats.pt")
    with pytest.raises(OSError, match="neither a folder nor a Hub repo id"):
        convert_va_vae("./nowhere")
