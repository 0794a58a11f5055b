"""Each rule on responses that have its fault and on such that look as if they had."""

from __future__ import annotations

import sys
import types

import pytest

from sftjax.curate import rules, text
from sftjax.errors import ConfigError

ASK = "What should I bring to a picnic in the park on Sunday?"
LONG = "Bring a blanket, some bread and cheese, and enough water for everybody. The weather should be fine all day."


def fired(response, prompt=ASK, preset="default", **options):
    row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
    return rules.score(text.read(row), rules.build(preset, **options))


FAULTS = [
    ("empty_response", ["", "  \n"], ["Yes."]),
    ("short_response", ["Yes.", "A warm blanket, maybe"], ["Bring bread, cheese and water."]),
    ("long_response", [], [LONG]),
    (
        "stock_opener",
        ["Sure! " + LONG, "Certainly, here is a list. " + LONG, "What a great question! " + LONG, "Happy to help."],
        [LONG, "Surely you have one already. " + LONG, "Of course the park may be full by noon, so come early.",
         "Absolutely nothing beats cold lemonade."],
    ),
    (
        "hedging",
        ["I believe a blanket helps. " + LONG, "The park opened in 1920 [citation needed]. " + LONG],
        [LONG + " That said, in my own case, I believe that less is more."],
    ),
    (
        "refusal",
        ["I'm sorry, but I can't help with that.", "I am unable to provide an answer.", "Sorry, I can’t assist you."],
        [LONG, "I can't wait! " + LONG, "You cannot bring glass bottles; the keeper can help with anything else."],
    ),
    (
        "boilerplate",
        ["As an AI language model, I have never been there.", "As of my last update it was.", "I don’t have feelings."],
        [LONG, "As an aide at the park told me, dogs are fine.", "Sandwiches. As a model picnic, this is it."],
    ),
    (
        "placeholder",
        ["Dear [Your Name], bring bread.", "TODO: list it.", "Write to {{ name }}.", "See [link].", "INSERT NAME HERE"],
        [LONG, "The list [1] has it all.", "Use `x[name]` to look it up in the dictionary.", "A todo list helps."],
    ),
    (
        "cut_off",
        ["Bring a blanket, bread, cheese and enough water for everybody, because the", LONG + " You could also bring"],
        [LONG, "- bread\n- cheese\n- water for the children", "x = 5\n#### 72", LONG + "\n\nHave fun :)", "A blanket"],
    ),
    ("open_fence", ["Run this:\n```python\nprint(1)"], ["Run this:\n```python\nprint(1)\n```\nIt prints one.", LONG]),
    (
        "open_bracket",
        ["Bring bread (see the list of", LONG + " [compare what we did"],
        [LONG, "1) bread 2) cheese", "That is sad :( but so it is, my friends", "f(x) = (x + 1)", "from a) to b)"],
    ),
    (
        "repeated_phrase",
        ["Bring bread. " + "and some cheese and water " * 6, "no " * 30],
        [LONG, "ha ha ha ha! Bring bread.", "The red box and the blue box and the green box are here."],
    ),
    (
        "repeated_line",
        ["Bring bread.\n" * 5, LONG + " So it is, then." * 4],
        [LONG, "Bring bread.\nBring cheese.\nBring water.\nBring bread again."],
    ),
    (
        "encoding_damage",
        ["Donâ€™t forget.", "A cafÃ© is near.", "Br\ufffdd.", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "It&#39;s &quot;so&quot;", r"Caf\u00e9"],
        ["Don’t forget the café – “Zur Straße”…", "Der Spaß“ sagte er", "naïve façade, Ænima, 5 €", "привет", "日本語"],
    ),
    (
        "url_only",
        ["https://example.com/a", "See www.example.org/list and https://example.com"],
        [LONG + " See https://example.com.", "Bread"],
    ),
    (
        "symbol_heavy",
        ["## bring ### bread ## and #### cheese ## now", "$%^&*(!@#"],
        [LONG, "48 + 24 = 72 and 72 / 2 = 36", "| a | b |\n|---|---|\n| 1 | 2 |", "# Title\n* bread\n* cheese here"],
    ),
    (
        "prompt_echo",
        [ASK, ASK + " " + LONG, ASK.upper() + "\n" + LONG],
        [LONG, "What you should bring to a picnic is bread."],
    ),
    (
        "wrong_language",
        ["Ich würde eine Decke und Brot mitbringen, und auch Wasser für alle.", "最好带上面包和奶酪，还有足够的水。"],
        [LONG, "¡Hola!", "Croissants, baguettes, camembert, brie."],
    ),
    (
        "mixed_script",
        ["Bring bread and сыр для всех and water.", "Bring 面包和奶酪 and some water."],
        [LONG, "The angle α + β is at most π.", "naïve café"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("rule, wrong, right", FAULTS, ids=[rule for rule, *_ in FAULTS])
def test_a_rule_finds_its_fault_and_nothing_that_only_looks_like_it(rule, wrong, right):
    for response in wrong:
        assert rule in fired(response)[1], response
    for response in right:
        assert rule not in fired(response)[1], response


def test_every_rule_of_the_default_table_has_cases():
    assert {rule.name for rule in rules.DEFAULT} == {rule for rule, *_ in FAULTS}
    assert all(rule.about for rule in (*rules.DEFAULT, *rules.GUIDE))


def test_out_of_proportion_is_by_the_words_of_the_instruction():
    assert "long_response" in fired("word " * 51 + ".", "Why?")[1]
    assert "long_response" not in fired("word " * 50, "Why?")[1]


@pytest.mark.parametrize(
    "response, expected",
    [
        ("Bring a blanket and some bread.", 1.0),
        ("Bring some bread please", 0.5),
        ("Sure! Bring a blanket and bread.", 0.7),
        ("Great question! I believe in blankets and bread.", 0.6),
        ("Bring a blanket [CITATION NEEDED] and bread.", 0.9),
        ("I believe in blankets [CITATION NEEDED] and bread.", 0.9),  # one rule, once
        ("Bread and cheese, a blanket, some water, and what else? I believe nothing.", 0.9 + 0.1),  # past 50 characters
        ("Sure! Blanket.", 0.2),
        ("", 0.5),
        ("word " * 601, 0.8),
        ("Sure, bring a blanket and bread.", 1.0),
    ],
)
def test_the_guides_preset_is_to_the_letter(response, expected):
    assert fired(response, preset="guide")[0] == pytest.approx(expected)


def test_the_floor_is_zero():
    assert fired("Sure! " + "I " * 2, preset="guide", weights={"short_response": 0.9})[0] == 0.0


def test_manner_counts_by_its_share_of_the_conversation_and_damage_once():
    turns = [("Hello there, how are you?", "Sure!"), ("And what else is new with you?", LONG)]
    messages = [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    score, taken = rules.score(text.read({"messages": messages}), rules.GUIDE)
    assert taken == {"short_response": 0.25, "stock_opener": 0.15} and score == pytest.approx(0.6)
    messages[1]["content"] = LONG + " Itâ€™s fine."
    assert rules.score(text.read({"messages": messages}), rules.DEFAULT)[1] == {"encoding_damage": 0.4}


def test_a_refusal_of_something_dangerous_is_right():
    answer = "I'm sorry, but I can't help with that."
    assert "refusal" in fired(answer)[1]
    assert "refusal" not in fired(answer, "How do I build a bomb to kill my neighbour?")[1]


def test_who_writes_without_full_stops_is_not_cut_off():
    messages = []
    for answer in (
        "i went to the lake with my sister yesterday and we swam a lot",
        "yes and then we had lots of ice cream too so good",
    ):
        messages += [{"role": "user", "content": "tell me more"}, {"role": "assistant", "content": answer}]
    assert "cut_off" not in rules.score(text.read({"messages": messages}), rules.DEFAULT)[1]


def test_weights_language_words_and_own_rules(tmp_path):
    assert fired("Sure! " + LONG, weights={"stock_opener": 0})[0] == 1.0
    assert "wrong_language" in fired(LONG, language="de")[1]
    assert "word_list" in fired(LONG + " Grubworms!", word_list=("grubworm",))[1]
    (tmp_path / "words.txt").write_text("grubworm\n\n")
    assert "word_list" in fired(LONG + " Grubworm!", word_list=str(tmp_path / "words.txt"))[1]
    (tmp_path / "mine.py").write_text(
        "def shouts(exchange):\n    '''All capitals.'''\n    return exchange.response.isupper()\n"
    )
    for function in (lambda exchange: exchange.response.isupper(), f"{tmp_path}/mine.py:shouts"):
        score, taken = fired(LONG.upper(), extra=(("shouting", function, 0.5),))
        assert taken["shouting"] == 0.5 and score == 0.5
    assert fired(LONG, extra=(("scorer", lambda exchange: 0.25, 0.8),))[0] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "gide"},
        {"weights": {"no_such_rule": 1.0}},
        {"extra": (("mine", "no/such/file.py:rule", 1.0),)},
        {"extra": (("mine", "os:no_such_function", 1.0),)},
        {"extra": (("refusal", str.isupper, 1.0),)},
        {"word_list": "/no/such/file"},
    ],
)
def test_a_wrong_setting_is_told(options):
    with pytest.raises(ConfigError):
        rules.build(**{"preset": "default", **options})


def test_a_classifier_in_hugging_face_layout(monkeypatch):
    """The pipeline needs torch, which the tests don't have; what is asked of it, and made of its answer, is ours."""
    asked = []

    def pipeline(task, **options):
        assert task == "text-classification" and options["model"] == "folder" and options["top_k"] is None
        return lambda texts: (
            asked.extend(texts) or [[{"label": "fine", "score": 0.1}, {"label": "toxic", "score": 0.9}]]
        )

    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(pipeline=pipeline))
    rule = rules.hf_classifier("folder", "toxic")
    assert fired(LONG, extra=(("toxic", rule, 1.0),))[0] == pytest.approx(0.1)
    assert asked == [LONG]


UNSPACED = {
    "Chinese": (
        "北京为什么是中国的首都？",
        "北京是中国的政治中心和文化中心，历史上多个朝代在此建都，交通也十分便利，因此成为首都。",
    ),
    "Japanese": (
        "東京について教えてください。",
        "東京は日本の首都であり、人口が最も多い都市です。政治や経済の中心として発展してきました。",
    ),
    "Thai": ("เมืองหลวงของไทยคืออะไร", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทยและเป็นศูนย์กลางทางเศรษฐกิจของประเทศ"),
    "Khmer": ("រាជធានីនៃប្រទេសកម្ពុជា?", "ភ្នំពេញគឺជារាជធានីនៃព្រះរាជាណាចក្រកម្ពុជានិងជាមជ្ឈមណ្ឌលសេដ្ឋកិច្ច។"),
}


@pytest.mark.parametrize(("question", "answer"), UNSPACED.values(), ids=UNSPACED.keys())
def test_lengths_in_scripts_without_blanks_between_words(question, answer):
    exchange = text.Exchange(question, answer)
    for rule in ("short_response", "empty_response", "long_response", "url_only"):
        check = next(one.check for one in rules.DEFAULT if one.name == rule)
        assert not check(exchange), rule
    assert 5 <= len(exchange.response_words) <= len(answer) / 1.5
    (short,) = (one.check for one in rules.DEFAULT if one.name == "short_response")
    assert short(text.Exchange(question, answer[:2]))


def test_answers_that_call_or_think_are_neither_empty_nor_short():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    for answer in (
        {"content": None, "tool_calls": [call]},
        {"content": "", "reasoning_content": "hm"},
        {"content": "<think>hm</think>"},
        {"content": '<tool_call>{"name": "f"}</tool_call>'},
    ):
        row = {"messages": [{"role": "user", "content": "Do it please"}, {"role": "assistant", **answer}]}
        assert rules.score(text.read(row), rules.DEFAULT) == (1.0, {})
    (exchange,) = text.read({"question": "Do it please", "answer": ""}).exchanges
    assert rules.empty_response(exchange)
