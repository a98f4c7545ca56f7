"""Speed, as ratios against named peers in the same run: python tests/bench.py (or make bench)."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from reprise.functional import batch_norm
from reprise.lab.tables import align
from reprise.training import Batches, declare, train


def seconds(work: Callable[[], None], device: torch.device, repeats: int = 30) -> list[float]:
    """Durations of single calls after a warm-up, waiting for the device each time."""
    durations = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - started)
    return durations[5:]


def row(name: str, ours: Callable, peers: dict[str, Callable], device: torch.device) -> list[tuple[str, ...]]:
    own = seconds(ours, device)
    lines = [(name, "ours", f"{statistics.median(own) * 1e3:.3f}", f"{min(own) * 1e3:.3f}", "1.00")]
    for peer, work in peers.items():
        other = seconds(work, device)
        ratio = statistics.median(own) / statistics.median(other)
        lines.append(("", peer, f"{statistics.median(other) * 1e3:.3f}", f"{min(other) * 1e3:.3f}", f"{ratio:.2f}"))
    return lines


def batch_norm_rows(shape: tuple[int, ...], device: torch.device) -> list[tuple[str, ...]]:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight, bias = (torch.ones(shape[1], device=device, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    def step(function: Callable) -> Callable[[], None]:
        return lambda: function(x, mean, var, weight, bias, True, 0.1, 1e-5).sum().backward()

    name = f"batch_norm forward + backward {'x'.join(map(str, shape))}"
    return row(name, step(batch_norm), {"torch.nn.functional": step(F.batch_norm)}, device)


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

    return row(f"{steps} training steps", through_train, {"bare loop": bare}, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, one thread'}, torch {torch.__version__}\n"
    )
    rows = [("operation", "who", "median ms", "best ms", "ours / peer")]
    rows += batch_norm_rows((60, 100), device) + batch_norm_rows((64, 64, 32, 32), device) + training_rows()
    print(align(rows))


if __name__ == "__main__":
    main()
