"""`alignkit plan` against the bytes of live tensors of the same training on the CPU; prints the table of docs/plan.md.

    python -m tests.benchmarks.plan                  # the emoji world and SD 1.5's size; minutes on two cores
    python -m tests.benchmarks.plan --model emoji

Two steps of AlignProp and a validation, the last two of three denoising steps with gradient, predicted and measured in
a process each; the highest resident memory of the measured one stands beside it.
"""

import json
import resource
import subprocess
import sys
import tempfile
from argparse import ArgumentParser

from alignkit import plan
from alignkit.config import parse
from training import alignprop

MODELS = {
    "emoji": ["--config=configs/alignprop/emoji.yaml", "--train_batch_size=4", "--num_validation_images=4"],
    "sd15": [
        "--config=configs/alignprop/sd15.yaml",
        "--rewards=[{name: compressibility, args: {}}]",
        "--monitors=[]",
        "--num_validation_images=1",
        "--train_batch_size=1",
        "--mixed_precision=no",
    ],
}
SETTINGS = [
    "--random_init=true",
    "--dry_run=true",
    "--gradient_accumulation_steps=1",
    "--num_inference_steps=3",
    "--plan.settings={distribution: fixed, k: 2}",
]


def run(model: str, estimate: str) -> None:
    """One training, here; prints its figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*MODELS[model], *SETTINGS, f"--output_dir={folder}/run", f"--estimate={estimate}"]
        cfg = parse(alignprop.Config, options)
        if estimate == "cpu":
            ledger = plan.estimate(alignprop.train, cfg)
        else:
            with plan.Ledger("cpu") as ledger:
                try:
                    alignprop.train(cfg)
                except SystemExit as end:  # of the dry run
                    assert not end.code
    figures = {name: phase.peak / 2**30 for name, phase in ledger.phases.items()}
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    figures["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    figures["tflops"] = ledger.phases["train"].flops[-1] / 1e12
    print("\n" + json.dumps(figures))


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one")
    parser.add_argument("--run", choices=("cpu", "no"), help="with one --model: only predict (cpu) or measure (no)")
    args = parser.parse_args()
    if args.run:
        run(args.model[0], args.run)
        return
    print("| model | phase | predicted, GiB | measured, GiB | difference | process, GiB | TFLOP a step, both |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in args.model or MODELS:
        predicted, measured = (figures_of(model, estimate) for estimate in ("cpu", "no"))
        flops = f"{predicted['tflops']:.4g}, {measured['tflops']:.4g}"
        for phase in ("train", "validate"):
            guess, truth = predicted[phase], measured[phase]
            print(
                f"| {model} | {phase} | {guess:.3f} | {truth:.3f} | {100 * (guess / truth - 1):+.1f} % "
                f"| {measured['process']:.2f} | {flops} |",
                flush=True,
            )


def figures_of(model: str, estimate: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.plan", "--model", model, "--run", estimate]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
