"""axe-core on pages, in a Chromium without a window: `MANYHEADS_AXE=axe.min.js python tests/axe.py PAGE.html ...`.

axe-core (npm pack axe-core) and Chromium are not part of the project; without them there is nothing to run. A page is checked
light and dark, wide and narrow, with everything open that folds. Its content security policy, which forbids other scripts, is
left out here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

AXE = os.environ.get("MANYHEADS_AXE", "")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFF = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
RUN = """
const size = { height: document.documentElement.scrollHeight, elements: document.querySelectorAll("*").length };
document.querySelectorAll("details").forEach((d) => { d.open = true; });
setTimeout(async () => {
  const { violations } = await axe.run(document, { resultTypes: ["violations"] });
  const found = violations.map((v) => ({ ...v, nodes: v.nodes.map((n) => n.html.slice(0, 200)) }));
  const out = document.body.appendChild(document.createElement("pre"));
  out.id = "axe-found";
  out.textContent = btoa(unescape(encodeURIComponent(JSON.stringify({ found, ...size }))));
}, 500);
"""


def examine(page: str, *, dark: bool = False, width: int = 1200) -> dict[str, Any]:
    """What axe-core finds wrong with a page (`found`), and its `height` in pixels and number of `elements` as it opens."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    if dark:
        text = text.replace("(prefers-color-scheme: dark)", "(min-width: 0)")
    script = f"<script>{Path(AXE).read_text('utf-8')}</script><script>{RUN}</script>"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(text.replace("</body>", script + "</body>"), "utf-8", "surrogateescape")
        options = ["--headless", "--no-sandbox", *OFF.split(), f"--user-data-dir={folder}/chromium"]
        options += [f"--window-size={width},1400", "--virtual-time-budget=60000", "--dump-dom"]
        shown = subprocess.run([str(CHROMIUM), *options, file.as_uri()], capture_output=True, timeout=180, check=True)
    found = re.search(r'<pre id="axe-found">([^<]*)</pre>', shown.stdout.decode("utf-8", "replace"))
    assert found, "axe-core did not finish"
    return json.loads(base64.b64decode(found[1]))


def main() -> None:
    total = 0
    for name in sys.argv[1:]:
        for dark in (False, True):
            for width in (1200, 400):
                seen = examine(Path(name).read_text("utf-8"), dark=dark, width=width)
                total += sum(len(v["nodes"]) for v in seen["found"])
                what = (
                    "; ".join(f"{v['id']} ({v['impact']}): {' '.join(v['nodes'])}" for v in seen["found"]) or "nothing"
                )
                size = f"{seen['height']} px high, {seen['elements']} elements"
                print(f"{name} {'dark' if dark else 'light'} {width} wide, {size}: {what}")
    print(f"{total} elements with violations")


if __name__ == "__main__":
    main()
