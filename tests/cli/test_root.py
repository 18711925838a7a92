import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_imports_neither_jax_nor_transformers():
    done = run(
        "import sys\n"
        "from nanovllm_jax.cli import main\n"
        "sys.argv = ['nanovllm-jax', 'generate', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    print({'jax', 'transformers', 'numpy'} & {*sys.modules})\n"
    )
    assert done.returncode == 0, done.stderr
    assert "nanovllm-jax generate --model smollm2" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_each_command_shows_examples(cli):
    for command in ("generate", "chat", "convert", "bench throughput"):
        result = cli(f"{command} --help")
        assert result.exit_code == 0
        assert "Examples" in result.stdout
        assert f"nanovllm-jax {command}" in result.stdout


def test_version_is_printed(cli):
    assert cli("--version").stdout.startswith("nanovllm-jax ")


def test_unknown_option_is_a_usage_error(cli):
    result = cli("generate a --temprature 1")
    assert result.exit_code == 2
    assert "--temprature" in result.stderr


@pytest.mark.parametrize("command", ["inspect --no-weights --html", "inspect --json", "run-batch pyproject.toml -o"])
def test_a_folder_that_is_missing_is_told_before_the_work(cli, command):
    result = cli(f"{command} missing/out")
    assert result.exit_code == 2
    assert "the folder missing does not exist" in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["serve /no/such", "serve -m /no/such", "chat -m /no/such", "inspect ./none.gguf"])
def test_a_missing_model_is_told_before_jax_is_imported(cli, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it raises
    result = cli(command)
    assert (result.exit_code, "no such file or directory" in result.stderr) == (2, True)


def test_help_of_serve_says_which_requests_slow_all_rows(cli):
    assert "one token instead of several" in " ".join(cli("serve --help").stdout.split())
