import re
import subprocess
import sys

import pytest
import results_log
import tables
from benchmark_scripts import BENCHMARKS

VERSIONS = {"python": "3.12.3", "engine": "1.0"}


def line(name, values, unit="tok/s", limit=None, device="NVIDIA H200", commit="0123456789abcdef"):
    return results_log.figure_line(name, values, unit, limit, device=device, versions=VERSIONS, commit=commit)


def cells(text, first):
    row = next(row for row in text.splitlines() if row.startswith(f"| {first} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_engines_stand_side_by_side_and_the_last_line_counts(tmp_path):
    results_log.append([line("bench256_out_tok_s", [1.0], limit=36_000)], tmp_path)
    results_log.append(
        [line("vllm/bench256_out_tok_s", [22_431.0, 23_543.0, 23_453.0]), line("startup_warm_s", [9.5], "s")], tmp_path
    )
    results_log.append([line("bench256_out_tok_s", [27_000.0, 27_100.0, 26_000.0], limit=36_000)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["h200.jsonl"]
    text = tables.render(tmp_path)
    assert cells(text, "figure") == ["figure", "unit", "nanovllm-jax", "vllm", "limit", "nanovllm-jax of limit"]
    measured = ["27,000 (26,000 to 27,100)", "23,453 (22,431 to 23,543)", "36,000", "75%"]
    assert cells(text, "`bench256_out_tok_s`")[2:] == measured
    assert cells(text, "`startup_warm_s`")[1:] == ["s", "9.5", "", "", ""]
    assert "figures by commit: 0123456 (2)" in text


def test_times_are_shares_the_other_way_round(tmp_path):
    results_log.append([line("tp1_8b_b64_step_ms", [8.0], "ms", 6.0)], tmp_path)
    assert cells(tables.render(tmp_path), "`tp1_8b_b64_step_ms`")[-2:] == ["6", "75%"]


def test_devices_and_their_numbers_have_sections(tmp_path):
    results_log.append([line("one", [1.0])], tmp_path)
    results_log.append([line("four", [1.0], device="4 x NVIDIA H200")], tmp_path)
    results_log.append([line("host", [1.0], device="cpu")], tmp_path)
    assert re.findall("### (.*)", tables.render(tmp_path)) == ["4 x NVIDIA H200", "NVIDIA H200", "cpu"]


def test_latency_is_a_grid(tmp_path):
    times = {"ttft_ms_b1_c128": 4.0, "tpot_ms_b1_c128": 1.0, "ttft_ms_b64_c128": 20.0, "tpot_ms_b64_c128": 2.0}
    results_log.append([line(name, [value], "ms") for name, value in times.items()], tmp_path)
    text = tables.render(tmp_path)
    assert cells(text, "128") == ["128", "4 / 1", "20 / 2"]
    assert "`ttft" not in text


def test_script_rewrites_between_the_markers_and_checks(tmp_path):
    readme, front, results = tmp_path / "README.md", tmp_path / "front.md", tmp_path / "results"
    for path in (readme, front):
        path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    headlines = f"{tables.HEADLINE_BEGIN}\n{tables.NONE_YET}\n{tables.HEADLINE_END}\n"
    front.write_text(headlines.replace(tables.NONE_YET, "old") + front.read_text())

    def run(*options):
        command = [sys.executable, str(BENCHMARKS / "tables.py"), "--results", str(results)]
        command += ["--readme", str(readme), "--front-page", str(front)]
        return subprocess.run([*command, *options], capture_output=True, text=True).returncode

    assert run("--check") == 1
    assert run() == 0
    assert run("--check") == 0
    rest = f"before\n{tables.BEGIN}\n{tables.NONE_YET}\n{tables.END}\nafter\n"
    assert readme.read_text() == rest
    assert front.read_text() == headlines + rest


def test_front_page_has_a_table_of_the_cases_for_each_device(tmp_path):
    for device, rate in (("NVIDIA H100", 19_000.0), ("NVIDIA H200", 27_000.0)):
        results_log.append([line("bench256_out_tok_s", [rate], limit=38_000, device=device)], tmp_path)
        results_log.append([line("host_gap_frac", [0.1], "1", device=device)], tmp_path)
    results_log.append([line("vllm/bench256_out_tok_s", [15_000.0], device="NVIDIA H100")], tmp_path)
    first, second = tables.render_front_page(tmp_path).split("\n\n")
    today = line("", [0.0])["date"]
    assert cells(first, "one") == [f"one NVIDIA H100, {today}: output tok/s", "nanovllm-jax", "vllm", "of the limit"]
    assert cells(first, "nano-vLLM's benchmark: 256")[1:] == ["19,000", "15,000", "50%"]
    assert cells(second, "nano-vLLM's benchmark: 256")[1:] == ["27,000", "71%"]
    assert "host_gap" not in first


def test_beside_another_engine_stands_what_ran_with_it(tmp_path):
    results_log.append([line("single_out_tok_s", [1.0]), line("single_out_tok_s", [2.0], commit="later")], tmp_path)
    for value, commit in ((20_000.0, "alone"), (28_000.0, "together"), (29_000.0, "later")):
        results_log.append([line("bench256_out_tok_s", [value], commit=commit)], tmp_path)
    results_log.append([line("vllm/bench256_out_tok_s", [23_000.0], commit="together")], tmp_path)
    assert cells(tables.render_front_page(tmp_path), "nano-vLLM's benchmark: 256")[1:3] == ["28,000", "23,000"]
    assert cells(tables.render_front_page(tmp_path), "one stream, 128 in, 512 out")[1] == "2"
    assert cells(tables.render(tmp_path), "`bench256_out_tok_s`")[2:4] == ["29,000", "23,000"]


def test_a_later_run_at_the_commit_of_another_engines_does_not_stand_beside_it(tmp_path):
    for command, values in (("both", {"": 900.0, "vllm/": 400.0}), ("alone", {"": 1000.0})):
        for engine, value in values.items():
            entry = line(f"{engine}shared_prefix_tok_s", [value]) | {"command": command}
            results_log.append([entry], tmp_path)
    assert cells(tables.render_front_page(tmp_path), "100 prompts of 512, of which")[1:3] == ["900", "400"]


def test_headlines_are_a_few_cases_of_one_device(tmp_path):
    for name in (*tables.FRONT_FIGURES, "host_gap_frac"):
        results_log.append([line(name, [2.0], device=tables.HEADLINE_DEVICE)], tmp_path)
        results_log.append([line(name, [1.0], device="NVIDIA H100")], tmp_path)
    _, _, *rows = tables.render_headlines(tmp_path).splitlines()
    assert len(rows) == len(tables.HEADLINES)
    assert all("| 2 |" in row for row in rows)


def test_readme_shows_what_is_recorded():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "tables.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_missing_markers_are_an_error():
    with pytest.raises(SystemExit, match="needs the markers"):
        tables.between_markers("no markers", "table")
