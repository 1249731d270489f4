"""How flat are two minima? A small net trained by SGD and by SAM, and all that flatmin measures of both.

    python examples/sharpness/report.py --data digits --out out/report      # half a minute, from scikit-learn
    python examples/sharpness/report.py --data MNIST_FOLDER --budget 300    # the four .gz files

Prints both reports and their comparison, and leaves in --out: report.png and .json of each, compare.png, and the loss
between the two minima and over a plane around one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flatmin
import mnist_data
from _common.flags import positive_int
from flatmin import sharpness

Pair = tuple[Tensor, Tensor]


def net(seed: int) -> nn.Sequential:
    """One hidden layer of 32: 25,450 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def normalised(part: mnist_data.Part, limit: int | None = None) -> Pair:
    images, labels = part[0][:limit], part[1][:limit]
    return images[:, None].float().div(255.0).sub(mnist_data.MEAN).div(mnist_data.STD), labels


def train(name: str, data: Pair, args: argparse.Namespace) -> nn.Module:
    model = net(args.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if name == "SAM":
        optimizer = flatmin.SAM(optimizer, rho=args.rho)
    order = torch.Generator().manual_seed(args.seed)
    for _ in tqdm(range(args.epochs), desc=name, leave=False):
        for rows in torch.randperm(len(data[1]), generator=order).split(100):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
                loss.backward()
                return loss

            optimizer.step(closure)
    return model.eval()


def run(args: argparse.Namespace) -> None:
    found = mnist_data.load(args.data)
    data, held_out = normalised(found.train, args.limit_train), normalised(found.test)
    batches = list(zip(data[0].split(500), data[1].split(500), strict=True))
    args.out.mkdir(parents=True, exist_ok=True)
    models = {name: train(name, data, args) for name in ("SGD", "SAM")}
    reports: list[flatmin.Report] = []
    for name, model in models.items():
        # the second is measured like the first, so that their numbers can be compared
        how = {"like": reports[0]} if reports else {"budget_s": args.budget}
        reports.append(flatmin.report(model, F.cross_entropy, batches, held_out, m=(1, 16, 256), seed=args.seed, **how))
        print(f"\n{name}\n{reports[-1]}")
        reports[-1].plot(args.out / f"report_{name}.png")
        (args.out / f"report_{name}.json").write_text(json.dumps(reports[-1].as_dict(), indent=1))
    sides = flatmin.compare(reports[0], reports[1], names=("SGD", "SAM"))
    print(f"\n{sides}")
    sides.plot(args.out / "compare.png")
    between = sharpness.line(models["SGD"], F.cross_entropy, batches, models["SAM"].state_dict())
    between.plot(args.out / "line.png")
    around = sharpness.plane(models["SAM"], F.cross_entropy, batches, points=args.points, seed=args.seed)
    around.save(args.out / "plane.json")
    around.plot(args.out / "plane.png")
    around.plot(args.out / "surface.png", kind="surface")
    print(f"\nfigures in {args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--data",
        metavar="SOURCE",
        default="digits",
        help="'digits', or a folder with the four MNIST .gz files (digits)",
    )
    add("--out", type=Path, default=Path("out/report"), metavar="FOLDER", help="results and figures (out/report)")
    add("--limit-train", type=positive_int, metavar="N", help="train on the first N images (all)")
    add("--epochs", type=positive_int, default=30, metavar="N", help="(30)")
    add("--rho", type=float, default=0.05, metavar="R", help="radius of SAM (0.05)")
    add("--budget", type=float, default=10.0, metavar="S", help="seconds for each report, about (10)")
    add("--points", type=positive_int, default=15, metavar="N", help="of the plane along each axis (15)")
    add("--seed", type=int, default=0, metavar="S", help="(0)")
    try:
        run(parser.parse_args(argv))
    except mnist_data.UsageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
