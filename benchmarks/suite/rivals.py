"""
Our models against the naive form of research code on the same weights, call by call in turn.

The naive form has queries, keys and values in one matrix, as research checkpoints do, and ours are fused to that.
"""

from dataclasses import replace
from functools import partial

import torch

from maetok_hf.seeding import keyed_generator

from ..baseline import NaiveSiT, NaiveTokenizer
from .cases import DTYPES, MODES, USUAL_MODES, Case, Settings, Work
from .models import images, pipeline, tokenizer, transformer, transformer_inputs


STEPS, SCALE, INTERVAL = 20, 1.9, (0.0, 0.75)


def float32_of(settings: Settings) -> Settings:
    """The rival's settings where research code computes in float32 whatever ours do."""
    return replace(settings, dtype="float32")


def reconstruct(settings: Settings, batch_size: int, precise: bool = False) -> Work:
    """Encode and decode; the rival in float32 if it is to be `precise`."""
    theirs = float32_of(settings) if precise else settings
    ours = settings.place(tokenizer())
    naive = NaiveTokenizer(theirs.place(tokenizer()) if precise else ours)
    ours.fuse_qkv_projections()
    pixels, their_pixels = (
        images(batch_size, 256, settings.torch_device, one.torch_dtype) for one in (settings, theirs)
    )
    return Work(
        torch.no_grad()(lambda: ours(pixels, return_dict=False)),
        batch_size,
        lambda: settings.compile(ours.encoder, ours.decoder),
        rival=torch.no_grad()(lambda: naive(their_pixels)),
    )


def velocity(settings: Settings, size: str, batch_size: int, precise: bool = False) -> Work:
    """A pass of a generator; the rival in float32 if it is to be `precise`."""
    theirs = float32_of(settings) if precise else settings
    ours = settings.place(transformer(size))
    naive = NaiveSiT(theirs.place(transformer(size)) if precise else ours)
    ours.fuse_qkv_projections()
    inputs, their_inputs = (
        transformer_inputs(batch_size, settings.torch_device, one.torch_dtype) for one in (settings, theirs)
    )
    return Work(
        torch.no_grad()(lambda: ours(*inputs, return_dict=False)),
        batch_size,
        lambda: settings.compile(ours),
        rival=torch.no_grad()(lambda: naive(*their_inputs)),
    )


def guided_sampling(settings: Settings, size: str, batch_size: int) -> Work:
    """A whole guided run; the rival is in float32, as research code samples, whatever the settings say."""
    pipe, naive_pipe = pipeline(size, "SDE"), pipeline(size, "SDE")
    naive = NaiveSiT(naive_pipe.transformer.to(settings.torch_device).eval())
    naive_decoder = NaiveTokenizer(naive_pipe.vae.to(settings.torch_device).eval())
    for model in (pipe.transformer, pipe.vae):
        settings.prepare(model)
    labels = torch.arange(batch_size, device=settings.torch_device) * 7

    def noise(name: str) -> torch.Tensor:
        shape = (batch_size, 128, 32)
        return torch.randn(shape, generator=keyed_generator(0, name)).to(settings.torch_device)

    begin, draws = noise("begin"), [noise(f"step {step}") for step in range(STEPS - 1)]

    def ours() -> None:
        pipe(
            labels.tolist(), SCALE, INTERVAL, STEPS, latents=begin, output_type="pt",
            generator=torch.Generator(settings.torch_device).manual_seed(0),
        )  # fmt: skip

    @torch.no_grad()
    def theirs() -> None:
        naive_decoder.decode(naive.sample(begin, labels, draws, STEPS, SCALE, INTERVAL).float())

    return Work(
        ours,
        batch_size,
        lambda: settings.compile(pipe.transformer, pipe.vae.decoder),
        counted=False,
        rival=theirs,
    )


CPU, CUDA = ("cpu",), ("cuda",)
NETWORKS = (("encode + decode, ViT-B, 256 x 256", reconstruct, 4), ("SiT-L", partial(velocity, size="SiT-L"), 2))
IN_FLOAT32 = "naive in float32"
GUIDED = f"guided sampling, SiT-B, SDE, {STEPS} steps; {IN_FLOAT32}"
CASES = [
    Case("against the naive form", f"{name}, batch {batch}", partial(build, batch_size=batch), modes=modes,
         dtypes=dtypes, devices=where)
    for name, build, cpu_batch, dtypes, modes in (
        *((name, build, batch, DTYPES, MODES) for name, build, batch in NETWORKS),
        *((f"{name}; {IN_FLOAT32}", partial(build, precise=True), batch, ("bfloat16",), USUAL_MODES)
          for name, build, batch in NETWORKS),
        (GUIDED, partial(guided_sampling, size="SiT-B"), 2, DTYPES, USUAL_MODES),
    )
    for batch, where in ((cpu_batch, CPU), (64, CUDA))
]  # fmt: skip
