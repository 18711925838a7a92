from nanovllm_jax.errors import RequestError


def said(llm):
    return [bytes(prompt["prompt_token_ids"]).decode() for prompt in llm.prompts]


def test_each_line_of_a_pipe_is_a_turn_that_remembers_the_last(cli, fakes):
    result = cli("chat --system Be.", input="hello\nagain\n")
    assert result.exit_code == 0
    assert result.stdout == " HELLO\n AGAIN\n"
    assert said(fakes.llm) == [
        "<system>Be.<user>hello<assistant>",
        "<system>Be.<user>hello<assistant> HELLO<user>again<assistant>",
    ]
    assert fakes.llm.closed


def test_commands_reset_change_the_system_prompt_and_exit(cli, fakes):
    result = cli("chat", input="a\n/reset\nb\n/system Sing.\nc\n/exit\nd\n")
    assert result.exit_code == 0
    assert said(fakes.llm) == ["<user>a<assistant>", "<user>b<assistant>", "<system>Sing.<user>c<assistant>"]


def test_ctrl_c_stops_the_reply_and_keeps_what_was_said(cli, fakes):
    fakes.behaviour = {"interrupt_after": 4}
    result = cli("chat", input="hello\nmore\n")
    assert result.exit_code == 0
    assert result.stdout == " HE\n MO\n"
    assert "stopped" in result.stderr
    assert said(fakes.llm)[1] == "<user>hello<assistant> HE<user>more<assistant>"
    assert fakes.llm.aborted == 2


def test_refused_turn_is_dropped_and_the_session_goes_on(cli, fakes):
    fakes.behaviour = {"error": RequestError("the prompt is too long.")}
    result = cli("chat", input="a\nb\n")
    assert result.exit_code == 0
    assert result.stderr.count("error: the prompt is too long.") == 2
    assert result.stdout == ""


def test_model_without_a_chat_template_is_refused(cli, fakes, monkeypatch):
    monkeypatch.setattr(type(fakes.make().get_tokenizer()), "chat_template", None)
    result = cli("chat", input="a\n")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
