"""Take the pictures of README's "Watch it decode" again, in a headless Chromium. Look at them before you commit them.

dllm-toolkit compare recipes/quickstart.yaml task.style=worded task.size=8 run.max_new_tokens=96 output=runs/screenshots
python docs/screenshots.py runs/screenshots            docs/watch.gif, trace.png, report.png, tensorboard.png
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from dllm_toolkit import cli

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "browser"))
from chromium import Browser, browser  # noqa: E402 - the tests' browser is no package

RECIPE = ["recipes/quickstart.yaml", "task.style=worded", "task.size=8", "run.max_new_tokens=64", "--problem", "3", "--speed", "0"]
LARGEST = 140_000  # bytes; beyond it a picture is kept in 256 colours
SHOWN = ("semi_ar", "fast_dllm", "autoregressive", "d2f")


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder) / "profile") as tab:
        page, data = Path(folder) / "trace.html", Path(folder) / "trace.json"
        chosen = [word for name in SHOWN for word in ("--decoder", name)]
        two = ["--decoder", "fast_dllm", "--decoder", "d2f"]
        for arguments in ([*RECIPE, *chosen, "--json", data, "--gif", HERE / "watch.gif"], [data, *two, "--html", page]):
            if cli.main(["watch", *map(str, arguments)]):
                sys.exit("the decode could not be watched")
        tab.open(f"{page.resolve().as_uri()}#step=9", width=1200, height=810)
        shoot(tab, HERE / "trace.png")
        tab.open((run / "report.html").resolve().as_uri(), width=1200, height=900)
        tab.evaluate("[...document.querySelectorAll('h2')].find(one => one.textContent.includes('order')).scrollIntoView()")
        shoot(tab, HERE / "report.png")
        with tensorboard(run / "tensorboard") as address:
            tab.open(f"{address}/?tagFilter=%5Eorder", width=1400, height=1130)
            tab.wait(lambda: tab.evaluate("document.querySelectorAll('card-view img').length >= 4"))
            last = time.monotonic() + 5  # it draws when it likes
            while time.monotonic() < last:
                tab.listen(0.2)
            shoot(tab, HERE / "tensorboard.png")


def shoot(tab: Browser, path: Path) -> None:
    """A picture of the window; a repository keeps every version, so it is made small."""
    tab.picture(path)
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
        if path.stat().st_size > LARGEST:
            image.convert("RGB").quantize(colors=256, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB", file=sys.stderr)


class tensorboard:  # noqa: N801 - a `with` block
    """A TensorBoard on a free port for as long as the block runs; its address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> str:
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return f"http://127.0.0.1:{self.port}"
            except OSError:
                time.sleep(0.3)
        sys.exit("TensorBoard did not start")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "report.html").is_file():
        sys.exit("usage: python docs/screenshots.py RUN, where RUN is the output directory of a comparison")
    main(Path(sys.argv[1]))
