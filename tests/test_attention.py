"""The context bank: what each layer reads, that gradients see it, and that it leaves no trace."""

import json

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    IPAdapterAttnProcessor2_0,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from alignkit.attention import context_bank, text_layers
from alignkit.base import add_lora, load_base

SD_LAYERS = [  # P+, figure 2: IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 ... OUT11
    *(f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)),
]


def small_unet(transformer_layers=1, cross_attention_dim=12, **config):
    """Two levels, three or more layers of text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=cross_attention_dim, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            transformer_layers_per_block=transformer_layers, **config,
        ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture
def unet():
    return small_unet()


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch=2, length=5, dim=12):
    return rand(batch, 4, 8, 8), torch.tensor([7, 500])[:batch], rand(batch, length, dim, seed=1)


def plain(text, timestep):
    return None


def record(unet):
    """Input and output of every to_k and to_v by name, in a dict that fills as the network runs."""
    seen = {}
    for name, module in unet.named_modules():
        if ".attn2.to_" in name and name.endswith((".to_k", ".to_v")):
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    return seen


# Which layers


def test_layers_of_sd_in_the_order_of_execution():
    unet = load_base("sd15", random_init=True, shrink=40).unet
    assert text_layers(unet) == SD_LAYERS
    order = []
    for name in SD_LAYERS:
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    unet(rand(1, 4, 8, 8), 5, rand(1, 5, unet.config.cross_attention_dim))
    assert order == SD_LAYERS


def test_a_layer_of_sdxl_has_several_blocks():
    unet = small_unet(transformer_layers=(1, 3))
    layers = text_layers(unet)
    bank = rand(2, len(layers), 5, 24)
    seen = record(unet)
    with context_bank(unet, lambda text, t: bank):
        unet(*inputs())
    assert len(seen) == 2 * (1 + 3 + 3 + 2 * 3 + 2 * 1)
    for name, (given, _) in seen.items():
        layer = layers.index(name.partition(".transformer_blocks")[0])
        half = bank[:, layer, :, :12] if name.endswith("to_k") else bank[:, layer, :, 12:]
        assert torch.equal(given, half)


def test_joint_attention_is_refused():
    with pytest.raises(ValueError, match="joint attention"):
        text_layers(torch.nn.Linear(2, 2))


# What they read


def test_the_same_text_everywhere_is_the_plain_network(unet):
    sample, t, text = inputs()
    expected = unet(sample, t, text).sample
    with context_bank(unet, plain):
        assert torch.equal(unet(sample, t, text).sample, expected)
        assert torch.equal(unet(sample, t, encoder_hidden_states=text).sample, expected)
        mask = torch.ones(text.shape[:2])
        assert torch.equal(unet(sample, t, text, encoder_attention_mask=mask).sample, expected)
    same = torch.cat([text, text], -1)[:, None].expand(-1, len(text_layers(unet)), -1, -1)
    with context_bank(unet, lambda text, t: same):
        assert torch.equal(unet(sample, t, text).sample, expected)
    assert torch.equal(unet(sample, t, text).sample, expected)


def test_every_layer_reads_its_own_slice_and_no_other(unet):
    layers = text_layers(unet)
    sample, t, text = inputs()
    seen = record(unet)
    with context_bank(unet, plain):
        unet(sample, t, text)
    before = dict(seen)
    changed = torch.cat([text, text], -1)[:, None].repeat(1, len(layers), 1, 1)
    changed[:, 2, :, :12] += 1  # the keys of one layer
    with context_bank(unet, lambda text, t: changed):
        unet(sample, t, text)
    differing = [name for name in seen if not torch.equal(seen[name][0], before[name][0])]
    assert differing == [f"{layers[2]}.transformer_blocks.0.attn2.to_k"]


def test_the_source_sees_each_call_and_its_own_timestep(unet):
    calls = []

    def source(text, timestep):
        calls.append(timestep.tolist())

    sample, _, text = inputs()
    with context_bank(unet, source):
        for timestep in (3, 3.5, torch.tensor(9), torch.tensor([4, 5])):
            unet(sample, timestep, text)
    assert calls == [[3, 3], [3.5, 3.5], [9, 9], [4, 5]]


def test_rows_do_not_mix(unet):
    """The unconditional row under guidance is the plain one, whatever the other row reads."""
    sample, t, text = inputs()
    expected = unet(sample, t, text).sample

    def source(text, timestep):
        bank = torch.cat([text, text], -1)[:, None].repeat(1, len(text_layers(unet)), 1, 1)
        bank[1] += 1
        return bank

    with context_bank(unet, source):
        got = unet(sample, t, text).sample
    assert torch.equal(got[0], expected[0]) and not torch.allclose(got[1], expected[1])


def test_base_and_custom_rows_reach_hooks_on_the_projections(unet):
    """The way of a customiser with weights of its own: rows of zeros where the other weights are meant."""
    sample, t, text = inputs()
    custom_rows = torch.tensor([False, True, False, False, True])[:, None]
    name = f"{text_layers(unet)[0]}.transformer_blocks.0.attn2.to_k"
    other = torch.nn.Linear(12, unet.get_submodule(name).out_features, bias=False)

    def source(text, timestep):
        rows = torch.cat([text * ~custom_rows, text * custom_rows], 1)
        return torch.cat([rows, rows], -1)[:, None]

    def project(module, args, output):
        base, custom = args[0].chunk(2, 1)
        out = output.chunk(2, 1)[0]
        return torch.where(custom.any(-1, keepdim=True), other(custom), out)

    def add_halves(module, args, output):
        return sum(output.chunk(2, 1))

    seen = {}
    for n, module in list(unet.named_modules()):
        if n.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(project if n == name else add_halves)
    unet.get_submodule(name).register_forward_hook(lambda _, args, out: seen.update(out=out))
    with context_bank(unet, source):
        unet(sample, t, text)
    expected = torch.where(custom_rows, other(text), unet.get_submodule(name).weight.matmul(text.mT).mT)
    assert torch.allclose(seen["out"], expected, atol=1e-6)


# Gradients


def gradient(unet, checkpointing, bank):
    """Of two chained calls at two timesteps, with respect to the contexts of each."""
    unet.train()  # diffusers checkpoints in training mode only
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    bank = bank.clone().requires_grad_(True)  # [2 timesteps, L, S, 2 D]
    sample, _, text = inputs()
    with context_bank(unet, lambda text, t: bank[(t > 100).long()]):
        x = unet(sample, 7, text).sample
        unet(x, 500, text).sample.square().sum().backward()
    return bank.grad


def test_gradients_under_checkpointing(unet):
    bank = rand(2, len(text_layers(unet)), 5, 24, seed=3)
    expected, got = gradient(unet, False, bank), gradient(unet, True, bank)
    assert expected.flatten(2).norm(dim=-1).min() > 0  # every layer of both calls
    assert (got - expected).norm() / expected.norm() < 1e-6


def test_gradients_against_finite_differences():
    unet = small_unet().double()
    sample, t, text = (x.double() if x.is_floating_point() else x for x in inputs(batch=1))

    def run(bank):
        with context_bank(unet, lambda text, t: bank):
            return unet(sample, t, text).sample.sum()

    bank = rand(1, len(text_layers(unet)), 5, 24, seed=3).double().requires_grad_(True)
    (grad,) = torch.autograd.grad(run(bank), bank)
    direction = rand(*bank.shape, seed=4).double()
    step = 1e-5
    numeric = (run(bank + step * direction) - run(bank - step * direction)).detach() / (2 * step)
    assert torch.allclose((grad * direction).sum(), numeric, rtol=1e-6)


# Pipelines, compilation


def test_second_order_samplers_are_seen_as_they_run():
    base = load_base("sd15", random_init=True, shrink=40)
    pipe = base.pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(DDIMScheduler().config)
    pipe.set_progress_bar_config(disable=True)
    networks, sources = [], []
    handle = pipe.unet.register_forward_hook(
        lambda _, args, kwargs, out: networks.append(float(args[1])), with_kwargs=True
    )
    with context_bank(pipe.unet, lambda text, t: sources.append(t.unique().tolist())):
        pipe("a cat", num_inference_steps=3, height=64, width=64, output_type="latent")
    handle.remove()
    assert [[t] for t in networks] == sources and len(networks) == 5  # 2 a step, but 1 in the last


def test_controlnet_reads_its_slices_by_name():
    base = load_base("sd15", random_init=True, shrink=40)
    control = ControlNetModel.from_unet(base.unet)
    layers = text_layers(base.unet)
    pipe = StableDiffusionControlNetPipeline(
        **base.pipeline().components | {"controlnet": control}, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    seen = record(control)
    bank = rand(1, len(layers), 7, 2 * base.unet.config.cross_attention_dim)
    call = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent", "guidance_scale": 1}
    with context_bank(pipe.unet, plain), context_bank(pipe.controlnet, lambda text, t: bank, layers):
        pipe("a cat", image=torch.rand(1, 3, 64, 64), **call)
    assert len(seen) == 2 * 7
    for name, (given, _) in seen.items():
        layer = layers.index(name.partition(".transformer_blocks")[0])
        assert torch.equal(given, bank[:, layer].chunk(2, -1)[name.endswith("to_v")])


@pytest.mark.parametrize("how", ["repeated_blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiled(unet, how):
    """As many graphs as without a bank, none for another prompt or timestep, and none that is taken for another."""
    sample, t, text = inputs()
    banks = [rand(2, len(text_layers(unet)), 5, 24, seed=seed) for seed in (3, 4)]

    def draw(network, bank=None, timestep=t):
        with context_bank(network, lambda text, t: bank):
            return network(sample, timestep, text).sample

    expected = [unet(sample, t, text).sample, *(draw(unet, bank) for bank in banks)]
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if how == "whole":
        compiled = torch.compile(unet, backend=backend)
    else:
        compiled = unet
        unet.compile_repeated_blocks(backend=backend)
    assert torch.allclose(compiled(sample, t, text).sample, expected[0], atol=1e-5)
    plain_graphs = len(graphs)
    for _ in range(2):
        for bank, result in zip(banks, expected[1:], strict=True):
            assert torch.allclose(draw(compiled, bank), result, atol=1e-5)
            draw(compiled, bank, t + 1)
            assert torch.allclose(compiled(sample, t, text).sample, expected[0], atol=1e-5)
    assert len(graphs) == 2 * plain_graphs


# No trace, and refusals


def hooks_and_processors(unet):
    return json.dumps(
        {
            name: [len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m)]
            for name, m in unet.named_modules()
        }
    ), {name: id(p) for name, p in unet.attn_processors.items()}


def test_no_trace_also_after_an_exception(unet):
    before = hooks_and_processors(unet)
    sample, t, text = inputs()
    with context_bank(unet, plain):
        unet(sample, t, text)
        assert hooks_and_processors(unet) != before
    assert hooks_and_processors(unet) == before
    with pytest.raises(KeyError), context_bank(unet, lambda text, t: {}["absent"]):
        unet(sample, t, text)
    assert hooks_and_processors(unet) == before
    with context_bank(unet, plain):  # and it can be attached again
        pass


def test_one_bank_at_a_time(unet):
    with context_bank(unet, plain), pytest.raises(RuntimeError, match="already"), context_bank(unet, plain):
        pass


def test_an_adapter_loaded_meanwhile_is_refused(unet):
    with context_bank(unet, plain):
        add_lora(unet, 2, 2, ["to_k"])
        with pytest.raises(RuntimeError, match="adapters"):
            unet(*inputs())
    seen = unet(*inputs()).sample
    with context_bank(unet, plain):  # loaded before, it is part of the network
        assert torch.equal(unet(*inputs()).sample, seen)


def test_processors_do_not_matter_but_fused_projections_do(unet):
    expected = unet(*inputs()).sample
    with context_bank(unet, plain):
        unet.set_attn_processor(AttnProcessor())
        assert torch.allclose(unet(*inputs()).sample, expected, atol=1e-6)
    unet.set_default_attn_processor()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse"), context_bank(unet, plain):
        pass


def test_a_network_that_was_compiled_in_place_is_refused(unet):
    unet.compile(backend="eager")  # nothing is compiled before the first call
    with pytest.raises(ValueError, match="compiled in place"), context_bank(unet, plain):
        pass


def test_a_cache_across_steps_is_refused(unet):
    settings = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, cross_attention_block_identifiers=("blocks",), current_timestep_callback=int
    )
    apply_pyramid_attention_broadcast(unet, settings)
    with pytest.raises(ValueError, match="pyramid_attention_broadcast"), context_bank(unet, plain):
        pass


def test_custom_diffusions_own_projections(unet):
    processors = {
        name: CustomDiffusionAttnProcessor(
            train_kv=name.endswith("attn2.processor"), train_q_out=False, cross_attention_dim=12,
            hidden_size=unet.get_submodule(name.removesuffix(".processor")).to_q.in_features,
        ) if name.endswith("attn2.processor") else processor
        for name, processor in unet.attn_processors.items()
    }  # fmt: skip
    unet.set_attn_processor(processors)
    expected = unet(*inputs()).sample
    with context_bank(unet, plain):
        assert torch.equal(unet(*inputs()).sample, expected)


def test_an_ip_adapters_image_stays_beside_the_text(unet):
    layers = text_layers(unet)
    processors = {
        name: IPAdapterAttnProcessor2_0(unet.get_submodule(name.removesuffix(".processor")).to_q.in_features, 12, (2,))
        if name.endswith("attn2.processor")
        else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=12, num_image_text_embeds=2)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    sample, t, text = inputs()
    image = {"image_embeds": [rand(2, 1, 6, seed=5)]}
    expected = unet(sample, t, text, added_cond_kwargs=image).sample
    seen, bank = record(unet), rand(2, len(layers), 5, 24, seed=3)
    with context_bank(unet, plain):
        assert torch.equal(unet(sample, t, text, added_cond_kwargs=image).sample, expected)
    with context_bank(unet, lambda text, t: bank):
        assert not torch.allclose(unet(sample, t, text, added_cond_kwargs=image).sample, expected, atol=1e-4)
    assert torch.equal(seen[f"{layers[1]}.transformer_blocks.0.attn2.to_v"][0], bank[:, 1, :, 12:])


def test_a_bank_of_another_width_is_refused(unet):
    with context_bank(unet, lambda text, t: text[:, None]), pytest.raises(ValueError, match=r"\[B, L, S, 24\]"):
        unet(*inputs())
    with (
        pytest.raises(ValueError, match="Expected the layers"),
        context_bank(unet, plain, ["down_blocks.0.attentions.0"]),
    ):
        pass
