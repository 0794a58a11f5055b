import threading
import time

import pytest

from sftjax.errors import ConfigError, StorageError
from sftjax.synth.teacher import Sampling, UrlTeacher, seed_of
from tests.synth.fakes import completion, server

ASK = [[{"role": "user", "content": f"question {number}"}] for number in range(6)]


def test_answers_come_in_order_whatever_the_server_does(monkeypatch):
    bodies, now, most = [], 0, 0
    lock = threading.Lock()

    def respond(path, body):
        nonlocal now, most
        with lock:
            bodies.append((path, body))
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.02 * (int(body["messages"][0]["content"][-1]) % 3))
        with lock:
            now -= 1
        return completion(body, f"to {body['messages'][0]['content']}", "length")

    monkeypatch.setenv("SOME_KEY", "secret")
    with server(respond) as url:
        teacher = UrlTeacher(url, "m", api_key_env="SOME_KEY", concurrency=3)
        replies = teacher.chat(ASK, Sampling(0.5, 0.9, 7, ("END",)), seed=3, n=2)
    assert [reply.text for reply in replies] == [f"to question {k // 2}" for k in range(12)]
    assert all(reply.cut for reply in replies)
    assert 1 < most <= 3
    path, body = bodies[0]
    assert path == "/v1/chat/completions" and body["_authorization"] == "Bearer secret"
    wanted = {"model": "m", "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["END"]}
    assert {key: body[key] for key in wanted} == wanted
    assert len({body["seed"] for _, body in bodies}) == 12, "each request has a seed of its own"


def test_texts_are_continued():
    with server(lambda path, body: completion(body, f"{path} {body['prompt']}")) as url:
        (reply,) = UrlTeacher(url, "m").complete(["<|im_start|>user\n"], Sampling(), seed=0)
    assert reply.text == "/v1/completions <|im_start|>user\n" and not reply.cut


def test_what_may_go_away_is_tried_again():
    failures, waits = iter([(503, {}), (429, {"Retry-After": "7"}), (200, {})]), []

    def respond(path, body):
        status, headers = next(failures)
        return completion(body, "there") if status == 200 else (status, headers, {"error": {"message": "busy"}})

    with server(respond) as url:
        (reply,) = UrlTeacher(url, "m", wait=waits.append).chat(ASK[:1], Sampling(), seed=0)
    assert reply.text == "there"
    assert 0.5 <= waits[0] <= 1 and waits[1] == 7


def test_a_server_that_stays_away_is_named():
    with server(lambda *_: (500, {}, {"error": "out of order"})) as url:
        with pytest.raises(StorageError, match=r"no answer after 3 attempts \(HTTP 500: out of order\)"):
            UrlTeacher(url, "m", retries=2, wait=lambda _: None).chat(ASK[:1], Sampling(), seed=0)
        gone = UrlTeacher(url, "m", retries=0)
    with pytest.raises(StorageError, match="refused"):
        gone.chat(ASK[:1], Sampling(), seed=0)


def test_a_request_that_is_wrong_is_not_repeated():
    asked = []

    def respond(path, body):
        asked.append(body)
        return 404, {}, {"error": {"message": "no model m"}}

    with server(respond) as url, pytest.raises(ConfigError, match="HTTP 404: no model m"):
        UrlTeacher(url, "m", concurrency=1).chat(ASK[:1], Sampling(), seed=0)
    assert len(asked) == 1


def test_an_answer_of_another_protocol_is_refused():
    with server(lambda *_: (200, {}, {"text": "hi"})) as url, pytest.raises(ConfigError, match="no choices"):
        UrlTeacher(url, "m").chat(ASK[:1], Sampling(), seed=0)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="http"):
        UrlTeacher("localhost:8000", "m")
    with pytest.raises(ConfigError, match="password"):
        UrlTeacher("http://me:secret@localhost", "m")
    with pytest.raises(ConfigError, match="concurrency"):
        UrlTeacher("http://localhost", "m", concurrency=0)


def test_seeds_of_parts_differ_and_stay():
    assert len({seed_of(seed, part) for seed in range(20) for part in range(20)}) == 400
    assert seed_of(1, "a") == seed_of(1, "a") < 2**32
