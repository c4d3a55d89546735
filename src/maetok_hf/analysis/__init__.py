"""What the latents of a tokenizer are like, measured with a stated protocol."""

from .latents import collect_latents
from .linear_probe import LinearProbe, fit_linear_probe


__all__ = ["LinearProbe", "collect_latents", "fit_linear_probe"]
