"""Train the small diffusion transformer that `digits_dit` measures on: 1,797 handwritten digits, minutes on a CPU.

    python -m benchmarks.digits_dit_train DIR [--steps 1200] [--threads 1] [--seed 0]

Rectified flow with AdamW and an exponential mean of the weights, which is what is saved, in bfloat16. The digits come
with scikit-learn. A run repeats bit for bit on the same machine with the same number of threads and the same torch;
another processor or torch sums in another order, so there the weights agree only in quality. The samples are checked:
classifiers trained on the real digits read them, and the share that they read as the class asked for goes into
training.json beside the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from functools import cache
from pathlib import Path

import torch
from sklearn.base import ClassifierMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from lowbit.integrations.digits_dit import Config, DigitsDiT, load_model, sample, save_model

BATCH = 64
RATE = 1.5e-3
WARMUP = 100
EMA = 0.995


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] from -1 to 1, and their classes [1797]."""
    data = load_digits()
    return torch.from_numpy(data.images).float() / 8 - 1, torch.from_numpy(data.target).long()


def flow_loss(model: torch.nn.Module, images: Tensor, label: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at logit-normal timesteps, at which digits are told apart."""
    noise = torch.randn(images.shape, generator=generator)
    t = torch.sigmoid(torch.randn(len(images), generator=generator))
    mixed = torch.lerp(images, noise, t.view(-1, 1, 1))
    return (model(mixed, t, label) - (noise - images)).square().mean()


def train(steps: int, seed: int, config: Config | None = None) -> tuple[DigitsDiT, list[float]]:
    """The mean model after `steps` steps, and the loss of each."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, label = digits()
    model = DigitsDiT(config)
    mean = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for step in range(steps):
        rate = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        some = torch.randint(len(images), (BATCH,), generator=generator)
        loss = flow_loss(model, images[some], label[some], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))
            for kept, new in zip(mean.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    return mean.requires_grad_(False).eval(), losses


@cache
def readers() -> dict[str, tuple[ClassifierMixin, float]]:
    """Classifiers trained on four fifths of the real digits, each with its accuracy on the rest."""
    real, truth = digits()
    held_out = (torch.arange(len(real)) % 5 == 0).numpy()
    data, wanted = real.flatten(1).numpy(), truth.numpy()
    untrained = {
        "logistic": LogisticRegression(max_iter=2000),
        "mlp": MLPClassifier((128,), max_iter=200, random_state=0),
    }
    found = {}
    for name, reader in untrained.items():
        reader.fit(data[~held_out], wanted[~held_out])
        found[name] = reader, float(reader.score(data[held_out], wanted[held_out]))
    return found


def classify(images: Tensor, label: Tensor) -> dict[str, float]:
    """The share of images [B, 8, 8] that each classifier reads as `label`."""
    data = images.clamp(-1, 1).flatten(1).numpy()
    return {name: float(reader.score(data, label.numpy())) for name, (reader, _) in readers().items()}


def nearest(images: Tensor) -> dict[str, float]:
    """Root mean square distance a pixel to the nearest real digit: of samples, and of real ones to another."""
    real = digits()[0].flatten(1)
    own = torch.cdist(real, real).fill_diagonal_(math.inf).min(1).values
    return {
        "generated": (torch.cdist(images.clamp(-1, 1).flatten(1), real).min(1).values.mean() / 8).item(),
        "real": (own.mean() / 8).item(),
    }


def show(images: Tensor, columns: int = 10) -> None:
    """Print images [columns, 8, 8] side by side."""
    shades = " .:-=+*#%@"
    for row in range(images.shape[1]):
        line = images[:columns, row].clamp(-1, 1).add(1).mul(4.999).int()
        print("  ".join("".join(shades[v] * 2 for v in values) for values in line.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train_to(args.folder, steps=args.steps, threads=args.threads, seed=args.seed)


def train_to(folder: Path, steps: int = 1200, threads: int = 1, seed: int = 0) -> dict:
    """Train, save and check; returns what training.json says."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    model, losses = train(steps, seed)
    seconds = time.perf_counter() - began
    save_model(model.bfloat16(), folder)
    label = torch.arange(500) % 10
    images = sample(load_model(folder), label, seed=7)
    show(images)
    last = losses[-100:]
    about = {
        "seconds": round(seconds, 1), "steps": steps, "batch": BATCH, "threads": threads, "seed": seed,
        "weights": sum(p.numel() for p in model.parameters()), "torch": torch.__version__,
        "final_loss": sum(last) / len(last),
        "accuracy": classify(images, label), "accuracy_real": {name: score for name, (_, score) in readers().items()},
        "distance_to_nearest_digit": nearest(images),
    }  # fmt: skip
    (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))
    return about


if __name__ == "__main__":
    main()
