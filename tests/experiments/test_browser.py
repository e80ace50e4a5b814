"""The HTML reports in a real browser without a window: `make test-slow AREA=browser`. Skipped without one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.__main__ import main as experiments
from tests.experiments.test_sweep import invent, sweep  # noqa: F401  (a fixture)
from train.report import write

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]
# What a page says of itself once it has loaded; put behind a copy of it, as the pages have no script.
PROBE = """
<script>
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length]),
    rows: [...document.querySelectorAll("table")].map(t => t.tBodies[0] ? t.tBodies[0].rows.length : 0),
    wide: document.documentElement.scrollWidth - innerWidth,
    loaded: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    title: document.title,
  };
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  document.body.append(pre);
});
</script>
"""


def look(page: Path, folder: Path) -> dict:
    """What the browser found on a page. Asserts that its console stayed empty."""
    copy = folder / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert BROWSER is not None
    line = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-extensions", "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--window-size=1100,900",
        "--virtual-time-budget=10000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    made = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    assert not [row for row in made.stderr.splitlines() if "CONSOLE" in row], made.stderr[-2000:]
    found = re.search(r'<pre id="found">(.*?)</pre>', made.stdout, re.DOTALL)
    assert found, made.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


def check(found: dict, images: int, tables: int) -> None:
    """Every picture decodes and says what it is, every table has rows, nothing comes from elsewhere, and the
    page is no wider than its window."""
    assert len(found["images"]) == images and len(found["rows"]) >= tables
    assert all(complete and width > 100 and alt for complete, width, alt in found["images"]), found["images"]
    assert min(found["rows"]) > 0
    assert found["loaded"] == [] and found["wide"] <= 0 and found["title"]


def test_browser_sweep_report(sweep, tmp_path):  # noqa: F811
    invent(sweep)
    out = tmp_path / "page"
    assert experiments(["report", str(sweep), "--out", str(out)]) == 0
    check(look(out / "results.html", tmp_path), images=2, tables=3)


def records(run: Path, name: str, source: str | None, origin: int) -> Path:
    """What a run with two heads and a quantizer would have logged, one sample of awkward text included."""
    about = {"kind": "event", "event": "start", "step": 0, "name": name, "source": source, "origin": origin}
    lines = [about]
    for step in range(0, 101, 10):
        base = {"step": step, "tokens": 1000 * step, "origin": origin}
        losses = {"next": 8 - 0.04 * step, "recon": 6 - 0.05 * step}
        lines.append({"kind": "train", **base, "losses": losses, "tokens_per_s": 3000.0 + step})
        bits = {k: v / 2 for k, v in losses.items()}
        stats = {"quant/usage": min(1.0, 0.2 + step / 100), "quant/entropy_bits": 12.0 + step / 50}
        lines.append({"kind": "eval", **base, "losses": losses, "bpb": bits, "stats": stats})
    text = "<b>not bold</b> ``` & <script>throw 1</script>"
    lines.append({"kind": "sample", "step": 100, "prompt": "def f(", "text": text})
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_browser_training_report(tmp_path):
    first = records(tmp_path / "one", "small", None, 0)
    second = records(tmp_path / "two", "grown", "runs/one/checkpoints/step_00000100", 100_000)
    page = write([first, second], tmp_path / "page")
    found = look(page, tmp_path)
    check(found, images=4, tables=1)
    assert found["rows"] == [2] and found["title"] == "small -> grown"
