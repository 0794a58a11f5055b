"""`tools/serve.py` as its users meet it: OpenAI's own client, many at once, a browser, signals."""

import asyncio
import concurrent.futures
import contextlib
import math
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from sftjax import loading, tree
from sftjax.generate.sample import Generator
from sftjax.models import decoder
from sftjax.peft import lora
from sftjax.peft.spec import AdapterSpec
from sftjax.weights import peft_format
from tests import browser, tiny_run

WHY = "needs the extra serve, and openai"
openai = pytest.importorskip("openai", reason=WHY)
httpx = pytest.importorskip("httpx", reason=WHY)
pytest.importorskip("starlette", reason=WHY)
pytest.importorskip("uvicorn", reason=WHY)

MESSAGES = [{"role": "user", "content": "the cat sees the dog"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and an adapter that changes what it says."""
    home = tmp_path_factory.mktemp("served")
    base = tiny_run.model(home / "base")
    opened = loading.open_model(str(base))
    params = loading.load_base(opened, opened.config, "float32", None)["params"]
    spec = AdapterSpec(method="lora", rank=2, alpha=4.0)
    adapter = lora.init(jax.random.key(1), params, spec)
    adapter = tree.map_paths(lambda path, leaf: leaf + 0.2 if path.endswith("lora_B") else leaf, adapter)
    peft_format.save_adapter(home / "adapter", adapter, spec, opened.config, layout="plain")
    return base, home / "adapter"


def said(errors) -> list[str]:
    """What a server wrote on stderr beside the names of its phases."""
    return [line for line in errors.read_text().splitlines() if not re.fullmatch(r"[a-z ]+: [\d.]+ s", line)]


@contextlib.contextmanager
def serving(folders, log, *flags):
    """A server as a child process; its address, and the process."""
    command = [sys.executable, "tools/serve.py", "--model", str(folders[0]), "--adapter", f"tuned={folders[1]}"]
    command += ["--port", "0", "--batch_size", "4", *flags]
    with open(log, "w") as errors:
        child = subprocess.Popen(
            command, cwd=tiny_run.ROOT, env=tiny_run.environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = child.stdout.readline()
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+)/  models: base, tuned\n", line)
        assert found, f"{line!r}\n{log.read_text()[-3000:]}"
        yield found[1], child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr"
    with serving(folders, log) as (url, child):
        yield url
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 0
        assert said(log) == []


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client, model="base", **changes):
    return client.chat.completions.create(**({"model": model, "messages": MESSAGES} | GREEDY | changes))


def test_models_are_listed(client, server):
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    assert client.models.retrieve("tuned").owned_by == "sftjax"
    idle = {"running": 0, "waiting": 0}
    assert httpx.get(f"{server}/health").json() == {"status": "ok", "models": {"base": idle, "tuned": idle}}


def test_answers_are_the_models(client, folders):
    """The same draws as without a server."""
    opened = loading.open_model(str(folders[0]))
    variables = loading.load_base(opened, opened.config, "float32", None)
    variables["adapter"] = peft_format.load_adapter(folders[1], opened.config)[0]
    generator = Generator(opened.config, decoder.Runtime(compute_dtype="float32"), variables, opened.tokenizer)
    drawn = generator.generate([MESSAGES], max_new_tokens=24, n=2, temperature=1.0, seed=5)
    settings = {"n": 2, "temperature": 1.0, "seed": 5}
    answer = chat(client, "tuned", **settings)
    assert [choice.message.content for choice in answer.choices] == [output.text for output in drawn]
    assert [choice.finish_reason for choice in answer.choices] == [output.finish_reason for output in drawn]
    assert answer.usage.completion_tokens == sum(len(output.tokens) for output in drawn)
    assert answer.usage.prompt_tokens == drawn[0].prompt_tokens
    base = chat(client, **settings)
    assert [choice.message.content for choice in base.choices] != [output.text for output in drawn]


@pytest.mark.parametrize("changes", [{}, {"n": 3, "temperature": 1.0, "seed": 1, "max_tokens": 40}], ids=["one", "n"])
def test_a_stream_says_the_same(client, changes):
    changes |= {"logprobs": True, "top_logprobs": 2}
    whole = chat(client, **changes)
    texts = ["" for _ in whole.choices]
    tokens, ends, pieces = [[] for _ in texts], {}, 0
    usage = None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **changes):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            pieces += bool(choice.delta.content)
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage and pieces > 2 * len(texts)


def test_stop_ends_an_answer_where_it_starts(client):
    free = chat(client, logprobs=True).choices[0]
    text, tokens = free.message.content, [entry.token for entry in free.logprobs.content]
    place = next(
        n for n in range(4, len(tokens)) if len(tokens[n]) > 2 and text.find(tokens[n]) > len("".join(tokens[: n - 1]))
    )
    stop = tokens[place]
    whole = chat(client, stop=[stop, "never said"], logprobs=True)
    assert whole.choices[0].message.content == text[: text.index(stop)]
    assert whole.choices[0].finish_reason == "stop" and whole.usage.completion_tokens == place + 1
    assert [entry.token for entry in whole.choices[0].logprobs.content] == tokens[:place]
    inside = chat(client, stop=stop[1:]).choices[0].message.content
    assert inside == text[: text.index(stop[1:])]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stop=stop, stream=True))
    assert streamed == whole.choices[0].message.content


def test_logprobs_are_in_order_and_belong_to_the_text(client):
    answer = chat(client, logprobs=True, top_logprobs=20)
    choice = answer.choices[0]
    stopped = choice.finish_reason == "stop"  # by a token that isn't in the text
    assert len(choice.logprobs.content) == answer.usage.completion_tokens - stopped
    for entry in choice.logprobs.content:
        values = [each.logprob for each in entry.top_logprobs]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.logprob == pytest.approx(values[0]) and sum(map(math.exp, values)) <= 1.001
    written = [entry for entry in choice.logprobs.content if entry.bytes]
    assert written and all(bytes(entry.bytes).decode() == entry.token for entry in written)
    assert all(entry.token in choice.message.content for entry in written)


def test_seeds_decide_the_draws(client):
    def drawn(**changes):
        choices = chat(client, temperature=1.2, top_p=0.95, **changes).choices
        return [choice.message.content for choice in choices]

    three = drawn(n=3, seed=-7)
    assert three == drawn(n=3, seed=-7) and len(set(three)) == 3
    assert drawn(seed=-7) == three[:1] != drawn(seed=8)
    assert drawn() != drawn()


def test_texts_are_completed(client):
    def complete(**changes):
        return client.completions.create(**({"model": "base", "prompt": "the red cat"} | GREEDY | changes))

    one, two = complete(prompt=["the red cat", "a small dog"], n=1).choices
    assert complete().choices[0].text == one.text and two.index == 1 and two.text != one.text
    told = complete(logprobs=3).choices[0].logprobs
    assert len(told.tokens) == 24 == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(len(top) <= 3 and token in top for token, top in zip(told.tokens, told.top_logprobs, strict=True))
    assert "".join(chunk.choices[0].text for chunk in complete(stream=True)) == one.text
    assert complete(prompt=[5, 6, 7], max_tokens=openai.NOT_GIVEN).usage.total_tokens == 3 + 16
    with pytest.raises(openai.BadRequestError, match="id 99999 has no row"):
        complete(prompt=[99999])


@pytest.mark.parametrize(
    "changes, error, param, code",
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"max_tokens": 5000}, openai.BadRequestError, "messages", "context_length_exceeded"),
        ({"messages": []}, openai.BadRequestError, "messages", "missing_required_parameter"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty", "unsupported_parameter"),
        ({"extra_body": {"beam": 2}}, openai.BadRequestError, "beam", "unknown_parameter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_input_gives_the_protocols_errors(client, changes, error, param, code, stream):
    with pytest.raises(error) as caught:
        chat(client, stream=stream, **changes)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error" and caught.value.body["message"]


def test_requests_that_are_none(server):
    url = f"{server}/v1/chat/completions"
    json = {"Content-Type": "application/json"}
    for answer, status in (
        (httpx.post(url, content="{", headers=json), 400),
        (httpx.post(url, content="[]", headers=json), 400),
        (httpx.post(url, content="{}"), 415),  # what a foreign page may send unasked
        (httpx.post(url, content=b" " * (17 << 20), headers=json), 413),
        (httpx.get(url), 405),
        (httpx.get(f"{server}/v2/models"), 404),
        (httpx.get(f"{server}/v1/models/none"), 404),
    ):
        assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server}/v1/models", headers={"Host": "elsewhere.example"}).status_code == 400


def test_fifty_at_once(server):
    """Streams and whole answers of both models; each is what the same request gives alone."""
    prompts = ["the cat", "a red tree and the old house", "dog", "new river", "under the small tree"]

    def request(number):
        question = [{"role": "user", "content": prompts[number % 5]}]
        settings = {"temperature": float(number % 2), "seed": number % 3, "max_tokens": 12}
        return {"model": ("base", "tuned")[number % 2], "messages": question} | settings

    async def ask(client, number):
        if number % 4:
            return (await client.chat.completions.create(**request(number))).choices[0].message.content
        chunks = await client.chat.completions.create(**request(number), stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=240) as client:
            crowd = await asyncio.gather(*(ask(client, number) for number in range(50)))
            alone = [await ask(client, number) for number in range(30)]  # every combination
        return crowd, alone

    crowd, alone = asyncio.run(everybody())
    assert crowd == [alone[number % 30] if number >= 30 else alone[number] for number in range(50)]
    assert len(set(alone)) > 15


def test_who_hangs_up_takes_no_place(client, server):
    stream = chat(client, stream=True, max_tokens=3000, temperature=1.0, seed=3)
    next(iter(stream))
    assert httpx.get(f"{server}/health").json()["models"]["base"]["running"] == 1
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        body = {"model": "base", "messages": MESSAGES, "max_tokens": 3000, "temperature": 1.0}
        httpx.post(f"{server}/v1/chat/completions", json=body, timeout=1.0)
    until = time.monotonic() + 30
    while httpx.get(f"{server}/health").json()["models"]["base"] != {"running": 0, "waiting": 0}:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_the_end_is_clean_with_answers_in_the_making(folders, tmp_path):
    with serving(folders, tmp_path / "stderr", "--grace", "600") as (url, child):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240)
        stream = iter(chat(client, stream=True, max_tokens=4000, temperature=1.0, seed=3))
        next(stream)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            whole = pool.submit(chat, client, max_tokens=4000, temperature=1.0, seed=4)
            short = pool.submit(chat, client, max_tokens=3)
            while sum(httpx.get(f"{url}/health").json()["models"]["base"].values()) < 2 and not short.done():
                time.sleep(0.02)
            child.send_signal(signal.SIGTERM)
            assert short.result().choices[0].finish_reason == "length"
            child.send_signal(signal.SIGTERM)  # the long ones have waited long enough
            with pytest.raises(openai.APIError, match="shutting down"):
                for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                whole.result()
            assert caught.value.status_code == 503
        assert child.wait(timeout=60) == 0
        with pytest.raises(openai.APIConnectionError):
            chat(client)
    assert said(tmp_path / "stderr") == []


def test_an_address_in_use_is_told_before_anything_is_loaded(server, folders):
    port = server.rsplit(":", 1)[1]
    command = [sys.executable, "tools/serve.py", "--model", str(folders[0]), "--port", port]
    done = tiny_run.run(command, code=78)
    assert f"can't listen on 127.0.0.1:{port}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_the_page_compares_two_models(server, client, tmp_path, size):
    with browser.open_page(server, tmp_path / "profile", size) as page:
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0  # nothing from elsewhere
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        answers = page.evaluate("""(async () => {
            const set = (name, value) => { document.getElementById(name).value = value; };
            set("temperature", 0); set("top_p", 1); set("max_tokens", 24); set("text", "the cat sees the dog");
            await send();
            return [...document.querySelectorAll(".side")].map(side => [
              side.querySelector("select").value,
              ...[...side.querySelectorAll(".said")].map(part => part.textContent),
            ]);
        })()""")
        said = [chat(client, model).choices[0].message.content for model in ("base", "tuned")]
        asked = MESSAGES[0]["content"]
        assert answers == [["base", asked, said[0]], ["tuned", asked, said[1]]]
        failed = page.evaluate("""(async () => {
            document.getElementById("clear").click();
            document.getElementById("max_tokens").value = 5000; document.getElementById("text").value = "<b>x</b>";
            await send();
            const failed = document.querySelectorAll(".said.failed");
            return [failed.length, failed[0].textContent, document.querySelectorAll(".said b").length,
                    document.getElementById("send").disabled];
        })()""")
        assert failed[0] == 2 and "don't fit into 4096" in failed[1] and failed[2:] == [0, False]
        stopped = page.evaluate("""(async () => {
            document.getElementById("clear").click();
            document.getElementById("max_tokens").value = 3000; document.getElementById("text").value = "go on";
            const done = send();
            const pause = () => new Promise(wake => setTimeout(wake, 20));
            while (!document.querySelector("#left .said.assistant").textContent) await pause();
            document.getElementById("stop").click();
            await done;
            return document.querySelector("#left .note").textContent;
        })()""")
        assert stopped == "stopped"


CONVERSATIONS = """
globalThis.sent = [];  // the messages of each request, by model
const plain = fetch;
globalThis.fetch = (address, options) => {
  const body = JSON.parse(options.body);
  sent.push([body.model, body.messages.map(message => [message.role, message.content])]);
  return globalThis.broken ? broken(options.signal) : plain(address, options);
};
globalThis.pause = () => new Promise(wake => setTimeout(wake, 10));
globalThis.begun = async name => { while (!said(name).at(-1)) await pause(); };
globalThis.ask = (text, longest) => { byId("max_tokens").value = longest; byId("text").value = text; return send(); };
globalThis.choose = (name, model) => {
  byId(name).querySelector("select").value = model;
  byId(name).querySelector("select").dispatchEvent(new Event("change"));
};
globalThis.said = name => [...byId(name).querySelectorAll(".said")].map(part => part.textContent);
globalThis.over = () => { byId("clear").click(); sent.length = 0; };
globalThis.started = text => `data: {"choices": [{"delta": {"content": "${text}"}}]}\\n\\n`;
"""
STREAMS_THAT_END_EARLY = {
    "the network": """() => new Response(new ReadableStream({
        start(stream) { stream.enqueue(new TextEncoder().encode(started("half"))); },
        pull(stream) { stream.error(new TypeError("network error")); },
    }))""",
    "the connection ended": """() => new Response(started("half"))""",
    "no answer": """() => Promise.reject(new TypeError("no answer"))""",
    "502": """() => new Response("<html>", {status: 502, statusText: "Bad Gateway"})""",
}


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with browser.open_page(server, tmp_path_factory.mktemp("profile")) as page:
        page.evaluate(CONVERSATIONS + "null")
        page.evaluate("(() => { byId('temperature').value = 0; choose('left', 'base'); choose('right', ''); })()")
        yield page


@pytest.mark.parametrize(
    "leave", ["byId('clear').click()", "choose('left', 'tuned')"], ids=["start over", "another model"]
)
def test_an_answer_that_is_left_writes_nothing(page, leave):
    """The next message begins a conversation, on the screen and in what the model is asked."""
    sent, said, busy = page.evaluate(f"""(async () => {{
        over(); choose("left", "base");
        const old = ask("the old question", 99);
        await begun("left");
        {leave};
        const free = !byId("send").disabled && byId("stop").disabled && byId("left").querySelector(".note").textContent;
        await ask("the cat", 4); await old; await ask("the dog", 4);
        return [sent, said("left"), free];
    }})()""")
    assert busy == ""
    assert sent[0][1] == [["user", "the old question"]] and sent[1][1] == [["user", "the cat"]]
    assert [role for role, _ in sent[2][1]] == ["user", "assistant", "user"]
    assert said[0] == "the cat" and said[2] == "the dog" and len(said) == 4 and sent[2][1][1][1] == said[1]


def test_another_model_on_one_side_leaves_the_other_alone(page):
    sent = page.evaluate("""(async () => {
        over(); choose("left", "base"); choose("right", "tuned");
        const old = ask("the old question", 99);
        await begun("right");
        choose("left", "tuned");
        await old; await ask("the cat", 4);
        choose("right", "");
        return sent.slice(2).map(([model, messages]) => messages.map(([role]) => role));
    })()""")
    assert sent == [["user"], ["user", "assistant", "user"]]


def test_stop_keeps_what_was_said_and_drops_what_was_not_answered(page):
    sent, said, notes, again = page.evaluate("""(async () => {
        over(); const notes = [];
        const note = () => notes.push(byId("left").querySelector(".note").textContent);
        const none = ask("never answered", 99);
        byId("stop").click();
        await none; note();
        const again = byId("text").value;
        const half = ask("half answered", 99);
        await begun("left"); byId("stop").click(); byId("stop").click();
        await half; note();
        await ask("the cat", 4);
        return [sent, said("left"), notes, again];
    })()""")
    assert notes == ["stopped: the model won't see this message again", "stopped"] and again == "never answered"
    assert sent[1][1] == [["user", "half answered"]]
    assert sent[2][1] == [["user", "half answered"], ["assistant", said[3]], ["user", "the cat"]] and said[3]


@pytest.mark.parametrize("reason", STREAMS_THAT_END_EARLY)
def test_an_answer_that_breaks_off_is_shown_and_not_remembered(page, reason):
    sent, failed, again = page.evaluate(f"""(async () => {{
        over();
        globalThis.broken = {STREAMS_THAT_END_EARLY[reason]};
        await ask("the cat", 4);
        globalThis.broken = null;
        const failed = byId("left").querySelector(".assistant.failed").textContent, again = byId("text").value;
        await send();
        return [sent, failed, again];
    }})()""")
    assert reason.removeprefix("the ").split()[0] in failed and again == "the cat"
    assert [messages for _, messages in sent] == [[["user", "the cat"]]] * 2


def test_a_message_is_sent_once(page):
    sent = page.evaluate("""(async () => {
        over();
        const one = ask("the cat", 4), two = ask("the cat", 4);
        byId("text").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
        await one; await two;
        return [sent.length, byId("text").value];
    })()""")
    assert sent == [1, "the cat"]
