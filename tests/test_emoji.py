"""The emoji world: what is drawn, said and held out, and that the bundled weights are what their card says."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import alignkit
from alignkit.data import read_prompts
from alignkit.emoji import WEIGHTS_DIR, aesthetics, captions, matching, prompts, resolve, scenes, sprites


def test_every_sprite_has_a_picture_and_names_are_unique():
    names = [s.name for s in sprites.catalogue()]
    assert len(set(names)) == len(names) >= 200
    assert len(sprites.of_tier("named")) >= 48
    for name in names:
        picture = np.asarray(sprites.picture(name))
        assert picture.shape == (72, 72, 4)
        assert (picture[..., 3] > 128).mean() > 0.1, name
    assert {s.noun for s in sprites.catalogue()} <= set(sprites.NOUN_PLURALS)


def test_a_scene_and_its_picture_depend_on_the_seed_alone():
    first, second = (scenes.World().draw(np.random.default_rng(5)) for _ in range(2))
    assert first == second
    assert (scenes.render(first).image == scenes.render(second).image).all()


def test_labels_are_exact():
    world = scenes.World(tiers=("named",), overlap=0.3)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.draw(rng)
        drawn = scenes.render(scene)
        bare = scenes.render(replace(scene, objects=()))
        for number, placed in enumerate(scene.objects):
            mask = drawn.instance_map == number + 1
            assert (drawn.class_map[mask] == placed.sprite.index + 1).all()
            np.testing.assert_allclose(drawn.depth[mask], placed.depth, atol=1e-6)
        nothing = drawn.instance_map == 0
        assert (drawn.class_map[nothing] == 0).all()
        np.testing.assert_array_equal(drawn.depth[nothing], bare.depth[nothing])


def test_a_nearer_sprite_covers_a_farther_one():
    cat, dog = sprites.by_name("cat"), sprites.by_name("dog")
    place = dict(x=32.0, y=50.0, size=30.0)
    near, far = scenes.Placed(cat, depth=0.9, **place), scenes.Placed(dog, depth=0.2, **place)
    background = scenes.sample_background(np.random.default_rng(0))
    for objects in [(near, far), (far, near)]:
        drawn = scenes.render(scenes.Scene(**background, objects=objects))
        assert (drawn.class_map == cat.index + 1).sum() > (drawn.class_map == dog.index + 1).sum()


def test_the_training_world_draws_nothing_that_is_held_out():
    rng, world = np.random.default_rng(1), scenes.World()
    for _ in range(2000):
        scene = world.draw(rng)
        names = [o.sprite.name for o in scene.objects]
        assert all(o.sprite.tier != "tier_b" for o in scene.objects)
        assert not any(scenes.held_out("background", n, scene.background) for n in names)
        assert not any(o.tint and scenes.held_out("tint", o.sprite.name, o.tint) for o in scene.objects)
        for a in set(names):
            assert not any(a < b and scenes.held_out("pair", a, b) for b in set(names))
        for name, number in Counter(names).items():
            assert number == 1 or not scenes.held_out("count", name, str(number))


def test_every_tier_is_drawn_that_is_asked_for():
    rng = np.random.default_rng(7)
    for tiers in [("named",), ("named", "known"), ("named", "known", "tier_b"), ("tier_b",)]:
        world = scenes.World(tiers=tiers)
        assert {world.draw_sprite(rng).tier for _ in range(500)} == set(tiers)


def test_held_out_and_seen_prompts_are_disjoint_and_of_the_stated_share():
    for make in (prompts.singles, prompts.pairs, prompts.counts):
        unseen, seen = ({p.prompt for p in make(unseen=u)} for u in (True, False))
        assert unseen and seen and not unseen & seen
    unseen = {p.prompt for make in (prompts.singles, prompts.pairs, prompts.counts) for p in make()}
    unseen |= {p.prompt for p in prompts.exactly(3)}
    files = sorted((Path(__file__).parent.parent / "configs" / "alignprop").glob("emoji_*.*"))
    trained = [set(read_prompts(f).prompts) for f in files if f.suffix in (".txt", ".jsonl")]
    assert len(trained) == 6
    assert not any(unseen & asked for asked in trained)
    assert len(prompts.singles()) + len(prompts.pairs()) + len(prompts.counts()) >= 300
    share = np.mean([scenes.held_out("x", str(i)) for i in range(20_000)])
    assert abs(share - 0.15) < 0.01
    assert scenes.held_out("pair", "cat", "dog") == scenes.held_out("dog", "pair", "cat")


def test_captions_say_what_is_there():
    rng, world = np.random.default_rng(2), scenes.World()
    for _ in range(500):
        scene = world.draw(rng)
        words = captions.caption(scene, rng, noun_share=0.0)
        for placed in scene.objects:
            number = sum(o.sprite == placed.sprite for o in scene.objects)
            assert (placed.sprite.name if number == 1 else placed.sprite.plural) in words
            if number > 1:
                assert captions.NUMBERS[number] in words
        if "background" in words:
            assert f"{scene.background} background" in words


def test_left_of_is_left_and_in_front_is_nearer():
    rng, world = np.random.default_rng(3), scenes.World(kinds={"pair": 1.0})
    seen = set()
    for _ in range(400):
        scene = world.draw(rng)
        if scene.relation is None:
            continue
        seen.add(scene.relation)
        first, second = scene.objects
        assert {
            "left of": first.x < second.x,
            "right of": first.x > second.x,
            "in front of": first.depth > second.depth,
            "behind": first.depth < second.depth,
        }[scene.relation]
    assert len(seen) == 4


def test_a_mutated_scene_gets_another_caption():
    rng, world = np.random.default_rng(4), scenes.World()
    for _ in range(300):
        scene = world.draw(rng)
        changed = captions.mutated(scene, rng)
        assert captions.caption(changed, rng)
        facts = [(s.background, s.relation, [(o.sprite.name, o.tint) for o in s.objects]) for s in (scene, changed)]
        assert facts[0] != facts[1]


def test_aesthetic_formula_prefers_sharp_contrasting_central_scenes():
    cat = sprites.by_name("cat")
    background = dict(background="blue", wall=(0.2, 0.3, 0.8), floor=(0.15, 0.25, 0.7), horizon=30.0)
    scene = scenes.Scene(**background, objects=(scenes.Placed(cat, 32, 56, 40, 0.8),))

    def score(scene):
        return aesthetics.aesthetic(scene, scenes.render(scene))

    assert score(scene) > score(replace(scene, blur=1.0))
    assert score(scene) > score(replace(scene, objects=(replace(scene.objects[0], x=8.0, size=16.0),)))
    like_cat = tuple(sprites.mean_color("cat"))
    assert score(scene) > score(replace(scene, wall=like_cat, floor=like_cat))
    with pytest.raises(ValueError, match="visible sprite"):
        score(replace(scene, objects=()))


def test_matching_names_and_counts_clean_scenes():
    rng = np.random.default_rng(6)
    right = []
    for sprite in sprites.of_tier("named"):
        background = scenes.sample_background(rng, "white" if sprites.mean_color(sprite.name).mean() < 0.7 else "black")
        placed = tuple(scenes.Placed(sprite, x, 54.0, 24.0, 0.8) for x in (16.0, 48.0))
        image = scenes.render(scenes.Scene(**background, objects=placed)).image.astype(np.float32) / 255
        right.append([p.name for p in matching.pieces(image)] == [sprite.name] * 2)
    assert np.mean(right) > 0.7


def test_resolve_names_what_there_is():
    assert resolve("some/model") == "some/model"
    assert resolve("emoji") == str(WEIGHTS_DIR / "base")
    assert resolve("emoji/training/clip") == str(WEIGHTS_DIR / "training" / "clip")
    with pytest.raises(FileNotFoundError, match="emoji/training/clip"):
        resolve("emoji/training/nonsense")
    with pytest.raises(FileNotFoundError, match="emoji/training/clip"):
        resolve("emoji/examples/nonsense")


@pytest.mark.parametrize("condition", ["depth", "segmentation"])
def test_what_ships_goes_together(condition):
    """The README's call: a LoRA, a ControlNet, a concept and AlignIT; each part changes the picture."""
    concept, control = "emoji/examples/neti", torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    lora, controlnet = {"aesthetic": "emoji/examples/aesthetic"}, f"emoji/examples/{condition}"

    def draw(control_image=control, **parts):
        composed = alignkit.compose("emoji", concepts=[concept], **parts)
        composed.pipe.set_progress_bar_config(disable=True)
        settings = {"control_image": control_image} if "controlnet" in parts else {}
        return composed("a <cat> on a blue background", alignit=True, seed=0, num_inference_steps=2, output_type="pt",
                        **settings).images  # fmt: skip

    every = draw(loras=lora, controlnet=controlnet)
    assert every.shape == (1, 3, 64, 64) and every.isfinite().all()
    others = [
        draw(controlnet=controlnet),
        draw(loras=lora),
        draw(loras=lora, controlnet=controlnet, control_image=1 - control),
    ]
    assert all((every - other).abs().max() > 0.01 for other in others)


def test_every_word_of_the_grammar_is_one_token_and_any_text_comes_back():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(resolve("emoji"), subfolder="tokenizer")
    for word in captions.vocabulary():
        assert len(tokenizer(word).input_ids) == 3, word
    text = "a zorbly cat, drawn twice"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(
        " ", ""
    )


def test_weights_are_small_and_only_safetensors():
    files = list(WEIGHTS_DIR.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 30e6
    assert not [f for f in WEIGHTS_DIR.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_the_bundled_world_is_what_its_card_says():
    """The first prompts of each kind give what they gave; two images of 48 may tip over on another machine."""
    from alignkit import evaluate
    from alignkit.base import load_base
    from alignkit.emoji import measure
    from alignkit.emoji.evaluator import Evaluator

    card = json.loads((WEIGHTS_DIR / "figures.json").read_text())
    assert card["world_hash"] == measure.world_hash()
    found = evaluate.sample(load_base("emoji"), Evaluator())
    assert found.keys() == card["sample"].keys()
    for name, value in card["sample"].items():
        assert abs(found[name] - value) < 2.5 / evaluate.SAMPLE, (name, found[name], value)
    assert abs(card["named object"] - card["sample"]["named object"]) < 0.25


def test_a_killed_training_of_the_world_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    """Weights, their average and both optimizers' state come back bit for bit, and views still share their memory."""
    from alignkit.emoji import fit

    def trained(folder: str, kill_at: int | None) -> dict:
        monkeypatch.setattr(fit, "WORK_DIR", tmp_path / folder)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 32, 3), torch.nn.Flatten(), torch.nn.Linear(32 * 4, 32))

        def loss_fn(batch, generator):
            if kill_at is not None and batch["number"] == kill_at:
                raise KeyboardInterrupt
            noise = torch.randn(batch["x"].shape, generator=generator)
            return model(batch["x"] + noise).float().square().mean(), {}

        numbers = iter(range(100))

        def make_batch(rng):
            return {"x": torch.from_numpy(rng.normal(size=(2, 4, 4, 4)).astype("float32")), "number": next(numbers)}

        fit.fit(
            "toy",
            model,
            loss_fn,
            make_batch,
            lambda: None,
            steps=6,
            learning_rate=1e-2,
            seed=1,
            save_every=2,
            workers=0,
        )
        return fit.load_file(tmp_path / folder / "toy" / "checkpoint.safetensors")

    whole = trained("whole", None)
    assert any(name.endswith("momentum_buffer") for name in whole)
    with pytest.raises(KeyboardInterrupt):
        trained("broken", 4)
    resumed = trained("broken", None)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
