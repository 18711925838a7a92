"""The page at `/` in a real browser."""

from __future__ import annotations

import re
import threading

import pytest
from browser import Watched, chromium  # noqa: F401
from live_server import serving, wait_until, wait_until_idle
from playwright.sync_api import expect


@pytest.fixture
def watched(chromium, served):  # noqa: F811
    with Watched(chromium) as watched:
        watched.page.goto(served.url)
        yield watched
    assert watched.errors == []
    assert {url.split("/")[2] for url in watched.requests} == {served.url.split("/")[2]}


def ask(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


@pytest.fixture
def held(served, monkeypatch):
    """The engine stops after a few steps until this event is set."""
    dispatch, event, steps = served.llm._engine.replicas[0].runner.dispatch, threading.Event(), iter(range(6))

    def dispatch_some(schedule):
        if next(steps, None) is None:
            event.wait(60)
        return dispatch(schedule)

    monkeypatch.setattr(served.llm._engine.replicas[0].runner, "dispatch", dispatch_some)
    yield event
    event.set()


def test_tokens_stream_in_and_the_conversation_goes_on(watched, held):
    page = watched.page
    expect(page.locator("#model")).to_have_text("tiny")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Seed").fill("1")  # an answer that does not end at once
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    ask(page, "Who art thou?")
    expect(page.locator(".streaming .text")).not_to_be_empty()
    begun = page.locator(".assistant .text").text_content()
    held.set()
    expect(page.locator(".assistant .note")).to_have_text(re.compile(r"\d+ tokens?.* · first after [\d.]+ m?s"))
    answer = page.locator(".assistant .text").text_content()
    assert answer.startswith(begun)
    assert len(answer) > len(begun)
    ask(page, "And now?")
    expect(page.locator(".assistant .note").nth(1)).to_have_text(re.compile("token"))
    assert [turn["role"] for turn in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][1]["content"] == answer
    assert (bodies[1]["max_tokens"], bodies[1]["temperature"]) == (40, 0.7)
    assert "top_k" not in bodies[1]
    expect(page.locator("#figure-ttft")).to_have_text(re.compile(r"[\d.]+ m?s"))
    expect(page.locator("#health")).to_have_text("running")


def test_stop_ends_the_request(watched, served, held):
    page = watched.page
    before = served.llm.stats.num_finished["abort"]
    page.get_by_label("Seed").fill("1")
    ask(page, "Tell me all.")
    expect(page.locator(".streaming .text")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".assistant .note")).to_have_text(re.compile("stopped"))
    wait_until(lambda: served.llm.num_unfinished == 0)
    held.set()
    wait_until_idle(served)
    assert served.llm.stats.num_finished["abort"] == before + 1
    assert page.locator(".assistant .text").text_content()
    expect(page.locator("#send")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_an_error_is_shown_and_the_narrow_page_has_its_settings(chromium, served):  # noqa: F811
    with Watched(chromium, width=400, height=800, dark=True) as watched:
        page = watched.page
        page.goto(served.url)
        expect(page.locator("#panel")).to_be_hidden()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("5000")
        page.get_by_role("button", name="Chat", exact=True).click()
        ask(page, "Hi")
        expect(page.locator(".failed .text")).to_contain_text("max_model_len is 256")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 400


def test_the_page_asks_for_the_key(chromium, llm):  # noqa: F811
    with serving(llm, api_keys=("secret",)) as guarded, Watched(chromium) as watched:
        page = watched.page
        page.goto(guarded.url)
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_label("Max tokens").fill("3")
        ask(page, "Hi")
        expect(page.locator(".assistant .note")).to_have_text(re.compile("3 tokens"))
