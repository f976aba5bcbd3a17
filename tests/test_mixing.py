"""LoRA mixing: in weight space, at run time, and as the paper's code does."""

import pytest
import torch
from safetensors.torch import load_file

from alignkit.artifacts import load_lora, mix_lora_factors, mix_loras, save_lora
from alignkit.base import add_lora, load_base

TARGETS = ["to_q", "to_out.0"]


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two LoRAs of different rank, alpha and layers, of the same base."""
    folders = [tmp_path_factory.mktemp("lora") for _ in range(2)]
    for seed, (folder, rank, targets) in enumerate(zip(folders, (2, 3), (TARGETS, ["to_q", "to_k"]), strict=True)):
        network = fresh()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in add_lora(network, rank, 2 * rank, targets, seed=seed).items():
            if ".lora_B." in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_lora(folder, network)
    return folders


_base = []


def fresh():
    """The same U-Net without adapters."""
    if not _base:
        _base.append(load_base("sd15", random_init=True, shrink=40).network)
    network = _base[0]
    if getattr(network, "peft_config", None):
        network.unload_lora()
    return network


def update(path) -> dict[str, torch.Tensor]:
    """B A of every layer of a file."""
    tensors = load_file(path / "pytorch_lora_weights.safetensors" if path.is_dir() else path)
    return {
        key.removesuffix(".lora.down.weight"): tensors[key.replace(".lora.down.", ".lora.up.")] @ tensor
        for key, tensor in tensors.items()
        if key.endswith(".lora.down.weight")
    }


def test_the_update_of_a_mixture_is_the_mixture_of_updates(loras, tmp_path):
    one, two = map(update, loras)
    mixed = update(mix_loras(tmp_path, fresh(), {loras[0]: 0.3, loras[1]: -1.2}))
    assert mixed.keys() == one.keys() | two.keys() and one.keys() != two.keys()
    for name, delta in mixed.items():
        expected = 0.3 * one.get(name, torch.zeros(())) - 1.2 * two.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, expected, rtol=1e-6, atol=1e-6)
    assert not any("lora" in name for name, _ in fresh().named_modules())


def test_weights_of_one_and_zero_are_the_ends(loras, tmp_path):
    mixed = update(mix_loras(tmp_path, fresh(), {loras[0]: 1.0, loras[1]: 0.0}))
    for name, delta in update(loras[0]).items():
        torch.testing.assert_close(mixed[name], delta, rtol=1e-6, atol=1e-6)


def test_the_file_draws_what_the_adapters_draw_at_run_time(loras, tmp_path):
    def forward(network):
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        text = torch.randn(1, 5, network.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return network(x, torch.tensor(500), text).sample

    path = mix_loras(tmp_path, fresh(), {loras[0]: 0.3, loras[1]: 0.6})
    network = fresh()
    plain = forward(network)
    load_lora(network, path)
    from_file = forward(network)
    network = fresh()
    for i, folder in enumerate(loras):
        load_lora(network, folder, f"lora_{i}")
    network.set_adapters(["lora_0", "lora_1"], [0.3, 0.6])
    torch.testing.assert_close(from_file, forward(network), rtol=1e-4, atol=1e-5)
    assert (from_file - plain).abs().max() > 1e-2


def test_factors_have_cross_terms(loras, tmp_path):
    """(a B1 + b B2) (a A1 + b A2): not linear, and a weight of w alone scales by w squared."""
    (tmp_path / "half").mkdir()
    half = update(mix_lora_factors(tmp_path / "half", fresh(), {loras[0]: 0.5}))
    for name, delta in update(loras[0]).items():
        torch.testing.assert_close(half[name], 0.25 * delta, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="equal layers and ranks"):
        mix_lora_factors(tmp_path, fresh(), {loras[0]: 0.5, loras[1]: 0.5})
    copy = tmp_path / "copy"
    network = fresh()
    add_lora(network, 2, 4, TARGETS, seed=7)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.1)
    save_lora(copy, network)
    mixed = update(mix_lora_factors(tmp_path, fresh(), {loras[0]: 0.5, copy: 0.5}))
    linear = {name: 0.5 * delta + 0.5 * update(copy)[name] for name, delta in update(loras[0]).items()}
    assert all((mixed[name] - linear[name]).abs().max() > 1e-3 for name in linear)


def test_a_network_with_an_adapter_is_refused(loras, tmp_path):
    network = fresh()
    load_lora(network, loras[0])
    with pytest.raises(ValueError, match="has an adapter already: default"):
        mix_loras(tmp_path, network, {loras[0]: 1.0})
