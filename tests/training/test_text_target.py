import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.models.vit import ViTDecoder
from maetok_hf.training.text_target import IGNORE_INDEX, CaptionTokenizer, TextDecoder, caption_loss


CORPUS = ["a red cat sits on a red mat", "the blue dog ran to the red barn", "a cat and a dog"]
SIZES = {"vocab_size": 11, "max_length": 6, "latent_channels": 4, "num_latent_tokens": 3}
WIDTH = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer with start and end tokens, and no padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<start>", eos_token="<end>")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder):
    return CaptionTokenizer.from_pretrained(folder, max_length=12)


def real(row):
    return row[row != IGNORE_INDEX].tolist()


def test_indices_are_the_tokens_of_the_caption_and_nothing_else(tokenizer):
    indices = tokenizer(CORPUS)
    assert indices.shape == (3, 12) and indices.dtype == torch.int64
    for row, caption in zip(indices, CORPUS, strict=True):
        assert tokenizer.tokenizer.decode(real(row)) == caption
        assert 0 not in row and 1 not in row  # start and end
        count = len(real(row))
        assert 0 < count < 12 and (row[count:] == IGNORE_INDEX).all()


def test_a_long_caption_is_cut_at_its_end(tokenizer):
    whole = tokenizer(["a red cat sits on a red mat"])[0]
    short = CaptionTokenizer(tokenizer.tokenizer, max_length=3)(["a red cat sits on a red mat"])[0]
    assert torch.equal(short, whole[:3]) and len(real(short)) == 3


def test_a_row_does_not_depend_on_the_batch(tokenizer):
    together = tokenizer(["a cat", None, "the red barn " * 40, ""])
    for caption, row in zip(["a cat", None, "the red barn " * 40, ""], together, strict=True):
        assert torch.equal(tokenizer([caption])[0], row)
    # the order of the calls leaves no trace either
    assert torch.equal(tokenizer(["a cat", None, "the red barn " * 40, ""]), together)


def test_missing_and_blank_captions_are_all_padding(tokenizer):
    assert (tokenizer([None, "", "  \n"]) == IGNORE_INDEX).all()


def test_every_index_fits_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.tokenizer)
    indices = tokenizer(["\x00 zebra ÿ 猫 <start> <end>", "~" * 30])
    assert indices.max() < tokenizer.vocab_size
    tokenizer.tokenizer.add_tokens(["zebra"])
    assert tokenizer(["zebra"])[0, 0] == tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    ("captions", "message"),
    [("a cat", r"single string: pass \['a cat'\]"), ([3], "strings or `None`, got 3"), ([float("nan")], "got nan")],
)
def test_what_is_no_list_of_captions_is_refused(tokenizer, captions, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(captions)


def test_a_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"(?s)missing.*check the path.*`hf download .*leave this target out"):
        CaptionTokenizer.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_that_is_not_positive_is_refused(max_length):
    with pytest.raises(ValueError, match=f"`max_length` must be positive, got {max_length}"):
        CaptionTokenizer(None, max_length)


def test_every_position_depends_on_every_latent_token():
    decoder = TextDecoder(**SIZES, **WIDTH)
    assert type(decoder.decoder) is ViTDecoder
    latent = torch.randn(2, 3, 4, requires_grad=True)
    logits = decoder(latent)
    assert logits.shape == (2, 6, 11)
    for position in range(6):
        (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), latent, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all() and not gradient[1].any()


def test_positions_are_told_apart():
    logits = TextDecoder(**SIZES, **WIDTH)(torch.randn(1, 3, 4))[0]
    assert torch.pdist(logits).min() > 1e-4


@pytest.mark.parametrize(("num_latent_tokens", "expected"), [(3, 3), (0, 4)])
def test_decoder_fits_its_tokenizer_also_with_image_tokens(num_latent_tokens, expected):
    tokenizer = AutoencoderMAE(
        sample_size=8,
        patch_size=4,
        latent_channels=6,
        num_latent_tokens=num_latent_tokens,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
    )
    decoder = TextDecoder.from_tokenizer_config(tokenizer.config, vocab_size=7, max_length=5, **WIDTH)
    latent = tokenizer.encode(torch.zeros(1, 3, 8, 8)).latent
    assert latent.shape[1] == decoder.num_latent_tokens == expected
    assert decoder(latent).shape == (1, 5, 7)


def test_another_number_of_latents_is_refused():
    with pytest.raises(ValueError, match="`latent` has 4 tokens, but the text decoder is built for 3.*one image size"):
        TextDecoder(**SIZES, **WIDTH)(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("name", ["vocab_size", "max_length", "num_latent_tokens", "num_layers", "hidden_size"])
def test_sizes_that_are_not_positive_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0"):
        TextDecoder(**SIZES | WIDTH | {name: 0})
    with pytest.raises(ValueError, match=r"`hidden_size` \(16\) must be a multiple of `num_attention_heads` \(3\)"):
        TextDecoder(**SIZES | WIDTH | {"num_attention_heads": 3})


def test_caption_loss_by_hand():
    # probabilities 1/2, 1/4, 1/4 of three tokens, and uniform
    logits = torch.tensor([[[2.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[2.0, 1.0, 1.0], [5.0, 0.0, 0.0]]]) * math.log(2)
    indices = torch.tensor([[0, 2], [1, IGNORE_INDEX]])
    expected = (math.log(2) + math.log(3) + math.log(4)) / 3
    assert math.isclose(caption_loss(logits, indices).item(), expected, rel_tol=1e-6)


def test_a_step_on_the_logits_lowers_the_loss_and_padding_is_not_asked():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    indices = torch.tensor([[1, 0, 4, IGNORE_INDEX], [IGNORE_INDEX] * 4])
    loss = caption_loss(logits, indices)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert caption_loss(logits - 0.1 * gradient, indices) < loss
    is_token = torch.nn.functional.one_hot(indices[0, :3], 5).bool()
    assert (gradient[0, :3][is_token] < 0).all() and (gradient[0, :3][~is_token] > 0).all()
    assert not gradient[0, 3].any() and not gradient[1].any()


def test_without_any_caption_the_loss_and_its_gradients_are_zero():
    decoder = TextDecoder(**SIZES, **WIDTH)
    latent = torch.randn(2, 3, 4, requires_grad=True)
    loss = caption_loss(decoder(latent), torch.full((2, 6), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and not latent.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


def test_caption_loss_is_computed_in_float32():
    logits = torch.tensor([[[300.0, 0.0]]], dtype=torch.bfloat16)
    loss = caption_loss(logits.expand(1, 999, 2), torch.ones(1, 999, dtype=torch.int64))
    assert loss.dtype == torch.float32 and math.isclose(loss.item(), 300.0, rel_tol=1e-6)


def test_caption_loss_refuses_another_length():
    with pytest.raises(ValueError, match=r"`token_indices` of shape \(1, 3\).*the same `max_length`"):
        caption_loss(torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.int64))


def test_training_learns_captions_from_latents(tokenizer):
    indices = tokenizer(["a red cat", "the blue dog"])
    decoder = TextDecoder(tokenizer.vocab_size, 12, 4, 3, **WIDTH)
    latent = torch.randn(2, 3, 4)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        caption_loss(decoder(latent), indices).backward()
        optimizer.step()
    predicted = decoder(latent).argmax(-1)
    assert [tokenizer.tokenizer.decode(p[i != IGNORE_INDEX]) for p, i in zip(predicted, indices, strict=True)] == [
        "a red cat",
        "the blue dog",
    ]
