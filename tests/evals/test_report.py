"""The report: everything measured is in it, nothing in it is markup, and a model card keeps what is not the report's."""

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from llmlite.cli import main
from llmlite.errors import InputError
from llmlite.evals.report.card import BEGIN, END, with_section, write_card
from llmlite.evals.report.pictures import VARIABLES, cache_at
from llmlite.evals.report.run import ReportSettings, write_report
from llmlite.evals.report.sections import sections
from llmlite.evals.report.views import Table, flat, size
from tests.tiny import save_tiny

EVIL = "<script>alert(1)</script>|`*_$x$ &amp; ]]> {{ 7*7 }}"


def text(kl):
    buckets = [{"start": 10 * n, "stop": 10 * n + 10, "tokens": 30, "value": kl * (n + 1)} for n in range(3)]
    worst = [
        {
            "index": 7, "kl": 40 * kl, "before": f"a\n{EVIL}", "text": "‮מלך\x00", "after": "b", "probability": 0.01,
            "base_probability": 0.9, "top": EVIL, "top_probability": 0.5, "base_top": "king", "base_top_probability": 0.6,
        }
    ]  # fmt: skip
    apart = {
        "mean_kl": kl, "stderr": kl / 10, "median_kl": kl, "p95_kl": kl, "p99_kl": kl, "p999_kl": kl, "max_kl": kl,
        "same_top": 0.9125, "base_perplexity": 10.0, "by_position": buckets, "worst": worst,
    }  # fmt: skip
    found = {"value": 10.5, "stderr": 0.2, "tokens": 90, "windows": 3, "by_position": buckets}
    return {"sha256": "5" * 64, "perplexity": found, "divergence": apart}


def spread(value):
    return {"median": value, "minimum": value - 1, "maximum": value + 1}


def facts(name="out/a", kl=0.05, **more):
    at = [
        {"context": c, "kv": 10 * c, "activations": 5, "peak": 2**30 + c, "address_space": 2**31} for c in (512, 8192)
    ]
    speeds = [{"context": c, "prompt_tps": spread(500.0), "generate_tps": spread(50.0 - c / 1024)} for c in (1, 4096)]
    figures = {
        "questions": 4,
        "match": {"value": 0.75, "stderr": 0.2},
        "logprob": {"value": -0.5, "change": {"value": -0.1, "p": 0.03}},
    }
    return {
        "artifact": name, "engine": {"name": "llama.cpp", "version": "v1"}, "bytes": 3 * 2**20, "bits_per_weight": 4.5,
        "parameters": 12345, "sha256": "a" * 64, "base": "base", "base_sha256": "b" * 64,
        "protocol": {"name": "llama.cpp", "window": 64}, "texts": {"english": text(kl), EVIL: text(2 * kl)},
        "memory": {"weights": 3 * 2**20, "kv_per_token": 2048, "peak": 2**30, "program": 5, "device": "cpu", "contexts": at},
        "speed": {"prompt_tps": 500.0, "generate_tps": 50.0, "first_token_s": 1.0, "contexts": speeds},
        "tasks": {EVIL: {"acc": {"value": 0.4321, "stderr": 0.01, "items": [1] * 20}}},
        "long_context": {"seed": 7, "all": figures, "tasks": {"uuid": {"4096": figures, "8192": figures}}},
        "lightness": {"flops_per_token": 77, "classes": {"phone": {"name": "phone", "about": EVIL, "light": True, "decides": "disk", "value": 1, "threshold": 2, "unknown": ["kept"]}}},
        "structure": {"rope": {"equal": False, "detail": EVIL}, "differences": 1},
    } | more  # fmt: skip


def write(tmp_path, *evaluations):
    files = []
    for number, evaluation in enumerate(evaluations):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(evaluation))
    return [str(file) for file in files]


class Page(HTMLParser):
    """Collects tags, attributes and text outside of styles; every element that needs an end must have one."""

    VOID = ("meta", "br", "link", "img", "hr", "input", "path", "use", "rect", "circle")

    def __init__(self, source):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of three artifacts with every section, judged by rules; one has a name made to break out."""
    folder = tmp_path_factory.mktemp("page")
    sources = write(folder, facts(), facts("out/b", 0.02, bytes=5 * 2**20), facts(f"out/{EVIL}", 0.3, bytes=2**20))
    report = write_report(sources, folder / "r.html", ReportSettings(markdown=folder / "r.md", rules=("4bit",)))
    return report, (folder / "r.html").read_text(), (folder / "r.md").read_text()


def test_the_page_is_whole_and_loads_nothing(page):
    _, source, _ = page
    found = Page(source)
    assert found.open == []
    assert all(link.startswith("#") for link in found.links), "a page that needs nothing else"
    assert "url(http" not in source and "@import" not in source
    assert "default-src 'none'" in source
    assert "script" not in found.tags and "img" not in found.tags


def test_what_models_and_texts_say_is_text(page):
    _, source, markdown = page
    assert "<script" not in source and "49" not in re.findall(r"\]\]> (\S+)", source)
    assert "{{ 7*7 }}" in Page(source).text, "shown as it is"
    assert "‮" not in source, "a change of direction would turn the line around"
    assert "<script" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
    tables = re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    assert len(tables) > 12
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, "a cell must not end itself"


def test_pictures_take_the_pages_colours_and_are_xml(page):
    _, source, _ = page
    pictures = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    assert len(pictures) == 7
    ids = [name for svg in pictures for name in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)), "the pictures stand in one page"
    for svg in pictures:
        ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert "var(--ink)" in svg
    assert "$x$" in pictures[0], "a name is no formula"
    for colour, variable in VARIABLES.items():
        assert colour not in source
        assert source.count(f"{variable[4:-1]}:") == 2, "one for light, one for dark"
    assert "prefers-color-scheme: dark" in source


def test_the_cache_of_sliding_windows_is_drawn_as_it_was_measured():
    held = [{"context": context, "kv": kv} for context, kv in ((512, 100), (1024, 150), (4096, 210))]
    memory = {"kv_per_token": 1, "contexts": held}
    assert [cache_at(memory, n) for n in (256, 512, 768, 2560, 7168)] == [75, 100, 125, 180, 270]
    assert cache_at({"kv_per_token": 3, "contexts": held[:1]}, 1000) == 3000


def test_every_figure_is_there(page):
    report, source, markdown = page
    said = Page(source).text
    for figure in ("0.05 ± 0.005", "91.25%", "10.5 ± 0.2", "+5.00%", "1.00 GiB", "50 (49 to 51)", "0.4321 ± 0.01",
                   "-0.5", "0.03", "77", "DIFFERS", "a" * 64, "b" * 64, "5" * 64, "v1"):  # fmt: skip
        assert figure in said and figure.replace("_", r"\_") in markdown, figure
    assert "Not measured" not in said
    assert [verdict.passed for verdict in report.verdicts] == [False] * 3
    assert report.to_json()["gate"][0]["checks"]


def test_what_is_missing_is_said_to_be(tmp_path):
    source = {"artifact": "a", "engine": {"name": "x"}}
    write_report(write(tmp_path, source), tmp_path / "r.html", ReportSettings(markdown=tmp_path / "r.md"))
    found = Page((tmp_path / "r.html").read_text())
    assert found.text.count("Not measured") == 11
    assert "svg" not in found.tags
    assert "Not measured: divergence" in (tmp_path / "r.md").read_text().replace("\\", "")


def test_the_same_figures_give_the_same_page(tmp_path):
    sources = write(tmp_path, facts())
    for name in ("one.html", "two.html"):
        write_report(sources, tmp_path / name, ReportSettings())
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_model_card_keeps_everything_else(tmp_path):
    file = tmp_path / "README.md"
    for before in (b"---\nlicense: mit\n---\n# Name\n\nwords", b"caf\xe9 in latin-1\n", b"a\r\nb\r\n", b""):
        file.write_bytes(before)
        file.chmod(0o640)
        write_card(file, "## One\n\ntext é", "Name")
        once = file.read_bytes()
        assert once.startswith(before)
        write_card(file, "## One\n\ntext é", "Name")
        assert file.read_bytes() == once, "writing it again changes nothing"
        file.write_bytes(once + b"after\xff")
        write_card(file, "## Two", "Name")
        assert file.read_bytes().startswith(before)
        assert file.read_bytes().endswith(END + once[once.index(END) + len(END) :] + b"after\xff")
        assert b"One" not in file.read_bytes() and b"## Two" in file.read_bytes()
        assert file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]
    assert b"\r\n" + BEGIN + b"\r\n" in with_section(b"a\r\n", "x", "f")


@pytest.mark.parametrize("broken", [BEGIN, END, END + BEGIN, BEGIN + BEGIN + END, BEGIN + END + END])
def test_markers_that_make_no_pair_are_refused(tmp_path, broken):
    file = tmp_path / "README.md"
    file.write_bytes(b"words\n" + broken)
    with pytest.raises(InputError, match="one of each, in this order, is right"):
        write_card(file, "text", "Name")
    assert file.read_bytes() == b"words\n" + broken


def test_report_by_the_command_line(tmp_path, capsys):
    base, words = save_tiny(tmp_path / "base"), tmp_path / "words.txt"
    artifact = shutil.copytree(base, tmp_path / "artifact")
    (artifact / "llmlite.json").write_text("{}")
    (artifact / "README.md").write_text("# Mine\n")
    words.write_text("the cat sat on the mat and the dog ran to the house. " * 60)
    assert main(["report", str(artifact), "-o", str(tmp_path / "r.html")]) == 2
    assert "llmlite eval" in capsys.readouterr().err, "says what measures"
    assert (
        main(["eval", str(artifact), "--base", str(base), "--text", str(words), "--window", "64", "--windows", "2"])
        == 0
    )
    assert (
        main(
            [
                "report",
                str(artifact),
                "-o",
                str(tmp_path / "r.html"),
                "--model-card",
                "--json",
                str(tmp_path / "r.json"),
            ]
        )
        == 0
    )
    assert "words" in Page((tmp_path / "r.html").read_text()).text
    card = (artifact / "README.md").read_text()
    assert card.startswith("# Mine\n") and "mean KL from the base" in card
    assert json.loads((tmp_path / "r.json").read_text())["artifacts"]["artifact"]["texts"]["words"]
    assert main(["report", str(artifact), "--model-card"]) == 0
    assert (artifact / "README.md").read_text() == card
    (artifact / "config.json").write_text((artifact / "config.json").read_text() + " ")
    assert main(["report", str(artifact), "-o", str(tmp_path / "r.html")]) == 2, "other weights than those measured"
    assert main(["report", str(artifact), "-o", str(tmp_path / "none" / "r.html")]) == 2


def test_small_things():
    assert [size(n) for n in (5, 2048, 3 * 2**20, 2**33, None, True)] == [
        "5 B",
        "2.00 KiB",
        "3.00 MiB",
        "8.00 GiB",
        "-",
        "-",
    ]
    assert flat({"a": {"value": 1.0, "stderr": 0.5, "n": 3}, "b": 2.0, "b_stderr": 0.25, "items": list(range(20))}) == [
        ("a", "1 ± 0.5"), ("a.n", "3"), ("b", "2 ± 0.25"),
    ]  # fmt: skip
    table = Table("", ("name", "seen", "never"), [("a", "1", "-"), ("b", "-", "-")], ("seen", "never"))
    assert table.head == ("name", "seen") and table.rows == [("a", "1"), ("b", "-")]


def test_what_lightness_did_not_know_and_what_a_short_task_gave():
    short = {"mine": {"questions": 2, "acc": {"value": 0.5, "stderr": 0.5, "items": [0, 1]}}}
    by_anchor = {section.anchor: section for section in sections({"a": facts(tasks=short)}, [])}
    (classes, _), (tasks,) = by_anchor["lightness"].tables, by_anchor["tasks"].tables
    assert [row[-4:] for row in classes.rows] == [("bytes on disk", "0 MiB", "0 MiB", "best token kept")]
    assert tasks.rows == [("a", "mine", "questions", "2"), ("a", "mine", "acc", "0.5 ± 0.5")]


@pytest.mark.parametrize("wrong", [{"memory": 5}, {"texts": {"english": 5}}, {"tasks": {"mine": None}}])
def test_json_that_is_no_evaluation_is_refused(wrong, tmp_path):
    (source,) = write(tmp_path, facts(**wrong))
    with pytest.raises(InputError, match="is not a JSON object: not an evaluation"):
        write_report([source], tmp_path / "r.html", ReportSettings())
