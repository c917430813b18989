"""Names and prompts that hold markup are shown on every page as they are: read here as GitHub and TensorBoard do."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from dsv3.comparison import Run, comparison
from dsv3.generation.sampling import Sample, markdown
from dsv3.markdown import code_span, escaped, one_line, table
from dsv3.sizing.report import markdown_table
from tests.dsv3.generation.test_sampling import RECORD, settings

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](https://example.org/pixel.png)",
    "a | b | c",
    "two\nlines\r\nand\u2028more",
    "# no heading\n\n---\n\n- no list",
    "**strong** _emphasis_ ~~gone~~ `code` $x$",
    "&lt;b&gt; &#60;i&#62;",
    "ends with a backslash\\",
    "\x1b[31mred",
    "```\nfence",
    "--><!-- comment -->",
]
PLAIN = ["config_nano.json", "train.use_fp8: true", "1.0e-3", "a_b_c", "ROMEO: (1 of 2)", "2 × 3"]


class Page(HTMLParser):
    """What a reader sees: the tags, and the text of each cell and heading."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {"td": [], "th": [], "h2": [], "pre": []}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in self.texts:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


def read(text: str) -> Page:
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_stays_as_it_is(text):
    assert escaped(text) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_shows_one_line_of_text_and_nothing_in_it_is_markup(text):
    page = read(table(["", text], ["---", "---"], [(text, "neighbor")]))
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts["td"] == [one_line(text), "neighbor"]
    assert page.texts["th"] == ["", one_line(text)]


@pytest.mark.parametrize("text", HOSTILE)
def test_tensorboards_reader_shows_the_same(text):
    reader = pytest.importorskip("markdown", reason="TensorBoard's: pip install --group tensorboard")
    html = reader.markdown(table(["a", "b"], ["---", "---"], [(text, "neighbor")]), extensions=["tables"])
    page = Page(html)
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts["td"] == [one_line(text), "neighbor"]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_of_samples_shows_prompts_and_names_as_they_are(text):
    record = {**RECORD, "name": text, "experiment": text}
    page = read(markdown([Sample(text, (f"{text}\n```\n## `x`\n\n```text\n",), 1)], settings(), 1, record))
    assert set(page.tags) <= {"h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"}
    assert page.texts["h2"] == [one_line(text).replace("`", "'")]
    assert one_line(f"{text} ({text})") in page.texts["td"]
    assert len(page.texts["pre"]) == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_a_comparison_shows_names_and_values_as_they_are(text):
    numbers = {"heldout": 1.5}
    runs = [Run("main", {"data.path": "a"}, numbers), Run(text, {"data.path": text}, numbers)]
    page = read(comparison(runs, markdown=True))
    assert set(page.tags) <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.texts["th"] == ["", "main", one_line(text)]
    assert page.texts["td"][:3] == ["data.path", "a", one_line(text)]
    assert len(page.texts["td"]) == 6


def test_the_table_of_sizes_shows_the_configurations_name_as_it_is():
    row = {
        **{"config": "a|<b>.json", "parameters_total": 1, "parameters_active": 1, "parameters_mtp": 0},
        **{"training_flops_per_token": 1, "inference_kv_cache_bytes_per_token": 1, "inference_total_gib": 1},
        **{"sequence_tokens": 1, "fits": {}},
    }
    page = read(markdown_table([{**row, "fits": Fits()}]))
    assert page.texts["td"][0] == "a|<b>.json"
    assert "b" not in page.tags


class Fits(dict):
    """No training fits any machine."""

    def __missing__(self, key):
        return None


def test_a_prompt_of_white_space_is_still_a_heading():
    assert code_span(" \n") == "``"
