"""The report: tables and pictures of every kind of record, one page, refusals."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from networks import covering
from records import RECORDS
from typer.testing import CliRunner

import intrafuse
from intrafuse.catalog.zoo import resolve_model
from intrafuse.cli import app
from intrafuse.study.report.kinds import KINDS
from intrafuse.study.report.page import draw_pictures, write_report
from intrafuse.study.report.read import read_entries
from intrafuse.study.report.record import as_record, write_record
from intrafuse.support.errors import IntrafuseError
from intrafuse.support.tables import text_table

SHOWN = {
    "comparison": ["unpruned", "1.5M", "87.25", "50.0%", "750k", "66.7%", "31.12", "1.50"],
    "divergence": ["moment", "30.0%", "1.5000", "1.4000", "0.2500", "0.8750"],
    "landscape": ["90.00", "70.00", "20.00", "3.00"],
    "sensitivity": ["60.00", "81.00", "50.00", "5.00", "volatile", "resilient"],
    "ablation": ["75.00", "71.00", "0.600", "0.439"],
    "cost": ["2k", "1k", "4.000", "2.000"],
    "fusion": ["a.safetensors", "1,000", "90.50", "88.75"],
    "factorized": ["trained-1", "676", "3.2", "91.50", "50.00", "all"],
    "pruning": ["24", "12", "3,000", "75.0%", "90.00", "80.00", "conv1", "select"],
}
TOLD = {
    "comparison": "31.12 at 50 %",
    "divergence": "moment 1.5000",
    "landscape": "from 10.00 to 90.00",
    "sensitivity": "conv1 50.00, conv2 5.00",
    "ablation": "p = 0.439",
    "cost": "latency 50%",
    "fusion": "fused 88.75",
    "factorized": "5.5 s in total",
    "pruning": "conv1 16 to 8; conv2 8 to 4",
}


def write(folder, *kinds):
    for kind in kinds:
        write_record(folder / f"{kind}.json", as_record(kind, RECORDS[kind], command=f"do {kind}"))
    return folder


def test_every_kind_is_tried():
    assert set(RECORDS) == set(KINDS) == set(SHOWN) == set(TOLD)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_hold_the_numbers_of_the_record(kind):
    shown = [text for table in KINDS[kind].tables(RECORDS[kind]) for r in table.texts for text in r]
    assert set(SHOWN[kind]) <= set(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_tell_their_numbers_in_words(kind):
    pictures = KINDS[kind].pictures(RECORDS[kind])
    assert TOLD[kind] in " ".join(picture.alternative for picture in pictures)


STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize(("kind", "form"), covering(KINDS, STARTS))
def test_every_picture_as_a_file(tmp_path, kind, form):
    paths = draw_pictures([write(tmp_path, kind)], tmp_path / "pictures", form=form)
    assert len(paths) == len(set(paths)) == len(KINDS[kind].pictures(RECORDS[kind]))
    assert all(path.read_bytes().startswith(STARTS[form]) for path in paths)


def test_a_picture_is_the_same_each_time(tmp_path):
    first, second = (
        draw_pictures([write(tmp_path, *KINDS)], tmp_path / name, form="svg") for name in "ab"
    )
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_pictures_of_one_name_do_not_replace_each_other(tmp_path):
    folders = [write(tmp_path / name, "landscape") for name in "ab"]
    names = [path.name for path in draw_pictures(folders, tmp_path / "out")]
    assert names == ["landscape.png", "landscape-2.png"]


def test_a_page_of_everything(tmp_path):
    text = write_report([write(tmp_path, *KINDS)], tmp_path / "page.html").read_text("utf-8")
    assert len(text) < 3_000_000
    # nothing is loaded from elsewhere: no address but the names of namespaces
    assert not re.search(r'(src|href|url\()\s*=?\s*["\']?(https?:|//)', text.replace("xlink:", ""))
    for kind in KINDS:
        assert f"do {kind}" in text
        for picture in KINDS[kind].pictures(RECORDS[kind]):
            assert picture.title.replace("'", "&#39;") in text
    assert "#010203" not in text and "#040506" not in text  # the page's own colours stand there
    names = re.findall(r'\bid="([^"]+)"', text)
    assert len(names) == len(set(names))


def test_order_is_that_of_the_kinds_whatever_the_names(tmp_path):
    write(tmp_path / "z", "comparison")
    write(tmp_path / "a", "pruning")
    assert [e.kind for e in read_entries([tmp_path])] == ["comparison", "pruning"]


def test_names_cannot_smuggle_markup(tmp_path):
    record = json.loads(json.dumps(RECORDS["comparison"]))
    record["model"] = record["rows"][0]["method"] = "<script>alert(1)</script>"
    write_record(tmp_path / "x.json", as_record("comparison", record, command="</pre><b>"))
    text = write_report([tmp_path], tmp_path / "page.html").read_text("utf-8")
    assert "<script>alert" not in text and "</pre><b>" not in text


@pytest.fixture
def saved(tmp_path):
    net = resolve_model("mlp")
    pruned = intrafuse.prune(net.model, net.example_inputs, channels=0.5, method="select")
    return intrafuse.save(tmp_path / "small", pruned, architecture="mlp", figures={"accuracy": 9.0})


def test_a_saved_network_is_a_record(saved):
    (entry,) = read_entries([saved])
    assert entry.kind == "pruning" and entry.record["model"] == "mlp"
    assert entry.record["after"]["params"] == 6570
    assert '"share": 0.5' in entry.recipe
    assert [row[2:4] for row in entry.tables[1].rows] == [(64, 32), (128, 64)]


def test_a_network_is_not_shown_twice(saved):
    record = {**RECORDS["pruning"], "out": str(saved)}
    write_record(saved.parent / "prune.json", as_record("pruning", record))
    (entry,) = read_entries([saved.parent])
    assert entry.source.name == "prune.json"


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("a.json", "{", "not readable JSON"),
        ("a.json", '{"kind": "cost", "rows": [NaN]}', "NaN is no number of JSON"),
        ("a.json", '{"kind": "comparison"}', "does not have the fields of its kind"),
        (
            "a.json",
            '{"kind": "comparison", "original": 3, "rows": []}',
            "does not have the fields of its kind",
        ),
        ("a.json", '{"kind": "cost", "rows": [1e999]}', "1e999 is no number of JSON"),
        ("a.json", '{"kind": "cost", "rows": ' + "[" * 5000, "not readable JSON .*deeply"),
        ("a.json", '{"kind": "cost", "kind": "cost"}', "not readable JSON .*twice"),
        ("a.json", '{"kind": "cost", "rows": [' + "9" * 5000 + "]}", "not readable JSON .*64 bits"),
        ("b.json", '{"kind": "unheard of"}', "not a record|none"),
        ("b.json", "[1, 2]", "not a record|none"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_files_that_are_no_records(tmp_path, name, content, rule, whole):
    (tmp_path / name).write_text(content)
    target = tmp_path / "page.html"
    with pytest.raises(IntrafuseError, match=rule) as caught:
        write_report([tmp_path if whole else tmp_path / name], target)
    assert str(tmp_path) in str(caught.value) and not target.exists()


def test_a_folder_without_records(tmp_path):
    with pytest.raises(IntrafuseError, match="there are none here"):
        read_entries([tmp_path])
    with pytest.raises(IntrafuseError, match="no such file"):
        read_entries([tmp_path / "absent"])


@pytest.mark.parametrize("out", ["a\0b", "a" * 5000, "loop", 7, ["x"], "", "~", "/dev/zero/x"])
def test_a_record_may_say_anything_of_where_its_network_lies(tmp_path, out):
    (tmp_path / "loop").symlink_to("loop")
    write_record(tmp_path / "one.json", as_record("pruning", {**RECORDS["pruning"], "out": out}))
    assert len(read_entries([tmp_path])) == 1


@pytest.mark.parametrize("out", ["small", "runs/small"])
def test_a_network_is_not_shown_twice_from_elsewhere(saved, monkeypatch, tmp_path, out):
    """Its folder is told as it was typed, perhaps in another folder than now."""
    home = tmp_path / "home"
    (home / out).parent.mkdir(parents=True)
    saved.rename(home / out)
    record = as_record("pruning", {**RECORDS["pruning"], "out": out})
    write_record(home / "one.json", record)
    monkeypatch.chdir("/")
    (entry,) = read_entries([home])
    assert entry.name == "one"


def test_records_beside_a_saved_network_are_shown(saved):
    record = {**RECORDS["pruning"], "out": str(saved)}
    write_record(saved / "mine.json", as_record("pruning", record))
    write(saved, "divergence")
    assert [e.source.name for e in read_entries([saved])] == ["divergence.json", "mine.json"]
    assert [e.source.name for e in read_entries([saved / "mine.json"])] == ["mine.json"]


def test_records_are_named_by_their_files(tmp_path, monkeypatch, saved):
    for name in "ab":
        write_record(tmp_path / f"{name}.json", as_record("pruning", RECORDS["pruning"]))
    monkeypatch.chdir(saved)
    names = [e.name for e in read_entries(["../a.json", "../b.json", "."])]
    assert sorted(names) == ["a", "b", "small"]
    names = [path.name for path in draw_pictures([tmp_path], tmp_path / "out")]
    assert sorted(names) == ["a-widths.png", "b-widths.png", "small-widths.png"]


def test_links_that_lead_back_are_followed_once(tmp_path):
    write(tmp_path, "cost")
    for name in ("one", "two", "three"):
        (tmp_path / name).symlink_to(tmp_path)
    assert len(read_entries([tmp_path])) == 1


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "cost")
    monkeypatch.setattr("pathlib.Path.iterdir", lambda path: open("/nowhere/at/all"))
    with pytest.raises(IntrafuseError, match="cannot be read: No such file"):
        read_entries([tmp_path])


def test_a_record_that_cannot_be_drawn_is_named(tmp_path):
    record = {**RECORDS["landscape"], "x": [0.0]}
    write_record(tmp_path / "plane.json", as_record("landscape", record))
    for act in (write_report, draw_pictures):
        with pytest.raises(
            IntrafuseError, match=r"does not have the fields of its kind.*plane\.json"
        ):
            act([tmp_path], tmp_path / "out")


def test_odd_names_are_drawn(tmp_path, recwarn):
    name = "a $x_1^{$ 层 " + "features.denseblock4." * 9
    sensitivity, layers = (
        json.loads(json.dumps(RECORDS[k])) for k in ("sensitivity", "divergence")
    )
    sensitivity["rows"][0]["group"] = layers["rows"][0]["layers"][0]["layer"] = name
    costs = json.loads(json.dumps(RECORDS["cost"]))
    costs["rows"][1]["network"] = name
    for kind, data in {"sensitivity": sensitivity, "divergence": layers, "cost": costs}.items():
        write_record(tmp_path / f"{kind}.json", as_record(kind, data))
    text = write_report([tmp_path], tmp_path / "page.html").read_text("utf-8")
    assert "$x_1^{$ 层" in text and not recwarn.list


def test_networks_of_one_name_are_all_drawn():
    record = {**RECORDS["fusion"], "networks": ["a", "a"]}
    (picture,) = KINDS["fusion"].pictures(record)
    assert picture.alternative == "a 90.50, a 91.00, fused 88.75."
    assert len(picture.draw().axes[0].patches) == 3


def test_a_page_says_where_a_record_is_from(tmp_path):
    text = write_report([write(tmp_path, "cost")], tmp_path / "page.html").read_text("utf-8")
    assert f">From {tmp_path}/cost.json.<" in text
    run = {**RECORDS["factorized"], "recipe": {"model": "mlp", "data": "digits"}}
    write_record(tmp_path / "run" / "result.json", as_record("factorized", run))
    text = write_report([tmp_path / "run"], tmp_path / "page.html").read_text("utf-8")
    assert f">Network mlp, data digits, from {tmp_path}/run/result.json.<" in text


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module):
    write(tmp_path, "comparison")
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IntrafuseError, match=r"intrafuse\[plots\]"):
        write_report([tmp_path], tmp_path / "page.html")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands(tmp_path):
    write(tmp_path, *KINDS)
    result = run("report", tmp_path, "--title", "Mine", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"] == str(tmp_path / "report.html")
    assert "<h1>Mine</h1>" in (tmp_path / "report.html").read_text("utf-8")
    result = run("plot", tmp_path, "--out", tmp_path / "p", "--format", "svg")
    assert result.exit_code == 0 and len(list((tmp_path / "p").glob("*.svg"))) == 10
    result = run("plot", tmp_path, "--out", tmp_path / "p", "--format", "bmp")
    assert result.exit_code == 2 and "png, svg, pdf" in result.stderr
    assert run("report", tmp_path / "absent").exit_code == 2


# --- names that others chose --------------------------------------------------------------------

HOSTILE = "\ud800\x1b[31m\x00\u202e"  # half a character, a terminal's colour, NUL, right to left
CHOICES = ("measure", "scheme", "workers", "setting")


def spoiled(data, key=None):
    """Put what no file or terminal takes into every name of a record."""
    if isinstance(data, str):
        return data if key in CHOICES or data == "fused" else data + HOSTILE
    if isinstance(data, dict):
        return {name: spoiled(value, name) for name, value in data.items()}
    return [spoiled(value, key) for value in data] if isinstance(data, list) else data


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_no_file_takes_are_written_as_escapes(tmp_path, kind):
    source = tmp_path / os.fsdecode(b"name\xff\x1b[31m.json")
    write_record(source, as_record(kind, spoiled(RECORDS[kind]), command=f"do {HOSTILE}"))
    pictures = draw_pictures([tmp_path], tmp_path / "pictures")
    assert pictures and all(path.name.isprintable() for path in pictures)
    page = write_report([tmp_path], tmp_path / "page.html", title=f"title{HOSTILE}")
    text = page.read_text("utf-8")
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert r"<h1>title\ud800\x1b[31m\x00\u202e</h1>" in text and r"do \ud800" in text
    assert r"name\udcff\x1b[31m" in text


def test_tables_show_names_as_escapes_and_as_they_are():
    table = text_table(f"[red]title{HOSTILE}", ["a[b]"], [[f"x{HOSTILE}"], [":smile:"]])
    assert all(c.isprintable() or c == "\n" for c in table)
    for words in (r"[red]title\ud800\x1b[31m\x00", "a[b]", r"x\ud800\x1b", ":smile:"):
        assert words in table
