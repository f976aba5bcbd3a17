"""README's table of what works on what, cell by cell: "yes" trains a step or draws, "no" is refused in a sentence.

On random weights of the published architectures, one layer where those have many, at a fortieth of their widths. The
first column is walked by tests/test_families.py.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from alignkit.alignit import Concept, alignit
from alignkit.base import load_base
from alignkit.concepts import create
from alignkit.conditions import ConditionConfig
from alignkit.config import LoraConfig
from alignkit.rewards import RewardConfig
from alignkit.run import Run
from tests.test_controlnet_families import BLOCKS
from tests.test_controls import write_folder
from tests.test_families import SHRINK, thin
from tests.what_works import BASES, table
from training import controlnetpp, customize, ddpo, neti

TABLE = table()
TRAINERS = {
    "DDPO": ddpo,
    "ControlNet++": controlnetpp,
    "NeTI, Textual Inversion, P+": neti,
    "customisers": customize,
}


def cells(*methods: str):
    return pytest.mark.parametrize(
        ("method", "base"), [(method, base) for method in methods for base in TABLE[method]], ids=str
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    names = [name for name in BASES.values() if name != "emoji"]
    folders = {name: thin(name, tmp_path_factory.mktemp(name), **BLOCKS.get(name, {})) for name in names}
    return {"emoji": "emoji"} | folders


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Of a concept."""
    folder = tmp_path_factory.mktemp("images")
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20).convert("RGB").save(folder / "0.png")
    return str(folder)


@pytest.fixture(scope="module")
def controls(tmp_path_factory) -> str:
    """With a control each."""
    folder = tmp_path_factory.mktemp("controls")
    write_folder(folder, number=2, size=(32, 32))
    return str(folder)


def test_the_table_has_every_base_and_method():
    assert TABLE.keys() == {"AlignProp and its relatives", *TRAINERS, "AlignIT"}
    assert all(list(column) == list(BASES.values()) for column in TABLE.values())
    assert {cell for column in TABLE.values() for cell in column.values()} == {"yes", "no", "rows", "LoRA"}
    assert set(TABLE["AlignProp and its relatives"].values()) == {"yes"}  # which tests/test_families.py walks


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("a\na dog\n")
    return str(file)


@pytest.fixture
def build(images, controls, prompts, tmp_path):
    """Makes the config of a dry run of a method's trainer."""
    own = {
        "DDPO": {
            "prompt_file": prompts,
            "rewards": [RewardConfig("tests.toy_rewards:Detached")],
            "lora": LoraConfig(rank=2),
            "train_batch_size": 2,  # one sample has no advantage over others
            "num_inference_steps": 2,
            "num_validation_images": 1,
        },
        "ControlNet++": {
            "train_data_dir": controls,
            "condition": ConditionConfig("tests.toy_conditions:Red"),
            "reward_weight": 1.0,
            "reward_timesteps": [0, 999],
            "num_validation_images": 1,
            "num_inference_steps": 1,
        },
        "NeTI, Textual Inversion, P+": {
            "train_data_dir": images,
            "super_category_token": "a",
            "mapper": neti.MapperConfig(hidden_size=8, num_frequencies=8),
        },
        "customisers": {
            "instance_data_dir": images,
            "class_noun": "a",
            "with_prior_preservation": False,
            "lora": LoraConfig(rank=2),
            "num_validation_images": 1,
            "num_inference_steps": 1,
        },
    }

    def build(method, **fields):
        return TRAINERS[method].Config(
            output_dir=str(tmp_path / "run"), resolution=32, max_train_steps=1, validation_steps=0, dry_run=True,
            report_to="none", **{"train_batch_size": 1} | own[method] | fields,
        )  # fmt: skip

    return build


@pytest.fixture
def norms(monkeypatch) -> list[float]:
    """Of the gradients of all updates."""
    norms, update = [], Run.update
    monkeypatch.setattr(Run, "update", lambda run: norms.append(update(run)) or norms[-1])
    return norms


def dry_run(method: str, cfg) -> None:
    with pytest.raises(SystemExit) as end:
        TRAINERS[method].train(cfg)
    assert not end.value.code


@cells(*TRAINERS)
def test_trainers(method, base, folders, build, norms):
    """One update of a dry run has a gradient, and one that is finite; what is refused is so before any step."""
    cfg = build(method, pretrained_model_name_or_path=folders[base], random_init=True, shrink=SHRINK)
    if TABLE[method][base] == "no":
        with pytest.raises(ValueError, match="; this works on SD 1.x, SD 2.x|work with SD 1.x, SD 2.x and SDXL"):
            TRAINERS[method].train(cfg)
        assert not norms
        return
    if TABLE[method][base] == "LoRA":
        for other in ("custom_diffusion", "dreambooth"):
            with pytest.raises(ValueError, match="is of the family SDXL; this works on SD 1.x"):
                TRAINERS[method].train(replace(cfg, method=other))
    else:
        assert TABLE[method][base] == "yes"
    dry_run(method, cfg)
    assert len(norms) == 1 and 0 < norms[0] < float("inf")


@pytest.mark.parametrize("method", sorted(TRAINERS.keys() - {"customisers"}))
def test_trainers_on_a_quantised_base(method, folders, build, norms, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    base = load_base(folders["sd15"], random_init=True, shrink=SHRINK)
    base.pipeline().save_pretrained(tmp_path / "base")
    ControlNetModel.from_unet(base.unet).save_pretrained(tmp_path / "controlnet")
    own = {"controlnet_model_name_or_path": str(tmp_path / "controlnet")} if method == "ControlNet++" else {}
    seen = {}
    monkeypatch.setattr("alignkit.run.load_base", lambda *args, **kw: seen.setdefault("base", load_base(*args, **kw)))
    dry_run(method, build(method, pretrained_model_name_or_path=str(tmp_path / "base"), quantization="int8", **own))
    weights = [m.weight for name, m in seen["base"].network.named_modules() if name.endswith("ff.net.2")]
    assert weights and all(hasattr(weight, "dequantize") and weight.dtype == torch.float32 for weight in weights)
    assert len(norms) == 1 and 0 < norms[0] < float("inf")


def test_what_needs_the_bases_own_weights_takes_no_rounded_ones(build):
    with pytest.raises(ValueError, match="quantization nf4: expected controlnet_model_name_or_path"):
        build("ControlNet++", quantization="nf4")
    with pytest.raises(ValueError, match="quantization: expected 'no', as a concept belongs to the weights"):
        build("customisers", quantization="int8")


@cells("AlignIT")
def test_alignit(method, base, folders):
    """A concept draws another picture than its noun: by every layer's keys and values, or by the rows that enter."""
    load = {"random_init": True, "shrink": SHRINK}
    model = load_base(folders[base], **load)
    pipe, settings = model.pipeline(), {}
    if TABLE[method][base] == "yes":
        learned = create("textual_inversion", model, "<x>", "a")
        move(learned.module)
        concept = Concept("<x>", "a", learned=learned)
    else:
        assert TABLE[method][base] == "rows"
        custom = load_base(folders[base], **load).pipeline()
        custom.register_modules(transformer=pipe.transformer)
        for name, part in custom.components.items():
            if name.startswith("text_encoder"):
                move(part)
        settings = {"mode": "input", "custom": custom}
        concept = Concept("x", "a")
        with pytest.raises(ValueError, match="in joint attention.*Supported are"), alignit(pipe, [concept]):
            pass

    def draw(prompt: str) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, num_inference_steps=1, height=32, width=32, generator=generator, output_type="pt").images

    noun = draw("one a here")
    with alignit(pipe, [concept], **settings):
        drawn = draw(f"one {concept.phrase} here")
    assert drawn.isfinite().all() and (drawn - noun).abs().max() > 1e-5
    assert torch.equal(draw("one a here"), noun)


def move(module: torch.nn.Module) -> None:
    """As after some training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
