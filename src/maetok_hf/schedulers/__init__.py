"""Solvers of flow-matching models, and the paths between data and noise."""

from .paths import PATHS, PathCoefficients, path_coefficients
from .scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .scheduling_flow_match_heun import FlowMatchHeunScheduler


__all__ = [
    "PATHS",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchHeunScheduler",
    "PathCoefficients",
    "path_coefficients",
]
