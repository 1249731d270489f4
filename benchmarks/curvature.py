"""Eigenvalues and spectral density of a ResNet-20: flatmin beside PyHessian and beside SciPy on curvlinops' operator.

    python benchmarks/curvature.py                        # 2,000 images of 32 x 32, made up; about an hour on two cores
    python benchmarks/curvature.py --images 500 --batch 125 --density-images 100 --json out.json
    python benchmarks/curvature.py --data images.pt       # torch.save((images, labels)): float (N, 3, 32, 32), int (N,)
    python benchmarks/curvature.py --quick                # seconds: does it run?

The peers are optional; each that is installed has its rows::

    pip install --no-deps pyhessian curvlinops-for-pytorch linear_operator jaxtyping wadler_lindig einops einconv \\
        backpack-for-pytorch

Everybody measures the same network in eval mode, trained for a little while, on the same batches and threads.

* The five largest eigenvalues: ``flatmin.curvature.eigenvalues`` and SciPy's ``eigsh`` to a tolerance of 1e-3,
  PyHessian at its defaults (power iteration until a value changes by less than 1e-3). The relative residuals
  ``||H x - theta x|| / |theta|`` of what each returned are computed afterwards, with the same products for all.
* The density, 10 probes of 50 steps, on fewer images, since it takes 500 products. PyHessian calls ``torch.eig``, which
  torch no longer has; ``torch.linalg.eigh`` stands in for it.
* One product with the Hessian, and the vector work of a Lanczos step with 50 vectors.
* The peak of the resident memory above that before the call, each in a process of its own: of products one after
  another, and of the eigenvalues.

On a busy machine the ratios are of processor seconds, and only with one thread of use: two wait for each other. The
numbers of products do not depend on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flatmin import curvature
from flatmin.curvature._basis import Basis
from timing import BUSY_LOAD, environment, print_environment

FLATMIN, PYHESSIAN, CURVLINOPS = "flatmin", "PyHessian", "curvlinops"
K, TOL = 5, 1e-3

Batches = list[tuple[Tensor, Tensor]]


# ---- the network and its data ----


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(blocks: int = 3, width: int = 16, classes: int = 10) -> nn.Sequential:
    """ResNet-20 of He et al. 2016 for 32 x 32 images: three stages of three blocks, 0.27 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(3):
        for block in range(blocks):
            now = width << stage
            layers.append(Block(before, now, 2 if stage and not block else 1))
            before = now
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def made_up(images: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Ten smooth patterns under noise: a task that a network can learn in a few steps, and not perfectly."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(10, 3, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=(side, side), mode="bilinear")
    labels = torch.randint(10, (images,), generator=generator)
    return patterns[labels] + 1.5 * torch.randn(images, 3, side, side, generator=generator), labels


def problem(args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """The network, trained, in eval mode, and all batches."""
    torch.manual_seed(0)
    net = resnet(1, 4) if args.quick else resnet()
    x, y = torch.load(args.data) if args.data else made_up(args.images, 8 if args.quick else 32)
    x, y = x[: args.images], y[: args.images]
    opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in tqdm(range(args.training_steps), desc="training", unit="step", leave=False):
        picked = torch.randint(len(x), (64,), generator=generator)
        opt.zero_grad()
        F.cross_entropy(net(x[picked]), y[picked]).backward()
        opt.step()
    net.zero_grad()
    return net.eval(), list(zip(x.split(args.batch), y.split(args.batch), strict=True))


def images(data: Batches) -> int:
    return sum(len(y) for _, y in data)


def first(data: Batches, count: int) -> Batches:
    x, y = torch.cat([x for x, _ in data])[:count], torch.cat([y for _, y in data])[:count]
    size = len(data[0][1])
    return list(zip(x.split(size), y.split(size), strict=True))


# ---- the rows ----


class Products:
    """Counts passes over the data."""

    def __init__(self, net: nn.Module, data: Batches) -> None:
        self.forwards, self.batches = 0, len(data)
        net.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.forwards += 1

    def timed(self, f: Callable[[], Any]) -> tuple[dict[str, float], Any]:
        """Seconds, those of the processor, and products; and the result."""
        before, start, start_cpu = self.forwards, time.perf_counter(), time.process_time()
        result = f()
        cost = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
        return cost | {"products": (self.forwards - before) / self.batches}, result


Vectors = list[list[Tensor]]


def flatmin_eigenvalues(net: nn.Module, data: Batches) -> tuple[Sequence[float], Vectors]:
    found = curvature.eigenvalues(net, F.cross_entropy, data, k=K, tol=TOL, vectors=True)
    assert found.vectors is not None
    return found.values, found.vectors


def pyhessian_eigenvalues(net: nn.Module, data: Batches) -> tuple[Sequence[float], Vectors]:
    from pyhessian import hessian

    return hessian(net, F.cross_entropy, dataloader=data, cuda=False).eigenvalues(top_n=K)


def curvlinops_operator(net: nn.Module, data: Batches) -> Any:
    from curvlinops import HessianLinearOperator

    params = [p for p in net.parameters() if p.requires_grad]
    return HessianLinearOperator(net, nn.CrossEntropyLoss(), params, data, check_deterministic=False)


def curvlinops_eigenvalues(net: nn.Module, data: Batches) -> tuple[Sequence[float], Vectors]:
    from scipy.sparse.linalg import eigsh

    values, vectors = eigsh(curvlinops_operator(net, data).to_scipy(), k=K, which="LA", tol=TOL)
    sizes, shapes = [p.numel() for p in net.parameters()], [p.shape for p in net.parameters()]
    columns = [torch.from_numpy(v.copy()).split(sizes) for v in vectors.T[::-1]]
    return values[::-1].tolist(), [[t.view(s) for t, s in zip(c, shapes, strict=True)] for c in columns]


def flatmin_density(net: nn.Module, data: Batches, probes: int, steps: int) -> None:
    curvature.spectral_density(net, F.cross_entropy, data, probes=probes, steps=steps).on_grid()


def pyhessian_density(net: nn.Module, data: Batches, probes: int, steps: int) -> None:
    from pyhessian import hessian

    torch.eig = _eig
    hessian(net, F.cross_entropy, dataloader=data, cuda=False).density(iter=steps, n_v=probes)


def _eig(t: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(t)
    return values[:, None], vectors


def curvlinops_density(net: nn.Module, data: Batches, probes: int, steps: int) -> None:
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    # the ends of the spectrum are given: finding them is not what the others do
    lanczos_approximate_spectrum(curvlinops_operator(net, data), steps, num_repeats=probes, boundaries=(-5.0, 50.0))


def curvlinops_product(net: nn.Module, data: Batches) -> Callable[[list[Tensor]], Any]:
    operator = curvlinops_operator(net, data)
    return lambda v: operator @ v


def pyhessian_product(net: nn.Module, data: Batches) -> Callable[[list[Tensor]], Any]:
    from pyhessian import hessian

    return hessian(net, F.cross_entropy, dataloader=data, cuda=False).dataloader_hv_product


def installed() -> list[str]:
    found = [FLATMIN]
    found += [PYHESSIAN] if importlib.util.find_spec("pyhessian") else []
    return found + ([CURVLINOPS] if importlib.util.find_spec("curvlinops") else [])


EIGENVALUES = {
    FLATMIN: flatmin_eigenvalues,
    PYHESSIAN: pyhessian_eigenvalues,
    CURVLINOPS: curvlinops_eigenvalues,
}
DENSITIES = {FLATMIN: flatmin_density, PYHESSIAN: pyhessian_density, CURVLINOPS: curvlinops_density}
PRODUCTS = {
    FLATMIN: lambda net, data: curvature.linear_operator(net, F.cross_entropy, data, progress=False).matvec,
    PYHESSIAN: pyhessian_product,
    CURVLINOPS: curvlinops_product,
}


# ---- measuring ----


def eigenvalue_rows(net: nn.Module, data: Batches) -> dict[str, Any]:
    products, rows = Products(net, data), {}
    with curvature.linear_operator(net, F.cross_entropy, data, progress=False) as A:
        for name in installed():
            torch.manual_seed(0)
            cost, (values, vectors) = products.timed(lambda name=name: EIGENVALUES[name](net, data))
            residuals = []
            for value, vector in zip(values, vectors, strict=True):
                x = A.flatten(vector)
                x /= x.norm()
                residuals.append(float((A @ x - value * x).norm()) / abs(value))
            rows[name] = cost | {"values": list(values), "residuals": residuals}
    return rows


def density_rows(net: nn.Module, data: Batches, probes: int, steps: int) -> dict[str, Any]:
    products, rows = Products(net, data), {}
    for name in installed():
        torch.manual_seed(0)
        rows[name], _ = products.timed(lambda name=name: DENSITIES[name](net, data, probes, steps))
    return rows


def product_rows(net: nn.Module, data: Batches, rounds: int) -> dict[str, float]:
    """Median seconds of the processor for one product, in turns."""
    v = [torch.randn_like(p) for p in net.parameters()]
    products = {name: PRODUCTS[name](net, data) for name in installed()}
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in tqdm(range(rounds), desc="products", unit="round", leave=False):
        for name, product in products.items():
            start = time.process_time()
            product(v)
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def vector_work(net: nn.Module, data: Batches, rounds: int, vectors: int = 50) -> float:
    """Median seconds of the processor that a Lanczos step with so many vectors spends beside its product."""
    A = curvature.linear_operator(net, F.cross_entropy, data, progress=False)
    basis = Basis(A, vectors + 1)
    for i in range(vectors):
        v = A.probe(0, i)
        _, length = basis.orthogonalise(v)
        basis.append(v, length)
    w, times = A.probe(0, vectors), []
    for _ in range(rounds):
        fresh = w.clone()
        start = time.process_time()
        _, length = basis.orthogonalise(fresh)
        basis.append(fresh, length)
        t = torch.zeros(vectors + 1, vectors + 1, dtype=torch.float64)
        torch.linalg.eigh(t)
        times.append(time.process_time() - start)
        basis.count = vectors
    return statistics.median(times)


def resident(which: str) -> int:
    """The resident memory of this process in bytes, "VmRSS" now or "VmHWM" at its peak (Linux; getrusage counts that of
    the parent before the fork)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(which)]
    return 1024 * int(line.split()[1])


def memory_of(what: str, args: argparse.Namespace) -> int:
    """Bytes by which one call raises the peak, in a process of its own."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()
               if name in ("images", "batch", "threads", "data") and value is not None]  # fmt: skip
    options += ["--quick"] if args.quick else []
    command = [sys.executable, __file__, "--memory-of", what, *options]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(what: str, net: nn.Module, data: Batches) -> int:
    with torch.no_grad():
        net(data[0][0][:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    if what == "product":
        with curvature.linear_operator(net, F.cross_entropy, data) as A:
            for draw in range(3):  # the heap of the second is larger than that of the first, and stays
                A @ A.probe(0, draw)
    else:
        curvature.eigenvalues(net, F.cross_entropy, data, k=K, tol=TOL)
    return resident("VmHWM") - before


# ---- the report ----


def target(what: str, measured: float, required: float, met: bool) -> dict[str, Any]:
    return {"what": what, "measured": measured, "required": required, "met": met}


def print_targets(targets: list[dict[str, Any]]) -> None:
    for each in targets:
        verdict = "met" if each["met"] else "NOT met"
        print(f"  {each['what']}: {each['measured']:.2f} (required {each['required']:.2f}): {verdict}")


def targets_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows, density = report["eigenvalues"], report["density"]
    clock = "cpu_seconds" if report["environment"]["load"] > BUSY_LOAD else "seconds"
    found = []
    worst = max(rows[FLATMIN]["residuals"])
    found.append(target("flatmin's largest relative residual / 1e-3", worst / TOL, 1.0, worst <= TOL))
    for name, least in ((PYHESSIAN, 4.0), (CURVLINOPS, 1.0)):
        if name in rows:
            faster = rows[name][clock] / rows[FLATMIN][clock]
            found.append(target(f"top {K}, times as fast as {name}", faster, least, faster >= least))
            fewer = rows[name]["products"] / rows[FLATMIN]["products"]
            found.append(target(f"top {K}, products of {name} over flatmin's", fewer, least, fewer >= least))
            faster = density[name][clock] / density[FLATMIN][clock]
            found.append(target(f"density, times as fast as {name}", faster, 1.0, faster >= 1.0))
    share = 100.0 * report["vector_work_seconds"] / report["product_seconds"][FLATMIN]
    found.append(target("vector work of a step, % of a product", share, 5.0, share <= 5.0))
    memory = report["memory_bytes"]
    limit = 1.1 * memory["product"] + memory["basis"]
    over = memory["eigenvalues"] / limit
    found.append(target("peak memory over 1.1 products and the basis", over, 1.0, over <= 1.0))
    return found


def costs(row: dict[str, float]) -> str:
    return f"{row['seconds']:9.2f} {row['cpu_seconds']:9.2f} {row['products']:9.1f}"


def print_report(report: dict[str, Any]) -> None:
    print(f"\n{report['parameters']:,} parameters, {report['images']} images in batches of {report['batch']}")
    print(f"  {'top ' + str(K):12} {'s':>9} {'CPU s':>9} {'products':>9} {'largest residual':>17}  values")
    for name, row in report["eigenvalues"].items():
        values = " ".join(f"{v:.4g}" for v in row["values"])
        print(f"  {name:12} {costs(row)} {max(row['residuals']):17.1e}  {values}")
    print(f"  {'density':12} {'s':>9} {'CPU s':>9} {'products':>9}   on {report['density_images']} images")
    for name, row in report["density"].items():
        print(f"  {name:12} {costs(row)}")
    print(f"  {'one product':12} {'CPU s':>9}")
    for name, seconds in report["product_seconds"].items():
        print(f"  {name:12} {seconds:9.3f}")
    print(f"  vector work of a step with 50 vectors: {1e3 * report['vector_work_seconds']:.2f} ms")
    memory = {name: value / 2**20 for name, value in report["memory_bytes"].items()}
    print("  memory, MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()))
    print_targets(report["targets"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time eigenvalues and densities of a ResNet-20 beside their peers.")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=200, help="images at a time (default 200)")
    parser.add_argument("--density-images", type=int, default=200, help="for the density (default 200)")
    parser.add_argument("--probes", type=int, default=10, help="of the density (default 10)")
    parser.add_argument("--steps", type=int, default=50, help="of Lanczos, for each probe (default 50)")
    parser.add_argument("--training-steps", type=int, default=60, help="before anything is measured (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="of single products (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="for every row (default 2)")
    parser.add_argument("--data", type=Path, help="torch.save((images, labels)) instead of what is made up")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything measured here")
    parser.add_argument("--quick", action="store_true", help="a tiny network and 40 images")
    parser.add_argument("--memory-of", choices=["product", "eigenvalues"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.batch, args.density_images, args.probes, args.steps = 40, 20, 20, 2, 5
        args.training_steps, args.rounds = 5, 1
    if min(args.images, args.batch, args.density_images, args.rounds, args.threads) < 1:
        parser.error("--images, --batch, --density-images, --rounds and --threads must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        args.training_steps = 0
        print(measure_memory(args.memory_of, *problem(args)))
        return
    report: dict[str, Any] = {"environment": environment(args.threads, args.rounds, 1), "peers": installed()[1:]}
    print_environment(report["environment"])
    net, data = problem(args)
    parameters = sum(p.numel() for p in net.parameters())
    few = first(data, args.density_images)
    report |= {"parameters": parameters, "images": images(data), "batch": args.batch, "density_images": images(few)}
    report["product_seconds"] = product_rows(net, data, args.rounds)
    report["vector_work_seconds"] = vector_work(net, data, 20)
    report["eigenvalues"] = eigenvalue_rows(net, data)
    report["density"] = density_rows(net, few, args.probes, args.steps)
    kept = int(report["eigenvalues"][FLATMIN]["products"]) + 1
    report["memory_bytes"] = {what: memory_of(what, args) for what in ("product", "eigenvalues")}
    report["memory_bytes"]["basis"] = 4 * parameters * min(kept, 40)
    report["targets"] = targets_of(report)
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
