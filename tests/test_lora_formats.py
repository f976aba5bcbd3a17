"""LoRA files in diffusers' and kohya's names: the same updates of the same weights, as stock diffusers reads them."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from alignkit.artifacts import LORA_WEIGHTS, load_lora, save_lora
from alignkit.base import add_lora, load_base
from alignkit.cli import main
from alignkit.lora_formats import PARTS, _kohya_layers, _network_of, _text_name, convert_lora
from tests.test_families import thin

ENDS = {
    "unet": (
        "attn2.to_q",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "attentions.0.proj_in",
        "resnets.0.conv1",
        "resnets.0.conv2",
        "time_emb_proj",
        "conv_shortcut",
        "samplers.0.conv",
        "conv_in",
        "conv_out",
        "embedding.linear_1",
        "embedding.linear_2",
    ),
    "transformer": ("attn.to_q", "attn.to_v", "attn.to_out.0", "add_k_proj", "ff.net.2", "norm1_context.linear"),
    "text": ("q_proj", "out_proj", "mlp.fc1"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Configs of one layer where the models have many, at a fortieth of their widths."""
    folders = {name: thin(name, tmp_path_factory.mktemp(name)) for name in ("sd15", "sd21", "sdxl", "sd3")}
    # Stock diffusers reads the single blocks of FLUX at their published width alone: they have a test of their own.
    folders["flux"] = thin("flux", tmp_path_factory.mktemp("flux"), num_single_layers=0)
    for name in ("sd15", "sd21", "sdxl", "flux"):
        pipe = load_base(folders[name], random_init=True, shrink=40).pipe
        for part, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                save = model.config.save_pretrained if part.startswith("text_encoder") else model.save_config
                save(f"{folders[name]}/{part}")
    return folders


def pipeline(folder: str):
    return load_base(folder, random_init=True).pipeline()


def parts_of(pipe) -> dict[str, torch.nn.Module]:
    parts = {part: getattr(pipe, part, None) for part in PARTS}
    return {part: model for part, model in parts.items() if model is not None and not isinstance(model, T5EncoderModel)}


def write_lora(pipe, folder, alpha: float | None = None) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 of U-Net and text encoders in diffusers' names; the updates that it means, by layer.

    With `alpha` in the header, as diffusers writes it; folded otherwise.
    """
    generator, tensors, updates, header = torch.Generator().manual_seed(0), {}, {}, {}
    for part, model in parts_of(pipe).items():
        ends = ENDS.get(part, ENDS["text"])
        for name, module in model.named_modules():
            if not name.endswith(ends) or getattr(module, "weight", None) is None:
                continue
            weight = module.weight
            down = torch.randn(2, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=generator)
            classic = name if part in ENDS or name.startswith("text_model.") else f"text_model.{name}"
            lora = "lora" if part in ENDS else "lora_linear_layer"
            tensors |= {f"{part}.{classic}.{lora}.down.weight": down, f"{part}.{classic}.{lora}.up.weight": up}
            updates[f"{part}.{classic}"] = (alpha or 2) / 2 * (up.flatten(1) @ down.flatten(1))
        header |= {f"{part}.r": 2, f"{part}.lora_alpha": alpha}
    folder.mkdir(exist_ok=True)
    metadata = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(header)} if alpha else {})
    save_file(tensors, folder / LORA_WEIGHTS, metadata)
    return updates


def updates_of(pipe) -> dict[str, torch.Tensor]:
    """What the loaded adapter adds to each weight."""
    found = {}
    for part, model in parts_of(pipe).items():
        for name, module in model.named_modules():
            for adapter, down in getattr(module, "lora_A", {}).items():
                name = name if part in ENDS or name.startswith("text_model.") else f"text_model.{name}"
                up = module.lora_B[adapter].weight.flatten(1)
                found[f"{part}.{name}"] = module.scaling[adapter] * up @ down.weight.flatten(1)
    return found


def assert_updates(one, two) -> None:
    assert one.keys() == two.keys() and one
    for name, update in one.items():
        torch.testing.assert_close(update, two[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "flux"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_stock_diffusers_reads_the_same_updates_from_kohyas_names_and_back(name, alpha, folders, tmp_path):
    pipe = pipeline(folders[name])
    expected = write_lora(pipe, tmp_path / "lora", alpha)
    assert {layer.partition(".")[0] for layer in expected} == parts_of(pipe).keys()
    kohya = convert_lora(tmp_path / "lora", tmp_path / "kohya.safetensors", "kohya", folders[name])
    tensors = load_file(kohya)
    layers = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    assert {float(tensors[f"{key}.alpha"]) / len(tensors[f"{key}.lora_down.weight"]) for key in layers} == {
        (alpha or 2.0) / 2
    }
    pipe.load_lora_weights(kohya)
    found = updates_of(pipe)
    for layer in found.keys() - expected.keys():  # beside queries and values, of which there is an update, the keys
        assert name == "flux" and not found.pop(layer).any()
    assert_updates(found, expected)

    pipe.unload_lora_weights()
    back = convert_lora(kohya, tmp_path / "back", "diffusers", folders[name])
    assert back == tmp_path / "back" / LORA_WEIGHTS
    pipe.load_lora_weights(tmp_path / "back")
    assert_updates(updates_of(pipe), expected)
    if alpha is None and name != "flux":  # nothing was folded, and not a bit has changed (flux's keys are lora_A)
        original = load_file(tmp_path / "lora" / LORA_WEIGHTS)
        assert original.keys() == load_file(back).keys()
        assert all(torch.equal(tensor, original[key]) for key, tensor in load_file(back).items())


def test_the_strength_is_what_pefts_config_in_the_header_says(folders, tmp_path):
    """Of a rank-stabilised LoRA alpha / sqrt(rank), and a pattern holds for every name that ends in it."""
    pipe = pipeline(folders["sd15"])
    pattern = {"to_q": 3.0, ".*down_blocks.*to_k": 5.0}
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, alpha_pattern=pattern, target_modules=["to_q", "to_k", "to_v"]
    )
    pipe.unet.add_adapter(config)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    expected = updates_of(pipe)
    scalings = {m.scaling["default"] for m in pipe.unet.modules() if "default" in getattr(m, "lora_A", {})}
    assert scalings == {1.5, 2.5, 3.0}
    pipe.save_lora_weights(
        tmp_path / "lora",
        get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    pipe.unload_lora_weights()
    # by way of kohya's, but not read from it: stock diffusers passes over alphas that differ between layers
    kohya = convert_lora(tmp_path / "lora", tmp_path / "k.safetensors", "kohya", folders["sd15"])
    pipe.load_lora_weights(convert_lora(kohya, tmp_path / "back", "diffusers", folders["sd15"]))
    assert_updates(updates_of(pipe), expected)


def test_names_are_those_of_diffusers_own_converter(folders, tmp_path):
    """Which knows the U-Net of SD 1.x, but takes alpha = rank."""
    network = load_base(folders["sd15"], random_init=True).network
    for parameter in add_lora(network, 4, 8, ["to_q", "to_out.0"]).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    save_lora(tmp_path, network)
    main(["convert", "lora", str(tmp_path), str(tmp_path / "kohya.safetensors"), "--model", folders["sd15"]])
    ours = load_file(tmp_path / "kohya.safetensors")
    theirs = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(tmp_path / LORA_WEIGHTS)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key].to(ours[key])) for key in ours)
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4" and file.metadata()["ss_network_alpha"] == "4.0"
    fresh = load_base(folders["sd15"], random_init=True).network
    load_lora(fresh, tmp_path / "kohya.safetensors")
    one, two = (
        {name: module.scaling[a] * module.lora_B[a].weight @ module.lora_A[a].weight for name, module in
         net.named_modules() for a in getattr(module, "lora_A", {})} for net in (network, fresh)
    )  # fmt: skip
    assert_updates(one, two)


def test_sdxl_as_other_trainers_name_it(folders, tmp_path):
    """kohya's prefix before diffusers' blocks: what diffusers' own converter writes."""
    pipe = pipeline(folders["sdxl"])
    write_lora(pipe, tmp_path / "lora")
    original = load_file(tmp_path / "lora" / LORA_WEIGHTS)
    theirs = {}
    for key, tensor in original.items():
        part, _, module = key.removesuffix(".weight").partition(".")
        if part == "unet":
            module, _, side = module.rpartition(".lora.")
            theirs[f"lora_unet_{module.replace('.', '_')}.lora_{side}.weight"] = tensor
    save_file(theirs, tmp_path / "theirs.safetensors")
    back = load_file(convert_lora(tmp_path / "theirs.safetensors", tmp_path / "back", "diffusers", folders["sdxl"]))
    unet = {key: tensor for key, tensor in original.items() if key.startswith("unet.")}
    conv_in = {key: tensor for key, tensor in theirs.items() if key.startswith("lora_unet_conv_in.")}
    both = theirs | {key.replace("conv_in", "input_blocks_0_0"): tensor.clone() for key, tensor in conv_in.items()}
    save_file(both, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="holds two updates of unet.conv_in"):
        convert_lora(tmp_path / "both.safetensors", tmp_path / "none", "diffusers", folders["sdxl"])
    assert back.keys() == unet.keys() and all(torch.equal(back[key], tensor) for key, tensor in unet.items())


def test_sdxls_blocks_are_numbered_as_in_the_original_code():
    """Row of the original: conv_in 0, (resnet, resnet, downsampler) 1 to 3, block 1 from 4 on, block 2 from 7 on."""
    unet = _network_of("sdxl")
    names = {module: key for key, modules in _kohya_layers(unet).items() for module in modules}
    for module, expected in {
        "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "middle_block_1_transformer_blocks_0_ff_net_2",
        "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
        "up_blocks.1.attentions.0.proj_out": "output_blocks_3_1_proj_out",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
        "conv_out": "out_2",
        "add_embedding.linear_2": "label_emb_0_2",
    }.items():
        assert names[f"unet.{module}"] == f"lora_unet_{expected}"
    distilled = unet._replace(layers=unet.layers | {"time_embedding.cond_proj": [320, 256]})  # LCM's
    assert "lora_unet_time_embedding_cond_proj" in _kohya_layers(distilled)
    te = "text_model.encoder.layers.3.mlp.fc2"
    assert _text_name(f"text_encoder_2.{te}", unet) == "lora_te2_text_model_encoder_layers_3_mlp_fc2"
    assert _text_name(f"text_encoder.{te}", unet) == "lora_te1_text_model_encoder_layers_3_mlp_fc2"


def test_fluxs_blocks_at_their_width_are_read_by_stock_diffusers(tmp_path):
    """One update of what are four layers in diffusers, three of them adapted, with alphas of their own."""
    block, generator = "transformer.single_transformer_blocks.37", torch.Generator().manual_seed(0)
    sizes = {
        "attn.to_q": (3072, 3072),
        "attn.to_v": (3072, 3072),
        "proj_mlp": (12288, 3072),
        "norm.linear": (9216, 3072),
    }
    tensors = {}
    for name, (out, width) in sizes.items():
        tensors[f"{block}.{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"{block}.{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    alphas = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"single_transformer_blocks.37.proj_mlp": 8}}
    save_file(tensors, tmp_path / LORA_WEIGHTS, {"lora_adapter_metadata": json.dumps(alphas)})
    kohya = convert_lora(tmp_path, tmp_path / "kohya.safetensors", "kohya", "flux")
    keys = {key.partition(".")[0] for key in load_file(kohya)}
    assert keys == {"lora_unet_single_blocks_37_linear1", "lora_unet_single_blocks_37_modulation_lin"}
    theirs = FluxPipeline.lora_state_dict(kohya)
    tensors[f"{block}.proj_mlp.lora_B.weight"] *= 2
    for side in "AB":
        assert not theirs.pop(f"{block}.attn.to_k.lora_{side}.weight").any()
    ours = load_file(convert_lora(kohya, tmp_path / "back", "diffusers", "flux"))
    for got in (theirs, ours):
        assert got.keys() == tensors.keys() and all(torch.equal(got[key], tensors[key]) for key in got)


def test_what_is_refused(folders, tmp_path):
    write_lora(pipeline(folders["sd15"]), tmp_path / "sd")
    kohya = tmp_path / "kohya.safetensors"

    def convert(source, target, format="kohya", model=folders["sd15"]):
        return convert_lora(source, target, format, model)

    with pytest.raises(ValueError, match="does not fit this base model.*Name the base"):
        convert(tmp_path / "sd", kohya, model=folders["sdxl"])
    with pytest.raises(ValueError, match="does not fit this base model: expected .* no such layer"):
        convert(tmp_path / "sd", kohya, model=folders["flux"])
    with pytest.raises(ValueError, match="family SD3, whose names .* keep diffusers' own file"):
        convert(tmp_path / "sd", kohya, model=folders["sd3"])
    fits = _network_of(folders["flux"]).layers["x_embedder"]
    outside = {
        "transformer.x_embedder.lora_A.weight": torch.zeros(2, fits[1]),
        "transformer.x_embedder.lora_B.weight": torch.zeros(fits[0], 2),
    }
    save_file(outside, tmp_path / "outside.safetensors")
    with pytest.raises(ValueError, match="known of FLUX's blocks alone; transformer.x_embedder lies outside"):
        convert(tmp_path / "outside.safetensors", kohya, model=folders["flux"])
    with pytest.raises(ValueError, match="new .safetensors file"):
        convert(tmp_path / "sd", tmp_path / "folder")
    with pytest.raises(ValueError, match="is there already"):
        convert(tmp_path / "sd", tmp_path / "sd", "diffusers")
    assert not kohya.exists()
    tensors = load_file(convert(tmp_path / "sd", kohya))
    some = next(key for key in tensors if key.endswith("lora_up.weight"))
    for extra, message in [
        ({"lora_unet_nowhere.lora_up.weight": torch.zeros(1)}, "has no layer lora_unet_nowhere"),
        ({some.replace("lora_up", "hada_w1_a"): torch.zeros(1)}, "not plain LoRA"),
    ]:
        save_file(tensors | extra, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "odd.safetensors", tmp_path / "out", "diffusers")
    save_file({k: t for k, t in tensors.items() if k != some}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="expected lora_down and lora_up"):
        convert(tmp_path / "odd.safetensors", tmp_path / "out", "diffusers")
