"""The drift page: whole, self-contained, and safe with any name or value."""

import datetime as dt
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from mlnb.data.profiles import Profile
from mlnb.monitoring.alarms import Alarm, WindowAssessment
from mlnb.monitoring.drift import compare, headline
from mlnb.monitoring.drift_page import bar_pair, heat_map, histogram, histogram_edges, histogram_pair, page, write_page

NASTY = '<img src=x onerror="alert(1)">&\'"'
VOID = {"meta", "img", "br", "rect", "path", "line"}


class Reader(HTMLParser):
    "Collects tags and their attributes, and checks that what opens also closes"

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def season(mean: float, seed: int, rows: int = 4000, value: str = "c") -> Profile:
    rng = np.random.default_rng(seed)
    temperature = rng.normal(mean, 10, rows)
    temperature[:40] = np.nan
    return Profile.of(
        {
            "temperature": temperature,
            NASTY: rng.choice(["a", "b", value], rows),
            "load": rng.poisson(4, rows),
            "constant": np.full(rows, 7.0),
            "nothing": np.full(rows, np.nan),
            "flag": rng.random(rows) < 0.3,
        }
    )


def drift(windows: int = 3, **more):
    months = {f"2013-{i + 1:02}": season(40 + 8 * i, i + 1, value=NASTY, **more) for i in range(windows)}
    return compare(season(40, 0), months, source=NASTY)


@pytest.mark.parametrize("windows", [1, 2, 7, 40])
def test_the_page_is_whole_and_fetches_nothing(windows):
    html = page(drift(windows))
    reader = Reader(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in reader.tags}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in reader.tags for name in attrs)
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html and "prefers-color-scheme:dark" in html and "width=device-width" in html


def test_names_and_values_are_shown_as_text():
    html = page(drift())
    assert "<img" not in html and "&lt;img" in html
    assert any(NASTY in text for text in Reader(html).texts)


def test_the_sentence_the_figures_and_the_table_agree():
    found = drift()
    texts = Reader(page(found)).texts
    assert headline(found) in texts
    worst = found.windows[-1].columns[0]
    assert f"{worst.psi:.3f}" in texts and f"{worst.psi:.2f}" in texts


def test_no_figure_is_nan():
    html = page(drift())
    assert (
        "nan" not in html.lower().replace("nant", "") and "None" not in html and "inf" not in html.replace("info", "")
    )


def test_a_page_of_few_rows():
    assert "too few to assess" in page(compare(season(40, 0), {"now": season(60, 1, rows=15)}))


def test_a_page_without_drift():
    found = page(compare(season(40, 0), {"now": season(40, 1)}, source="may"))
    assert "Did not move" in found and "The columns that moved most" not in found


def test_a_column_of_another_kind():
    found = compare(Profile.of({"x": np.arange(3000.0)}), {"now": Profile.of({"x": np.array(["a", "b"] * 1500)})})
    assert "numbers in the reference, texts now" in page(found)


def test_many_windows_stay_small():
    found = drift(180)
    assert len(heat_map(found, found.names())) < 60_000


def test_histograms():
    whole = Profile.of({"x": np.random.default_rng(0).integers(0, 500, 9000)}).columns["x"]
    edges = histogram_edges(whole)
    assert len(edges) <= 40 and (edges % 1 == 0.5).all() and histogram(whole, edges).sum() == pytest.approx(1)
    constant = Profile.of({"x": np.full(10, 0.3)}).columns["x"]
    assert "svg" in histogram_pair("x", constant, constant)
    nothing = Profile.of({"x": np.full(10, np.nan)}).columns["x"]
    assert len(histogram_edges(nothing)) == 0 and "Neither" in histogram_pair("x", nothing, nothing)
    assert "svg" in histogram_pair("x", whole, nothing)


def test_bars_mark_new_values():
    before, now = (Profile.of({"t": np.array(values)}).columns["t"] for values in (["a", "b"], ["a", "new"]))
    assert "new, 50.0%" in bar_pair("t", before, now)


def test_the_file_is_written_whole(tmp_path):
    path = write_page(drift(), tmp_path / "deep/drift.html")
    assert [p.name for p in path.parent.iterdir()] == ["drift.html"] and path.read_text().rstrip().endswith("</html>")


def test_the_date_can_be_set():
    assert "2013-07-04 05:06 UTC" in page(drift(), written=dt.datetime(2013, 7, 4, 5, 6))


def judged(windows=3):
    "A drift with thresholds: the first window is not assessed, the last has two alarms"
    found = drift(windows)
    alarms = [
        Alarm(name, "feature", "psi", 0.3, 0.25, over, over, [])
        for name, over in (("temperature", 2.4), ("load", 1.04))
    ]
    said = [WindowAssessment(0.04, [], "not assessed: the window is shorter than a day")]
    said += [WindowAssessment(30.0, [], false_alarms_per_week=0.01)] * (windows - 2) + [
        WindowAssessment(30.0, alarms, false_alarms_per_week=0.01)
    ]
    return replace(
        found, windows=[replace(w, assessment=j) for w, j in zip(found.windows, said, strict=True)], rate=0.04
    )


def test_colours_of_alarms_have_a_key_and_their_table_a_window():
    html = page(judged(2))
    assert (
        html.index("twice its threshold")
        < html.index("2.4×")
        < html.index("<h3>2013-02</h3>")
        < html.index('class="alarms"')
    )
    assert "1.04×" in html and "1.0×" not in html


def test_sizes_are_not_mistaken_for_alarms():
    assert "PSI says how far, not whether that is unusual" in page(judged())
    assert "PSI says how far" not in page(drift())  # without thresholds there are no alarms to look at


def test_no_cell_of_a_window_that_is_not_judged_has_a_colour():
    found = judged()
    cells = [attrs for tag, attrs in Reader(heat_map(found, found.names())).tags if tag == "rect"]
    assert {attrs["class"] for attrs in cells[0::3]} == {"hx"} and "h4" in {attrs["class"] for attrs in cells[2::3]}
