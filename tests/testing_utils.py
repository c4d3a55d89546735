"""
What several test modules share: tiny models with the code paths of the published sizes, and ways to stop what runs.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel


GOLDEN = Path(__file__).parent / "golden"

AUTOENCODER_CONFIG: dict[str, Any] = {
    "sample_size": 32,
    "patch_size": 8,
    "latent_channels": 4,
    "num_latent_tokens": 6,
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "latents_mean": 0.1,
    "latents_std": 1.5,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "sample_size": 6,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_classes": 10,
}

# every form of the tokenizer; differing encoder and decoder sizes would hide behind equal ones
AUTOENCODER_FORMS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope_modulated": {"modulated_decoder": True, "decoder_class_token": False},
    "absolute": {"position_embedding": "absolute"},
    "absolute_modulated": {"position_embedding": "absolute", "modulated_decoder": True},
    "image_tokens": {"num_latent_tokens": 0},
    "gaussian_posterior": {"gaussian_posterior": True},
    "asymmetric": {
        "decoder_hidden_size": 48,
        "decoder_num_layers": 3,
        "decoder_num_attention_heads": 3,
        "decoder_mlp_ratio": 2.0,
        "encoder_class_token": False,
        "out_channels": 1,
    },
}


@torch.no_grad()
def randomize_parameters(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Add noise to every parameter: zero initialisations (adaLN-Zero, LayerScale 1e-5) make comparisons vacuous."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * std
        parameter.add_(noise.to(parameter))
    return model


def tiny_autoencoder(seed: int = 0, **overrides: Any) -> AutoencoderMAE:
    """An [`AutoencoderMAE`] of random weights in evaluation mode, `AUTOENCODER_CONFIG` with `overrides`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderMAE(**{**AUTOENCODER_CONFIG, **overrides})
    return randomize_parameters(model, seed).eval()


def tiny_transformer(seed: int = 0, **overrides: Any) -> SiTTransformer1DModel:
    """A [`SiTTransformer1DModel`] of random weights in evaluation mode, `TRANSFORMER_CONFIG` with `overrides`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SiTTransformer1DModel(**{**TRANSFORMER_CONFIG, **overrides})
    return randomize_parameters(model, seed).eval()


def seeded_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal draws that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def signal_before(function: Callable, call: int, number: int = signal.SIGTERM) -> Callable:
    """The function, but before its `call`-th call, counted from 1, this process sends itself a signal."""
    calls = []

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    return wrapped


def kill_with_children(pid: int) -> None:
    """Kill a process and all that it has started: torch's elastic agent gives its workers groups of their own."""
    process = psutil.Process(pid)
    for running in [process, *process.children(recursive=True)]:
        try:
            running.kill()
        except psutil.NoSuchProcess:
            pass


def start_and_kill(command: list[str], ready: Callable[[], bool], env: dict[str, str] | None = None) -> None:
    """Start a command, and kill it and all that it started as soon as `ready()`."""
    process = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        if process.poll() is None:
            kill_with_children(process.pid)
        process.wait()
