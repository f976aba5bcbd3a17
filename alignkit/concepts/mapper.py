"""What a concept learns: the token vectors of its placeholder, for every layer and timestep.

- `Mapper`: NeTI (Alaluf et al. 2023, arXiv 2305.15391), a small network of (timestep, layer).
- `Embeddings`: plain vectors; the same for all layers is Textual Inversion (Gal et al. 2022, arXiv 2208.01618), one
  for each layer is P+ (Voynov et al. 2023, arXiv 2303.09522).

Both are called as `module(timestep [N], layer [N])` and return `Vectors` in float32. W below is the width of the token
embedding, for two text encoders the sum of theirs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_ANCHORS = 10  # of the layer that reads the Fourier features


@dataclass(frozen=True)
class Vectors:
    """Of N pairs (timestep, layer) and n consecutive tokens: `token` and `bypass`, [N, n, W]; no bypass is None.

    `token` takes the place of the token embedding; the direction of `bypass` is added to the text encoder's output.
    """

    token: Tensor
    bypass: Tensor | None = None


class Mapper(nn.Module):
    """NeTI's mapper, section 4: Fourier features of (timestep, layer), two hidden layers, one output for each pair.

    The defaults are the authors'. `norms`: the target norm of the token vector in each text encoder (that of the
    super-category), or None for no rescaling. `norm_mode`: "split" gives the token vector that norm, as the paper
    describes; "joint" gives it to (token, bypass) taken as one vector, as the authors' code does, whose token vector
    ends up with about 1/sqrt(2) of it.
    """

    varies_in_time = varies_in_layer = True
    num_vectors = 1

    def __init__(
        self,
        num_layers: int,
        widths: Sequence[int],
        norms: Sequence[float] | None,
        *,
        hidden_size: int = 128,
        num_frequencies: int = 1024,
        sigma_t: float = 0.03,
        sigma_l: float = 2.0,
        bypass: bool = True,
        norm_mode: Literal["split", "joint"] = "split",
        num_train_timesteps: int = 1000,
        seed: int = 0,
    ):
        super().__init__()
        if norm_mode not in ("split", "joint"):
            raise ValueError(f"norm_mode: expected split or joint, got {norm_mode!r}.")
        self.num_layers, self.widths, self.norms = num_layers, list(widths), norms and list(norms)
        self.hidden_size, self.norm_mode, self.has_bypass = hidden_size, norm_mode, bypass
        generator = torch.Generator().manual_seed(seed)
        scale = torch.tensor([sigma_t, sigma_l])
        # a buffer, so that it is in the file: a mapper without its frequencies is worthless
        self.register_buffer("frequencies", torch.randn(num_frequencies, 2, generator=generator) * scale)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.anchors = nn.Linear(2 * num_frequencies, TIME_ANCHORS * num_layers)
            self.hidden = nn.Sequential(
                nn.Linear(TIME_ANCHORS * num_layers, hidden_size),
                nn.LayerNorm(hidden_size),
                nn.LeakyReLU(),
                nn.Linear(hidden_size, hidden_size),
                nn.LayerNorm(hidden_size),
                nn.LeakyReLU(),
            )
            self.output = nn.Linear(hidden_size, (1 + bypass) * sum(widths))
        anchor_times = torch.arange(TIME_ANCHORS) * (num_train_timesteps / TIME_ANCHORS)
        times, layers = torch.meshgrid(anchor_times, torch.arange(float(num_layers)), indexing="ij")
        with torch.no_grad():
            self.anchors.weight.copy_(self.encode(times.flatten(), layers.flatten()))

    def encode(self, timestep: Tensor, layer: Tensor) -> Tensor:
        """Fourier features [N, 2 F] of unit length (Tancik et al. 2020): the kernel's length is 1/sigma."""
        # in half precision the phase of t = 999 is off by up to half a radian
        with torch.autocast(timestep.device.type, enabled=False):
            # not a matrix product, which may be in TF32 or bfloat16 too (torch.set_float32_matmul_precision)
            of_time, of_layer = self.frequencies.float().unbind(-1)
            phase = timestep.float()[:, None] * of_time + layer.float()[:, None] * of_layer
            return torch.cat([phase.sin(), phase.cos()], dim=-1) / math.sqrt(len(self.frequencies))

    def forward(self, timestep: Tensor, layer: Tensor, truncation: int | Tensor | None = None) -> Vectors:
        """Vectors of N pairs. `truncation`: how many of the hidden units are kept, an int or [N]; None keeps all."""
        with torch.autocast(timestep.device.type, enabled=False):
            hidden = self.hidden(self.anchors(self.encode(timestep, layer)))
            if truncation is not None:
                kept = torch.as_tensor(truncation, device=hidden.device).reshape(-1, 1)
                hidden = hidden * (torch.arange(self.hidden_size, device=hidden.device) < kept)
            halves = self.output(hidden).chunk(1 + self.has_bypass, dim=-1)
            if self.norms:
                halves = self._rescale(halves)
        return Vectors(*(half[:, None] for half in halves))

    def _rescale(self, halves: Sequence[Tensor]) -> list[Tensor]:
        parts = [half.split(self.widths, dim=-1) for half in halves]  # [half][text encoder]
        rescaled = []
        for *encoder, norm in zip(*parts, self.norms, strict=True):
            if self.norm_mode == "joint":
                encoder = F.normalize(torch.cat(encoder, -1), dim=-1).mul(norm).chunk(len(encoder), dim=-1)
            else:  # of the bypass, only the direction is used
                encoder = [F.normalize(encoder[0], dim=-1) * norm, *encoder[1:]]
            rescaled.append(encoder)
        return [torch.cat(half, -1) for half in zip(*rescaled, strict=True)]

    def draw_truncation(self, generator: torch.Generator, probability: float = 0.5) -> Tensor:
        """Nested dropout (section 4.2) of one sample: units to keep for each layer, [num_layers].

        With `probability` u ~ U{0, ..., hidden_size - 1}, else all; each layer has a draw of its own. (The authors'
        code draws whether to drop once for the whole batch, which would tie a sample to its neighbours.)
        """
        u = torch.randint(self.hidden_size, (self.num_layers,), generator=generator)
        dropped = torch.rand(self.num_layers, generator=generator) < probability
        return torch.where(dropped, u, self.hidden_size)


class Embeddings(nn.Module):
    """Vectors [1 or L, n, W] that do not depend on the timestep, n consecutive tokens each."""

    varies_in_time = False
    hidden_size = 0  # nothing to truncate

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone().float())

    @property
    def varies_in_layer(self) -> bool:
        return len(self.vectors) > 1

    @property
    def num_vectors(self) -> int:
        return self.vectors.shape[1]

    def forward(self, timestep: Tensor, layer: Tensor, truncation: int | Tensor | None = None) -> Vectors:
        return Vectors(self.vectors[layer.long() if self.varies_in_layer else torch.zeros_like(layer).long()])
