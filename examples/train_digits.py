"""Trains LeNet-5 or a small MobileNetV2 on scikit-learn's handwritten digits, from nothing to 98 % and more.

Kill it whenever you like: the same command goes on, and ends with the same weights to the bit. On two processes:
torchrun --nproc-per-node 2 examples/train_digits.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer import Trainer, add_options, processes, run

import cnnfast

CLASSES, SIZE = 10, 32
TEST_PART = 5  # every fifth image
BLOCKS = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 2, 2), (4, 48, 1, 1))  # expand ratio, channels, blocks, stride
PIXELS = 3.0  # an image is shifted by up to so many in training


class Digits:
    """1,797 digits of 8 x 8 pixels, enlarged to the 32 x 32 that the networks were made for, mean 0 and deviation 1."""

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError:
            raise ValueError('scikit-learn is not installed: pip install "cnnfast[examples]"') from None
        digits = load_digits()
        self.images, self.classes = checked(torch.as_tensor(digits.images), torch.as_tensor(digits.target))
        is_test = torch.arange(len(self.images)) % TEST_PART == 0
        self.train, self.test = ((~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0])
        self.train_images, self.test_images = len(self.train), len(self.test)

    def train_batch(self, indices: Sequence[int], draws: Tensor) -> tuple[Tensor, Tensor]:
        """Shifted, turned by up to 10 degrees."""
        chosen = self.train[list(indices)]
        angle, shift = (2 * draws[:, 0] - 1) * 0.17, (2 * draws[:, 1:3] - 1) * 2 * PIXELS / SIZE
        sin, cos = angle.sin(), angle.cos()
        rows = torch.stack((torch.stack((cos, -sin, shift[:, 0]), 1), torch.stack((sin, cos, shift[:, 1]), 1)), 1)
        images = self.images[chosen]
        grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False), self.classes[chosen]

    def test_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = self.test[list(indices)]
        return self.images[chosen], self.classes[chosen]


def checked(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, W) -> (N, 1, 32, 32), if these are images of digits."""
    if images.dim() != 3 or len(images) < 2 * TEST_PART or classes.shape != images.shape[:1]:
        raise ValueError(
            f"images must be (N, H, W), N at least {2 * TEST_PART}, and classes (N), got {tuple(images.shape)} and"
            f" {tuple(classes.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError(f"images must be finite, got {(~images.isfinite()).sum()} values that aren't")
    if sorted(set(classes.tolist())) != list(range(CLASSES)):
        raise ValueError(f"classes must be all of 0 to {CLASSES - 1}, got {sorted(set(classes.tolist()))}")
    deviation, mean = torch.std_mean(images)
    if deviation == 0:
        raise ValueError(f"images must differ, got {mean} everywhere")
    images = ((images - mean) / deviation).to(torch.get_default_dtype())
    return F.interpolate(images[:, None], (SIZE, SIZE), mode="bilinear", align_corners=False), classes


def make_model(name: str) -> nn.Module:
    if name == "lenet5":
        return cnnfast.create_model("lenet5", output="linear")  # the paper's distances want ten times the epochs
    return cnnfast.create_model(
        "mobilenet_v2", num_classes=CLASSES, in_chans=1, drop_rate=0.0, width_mult=0.5, inverted_residual_setting=BLOCKS
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("lenet5", "mobilenet_v2"), default="lenet5", help="(default: %(default)s)")
    add_options(parser, out="digits", epochs=20, batch=32, lr=0.005)
    args = parser.parse_args()
    with processes(args.device) as device:
        data = Digits()
        torch.manual_seed(args.seed)
        Trainer(make_model(args.model), data, {"model": args.model}, args, device).train()


if __name__ == "__main__":
    sys.exit(run(main))
