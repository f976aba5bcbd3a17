import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from alignkit import config
from alignkit.config import LoraConfig, RunConfig, parse


@dataclass
class Reward:
    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Config(RunConfig):
    """A method's config."""

    learning_rate: float = 1e-3
    """Overrides the shared default."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapter."""
    rewards: list[Reward] = field(default_factory=list)
    """What is optimised."""


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_file_then_overrides(file):
    argv = file("output_dir: x\nlearning_rate: 1e-5\nlora: {rank: 8}\nrewards: [{name: a, weight: 2, args: {k: 1e-3}}]")
    cfg = parse(Config, [*argv, "--lora.rank", "16", "--use_ema", "true"])
    rewards = [Reward("a", 2.0, {"k": 1e-3})]
    assert cfg == Config("x", learning_rate=1e-5, lora=LoraConfig(rank=16), use_ema=True, rewards=rewards)


def test_a_list_is_replaced_not_merged(file):
    argv = file("output_dir: x\nrewards: [{name: a, weight: 2, args: {k: 1}}]")
    assert parse(Config, [*argv, "--rewards", '[{"name": "b"}]']).rewards == [Reward("b")]
    assert parse(Config, [*argv, '--rewards=[{"name": "b"}]']).rewards == [Reward("b")]


def test_defaults_need_only_a_folder():
    assert parse(Config, ["--output_dir", "x"]) == Config(output_dir="x")


def test_saved_config_reads_back(tmp_path):
    rewards = [Reward("a", args={"b": [1, None]})]
    cfg = Config("x", learning_rate=1e-7, lora=LoraConfig(rank=2, alpha=3.5), rewards=rewards)
    config.save(cfg, tmp_path / "saved.yaml")
    assert parse(Config, ["--config", str(tmp_path / "saved.yaml")]) == cfg
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text()) == config.to_dict(cfg)


WRONG = {
    # command line
    "--lora.rnak 3": "unknown key 'lora.rnak'; the nearest key is 'lora.rank'",
    "--rank 3": "unknown key 'rank'; the nearest key is 'lora.rank'",
    "--learning_rat=3": "unknown key 'learning_rat'; the nearest key is 'learning_rate'",
    "--learn 3": "unknown key 'learn'; the nearest key is 'learning_rate'",  # no abbreviations
    "--lora.rank 3.5": "lora.rank: expected int, got 3.5",
    "--learning_rate fast": "learning_rate: expected float, got fast",
    "--use_ema maybe": "use_ema: expected bool, got maybe",
    "--lr_scheduler step": "'linear', 'cosine'], got step",
    "--max_train_steps 0": "max_train_steps: expected at least 1, got 0",
    "--adam_beta1 1": "adam_beta1: expected in [0, 1), got 1.0",
    "--lora.alpha -1": "lora.alpha: expected above 0, or null, got -1.0",
    "--seed": "argument --seed: expected one argument",
    "stray": "unrecognized arguments: stray",
    "--config nowhere.yaml": 'Parser key "config": File does not exist:',
    # file
    "learning_rat: 3": "unknown key 'learning_rat'; the nearest key is 'learning_rate'",
    "lora: {rnk: 3}": "unknown key 'lora.rnk'; the nearest key is 'lora.rank'",
    "rewards: [{nme: a}]": "unknown key 'nme'; the nearest key is 'rewards.name'",
    "rewards: [{name: a, weight: heavy}]": "weight: expected float, got heavy",
    "rewards: a": "rewards: expected list, got a",
    "lora: 3": "lora: expected a block of keys (rank, alpha, target_modules, dropout), got 3",
    "lora: {alpha: x}": "lora.alpha: expected float or null, got x",
    "lora: {target_modules: to_k}": "lora.target_modules: expected list, got to_k",
    "lora: {rank: null}": "lora.rank: expected int, got null",
    "learning_rate: null": "learning_rate: expected float, got null",
    "learning_rate: fast": "learning_rate: expected float, got fast",
    "mixed_precision: no": "got False (YAML reads a bare no as false: quote it)",
    "lora: {rank: [": "Problems parsing config: while parsing a flow",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(wrong, file, capsys):
    is_file = ": " in wrong and not wrong.startswith("--")
    argv = file(f"output_dir: x\n{wrong}\n") if is_file else ["--output_dir", "x", *wrong.split()]
    with pytest.raises(SystemExit) as stop:
        parse(Config, argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and WRONG[wrong] in captured.err


def test_missing_output_dir(capsys):
    with pytest.raises(SystemExit):
        parse(Config, [])
    assert capsys.readouterr().err == "error: the following arguments are required: output_dir\n"


def test_one_process_of_several_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse(Config, [])
    assert capsys.readouterr().err == ""


def test_help_explains_every_field(capsys):
    """Each key with the docstring of its field: nothing is undocumented, in the shared fields and in the blocks."""
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for prefix, cls in (("", RunConfig), ("lora.", LoraConfig)):
        for f in dataclasses.fields(cls):
            after = text.split(f" --{prefix}{f.name} ")[-1]
            assert after.index("(") > 20 or f.name == "output_dir", f"{prefix}{f.name} has no help"
    assert "Overrides the shared default. (type: float, default: 0.001)" in text


def test_differences():
    saved = {"a": 1, "b": {"c": [1], "d": 2}, "old": 0}
    current = {"a": 1, "b": {"c": [2], "d": 2}, "new": 1}
    assert config.differences(saved, current) == {"b.c": ([1], [2]), "new": ("absent", 1), "old": (0, "absent")}


def test_free_fields():
    free = config.free_fields(Config("x"))
    assert {"output_dir", "logging_steps", "report_to", "checkpoints_total_limit"} <= free
    assert not free & {"seed", "learning_rate", "max_train_steps", "lora", "rewards", "mixed_precision", "use_ema"}


@pytest.mark.parametrize("words", [["--lora.target-modules", "[to_q]"], ["--lora.target-modules=[to_q]"]])
def test_dashes_do_for_underscores_in_keys_alone(words):
    cfg = parse(Config, ["--output-dir", "a-b", *words, "--pretrained-model-name-or-path=c-d"])
    assert (cfg.output_dir, cfg.pretrained_model_name_or_path, cfg.lora.target_modules) == ("a-b", "c-d", ["to_q"])


@pytest.mark.parametrize(
    "switch", [["--dry-run"], ["--dry_run"], ["--dry_run", "true"], ["--dry_run=true"], ["--dry-run=true"]]
)
def test_a_switch_needs_no_value(switch):
    assert parse(RunConfig, ["--output_dir", "x", *switch, "--seed", "3"]).dry_run
    assert parse(RunConfig, ["--output_dir", "x", *switch]).dry_run
    assert not parse(RunConfig, ["--output_dir", "x", "--dry_run", "false"]).dry_run


def test_a_ctrl_c_outside_the_steps_is_one_line(tmp_path, capsys):
    """While a model loads, say: no traceback, and a shell's exit code."""

    def train(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        config.command(RunConfig, train, ["--output_dir", str(tmp_path)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines() == [
        "interrupted: the same command goes on from the newest checkpoint, if there is one"
    ]
