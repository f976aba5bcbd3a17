"""What `make gpu-check` prints: a GPU against what this project, which has none, predicts and promises.

    python tests/benchmarks/gpu_check.py

Versions and device; the emoji demo's and SD 1.5's memory (on random weights) beside `alignkit plan`'s; what is labelled
unverified, each on the emoji demo; the gradients of one step in fp32, fp16 and bf16 against the CPU's in fp32. A check
that fails says so and the others go on. Please send the report back in an issue.
"""

import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from alignkit.base import add_lora, load_base
from alignkit.sampling import draft_k, sample

ROOT = Path(__file__).parents[2]
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
EMOJI = ["training/alignprop.py", "--config=configs/alignprop/emoji.yaml"]
SD15 = [
    *("training/alignprop.py", "--config=configs/alignprop/sd15.yaml", "--random_init=true", "--monitors=[]"),
    *("--rewards=[{name: compressibility, args: {}}]", "--plan.settings={distribution: fixed, k: 2}"),
    *("--train_batch_size=1", "--gradient_accumulation_steps=1", "--num_validation_images=1"),
]
DRY = "--dry_run=true"
TRAININGS = {
    "the emoji demo (the memory is the most that its tensors held)": [*EMOJI, DRY],
    "predicted": [*EMOJI, "--estimate=cuda"],
    "SD 1.5's size": [*SD15, DRY],
    "SD 1.5's size, predicted": [*SD15, "--estimate=cuda"],
    "fp16": [*EMOJI, DRY, "--mixed_precision=fp16"],
    "8-bit AdamW": [*EMOJI, DRY, "--optimizer=adamw_8bit"],
    "nf4": [*EMOJI, DRY, "--mixed_precision=bf16", "--quantization=nf4"],
    "int8": [*EMOJI, DRY, "--mixed_precision=bf16", "--quantization=int8"],
    "text encoders on the CPU": [*EMOJI, DRY, "--offload_text_encoders=true"],
    "torch.compile (inductor)": [*EMOJI, DRY, "--torch_compile=inductor"],
}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def gradients(device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of the images' brightness to the LoRA through the last of four steps, flat, float64 on the CPU."""
    base = load_base("emoji", device=device, dtype=dtype)
    lora = add_lora(base.network, 4, 4, ["to_q", "to_k", "to_v", "to_out.0"])
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(2, *base.latent_shape(), generator=generator).to(device)
    denoiser = base.denoiser(["a cat", "two roses"], guidance_scale=5.0)
    x_0 = sample(denoiser, x_T, base.schedule, base.timesteps(4), draft_k(4, generator, k=1))
    base.decode(x_0).sum().backward()  # a mean's gradient would be lost in float16
    return torch.cat([parameter.grad.flatten() for parameter in lora.values()]).double().cpu()


def compare(device: str) -> list[str]:
    """A line per precision: how far its gradients are from the CPU's in fp32."""
    expected = gradients("cpu", torch.float32)
    lines = []
    for dtype in PRECISIONS:
        found = gradients(device, dtype)
        error = float((found - expected).norm() / expected.norm())
        cosine = float(torch.cosine_similarity(found, expected, dim=0))
        lines.append(f"{dtype}: relative error {error:.2e}, cosine {cosine:.6f}, finite {bool(found.isfinite().all())}")
    return lines


def run(command: list[str]) -> str:
    """What a command of this Python says in the end; a trainer's report, if it is one. RuntimeError where it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-3:]))
    start = max(done.stdout.rfind("dry run:"), done.stdout.rfind("plan of"))
    return done.stdout[start:].strip() if start >= 0 else done.stdout.strip().splitlines()[-1]


def generate(offload: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        line = ["generate", "--prompt=a cat", "--seed=1", f"--offload={offload}", f"--output_dir={folder}"]
        return run(["-m", "alignkit.cli", *line])


def sdxl_in_fp16() -> str:
    """Its VAE, which overflows in fp16, stays in float32."""
    base = load_base("sdxl", device="cuda", dtype=torch.float16, random_init=True, shrink=4)
    image = base.pipeline()("a cat", num_inference_steps=2, height=256, width=256, output_type="pt").images
    return f"VAE in {base.vae.dtype}, images finite {bool(image.isfinite().all())}"


def checks() -> dict[str, Callable[[], str]]:
    """By what each shows, in the order of the report."""
    found = {name: lambda command=command: run(command) for name, command in TRAININGS.items()}
    found |= {f"generate --offload {how}": lambda how=how: generate(how) for how in ("model", "sequential")}
    found |= {
        "SDXL in fp16, random weights": sdxl_in_fp16,
        "gradients of one step against the CPU's in float32": lambda: "\n".join(compare("cuda")),
    }
    if torch.cuda.device_count() > 1:
        found["two GPUs"] = lambda: run([*TWO, *EMOJI, DRY])
    return found


def report(named: dict[str, Callable[[], str]]) -> None:
    """Prints what each check says, or why it failed."""
    for name, check in named.items():
        print(f"\n{name}:", flush=True)
        try:
            print(check(), flush=True)
        except Exception as error:  # the next check may still tell something
            print(f"failed: {error}", flush=True)


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here, so there is nothing to check.")
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    properties = torch.cuda.get_device_properties(0)
    print(f"{packages}, CUDA {torch.version.cuda}, {platform.platform()}, Python {platform.python_version()}")
    print(
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.1f} GiB, "
        f"compute {properties.major}.{properties.minor}"
    )
    report(checks())


if __name__ == "__main__":
    main()
