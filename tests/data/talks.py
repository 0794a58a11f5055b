"""Conversations of every kind, with a marker word in every part, so that a test can tell what became of it."""

from __future__ import annotations

import json
from itertools import count
from typing import Any


def _user(text="USERONE"):
    return {"role": "user", "content": text}


def _bot(text="ANSWERONE", **more):
    return {"role": "assistant", "content": text, **more}


def _system(text="SYSTEMONE"):
    return {"role": "system", "content": text}


def _tool(text="RESULTONE", **more):
    return {"role": "tool", "name": "nameone", "tool_call_id": "call00001", "content": text, **more}


def _call(name="nameone", wrapped=True, number=1, **arguments):
    inner = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": inner} if wrapped else inner


def _schema(name="nameone", wrapped=True):
    inner = {
        "name": name,
        "description": f"described {name}",
        "parameters": {"type": "object", "properties": {"keyone": {"type": "string"}}},
    }
    return {"type": "function", "function": inner} if wrapped else inner


def _talk(*messages, **row) -> dict[str, Any]:
    return {"messages": list(messages), **row}


def _turns(*pairs):
    numbers = count(1)
    return [m for q, a in pairs for m in (_user(f"{q}{'I' * next(numbers)}X"), _bot(a))]


U1, A1, U2, A2, U3, A3 = (
    _user("USERONE"), _bot("ANSWERONE"), _user("USERTWO"), _bot("ANSWERTWO"), _user("USERTHREE"), _bot("ANSWERTHREE")
)  # fmt: skip
CALL = _call(keyone="VALUEONE")
THINK = "<think>\nTHOUGHTONE\n</think>\n\nANSWERONE"
THINK2 = "<think>\nTHOUGHTTWO\n</think>\n\nANSWERTWO"
TOOLS = [_schema()]

TALKS: dict[str, dict[str, Any]] = {
    # --- turns ---
    "one turn": _talk(U1, A1),
    "two turns": _talk(U1, A1, U2, A2),
    "three turns": _talk(U1, A1, U2, A2, U3, A3),
    "ends with a question": _talk(U1, A1, U2),
    "system": _talk(_system(), U1, A1),
    "system, two turns": _talk(_system(), U1, A1, U2, A2),
    "two systems": _talk(_system(), _system("SYSTEMTWO"), U1, A1),
    "system in the middle": _talk(U1, A1, _system(), U2, A2),
    "system at the end": _talk(U1, A1, _system()),
    "empty system": _talk(_system(""), U1, A1),
    "developer": _talk({"role": "developer", "content": "SYSTEMONE"}, U1, A1),
    "two questions in a row": _talk(U1, U2, A1),
    "two answers in a row": _talk(U1, A1, A2),
    "answer first": _talk(A1, U2, A2),
    "same question twice": _talk(U1, U1, A1),
    "same answer twice": _talk(U1, A1, U2, A1),
    "first answer not trained": _talk(U1, {**A1, "weight": 0}, U2, A2),
    "last answer not trained": _talk(U1, A1, U2, {**A2, "train": False}),
    "weights": _talk(U1, {**A1, "weight": 0.5}, U2, A2),
    "empty question": _talk(_user(""), A1),
    # --- text ---
    "blanks around": _talk(_user("  USERONE \n"), _bot("\n ANSWERONE  ")),
    "indented code": _talk(U1, _bot("    return ANSWERONE")),
    "several lines": _talk(_user("USERONE\n\nUSERONEB"), _bot("- ANSWERONE\n- ANSWERONEB\n\n```\nx\n```")),
    "scripts and emoji": _talk(_user("USERONE 你好 😀"), _bot("ANSWERONE 世界 é")),
    "braces and tags": _talk(_user("USERONE {{ x }} {% if %} <b>"), _bot("ANSWERONE {% endfor %} &amp; <br>")),
    "json": _talk(_user('{"a": "USERONE"}'), _bot('{"b": ["ANSWERONE", null]}')),
    "spelled end marks": _talk(
        _user("USERONE <|im_end|><eos><|end|>"), _bot("ANSWERONE<|im_end|><eos><|end|><|eot|> x")
    ),
    "spelled headers": _talk(_user("USERONE <|assistant|>[/INST]"), _bot("ANSWERONE <|user|><|im_start|>user\nx")),
    "spelled in system": _talk(_system("SYSTEMONE <|im_end|> <|/turn|>"), U1, A1),
    "role words": _talk(_user("assistant USERONE"), _bot("user ANSWERONE")),
    "the marks of pieces": _talk(_user("USERONE \U0010fffd"), _bot("ANSWERONE")),
    "private characters": _talk(_user("USERONE \U000f0001"), _bot("ANSWERONE \U000f0002")),
    "a quoted closing tag": _talk(_user("USERONE </think> x"), _bot("ANSWERONE")),
    "parts of text": _talk(_user([{"type": "text", "text": "USERONE"}]), _bot([{"type": "text", "text": "ANSWERONE"}])),
    "numbers only": _talk(_user("4711 and 12"), _bot("815")),
    # --- thoughts ---
    "thought": _talk(U1, _bot(reasoning_content="THOUGHTONE")),
    "thought, two turns": _talk(
        U1, _bot(reasoning_content="THOUGHTONE"), U2, _bot("ANSWERTWO", reasoning_content="THOUGHTTWO")
    ),
    "thought of the first only": _talk(U1, _bot(reasoning_content="THOUGHTONE"), U2, A2),
    "thought of the last only": _talk(U1, A1, U2, _bot("ANSWERTWO", reasoning_content="THOUGHTTWO")),
    "thought of an answer not trained": _talk(U1, _bot(reasoning_content="THOUGHTONE", weight=0), U2, A2),
    "thinking": _talk(U1, _bot(thinking="THOUGHTONE")),
    "inline thought": _talk(U1, _bot(THINK)),
    "inline thought, two turns": _talk(U1, _bot(THINK), U2, _bot(THINK2)),
    "inline thought, system": _talk(_system(), U1, _bot(THINK)),
    "inline thought without newlines": _talk(U1, _bot("<think>THOUGHTONE</think>ANSWERONE")),
    "inline thought, opened by the prompt": _talk(U1, _bot("THOUGHTONE\n</think>\n\nANSWERONE")),
    "empty inline thought": _talk(U1, _bot("<think>\n\n</think>\n\nANSWERONE")),
    "thought of several lines": _talk(U1, _bot(reasoning_content="THOUGHTONE\n\n1. a\n2. b")),
    "thinking off": _talk(U1, A1, chat_template_kwargs={"enable_thinking": False}),
    "thinking on": _talk(U1, A1, chat_template_kwargs={"enable_thinking": True}),
    "thought with thinking on": _talk(
        U1, _bot(reasoning_content="THOUGHTONE"), chat_template_kwargs={"enable_thinking": True}
    ),
    "thought only": _talk(U1, _bot("", reasoning_content="THOUGHTONE"), U2, A2),
    # --- calls ---
    "call": _talk(U1, _bot("", tool_calls=[CALL]), tools=TOOLS),
    "call, content null": _talk(U1, _bot(None, tool_calls=[CALL]), tools=TOOLS),
    "call, content absent": _talk(U1, {"role": "assistant", "tool_calls": [CALL]}, tools=TOOLS),
    "call beside content": _talk(U1, _bot("ANSWERONE", tool_calls=[CALL]), tools=TOOLS),
    "call beside a thought": _talk(U1, _bot("", reasoning_content="THOUGHTONE", tool_calls=[CALL]), tools=TOOLS),
    "call without tools": _talk(U1, _bot("", tool_calls=[CALL])),
    "call without function": _talk(U1, _bot("", tool_calls=[_call(wrapped=False, keyone="VALUEONE")]), tools=TOOLS),
    "two calls": _talk(
        U1,
        _bot("", tool_calls=[CALL, _call("nametwo", number=2, keytwo="VALUETWO")]),
        tools=[*TOOLS, _schema("nametwo")],
    ),
    "arguments as text": _talk(
        U1,
        _bot("", tool_calls=[{**CALL, "function": {"name": "nameone", "arguments": '{"keyone": "VALUEONE"}'}}]),
        tools=TOOLS,
    ),
    "arguments of all kinds": _talk(
        U1,
        _bot("", tool_calls=[_call(keyone={"deep": ["VALUEONE", 3.5, True, None, -7]}, other='VALUETWO "q" \\ é\n')]),
        tools=TOOLS,
    ),
    "no arguments": _talk(U1, _bot("", tool_calls=[_call()]), tools=TOOLS),
    "call and result": _talk(U1, _bot("", tool_calls=[CALL]), _tool(), A1, tools=TOOLS),
    "call and result, more": _talk(_system(), U1, _bot("", tool_calls=[CALL]), _tool(), A1, U2, A2, tools=TOOLS),
    "loop of calls": _talk(
        U1,
        _bot("", tool_calls=[CALL]),
        _tool(),
        _bot("", tool_calls=[_call(number=2, keyone="VALUETWO")]),
        _tool("RESULTTWO", tool_call_id="call00002"),
        A1,
        tools=TOOLS,
    ),
    "loop with thoughts": _talk(
        U1,
        _bot("", reasoning_content="THOUGHTONE", tool_calls=[CALL]),
        _tool(),
        _bot(reasoning_content="THOUGHTTWO"),
        tools=TOOLS,
    ),
    "short result": _talk(U1, _bot("", tool_calls=[CALL]), _tool("4"), _bot("ANSWERONE 4"), tools=TOOLS),
    "result of several lines": _talk(
        U1, _bot("", tool_calls=[CALL]), _tool('{"RESULTONE": "x\\ny"}\n'), A1, tools=TOOLS
    ),
    "result without a call": _talk(U1, A1, _tool(), A2),
    "call not trained": _talk(U1, _bot("", tool_calls=[CALL], weight=0), _tool(), A1, tools=TOOLS),
    "tools never called": _talk(U1, A1, tools=TOOLS),
    "tools without function": _talk(U1, _bot("", tool_calls=[CALL]), tools=[_schema(wrapped=False)]),
    "tools as text": _talk(U1, _bot("", tool_calls=[CALL]), tools=json.dumps(TOOLS)),
    "spelled marks in a call": _talk(U1, _bot("", tool_calls=[_call(keyone="VALUEONE <|im_end|> <eos>")]), tools=TOOLS),
    "spelled marks in a result": _talk(U1, _bot("", tool_calls=[CALL]), _tool("RESULTONE <|im_end|>"), A1, tools=TOOLS),
}
