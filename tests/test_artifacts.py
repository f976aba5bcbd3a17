import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from alignkit.artifacts import (
    LICENSES,
    LORA_WEIGHTS,
    atomic,
    load_json,
    load_lora,
    load_tensors,
    plot_curves,
    push_to_hub,
    read_events,
    read_metadata,
    remove,
    save_json,
    save_lora,
    save_tensors,
    write_card,
)
from alignkit.base import add_lora, load_base
from alignkit.emoji.measure import world_hash

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def base():
    """Stable Diffusion 1.5 at a fortieth of its widths, the same weights each time."""
    return load_base("sd15", random_init=True, shrink=40)


def test_a_folder_that_peft_wrote(base, tmp_path):
    """Alpha, and ranks and alphas by layer, come from the config beside the weights."""
    plain = forward(base.unet)
    patterns = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1}}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_q"], init_lora_weights=False, **patterns)
    model = get_peft_model(base.unet, config)
    expected = forward(base.unet)
    model.save_pretrained(tmp_path)

    fresh = load_base("sd15", random_init=True, shrink=40)
    load_lora(fresh.unet, tmp_path)
    assert torch.equal(forward(fresh.unet), expected) and not torch.allclose(plain, expected)
    unet = load_base("sd15", random_init=True, shrink=40).unet
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(ValueError, match="expected LORA"):
        load_lora(unet, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load_lora(unet, tmp_path)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def forward(unet):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    width = unet.config.cross_attention_dim
    context = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.tensor([10, 500]), context).sample


def train_lora(base, rank=4, alpha=8.0, targets=TARGETS):
    """A LoRA with alpha twice its rank and up-projections that are not zero."""
    params = add_lora(base.unet, rank, alpha, targets)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in params.items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return base


@pytest.fixture
def saved(base, tmp_path):
    """The file of a trained LoRA and what its U-Net predicts; the base's own prediction differs."""
    plain = forward(base.unet)
    unet = train_lora(base).unet
    assert (forward(unet) - plain).abs().max() > 1e-2
    return save_lora(tmp_path / "lora", unet, metadata={"base_model": "sd15"}), forward(unet), plain


def fresh_pipe():
    return load_base("sd15", random_init=True, shrink=40).pipeline()


def stock_folder(pipe, path):
    pipe.load_lora_weights(path.parent)


def stock_state_dict(pipe, path):
    pipe.load_lora_weights(load_file(path))


def ours(pipe, path):
    load_lora(pipe, path.parent)


def ours_on_the_unet(pipe, path):
    load_lora(pipe.unet, path)


@pytest.mark.parametrize("load", [stock_folder, stock_state_dict, ours, ours_on_the_unet])
def test_every_reader_gets_the_same_unet(saved, load):
    """Alpha is twice the rank: a reader that took another alpha would be off by half of the LoRA's effect."""
    path, expected, plain = saved
    pipe = fresh_pipe()
    assert isinstance(pipe, StableDiffusionPipeline)
    load(pipe, path)
    torch.testing.assert_close(forward(pipe.unet), expected, rtol=0, atol=1e-6)
    pipe.unload_lora_weights()
    torch.testing.assert_close(forward(pipe.unet), plain, rtol=0, atol=0)


def test_classic_names_and_metadata(saved):
    weights = load_file(saved[0])
    assert all(key.startswith("unet.") and key.endswith(("lora.down.weight", "lora.up.weight")) for key in weights)
    assert len(weights) == 2 * 16 * 2 * 4  # 16 transformers x 2 attentions x 4 projections, down and up
    assert read_metadata(saved[0]) == {"format": "pt", "base_model": "sd15"}


def test_weight_scales_the_update(saved):
    """Half of the update B A: the same as a LoRA of half alpha."""
    path, _, _ = saved
    pipe = fresh_pipe()
    load_lora(pipe, path, "a", weight=0.5)
    half = train_lora(load_base("sd15", random_init=True, shrink=40), alpha=4.0)
    torch.testing.assert_close(forward(pipe.unet), forward(half.unet), rtol=0, atol=1e-6)
    assert pipe.get_active_adapters() == ["a"]
    load_lora(pipe, path, "b")
    assert pipe.get_active_adapters() == ["b"]
    with pytest.raises(ValueError, match="adapter 'a' is already loaded"):
        load_lora(pipe, path, "a")


def test_alpha_of_a_stock_file_is_kept(base, tmp_path):
    """diffusers' own scripts leave alpha to the header: it must not get lost."""
    unet = train_lora(base).unet
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    pipe = fresh_pipe()
    load_lora(pipe, tmp_path)
    torch.testing.assert_close(forward(pipe.unet), forward(unet), rtol=0, atol=1e-6)


def test_alpha_of_a_kohya_file_is_kept(saved, tmp_path):
    """There `alpha` is a tensor beside the factors, which are divided by alpha / rank = 3 here."""
    path, expected, _ = saved
    weights = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.removeprefix("unet.").removesuffix(".weight").rpartition(".lora.")
        name = "lora_unet_" + name.replace(".", "_")
        weights[f"{name}.lora_{part}.weight"] = tensor / 3 if part == "up" else tensor
        weights[f"{name}.alpha"] = torch.tensor(12.0)
    save_file(weights, tmp_path / "kohya.safetensors")
    pipe = fresh_pipe()
    load_lora(pipe, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(forward(pipe.unet), expected, rtol=0, atol=1e-6)


def changed(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def rename(weights):
    key = next(key for key in weights if "to_k" in key)
    weights[key.replace("to_k", "to_kk")] = weights.pop(key)


def halve(weights):
    key = next(key for key in weights if "up.weight" in key)
    weights[key] = weights[key][: len(weights[key]) // 2].clone()


def drop(weights):
    del weights[next(key for key in weights if "up.weight" in key)]


def text_encoder(weights):
    weights["text_encoder.encoder.layers.0.self_attn.q_proj.lora.down.weight"] = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"no layer .*to_kk; the nearest is .*to_k"),
        (halve, r"expected .* of \[out, in\] = \[8, \d+\], got \[4, \d+\]"),
        (drop, r"incomplete: expected lora_A and lora_B of"),
        (text_encoder, r"expected LoRA keys of a unet \(unet.…\), got text_encoder"),
        (dict.clear, r"holds no LoRA weights"),
    ],
)
def test_load_is_strict(saved, change, message):
    path, _, plain = saved
    changed(path, change)
    pipe = fresh_pipe()
    with pytest.raises(ValueError, match=message):
        load_lora(pipe, path)
    torch.testing.assert_close(forward(pipe.unet), plain, rtol=0, atol=0)
    assert not getattr(pipe.unet, "peft_config", {})


def test_lora_of_another_base(saved):
    wider = load_base("sd15", random_init=True, shrink=20)
    with pytest.raises(ValueError, match=r"does not fit this base model: expected .* got .*Load the base it was made"):
        load_lora(wider.unet, saved[0])


def test_a_lora_of_a_base_in_4_bits(saved):
    """Whose weights are packed, [n, 1]: what is loaded draws about what it draws on the whole one."""
    quantized = pytest.importorskip("bitsandbytes").nn
    path, expected, plain = saved
    unet = fresh_pipe().unet
    for name in [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)]:
        layer = unet.get_submodule(name)
        packed = quantized.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        packed.weight = quantized.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        packed.bias = layer.bias
        unet.set_submodule(name, packed.to("cpu"))
    load_lora(unet, path)
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.base_layer.weight.dtype == torch.uint8
    got = forward(unet)
    assert (got - expected).abs().mean() < (got - plain).abs().mean() / 2


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt", "LORA.PKL"])
def test_pickles_are_refused_by_name(base, tmp_path, name):
    torch.save({}, tmp_path / name)
    with pytest.raises(ValueError, match="is a pickle by its name"):
        load_lora(base.unet, tmp_path / name)


def test_damaged_or_missing_files(saved):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        load_lora(fresh_pipe(), path)
    with pytest.raises(ValueError, match="does not exist"):
        load_lora(fresh_pipe(), path.parent / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="missing or damaged"):
        load_json(path)


def test_only_what_exists_is_saved(base, tmp_path):
    with pytest.raises(ValueError, match=r"no adapter 'default' to save; there are: \[\]"):
        save_lora(tmp_path, base.unet)


def test_nothing_that_is_not_finite_is_saved(base, tmp_path):
    parameter = next(iter(add_lora(base.unet, 4, 4, TARGETS).values()))
    parameter.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite: unet.*lora"):
        save_lora(tmp_path, base.unet)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError):
        save_json({"a": float("inf")}, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_atomic_shows_all_or_nothing(tmp_path):
    path = tmp_path / "folder" / "file"
    save_json([1], path)
    with pytest.raises(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert load_json(path) == [1]
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    with atomic(tmp_path / "new") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "a").read_text() == "a"
    (tmp_path / ".tmp-new").mkdir()  # of a removal that was killed
    (tmp_path / ".tmp-new" / "b").touch()
    remove(tmp_path / "new")
    remove(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")])
def test_full_disk_is_one_clear_error(tmp_path, error):
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    message = "no space left to write .*a.safetensors .*MiB free.*intact: free some"
    with pytest.raises(OSError, match=message) as caught, atomic(tmp_path / "a.safetensors") as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert load_tensors(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1


EVENTS = [{"type": "start", "step": 0}] + [
    {"type": "scalars", "step": step, "time": 0.0, "loss": 1 / (step + 1), "reward": None if step else 1.0, "lr": 1e-3}
    for step in range(5)
]


def test_read_events_passes_over_an_unfinished_line(tmp_path):
    path = tmp_path / "events.jsonl"
    assert read_events(path) == []
    path.write_text("".join(json.dumps(event) + "\n" for event in EVENTS) + '{"type": "sca')
    assert read_events(path) == EVENTS


def test_curves(tmp_path):
    plot_curves(EVENTS, tmp_path / "curves.png")
    image = Image.open(tmp_path / "curves.png")
    assert image.size == (1200, 260) and len(image.convert("L").getcolors()) > 10
    by_k = [{"type": "scalars", "step": i, "time": 0.0, "grad_norm": 0.1 * i, "k": i % 3 + 1} for i in range(1, 9)]
    plot_curves(by_k, tmp_path / "by_k.png")  # grad_norm and k over the steps, and grad_norm over k
    assert Image.open(tmp_path / "by_k.png").size == (1200, 260)
    plot_curves([{**event, "k": None} for event in by_k], tmp_path / "alone.png")
    assert Image.open(tmp_path / "alone.png").size == (400, 260)
    with pytest.raises(ValueError, match="no scalars"):
        plot_curves(EVENTS[:1], tmp_path / "none.png")


def test_card_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    picture = tmp_path / "grid.png"
    Image.new("RGB", (4, 4)).save(picture)
    path = write_card(
        tmp_path / "lora",
        title="A LoRA",
        description="Trained.",
        base_model="emoji",
        config={"learning_rate": 1e-5, "lora": {"rank": 4}},
        events=EVENTS,
        pictures=[picture],
        tags=["lora"],
        license="apache-2.0",
    )
    card = ModelCard.load(path)
    assert card.data.base_model is None and card.data.license == "apache-2.0"  # the Hub has no "emoji"
    assert {"lora", "alignkit", "text-to-image"} <= set(card.data.tags)
    assert "learning_rate: 1.0e-05" in card.text and "torch " in card.text
    assert f"emoji world {world_hash()}" in card.text  # another version of its weights is another base
    for name in ("grid.png", "curves.png"):
        assert f"({name})" in card.text and (path.parent / name).is_file()
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "curves.png", "grid.png"]


def test_the_card_takes_the_bases_licence_from_its_folder_and_names_no_folder(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: openrail++\n---\n# A base\n")
    fields = {"title": "A word", "description": "Trained.", "config": {}, "instance_prompt": "a qx cat"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    shutil.copytree("base", "my/base")
    for folder in ("my/base", str(tmp_path / "base")):
        card = ModelCard.load(write_card(tmp_path / "one", base_model=folder, **fields))
        assert card.data.base_model is None
    assert card.data.license == "openrail++" and card.data.to_dict()["instance_prompt"] == "a qx cat"
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    card = ModelCard.load(write_card(tmp_path / "two", base_model="owner/name", **fields))
    assert card.data.license is None and card.data.base_model == "owner/name"
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    card = ModelCard.load(write_card(tmp_path / "two", base_model=base, **fields))
    assert card.data.license == "openrail++" and card.data.base_model == base


def test_the_licence_of_every_base_that_a_config_names_is_known():
    configs = [yaml.safe_load(path.read_text()) for path in CONFIGS.rglob("*.yaml")]
    assert {config["pretrained_model_name_or_path"] for config in configs} - {"emoji"} == LICENSES.keys()


class FakeHub:
    """In the place of HfApi: what would be uploaded, by the client's own rules."""

    pushed: dict[str, list[str]] = {}

    def create_repo(self, repo_id, repo_type, exist_ok):
        if "offline" in repo_id:
            raise RuntimeError("no route to host")
        return RepoUrl(f"https://huggingface.co/{'' if '/' in repo_id else 'me/'}{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        self.pushed[repo_id] = sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))


def test_push_to_hub_uploads_the_artifact_and_nothing_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    kept = ["README.md", "config.yaml", "curves.png", LORA_WEIGHTS, "unet/config.json"]
    other = ["checkpoint-10/state.json", ".lock", "events.jsonl", "samples/000000_base.png", "class_images/0000.png",
             "steps/10/mapper.safetensors", ".tmp-checkpoint-11/state.json", "toy/events.out.tfevents"]  # fmt: skip
    for name in (*kept, *other):
        (tmp_path / "my_lora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_lora" / name).write_text("")
    assert push_to_hub(tmp_path / "my_lora", ignore=["toy/**"]) == "https://huggingface.co/me/my_lora"
    assert push_to_hub(tmp_path / "my_lora", "you/other") == "https://huggingface.co/you/other"
    assert FakeHub.pushed["me/my_lora"] == sorted(kept)
    with pytest.raises(OSError, match="my_lora is finished, but could not be pushed.*no route to host"):
        push_to_hub(tmp_path / "my_lora", "offline")


def test_lora_file_has_the_usual_name():
    assert LORA_WEIGHTS == "pytorch_lora_weights.safetensors"
