"""The page in a real browser: every picture shows, nothing is wider than a phone, and it is not blank."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.report import ReportInputs, build_report, collect_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const d = document.body.dataset, images = [...document.images];
  d.images = images.length;
  d.broken = images.filter(i => !i.complete || i.naturalWidth == 0).length;
  d.outside = "";
  d.smallest = Math.min(...[...document.body.querySelectorAll("*")].filter(
    e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && !e.closest("svg")).map(
    e => parseFloat(getComputedStyle(e).fontSize)));
  document.documentElement.style.width = "320px";
  d.drawn = Math.min(...[...document.querySelectorAll("svg text")].map(
    e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a));
  const box = document.querySelector(".zoom input");
  box.click();
  const large = box.parentElement.querySelector(".scroll > *").getBoundingClientRect().width;
  box.click();
  d.zoom = (large / box.parentElement.querySelector(".scroll > *").getBoundingClientRect().width).toFixed(2);
  d.frames = [320, 390, 1280].map(width => {
    document.documentElement.style.width = width + "px";
    const inside = e => e.closest(".scroll, pre");
    const out = [...document.body.querySelectorAll("*")].filter(
      e => !inside(e) && e.getBoundingClientRect().right > width + 0.5);
    d.outside += out.map(e => width + " " + e.tagName + " " + e.textContent.slice(0, 30)).join("; ");
    return out.length;
  }).join();
})</script>"""
"""Counts, for the test alone: images, those that do not show, and what sticks out of pages of three widths."""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    return found


@pytest.fixture(scope="module")
def page(tiny_run: Path, measured_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [collect_run(measured_run, device="cpu"), collect_run(tiny_run, device="cpu")]
    long = replace(runs[1], name="a_rather_long_name_of_a_run_without_any_spaces_in_it_" * 3)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(build_report(ReportInputs(runs=[runs[0], long], made_on="2026-01-02")), encoding="utf-8")
    return path


def run(browser: str, profile: Path, *arguments: str) -> str:
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "hide-scrollbars", *quiet)
    command = [browser, *(f"--{flag}" for flag in flags), f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_every_picture_shows_and_nothing_sticks_out(browser: str, page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    forbids, allows = html.escape("default-src 'none'; "), html.escape("script-src 'unsafe-inline'; ")
    assert forbids in text
    # The page allows no script, so the copy that carries the probe has to.
    probed = text.replace(forbids, forbids + allows)
    copy = tmp_path / "probed.html"
    copy.write_text(probed.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    arguments = ("--virtual-time-budget=5000", "--dump-dom", copy.as_uri())
    dom = run(browser, tmp_path / "profile", *arguments)
    body = re.search(r"<body[^>]*>", dom)
    assert body is not None
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', body[0]))
    assert int(found["images"]) == text.count("<img ") > 50
    assert found["broken"] == "0"
    assert found["frames"] == "0,0,0", found["outside"]
    assert float(found["smallest"]) >= 11 and float(found["drawn"]) >= 11, found
    assert float(found["zoom"]) > 1.2
    headings = re.findall(r"<h[123][^>]*>(.*?)</h[123]>", dom)
    for title in ("Comparison", "Samples", "From noise to image", "Snapshots during training", "Measures"):
        assert title in headings


def test_the_page_is_drawn_at_two_widths(browser: str, page: Path, tmp_path: Path) -> None:
    for width in (500, 1280):
        picture = tmp_path / f"{width}.png"
        shot = (f"--window-size={width},3000", f"--screenshot={picture}", page.as_uri())
        run(browser, tmp_path / f"profile{width}", *shot)
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        assert pixels.shape[1] == width
        for half in np.array_split(pixels, 2):
            assert half.std() > 10
            assert len(np.unique(half.reshape(-1, 3), axis=0)) > 50
