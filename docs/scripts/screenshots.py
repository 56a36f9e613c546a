"""What a user sees, in headless Chromium: README and site, the report (also on a phone and in the dark), and
TensorBoard.

    make docs && make demo
    python -m docs.scripts.screenshots build/shots              # all of them, to look at

docs/pictures has report.png and tensorboard-custom.png of these.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
SITE, RUNS, REPORT = ROOT / "build/site", "demo/runs", ROOT / "demo/report/report.html"
DARK = "--blink-settings=preferredColorScheme=0"


def shoot(url: str, out: Path, width: int, height: int, *more: str) -> None:
    """One page in a window of so many pixels, as a PNG of 64 colours."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
    )
    if not browser:
        raise SystemExit("there is no Chromium; install it (Debian: chromium)")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += [f"--window-size={width},{height}", f"--screenshot={out}", "--virtual-time-budget=20000", *more, url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(out).convert("RGB").quantize(64).save(out, optimize=True)
    print(f"{out} ({out.stat().st_size // 1000} kB)", flush=True)


def shoot_phone(url: str, out: Path, height: int) -> None:
    """390 pixels wide: Chromium's own window is never below 500, so a frame of that width is shown."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        style = f"border:0;width:390px;height:{height}px"
        frame.write_text(f'<body style="margin:0"><iframe src="{url}" style="{style}"></iframe>', encoding="utf-8")
        shoot(frame.as_uri(), out, 500, height, "--allow-file-access-from-files")
    Image.open(out).crop((0, 0, 390, height)).save(out, optimize=True)


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[str]:
    """The address of a server while it runs."""
    url = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(url, timeout=5).read()
                    break
                except OSError:
                    time.sleep(0.25)  # a server does not tell when it listens
            yield url
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def site(folder: Path) -> None:
    port = free_port()
    with served([sys.executable, "-m", "http.server", str(port), "--directory", str(SITE)], port) as url:
        shoot(url, folder / "readme.png", 1280, 2400)
        shoot(url, folder / "readme-dark.png", 1280, 1400, DARK)
        shoot(f"{url}docs/choosing-h/", folder / "site.png", 1280, 1400)
        shoot(f"{url}docs/records/", folder / "site-dark.png", 1280, 1400, DARK)

        shoot_phone(url, folder / "readme-phone.png", 1400)


def report(folder: Path) -> None:
    url = REPORT.as_uri()
    shoot(url, folder / "report.png", 1100, 1500)
    shoot(url, folder / "report-dark.png", 1100, 1500, DARK)
    shoot_phone(url, folder / "report-phone.png", 1100)


def tensorboard(folder: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        RUNS,
        "--port",
        str(port),
        "--load_fast=false",
    ]
    with served(command, port) as url:
        time.sleep(8)  # it reads the runs after it listens
        shoot(f"{url}#scalars", folder / "tensorboard.png", 1400, 1100)
        shoot(f"{url}#custom_scalars", folder / "tensorboard-custom.png", 1400, 1100)


KINDS = {"site": site, "report": report, "tensorboard": tensorboard}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("kinds", nargs="*", choices=[[], *KINDS], help="(default: all)")
    args = made.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds or KINDS:
        KINDS[kind](args.folder.resolve())


if __name__ == "__main__":
    main()
