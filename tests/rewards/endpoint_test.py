import http.server
import json
import threading
import time

import pytest

from ftjax.rewards import REWARDS, Endpoint, EndpointError


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        status, headers, text = self.server.replies.pop(0) if self.server.replies else (200, {}, said(body["messages"][0]["content"]))
        if status == "hang":
            time.sleep(1.0)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


CUT = (200, {"Transfer-Encoding": "chunked"}, "10\r\n{")
"""An answer that breaks off in the middle."""


def said(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.replies, server.block_on_close = [], [], True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        yield server
        server.shutdown()


def test_answers_come_in_the_order_of_the_questions_with_the_key_of_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    questions = [f"é{n}" for n in range(20)]
    assert Endpoint(server.url + "/", "m", key_variable="JUDGE_KEY").ask(questions) == questions
    path, key, body = server.seen[0]
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer abc", "m", 0.0)
    assert Endpoint(server.url, "m").ask([]) == []


@pytest.mark.parametrize(
    "reply", [(503, {}, "busy"), (429, {"Retry-After": "0"}, ""), (200, {}, "no json"), (200, {}, '{"choices": []}'), ("hang", {}, ""), CUT]
)
def test_what_may_pass_is_tried_again(server, reply):
    server.replies = [reply]
    assert Endpoint(server.url, "m", pause=0.0, timeout=0.5).ask(["q"]) == ["q"]
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "replies, tries, why",
    [
        ([(401, {}, "no such key")], 1, "401.*no such key"),
        ([(302, {"Location": "http://127.0.0.1:9/"}, "")], 1, "302"),
        ([(500, {}, "broken")] * 3, 3, "3 tries: 500.*broken"),
        ([(200, {}, said(None))] * 3, 3, "not a string"),
    ],
)
def test_what_does_not_is_an_error_that_says_why_and_not_the_key(server, monkeypatch, replies, tries, why):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    server.replies = list(replies)
    with pytest.raises(EndpointError, match=why) as error:
        Endpoint(server.url, "m", pause=0.0, key_variable="JUDGE_KEY").ask(["q"])
    assert len(server.seen) == tries and "abc" not in str(error.value)


def test_a_server_that_is_not_there_a_key_that_is_not_set_and_a_url_that_is_none():
    with pytest.raises(EndpointError, match="2 tries"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1, pause=0.0).ask(["q"])
    with pytest.raises(EndpointError, match="NOT_SET_ANYWHERE"):
        Endpoint("http://127.0.0.1:9/v1", "m", key_variable="NOT_SET_ANYWHERE").ask(["q"])
    with pytest.raises(ValueError, match="http"):
        Endpoint("file:///etc/passwd", "m")


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, {"max_tokens": 256, "temperature": 0.0}),
        ({"temperature": None}, {"max_tokens": 256}),
        ({"max_tokens": None, "temperature": None, "body": {"max_completion_tokens": 9}}, {"max_completion_tokens": 9}),
    ],
)
def test_what_an_endpoint_refuses_to_hear_is_left_out(server, options, wanted):
    server.replies = [(200, {}, said("Grade: 10"))] * 2
    assert REWARDS["endpoint_judge"](["p"], ["c"], url=server.url, model="m", **options) == [1.0]
    assert Endpoint(server.url, "m", **options).ask(["q"]) == ["Grade: 10"]
    for _, _, sent in server.seen:
        assert {name: value for name, value in sent.items() if name not in ("model", "messages")} == wanted


def test_a_judge_behind_an_endpoint(server):
    server.replies = [(200, {}, said("Grade: 10"))]
    assert REWARDS["endpoint_judge"](["p"], ["c"], url=server.url, model="m") == [1.0]
