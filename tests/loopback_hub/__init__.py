"""A Hub on the loopback interface, in memory: repositories that the real clients create, fill and load from.

It speaks what huggingface_hub, diffusers, datasets and peft ask with `HF_HUB_DISABLE_XET=1` (LFS instead of Xet), and
fails on demand. It proves our side of an exchange, not how the real Hub behaves.
"""

from .cards import check_card
from .clients import connect_clients, without_waiting
from .faults import QUOTA_MESSAGE
from .repositories import Repository
from .server import serve_folder, serve_hub
from .state import READ_TOKEN, TOKEN, USER, LoopbackHub


__all__ = [
    "QUOTA_MESSAGE",
    "READ_TOKEN",
    "TOKEN",
    "USER",
    "LoopbackHub",
    "Repository",
    "check_card",
    "connect_clients",
    "serve_folder",
    "serve_hub",
    "without_waiting",
]
