"""Open a page in a headless browser, as its reader would; the test skips where there is none."""

import shutil
import subprocess

import pytest
from matplotlib.image import imread

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def screenshot(page, folder, width=1100, height=3000):
    """The picture [height, width, 3] in 0 to 1 that a browser draws of a page; nothing may have been refused."""
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    if browser is None:
        pytest.skip(f"no headless browser: none of {', '.join(_NAMES)} is installed")
    path = folder / "screenshot.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options = [
        f"--window-size={width},{height}",
        f"--screenshot={path}",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--enable-logging=stderr", *options, page.resolve().as_uri()],
        capture_output=True,
        text=True,
        check=True,
    )
    # What a page's policy forbids, and what cannot be loaded, is told on the console.
    assert "CONSOLE" not in done.stderr, done.stderr
    return imread(path)[..., :3]


def has_colour(picture, colour):
    """Whether some pixels have a colour of 0 to 255, to a rounding of one."""
    return bool((abs(picture * 255 - colour).max(-1) <= 1).any())
