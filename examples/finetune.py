"""Fine-tunes EfficientNet-Lite0 with its ImageNet weights on your images: a folder that has a folder for each class.

Kill it whenever you like: the same command goes on, and ends with the same weights to the bit. On two processes:
torchrun --nproc-per-node 2 examples/finetune.py flowers
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainer import Trainer, add_options, processes, run

import cnnfast
from cnnfast.evaluation import ImageFolder, read_folder
from cnnfast.preprocess import Preprocessing, preprocessing_for

MODEL = "tf_efficientnet_lite0"
TEST_PART = 5  # every fifth image of a class


class Images:
    """The images of a folder, prepared as the network's pretrained_cfg says; in training a random part of each is
    resized, and half of them are mirrored."""

    def __init__(self, folder: ImageFolder, preprocessing: Preprocessing):
        self.folder, self.preprocessing = folder, preprocessing
        self.train: list[int] = []
        self.test: list[int] = []
        counts = dict.fromkeys(folder.targets.values(), 0)
        for n, sample in enumerate(folder.samples):
            (self.train if counts[sample.target] % TEST_PART else self.test).append(n)
            counts[sample.target] += 1
        if few := [name for name, target in folder.targets.items() if counts[target] < 2]:
            raise ValueError(
                f"class folders must have 2 images or more, got {len(few)} with fewer: {', '.join(few[:3])}"
            )
        self.train_images, self.test_images = len(self.train), len(self.test)
        self.readers = ThreadPoolExecutor(torch.get_num_threads())

    def train_batch(self, indices: Sequence[int], draws: Tensor) -> tuple[Tensor, Tensor]:
        return self._batch([self.train[i] for i in indices], draws.tolist())

    def test_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._batch([self.test[i] for i in indices], [None] * len(indices))

    def _batch(self, numbers: list[int], draws: Sequence[list[float] | None]) -> tuple[Tensor, Tensor]:
        images = torch.cat(list(self.readers.map(self._image, numbers, draws)))
        return images, torch.tensor([self.folder.samples[n].target for n in numbers])

    def _image(self, number: int, draws: list[float] | None) -> Tensor:
        """(1, 3, size, size), the centre of the image or, by four numbers in [0, 1), a part of it."""
        file, prepare = self.folder.samples[number].file, self.preprocessing
        try:
            image = prepare.read(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if draws is None:
            return prepare.normalise(prepare.centre(image))
        side = max(1, round(min(image.size) * (0.6 + 0.4 * draws[0])))
        left, top = (round((length - side) * draw) for length, draw in zip(image.size, draws[1:3], strict=True))
        square = image.crop((left, top, left + side, top + side))
        x = prepare.normalise(square.resize((prepare.size, prepare.size), prepare.resampling))
        return x.flip(3) if draws[3] < 0.5 else x


class FrozenBackbone(nn.Module):
    """Only the classifier is trained: the rest runs without gradients, each block as one fused call."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        network.requires_grad_(False)
        network.get_classifier().requires_grad_(True)

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        network: Any = self.network
        with torch.no_grad():
            features = network.forward_head(network.forward_features(x), pre_logits=True)
        return network.get_classifier()(features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DIR", help="with a folder of images for each class")
    parser.add_argument("--freeze", action="store_true", help="train the new classifier alone")
    parser.add_argument("--drop-rate", type=float, default=0.2, metavar="P", help="(default: %(default)s)")
    add_options(parser, out="finetuned", epochs=5, batch=16, lr=3e-4)
    args = parser.parse_args()
    with processes(args.device) as device:
        classes = sum(path.is_dir() and not path.name.startswith(".") for path in args.data.glob("*"))
        if classes < 2:
            raise ValueError(f"DIR must have a folder for each of 2 classes or more, got {classes} in {args.data}")
        folder = read_folder(args.data, classes, label_set="")
        data = Images(folder, preprocessing_for(MODEL))
        torch.manual_seed(args.seed)
        model: Any = cnnfast.create_model(MODEL, num_classes=classes, drop_rate=args.drop_rate)
        cnnfast.load_weights(model, cnnfast.find_weights(MODEL), load_classifier=False)
        nn.init.zeros_(model.get_classifier().weight)  # large random ones would tear at what is trained already
        listing = repr([(sample.path, sample.target) for sample in folder.samples]).encode()
        settings = {"freeze": args.freeze, "drop_rate": args.drop_rate, "images": sha256(listing).hexdigest()[:16]}
        trained = FrozenBackbone(model) if args.freeze else model
        Trainer(trained, data, settings, args, device, network=model).train()


if __name__ == "__main__":
    sys.exit(run(main))
