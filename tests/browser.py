"""A page in headless Chromium, without a network: what its console says, and where its parts lie."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height, r.left, r.right]; };
const all = what => [...document.querySelectorAll(what)];
const found = {
  across: document.documentElement.scrollWidth, paper: getComputedStyle(document.body).backgroundColor,
  verdict: all('.verdict').map(box), charts: all('figure svg').map(box),
  text: document.body.innerText, foreign: all('script').length - 1 };
document.documentElement.dataset.found = encodeURIComponent(JSON.stringify(found));
</script>"""


def opened(page: Path, width: int, dark: bool) -> tuple[dict[str, Any], list[str]]:
    """What a copy of the page that may measure itself found, and what the console said to the page itself."""
    binary = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium here; apt-get install chromium-headless-shell")
    text = page.read_text("utf-8")
    measured = page.with_name("measured.html")
    measured.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{_MEASURE}</body>"))
    flags = [
        binary,
        *("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *(f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"),
        *("--enable-logging=stderr", "--dump-dom"),
    ]
    console = subprocess.run(
        [*flags, page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stderr
    dom = subprocess.run(
        [*flags, measured.as_uri()], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match
    return json.loads(unquote(match[1])), [line for line in console.splitlines() if "CONSOLE" in line]
