"""alignkit/alignment.py and the loaders of alignkit/customized.py, on a model of a few thousand parameters."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from alignkit import alignment, concepts, evaluate
from alignkit.alignit import Concept
from alignkit.artifacts import save_lora
from alignkit.attention import context_bank, record_attention, text_layers
from alignkit.customized import (
    Customized,
    cross_attention,
    fingerprint,
    load,
    save_concept,
    save_custom_diffusion,
    save_embeddings,
)
from tests.test_alignit import draw, new_pipe, shake, trace
from tests.tiny import save_tiny_model, tiny_sdxl

NAMES = {"phrase": "<t> dog", "class_noun": "dog"}
SETTINGS = alignment.Settings(num_inference_steps=2)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(tiny_model):
    return new_pipe(tiny_model, torch.float32)


@pytest.fixture
def base(tiny_model):
    return new_pipe(tiny_model, torch.float32)


def with_lora(pipe) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    shake(p for n, p in pipe.unet.named_parameters() if "lora_" in n)


def write(kind: str, pipe, folder):
    """A customised model as its tool writes it. Returns what is passed to `load`."""
    if kind == "lora":
        with_lora(pipe)
        save_lora(folder, pipe.unet)
        return folder
    if kind == "peft":
        model = get_peft_model(pipe.unet, LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_v"]))
        torch.manual_seed(0)
        shake(p for n, p in model.named_parameters() if "lora_" in n)
        model.save_pretrained(folder)
        return folder
    if kind == "kohya":
        with_lora(pipe)
        weights = load_file(save_lora(folder, pipe.unet))
        renamed = {}
        for key, tensor in weights.items():
            name, side = (
                key.removeprefix("unet.").rsplit(".lora", 1) if ".lora." in key else key[5:].rsplit(".lora_", 1)
            )
            down = "A" in side or "down" in side
            layer = "lora_unet_" + name.replace(".processor", "").replace(".", "_")
            renamed[f"{layer}.lora_{'down' if down else 'up'}.weight"] = tensor
            renamed[f"{layer}.alpha"] = torch.tensor(2.0)  # alpha = rank
        save_file(renamed, folder / "kohya.safetensors")
        return folder / "kohya.safetensors"
    if kind == "custom_diffusion":
        shake(getattr(a, part).weight for a in cross_attention(pipe.unet).values() for part in ("to_k", "to_v"))
        save_custom_diffusion(folder, pipe.unet)
        save_embeddings(folder, {"<t>": torch.ones(1, 16)})
        return folder
    if kind == "dreambooth":
        shake(pipe.unet.parameters(), 0.1)
        shake(pipe.text_encoder.parameters(), 0.1)
        pipe.unet.save_pretrained(folder / "unet")
        pipe.text_encoder.save_pretrained(folder / "text_encoder")
        return folder
    if kind == "textual_inversion":
        return save_embeddings(folder, {"<t>": torch.ones(2, 16)})
    learned = concepts.create(kind, pipe, "<t>", "dog")
    shake(learned.module.parameters())
    return learned.save(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind", ["lora", "peft", "kohya", "custom_diffusion", "dreambooth", "textual_inversion", "p_plus", "neti"]
)
def test_what_people_have(kind, dtype, tiny_model, tmp_path):
    """Loaded, it draws another concept; with AlignIT nothing leaks to the other tokens, without it something does."""
    base, pipe = new_pipe(tiny_model, dtype), new_pipe(tiny_model, dtype)
    names = {} if kind in ("p_plus", "neti") else NAMES if kind != "textual_inversion" else NAMES | {"phrase": "<t>"}
    customized = load(pipe, write(kind, new_pipe(tiny_model, torch.float32), tmp_path), **names)
    draw(pipe, "a hat")
    state = trace(pipe)
    records = {arm: alignment.record(arm, base, customized, "a {} on it", SETTINGS) for arm in alignment.ARMS}
    rows = alignment.other_rows(base, customized, "a {} on it")
    assert rows[0] == (0, 0) and len(rows) >= 30
    zero = alignment.leak(records["base"], records["alignit"], rows)
    leaking = alignment.leak(records["base"], records["customised"], rows)
    assert all(value == 0 for side in zero.values() for value in side.values())
    assert all(value > 1e-3 for side in leaking.values() for value in side.values())
    assert trace(pipe) == state


def test_record_is_what_the_layers_do(base):
    """Its maps are softmax attention: of a stock processor's own output, at one layer."""
    x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 40, 16)
    name, attention = next(iter(cross_attention(base.unet).items()))
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(x=args[0], text=kwargs["encoder_hidden_states"])

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    with record_attention(base.unet) as record:
        base.unet(x_t, 5, text)
    handle.remove()
    q, k = attention.to_q(seen["x"]), attention.to_k(seen["text"])
    q, k = attention.head_to_batch_dim(q), attention.head_to_batch_dim(k)
    probabilities = attention.get_attention_scores(q, k).unflatten(0, (2, -1)).mean(1)[-1]  # [hw, S]
    found = record.maps[name]
    torch.testing.assert_close(found.flatten(1).T, probabilities, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(8, 8))
    assert torch.equal(record.keys[name], attention.to_k(text)[-1])
    assert record.calls == 1 and not attention.to_k._forward_hooks


def test_record_sees_a_context_bank(base):
    text = torch.randn(1, 40, 16)
    contexts = torch.randn(1, len(text_layers(base.unet)), 40, 32)
    with context_bank(base.unet), record_attention(base.unet) as record:
        base.unet(torch.randn(1, 4, 8, 8), 5, contexts)
    name, attention = next(iter(cross_attention(base.unet).items()))
    assert torch.equal(record.values[name], attention.to_v(contexts[0, 0, :, 16:]))
    assert text.shape[1] == record.keys[name].shape[0]


def test_manipulation_keeps_the_diagonal(base):
    """Keys and values of the same word are that word in the prompt."""
    images = alignment.manipulation(base, "a {} on it", ["dog", "cat"], SETTINGS, progress=lambda line: None)
    plain = [alignment._sample(base, f"a {word} on it", SETTINGS, 0) for word in ("dog", "cat")]
    assert torch.equal(images[0], plain[0][0]) and torch.equal(images[3], plain[1][0])
    assert not torch.equal(images[1], images[2])


def test_command(tiny_model, pipe, tmp_path, monkeypatch):
    """`alignkit evaluate alignment` from files to pictures."""
    from alignkit.base import load_base

    monkeypatch.setattr("alignkit.base.load_base", lambda name, **own: load_base(tiny_model, random_init=True, **own))
    judge = (lambda images: images.mean((2, 3)), lambda texts: torch.ones(len(texts), 3))
    monkeypatch.setattr(evaluate, "text_image_judge", lambda clip, device: judge)
    folder = tmp_path / "concept"
    with_lora(pipe)
    save_lora(folder, pipe.unet)
    base = load_base(tiny_model, random_init=True)
    save_concept(folder, method="lora", **NAMES, base_model="tiny", base_fingerprint=fingerprint(base.unet))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / "0.png")
    (tmp_path / "prompts.txt").write_text("a {} on it\none {}\n")
    arguments = {"concept": str(folder), "images": str(tmp_path / "images"), "num_inference_steps": 1}
    output = tmp_path / "out"
    scores = evaluate.alignment(prompts=str(tmp_path / "prompts.txt"), output_dir=str(output), **arguments)
    assert scores == json.loads((output / "scores.json").read_text())["scores"]
    assert scores["alignit"]["leak_keys"] == 0 < scores["customised"]["leak_keys"]
    for name in ("images.png", "leak.png", "attention.png"):
        assert Image.open(output / name).size[0] > 16
    (tmp_path / "prompts.txt").write_text("a dog\n")
    with pytest.raises(ValueError, match=r"one \{\} for the concept"):
        evaluate.alignment(prompts=str(tmp_path / "prompts.txt"), **arguments)


def test_command_of_manipulation(tiny_model, base, tmp_path, monkeypatch):
    """A grid: keys from top to bottom, values from left to right, as the library draws them."""
    from alignkit.base import load_base

    monkeypatch.setattr("alignkit.base.load_base", lambda name, **own: load_base(tiny_model, random_init=True, **own))
    file = tmp_path / "out" / "grid.png"
    evaluate.manipulation("a {} on it", ["dog", "cat"], num_inference_steps=2, output=str(file))
    images = alignment.manipulation(base, "a {} on it", ["dog", "cat"], SETTINGS, progress=lambda line: None)
    grid = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    expected = torch.cat([torch.cat(list(images[row : row + 2]), dim=-1) for row in (0, 2)], dim=-2)
    torch.testing.assert_close(grid, expected, rtol=0, atol=0.6 / 255)
    for prompt, source in (("a dog", ["dog", "cat"]), ("a {}", ["dog"])):
        with pytest.raises(ValueError, match="at least two sources"):
            evaluate.manipulation(prompt, source)


def test_what_cannot_be_loaded(pipe, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(pipe, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="pass phrase and class_noun"):
        load(pipe, tmp_path)
    with pytest.raises(ValueError, match="nothing that is known here"):
        load(pipe, tmp_path, **NAMES)
    (tmp_path / "learned_embeds.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle by its name"):
        load(pipe, tmp_path / "learned_embeds.bin", **NAMES)
    save_concept(tmp_path, method="lora", **NAMES, base_model="another", base_fingerprint="0" * 12)
    with pytest.raises(ValueError, match=r"another base model \(another\)"):
        load(pipe, tmp_path)


def test_the_dummy_is_a_text_that_the_concept_was_trained_in(tiny_model, tmp_path):
    pipes = [new_pipe(tiny_model, torch.float32) for _ in range(2)]
    write("lora", new_pipe(tiny_model, torch.float32), tmp_path)
    assert load(new_pipe(tiny_model, torch.float32), tmp_path, **NAMES).concept.dummy == "a photo of {}"
    said = {"method": "lora", **NAMES, "base_model": "tiny", "base_fingerprint": fingerprint(pipes[0].unet)}
    save_concept(tmp_path, **said, dummy="one {} here")
    assert load(pipes[0], tmp_path).concept.dummy == "one {} here"
    assert load(pipes[1], tmp_path, dummy="my {}").concept.dummy == "my {}"


def test_dreambooth_of_sdxl_brings_both_text_encoders(pipe, tmp_path):
    base, own = tiny_sdxl(pipe), tiny_sdxl(pipe)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        shake(getattr(own, name).parameters())
        getattr(own, name).save_pretrained(tmp_path / name)
    loaded = load(base, tmp_path, **NAMES)
    assert loaded.base is base
    for name in ("unet", "text_encoder", "text_encoder_2"):
        got, there = (getattr(p, name).state_dict() for p in (loaded.pipe, own))
        assert all(torch.equal(got[key], tensor) for key, tensor in there.items()), name


def test_a_base_is_known_in_every_precision_and_from_another(pipe):
    said = fingerprint(pipe.unet)
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(pipe.unet).to(dtype)) == said
    assert fingerprint(torch.compile(pipe.unet)) == said
    projection = next(iter(cross_attention(pipe.unet).values())).to_v
    projection.weight.data[0, 0].neg_()
    assert fingerprint(pipe.unet) != said


def test_customized_draws_with_and_without(base, pipe, tmp_path):
    pipe.load_textual_inversion({"<t>": torch.ones(16)})
    customized = Customized(pipe, Concept("<t>", "dog"))
    with customized.plain():
        one = draw(pipe, "a <t>")
    with customized.aligned(strength=0.0):
        two = draw(pipe, "a <t>")
    assert not torch.equal(one, two)
