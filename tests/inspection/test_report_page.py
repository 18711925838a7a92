"""The report's page in a real browser: it opens alone from disk, sorts, searches, folds, marks, switches its theme."""

import dataclasses
import re

import pytest
from browser import Watched, chromium  # noqa: F401 (a fixture)
from inspection_reports import inspected

from nanovllm_jax.inspection.profile_data import MeasuredKernel, Profile, StepKind, StepRow
from nanovllm_jax.inspection.report import Compilation
from nanovllm_jax.step.catalogue import ProgramKey
from nanovllm_jax.step.programs import Programs

KEYS = [ProgramKey("decode", 16), ProgramKey("plain", 16)]
PANES = ("jaxpr", "stablehlo", "hlo")


def measured():
    """Two steps of 3 ms with 1 ms between them, as a profile has them."""
    steps = [
        StepRow("decode[16]", 0.004 * i, 1e-4, 0.004 * i, 0.004 * i + 0.003, 0.0025, 0.001 * i, 16, 16) for i in (0, 1)
    ]
    kernels = [
        MeasuredKernel(
            "decode[16]", "decode[16]", "decode_kernel", "kernel", "layer*/attention/paged_decode", 56, 2, 0.004
        ),
        MeasuredKernel("decode[16]", "decode[16]", "loop_fusion", "fusion", "layer*/mlp", 56, 2, 0.001),
    ]
    kind = StepKind("decode[16]", 2, 32, 0.004, 0.0025, 0.0005, 0.0005)
    return Profile("GPU 0", "trace", 0.007, 0.005, 0.001, 0.001, 1 / 7, 32, [kind], kernels, steps, ["a note"])


@pytest.fixture(scope="module")
def report():
    """28 layers, compiled; with a compile log and a profile."""
    found = inspected("deep", gpu=None, keys=KEYS, programs=lambda c: Programs(c, command_buffers=True), buckets=True)
    log = [Compilation("decode[16]", 0.0, 0.1, 0.2, 0.3, 0.4, False, "first program of kind decode")]
    return dataclasses.replace(found, compilations=log, profile=measured())


@pytest.fixture(scope="module")
def file(report, tmp_path_factory):
    card = dataclasses.replace(report.card, context=512, model="before")
    before = dataclasses.replace(report, card=card)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.html(before), encoding="utf-8")
    return path


@pytest.fixture
def opened(chromium, file):  # noqa: F811
    with Watched(chromium) as watched:
        watched.page.goto(file.as_uri())
        yield watched
        assert watched.errors == []
        assert watched.requests == [file.as_uri()]


@pytest.fixture
def page(opened):
    return opened.page


def test_page_of_28_layers_is_small_and_complete(file, page):
    assert file.stat().st_size < 3_000_000
    headings = page.locator("h2").all_text_contents()
    assert headings == ["Findings", "Buckets", "Kernels", "Roofline", "Memory", "Timeline", "Programs", "Diff"]
    assert all(text.strip() for text in page.locator("main section").all_text_contents())
    assert page.locator("#card h1").text_content() == "deep"


def test_layers_are_folded_with_their_number(page):
    for pane in page.locator(".pane").all()[:2]:
        assert pane.locator(".times", has_text="×28").count() == 1
    kinds = (
        page.locator(".pane").nth(2).locator(".line").first.text_content()
    )  # XLA fuses the first layer in its own way
    assert sum(int(times) for times in re.findall(r"layer\d+ ×(\d+)", kinds)) == 28


def test_bucket_table_sorts_both_ways(page):
    def flops():
        return [_number(cell) for cell in page.locator("#buckets tbody tr td:nth-child(3)").all_text_contents()]

    head = page.locator("#buckets th", has_text="flops")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert flops() == sorted(flops(), reverse=True)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert flops() == sorted(flops())
    assert len(set(flops())) > 2


def test_search_counts_lines_and_walks_over_them(page):
    page.fill("#search", "rsqrt")
    hits = page.locator(".line.hit").count()
    assert hits > 3
    assert page.locator("#hits").text_content() == f"1 of {hits} lines"
    page.press("#search", "Enter")
    assert page.locator("#hits").text_content() == f"2 of {hits} lines"
    page.press("#search", "Shift+Enter")
    page.press("#search", "Shift+Enter")
    assert page.locator("#hits").text_content() == f"{hits} of {hits} lines"
    assert "rsqrt" in page.locator(".line.current").text_content()
    assert page.locator(".line.current").is_visible()
    page.fill("#search", "no such thing")
    assert page.locator("#hits").text_content() == "0 lines"


def test_a_block_folds_and_unfolds(page):
    pane = page.locator(".pane").first
    opener = pane.locator(".line:has(button.fold)").first
    number = int(opener.get_attribute("data-line"))
    inside = pane.locator(f'.line[data-line="{number + 1}"]')
    assert inside.is_visible()
    opener.locator("button.fold").click()
    assert inside.is_hidden()
    assert opener.locator("button.fold").get_attribute("aria-expanded") == "false"
    opener.locator("button.fold").click()
    assert inside.is_visible()
    pane.get_by_role("button", name="fold", exact=True).click()
    assert pane.locator(".line:visible").count() < pane.locator(".line").count()


def test_a_click_marks_one_scope_in_all_three_texts_and_in_the_table(page):
    assert [pane.locator("select").input_value() for pane in page.locator(".pane").all()] == list(PANES)
    page.locator('.pane >> nth=0 >> .line[title="layer*/mlp/down/tf,fe->te"]').first.click()
    for pane in page.locator(".pane").all():
        marked = pane.locator(".line.marked")
        assert marked.count() > 0
        assert {one.get_attribute("title") for one in marked.all()} == {"layer*/mlp/down/tf,fe->te"}
        assert marked.first.is_visible()
    assert page.locator("#kernels tr.marked").count() == 1
    assert page.locator("#scope button").all_text_contents() == ["layer*", "mlp", "down", "tf,fe->te", "✕"]
    page.locator("#scope button", has_text="mlp").click()
    scopes = {one.get_attribute("title") for one in page.locator(".line.marked").all()}
    assert {"layer*/mlp/down", "layer*/mlp/down/tf,fe->te"} <= scopes
    assert all(scope.startswith("layer*/mlp") for scope in scopes)
    page.locator("#scope button", has_text="✕").click()
    assert page.locator(".marked").count() == 0
    page.locator("#kernels tr", has_text="paged_decode").first.click()
    assert page.locator(".pane").nth(2).locator(".line.marked").count() > 0


def test_theme_switches_and_follows_the_system_at_first(chromium, file, page):  # noqa: F811
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("#theme")
    dark = page.evaluate(paper)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(paper) == light
    with Watched(chromium, dark=True) as other:
        other.page.goto(file.as_uri())
        assert other.page.evaluate(paper) == dark
        assert other.errors == []


def test_another_program_is_chosen(page):
    page.locator("#program button", has_text="plain[16]").click()
    assert "plain[16]" in page.locator("#texts .lead").text_content()
    assert "lm_head" in page.locator("#kernels table").text_content()


def test_measured_kernels_have_the_gaps_as_rows_and_steps_their_lanes(page):
    page.locator("#kernels [role=tab]", has_text="Measured in decode[16]").click()
    table = page.locator("#kernels table").text_content()
    assert "gaps between kernels" in table
    assert "host gap" in table
    assert "87.5" in page.locator("#kernels .lead").text_content()  # 2.5 + 0.5 + 0.5 ms of 4
    assert page.locator("#steps rect.decode").count() == 2
    assert page.locator("#steps rect.wait").count() == 1
    page.locator("#steps button", has_text="16×").click()
    assert page.locator("#steps svg").evaluate("one => one.style.width") == "1600%"
    assert "first program of kind decode" in page.locator("#compilations").text_content()


def test_diff_lists_what_changed(page):
    assert "context" in page.locator("#diff table").text_content()
    assert page.locator("#diff tbody tr").count() == 2


@pytest.mark.parametrize("width", [800, 1400])
def test_nothing_is_wider_than_the_window(chromium, file, width):  # noqa: F811
    with Watched(chromium, width=width) as watched:
        watched.page.goto(file.as_uri())
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watched.errors == []


def test_what_a_report_quotes_cannot_become_part_of_the_page(chromium, report, tmp_path):  # noqa: F811
    evil = "</script><script>document.title='taken'</script><img src=http://example.org/x>"
    path = tmp_path / "report.html"
    named = dataclasses.replace(report, card=dataclasses.replace(report.card, model=evil))
    path.write_text(named.html(), encoding="utf-8")
    with Watched(chromium) as watched:
        watched.page.goto(path.as_uri())
        assert watched.page.locator("h1").text_content() == evil
        assert watched.page.title() != "taken"
        assert watched.requests == [path.as_uri()]


def test_notebooks_get_the_page_in_a_frame(chromium, report, tmp_path):  # noqa: F811
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{report._repr_html_()}", encoding="utf-8")
    with Watched(chromium) as watched:
        watched.page.goto(path.as_uri())
        frame = watched.page.frame_locator("iframe")
        assert frame.locator("h1").text_content() == "deep"
        assert watched.errors == []


def _number(text):
    value, unit = re.fullmatch(r"([\d.,]+)\s*([kMGT]?)(?:FLOP)?", text.strip()).groups()
    return float(value.replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
