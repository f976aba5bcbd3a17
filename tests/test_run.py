import errno
import json
import math
import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignkit import artifacts
from alignkit.artifacts import read_events
from alignkit.optimizers import PACKAGES
from alignkit.run import Run, lr_factor
from tests.torchrun import torchrun
from tests.toy import ToyConfig, launch, toy_config, toy_loss, toy_params, train


@dataclass
class OnData(ToyConfig):
    prompt_file: str = ""
    train_data_dir: str = ""
    class_data_dir: str = ""


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def tensors(checkpoint):
    return {file.stem: load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))}


def assert_same(one, two, tolerance=0.0):
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys() == {"trainable", "ema", "optimizer", "extra"}
    for file in one:
        assert one[file].keys() == two[file].keys()
        for name, tensor in one[file].items():
            torch.testing.assert_close(tensor, two[file][name], rtol=0, atol=tolerance)


def scalars(folder, *names):
    events = [event for event in read_events(folder / "events.jsonl") if event["type"] == "scalars"]
    return [[event["step"], *(event[name] for name in names)] for event in events]


@pytest.fixture
def finished(tmp_path):
    """A run of 10 steps that nothing interrupted."""
    train(toy_config(tmp_path / "finished"))
    return tmp_path / "finished"


def test_keeps_the_newest_checkpoints(finished):
    assert len(scalars(finished)) == 10
    assert checkpoints(finished) == ["checkpoint-10", "checkpoint-8"]
    assert not list(finished.glob(".tmp-*"))


def test_killed_anywhere_equals_uninterrupted(finished, tmp_path):
    """SIGKILL inside a step, after an update, while a checkpoint is written, while an old one is deleted."""
    folder = tmp_path / "killed"
    for die, left in [
        ("1:backward", []),
        ("3:writing", ["checkpoint-2"]),
        ("5:rotating", ["checkpoint-4", "checkpoint-6"]),
        ("7:writing", ["checkpoint-4", "checkpoint-6"]),
        ("8:update", ["checkpoint-6", "checkpoint-8"]),
    ]:
        code, output = launch(toy_config(folder, die=die))
        assert (code, checkpoints(folder)) == (-signal.SIGKILL, left), output
    code, output = launch(toy_config(folder))
    assert code == 0, output
    assert "resuming" in output
    assert_same(folder / "checkpoint-10", finished / "checkpoint-10")
    names = ("loss", "grad_norm", "dropout", "learning_rate")
    assert scalars(folder, *names) == scalars(finished, *names)
    assert not list(folder.glob(".tmp-*"))


def test_accumulation_does_not_change_the_result(finished, tmp_path):
    train(toy_config(tmp_path / "one", train_batch_size=4, gradient_accumulation_steps=1))
    assert_same(tmp_path / "one" / "checkpoint-10", finished / "checkpoint-10", tolerance=1e-6)


def test_first_update_is_adamw_on_the_mean_gradient(tmp_path):
    """After one step AdamW's first moment is (1 - beta1) times the clipped gradient of the mean loss."""
    params = toy_params()
    run = train(toy_config(tmp_path, max_train_steps=1, lr_scheduler="constant", max_grad_norm=0.1))
    loss = toy_loss(run, params, 0, [0, 1, 2, 3]).mean()
    grads = torch.autograd.grad(loss, params.values())
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert norm > 0.1
    [[_, logged]] = scalars(tmp_path, "grad_norm")
    assert logged == pytest.approx(norm.item(), abs=1e-6)
    saved = load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors")
    for name, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(saved[f"{name}/exp_avg"], 0.1 * grad * 0.1 / norm, rtol=0, atol=1e-6)


def test_two_processes_equal_one(finished, tmp_path):
    """Same global batch; rank 1 alone is told to stop after the first update, then the same command goes on."""
    folder = tmp_path / "two"
    common = ["--max_train_steps", "10", "--train_batch_size", "2", "--learning_rate", "1e-2", "--lr_scheduler",
              "cosine", "--lr_warmup_steps", "2", "--use_ema", "true", "--report_to", "none",
              "--checkpointing_steps", "2", "--output_dir", str(folder)]  # fmt: skip
    stopped = torchrun("-m", "tests.two_ranks", *common, "--die", "0:sigterm")
    assert stopped.returncode != 0
    assert checkpoints(folder) == ["checkpoint-1"], stopped.stderr
    first = train(toy_config(tmp_path / "first", checkpointing_steps=1, checkpoints_total_limit=None))
    assert_same(folder / "checkpoint-1", tmp_path / "first" / "checkpoint-1", tolerance=1e-6)
    resumed = torchrun("-m", "tests.two_ranks", *common)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("two processes, equal parameters") == 1
    assert_same(folder / "checkpoint-10", finished / "checkpoint-10", tolerance=1e-6)
    for [step, loss], [_, alone] in zip(scalars(folder, "grad_norm"), scalars(finished, "grad_norm"), strict=True):
        assert loss == pytest.approx(alone, abs=1e-6), step
    assert first.num_processes == 1


def test_another_config_is_refused_by_field(finished):
    with pytest.raises(ValueError, match=r"checkpoint-10.*\n  learning_rate: 0.01 there, 0.02 now\nResume"):
        Run(toy_config(finished, learning_rate=2e-2))
    with pytest.raises(ValueError, match=r"global_batch: 4 there, 6 now"):
        Run(toy_config(finished, train_batch_size=3))
    with pytest.raises(ValueError, match=r"max_train_steps: 10 there, 9 now"):
        Run(toy_config(finished, max_train_steps=9))


def test_other_data_under_the_same_name_is_refused(tmp_path):
    """A resumed run equals an uninterrupted one, which has seen the same data to its end."""
    folder, classes, prompts = tmp_path / "pictures", tmp_path / "classes", tmp_path / "prompts.txt"
    folder.mkdir()
    classes.mkdir()
    (classes / "dog.png").write_bytes(b"dog")
    (folder / "cat.png").write_bytes(b"cat")
    (folder / "cat.txt").write_text("a cat")
    prompts.write_text("a cat")
    places = {"prompt_file": str(prompts), "train_data_dir": str(folder), "class_data_dir": str(classes)}
    cfg = OnData(**vars(toy_config(tmp_path / "run")), **places)
    train(cfg)
    for name, file, other in (
        ("prompt_file", prompts, "a dog"),
        ("train_data_dir", folder / "cat.txt", "a dog"),
        ("train_data_dir", folder / "cat.png", "kitten"),
        ("class_data_dir", classes / "dog.png", "puppy"),
    ):
        before = file.read_bytes()
        file.write_text(other)
        with pytest.raises(ValueError, match=rf"another config:\n  contents of {name}: \w+ there, \w+ now\nResume"):
            Run(cfg)
        file.write_bytes(before)
    (folder / ".DS_Store").write_bytes(b"a file manager was here")
    assert train(cfg).position == 10


def test_a_run_among_its_own_data_is_resumed(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"cat")
    cfg = OnData(**vars(toy_config(tmp_path / "run")), train_data_dir=str(tmp_path))
    train(cfg)
    assert train(cfg).position == 10
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "dog.png").write_bytes(b"dog")
    with pytest.raises(ValueError, match="contents of train_data_dir"):
        Run(cfg)


def test_processes_that_found_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """Machines without a common file system: one finds the run, the other starts anew."""
    run = Run(toy_config(tmp_path), "toy")
    monkeypatch.setattr(run, "gather", lambda position: torch.cat([position, position + 500]))
    with pytest.raises(ValueError, match=r"checkpoints of different steps, \[0, 500\]. Give all machines"):
        run.prepare(toy_params())


def test_the_others_wait_for_what_the_main_process_does_alone(tmp_path):
    """Drawing 200 images of a class takes longer than the ten minutes that NCCL waits unless told."""
    assert Run(toy_config(tmp_path)).accelerator.init_handler.timeout > timedelta(hours=1)


@pytest.mark.parametrize(("device", "on_cpu"), [("cuda", False), ("mps", True)])
def test_a_gpu_without_float64_is_left_alone(device, on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))

    def told(cpu, **options):
        raise InterruptedError(cpu)

    monkeypatch.setattr("alignkit.run.Accelerator", told)
    with pytest.raises(InterruptedError, match=str(on_cpu)):
        Run(toy_config(tmp_path))


def test_what_another_config_made_is_not_written_over(finished):
    """Also where its checkpoints are gone, or were never there, as in a folder that came from the Hub."""
    for checkpoint in finished.glob("checkpoint-*"):
        artifacts.remove(checkpoint)
    (finished / "README.md").write_text("a card")
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"\(finished\) with another config:\n  learning_rate: 0.01 there, 0.02 now\n"):
        Run(toy_config(finished, learning_rate=2e-2))
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before
    Run(toy_config(finished, learning_rate=2e-2, dry_run=True))
    assert train(toy_config(finished, logging_steps=5)).position == 10  # its own config may begin again


def test_a_run_that_made_nothing_may_begin_again_with_another_config(tmp_path):
    Run(toy_config(tmp_path))  # and then, say, its data were not there
    assert train(toy_config(tmp_path, learning_rate=2e-2)).position == 10


def test_what_does_not_change_results_may_change(finished):
    cfg = toy_config(finished, max_train_steps=12, logging_steps=5, checkpoints_total_limit=1, train_batch_size=4,
                     gradient_accumulation_steps=1)  # fmt: skip
    assert train(cfg).position == 12
    assert checkpoints(finished) == ["checkpoint-12"]


def test_a_finished_run_has_no_steps_left(finished):
    before = tensors(finished / "checkpoint-10")
    run = train(toy_config(finished), body=lambda run, step: pytest.fail("no step expected"))
    assert run.position == 10
    torch.testing.assert_close(tensors(finished / "checkpoint-10"), before, rtol=0, atol=0)
    assert torch.equal(run.params["layer.weight"].detach(), before["trainable"]["layer.weight"])


def test_holding_gives_the_parameters_back(tmp_path):
    run = Run(toy_config(tmp_path, dry_run=True))
    run.prepare(params := toy_params())
    before = params["layer.bias"].detach().clone()
    with pytest.raises(KeyError), run.holding({"layer.bias": torch.ones(8)}):
        assert params["layer.bias"].tolist() == [1] * 8
        raise KeyError
    assert torch.equal(params["layer.bias"], before)


@pytest.mark.parametrize("name", ["adamw_8bit", "prodigy", "adafactor", "diffgrad"])
def test_other_optimizers_learn_and_resume_bit_for_bit(name, tmp_path):
    pytest.importorskip(PACKAGES[name])
    width = 1024 if name == "adamw_8bit" else 8  # moments of fewer than 4,096 numbers stay in 32 bits
    fields = {"optimizer": name, "lr_scheduler": "constant", "learning_rate": 1.0 if name == "prodigy" else 1e-2}
    train(toy_config(tmp_path / "whole", **fields), toy_params(width))
    train(toy_config(tmp_path / "resumed", **fields, max_train_steps=5), toy_params(width))
    assert train(toy_config(tmp_path / "resumed", **fields), toy_params(width)).position == 10
    assert_same(tmp_path / "whole" / "checkpoint-10", tmp_path / "resumed" / "checkpoint-10")
    trained = load_file(tmp_path / "whole" / "checkpoint-10" / "trainable.safetensors")
    assert all(not torch.equal(tensor, trained[key]) for key, tensor in toy_params(width).items())
    if name == "adamw_8bit":
        moments = load_file(tmp_path / "whole" / "checkpoint-10" / "optimizer.safetensors")
        assert moments["layer.weight/state1"].dtype == torch.uint8


def test_an_optimizer_that_cannot_work_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="prodigy comes with pytorch_optimizer, .* pip install pytorch_optimizer"):
        Run(toy_config(tmp_path / "run", optimizer="prodigy"))
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, .* got 'sgd'"):
        Run(toy_config(tmp_path / "run", optimizer="sgd"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_is_refused_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported: every process holds the whole model.*torchrun"):
        Run(toy_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="report_to: expected one of all, .*tensorboard.* or none, got 'tensorbord'"):
        Run(toy_config(tmp_path / "run", report_to="tensorbord"))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_pushed_if_wanted(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("alignkit.run.push_to_hub", lambda *args: pushed.append(args) or "somewhere")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    fields = {"push_to_hub": True, "hub_model_id": "me/toy", "max_train_steps": 1}
    with pytest.raises(ValueError, match="push_to_hub: expected to be logged in.*HF_TOKEN"):
        train(toy_config(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    train(toy_config(tmp_path / "run", **fields))
    assert pushed == [(tmp_path / "run", "me/toy", ["toy/**"])]
    assert "token" not in (tmp_path / "run" / "config.yaml").read_text()


def test_other_parameters_are_refused(finished):
    params = toy_params()
    params["head.weight"] = torch.nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"such as head.weight: \[1, 8\] there, \[2, 8\] now"):
        train(toy_config(finished), params)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_damaged_checkpoint(finished, damage):
    newest = finished / "checkpoint-10"
    path = newest / ("state.json" if damage == "state" else "optimizer.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match=rf"{path.name} .*(damaged|exist)(.|\n)*Remove {newest} to resume"):
        Run(toy_config(finished))
    artifacts.remove(newest)
    assert train(toy_config(finished)).position == 10


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    real, folder = artifacts.save_file, tmp_path / "full"

    def full(tensors, path, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            raise artifacts.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **kwargs)

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(OSError, match=r"no space left to write .*checkpoint-4 .*free some space") as caught:
        train(toy_config(folder))
    assert caught.value.errno == errno.ENOSPC
    assert checkpoints(folder) == ["checkpoint-2"]
    monkeypatch.undo()
    train(toy_config(folder))
    train(toy_config(tmp_path / "other"))
    assert_same(folder / "checkpoint-10", tmp_path / "other" / "checkpoint-10")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_saves_and_resumes_exactly(finished, tmp_path, number, capsys):
    folder = tmp_path / "stopped"
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(toy_config(folder), body=lambda run, step: step == 4 and signal.raise_signal(number))
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) is handler
    assert "Run the same command again to resume" in capsys.readouterr().err
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-5"]
    train(toy_config(folder))
    assert_same(folder / "checkpoint-10", finished / "checkpoint-10")


def test_a_loop_that_an_exception_leaves_gives_the_signals_back(tmp_path):
    """At once, and not when the last traceback is forgotten: a notebook or a test keeps it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers, during = [signal.getsignal(number) for number in numbers], []

    def body(run, step):
        during.extend(signal.getsignal(number) for number in numbers)
        raise KeyError(step)

    with pytest.raises(KeyError) as kept:
        train(toy_config(tmp_path), body=body)
    assert kept.traceback and all(now is not before for now, before in zip(during, handlers, strict=True))
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = Run(toy_config(tmp_path))
    run.prepare(params := toy_params())
    with pytest.raises(FloatingPointError) as caught:
        for step in run.steps():
            for indices in run.micro_batches(step):
                loss = toy_loss(run, params, step, indices)
                run.backward(loss / 0 if step == 3 and 14 in indices else loss, reward=-loss)
            run.update()
    message = str(caught.value)
    assert "step 3, samples [14, 15] of [14, 15]" in message and "reward: [-" in message and "checkpoint-2" in message
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert read_events(tmp_path / "events.jsonl")[-1]["type"] == "error"


def test_gradient_that_is_not_finite_stops_the_run(tmp_path):
    run = Run(toy_config(tmp_path))
    run.prepare(params := toy_params())
    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        for step in run.steps():
            for indices in run.micro_batches(step):  # sqrt has an infinite slope at 0
                run.backward((params["layer.bias"].sum() * torch.zeros(len(indices))).sqrt())
            run.update()
    assert checkpoints(tmp_path) == []


def test_fp16_skips_overflow_and_resumes_the_scale(tmp_path):
    """A gradient of 30 in half precision overflows (65504) until the loss scale has fallen from 65536 to 2048."""
    cfg = toy_config(tmp_path, mixed_precision="fp16", max_train_steps=8, use_ema=False)
    for stop in (3, 8):
        run = Run(cfg)
        run.prepare(params := toy_params())
        before = params["layer.bias"].detach().clone()
        with pytest.raises(SystemExit) if stop < 8 else pytest.MonkeyPatch.context():
            for step in run.steps():
                for indices in run.micro_batches(step):
                    run.backward(params["layer.bias"].half().float().sum() * torch.full((len(indices),), 60.0))
                run.update()
                if step + 1 == stop < 8:
                    assert torch.equal(params["layer.bias"], before)
                    signal.raise_signal(signal.SIGINT)
    skipped = [event["loss_scale"] for event in read_events(tmp_path / "events.jsonl") if event["type"] == "skipped"]
    assert skipped == [2.0**k for k in (15, 14, 13, 12, 11)]
    assert not torch.equal(params["layer.bias"], before)


def test_update_exactly_once(tmp_path):
    run = Run(toy_config(tmp_path, dry_run=True))
    run.prepare(toy_params())
    with pytest.raises(RuntimeError, match="without run.update"):
        for _ in run.steps():
            pass
    with pytest.raises(RuntimeError, match="second run.update"):
        for _ in run.steps():
            run.update()
            run.update()


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_learning_rate_equals_diffusers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=11)
    for step in range(11):
        assert lr_factor(step, name, 3, 11) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_ema_is_the_recursion(tmp_path):
    seen = []
    cfg = toy_config(tmp_path, ema_decay=0.3)
    run = train(cfg, body=lambda run, step: seen.append(run.params["layer.bias"].tolist()))
    average = toy_params()["layer.bias"].detach().double()
    for n, value in enumerate(seen):
        decay = min(0.3, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * torch.tensor(value, dtype=torch.float64)
    torch.testing.assert_close(run.ema["layer.bias"].double(), average, rtol=0, atol=1e-6)
    trained = run.params["layer.bias"].detach().clone()
    with pytest.raises(KeyError), run.averaged():
        assert torch.equal(run.params["layer.bias"], run.ema["layer.bias"])
        raise KeyError
    assert torch.equal(run.params["layer.bias"], trained)


def test_generators(tmp_path):
    run, again = Run(toy_config(tmp_path)), Run(toy_config(tmp_path))
    other = Run(toy_config(tmp_path, seed=1))

    def draw(run, *key):
        return torch.rand(1, generator=run.generator(*key)).item()

    assert draw(run, 3, 5, "x") == draw(again, 3, 5, "x")
    keys = [(3,), (3, 5), (5, 3), (3, 5, "x"), (3, 5, "y"), (3, None, "x")]
    assert len({draw(r, *key) for key in keys for r in (run, other)}) == 2 * len(keys)


def test_each_number_comes_once_an_epoch(tmp_path):
    run = Run(toy_config(tmp_path / "run"))
    drawn = [run.shuffled(5, n, "prompts") for n in range(10)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4] and drawn[:5] != drawn[5:]
    assert [run.shuffled(5, n, "prompts") for n in range(10)] == drawn  # in any order of asking
    assert [run.shuffled(5, n, "images") for n in range(5)] != drawn[:5]


def test_micro_batches_tile_the_global_batch(tmp_path):
    run = Run(toy_config(tmp_path, train_batch_size=3))
    assert list(run.micro_batches(0)) == [[0, 1, 2], [3, 4, 5]]
    assert list(run.micro_batches(2)) == [[12, 13, 14], [15, 16, 17]]
    assert run.following(2, [12, 13, 14]) == (2, [15, 16, 17])
    assert run.following(2, [15, 16, 17]) == (3, [18, 19, 20])
    with pytest.raises(ValueError, match=r"expected one loss per sample, \[3\], got \[\]"):
        run.backward(torch.zeros(()))


def test_every(tmp_path):
    run = Run(toy_config(tmp_path, max_train_steps=8))
    assert [step for step in range(8) if run.every(3, step)] == [2, 5, 7]
    assert not any(run.every(0, step) for step in range(8))


def test_a_dry_run_counts_all_validations_at_the_first_ones_time(tmp_path, capsys):
    run = Run(toy_config(tmp_path / "dry", dry_run=True, max_train_steps=1000, validation_steps=300))
    params = toy_params()
    run.prepare(params)
    with run.first_validation():
        time.sleep(0.5)
    validated = []
    with pytest.raises(SystemExit):
        for step in run.steps():
            validated += [step] * run.every(300, step)
            for indices in run.micro_batches(step):
                run.backward(toy_loss(run, params, step, indices))
            run.update()
    out = capsys.readouterr().out
    assert float(out.partition(" s a validation")[0].rpartition(",")[2]) >= 0.5
    assert "1000 steps and 5 validations" in out
    assert validated == [1]  # one, behind the step that is measured


def test_extra_tensors_come_back(tmp_path):
    best = {}
    keep = lambda run, step: best.update(weight=torch.full((3,), float(step)))  # noqa: E731
    train(toy_config(tmp_path), extra_tensors=best, body=keep)
    again = {}
    train(toy_config(tmp_path), extra_tensors=again)
    assert torch.equal(again["weight"], torch.full((3,), 9.0))


def test_dry_run_measures_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "dry"
    with pytest.raises(SystemExit) as stop:
        train(toy_config(folder, dry_run=True), body=lambda run, step: run.show(step, "x", torch.zeros(1, 3, 4, 4)))
    assert stop.value.code == 0
    assert not folder.exists()
    assert "48 trained numbers. Nothing was written." in capsys.readouterr().out


def test_extra_state_comes_back(tmp_path):
    state = {"best": 0.0}
    train(toy_config(tmp_path), extra_state=state, body=lambda run, step: state.update(best=float(step)))
    restored = {"best": 0.0}
    train(toy_config(tmp_path), extra_state=restored)
    assert restored == {"best": 9.0}


def test_logs_and_pictures(tmp_path):
    images = torch.zeros(3, 3, 4, 4)
    images[1] = 1.0

    def body(run, step):
        if run.every(5, step):
            run.show(step, "grid", images, ["a", "b", "c"])
        run.log(step, validation=torch.tensor([1.0, math.nan]))

    train(toy_config(tmp_path, logging_steps=4, validation_steps=5, report_to="tensorboard"), body=body)
    assert [step for (step,) in scalars(tmp_path)] == [3, 3, 4, 4, 7, 7, 9, 9]
    events = read_events(tmp_path / "events.jsonl")
    assert [e["validation"] for e in events if "validation" in e] == [None] * 4
    assert all(e["images_per_second"] > 0 and e["memory_gib"] > 0 for e in events if "loss" in e)
    shown = [event for event in events if event["type"] == "images"]
    assert [event["path"] for event in shown] == ["samples/000004_grid.png", "samples/000009_grid.png"]
    assert shown[0]["captions"] == ["a", "b", "c"]
    grid = Image.open(tmp_path / shown[0]["path"])
    assert grid.size == (8, 8) and [grid.getpixel(at)[0] for at in [(0, 0), (4, 0), (0, 4), (4, 4)]] == [0, 255, 0, 255]
    board = EventAccumulator(str(tmp_path / "toy")).Reload()
    assert board.Tags()["images"] == ["grid"] and [event.step for event in board.Images("grid")] == [4, 9]
    assert "validation" not in board.Tags()["scalars"]  # never finite
    rates = {event.step: event.value for event in board.Scalars("learning_rate")}
    logged = {event["step"]: event["learning_rate"] for event in events if "learning_rate" in event}
    assert rates == pytest.approx(logged) and list(rates) == [3, 4, 7, 9]
    assert {event["type"] for event in events} == {"start", "scalars", "images", "checkpoint", "finish"}
    run = Run(toy_config(tmp_path, logging_steps=4, validation_steps=5, report_to="tensorboard"))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got \[3, 3, 4, 4\] in \[0, 1.5\]"):
        run.show(0, "grid", images * 1.5)


def test_all_trackers_are_those_that_are_installed(tmp_path):
    train(toy_config(tmp_path, max_train_steps=2, report_to="all"))
    assert list((tmp_path / "toy").glob("events.out.tfevents.*"))


def test_events_after_the_last_checkpoint_are_dropped(finished):
    artifacts.remove(finished / "checkpoint-10")
    with open(finished / "events.jsonl", "a") as file:
        file.write('{"type": "scalars", "st')  # killed while writing
    train(toy_config(finished))
    assert [step for (step,) in scalars(finished)] == list(range(10))
    assert all(json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines())


def test_one_process_per_folder(tmp_path):
    run = Run(toy_config(tmp_path / "taken"))
    code, output = launch(run.cfg)
    assert code == 1 and "another process is training in" in output


def test_prepare_wants_float32_parameters(tmp_path):
    run = Run(toy_config(tmp_path))
    for params in ({}, {"w": torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))}):
        with pytest.raises(ValueError, match="float32"):
            run.prepare(params)
