"""Templates: what the built-in ones write, the sandbox, and the proof that a template only appends."""

import multiprocessing
import resource
import time

import jinja2
import pytest

from sftjax.data import templates
from sftjax.data.rendering import MARK, Renderer, holds_mark
from sftjax.data.sandbox import TemplateError
from tests.data.tiny import CHATML, chat

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DRAWN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n|<|im_start|>assistant\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]|",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>"
    "\n\nV<|eot_id|>|<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n|<|assistant|>\n",
    "gemma": "<s><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
    "<start_of_turn>user\nV<end_of_turn>\n|<start_of_turn>model\n",
    "mistral": "<s>[INST] S\n\nU [/INST] A</s>[INST] V [/INST]|",
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n|### Response:\n",
    "six": "<SOT>S<EOT><SOU>U<EOU><SOA>A<EOA><SOU>V<EOU>|<SOA>",
}
MESSAGES = chat("U", "A", "V", system="S")


@pytest.mark.parametrize("name", list(templates.BUILTIN))
def test_built_in_templates_write_what_is_drawn(name):
    renderer = Renderer(templates.builtin(name).text, TOKENS)
    whole = renderer.render(MESSAGES)
    prompted = renderer.render(MESSAGES, generation=True)
    assert prompted.startswith(whole)
    assert f"{whole}|{prompted[len(whole) :]}" == DRAWN[name]  # the bar stands where the generation prompt begins
    assert renderer.append_only


@pytest.mark.parametrize("name", list(templates.BUILTIN))
def test_built_in_templates_refuse_what_they_can_not_write(name):
    renderer = Renderer(templates.builtin(name).text, TOKENS)
    for message in ({"role": "tool", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}):
        with pytest.raises(TemplateError, match="this template"):
            renderer.render([*chat("U"), message])


LLAMA3_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|system|>" + system_message }}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.first %}{{- raise_exception('no') }}{% endif %}
    {%- for part in message.parts %}{{ part }}{% if not loop.last %}, {% endif %}{% endfor %}
    {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""
PREVIOUS = (
    "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role != ns.last %}<{{ m.role }}>{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% set ns.last = m.role %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNPROVABLE = {
    "looks at the end": "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
    "counts": "{% for m in messages %}{{ m.content }}{{ loop.length }}{% endfor %}",
    "counts from the end": "{% for m in messages %}{{ m.content }}{{ loop.revindex }}{% endfor %}",
    "looks ahead": "{% for m in messages %}{{ m.content }}{{ messages[loop.index0 + 1].role }}{% endfor %}",
    "looks at the last": "{% for m in messages %}{{ m.content }}{{ messages[-1].role }}{% endfor %}",
    "looks behind the loop": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].role }}",
    "measures first": "{% set n = messages|length %}{% for m in messages %}{{ n }}{{ m.content }}{% endfor %}",
    "searches first": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}{% for m in messages %}{{ m }}{% endfor %}",
    "is asked inside": "{% for m in messages %}{{ m.content }}{% if add_generation_prompt %}!{% endif %}{% endfor %}",
    "stops": "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "filters": "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
    "hides the list": "{% set a = [messages] %}{% for m in messages %}{{ a[0][-1].content }}{% endfor %}",
    "hides the loop": "{% for m in messages %}{% set l = loop %}{{ m.content }}{{ l.last }}{% endfor %}",
    "state behind": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = m.role %}{% endfor %}{{ n.x }}",
    "two loops": "{% for m in messages %}{{ m.role }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "in a macro": "{% macro f() %}{{ messages|length }}{% endmacro %}{% for m in messages %}{{ f() }}{% endfor %}",
    "no loop": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("text", [CHATML, LLAMA3_LIKE, PREVIOUS, *(t(None).text for t in templates.BUILTIN.values())])
def test_pieces_of_a_proved_template_are_its_prefixes(text):
    renderer = Renderer(text, TOKENS)
    assert renderer.append_only
    for messages in (chat("U", "A", "V", "B", system="S"), chat("U", "A </think> x", " V\n", "B")):
        pieces = renderer.pieces(messages)
        assert pieces.text == renderer.render(messages) and pieces.text.endswith(pieces.tail)
        for k in range(1, len(messages) + 1):
            end = pieces.ends[k - 1 - pieces.first] if k > pieces.first else pieces.begin
            assert renderer.render(messages[:k]) == pieces.text[:end] + pieces.tail
            assert renderer.render(messages[:k], generation=True) == pieces.text[:end] + pieces.prompt
    assert holds_mark(chat(f"U{MARK}", "A")) and not holds_mark(chat("U", "A"))


@pytest.mark.parametrize("text", UNPROVABLE.values(), ids=UNPROVABLE.keys())
def test_templates_that_may_look_ahead_are_not_proved(text):
    assert not Renderer(text, TOKENS).append_only


def test_rendering_equals_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    from tests.data.tiny import byte_level

    hf = PreTrainedTokenizerFast.from_pretrained(byte_level(tmp_path))
    features = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n<{{ m.content | tojson }}>\n{% else %}\n"
        "{{- dict(a=1, b=m.content) | tojson(indent=2) }}{% continue %}{% endif %}\n{% endfor %}\n"
        "{% if tools is not none %}{{ tools }}{% endif %}{{ 'é<&>' | tojson }}"
    )
    for text in (CHATML, LLAMA3_LIKE, PREVIOUS, features):
        renderer = Renderer(text, {k: v for k, v in hf.special_tokens_map.items() if isinstance(v, str)})
        for messages in (chat("U <b>", "A é"), chat("U", "A", "V", system="S")):
            for generation in (False, True):
                try:
                    theirs = hf.apply_chat_template(
                        messages, chat_template=text, tokenize=False, add_generation_prompt=generation
                    )
                except jinja2.exceptions.TemplateError:
                    with pytest.raises(TemplateError):
                        renderer.render(messages, generation=generation)
                    continue
                assert renderer.render(messages, generation=generation) == theirs


def test_text_of_another_end_of_turn():
    assert templates.with_end_of_turn("{{ 'x<E>' }}", "<E>", "<F>") == "{{ 'x<F>' }}"
    text = templates.with_end_of_turn("{{ 'x' + eos_token }}", "<E>", "<F>")
    assert Renderer(text, {"eos_token": "<E>"}).render([]) == "x<F>"


PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ (messages|attr('append'))(1) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '%(a)s'.__mod__({}).__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 90000 %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "{% for a in range(999999999999) %}{% endfor %}",
    "{{ 'a' * 2000000000 }}",
    "{{ 2000000000 * 'a' }}",
    "{{ [0] * 2000000000 }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ 'a'.center(2000000000) }}",
    "{{ 'a'.zfill(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a' | indent(2000000000) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{% set a = 'a' * 90000 %}{% set b = a.replace('a', a) %}{{ b.replace('a', a) }}",
    "{% set ns = namespace(x='a' * 90000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a' * 90000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 1 / 0 }}",
    "{% if %}",
    "{{ undefined_thing.x }}",
    "x" * 2_000_000,
]


def _render_payload(text: str, queue) -> None:
    limit = 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (8, 8))
    start = time.process_time()
    try:
        outcome = "text " + Renderer(text, TOKENS).render(chat("U", "A"))[:200]
    except TemplateError as error:
        outcome = f"refused {error}"
    except BaseException as error:  # the point of the test: nothing else may come out
        outcome = f"{type(error).__name__} {error}"
    queue.put((text, outcome, time.process_time() - start))


def _render_payloads(queue) -> None:
    """In a process without threads, which is safe to fork: one more process for each payload."""
    context = multiprocessing.get_context("fork")
    for payload in PAYLOADS:
        process = context.Process(target=_render_payload, args=(payload, queue))
        process.start()
        process.join()


def test_hostile_templates_are_refused_within_limits():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    parent = context.Process(target=_render_payloads, args=(queue,))
    parent.start()
    for _ in PAYLOADS:
        text, outcome, seconds = queue.get(timeout=60)
        assert outcome.startswith("refused") or outcome == "text ", (text[:80], outcome[:300])
        assert seconds < 2, (text[:80], seconds)
        assert len(outcome) < 500
    parent.join()
