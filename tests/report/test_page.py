"""The page: whole without the network, escaped, accessible, deterministic, and honest about what is not there."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from imagewright.pretrained import load
from imagewright.report import ReportInputs, RunSection, build_report, collect_run, write_report
from imagewright.report.collect import MOST_STEPS, _compare, evenly
from imagewright.types import UserError

STEPS = 14  # of the tiny run's sampler
VOID = {"br", "col", "hr", "img", "input", "meta", "path", "use", "rect"}


class Page(HTMLParser):
    """Elements of a page by name, its text, and what does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str]]] = {}
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append({k: v or "" for k, v in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append({k: v or "" for k, v in attrs})

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def section(tiny_run: Path) -> RunSection:
    return collect_run(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def measured(measured_run: Path) -> RunSection:
    return collect_run(measured_run, device="cpu")


def html_of(*runs: RunSection) -> str:
    return build_report(ReportInputs(runs=runs, made_on="2026-01-02"))


def test_collected_pieces_have_their_shapes(section: RunSection) -> None:
    assert [row.name for row in section.classes] == list("0123456789")
    assert all(row.images.shape == (10, 8, 8, 1) for row in section.classes)
    assert section.trajectory is not None
    assert section.trajectory.x.shape == section.trajectory.estimate.shape == (STEPS, 4, 8, 8, 1)
    assert section.trajectory.sigmas[-1] == 0
    assert list(np.diff(section.trajectory.sigmas) < 0) == [True] * (STEPS - 1)
    assert section.first_images is not None
    np.testing.assert_array_equal(section.trajectory.x[-1], section.first_images[:4])
    assert [s.images_seen for s in section.snapshots] == [16, 32]
    assert [line["images"] for line in section.log] == [8, 16, 24, 32]
    assert [n.space for n in section.neighbours] == ["feature space", "pixel space"]
    other = _compare(section.first_images, load(section.folder).spec, section.experiment, section.folder, "emoji", {})
    assert [n.space for n in other["neighbours"]] == ["features of emoji", "pixel space"]
    assert not np.array_equal(other["neighbours"][0].distances, section.neighbours[0].distances)


def test_neighbours_are_the_nearest_training_images(section: RunSection) -> None:
    from imagewright.data import open_images

    real = open_images("digits").images().reshape(-1, 64) / 127.5 - 1
    assert section.first_images is not None
    query = section.first_images[0].reshape(64) / 127.5 - 1
    distances = np.sqrt(((real - query) ** 2).sum(1))
    near = section.neighbours[1]
    np.testing.assert_allclose(near.distances[0], np.sort(distances)[:4], rtol=1e-6)
    np.testing.assert_allclose(distances[near.indices[0]], near.distances[0], rtol=1e-6)
    assert near.held_out is not None
    assert 0 < near.held_out < near.typical  # four steps of training make no digits


def test_same_images_for_the_same_seed_only(tiny_run: Path, section: RunSection) -> None:
    other = collect_run(tiny_run, seed=1, device="cpu")
    assert section.first_images is not None
    assert other.first_images is not None
    assert (other.first_images != section.first_images).any()
    assert html_of(collect_run(tiny_run, device="cpu")) == html_of(section)


def test_progress_reaches_its_total(tiny_run: Path) -> None:
    seen: list[tuple[int, int]] = []
    collect_run(tiny_run, device="cpu", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (110, 110)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_headings_and_figures_of_a_measured_run(measured: RunSection) -> None:
    text = html_of(measured)
    page = Page(text)
    assert page.open == []
    headings = re.findall(r"<h[123][^>]*>(.*?)</h[123]>", text)
    for title in (
        "Samples",
        "From noise to image",
        "Snapshots during training",
        "Measures",
        "How to repeat it",
    ):
        assert title in headings
    labels = [svg["aria-label"] for svg in page.elements["svg"]]
    assert any(label.startswith("Loss of the denoiser") for label in labels)
    assert any(label.startswith("fd_digits against network evaluations") for label in labels)
    for words in ("σ ≥ 2", "floor (real images)", "Gaussian fit", "heun, 18 steps", "0.500 ± 0.010"):
        assert words in page.text
    assert "imagewright train 'a b/tiny.py'" in page.text and "elsewhere" not in page.text


def test_nothing_is_fetched(measured: RunSection, section: RunSection) -> None:
    text = html_of(measured, section)
    page = Page(text)
    targets = [v for tags in page.elements.values() for t in tags for k, v in t.items() if k in ("src", "href")]
    assert targets
    assert all(t.startswith(("data:image/png;base64,", "#")) for t in targets)
    assert "script" not in page.elements
    assert "link" not in page.elements
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    policy = [m["content"] for m in page.elements["meta"] if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_accessible(measured: RunSection, section: RunSection) -> None:
    text = html_of(measured, section)
    page = Page(text)
    assert all(image["alt"].strip() for image in page.elements["img"])
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.elements["svg"])
    assert page.elements["html"][0]["lang"] == "en"
    assert len(page.elements["h1"]) == 1
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        assert "<caption>" in table
        assert 'scope="col"' in table
        assert 'scope="row"' in table
    ids = [t["id"] for tags in page.elements.values() for t in tags if "id" in t]
    assert len(ids) == len(set(ids))
    links = [a["href"].removeprefix("#") for a in page.elements["a"]]
    assert links == ["comparison", "run1", "run2"]
    assert set(links) <= set(ids)
    referred = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", text))
    assert referred <= set(ids)


def test_names_are_escaped(section: RunSection, measured: RunSection) -> None:
    evil = '<img src=x onerror="alert(1)">&$x$'
    classes = tuple(replace(row, name=evil) for row in section.classes)
    run = replace(section, name=evil, classes=classes, first_labels=(evil,) * 10, measures=measured.measures)
    text = html_of(run, replace(measured, name="_$\\frac$"))
    page = Page(text)
    assert all(image["src"].startswith("data:") for image in page.elements["img"])
    assert "onerror" not in {k for tags in page.elements.values() for t in tags for k in t}
    assert page.text.count(evil) > 10
    assert "_$\\frac$: heun" in page.text  # a legend takes no name as a formula, and hides none


def test_missing_pieces_are_named_with_their_command(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("experiment.json", "log.jsonl"):
        shutil.copy(tiny_run / name, tmp_path / name)
    run = collect_run(tmp_path, device="cpu")
    text = Page(html_of(run)).text
    assert run.classes == ()
    assert f"imagewright train --resume {tmp_path}" in text
    assert f"imagewright evaluate {tmp_path}" in text
    assert "No snapshots" in text


def test_a_model_without_its_run(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors"):
        shutil.copy(tiny_run / name, tmp_path / name)
    run = collect_run(tmp_path, device="cpu")
    page = Page(html_of(run))
    assert run.method == "EDM"
    assert run.neighbours == ()
    for words in ("the model was trained elsewhere", "No training log", "training images are not known"):
        assert words in page.text


def test_lost_training_images_do_not_cost_the_page(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    record = (folder / "experiment.json").read_text()
    (folder / "experiment.json").write_text(record.replace('"source": "digits"', '"source": "gone.zip"'))
    run = collect_run(folder, device="cpu")
    assert run.neighbours == ()
    assert "gone.zip" in Page(html_of(run)).text


def test_comparison_of_runs(measured: RunSection, section: RunSection) -> None:
    measured = replace(measured, sampler_nfe=35)
    other = replace(measured, name="other", measures=tuple(replace(m, nfe=1) for m in measured.measures[:1]))
    assert "A dash: not measured at that number of calls" in html_of(measured, other)
    other = replace(other, sampler_nfe=1)
    text = html_of(measured, other, section)
    top = text[text.index('id="comparison"') : text.index('id="run1"')]
    rows = re.findall(r"<tr>(.*?)</tr>", top)
    cells = [re.sub(r"<[^>]+>", "|", row) for row in rows]
    assert any("second||EDM||" in c and "|35|" in c and "|5.56|" in c and "|0.750|" in c for c in cells)
    assert "<strong>5.56</strong>" in top
    assert top.count("from the common noise") == 3
    assert "second: heun" in top
    assert "other: heun" in top
    assert "do not compare" not in top
    apart = tuple(replace(m, report={**m.report, "num_images": 7}) for m in other.measures)
    assert "different numbers of images" in html_of(measured, replace(other, measures=apart))


def test_runs_of_equal_names_are_told_apart(section: RunSection) -> None:
    text = Page(html_of(section, replace(section, folder=Path("elsewhere")))).text
    assert "elsewhere" in text
    assert str(section.folder) in text


def test_write_report(measured: RunSection, section: RunSection, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, [measured, section], title="both")
    text = path.read_text(encoding="utf-8")
    assert "<h1>both</h1>" in text
    assert len(text) < 1_500_000
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "has format None"),
        ('{"format": "imagewright-metrics/1", "reports": [{"nfe": 1}]}', "damaged: reports.0 lacks"),
        ("{", "not readable"),
    ],
)
def test_damaged_measures_are_refused(tiny_run: Path, tmp_path: Path, content: str, words: str) -> None:
    shutil.copy(tiny_run / "experiment.json", tmp_path)
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=rf"metrics\.json.*{words}"):
        collect_run(tmp_path, device="cpu")


def test_no_run_and_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither experiment\.json nor a model"):
        collect_run(tmp_path)
    with pytest.raises(UserError, match="at least one run"):
        build_report(ReportInputs(runs=()))


def test_evenly_keeps_both_ends() -> None:
    assert evenly(5, 12) == [0, 1, 2, 3, 4]
    assert evenly(0, 6) == []
    chosen = evenly(100, MOST_STEPS)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 99, MOST_STEPS)
