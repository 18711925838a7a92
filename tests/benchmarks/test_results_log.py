from results_log import without_places


def test_commands_are_recorded_without_paths_of_the_machine():
    given = ["--engine", "vllm", "--pythonpath", "vllm=/opt/a:/opt/b", "--record", "/tmp/out", "--model-dir=/tmp/m"]
    given += ["--case", "single", "--commit", "abc", "--repeats=3", "--record=/tmp/out"]
    expected = ["--engine", "vllm", "--record", "--case", "single", "--repeats=3", "--record"]
    assert without_places(given) == expected
    assert without_places(["--record", "--quick", "--plot", "a.png"]) == ["--record", "--quick"]
