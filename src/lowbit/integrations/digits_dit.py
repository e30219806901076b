"""A small diffusion transformer of handwritten digits: a real trained network on which a conversion can be measured.

Class-conditional rectified flow on 8x8 images. Its layers and their names are those of Qwen-Image's image stream as
diffusers has it, without the text stream, so that rules and presets for that model apply (`preset="qwen_image"`; a
model without text layers is not recognized by itself). The image's four kinds of modulated layers, the per-block
modulation behind a SiLU, normalized queries and keys and the tanh GELU are all there; positions are added after
`img_in` instead of rotated into queries and keys.

The class has no tokens: its embedding (`time_text_embed.addition_t_embedding`) is added to that of the timestep, so
that modulation depends on timestep and class, and on nothing else.

    x_t = (1 - t) image + t noise,   the model predicts   velocity = noise - image,   t from 1 (noise) to 0 (image)

Images are float32 [B, 8, 8] with values from -1 (paper) to 1 (ink).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.checkpoint.load import load
from lowbit.checkpoint.save import save
from lowbit.checkpoint.strict_json import parse_object
from lowbit.errors import CheckpointError, WriteError

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
CLASS_NAME = "DigitsDiT"
PRESET = "qwen_image"
DATA_RANGE = 2.0  # of images, from -1 to 1: what a PSNR relates to
FOLDER_VARIABLE = "LOWBIT_DIGITS_DIT"  # environment variable naming the folder that `calibration` loads
DEFAULT_FOLDER = "digits-dit"
CALIBRATION_SEED, EVALUATION_SEED = 1_000_000, 2_000_000  # images are sampled and compared with small seeds
_FREQUENCIES = 256  # channels of the timestep's sines and cosines, as in diffusers
_EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """Sizes. `image` and `patch` are in pixels; `width` is that of a token; the MLP is four times as wide."""

    image: int = 8
    patch: int = 2
    classes: int = 10
    width: int = 192
    heads: int = 3
    blocks: int = 4

    @property
    def tokens(self) -> int:
        """How many tokens an image has."""
        return (self.image // self.patch) ** 2


class TimestepEmbedding(nn.Module):
    """The MLP from sines and cosines to the width of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_FREQUENCIES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, waves: Tensor) -> Tensor:
        """[B, 256] -> [B, width]."""
        return self.linear_2(F.silu(self.linear_1(waves)))


class TimeClassEmbedding(nn.Module):
    """What modulation depends on: the timestep, and the class where Qwen-Image adds the kind of the image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(config.width)
        self.addition_t_embedding = nn.Embedding(config.classes, config.width)

    def forward(self, timestep: Tensor, label: Tensor) -> Tensor:
        """Timesteps [B] in [0, 1] and classes [B] -> [B, width]."""
        half = _FREQUENCIES // 2
        rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=timestep.device) / half)
        angle = 1000.0 * timestep.float().unsqueeze(1) * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        weight = self.timestep_embedder.linear_1.weight
        return self.timestep_embedder(waves.to(weight.dtype)) + self.addition_t_embedding(label)


class Attention(nn.Module):
    """Attention among all tokens, with queries and keys normalized head by head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_q = nn.RMSNorm(width // config.heads, eps=_EPS)
        self.norm_k = nn.RMSNorm(width // config.heads, eps=_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> the same."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        found = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out[0](found.transpose(1, 2).flatten(2))


class Gelu(nn.Module):
    """The MLP's first layer and its tanh GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., hidden]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The MLP: `net.0.proj`, GELU, `net.2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gelu(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return self.net(x)


class Block(nn.Module):
    """Attention and MLP, each shifted and scaled before and gated after by the modulation (adaLN-zero)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.img_norm1 = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)
        self.attn = Attention(config)
        self.img_norm2 = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)
        self.img_mlp = FeedForward(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, T, width] and condition [B, width] -> tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.img_norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.img_mlp(self.img_norm2(x) * (1 + scale2) + shift2)


class OutputNorm(nn.Module):
    """The last normalization, with scale and shift from the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=_EPS, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, T, width] and condition [B, width] -> tokens."""
        scale, shift = self.linear(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class DigitsDiT(nn.Module):
    """The velocity model. A new one predicts zero: modulation and output start at zero."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        values = config.patch**2
        self.time_text_embed = TimeClassEmbedding(config)
        self.img_in = nn.Linear(values, config.width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm_out = OutputNorm(config.width)
        self.proj_out = nn.Linear(config.width, values)
        self.register_buffer("positions", _positions(config), persistent=False)
        for name, value in self.named_parameters():
            zeroed = ".img_mod." in name or name.startswith(("norm_out.", "proj_out."))
            if zeroed or name.endswith(".bias"):
                nn.init.zeros_(value)
            elif value.dim() == 2:
                nn.init.normal_(value, std=(3 * value.shape[1]) ** -0.5)  # as large as torch's, but not uniform

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        """Noisy images [B, 8, 8], timesteps [B] in [0, 1] and classes [B] -> velocities [B, 8, 8]."""
        side, patch = self.config.image // self.config.patch, self.config.patch
        condition = self.time_text_embed(timestep, label)
        cut = x.unflatten(2, (side, patch)).unflatten(1, (side, patch)).transpose(2, 3)  # [B, rows, columns, p, p]
        tokens = self.img_in(cut.flatten(3).flatten(1, 2)) + self.positions
        for block in self.transformer_blocks:
            tokens = block(tokens, condition)
        out = self.proj_out(self.norm_out(tokens, condition))
        return out.unflatten(2, (patch, patch)).unflatten(1, (side, side)).transpose(2, 3).flatten(3).flatten(1, 2)


def _positions(config: Config) -> Tensor:
    """Sines and cosines of row and column, [T, width]; a quarter of the width each."""
    side, quarter = config.image // config.patch, config.width // 4
    rate = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    angle = torch.arange(side).unsqueeze(1) * rate
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    grid = (axis.unsqueeze(1).expand(-1, side, -1), axis.unsqueeze(0).expand(side, -1, -1))
    return torch.cat(grid, dim=2).flatten(0, 1).contiguous()


def save_model(model: DigitsDiT, folder: str | Path) -> Path:
    """Write config.json and the weights, in the model's dtype, as diffusers lays out a model; returns the folder."""
    folder = Path(folder)
    data = {"_class_name": CLASS_NAME, **asdict(model.config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written: {error.strerror}; choose another folder") from error
    save(model, folder / WEIGHTS)
    return folder


def load_model(folder: str | Path) -> DigitsDiT:
    """The model in a folder, as it was saved or converted, to run in float32. Raises `CheckpointError`."""
    path = Path(folder) / CONFIG
    try:
        data = parse_object(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; train a model with benchmarks/digits_dit_train.py, and name "
            f"its folder (for calibration in the environment variable {FOLDER_VARIABLE})"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON object: {error}; repair it, or train again") from error
    data.pop("quantization_config", None)  # of a converted folder: `load` finds out by itself
    names = {field.name for field in fields(Config)}
    if data.pop("_class_name", None) != CLASS_NAME or data.keys() != names:
        raise CheckpointError(f"{path}: does not describe a {CLASS_NAME}; name the folder of one")
    model = DigitsDiT(Config(**data))
    load(model, folder)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def trajectory(model: nn.Module, label: Tensor, seed: int, steps: int = 20) -> Iterator[tuple[Tensor, float]]:
    """Euler's method from noise to images: (x_t [B, 8, 8], t) for t = 1, 1 - 1/steps, ... and at last t = 0.

    The noise is that of `seed`, whatever the number of threads; the images are not clipped.
    """
    size = model.config.image if isinstance(model, DigitsDiT) else Config.image
    x = torch.randn((len(label), size, size), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = 1 - step / steps
        yield x, t
        x = x - model(x, torch.full((len(label),), t), label) / steps
    yield x, 0.0


def sample(model: nn.Module, label: Tensor, seed: int, steps: int = 20) -> Tensor:
    """Images of the classes `label` [B] -> float32 [B, 8, 8], about -1 to 1 and not clipped; see `trajectory`."""
    images = torch.empty(0)
    for x, _ in trajectory(model, label, seed, steps):
        images = x
    return images


def psnr(reference: Tensor, images: Tensor) -> float:
    """10 log10(2^2 / mean squared difference) in dB over all pixels of all images; the data range is 2 (-1 to 1)."""
    error = (reference.double() - images.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(DATA_RANGE**2 / error)


def calibration_inputs(
    model: DigitsDiT, *, images: int = 160, steps: int = 20, batch: int = 64, seed: int = CALIBRATION_SEED
) -> list[dict[str, Tensor]]:
    """What the model meets while it samples: its own (x, timestep, label), shuffled, as keyword arguments.

    Shuffled so that every batch holds all timesteps and classes, and halves of the batches are alike.
    """
    label = torch.arange(images) % model.config.classes
    met = [(x, torch.full((images,), t), label) for x, t in trajectory(model, label, seed, steps) if t > 0]
    x, t, labels = (torch.cat(values) for values in zip(*met, strict=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [{"x": x[some], "timestep": t[some], "label": labels[some]} for some in order.split(batch)]


def calibration(folder: str | Path | None = None) -> tuple[DigitsDiT, list[dict[str, Tensor]]]:
    """The model and its calibration inputs, for `lowbit calibrate --module lowbit.integrations.digits_dit:calibration`.

    The model is that of `folder`, else of the folder that the environment variable LOWBIT_DIGITS_DIT names, else of
    ./digits-dit. Raises `CheckpointError` when there is none.
    """
    model = load_model(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    return model, calibration_inputs(model)


def evaluation(folder: str | Path | None = None) -> tuple[DigitsDiT, list[dict[str, Tensor]]]:
    """As `calibration`, with fewer inputs, from noise that calibration does not use: for `lowbit compare --module`."""
    model = load_model(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    return model, calibration_inputs(model, images=40, seed=EVALUATION_SEED)


def compare_sample(model: nn.Module, seed: int) -> Tensor:
    """Two images of every class: what `lowbit compare --module` takes the same-seed PSNR of."""
    return sample(model, torch.arange(2 * Config.classes) % Config.classes, seed)
