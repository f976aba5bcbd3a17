"""The tables of the benchmarks, from rows that are made up, and the command lines of their cells."""

import json

import pytest

from alignkit.config import parse
from tests.benchmarks import alignit_emoji, alignprop_emoji, controlnetpp_emoji, neti_emoji, neti_overhead
from tests.benchmarks.alignprop_emoji import (
    ARMS,
    ROOT,
    SEEDS,
    command,
    curve,
    first_reached,
    key,
    race_over_seeds,
    table,
)
from training import alignprop, controlnetpp, ddpo


@pytest.mark.parametrize("arm", ARMS)
def test_every_cell_is_a_command_that_its_trainer_understands(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *line = command(arm, 1, tmp_path)[1:]
    trainer = {"training/alignprop.py": alignprop, "training/ddpo.py": ddpo}[script]
    cfg = parse(trainer.Config, line)
    assert cfg.seed == 1 and cfg.lr_scheduler == "constant"  # so that prolonging a run changes nothing in it
    updates = ARMS[arm].updates
    assert list(updates) == sorted(updates)
    if arm == "DDPO":
        assert cfg.train_batch_size * cfg.gradient_accumulation_steps * updates[-1] == 4096
        assert all(n % cfg.updates_per_round == 0 for n in updates)


def test_the_race_trains_on_one_thing():
    """Base, rewards, prompts, steps, guidance and LoRA of DDPO are AlignProp's."""
    one, two = (
        parse(trainer.Config, ["--config", str(ROOT / "configs" / f"{ARMS[arm].config}.yaml")])
        for arm, trainer in (("AlignProp", alignprop), ("DDPO", ddpo))
    )
    for name in ("pretrained_model_name_or_path", "rewards", "prompt_file", "num_inference_steps", "guidance_scale"):
        assert getattr(one, name) == getattr(two, name)
    assert one.lora == two.lora and one.learning_rate == two.learning_rate
    assert one.train_batch_size == two.train_batch_size


def points(*gains_and_images) -> list[dict]:
    return [
        {"images": images, "seconds": 60.0 * images, "gain": gain, "present_kept": 1.0}
        for gain, images in gains_and_images
    ]


def test_where_the_goal_is_first_reached():
    assert first_reached(points((1.0, 100), (2.0, 200)), "images") == 50
    assert first_reached(points((0.25, 100), (0.75, 200), (0.1, 300)), "seconds") == 60 * 150
    assert first_reached(points((-0.5, 100), (0.0, 200)), "images") is None
    assert first_reached([], "images") is None


def test_a_curve_reads_the_time_off_the_run(tmp_path):
    events = [{"type": "start", "step": 0, "global_batch": 16}]
    events += [{"type": "scalars", "step": i, "images_per_second": 8.0} for i in range(60)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    spec = ARMS["DRaFT-LV"]
    rows = [{"aesthetic_gain_sd": 0.1 * i, "present_kept": 1.0} for i in range(len(spec.updates))]
    drawn = curve(spec, tmp_path, rows)
    assert [point["seconds"] for point in drawn] == [2.0 * n for n in spec.updates]
    assert drawn[-1]["images"] == 60 * 16 * 3  # of each image, two copies beside it


def test_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(alignprop_emoji, "RESULTS", tmp_path / "results.jsonl")
    base, lora = {"present": 0.8, "aesthetic_gain_sd": 0.0}, {"present": 0.7, "aesthetic_gain_sd": 1.0}
    curves = {
        "AlignProp": points((0.25, 100), (0.75, 200)),
        "ReFL": points((0.5, 300)),
        "DDPO": points((0.1, 2000), (0.4, 4096)),
    }
    rows = [
        key(arm, seed) | {"base": base, "lora": lora} | ({"curve": curves[arm]} if arm in curves else {})
        for seed in SEEDS
        for arm in ("DDPO", "aesthetic", "AlignProp", "ReFL")
    ]
    rows.append(rows[0] | {"config": "old"})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = table().split("\n\n")
    assert len(first.splitlines()) == 2 + 12 and "| aesthetic | 0 | 1.0 | 0.8 → 0.7 |" in first
    lines = second.splitlines()
    assert len(lines) == 2 + 9
    assert "| AlignProp | 0 | +0.25 (100; 100.0), +0.75 (200; 200.0) | 150 images, 150.0 min | 1.0 times |" in second
    assert "| ReFL | 2 | +0.50 (300; 300.0) | 300 images, 300.0 min | 2.0 times | 2.0 times |" in second
    assert "not reached | more than 27.3 times | more than 27.3 times |" in second
    assert len(third.splitlines()) == 2 + 3
    assert "| ReFL | 3 | 300 (300 to 300) | 300.0 (300.0 to 300.0) | 2.0 (2.0 to 2.0) | 2.0 (2.0 to 2.0) |" in third


def test_the_race_over_seeds():
    """Means and ends over seeds; of ratios, seed by seed; a run that did not get there makes a lower bound."""
    curves = {
        "AlignProp": [points((0.5, 100)), points((0.5, 200)), points((0.1, 500))],
        "ReFL": [points((0.5, 300)), points((0.5, 400)), points((0.5, 800))],
        "DDPO": [points((0.5, 1000)), points((0.1, 4000)), points((0.5, 1000))],
    }
    cells = [{"arm": arm, "seed": i, "curve": curve} for arm, runs in curves.items() for i, curve in enumerate(runs)]
    alignprop, refl, ddpo = race_over_seeds(cells).splitlines()[2:]
    assert "| 3 | more than 267 (100 to 500) |" in alignprop and alignprop.endswith("| 1.0 (1.0 to 1.0) |")
    assert "| 500 (300 to 800) | 500.0 (300.0 to 800.0) | 2.5 (2.0 to 3.0) | 2.5 (2.0 to 3.0) |" in refl
    assert "| more than 2,000 (1,000 to 4,000) |" in ddpo and "| more than 15.0 (10.0 to 20.0) |" in ddpo
    assert race_over_seeds(cells[-1:]).splitlines()[2].endswith("|  |  |")
    by_images, by_minutes = alignprop_emoji.plot(cells).axes
    assert [line.get_xdata()[-1] for line in by_images.lines[1:]] == [cell["curve"][-1]["images"] for cell in cells]
    assert [text.get_text() for text in by_images.get_legend().get_texts()] == list(curves)
    assert by_minutes.lines[1].get_xdata()[-1] == cells[0]["curve"][-1]["seconds"] / 60


def test_the_text_of_a_concept_is_little_beside_the_network():
    """At SD 1.5's shapes: for 8 images at most 10 % of a step; under AlignIT, for one image, at most 5 %."""
    network, text = neti_overhead.counted(neti_overhead.IMAGES, neti_overhead.WINDOW)
    assert 0 < text <= 0.1 * network
    network, text = neti_overhead.counted(1, neti_overhead.PREFIX)
    assert 0 < text <= 0.05 * network


def controlled(condition: str, arm: str, seed: int, figure: float, real: float = 0.5, **fields) -> dict:
    """A cell of the ControlNets' benchmark."""
    name = controlnetpp_emoji.METRICS[condition][0]
    scores = {name: figure, "alignment": 0.8, "diversity": 1.0, "KID": 0.0}
    cell = {
        "mixed_precision": "bf16",
        "steps": 500,
        "train_seconds": 60,
        "sha256": "0" * 64,
        "real": scores | {name: real},
        "scores": scores,
    }
    return controlnetpp_emoji.key(condition, arm, seed) | cell | fields


@pytest.fixture
def controlled_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(controlnetpp_emoji, "RESULTS", tmp_path / "controlnetpp_emoji.jsonl")

    def write(*cells: dict) -> None:
        controlnetpp_emoji.RESULTS.write_text("".join(json.dumps(cell) + "\n" for cell in cells))

    return write


@pytest.mark.parametrize("condition", controlnetpp_emoji.CONDITIONS)
def test_every_controlnet_cell_is_a_command_that_its_trainer_understands(condition, controlled_cells, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="run these two before it"):
        controlnetpp_emoji.command(condition, controlnetpp_emoji.SAME_TIME, 1, "bf16")
    without = controlled(condition, controlnetpp_emoji.NO_REWARD, 1, 0.1, train_seconds=100)
    controlled_cells(without, controlled(condition, controlnetpp_emoji.REWARD, 1, 0.1, train_seconds=150))
    for arm in controlnetpp_emoji.arms_of(condition):
        script, *line = controlnetpp_emoji.command(condition, arm, 1, "bf16")[1:]
        cfg = parse(controlnetpp.Config, line)
        assert script == "training/controlnetpp.py" and cfg.mixed_precision == "bf16" and cfg.reward_start == 0
        if arm == controlnetpp_emoji.FIRST_STAGE:
            assert (cfg.seed, cfg.max_train_steps, cfg.controlnet_model_name_or_path) == (1, 1500, None)
        else:
            longer = 1.5 if arm == controlnetpp_emoji.SAME_TIME else 1
            assert (cfg.seed, cfg.max_train_steps) == (1001, 500 * longer)
            assert "first_stage_1" in cfg.controlnet_model_name_or_path
        rewarded = arm.startswith("reward") or arm in ("control: detached", "control: other labels")
        assert (cfg.reward_weight > 0) == rewarded, arm


def test_what_the_reward_gained(controlled_cells):
    """Differences within a seed: +0.1 and +0.3, a quarter and three quarters of the way; a seed without its pair."""
    first, without, reward = (controlnetpp_emoji.__dict__[name] for name in ("FIRST_STAGE", "NO_REWARD", "REWARD"))
    controlled_cells(
        controlled("segmentation", without, 0, 0.1),
        controlled("segmentation", reward, 0, 0.2),
        controlled("segmentation", without, 1, 0.1),
        controlled("segmentation", reward, 1, 0.4),
        controlled("segmentation", reward, 2, 0.9),
        controlled("segmentation", first, 0, 0.08),
        controlled("segmentation", reward, 0, 0.9, config="old"),
    )
    assert "depth" not in controlnetpp_emoji.write_card(["depth"]).read_text()  # which has no cells
    _, _, *lines = controlnetpp_emoji.gains("segmentation").splitlines()
    assert lines == [
        "| first stage | 1 | mIoU -0.0200 | -5% | +0.0% | +0.0% |",
        "| reward | 2 | mIoU +0.2000 ± 0.1000 | +50% ± 25% | +0.0% ± 0.0% | +0.0% ± 0.0% |",
    ]
    table = controlnetpp_emoji.table("segmentation")
    assert "| reward | 1 | bf16 | 500 | 1 | 0.4000 | 0.8000 | 1.0000 | 0.0000 | 00000000 |" in table
    assert "| real scenes, VAE round trip | | | | | 0.5000 |" in table
    card = controlnetpp_emoji.write_card(["segmentation"])  # of no weights that are here: without a strip
    assert table in card.read_text() and "![" not in card.read_text()


def test_alignits_table(tmp_path, monkeypatch):
    """One row of current cells, each concept once: what was lost, what came back, and what became of the identity."""
    monkeypatch.setattr(alignit_emoji, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr("alignkit.emoji.measure.world_hash", lambda: "w")  # which reads all weights

    def arm(others, identity):
        return {"others": others, "identity": identity}

    rows = []
    for number in (0, 1):
        arms = {"base": arm(0.8, 0.1), "customised": arm(0.4, 0.5), "alignit": arm(0.7, 0.4), "oracle": arm(0.6, 0.3)}
        arms |= {f"control, {name}": arm(0.8, 0.2) for name in ("random rows", "noun's rows")}
        rows.append(alignit_emoji.key("lora", "A", number) | {"arms": arms})
    rows += [rows[0], rows[1] | {"config": "old", "arms": None}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert alignit_emoji.table().splitlines()[2:] == [
        "| lora | A | 2 | 0.800 | 0.400 | 0.700 | 0.600 | 40.0 | 0.75 [0.75, 0.75] | 0.500 | 0.400 | "
        "-20.0 [-20.0, -20.0] | 0.300 | 0.200 | 0.200 |"
    ]


def test_arms_without_a_customiser_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(alignit_emoji, "ROOT", tmp_path)
    monkeypatch.setattr("alignkit.emoji.measure.world_hash", lambda: "w")
    monkeypatch.setattr(alignit_emoji, "base_arms", lambda base, noun, seed: {"base": (noun,)})
    drawn = []
    monkeypatch.setattr(alignit_emoji, "figures", lambda *of: drawn.append(of) or {"identity": len(drawn)})
    for noun, precision in (("lemon", "no"), ("lemon", "no"), ("fruit", "no"), ("lemon", "bf16"), ("lemon", "no")):
        found = alignit_emoji.base_figures(None, noun, "A", 0, precision)
        assert found == {"base": {"identity": {("fruit", "no"): 2, ("lemon", "bf16"): 3}.get((noun, precision), 1)}}
    assert drawn == [("lemon", "A", 0), ("fruit", "A", 0), ("lemon", "A", 0)]


def test_netis_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(neti_emoji, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr("alignkit.emoji.measure.world_hash", lambda: "w")

    def cell(wanted, drawn, kept=()):
        points = [(step, None, value) for step, value in zip(neti_emoji.STEPS, drawn, strict=True)]
        points += [
            (neti_emoji.STEPS[-1], units, value) for units, value in zip(neti_emoji.TRUNCATIONS, kept, strict=False)
        ]
        figures = dict.fromkeys(neti_emoji.FIGURES, 0.0)
        scores = [{"step": s, "truncation": t} | figures | {"image_similarity": value} for s, t, value in points]
        return wanted | {"scores": scores}

    rates = {arm: neti_emoji.RATES[0] for arm in neti_emoji.ARMS}
    rows = [cell(wanted, [1.0 - wanted["learning_rate"]] * 4) for wanted in neti_emoji.sweep()]
    for i in (0, 1):
        curves = {"neti": (0.25, 0.5, 0.75, 1.0), "neti without bypass": (0.1, 0.2, 0.3, 0.625)}
        for arm, values in curves.items():
            kept = (0.25, 0.5, 0.75) if arm == "neti" else ()
            rows.append(cell(neti_emoji.key(arm, "A", i, rates[arm]), values, kept))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert neti_emoji.sweep_table().splitlines()[6] == "| neti | 0.01 | 0.990 | 0.000 | 0.000 |"
    table = neti_emoji.table()
    assert "| A | neti without bypass | image_similarity | +0.375 | +0.375 to +0.375 |" in table
    assert "| neti without bypass, 300 steps | 150 | 150 to 150 |" in table  # half-way from 100 to 200
    assert "| 16 to all | image_similarity | +0.250 | +0.250 to +0.250 |" in table
    assert neti_emoji.steps_to(rows[-2], "image_similarity", 2.0) == 300
    assert neti_emoji.steps_to(rows[-2], "image_similarity", 0.0) == 50
