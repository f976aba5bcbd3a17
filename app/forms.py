"""A trainer's form: its settings, their kinds and their help, read from the dataclasses in its file.

Read as text, since the page starts trainers and never imports them; each setting has its help in the string below it,
as everywhere in configs.
"""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.artifacts import load_json
from app import jobs, safety

BASE = "pretrained_model_name_or_path"
# Of all settings, those that a first training needs; all others are in the YAML.
VISIBLE = {
    "alignprop": ["max_train_steps", "train_batch_size", "learning_rate", "lora.rank", "validation_steps", "seed"],
    "controlnetpp": [
        "reward_weight", "reward_start", "max_train_steps", "train_batch_size", "learning_rate", "validation_steps",
        "seed",
    ],
    "neti": [
        "placeholder_token", "super_category_token", "method", "max_train_steps", "learning_rate", "validation_steps",
    ],
    "customize": [
        "placeholder_token", "class_noun", "method", "max_train_steps", "learning_rate", "validation_steps",
    ],
}  # fmt: skip
# what a base says: its index its pipeline, and the U-Net of Stable Diffusion's how wide its text is
FAMILIES = {
    "StableDiffusionXLPipeline": "sdxl", "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux",
    768: "sd15", 1024: "sd21",
}  # fmt: skip
DATA_KEY = {
    "alignprop": "prompt_file",
    "controlnetpp": "train_data_dir",
    "neti": "train_data_dir",
    "customize": "instance_data_dir",
}


@dataclass(frozen=True)
class Setting:
    """kind: int, float, str, bool or choice."""

    key: str
    kind: str
    help: str
    choices: tuple[str, ...] = ()
    default: Any = None


@functools.cache
def settings(method: str) -> dict[str, Setting]:
    """All of a trainer's settings by dotted key, but for its lists and free blocks."""
    files = [*sorted((jobs.ROOT / "alignkit").glob("*.py")), jobs.ROOT / "training" / f"{method}.py"]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    return _of_class(classes["Config"], classes)


def _of_class(node: ast.ClassDef, classes: dict[str, ast.ClassDef], prefix: str = "") -> dict[str, Setting]:
    found = {}
    for base in reversed(node.bases):
        found |= _of_class(classes[ast.unparse(base)], classes, prefix) if ast.unparse(base) in classes else {}
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        key, kind, choices = f"{prefix}{field.target.id}", ast.unparse(field.annotation), ()
        if kind in classes:
            found |= _of_class(classes[kind], classes, f"{key}.")
            continue
        if kind.startswith("Literal["):
            choices, kind = ast.literal_eval(f"({kind[8:-1]},)"), "choice"
        kind = kind.removesuffix(" | None")
        if kind in ("int", "float", "str", "bool", "choice"):
            documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            text = " ".join(str(below.value.value).split()) if documented else ""
            found[key] = Setting(key, kind, text, choices, _default(field.value))
    return found


def _default(value: ast.expr | None) -> Any:
    """Of `name: int = 4` and of `name: int = free(4)`."""
    if isinstance(value, ast.Call):
        value = value.args[0] if value.args else None
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def visible(method: str) -> list[Setting]:
    return [settings(method)[key] for key in (BASE, *VISIBLE[method])]


def values(method: str, config: str) -> list[Any]:
    """Of the visible settings in a YAML, or their defaults."""
    data = safety.read_config(config)
    return [_get(data, setting.key, setting.default) for setting in visible(method)]


def _get(data: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return default
        data = data[part]
    return data


def filled(method: str, config: str, given: list[Any]) -> str:
    """The YAML with the visible settings as the form has them; untouched where they say the same."""
    now = values(method, config)
    kinds = {"int": int, "float": float}
    changed = {}
    for setting, old, new in zip(visible(method), now, given, strict=True):
        if new is not None and setting.kind in kinds:
            new = kinds[setting.kind](new)
        if new != old and new is not None:
            changed[setting.key] = new
    return jobs.set_values(config, changed) if changed else config


def presets(method: str, base: str, place: str) -> dict[str, str]:
    """Name -> YAML of the configs for a base of the page, whose own are at `place`: a folder, a Hub name, or "emoji".

    A Hub name that no config has may be of any family but the emoji world's; so may a folder that does not say it, and
    a file.
    """
    found = jobs.presets(method)
    family = _family(place)
    own = [name for name in found if family and name.startswith(family)]
    own = own or [name for name, text in found.items() if safety.read_config(text).get(BASE) == place]
    others = [name for name in found if not name.startswith("emoji")]
    own = own or sorted(others, key=lambda name: not name.startswith("sd15"))
    return {name: jobs.set_values(found[name], {BASE: base}) for name in own}


def _family(base: str) -> str | None:
    """As the names of configs begin."""
    if base == "emoji":
        return "emoji"
    for file, key in (("model_index.json", "_class_name"), ("unet/config.json", "cross_attention_dim")):
        try:
            said = load_json(Path(base) / file).get(key)
            if said in FAMILIES:
                return FAMILIES[said]
        except (ValueError, AttributeError, TypeError):
            continue
    return None


def about(config: str) -> str:
    """The first sentence of a config's comment."""
    lines = []
    for line in config.splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return " ".join(lines).partition(". ")[0].rstrip(".") + "."
