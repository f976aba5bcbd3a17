"""What `make gpu-check` prints: a GPU against what this project, which has none, predicts and promises.

    python tests/benchmarks/gpu_check.py

Versions and device; time and memory of the emoji demo's dry run against `alignkit plan`; the gradients of one step in
fp32, fp16 and bf16 against the CPU's in fp32. Please send the report back in an issue.
"""

import platform
import subprocess
import sys
from importlib.metadata import version

import torch

from alignkit.base import add_lora, load_base
from alignkit.sampling import draft_k, sample

CONFIG = "configs/alignprop/emoji.yaml"
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


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


def trainer(*options: str) -> str:
    """What the AlignProp trainer says at the end of the emoji demo's dry run or estimate."""
    command = [sys.executable, "training/alignprop.py", "--config", CONFIG, *options]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return output[max(output.rfind("dry run:"), output.rfind("plan of")) :].strip()


def main() -> None:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA GPU here, so there is nothing to check.")
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "accelerate"))
    properties = torch.cuda.get_device_properties(0)
    print(f"{packages}, CUDA {torch.version.cuda}, {platform.platform()}, Python {platform.python_version()}")
    print(
        f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute {properties.major}.{properties.minor}"
    )
    print("\nmeasured: the emoji demo (the memory is the most that its tensors held)")
    print(trainer("--dry-run"))
    print("\npredicted:")
    print(trainer("--estimate", "cuda"))
    print("\ngradients of one step against the CPU's in float32:")
    print("\n".join(compare("cuda")))


if __name__ == "__main__":
    main()
