"""A judge behind an endpoint on this machine, with the faults that judges have."""

import http.server
import json
import threading

import numpy as np
import pytest

from sftjax.assess import judge
from sftjax.errors import ConfigError
from sftjax.synth.teacher import UrlTeacher


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Says what `server.rule` makes of (answer A, answer B)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        text = body["messages"][-1]["content"]
        first, second = text.split("# Answer A\n\n")[1].split("\n\n# Which")[0].split("\n\n# Answer B\n\n")
        answer = {"choices": [{"message": {"content": self.server.rule(first, second)}, "finish_reason": "stop"}]}
        payload = json.dumps(answer).encode()
        self.send_response(200 if body["model"] == "judge" else 404)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.requests, server.rule = [], lambda first, second: "[[tie]]"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def compare(endpoint, rule, ours, theirs):
    endpoint.rule = rule
    asking = judge.Judge(UrlTeacher(f"http://127.0.0.1:{endpoint.server_port}/v1", "judge"))
    return asking.compare([f"Question {number}" for number in range(len(ours))], ours, theirs)


def longer_wins(first, second):
    return "Hm. [[A]]? No:\n[[B]]" if len(second) > len(first) else "[[A]]"


def test_each_pair_is_asked_in_both_orders(endpoint):
    verdicts = compare(endpoint, longer_wins, ["long answer", "x"], ["short", "longer"])
    assert [verdict.score for verdict in verdicts] == [1.0, 0.0]
    assert verdicts[0].said == ("ours", "ours") and verdicts[1].longer == -5
    asked = sorted(request["messages"][-1]["content"] for request in endpoint.requests)
    assert len(asked) == 4 and all(f"Question {number // 2}" in text for number, text in enumerate(asked))
    assert {request["temperature"] for request in endpoint.requests} == {0.0}


def test_a_judge_that_always_likes_the_first_answer_says_nothing(endpoint):
    verdicts = compare(endpoint, lambda first, second: "[[A]]", ["one", "two", "three"], ["a", "b", None])
    assert [verdict and verdict.score for verdict in verdicts] == [0.5, 0.5, None]
    figures = judge.summary(verdicts)
    assert figures["win_rate"]["mean"] == 0.5 and figures["changed_with_order"] == 1.0
    assert (figures["won"], figures["tied"], figures["lost"], figures["unclear"]) == (0, 2, 0, 1)
    assert "100% changed with the order" in judge.in_words(figures | {"model": "judge", "against": "base"})


def test_unclear_verdicts_are_left_out(endpoint):
    def once(first, second):
        return "[[B]]" if second == "ours" else "I can't say [A]"

    assert compare(endpoint, once, ["ours"], ["theirs"])[0] == judge.Verdict(1.0, ("unclear", "ours"), -2)
    assert compare(endpoint, lambda first, second: "", ["ours"], ["theirs"]) == [None]
    assert np.isnan(judge.summary([None])["win_rate"]["mean"])


def test_a_wrong_name_is_one_clear_error(endpoint):
    teacher = UrlTeacher(f"http://127.0.0.1:{endpoint.server_port}/v1", "nobody")
    with pytest.raises(ConfigError, match="refuses the request, HTTP 404"):
        judge.Judge(teacher).compare(["?"], ["a"], ["b"])


def test_the_win_rate_at_equal_length_sees_through_length():
    """A judge of known taste: P(win) = sigmoid(quality + 2 tanh(length)), our answers mostly the longer ones."""
    rng = np.random.default_rng(0)
    for quality in (-1.0, 0.0, 1.0):
        longer = rng.normal(300, 200, 4000)
        spread = np.sqrt(np.mean(longer**2))
        chance = 1 / (1 + np.exp(-(quality + 2 * np.tanh(longer / spread))))
        scores = (rng.random(4000) < chance).astype(float)
        assert abs(judge.equal_length_rate(scores, longer) - 1 / (1 + np.exp(-quality))) < 0.05
        assert scores.mean() > 1 / (1 + np.exp(-quality)) + 0.05  # what the plain rate would have claimed
    assert judge.equal_length_rate(np.array([1.0, 0.0]), np.zeros(2)) == pytest.approx(0.5)
    assert 0.9 < judge.equal_length_rate(np.ones(20), np.ones(20) * 5) < 1  # won throughout: finite all the same
