"""Speed against named peers in the same run: python tests/bench.py (make bench); make gpu also keeps the table.

Every row is the median of single calls after a warm-up, its spread the distance between their quartiles. On a GPU calls
are timed by its own events, and how long the host takes to ask for one stands beside it. Before anything is timed,
ours and the peers must give the same result. ``--write`` puts the table into the page of the kernels, and is refused
without a GPU: a kernel's speed on a CPU says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_kernels import COMPARISONS, Comparison
from torch import nn

from reprise.functional import batch_norm
from reprise.lab.tables import align
from reprise.optim import Adam
from reprise.training import Batches, declare, train

PAGE = Path(__file__).resolve().parents[1] / "lib" / "reprise" / "kernels" / "README.md"
HEAD = ("operation", "who", "median ms", "spread ms", "host ms", "ours / peer", "share of a copy")
UNKNOWN = "not measured yet"


@dataclass
class Timing:
    """Milliseconds of single calls, and of the host until it has asked for one."""

    calls: list[float]
    host: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.calls)

    @property
    def spread(self) -> float:
        lower, _, upper = statistics.quantiles(self.calls, n=4)
        return upper - lower


def timed(work: Callable[[], object], device: torch.device, repeats: int = 30) -> Timing:
    """Single calls after a warm-up: by the clock on the CPU, by CUDA events on a GPU."""
    for _ in range(5):
        work()
    return _by_events(work, device) if device.type == "cuda" else Timing(_by_the_clock(work, repeats))


def _by_the_clock(work: Callable[[], object], repeats: int) -> list[float]:
    calls = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        calls.append((time.perf_counter() - started) * 1e3)
    return calls


def _by_events(work: Callable[[], object], device: torch.device, repeats: int = 100) -> Timing:
    torch.cuda.synchronize(device)
    host = statistics.median(_by_the_clock(work, 10))
    # A GPU that waits for Python would time Python. So it is first kept busy for longer than the host needs for all.
    gigabyte = torch.empty(2**30, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    gigabyte.zero_()
    torch.cuda.synchronize(device)
    fill = (time.perf_counter() - started) * 1e3
    for _ in range(int(1.5 * repeats * host / fill) + 10):
        gigabyte.zero_()
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return Timing([begin.elapsed_time(end) for begin, end in pairs], host)


def copy_speed(device: torch.device) -> float:
    """Bytes in a millisecond, read and written, of a copy much larger than any cache."""
    source = torch.rand(2**28 if device.type == "cuda" else 2**23, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device).median


def rows(
    operation: str, works: dict[str, Callable], device: torch.device, least_bytes: int = 0, copy: float = 0
) -> list[tuple[str, ...]]:
    """One line for ours, which comes first, and one for each peer."""
    timings = {who: timed(work, device) for who, work in works.items()}
    own, lines = next(iter(timings.values())).median, []
    for who, timing in timings.items():
        share = f"{least_bytes / timing.median / copy:.0%}" if least_bytes else ""
        host = "" if timing.host is None else f"{timing.host:.3f}"
        figures = (f"{timing.median:.3f}", f"{timing.spread:.3f}", host, f"{own / timing.median:.2f}", share)
        lines.append(("" if lines else operation, who, *figures))
    return lines


def disagreement(mine: torch.Tensor, other: torch.Tensor) -> float:
    """The share of numbers that differ by more than a thousandth of their spread.

    A few may: where a position falls on a pixel, rounding decides which of two slopes is the gradient.
    """
    return ((mine - other).abs() > 1e-3 * other.std()).double().mean().item()


def kernel_rows(comparison: Comparison, device: torch.device, copy: float) -> list[tuple[str, ...]]:
    size = comparison.size(device.type)
    torch.manual_seed(0)
    works = comparison.works(size, device)
    results = {who: work() for who, work in works.items()}
    ours = next(iter(results.values()))
    for who, theirs in results.items():
        worst = max(disagreement(mine, other) for mine, other in zip(ours, theirs, strict=True))
        assert worst < 0.005, f"{who}: {worst:.1%} of the results differ from ours"
    # What a CPU's test sizes move stays in its cache, where a share of a copy from memory means nothing.
    least = comparison.least_bytes(size) if device.type == "cuda" else 0
    found = rows(comparison.title(size), works, device, least, copy)
    del works, results, ours
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def functional_rows(shape: tuple[int, ...], device: torch.device) -> list[tuple[str, ...]]:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(shape[1], device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    def step(function: Callable) -> Callable[[], None]:
        return lambda: function(x, mean, var, weight, bias, True, 0.1, 1e-5).sum().backward()

    name = f"functional.batch_norm forward + backward {'x'.join(map(str, shape))}"
    return rows(name, {"ours": step(batch_norm), "torch.nn.functional": step(F.batch_norm)}, device)


def optimizer_rows(numbers: int, tensors: int) -> list[tuple[str, ...]]:
    """A step of Adam for so many numbers in so many tensors."""

    def stepping(kind: type, **how: bool) -> Callable[[], None]:
        params = [torch.randn(numbers // tensors).requires_grad_() for _ in range(tensors)]
        for p in params:
            p.grad = torch.randn_like(p)
        return kind(params, **how).step

    peers = {"torch.optim.Adam": stepping(torch.optim.Adam), "fused": stepping(torch.optim.Adam, fused=True)}
    name = f"optim.Adam, {numbers:,} numbers in {tensors} tensor{'s' * (tensors > 1)}"
    return rows(name, {"ours": stepping(Adam), **peers}, torch.device("cpu"))


def training_rows(steps: int = 300) -> list[tuple[str, ...]]:
    """A small network trained in a bare loop, and through ``train`` with declared invariants."""
    images, labels = torch.rand(1000, 64), torch.randint(10, (1000,))

    def fresh():
        model = nn.Sequential(nn.Linear(64, 100), nn.Sigmoid(), nn.Linear(100, 100), nn.Sigmoid(), nn.Linear(100, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = Batches(images, labels, size=60)

        def step():
            x, y = next(batches)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return model, optimizer, batches, step

    def through_train():
        model, optimizer, batches, step = fresh()
        declare(model[1], saturated=(0, 1), mean=(0, 1))
        run = train("bench", steps, model, optimizer, batches)
        for _ in run:
            run.log(loss=step())

    def bare():
        *_, step = fresh()
        for _ in range(steps):
            step()

    return rows(f"{steps} training steps", {"ours": through_train, "bare loop": bare}, torch.device("cpu"))


def where(device: torch.device) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    cupy = next((d.version for d in importlib.metadata.distributions() if d.name.startswith("cupy")), "not installed")
    return f"{name}, torch {torch.__version__}, CuPy {cupy}, {datetime.date.today().isoformat()}"


def unmeasured() -> list[tuple[str, ...]]:
    """The kernels' rows as they are before anyone had a GPU."""
    lines = []
    for comparison in COMPARISONS:
        title = comparison.title(comparison.size("cuda"))
        for place, who in enumerate(comparison.who("cuda")):
            lines.append(("" if place else title, who, *[UNKNOWN] * (len(HEAD) - 2)))
    return lines


def table(lines: list[tuple[str, ...]]) -> str:
    """Lines as a table in Markdown."""
    ruled = [HEAD, ("---",) * len(HEAD), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def written(page: str, caption: str, lines: list[tuple[str, ...]]) -> str:
    """The page with its table anew."""
    text = f"<!-- speed -->\n{caption}\n\n{table(lines)}\n<!-- /speed -->"
    return re.sub(r"<!-- speed -->.*<!-- /speed -->", lambda _: text, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the kernels' table in their page; needs a GPU")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copy = copy_speed(device)
    caption = f"{where(device)}; a large copy moves {copy / 1e6:.0f} GB/s."
    print(caption)
    if device.type == "cpu":
        print("Kernels run here through g++: that is how they are checked, not how they are used.")
    measured = [line for comparison in COMPARISONS for line in kernel_rows(comparison, device, copy)]
    others = [*functional_rows((60, 100), device), *functional_rows((64, 64, 32, 32), device)]
    others += [*optimizer_rows(10_000_000, 1), *optimizer_rows(10_000_000, 40), *training_rows()]
    print(f"\n{align([HEAD, *measured, *others])}")
    if write and device.type == "cuda":
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), caption, measured), encoding="utf-8")
        print(f"\nwrote {PAGE.name} of the kernels")
    elif write:
        print("\nnothing written: a kernel's speed is that on a GPU, and torch finds none")


if __name__ == "__main__":
    main()
