"""krea2-bench report: what it shows is what was measured, in light and in the dark, alone."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

from krea2_bench.cli import main
from krea2_bench.load.mix import Kind
from krea2_bench.load.outcome import DONE, REJECTED, Outcome
from krea2_bench.load.plan import Planned
from krea2_bench.load.points import Point
from krea2_bench.load.prompts import bundled_prompts
from krea2_bench.load.results import Results
from krea2_bench.load.summary import Slo, summarise
from krea2_bench.plotting import SERIES, WORK
from krea2_bench.report.data import ReportError, Turns, read_study
from krea2_bench.report.floor import Ceilings, shares
from tests.browser import chromium

BEGAN = 1000.0
RUN = {
    "command": "krea2-bench load --mix '<b>256x256</b>'",
    "date": "2026-01-01T00:00:00+00:00",
    "cpu": "a CPU",
    "cpu_count": 2,
    "gpus": [],
    "versions": {"krea2-srt": "0.1.0"},
    "seed": 0,
    "mix": {"256x256 8 steps": 1},
    "slo_scale": 3.0,
}
KINDS = (Kind(256, 256, 8), Kind(512, 512, 8))


def outcomes(slower: float = 1.0) -> list[Outcome]:
    found = []
    for index in range(20):
        kind = KINDS[index % 2]
        planned = Planned(index, kind, bundled_prompts()[0], index)
        outcome = Outcome.begun(planned, 0.1 * index, 0.1 * index)
        outcome.done_s = outcome.due_s + slower * (0.3 + 0.2 * (index % 2) + 0.01 * index)
        outcome.outcome = REJECTED if index == 7 else DONE
        outcome.stage_ms = {"queue": 50.0, "encode": 10.0, "denoise": 150.0, "decode": 40.0}
        found.append(outcome)
    return found


def write_load(folder: Path, name: str = "load") -> Path:
    """A load test of two points."""
    slo = Slo({kind.work: 0.6 for kind in KINDS})
    with Results(folder / name, RUN, {kind.work: 0.2 for kind in KINDS}, slo) as results:
        for rate, slower in ((5.0, 1.0), (10.0, 1.5)):
            results.begin(Point("poisson", rate))
            results._began_at = BEGAN
            for outcome in outcomes(slower):
                results.add(outcome)
            results.end()
        results.summary["complete"] = True
    write_turns(folder / f"{name}.turns.jsonl")
    return folder / name


def write_turns(path: Path) -> None:
    header = {
        "version": 1,
        "flops_per_token": 1e9,
        "flops_per_squared_token": 0.0,
        "weight_bytes": 1e9,
    }
    entries = [
        {
            "at": BEGAN + 0.1 * i,
            "work": "step",
            "blocks": [0, 28, 28],
            "steps": 1,
            "sequences": [["a", 0, i, [300]], ["b", 0, i, [1100]]][: 1 + i % 2],
            "ms": 50.0,
        }
        for i in range(20)
    ]
    entries.append(
        {"at": BEGAN + 2, "work": "decode", "sequences": [["a", 0, 8, [300]]], "ms": 9.0}
    )
    path.write_text("\n".join(map(json.dumps, [header, *entries])) + "\n")


def write_comparison(folder: Path, name: str = "versus") -> Path:
    """A comparison of two servers, as `krea2-bench compare` leaves it."""
    from krea2_bench.compare.figures import compare_points, latency_of_a_request

    slo = Slo({kind.work: 0.6 for kind in KINDS})
    sides = {"ours": [outcomes()] * 3, "<theirs>": [outcomes(2.0)] * 3}
    ours, theirs = sides.values()
    figures = [figure.as_dict() for figure in compare_points(ours, theirs, slo)]
    point = Point("closed", concurrency=4).as_dict()
    point["sides"] = {name: summarise(rounds[0], slo) for name, rounds in sides.items()}
    point["figures"] = {"ours": figures}
    summary = {
        "run": RUN,
        "complete": False,
        "ceilings": {"tflops": 30.0, "gbytes_per_s": 100.0},
        "servers": {name: {"command": "serve", "alone_s": {}} for name in sides},
        "baseline": "<theirs>",
        "rounds": 3,
        "slo_s": slo.by_work,
        "overall": {"ours": latency_of_a_request([(ours, theirs)]).as_dict()},
        "pictures": {"ours": {"compared": 3, "equal": 2, "different": 1, "min_psnr": 40.0,
                              "psnr_min": 12.0, "psnr_median": 12.0}},
        "points": [point],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(summary))
    lines = [
        outcome.line(0, side=side, round=number, began_at=BEGAN)
        for side, rounds in sides.items()
        for number, found in enumerate(rounds)
        for outcome in found
    ]
    (folder / f"{name}.jsonl").write_bytes(b"".join(lines))
    write_turns(folder / f"{name}.ours.turns.jsonl")
    return folder / name


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of both, whole."""
    folder = tmp_path_factory.mktemp("report")
    prefixes = [str(write_load(folder)), str(write_comparison(folder))]
    with pytest.raises(SystemExit) as ended:
        main(["report", *prefixes, "--title", "A & B", "--output", str(folder / "out")])
    assert not ended.value.code
    return folder / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(params=["light", pytest.param("dark", marks=pytest.mark.slow)])
def page(request, browser: Browser, report: Path) -> Iterator[Page]:
    """The report, opened from the disk without a network; it may not complain."""
    complaints: list[str] = []
    page = browser.new_page(color_scheme=request.param, viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
    page.goto((report / "report.html").as_uri())
    yield page
    page.close()
    assert complaints == []


@pytest.mark.slow
def test_every_chart_is_there_to_be_seen(page: Page):
    charts = page.locator("figure > svg")
    titles = [svg.get_attribute("aria-label") for svg in charts.all()]
    assert titles == [
        "load: Latency against load",
        "load: Goodput against load",
        "load: Distribution of latency",
        "load: One run",
        "versus: Latency against load",
        "versus: Goodput against load",
        "versus: Distribution of latency",
        "versus: One run of ours",
        "versus: Steps of ours and what the hardware can do",
        "versus: One run of <theirs>",
    ]
    for svg in charts.all():
        box = svg.bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 150


@pytest.mark.slow
def test_text_and_lines_stand_out_from_the_page(page: Page):
    """WCAG: 4.5 for text, 3 for graphics, in both colour schemes."""
    found = page.evaluate(
        """() => {
          const style = e => getComputedStyle(e);
          const tags = 'p, th, td, h1, h2, h3, code, pre, figcaption, dt, a';
          const texts = [...document.querySelectorAll(tags)];
          return {
            paper: style(document.body).backgroundColor,
            texts: [...new Set(texts.map(e => style(e).color))],
            svg: [...new Set([...document.querySelectorAll('svg text')].map(e => style(e).fill))],
          };
        }"""
    )
    paper = luminance(rgb(found["paper"]))
    for text in (*found["texts"], *found["svg"]):
        assert contrast(luminance(rgb(text)), paper) >= 4.5, text
    for colour in (*(style["color"] for style in SERIES), *WORK.values()):
        assert contrast(luminance(hex_rgb(colour)), paper) >= 3, colour


@pytest.mark.slow
def test_a_chart_has_its_colours_on_the_screen(page: Page):
    """Not only in the file: the bars of the run and both sides' lines are drawn."""
    shot = page.locator("svg[aria-label='versus: One run of ours']").screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB")).reshape(-1, 3).astype(int)
    for work in ("queue", "step", "decode"):
        near = np.abs(pixels - np.array(hex_rgb(WORK[work]))).max(axis=1) < 8
        assert near.sum() > 50, work


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(page: Page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_figures_are_those_of_the_files(page: Page, report: Path):
    text = page.locator("body").inner_text()
    assert "A & B" in text
    assert "ours is better: a request takes 0.5 (0.5 to 0.5) times as long as on <theirs>" in text
    assert "1 ARE DIFFERENT PICTURES" in text
    assert "This run was interrupted" in text
    assert "krea2-bench load --mix '<b>256x256</b>'" in text
    row = page.locator("#load ~ .scroll tbody tr").first.inner_text().split()
    summary = json.loads((report.parent / "load.json").read_text())["points"][0]
    assert row[:6] == ["5/s", "server", "19/20", "0", "1", f"{summary['images_per_s']:.3g}"]
    assert f"{summary['latency_s']['all']['p95']:.3g}" in row
    assert row[-2:] == [f"{100 * summary['slo_attainment']:.0f}", "%"]


def test_every_chart_is_a_png_too(report: Path):
    names = sorted(file.name for file in report.glob("*.png"))
    assert len(names) == 10
    for name in names:
        with Image.open(report / name) as image:
            image.load()
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_the_page_stands_alone(report: Path):
    text = (report / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert "<script" not in text
    assert "@import" not in text
    assert str(report) not in text


@pytest.mark.slow
def test_the_same_results_give_the_same_page(report: Path, tmp_path: Path):
    prefixes = [str(report.parent / name) for name in ("load", "versus")]
    with pytest.raises(SystemExit):
        main(["report", *prefixes, "--title", "A & B", "--output", str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == (report / "report.html").read_text()


def test_series_differ_without_colour_and_for_the_colour_blind():
    """By dashes and markers; and in simulated protanopia, deuteranopia and tritanopia (Viénot)."""
    assert len({str(style["linestyle"]) for style in SERIES}) == len(SERIES)
    assert len({style["marker"] for style in SERIES}) == len(SERIES)
    colours = [np.array(hex_rgb(style["color"])) / 255 for style in SERIES]
    for matrix in (
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
        [[1, 0.14461, -0.14461], [0, 0.85924, 0.14076], [0, 0.85924, 0.14076]],
    ):
        seen = [np.array(matrix) @ colour**2.2 for colour in colours]
        for i, a in enumerate(seen):
            for b in seen[:i]:
                assert np.abs(a - b).max() > 0.08


def test_the_share_of_the_floor_by_its_formula():
    """300 tokens of 1 GFLOP at 30 TFLOP/s: 10 ms, as the weights' 1 GB at 100 GB/s; of 50 ms."""
    header = {"flops_per_token": 1e9, "flops_per_squared_token": 1e6, "weight_bytes": 1e9}
    step = {"work": "step", "blocks": [0, 28, 28], "steps": 1, "ms": 50.0}
    small = {**step, "sequences": [["a", 0, 0, [300]]]}
    large = {**step, "sequences": [["a", 0, 0, [3000]]], "ms": 1000.0}
    part = {**large, "blocks": [7, 14, 28], "ms": 250.0}
    found = shares(Turns(header, [small, large, part]), Ceilings(30.0, 100.0))
    assert found[300] == [pytest.approx((300 * 1e9 + 9e4 * 1e6) / 30e12 / 0.05)]
    assert found[3000] == [pytest.approx(0.4), pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "x.json: No such file"),
        ({"x.json": "nonsense"}, "is no summary"),
        ({"x.json": '{"points": []}'}, "is no summary"),
        ({"x.json": "LOAD", "x.jsonl": "nonsense"}, "x.jsonl, line 1: is no outcome"),
        ({"x.json": "LOAD", "x.turns.jsonl": "{"}, "x.turns.jsonl, line 1: is no unit of work"),
    ],
)
def test_results_that_are_none_are_named(tmp_path: Path, files: dict[str, str], error: str):
    write_load(tmp_path, "good")
    good = (tmp_path / "good.json").read_text()
    for name, text in files.items():
        (tmp_path / name).write_text(good if text == "LOAD" else text)
    with pytest.raises(ReportError, match=re.escape(error)):
        read_study(tmp_path / "x")


def test_two_results_of_one_name_are_refused(bench: Callable[..., int], tmp_path: Path, capsys):
    write_load(tmp_path)
    assert bench("report", "load", "./load") == 2
    assert "two results are called load" in capsys.readouterr().err


def rgb(text: str) -> tuple[int, ...]:
    return tuple(int(value) for value in re.findall(r"\d+", text)[:3])


def hex_rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text.removeprefix("#")))


def luminance(colour: tuple[int, ...]) -> float:
    """WCAG's relative luminance."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
