"""Passes without gradients: encoding, decoding, generators' velocities, and how they scale."""

from functools import partial

import torch

from .cases import MODES, Case, Settings, Work
from .models import NUM_CHANNELS, NUM_TOKENS, images, tokenizer, transformer, transformer_inputs


def encode(settings: Settings, batch_size: int, resolution: int = 256) -> Work:
    model = settings.prepare(tokenizer(resolution))
    pixels = images(batch_size, resolution, settings.torch_device, settings.torch_dtype)
    return Work(
        torch.no_grad()(lambda: model.encode(pixels, return_dict=False)),
        batch_size,
        lambda: settings.compile(model.encoder),
    )


def decode(settings: Settings, batch_size: int, resolution: int = 256) -> Work:
    model = settings.prepare(tokenizer(resolution))
    latents = transformer_inputs(batch_size, settings.torch_device, settings.torch_dtype)[0]
    return Work(
        torch.no_grad()(lambda: model.decode(latents, return_dict=False)),
        batch_size,
        lambda: settings.compile(model.decoder),
    )


def reconstruct(settings: Settings, batch_size: int) -> Work:
    model = settings.prepare(tokenizer())
    pixels = images(batch_size, 256, settings.torch_device, settings.torch_dtype)
    return Work(
        torch.no_grad()(lambda: model(pixels, return_dict=False)),
        batch_size,
        lambda: settings.compile(model.encoder, model.decoder),
    )


def velocity(settings: Settings, size: str, batch_size: int, num_tokens: int = NUM_TOKENS) -> Work:
    model = settings.prepare(transformer(size, num_tokens))
    inputs = transformer_inputs(batch_size, settings.torch_device, settings.torch_dtype, num_tokens)
    return Work(
        torch.no_grad()(lambda: model(*inputs, return_dict=False)), batch_size, lambda: settings.compile(model)
    )


CPU, CUDA = ("cpu",), ("cuda",)
EAGER = ("eager",)

TOKENIZER = [
    *(
        Case("tokenizer", f"{name}, ViT-B, 256 x 256, batch {batch}", partial(build, batch_size=batch), modes=MODES,
             devices=where)
        for name, build in (("encode", encode), ("decode", decode), ("encode + decode", reconstruct))
        for batch, where in ((4, CPU), (1, CUDA), (8, CUDA), (64, CUDA), (256, CUDA))
    ),
]  # fmt: skip

GENERATORS = [
    Case("generators", f"{size}, batch {batch}", partial(velocity, size=size, batch_size=batch), modes=MODES,
         devices=where)
    for size, batches in {
        "SiT-B": (2, 8),
        "SiT-L": (2, 8),
        "SiT-XL": (2,),
        "LightningDiT-XL": (2,),
        "USiT-H": (2,),
        "USiT-2B": (),
    }.items()
    for batch, where in (*((batch, CPU) for batch in batches), *((batch, CUDA) for batch in (1, 8, 64, 256)))
]  # fmt: skip

# curves: eager, since compiling every point would take longer than what it shows
SCALING = [
    *(
        Case("tokens", f"SiT-B, {n} tokens, batch 2", partial(velocity, size="SiT-B", batch_size=2, num_tokens=n),
             modes=EAGER, point=n, curve="SiT-B, batch 2")
        for n in (32, 64, 128, 256, 512, 1024)
    ),
    *(
        Case("batch", f"SiT-B, batch {n}", partial(velocity, size="SiT-B", batch_size=n), modes=EAGER, point=n,
             curve=f"SiT-B, {NUM_TOKENS} tokens")
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ),
    *(
        Case("image size", f"encode, ViT-B, {n} x {n}, batch 1", partial(encode, batch_size=1, resolution=n),
             modes=EAGER, point=n, curve="encoding, ViT-B, batch 1")
        for n in (256, 512, 768, 1024)
    ),
]  # fmt: skip
assert NUM_CHANNELS == 32, "the names above say nothing of channels: they are the published ones"
