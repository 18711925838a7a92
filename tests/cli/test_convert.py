from nanovllm_jax import weights
from nanovllm_jax.errors import ConfigError


def test_arguments_reach_the_conversion(cli, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(weights, "convert", lambda *arguments: calls.append(arguments))
    result = cli(f"convert model.gguf {tmp_path / 'a'} --dtype bfloat16")
    assert result.exit_code == 0, result.output
    assert cli(f"convert model.gguf {tmp_path / 'b'}").exit_code == 0
    assert calls == [("model.gguf", tmp_path / "a", "bfloat16"), ("model.gguf", tmp_path / "b", None)]
    assert f"--model {tmp_path / 'a'}" in result.stderr


def test_model_that_is_not_found_is_one_line(cli, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise ConfigError("model 'x' is not found.")

    monkeypatch.setattr(weights, "convert", refuse)
    result = cli(f"convert x {tmp_path / 'a'}")
    assert (result.exit_code, result.stderr) == (2, "error: model 'x' is not found.\n")
