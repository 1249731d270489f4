"""Train a small convolutional network on MNIST, with or without SAM around a torch optimizer.

The task, network and flags are those of the MNIST example of pytorch/examples; ``--optimizer`` chooses the optimizer.
SAM is the wrapped optimizer in :func:`make_optimizer` and the two lines under ``active`` in :func:`train`.

    python examples/mnist.py --plot mnist.png                  # SAM around Adadelta; mnist_data.py finds the data
    python examples/mnist.py --compare --plot mnist.png        # Adadelta without and with SAM, in one figure
    python examples/mnist.py --data FOLDER                     # your own copy of the four .gz files, no network needed
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

import flatmin
from mnist_data import MEAN, STD, Data, UsageError, load

# Learning rates for --lr left out, all meant for StepLR's decay by 0.7 per epoch. Adadelta's is the original example's.
BASES = {
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.001}),
}


class Net(nn.Module):
    """Two convolutions and two linear layers: 1,199,882 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities [N, 10] of normalised images [N, 1, 28, 28]."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class Batches:
    """Normalised batches of a dataset that lies on the device as uint8: 47 MB for the training set, not 188 MB."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, shuffle: torch.Generator | None = None) -> None:
        self.images, self.labels = images, labels
        self.batch_size = batch_size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        order = torch.arange(n) if self.shuffle is None else torch.randperm(n, generator=self.shuffle)
        for index in order.to(self.labels.device).split(self.batch_size):
            yield (self.images[index].unsqueeze(1) / 255 - MEAN) / STD, self.labels[index]


class Epoch(NamedTuple):
    """Results of one epoch. Losses are means per image, in nats."""

    train_loss: float
    test_loss: float
    correct: int
    tested: int

    @property
    def accuracy(self) -> float:
        """Share of the test images that were classified correctly, in percent."""
        return 100.0 * self.correct / self.tested


def make_batches(args: argparse.Namespace, data: Data, device: torch.device) -> tuple[Batches, Batches]:
    """Training batches, reshuffled every epoch, and test batches."""
    train_set = (part[: args.limit_train] for part in data.train)
    # A generator of its own: every optimizer sees the same batches, however many dropout masks its passes draw.
    shuffle = torch.Generator().manual_seed(args.seed)
    return (
        Batches(*(t.to(device) for t in train_set), args.batch_size, shuffle),
        Batches(*(t.to(device) for t in data.test), args.test_batch_size),
    )


def make_optimizer(args: argparse.Namespace, name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of this name, inside :class:`flatmin.SAM` if it begins with ``sam-``."""
    base_class, options = BASES[name.removeprefix("sam-")]
    if args.lr is not None:
        options = {**options, "lr": args.lr}
    try:
        optimizer = base_class(model.parameters(), **options)
        if name.startswith("sam-"):
            optimizer = flatmin.SAM(optimizer, rho=args.rho, adaptive=args.adaptive)
    except ValueError as error:
        raise UsageError(f"--optimizer {name}: {error}") from error
    return optimizer


def train(
    args: argparse.Namespace, model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, epoch: int
) -> float:
    """One pass over the training set. Returns the mean loss, at the unperturbed weights and with dropout."""
    model.train()
    total: Tensor | float = 0.0  # stays on the device: reading it at every batch would wait for an accelerator
    seen = 0
    # A terminal gets a smooth bar, a log file one line every ten seconds.
    every = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(batches, desc=f"Epoch {epoch}/{args.epochs}", unit="batch", mininterval=every) as bar:
        for i, (data, target) in enumerate(bar):
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            # Plain optimizers have no `active`. Nor does SAM need the second pass, with its fresh dropout, at rho 0.
            if getattr(optimizer, "active", False):
                with optimizer.perturb():
                    F.nll_loss(model(data), target).backward()
            optimizer.step()

            total += loss.detach() * len(target)
            seen += len(target)
            if i % args.log_interval == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return float(total) / seen


@torch.no_grad()
def test(model: nn.Module, batches: Batches) -> tuple[float, int]:
    """Mean loss over the test set, and the number of images classified correctly."""
    model.eval()
    loss, correct = 0.0, 0
    for data, target in batches:
        output = model(data)
        loss += F.nll_loss(output, target, reduction="sum").item()
        correct += int((output.argmax(dim=1) == target).sum())
    return loss / len(batches.labels), correct


def plot(runs: Mapping[str, Sequence[Epoch]], path: Path, title: str) -> None:
    """Write a PNG with the losses and the test accuracy of every epoch, of one optimizer or of several by name."""
    # A Figure of its own, without pyplot: needs no display and no global state.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    figure.suptitle(title)
    losses, accuracy = figure.subplots(1, 2)
    alone = len(runs) == 1
    for i, (name, history) in enumerate(runs.items()):
        epochs = range(1, len(history) + 1)
        color = "C1" if alone else f"C{i}"
        before, train_look = ("", {"color": "C0"}) if alone else (f"{name}, ", {"color": color, "ls": "--", "mfc": "w"})
        losses.plot(epochs, [e.train_loss for e in history], marker="o", label=f"{before}training", **train_look)
        losses.plot(epochs, [e.test_loss for e in history], "s-", color=color, label=f"{before}test")
        label = f"{name}: {history[-1].accuracy:.2f} % at the end"
        accuracy.plot(epochs, [e.accuracy for e in history], "s-", color=color, label=label)
    losses.set_ylabel("loss (nats per image; training with dropout)")
    losses.set_ylim(bottom=0)
    accuracy.set_ylabel("test accuracy (% of images)")
    for axes in (losses, accuracy):
        axes.legend(frameon=False)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, len(history) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} given, but it must be at least 1")
    return value


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line: first the flags of pytorch/examples, then this example's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    rates = ", ".join(f"{options['lr']} for {name}" for name, (_, options) in BASES.items())
    add("--batch-size", type=positive_int, default=64, metavar="N", help="training batch size (64)")
    add("--test-batch-size", type=positive_int, default=1000, metavar="N", help="test batch size (1000)")
    add("--epochs", type=positive_int, default=14, metavar="N", help="passes over the training set (14)")
    add("--lr", type=float, help=f"learning rate ({rates})")
    add("--gamma", type=float, default=0.7, metavar="M", help="factor on the learning rate after every epoch (0.7)")
    add("--no-accel", action="store_true", help="stay on the CPU even if there is an accelerator")
    add("--dry-run", action="store_true", help="one training batch and one test pass, to see that all works")
    add("--seed", type=int, default=1, metavar="S", help="seed of weights, batch order and dropout (1)")
    add("--log-interval", type=positive_int, default=10, metavar="N", help="batches between two losses shown (10)")
    add("--save-model", action="store_true", help="write the trained weights (of --compare, SAM's) to mnist_cnn.pt")

    names = [*BASES, *(f"sam-{name}" for name in BASES)]
    add("--optimizer", choices=names, default="sam-adadelta", help="plain, or inside flatmin.SAM (sam-adadelta)")
    add("--rho", type=float, default=0.05, help="SAM: radius of the perturbation (0.05)")
    add("--adaptive", action="store_true", help="SAM: radius relative to the weights (ASAM; papers use rho 0.5 to 2)")
    add("--compare", action="store_true", help="train the optimizer without SAM and with it, from the same seed")
    add(
        "--data",
        metavar="FOLDER",
        help="folder with the four MNIST .gz files, or 'digits' for scikit-learn's (./data, else torchvision downloads "
        "to it, else the digits)",
    )
    add("--plot", type=Path, metavar="PNG", help="write the training curves to this file")
    add("--threads", type=positive_int, metavar="N", help="CPU threads (torch's choice)")
    add("--limit-train", type=positive_int, metavar="N", help="use the first N training images only")
    args = parser.parse_args(argv)
    if args.dry_run:
        args.epochs, args.limit_train = 1, args.batch_size
    return args


def check_plot(path: Path) -> None:
    """Fail before the training, not after it, if the plot cannot be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--plot: matplotlib cannot be imported ({error}); pip install matplotlib") from error
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.parent} does not exist")


def fit(args: argparse.Namespace, name: str, data: Data, device: torch.device) -> tuple[nn.Module, list[Epoch], float]:
    """A network trained by the optimizer of this name, its epochs, and the seconds that they took.

    Weights, batches and dropout come from ``--seed`` anew, so two optimizers start from the same point.
    """
    torch.manual_seed(args.seed)
    train_batches, test_batches = make_batches(args, data, device)
    model = Net().to(device)
    optimizer = make_optimizer(args, name, model)
    scheduler = StepLR(optimizer, step_size=1, gamma=args.gamma)

    history: list[Epoch] = []
    start = time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        train_loss = train(args, model, train_batches, optimizer, epoch)
        history.append(Epoch(train_loss, *test(model, test_batches), tested=len(test_batches.labels)))
        scheduler.step()
        last = history[-1]
        print(
            f"\nTest set: Average loss: {last.test_loss:.4f}, "
            f"Accuracy: {last.correct}/{last.tested} ({last.accuracy:.0f}%)\n",
            flush=True,
        )
    return model, history, time.perf_counter() - start


def run(args: argparse.Namespace) -> None:
    """Train, test after every epoch, and leave the files that were asked for."""
    if args.plot is not None:
        check_plot(args.plot)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    if not args.no_accel and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    data = load(args.data)
    base = args.optimizer.removeprefix("sam-")
    names = [base, f"sam-{base}"] if args.compare else [args.optimizer]
    count = f"{args.epochs} epoch" + "s" * (args.epochs > 1)

    runs: dict[str, list[Epoch]] = {}
    results = []
    for name in names:
        if args.compare:
            print(f"Training with {name}", flush=True)
        model, runs[name], seconds = fit(args, name, data, device)
        last = runs[name][-1]
        results.append(
            f"Final test accuracy: {last.accuracy:.2f}% ({last.correct}/{last.tested}), "
            f"optimizer {name}, {count}, {seconds:.0f} s"
        )
    if args.save_model:
        torch.save(model.state_dict(), "mnist_cnn.pt")
    if args.plot is not None:
        plot(runs, args.plot, f"{data.name}, {' and '.join(names)}, {count}")
    print("\n".join(results))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: ``argv`` defaults to the command line."""
    args = parse_args(argv)
    try:
        run(args)
    except UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
