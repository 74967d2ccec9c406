"""What the examples share: a training loop that may be killed at any moment, alone or in several processes.

Every random number is drawn from generators whose states are in the checkpoint, and a joined batch is the same however
many processes divide it: runs that were killed and go on end with the bits of one that wasn't (on a CPU, with as many
threads), and several processes have the losses of one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnnfast
from cnnfast.cli.errors import UsageError
from cnnfast.cli.options import parse_device

_TIMEOUT = timedelta(minutes=10)  # of a process that waits for one which hangs; one that dies is noticed at once


class Data(Protocol):
    """Labelled images; a batch is x, (N, C, H, W), and the classes, (N)."""

    train_images: int
    test_images: int

    def train_batch(self, indices: Sequence[int], draws: Tensor) -> tuple[Tensor, Tensor]:
        """`draws`: (N, 4), uniform in [0, 1), for whatever is random in how an image is seen."""
        ...

    def test_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


def add_options(parser: argparse.ArgumentParser, out: str, epochs: int, batch: int, lr: float) -> None:
    number: dict[str, Any] = dict(metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=_positive, default=epochs, **number)
    parser.add_argument("--batch", type=_positive, default=batch, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=lr, metavar="RATE", help="the highest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, **number)
    parser.add_argument("--out", type=Path, default=out, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--save-every", type=_positive, metavar="N", help="batches (default: once an epoch)")
    parser.add_argument("--restart", action="store_true", help="replace what --out has instead of going on from it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def run(main: Callable[[], None]) -> int:
    """Exit status of a program; what it was given wrongly is one sentence."""
    try:
        main()
    except (ValueError, OSError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """The device of this process, joined with the others if torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield parse_device(device)
        return
    here = parse_device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=_TIMEOUT)
    yield here
    dist.destroy_process_group()  # not after an error: torchrun ends the others


def write(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    """The file is there whole or as it was, whenever the process or the machine stops."""
    partial = path.with_name(f".{path.name}.partial")  # always this name: what a kill leaves is overwritten
    with open(partial, "wb") as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


class Trainer:
    """AdamW with a cosine schedule. `settings` are all that the weights depend on beside the arguments
    here: a checkpoint of others is refused. `network`: whose weights are written, where that is not `model` itself."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: dict[str, Any],
        args: argparse.Namespace,
        device: torch.device,
        network: nn.Module | None = None,
    ):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if not self.world <= args.batch <= data.train_images:
            raise ValueError(
                f"--batch must be {self.world} (processes) to {data.train_images} (training images), got {args.batch}"
            )
        self.data, self.args, self.device = data, args, device
        self.settings = settings | {name: getattr(args, name) for name in ("epochs", "batch", "lr", "seed", "device")}
        self.settings |= {"processes": self.world, "torch": str(torch.__version__), "cnnfast": cnnfast.__version__}
        self.model = model.to(device)
        if self.world > 1:
            self.model = cnnfast.nn.convert_sync_batchnorm(self.model)
        self.network = network or self.model
        self.batches = data.train_images // args.batch
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, args.lr)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs * self.batches)
        self.generator = torch.Generator().manual_seed(args.seed)  # the same in every process
        torch.manual_seed(args.seed + self.rank)  # of dropout
        self.order = torch.randperm(data.train_images, generator=self.generator)
        self.batch = 0  # done in this epoch
        self.losses: list[float] = []  # of every batch
        self.accuracies: list[float] = []  # after every epoch, on the test images
        self.checkpoint = args.out / "checkpoint.pt"
        args.out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists() and not args.restart:
            self.load()
        self.parallel = DistributedDataParallel(self.model) if self.world > 1 else self.model

    def load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:  # of a file that isn't one, torch.load raises whatever comes up
            raise ValueError(f"{self.checkpoint} is no checkpoint (--restart replaces it): {error}") from None
        if changed := [name for name in self.settings if settings.get(name) != self.settings[name]]:
            was, now = ({name: held.get(name) for name in changed} for held in (settings, self.settings))
            raise ValueError(f"{self.checkpoint} must be of {now}, got {was} (--restart replaces it)")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self._set_random_states(state["random"][self.rank])
        for name in ("order", "batch", "losses", "accuracies"):
            setattr(self, name, state[name])

    def save(self) -> None:
        random = [self._random_states()] * self.world
        if self.world > 1:
            dist.all_gather_object(random, self._random_states())
        if self.rank:
            return
        state = {name: getattr(self, name) for name in ("settings", "order", "batch", "losses", "accuracies")}
        for name in ("model", "optimizer", "scheduler"):
            state[name] = getattr(self, name).state_dict()
        state |= {"generator": self.generator.get_state(), "random": random}
        write(self.checkpoint, lambda file: torch.save(state, file))

    def _random_states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.device.type == "cuda" else [])]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1])

    def train(self) -> None:
        """Trains what isn't trained yet; leaves checkpoint.pt, weights.safetensors and curve.png in --out."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True, highlight=False, quiet=self.rank > 0)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            total, done = self.args.epochs * self.batches, len(self.losses)
            if done:
                console.print(f"going on after {done} of {total} batches")
            task = progress.add_task("", total=total, completed=done)
            while len(self.accuracies) < self.args.epochs:
                epoch = len(self.accuracies) + 1
                self.model.train()
                while self.batch < self.batches:
                    loss = self._step()
                    progress.update(task, advance=1, description=f"epoch {epoch}  loss {loss:.4f}")
                    if self.args.save_every and self.batch % self.args.save_every == 0:
                        self.save()
                self.accuracies.append(self.evaluate())
                self.batch, self.order = 0, torch.randperm(self.data.train_images, generator=self.generator)
                self.save()
                mean = sum(self.losses[-self.batches :]) / self.batches
                console.print(f"epoch {epoch}  loss {mean:.4f}  test accuracy {self.accuracies[-1]:.2%}")
                if self.rank == 0:
                    self.plot(self.args.out / "curve.png")
        if self.rank == 0:
            cnnfast.save_weights(self.network, self.args.out / "weights.safetensors")
            print(f"test accuracy {self.accuracies[-1]:.2%}, in {self.args.out}")

    def _step(self) -> float:
        """One step on the next joined batch, of which each process takes its part; the joined batch's loss."""
        size = self.args.batch
        draws = torch.rand(size, 4, generator=self.generator)
        mine = torch.arange(size).tensor_split(self.world)[self.rank]
        indices = self.order[self.batch * size : (self.batch + 1) * size][mine].tolist()
        x, classes = self._on_device(self.data.train_batch(indices, draws[mine]))
        loss = F.cross_entropy(self.parallel(x), classes, reduction="sum") / size
        value = loss.detach().clone()
        if self.world > 1:
            dist.all_reduce(value)
        if not value.isfinite():
            raise ValueError(f"loss must be finite, got {value} in batch {len(self.losses) + 1}: --lr may be too high")
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.world).backward()  # DistributedDataParallel divides by the processes
        self.optimizer.step()
        self.scheduler.step()
        self.batch += 1
        self.losses.append(value.item())
        return self.losses[-1]

    def evaluate(self) -> float:
        """The part of the test images that is recognised; the processes divide them."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = range(self.rank, self.data.test_images, self.world)
        for start in range(0, len(mine), self.args.batch):
            x, classes = self._on_device(self.data.test_batch(mine[start : start + self.args.batch]))
            with torch.no_grad():
                right += (self.model(x).argmax(1) == classes).sum()
        if self.world > 1:
            dist.all_reduce(right)
        return right.item() / self.data.test_images

    def _on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, classes = batch
        dtype = next(self.model.parameters()).dtype
        return x.to(self.device, dtype, memory_format=torch.channels_last), classes.to(self.device)

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        loss = figure.subplots()
        epochs = [(n + 1) / self.batches for n in range(len(self.losses))]
        loss.plot(epochs, self.losses, color="tab:blue", linewidth=0.8)
        loss.set(xlabel="epoch", ylabel="loss of the batch", yscale="log")
        accuracy = loss.twinx()
        accuracy.plot(range(1, len(self.accuracies) + 1), [100 * a for a in self.accuracies], "o-", color="tab:orange")
        accuracy.set(ylabel="test accuracy (%)", ylim=(None, 100))
        write(path, lambda file: figure.savefig(file, format="png", dpi=120))
