"""Sets Reprise up and runs a target: python bootstrap.py setup | reproduce | test | bench | gpu | lab | publish

Needs Python 3.11 or later and nothing else. Everything goes into .venv beside this file; with uv on the path it is
there in about a minute, otherwise venv and pip take a few. TORCH_INDEX may name torch's own package index (its CPU
builds are much smaller); torch and torchvision then come from there as a pair.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "reprise-setup.txt"
# The Python to build on: not .venv's own, should this run inside it, since .venv may be made anew.
BASE = getattr(sys, "_base_executable", None) or sys.executable
# No question about news when Lab opens for the first time.
LAB_SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def stop(message: str) -> None:
    sys.exit(f"bootstrap: {message}")


def run(*command: object) -> int:
    """Run a command in the checkout with the environment that every target wants; its exit status."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # two notebooks at a time, one thread each
        "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS", "1"),
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, even where the user has another python3
        "PYTHONUTF8": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    # A notebook or test started from here must not think that it is part of a run.
    environment.pop("REPRISE_RUN", None)
    environment.pop("PYTEST_VERSION", None)
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def wanted() -> str:
    """A fingerprint of everything the environment depends on."""
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    facts = [sys.version, str(ROOT), os.environ.get("TORCH_INDEX", ""), *(path.read_text("utf-8") for path in files)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def install(*what: object) -> int:
    """Put packages into .venv, in the versions that are known to work together; the installer's exit status."""
    uv = shutil.which("uv")
    command = [uv, "pip", "install", "--quiet", "--python", PYTHON] if uv else [PYTHON, "-m", "pip", "install", "-qq"]
    return run(*command, "--constraint", ROOT / "constraints.txt", *what)


def setup() -> int:
    """Make .venv with all that tests need; at once if it is there already."""
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text("utf-8") == wanted():
        return 0
    started = time.monotonic()
    uv = shutil.which("uv")
    print("Setting up .venv, once:", "with uv" if uv else "with pip", flush=True)
    if not uv and not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        stop("this Python has no venv: install it (Debian, Ubuntu: apt install python3-venv), or install uv")
    shutil.rmtree(VENV, ignore_errors=True)
    make = [uv, "venv", "--quiet", "--python", BASE, VENV] if uv else [BASE, "-m", "venv", VENV]
    if run(*make):
        stop("could not make .venv; the lines above say why")
    # Both from there, or they do not fit each other: torchvision is built against one build of torch.
    index = os.environ.get("TORCH_INDEX")
    if index and install("--index-url", index, "torch", "torchvision"):
        stop(f"torch and torchvision could not be installed from TORCH_INDEX={index}")
    if install("--editable", f"{ROOT}[dev]"):
        stop("the packages could not be installed; the lines above say which and why. Run the same command again")
    STAMP.write_text(wanted(), "utf-8")
    print(f"Set up in {time.monotonic() - started:.0f} s.", flush=True)
    return 0


def reproduce() -> int:
    """Run every paper's notebook at the quick scale and print the table of claims."""
    return run(PYTHON, "-m", "reprise.lab.cli", "run", "all")


def test() -> int:
    """Unit tests, then every notebook against its committed outputs."""
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]
    return run(PYTHON, "-m", "pytest", "-q", "-rs", "-n", "2", "--dist", "loadfile", *nbval)


def bench() -> int:
    """Time our operations against their peers in the same run."""
    return run(PYTHON, ROOT / "tests" / "bench.py")


def gpu() -> int:
    """Tests that need a GPU (skipped with the reason where there is none), then the benchmark, whose table is kept."""
    # CuPy is large and of no use without a GPU, so it comes only now.
    lacks_cupy = "import importlib.util, sys; sys.exit(importlib.util.find_spec('cupy') is None)"
    if shutil.which("nvidia-smi") and run(PYTHON, "-c", lacks_cupy) and install("--editable", f"{ROOT}[cuda]"):
        stop("CuPy could not be installed; the lines above say why. Run the same command again")
    tested = run(PYTHON, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests")
    return tested or run(PYTHON, ROOT / "tests" / "bench.py", "--write")


def lab() -> int:
    """Open JupyterLab at the start."""
    settings = VENV / "share" / "jupyter" / "lab" / "settings" / "overrides.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(LAB_SETTINGS), "utf-8")
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    first = ROOT / "notebooks" / "start_here.ipynb"
    # The module, not the command `jupyter lab`, which starts whichever Lab is first on the path.
    return run(PYTHON, "-m", "jupyterlab", f"--ServerApp.root_dir={ROOT}", *root, first)


def publish() -> int:
    """Run what changed; write results, figures, executed notebooks and tables anew, ready to be committed."""
    return reproduce() or run(PYTHON, "-m", "reprise.lab.cli", "collect", "runs")


TARGETS = {f.__name__: f for f in (setup, reproduce, test, bench, gpu, lab, publish)}


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever has an older one reads this line)
        stop(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}")
    if len(sys.argv) != 2 or sys.argv[1] not in TARGETS:
        stop(f"choose one of {', '.join(TARGETS)}")
    target = sys.argv[1]
    return setup() or (0 if target == "setup" else TARGETS[target]())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
