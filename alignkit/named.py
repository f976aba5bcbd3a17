"""What a config names: one of ours by a short name, one's own by `package.module:Class`."""

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

from alignkit.emoji import role

T = TypeVar("T")


def build_named(name: str, table: Mapping[str, str], parent: type[T], args: Mapping[str, Any]) -> T:
    """An object of the class that `table` has under `name`, or of the class `package.module:Class`, made with `args`.

    Raises:
        ValueError: no such name or module, not a subclass of `parent`, arguments that its class does not take, or
            weights of another shape than its model's.
        FileNotFoundError: a model that `args` or the class's defaults name is neither here nor to be had from the Hub.
    """
    path = table.get(name, name)
    if ":" not in path:
        nearest = difflib.get_close_matches(name, table, n=1, cutoff=0)[0]
        raise ValueError(
            f"expected one of {', '.join(table)} or package.module:Class, got {name!r}; the nearest is {nearest!r}."
        )
    module_name, _, class_name = path.partition(":")
    # One's own class may lie in the folder that a script of training/ is launched from.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        cls = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"expected {module_name!r} of {path!r} to be importable from {os.getcwd()}: {error}."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, parent)):
        known = f"{parent.__module__.rpartition(chr(46))[0]}.{parent.__name__}"  # where its package exports it
        raise ValueError(f"expected {path!r} to be a subclass of {known}, got {cls!r}.")
    try:
        return cls(**args)
    except TypeError as error:
        raise ValueError(f"{name}: could not be built from args {dict(args)}: {error}.") from error
    except RuntimeError as error:  # torch's, transformers' and the Hub mixin's for weights that do not fit
        if "mismatch" not in str(error) and "Missing key" not in str(error):
            raise
        raise ValueError(f"{name}: the weights named by {dict(args)} do not fit its model: {error}") from error
    except OSError as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: {said} Its args name a folder, a file, or a model of the Hub, which needs a network or `hf "
            "download OWNER/NAME` before, in safetensors (`alignkit convert checkpoint` rewrites a pickle). "
            "To try a config without it, name another one on the command line."
        ) from error


def refuse_judges(name: str, args: Mapping[str, Any], *roles: str) -> None:
    """Raises ValueError where an argument names a judge of the emoji world that has one of these roles."""
    for value in args.values():
        if isinstance(value, str) and role(value) in roles:
            raise ValueError(
                f"{name}: {value} is a judge of the {role(value)}. The training's are for what is optimised, the "
                "monitor's for what is watched meanwhile, the evaluator's and the identity's for what is reported."
            )
