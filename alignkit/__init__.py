"""alignkit: aligning text-to-image diffusion models, built on diffusers.

Importing it costs nothing: the names below, and torch with them, are loaded when they are first used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "Base": "base",
    "add_lora": "base",
    "load_base": "base",
    "NoiseSchedule": "noise",
    "PLANS": "sampling",
    "guided": "sampling",
    "sample": "sampling",
    "load_lora": "artifacts",
    "save_lora": "artifacts",
    "build_reward": "rewards",
    "compose": "composed",
    "read_settings": "pictures",
}
__all__ = ["__version__", "concepts", *_HOME]


def __getattr__(name: str):
    if name == "concepts":
        return import_module("alignkit.concepts")
    if name not in _HOME:
        raise AttributeError(f"module 'alignkit' has no attribute {name!r}")
    return getattr(import_module(f"alignkit.{_HOME[name]}"), name)


def __dir__():
    return sorted(__all__)
