"""Train `acmize_vit_digits`, the model that `acmize quickstart` ships, from scratch.

Command:   python recipes/train_vit_digits.py          writes acmize/assets/vit_digits.safetensors
           python recipes/train_vit_digits.py --holdout   what the settings were chosen by
           python recipes/train_vit_digits.py --smoke     three steps, into a temporary folder
Result:    98.34 % of the 602 test images (592), from the saved fp16 weights; this is the file shipped.
           Seed 1: 98.67 %. The seed was fixed before either was run; two seeds are no estimate of spread,
           and the sampling error of one figure is 0.5 %. Training images: 99.9 %.
Model:     674,410 parameters, 1,355,732 bytes in fp16, 11,620,416 MACs (23,240,832 FLOPs) per image.
Seed:      0. A second run gave the same file, byte for byte (same machine, one thread).
Hardware:  one thread of a machine with 2 shared CPU cores (AMD EPYC), no GPU.
Time:      323 s, 391 s and 402 s (seed 0 twice, seed 1) beside other work.
Versions:  Python 3.11.7, torch 2.14.1, timm 1.0.31, scikit-learn 1.9.1, numpy 2.4.6.

Choice:    made without the test split. These settings got 236 of 239 (98.74 %) held out of train. Tokens of
           1x1 pixel were tried first and stopped before any held-out figure: with timm's initialisation the
           training loss was still 1.9 to 2.1 after 17 epochs; with sine-cosine positions and batch 32 it was
           0.71 after 52 epochs, at about four times the MACs.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmize.quickstart_model import MEAN, STD, WEIGHTS, digits

NAME = "acmize_vit_digits"
BATCH = 64
LR = 2e-3
WEIGHT_DECAY = 0.05
WARMUP_EPOCHS = 5
LABEL_SMOOTHING = 0.1
DROP_PATH = 0.05
EMA_DECAY = 0.99
HOLDOUT_SEED = 1
ROTATE, SHEAR, SCALE, SHIFT = 0.12, 0.08, 0.08, 0.6  # radians, -, -, pixels: the largest of each, both ways


def augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images under a random affine map each, blank where the map looks outside.

    Args:
        x_BCHW: Normalised images, shape (B, 1, 8, 8).
        generator: Source of all randomness.
    """
    batch = len(x_BCHW)
    angle, shear, scale_x, scale_y, shift_x, shift_y = torch.rand(6, batch, generator=generator) * 2 - 1
    angle, shear = angle * ROTATE, shear * SHEAR
    scale_x, scale_y = 1 + scale_x * SCALE, 1 + scale_y * SCALE
    shift = torch.stack([shift_x, shift_y], dim=1) * (2 * SHIFT / x_BCHW.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * scale_x, (shear - sin) * scale_y, sin * scale_x, cos * scale_y]
    theta = torch.cat([torch.stack(rows, dim=1).view(batch, 2, 2), shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(x_BCHW.shape), align_corners=False)
    blank = -MEAN / STD
    return F.grid_sample(x_BCHW - blank, grid, mode="bilinear", align_corners=False) + blank


def train(x_NCHW: Tensor, y_N: Tensor, *, epochs: int, seed: int, max_steps: int | None = None) -> nn.Module:
    """Train from scratch and return the exponential moving average of the weights, in eval mode.

    Args:
        x_NCHW: Normalised training images, shape (N, 1, 8, 8).
        y_N: Labels, shape (N,).
        epochs: Passes over the images.
        seed: Fixes initial weights, order, augmentation and drop path; the global generator is left as found.
        max_steps: Stop after this many steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initialisation and drop path know only the global generator
        torch.manual_seed(seed)
        model = timm.create_model(NAME, drop_path_rate=DROP_PATH)
        average = copy.deepcopy(model).eval().requires_grad_(False)
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LR)
        per_epoch = -(-len(x_NCHW) // BATCH)
        warmup, total = WARMUP_EPOCHS * per_epoch, epochs * per_epoch
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup)),
            ],
            [warmup],
        )
        step, start = 0, time.perf_counter()
        for epoch in range(epochs):
            model.train()
            total_loss = 0.0
            for index in torch.randperm(len(x_NCHW), generator=generator).split(BATCH):
                logits = model(augment(x_NCHW[index], generator))
                loss = F.cross_entropy(logits, y_N[index], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                        mean.lerp_(new, 1 - EMA_DECAY)
                total_loss += loss.item() * len(index)
                step += 1
                if step == max_steps:
                    return average
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1:3d}  loss {total_loss / len(x_NCHW):.4f}  {seconds:.0f} s", flush=True)
    return average


@torch.inference_mode()
def accuracy(model: nn.Module, x_NCHW: Tensor, y_N: Tensor) -> float:
    """Return top-1 accuracy, 0..1, in batches of 128."""
    logits = torch.cat([model(part) for part in x_NCHW.split(128)])
    return (logits.argmax(1) == y_N).float().mean().item()


def macs_per_image(model: nn.Module) -> int:
    """Return the MACs of one image, attention products included, as `FlopCounterMode` counts them."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010, the counter has no formula for the fused CPU kernel
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2


def save(model: nn.Module, path: Path) -> None:
    """Write the weights in fp16, atomically: a temporary name beside `path`, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors leaves 0600, which an installed package would inherit
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    """Parse the command line, train, save, print."""
    parser = argparse.ArgumentParser(description="Train acmize_vit_digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; rounding depends on them")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--holdout", action="store_true", help="measure on a fifth of train; save nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps, written to a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    x_train, y_train = digits("train")

    if args.holdout:
        held = torch.zeros(len(x_train), dtype=torch.bool)
        order = torch.randperm(len(x_train), generator=torch.Generator().manual_seed(HOLDOUT_SEED))
        held[order[: len(order) // 5]] = True
        model = train(x_train[~held], y_train[~held], epochs=args.epochs, seed=args.seed)
        score = accuracy(model, x_train[held], y_train[held])
        print(f"held-out accuracy {score:.4f} on {int(held.sum())} images")
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / args.output.name if args.smoke else args.output
        max_steps = 3 if args.smoke else None
        model = train(x_train, y_train, epochs=args.epochs, seed=args.seed, max_steps=max_steps)
        save(model, path)
        size = path.stat().st_size
        overlay = {"file": str(path)}
        saved = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x_test, y_test = digits("test")
    score = accuracy(saved, x_test, y_test)
    print(f"test accuracy {score:.4f} on {len(y_test)} images, from the saved fp16 weights")
    macs = macs_per_image(saved)
    print(f"parameters {sum(p.numel() for p in saved.parameters()):,}  file {size:,} bytes")
    print(f"MACs {macs:,}  FLOPs {2 * macs:,}  per image")
    print(f"time {time.perf_counter() - started:.0f} s  threads {args.threads}  seed {args.seed}")
    print(f"torch {torch.__version__}  timm {timm.__version__}")


if __name__ == "__main__":
    main()
