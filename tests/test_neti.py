"""The trainer: it learns, resumes bit for bit, leaves the base alone, and refuses what cannot work."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from alignkit.alignit import alignit
from alignkit.attention import context_bank
from alignkit.base import load_base
from alignkit.concepts import Concepts, create, load
from alignkit.run import Run
from tests.runs import assert_same, reproducible
from tests.test_families import thin
from tests.torchrun import train_on_two_ranks
from training import neti
from training.neti import Config, Data, MapperConfig, denoising_loss, predict, train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (70, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def config(images, tmp_path):
    def build(name="run", **fields):
        defaults = {
            "pretrained_model_name_or_path": "sd15",
            "random_init": True,
            "shrink": 40,
            "resolution": 32,
            "train_data_dir": str(images),
            "super_category_token": "a",
            "mapper": MapperConfig(hidden_size=8, num_frequencies=16),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "validation_steps": 0,
            "validation_prompts": ["a {}"],
            "validation_seeds": [1],
            "num_inference_steps": 1,
            "report_to": "none",
        }
        return Config(output_dir=str(tmp_path / name), **{**defaults, **fields})

    return build


@pytest.mark.parametrize("method", ["neti", "textual_inversion", "p_plus"])
def test_a_run_leaves_a_concept_and_the_base_as_it_was(config, monkeypatch, method):
    seen = {}
    monkeypatch.setattr("alignkit.run.load_base", lambda *args, **kw: seen.setdefault("base", load_base(*args, **kw)))
    folder = train(config(method=method, validation_steps=2))
    fresh = load_base("sd15", random_init=True, shrink=40)
    for module in ("unet", "vae", "text_encoder"):
        trained, expected = (dict(getattr(base, module).named_parameters()) for base in (seen["base"], fresh))
        assert trained.keys() == expected.keys()
        for name, parameter in trained.items():
            assert parameter.grad is None and torch.equal(parameter, expected[name]), name
    assert {"README.md", "config.json", "validation.png", "curves.png"} <= {p.name for p in folder.iterdir()}
    assert (folder / "truncation.png").exists() == (method == "neti")
    start = create(
        method, fresh, "<thing>", "a", **({"hidden_size": 8, "num_frequencies": 16} if method == "neti" else {})
    )
    concept = load(folder).concepts[0]
    moved = [n for n, p in concept.module.named_parameters() if not torch.equal(p, start.module.state_dict()[n])]
    assert moved == [name for name, _ in start.module.named_parameters()]
    assert [path.name for path in sorted((folder / "steps").iterdir())] == ["2", "4"]
    with load(folder / "steps" / "4").applied(fresh.pipeline()):  # a usable concept at every validation
        pass


def test_it_learns_an_embedding_that_is_known(config, images):
    """The loss falls to what the sought word gives, when the network's own prediction for that word is the target."""
    cfg = config(method="textual_inversion")
    base = load_base("sd15", random_init=True, shrink=40)
    concept, sought = (create("textual_inversion", base, "<thing>", noun) for noun in ("a", "b"))
    run = Run(config("toy"))
    data, known = Data(cfg, base, concept), Data(cfg, base, sought)
    batch = data.batch(run, 0, range(4))
    x_t = base.schedule.add_noise(batch.x_0, batch.noise, batch.timestep)

    def output(d):
        with context_bank(base.unet):
            return base.unet(x_t, batch.timestep, d.contexts(batch, nested_dropout=True)).sample

    target = output(known).detach()
    optimizer = torch.optim.Adam(concept.module.parameters(), 1e-3)
    losses = []
    for _ in range(100):
        loss = (output(data) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]


def test_min_snr_and_offset_noise_reach_the_loss(config):
    base = load_base("sd15", random_init=True, shrink=40)
    concept, run = create("textual_inversion", base, "<thing>", "a"), Run(config("toy"))
    data = Data(config(noise_offset=0.5), base, concept)
    batch, plain = data.batch(run, 0, range(2)), Data(config(), base, concept).batch(run, 0, range(2))
    moved = (batch.noise - plain.noise)[:, :, :1, :1]
    torch.testing.assert_close(batch.noise, plain.noise + moved.expand_as(batch.noise), rtol=0, atol=1e-5)
    assert moved.std() > 0.1 and torch.equal(batch.x_0, plain.x_0) and torch.equal(batch.timestep, plain.timestep)
    with torch.no_grad(), context_bank(base.unet):
        contexts = data.contexts(batch, nested_dropout=False)
        one, weighted = denoising_loss(base, batch, contexts), denoising_loss(base, batch, contexts, snr_gamma=5.0)
    torch.testing.assert_close(weighted, one * base.schedule.min_snr_weight(batch.timestep, 5.0).float())


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    fields = {"checkpointing_steps": 2, "validation_steps": 4, "use_ema": True, "lr_scheduler": "cosine"}
    whole = train(config("whole", **fields))
    interrupted = train(config("interrupted", **fields))
    for name in ("checkpoint-4", "steps/4"):
        for file in (interrupted / name).iterdir():
            file.unlink()
        (interrupted / name).rmdir()
    (interrupted / "mapper.safetensors").unlink()
    train(config("interrupted", **fields))
    assert_same(whole, interrupted)
    assert reproducible(whole) == reproducible(interrupted) and len(reproducible(whole)) == 4


def test_accumulation_and_checkpointing_do_not_change_the_run(config):
    one = train(config("one", train_batch_size=4))
    fields = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    assert_same(one, train(config("two", **fields)), tolerance=1e-4)


def test_two_processes_equal_one(config, tmp_path):
    alone = train(config("alone", train_batch_size=4, adam_epsilon=1e-3))  # signs of tiny gradients may differ
    two = train_on_two_ranks("training/neti.py", config("two", train_batch_size=2, adam_epsilon=1e-3))
    assert_same(alone, two, tolerance=1e-5)


def test_gradient_checkpointing_does_not_change_the_mappers_gradient(config):
    cfg, gradients = config(), []
    base = load_base("sd15", random_init=True, shrink=40)
    run = Run(config("toy"))
    for checkpointing in (False, True):
        concept = create("neti", base, "<thing>", "a", hidden_size=8, num_frequencies=16)
        data = Data(cfg, base, concept)
        batch = data.batch(run, 0, range(2))
        base.unet.train()
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
        with context_bank(base.unet):
            denoising_loss(base, batch, data.contexts(batch, nested_dropout=True)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in concept.module.parameters()]))
    plain, checkpointed = gradients
    assert plain.norm() > 0 and (plain - checkpointed).norm() / plain.norm() < 1e-6


def test_the_loss_is_the_mean_squared_error_where_the_mask_is_white(config, images, tmp_path):
    folder = tmp_path / "masked"
    (folder / "masks").mkdir(parents=True)
    for path in images.iterdir():
        image = Image.open(path).crop((0, 0, 64, 64))
        image.save(folder / path.name)
        mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, 32, 64))  # the left half
        mask.save(folder / "masks" / path.name)
    cfg = config(train_data_dir=str(folder), resolution=64)
    base = load_base("sd15", random_init=True, shrink=40)
    concept = create("neti", base, "<thing>", "a", hidden_size=8, num_frequencies=16)
    data = Data(cfg, base, concept)
    assert data.weights[:, 0, 0, :, :4].unique().tolist() == [2] and not data.weights[:, 0, 0, :, 4:].any()
    assert torch.equal(data.weights[:, 1], data.weights[:, 0].flip(-1))
    batch = data.batch(Run(config("toy")), 0, range(3))
    contexts = data.contexts(batch, nested_dropout=False).detach()

    class Zero(nn.Module):
        def forward(self, x_t, timestep, contexts, added_cond_kwargs=None):
            return type("Output", (), {"sample": torch.zeros_like(x_t)})

    base.pipe.register_modules(unet=Zero())
    loss = denoising_loss(base, batch, contexts)
    where = (batch.weight > 0).expand_as(batch.noise)
    expected = torch.stack([n[w].square().mean() for n, w in zip(batch.noise, where, strict=True)])
    assert torch.allclose(loss, expected)


def test_samples_depend_on_their_index_alone(config):
    cfg = config()
    base = load_base("sd15", random_init=True, shrink=40)
    data = Data(cfg, base, create("neti", base, "<thing>", "a", hidden_size=8, num_frequencies=16))
    run = Run(config("toy"))
    together, alone = data.batch(run, 1, [2, 3]), data.batch(run, 1, [3])
    for name in ("x_0", "noise", "timestep", "truncation"):
        assert torch.equal(getattr(together, name)[1:], getattr(alone, name))
    assert together.prompts[1:] == alone.prompts
    epoch = [tuple(data.batch(run, 0, [i]).x_0.flatten().tolist()) for i in range(3, 6)]
    pairs = data.latents.flatten(2)
    shown = {next(i for i in range(3) if list(x) in pairs[i].tolist()) for x in epoch}
    assert shown == {0, 1, 2}  # every image once in an epoch


def test_captions_take_the_templates_place(config, images, tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).with_suffix(".txt").write_text("my <thing>\n")
    base = load_base("sd15", random_init=True, shrink=40)
    data = Data(config(train_data_dir=str(folder)), base, create("textual_inversion", base, "<thing>", "a"))
    assert data.batch(Run(config("toy")), 0, range(3)).prompts == ["my <thing>"] * 3


def test_a_dry_run_writes_nothing(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        train(config(dry_run=True))
    assert exit.value.code == 0 and not (tmp_path / "run").exists()
    assert "s a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_data_dir": ""}, "train_data_dir"),
        ({"templates": ["a photo"]}, "templates: expected texts with {}"),
        ({"validation_prompts": ["x"]}, "validation_prompts"),
        ({"nested_dropout_prob": 2.0}, "nested_dropout_prob"),
        ({"num_vectors": 0}, "num_vectors"),
        ({"num_vectors": 2}, "a mapper makes one vector"),
        ({"num_vectors": 2, "method": "p_plus", "alignit": True}, "expected 1 with alignit"),
        ({"validation_steps": 0, "validation_seeds": []}, "validation_seeds: expected at least one"),
        ({"super_category_token": "b c", "alignit": True}, "a word of one token with alignit"),
        ({"train_data_dir": "missing"}, "no folder of images"),
        ({"placeholder_token": "a"}, "already"),
        ({"templates": ["{}" + " b" * 90]}, "too long"),
        ({"resolution": 30}, "multiples of 8"),
        ({"super_category_token": " "}, "super_category_token"),
    ],
)
def test_wrong_input_fails_before_any_work(config, fields, message):
    with pytest.raises((ValueError, OSError), match=message):
        train(config(**fields))


@pytest.mark.parametrize("name", [path.stem for path in Path("configs/neti").glob("*.yaml")])
def test_every_config_runs_dry_on_random_weights(name, images, capsys):
    argv = ["--config", f"configs/neti/{name}.yaml", "--train_data_dir", str(images), "--dry-run", "--random_init"]
    argv += ["--shrink", "40", "--resolution", "32", "--train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    argv += ["--num_inference_steps", "1", "--mapper.hidden_size", "8"]
    with pytest.raises(SystemExit) as exit:
        neti.main(argv)
    assert exit.value.code == 0 and "s a step" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_is_refused_with_the_reason(config, tmp_path, family):
    with pytest.raises(ValueError, match="mix their text with the image in every block"):
        train(config(pretrained_model_name_or_path=thin(family, tmp_path / "base")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return thin("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("method", ["neti", "textual_inversion"])
def test_sdxl_learns_for_both_text_encoders(config, sdxl, method):
    cfg = config(method=method, pretrained_model_name_or_path=sdxl, max_train_steps=2)
    (concept,) = load(train(cfg)).concepts
    base = load_base(sdxl, random_init=True, shrink=40)
    before = create(method, base, "<thing>", "a", **(asdict(cfg.mapper) if method == "neti" else {}))
    assert len(concept.widths) == 2
    t, layers = torch.zeros(3), torch.arange(3)
    with torch.no_grad():
        change = (concept.module(t, layers).token - before.module(t, layers).token).split(concept.widths, -1)
    assert all((part != 0).any() for part in change)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_concept_in_training_is_the_concept_in_the_pipeline(config, sdxl, model, aligned):
    """The training's contexts (and SDXL's pooled noun) give the output of the stock pipeline's first step."""
    base = load_base(sdxl if model == "sdxl" else model, random_init=True, shrink=40)
    concept = create("neti", base, "<thing>", "a", hidden_size=8, num_frequencies=16)
    data = Data(config(templates=["b {}"], alignit=aligned), base, concept)
    batch = data.batch(Run(config("toy")), 0, [0])
    seen, concepts = [], Concepts([concept])
    pipe = base.pipeline()
    pipe.set_progress_bar_config(disable=True)
    handle = pipe.unet.register_forward_hook(lambda m, args, out: seen.append((*args, out[0])))
    with alignit(pipe, concepts, source="prompt") if aligned else concepts.applied(pipe):
        pipe("b <thing>", num_inference_steps=1, guidance_scale=1.0, height=32, width=32, output_type="latent")
    handle.remove()
    ((x_t, timestep, expected),) = seen
    batch.timestep = timestep.reshape(1)
    with torch.no_grad(), context_bank(base.unet):
        got = predict(base, x_t, timestep, data.contexts(batch, nested_dropout=False), batch.added)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_mappers_rate_on_vectors_is_told(config):
    with pytest.warns(UserWarning, match="learning_rate 0.01 is a mapper's"):
        config(method="p_plus")


def test_a_concept_says_that_it_was_learnt_under_alignit(config):
    concepts = load(train(config(alignit=True, max_train_steps=1)))
    assert concepts.concepts[0].alignit and not load(train(config("plain", max_train_steps=1))).concepts[0].alignit
    pipe = load_base("sd15", random_init=True, shrink=40).pipeline()
    with pytest.warns(UserWarning, match="learnt under AlignIT and says less without it"), concepts.applied(pipe):
        pass
