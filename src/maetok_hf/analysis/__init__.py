"""What the latents of a tokenizer are like, measured with a stated protocol."""

from .curve import MixtureCurve, MixtureSettings, mixture_curve
from .latents import collect_latents
from .linear_probe import LinearProbe, fit_linear_probe
from .mixture import GaussianMixture, MixtureFit, draw_mixture, fit_mixture
from .principal_components import PrincipalComponents, fit_principal_components
from .spectrum import ChannelStatistics, channel_statistics, effective_rank


__all__ = [
    "ChannelStatistics",
    "GaussianMixture",
    "LinearProbe",
    "MixtureCurve",
    "MixtureFit",
    "MixtureSettings",
    "PrincipalComponents",
    "channel_statistics",
    "collect_latents",
    "draw_mixture",
    "effective_rank",
    "fit_linear_probe",
    "fit_mixture",
    "fit_principal_components",
    "mixture_curve",
]
