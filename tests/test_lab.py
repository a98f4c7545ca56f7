"""JupyterLab as a reader meets it: real notebooks run in a real browser, and a training is interrupted."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
import yaml
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDS = "needs chromium and chromedriver (Debian: apt install chromium chromium-driver)"
pytestmark = [pytest.mark.lab, pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NEEDS)]

REPOSITORY = Path(__file__).resolve().parents[1]
REAL = [name for name in ("start_here", "batch_norm") if (REPOSITORY / "notebooks" / f"{name}.ipynb").is_file()]
NOTEBOOKS = [f"repository/notebooks/{name}.ipynb" for name in REAL] or ["tiny/notebooks/tiny.ipynb"]

LAB_SETTINGS = {  # no questions when Lab opens; and cells stay in the page when they are out of sight
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
CHROMIUM_OPTIONS = """--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --window-size=1200,2400"""

FRAME = ".widget-hprogress .progress"  # ipywidgets draws the bar of tqdm.notebook as a frame,
BAR = f"{FRAME} .progress-bar"  # and in it the part that grows


class Lab(NamedTuple):
    url: str
    root: Path  # the folder it shows


@pytest.fixture(scope="module")
def lab(tmp_path_factory, copy_tiny, environment) -> Iterator[Lab]:
    """JupyterLab as ``make lab`` starts it, for a reader who never used it, on copies of the notebooks."""
    home, root = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("lab")
    copy_tiny(root / "tiny")
    for folder in ("notebooks", "papers"):
        shutil.copytree(REPOSITORY / folder, root / "repository" / folder)
    for path in root.glob("*/notebooks/*.ipynb"):
        clear_outputs(path)
    settings = home / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(LAB_SETTINGS), encoding="utf-8")
    folders = {"HOME": home, "JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data"}
    folders |= {"JUPYTERLAB_WORKSPACES_DIR": home / "workspaces", "PYTHONPATH": REPOSITORY / "lib"}
    env = environment | {name: str(folder) for name, folder in folders.items()} | {"JUPYTER_PREFER_ENV_PATH": "1"}
    with socket.create_server(("127.0.0.1", 0)) as probe:  # the system chooses a port that nobody uses
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={root}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", "--LabApp.extension_manager=readonly"]
    log = home / "lab.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        WebDriverWait(None, 60).until(lambda _: "is running at" in log.read_text() or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield Lab(f"http://127.0.0.1:{port}/lab", root)
    finally:
        server.terminate()  # Lab ends its kernels before itself; kernels whose Lab was killed end by themselves.
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def clear_outputs(path: Path) -> None:
    """So that nothing a test finds was there before."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


class Page:
    """A notebook that is open in Lab. What is done and seen here, a reader does and sees."""

    def __init__(self, browser: webdriver.Chrome):
        self.browser = browser

    def find(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, seconds: float, for_what: str, condition: Callable[[], Any]) -> Any:
        # Lab may replace an element while we look at it: then look again.
        waiting = WebDriverWait(self.browser, seconds, 0.3, [StaleElementReferenceException])
        return waiting.until(lambda _: condition(), f"waited {seconds} seconds for {for_what}")

    def click(self, selector: str) -> None:
        self.wait(20, selector, lambda: self.find(selector))[0].click()

    def click_tool(self, command: str) -> None:
        """Click the button of the notebook's toolbar that stands for one of Lab's commands."""
        self.click(f'.jp-NotebookPanel-toolbar [data-command="{command}"]')

    def is_idle(self) -> bool:
        """Whether the kernel does nothing and no cell waits for it, which ``[*]`` beside the cell would show."""
        waiting = any("*" in prompt.text for prompt in self.find(".jp-InputPrompt"))
        # The status bar, since the circle beside the kernel's name says "idle" before there is a kernel.
        return not waiting and any("| Idle" in bar.text for bar in self.find("#jp-main-statusbar"))

    def restart_and_run_all(self) -> None:
        self.click_tool("notebook:restart-run-all")
        self.click(".jp-Dialog .jp-mod-accept")
        self.wait(60, "the first cell to run", lambda: not self.code_cell(0).text.startswith("[ ]:"))

    def code_cell(self, number: int) -> WebElement:
        return self.find(".jp-CodeCell")[number]

    def run_cell(self, number: int) -> None:
        self.code_cell(number).find_element(By.CSS_SELECTOR, ".jp-InputPrompt").click()
        self.click_tool("notebook:run-cell-and-select-next")

    def bar_width(self, number: int) -> float:
        """Width in pixels of a code cell's progress bar; 0 without one."""
        return sum(bar.size["width"] for bar in self.code_cell(number).find_elements(By.CSS_SELECTOR, BAR))

    def see_bar_move_and_interrupt(self, number: int) -> None:
        self.wait(60, "a progress bar", lambda: self.bar_width(number) > 0)
        width = self.bar_width(number)
        self.wait(20, "the progress bar to move", lambda: self.bar_width(number) > width)
        self.click_tool("notebook:interrupt-kernel")
        self.wait(20, "the interrupt", lambda: "KeyboardInterrupt" in self.code_cell(number).text and self.is_idle())


@contextlib.contextmanager
def opened(lab: Lab, notebook: str, folder: Path) -> Iterator[Page]:
    """A notebook in a browser of its own, which leaves a picture in the folder if something fails."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*CHROMIUM_OPTIONS.split(), f"--user-data-dir={folder / 'chromium'}"):
        options.add_argument(option)
    page = Page(webdriver.Chrome(options, Service(CHROMEDRIVER)))
    try:
        page.browser.get(f"{lab.url}/tree/{notebook}?reset")  # "reset" closes what an earlier test had opened
        page.wait(90, "the notebook with its kernel", lambda: page.find(".jp-CodeCell") and page.is_idle())
        yield page
    except BaseException:
        page.browser.save_screenshot(folder / "failure.png")
        print("what the browser showed:", folder / "failure.png")
        raise
    finally:
        page.browser.quit()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs_from_top_to_bottom(lab, notebook, tmp_path):
    with opened(lab, notebook, tmp_path) as page:
        page.restart_and_run_all()
        page.wait(400, "the last cell", page.is_idle)
        page.click_tool("docmanager:save")
        page.wait(20, "the notebook to be saved", lambda: not page.find("#jp-main-dock-panel .jp-mod-dirty"))

        path = lab.root / notebook
        cells = code_cells(nbformat.read(path, as_version=4))
        outputs = [output for cell in cells for output in cell.outputs]
        assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))

        widgets = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
        page.wait(20, "a bar for every widget", lambda: len(page.find(FRAME)) == len(widgets))
        rows = {row.text: row.find_element(By.CSS_SELECTOR, FRAME) for row in page.find(".widget-hbox")}
        # tqdm makes the bar of no steps at all 20 pixels wide; long words beside a bar squeeze it just as much.
        assert [text for text, frame in rows.items() if frame.size["width"] <= 20] == []
        assert page.find(f"{BAR}.progress-bar-success") or not any("train(" in cell.source for cell in cells)
        assert page.find('[data-mime-type="application/vnd.jupyter.stderr"]') == []
        seen = "\n".join(output.text for output in page.find(".jp-OutputArea-output"))
        for bad in ("Warning", "HBox(children=", "Error displaying widget", "Loading widget"):
            assert bad not in seen

        claims = path.parents[1] / "papers" / path.stem / "claims.yaml"
        if claims.is_file():
            for claim in yaml.safe_load(claims.read_text(encoding="utf-8"))["claims"]:
                assert claim["id"] in page.code_cell(-1).text


def test_training_can_be_interrupted_and_started_again(lab, tmp_path):
    path = lab.root / "tiny" / "notebooks" / "tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    cells[0].source = cells[0].source.replace("steps: int | None = None", "steps: int | None = 200_000")
    training = next(i for i, cell in enumerate(cells) if "with a rate" in cell.source)
    short_training = training + 1
    cell = nbformat.v4.new_code_cell('steps = 50\nprint(learn("a short one", 0.5)[1].step)')
    notebook.cells.insert(1 + short_training, cell)  # one more for the title, which is no code cell
    nbformat.write(notebook, path.with_name("long.ipynb"))

    with opened(lab, "tiny/notebooks/long.ipynb", tmp_path) as page:
        page.restart_and_run_all()
        page.see_bar_move_and_interrupt(training)
        assert page.code_cell(short_training).text.startswith("[ ]:")  # what comes after an interrupt is not run
        page.run_cell(training)
        page.wait(20, "the training to begin again", lambda: not page.is_idle())
        page.see_bar_move_and_interrupt(training)
        page.run_cell(short_training)
        page.wait(20, "the short training", lambda: page.find(f"{BAR}.progress-bar-success") and page.is_idle())
        assert page.code_cell(short_training).text.endswith("\n49")
