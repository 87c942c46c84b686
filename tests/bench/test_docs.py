"""Figures in the docs are those of the committed results."""

import pytest

from krea2_bench import docs
from krea2_bench.docs import ROOT, FigureError, filled, looked_up
from krea2_bench.published import FIGURES, TABLES

VALUES = {"a": {"b c": [{"k": "x", "v": 1}, {"k": "y z", "v": 2}]}, "n": [1, 2, 3]}


@pytest.mark.parametrize("page", docs.pages(), ids=lambda path: path.name)
def test_no_figure_is_stale(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text, page.name) == text, "run make docs"


def test_every_published_figure_is_shown_somewhere():
    text = "".join(page.read_text(encoding="utf-8") for page in docs.pages())
    assert {name for name in (*FIGURES, *TABLES) if f"<!-- ={name} -->" not in text} == set()


def test_the_files_of_the_figures_are_committed():
    for file, _, _ in FIGURES.values():
        assert (ROOT / "benchmarks" / "results" / file).is_file()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("a.b c[k=y z].v", 2),
        ("a.b c[k=y z; v=2].v", 2),
        ("n[-1]", 3),
        ("a.b c[0].k", "x"),
        ("a.b c[*].v", 1.5),
    ],
)
def test_places(place, value):
    assert looked_up(VALUES, place) == value


@pytest.mark.parametrize("place", ["x", "n[7]", "a.b c[k=q].v", "n[", "a.b c[q=1]"])
def test_places_that_are_not_there(place):
    with pytest.raises(LookupError):
        looked_up(VALUES, place)


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(docs, "results", lambda _: {"a": 0.256, "text": "x"})
    figures = {"one": ("f", "a", ".1f"), "two": ("f", "a", ".0%"), "bad": ("f", "text", ".1f")}
    figures["gone"] = ("f", "b", ".1f")
    monkeypatch.setattr(docs, "FIGURES", figures)
    monkeypatch.setattr(docs, "TABLES", {"table": lambda read: f"| {read('f')['a']} |"})


def test_figures_and_tables_are_written(published):
    page = "p <!-- =one -->old<!-- / -->, <!-- =two --><!-- / -->.\n<!-- =table -->\nx\n<!-- / -->"
    assert filled(page, "page") == (
        "p <!-- =one -->0.3<!-- / -->, <!-- =two -->26%<!-- / -->.\n"
        "<!-- =table -->\n| 0.256 |\n<!-- / -->"
    )


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("<!-- =three -->1<!-- / -->", "page: three: KeyError: 'three'"),
        ("<!-- =gone -->1<!-- / -->", "page: gone: KeyError: 'b'"),
        ("<!-- =bad -->1<!-- / -->", "page: bad: ValueError: "),
        ("<!-- =one -->1", "is not as"),
        ("<!-- = one -->1<!-- / -->", "is not as"),
    ],
)
def test_a_figure_that_cannot_be_is_named(published, page, error):
    with pytest.raises(FigureError) as caught:
        filled(page, "page")
    assert error in str(caught.value)
