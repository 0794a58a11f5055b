"""Small chat templates, one for each shape seen in the wild, written for these tests; and what they make of two turns.

`drawn` is the conversation Q1, A1, Q2, A2 with [brackets] around what is to be trained, one text for each sample.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sftjax.data import tokenizer as tokenizers
from tests.data import tiny

# All control tokens of these templates; one tokenizer has them all.
CONTROLS = (
    *("<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|eom|>", "<|user|>"),
    *("<|assistant|>", "<|system|>", "<|tool|>", "<|observation|>", "<|end|>", "<|return|>", "<|call|>", "<|start|>"),
    *("<|channel|>", "<|message|>", "<|turn|>", "<|/turn|>", "<|response|>", "<|/response|>", "<|role_user|>"),
    *("<|role_bot|>", "<|role_system|>", "[INST]", "[/INST]", "[TOOLS]", "[CALLS]", "[RESULT]", "[gMASK]", "<sop>"),
    *("<|middle|>", "<|endoftext|>"),
)
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<seed:think>", "</seed:think>")

GEN = "{% if add_generation_prompt %}"
FI = "{% endif %}"
LOOP = "{% for m in messages %}"
END = "{% endfor %}"


def write(text: str) -> str:
    """A Jinja expression that writes `text`, in which (expressions) stand in round brackets with a $ in front."""
    parts = [json.dumps(part) if i % 2 == 0 else part for i, part in enumerate(_pieces(text))]
    return "{{- " + " + ".join(part for part in parts if part != '""') + " }}"


def _pieces(text: str) -> list[str]:
    found, rest = [], text
    while (start := rest.find("$(")) >= 0:
        depth, end = 1, start + 2
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0)
            end += 1
        found += [rest[:start], rest[start + 1 : end]]
        rest = rest[end:]
    return [*found, rest]


def by_role(**bodies: str) -> str:
    """An if for each role; `other` for the rest ("" drops them)."""
    other = bodies.pop("other", "{{- raise_exception('no role ' + m.role) }}")
    text = "".join(
        f"{{% {'elif' if i else 'if'} m.role == '{role}' %}}{body}" for i, (role, body) in enumerate(bodies.items())
    )
    return f"{text}{{% else %}}{other}{FI}"


@dataclass(frozen=True)
class Shape:
    """A template, the stop tokens of its model, and what training on two turns should give.

    Attributes:
      text: Jinja.
      drawn: of each sample; () where rows are refused.
      eos: the tokenizer's.
      stops: names in generation_config.json.
      ends: tokens on which trained answers may end.
      end_of_turn: as in `model.end_of_turn`.
      refused: reason for which two plain turns are refused.
    """

    text: str
    drawn: tuple[str, ...] = ()
    eos: str = "<eos>"
    stops: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    end_of_turn: str | None = None
    refused: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def may_end_on(self) -> tuple[str, ...]:
        return self.ends or (self.eos, *self.stops)


def chatml(role: str, text: str, mark: str = "<|im_end|>\n") -> str:
    return f"<|im_start|>{role}\n{text}{mark}"


ML = write("<|im_start|>$(m.role)\n$(m.content)<|im_end|>\n")
ML_GEN = GEN + write("<|im_start|>assistant\n") + FI
ML_TWO = "{u1}<|im_start|>assistant\n[A1<|im_end|>]\n{u2}<|im_start|>assistant\n[A2<|im_end|>]\n".format(
    u1=chatml("user", "Q1"), u2=chatml("user", "Q2")
)
NO_CONTENT = "(m.content if m.content else '')"
CALLS = "{% for c in m.tool_calls or [] %}{{- '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
TOOLS = (
    "{% if tools %}{{- '<|im_start|>tools\\n' }}{% for t in tools %}{{- t | tojson }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_LAST_QUERY = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_SPLIT = (  # thought and content of an answer
    "{% set thought = m.reasoning_content or '' %}{% set content = m.content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
_ANSWER_ONLY = "(m.content.split('</think>')[-1].lstrip('\\n') if m.content else '')"

SHAPES: dict[str, Shape] = {
    # --- frame ---
    "chatml": Shape(LOOP + ML + END + ML_GEN, (ML_TWO,), ends=("<|im_end|>",)),
    "chatml, end of turn is eos": Shape(LOOP + ML + END + ML_GEN, (ML_TWO,), eos="<|im_end|>"),
    "bos, stripped, named by generation_config": Shape(
        "{{ bos_token }}"
        + LOOP
        + write("<|header|>$(m.role)<|/header|>\n\n$(m.content | trim)<|eot|>")
        + END
        + GEN
        + write("<|header|>assistant<|/header|>\n\n")
        + FI,
        (
            "<bos><|header|>user<|/header|>\n\nQ1<|eot|><|header|>assistant<|/header|>\n\n[A1<|eot|>]"
            "<|header|>user<|/header|>\n\nQ2<|eot|><|header|>assistant<|/header|>\n\n[A2<|eot|>]",
        ),
        stops=("<eos>", "<|eom|>", "<|eot|>"),
    ),
    "bos in every turn, prompt flag ignored, system folded": Shape(
        "{% set ns = namespace(s='') %}"
        + LOOP
        + by_role(
            system="{% set ns.s = '<<' + m.content + '>>' %}",
            user=write("$(bos_token)[INST] $(ns.s)$(m.content) [/INST]") + "{% set ns.s = '' %}",
            assistant=write(" $(m.content) $(eos_token)"),
        )
        + END,
        ("<bos>[INST] Q1 [/INST][ A1 <eos>]<bos>[INST] Q2 [/INST][ A2 <eos>]",),
    ),
    "alternation demanded, no system": Shape(
        _ALTERNATE
        + "{{ bos_token }}"
        + LOOP
        + by_role(user=write("[INST]$(m.content)[/INST]"), assistant=write("$(m.content)$(eos_token)"))
        + END,
        ("<bos>[INST]Q1[/INST][A1<eos>][INST]Q2[/INST][A2<eos>]",),
    ),
    "header of control tokens only": Shape(
        "{{ bos_token }}"
        + LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=write("<|assistant|>$(m.content)<|end|>"), other="")
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        ("<bos><|user|>Q1<|assistant|>[A1<|end|>]<|user|>Q2<|assistant|>[A2<|end|>]",),
        ends=("<|end|>",),
    ),
    "three tokens around the role": Shape(
        LOOP
        + write("<|im_start|>$(m.role)<|middle|>$(m.content)<|im_end|>")
        + END
        + GEN
        + write("<|im_start|>assistant<|middle|>")
        + FI,
        (
            "<|im_start|>user<|middle|>Q1<|im_end|><|im_start|>assistant<|middle|>[A1<|im_end|>]"
            "<|im_start|>user<|middle|>Q2<|im_end|><|im_start|>assistant<|middle|>[A2<|im_end|>]",
        ),
        stops=("<|im_end|>",),
    ),
    "plain text headers, eos": Shape(
        LOOP
        + by_role(
            system=write("$(m.content)\n\n"),
            user=write("USER: $(m.content)\n"),
            assistant=write("ASSISTANT: $(m.content)$(eos_token)\n"),
        )
        + END
        + GEN
        + write("ASSISTANT:")
        + FI,
        ("USER: Q1\nASSISTANT:[ A1<eos>]\nUSER: Q2\nASSISTANT:[ A2<eos>]\n",),
    ),
    "default system text, instructions": Shape(
        "{% if messages[0].role != 'system' %}{{- 'Follow the instructions.\\n\\n' }}{% endif %}"
        + LOOP
        + by_role(
            system=write("$(m.content)\n\n"),
            user=write("### Instruction:\n$(m.content)\n\n"),
            assistant=write("### Response:\n$(m.content)$(eos_token)\n\n"),
        )
        + END
        + GEN
        + write("### Response:\n")
        + FI,
        (
            "Follow the instructions.\n\n### Instruction:\nQ1\n\n### Response:\n[A1<eos>]\n\n"
            "### Instruction:\nQ2\n\n### Response:\n[A2<eos>]\n\n",
        ),
    ),
    "newline before the end mark": Shape(
        LOOP
        + by_role(user=write("### Q:\n$(m.content)\n"), assistant=write("### A:\n$(m.content)\n<|eot|>\n"), other="")
        + END
        + GEN
        + write("### A:\n")
        + FI,
        ("### Q:\nQ1\n### A:\n[A1\n<|eot|>]\n### Q:\nQ2\n### A:\n[A2\n<|eot|>]\n",),
        ends=("<|eot|>",),
    ),
    # --- the end of an answer ---
    "two end tokens, the second stops": Shape(
        "{{ bos_token }}"
        + LOOP
        + by_role(
            assistant=write("<|turn|><|role_bot|><|response|>$(m.content | trim)<|/response|><|/turn|>"),
            user=write("<|turn|><|role_user|>$(m.content | trim)<|/turn|>"),
            system=write("<|turn|><|role_system|>$(m.content | trim)<|/turn|>"),
        )
        + END
        + GEN
        + write("<|turn|><|role_bot|><|response|>")
        + FI,
        (
            "<bos><|turn|><|role_user|>Q1<|/turn|><|turn|><|role_bot|><|response|>[A1<|/response|><|/turn|>]"
            "<|turn|><|role_user|>Q2<|/turn|><|turn|><|role_bot|><|response|>[A2<|/response|><|/turn|>]",
        ),
        eos="<|/turn|>",
    ),
    "two end tokens, nothing named": Shape(
        LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=write("<|assistant|>$(m.content)<|/response|><|end|>"))
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        ("<|user|>Q1<|assistant|>[A1<|/response|>]<|end|><|user|>Q2<|assistant|>[A2<|/response|>]<|end|>",),
        ends=("<|/response|>",),
    ),
    "eos behind the last turn, unless a prompt is asked for": Shape(
        LOOP
        + write("<|$(m.role)|>\n$(m.content)<|end|>\n")
        + END
        + GEN
        + write("<|assistant|>\n")
        + "{% else %}{{- eos_token }}{% endif %}",
        ("<|user|>\nQ1<|end|>\n<|assistant|>\n[A1<|end|>]\n<|user|>\nQ2<|end|>\n<|assistant|>\n[A2<|end|>]\n<eos>",),
        ends=("<|end|>",),
    ),
    "the same, both named": Shape(
        LOOP
        + write("<|$(m.role)|>\n$(m.content)<|end|>\n")
        + END
        + GEN
        + write("<|assistant|>\n")
        + "{% else %}{{- eos_token }}{% endif %}",
        ("<|user|>\nQ1<|end|>\n<|assistant|>\n[A1<|end|>]\n<|user|>\nQ2<|end|>\n<|assistant|>\n[A2<|end|>]\n<eos>",),
        stops=("<eos>", "<|end|>"),
        ends=("<|end|>",),
    ),
    "eos behind the last turn, in the loop": Shape(
        LOOP
        + write("<|$(m.role)|>$(m.content)<|end|>")
        + "{% if loop.last and not add_generation_prompt %}{{- eos_token }}{% endif %}"
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        ("<|user|>Q1<|end|><|assistant|>[A1<|end|>]<|user|>Q2<|end|><|assistant|>[A2<|end|>]<eos>",),
        ends=("<|end|>",),
    ),
    "transcript with an end mark": Shape(
        LOOP
        + write("$(m.role): $(m.content)\n")
        + END
        + GEN
        + write("assistant:")
        + "{% else %}{{- eos_token }}{% endif %}",
        (
            "user: Q1\nassistant:[ A1\n<eos>]",
            "user: Q1\nassistant: A1\nuser: Q2\nassistant:[ A2\n<eos>]",
        ),
    ),
    "no mark at all, one chosen": Shape(
        LOOP
        + by_role(
            user=write("### User:\n$(m.content)\n\n"), assistant=write("### Assistant:\n$(m.content)\n\n"), other=""
        )
        + END
        + GEN
        + write("### Assistant:\n")
        + FI,
        (
            "### User:\nQ1\n\n### Assistant:\n[A1<eos>]",
            "### User:\nQ1\n\n### Assistant:\nA1\n\n### User:\nQ2\n\n### Assistant:\n[A2<eos>]",
        ),
        end_of_turn="<eos>",
    ),
    "the next turn's header stops": Shape(
        "[gMASK]<sop>"
        + LOOP
        + by_role(
            user=write("<|user|>\n$(m.content)"),
            system=write("<|system|>\n$(m.content)"),
            tool=write("<|observation|>\n$(m.content)"),
            assistant=write(f"<|assistant|>\n$({NO_CONTENT})") + CALLS,
        )
        + END
        + GEN
        + write("<|assistant|>\n")
        + FI,
        ("[gMASK]<sop><|user|>\nQ1<|assistant|>\n[A1<|user|>]\nQ2<|assistant|>\n[A2<eos>]",),
        stops=("<eos>", "<|user|>", "<|observation|>"),
    ),
    "the next turn writes the end mark": Shape(
        LOOP
        + write("<|im_start|>$(m.role)\n$(m.content)")
        + "{% if (loop.last and add_generation_prompt) or not loop.last %}{{- '<|im_end|>\\n' }}{% endif %}"
        + END
        + ML_GEN,
        (
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[A1<|im_end|>]\n"
            "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n[A2<eos>]",
        ),
        ends=("<|im_end|>", "<eos>"),
    ),
    "the next turn's header stops, one chosen": Shape(
        LOOP + write("<|$(m.role)|>$(m.content)") + END + GEN + write("<|assistant|>") + FI,
        ("<|user|>Q1<|assistant|>[A1<|user|>]Q2<|assistant|>[A2<|endoftext|>]",),
        ends=("<|user|>", "<|endoftext|>", "<eos>", "<|tool|>"),
        end_of_turn="<|endoftext|>",
    ),
    "assistant header always behind": Shape(
        LOOP + ML + END + write("<|im_start|>assistant\n"),
        (ML_TWO + "<|im_start|>assistant\n",),
        ends=("<|im_end|>",),
    ),
    "plain text always behind": Shape(
        LOOP
        + write("<|$(m.role)|>$(m.content)$(eos_token)")
        + END
        + write("\nRate this.\n")
        + GEN
        + write("<|assistant|>")
        + FI,
        refused="prompt_not_prefix",
    ),
    "last mark differs from earlier ones'": Shape(
        LOOP
        + by_role(
            user=write("<|start|>user<|message|>$(m.content)<|end|>"),
            system=write("<|start|>system<|message|>$(m.content)<|end|>"),
            assistant="{% set mark = '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' %}"
            + write("<|start|>assistant<|channel|>final<|message|>$(m.content)$(mark)"),
        )
        + END
        + GEN
        + write("<|start|>assistant")
        + FI,
        (
            "<|start|>user<|message|>Q1<|end|><|start|>assistant[<|channel|>final<|message|>A1<|return|>]",
            "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A1<|end|>"
            "<|start|>user<|message|>Q2<|end|><|start|>assistant[<|channel|>final<|message|>A2<|return|>]",
        ),
        eos="<|return|>",
    ),
    "a call ends on a token of its own": Shape(
        LOOP
        + by_role(
            user=write("<|user|>$(m.content)<|eot|>"),
            tool=write("<|tool|>$(m.content)<|eot|>"),
            assistant=write(f"<|assistant|>$({NO_CONTENT})")
            + CALLS
            + "{{- '<|eom|>' if m.tool_calls else '<|eot|>' }}",
            other="",
        )
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        ("<|user|>Q1<|eot|><|assistant|>[A1<|eot|>]<|user|>Q2<|eot|><|assistant|>[A2<|eot|>]",),
        stops=("<|eot|>",),
        ends=("<|eot|>", "<|eom|>"),
    ),
    # --- the generation prompt ---
    "no generation prompt": Shape(
        LOOP + ML + END,
        (
            "<|im_start|>user\nQ1<|im_end|>\n[<|im_start|>assistant\nA1<|im_end|>]\n"
            "<|im_start|>user\nQ2<|im_end|>\n[<|im_start|>assistant\nA2<|im_end|>]\n",
        ),
        ends=("<|im_end|>",),
    ),
    "opens a thought, history keeps none": Shape(
        "{{ bos_token }}"
        + LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=write(f"<|assistant|>$({_ANSWER_ONLY})$(eos_token)"))
        + END
        + GEN
        + write("<|assistant|><think>\n")
        + FI,
        refused="prompt_not_prefix",
    ),
    "the same, closed at once": Shape(
        "{{ bos_token }}"
        + LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=write(f"<|assistant|>$({_ANSWER_ONLY})$(eos_token)"))
        + END
        + GEN
        + write("<|assistant|><think>\n")
        + FI,
        (
            "<bos><|user|>Q1<|assistant|><think>[\n\n</think>\n\nA1<eos>]",  # two newlines are one token
            "<bos><|user|>Q1<|assistant|>A1<eos><|user|>Q2<|assistant|><think>[\n\n</think>\n\nA2<eos>]",
        ),
        options={"close_thoughts": True},
    ),
    "opens a thought unless switched off": Shape(
        LOOP
        + by_role(
            user=write("<|user|>$(m.content)\n"),
            system=write("<|system|>$(m.content)\n"),
            assistant=_SPLIT
            + "{% if thought %}"
            + write("<|assistant|><think>\n$(thought)\n</think>\n\n$(content)<|end|>\n")
            + "{% else %}"
            + write("<|assistant|>$(content)<|end|>\n")
            + FI,
        )
        + END
        + GEN
        + write("<|assistant|>")
        + "{% if enable_thinking is not defined or enable_thinking %}{{- '<think>\\n' }}{% endif %}"
        + FI,
        (
            "<|user|>Q1\n<|assistant|>[A1<|end|>]",
            "<|user|>Q1\n<|assistant|>A1<|end|>\n<|user|>Q2\n<|assistant|>[A2<|end|>]\n",
        ),
        ends=("<|end|>",),
    ),
    "opens a thought, history closes it": Shape(
        LOOP
        + by_role(
            user=write("<|user|>$(m.content)"),
            assistant=write(f"<|assistant|></think>$({_ANSWER_ONLY})$(eos_token)"),
        )
        + END
        + GEN
        + write("<|assistant|><think>")
        + FI,
        (
            "<|user|>Q1<|assistant|><think>[</think>A1<eos>]",
            "<|user|>Q1<|assistant|></think>A1<eos><|user|>Q2<|assistant|><think>[</think>A2<eos>]",
        ),
    ),
    "opens a thought, which is always written": Shape(
        LOOP
        + by_role(
            user=write("<|user|>$(m.content)\n"),
            tool=write("<|tool|>$(m.content)\n"),
            assistant=_SPLIT
            + write("<|assistant|><think>\n$(thought)\n</think>\n\n$(content)")
            + CALLS
            + "{{- '<|end|>\\n' }}",
        )
        + END
        + GEN
        + write("<|assistant|><think>\n")
        + FI,
        (
            "<|user|>Q1\n<|assistant|><think>[\n\n</think>\n\nA1<|end|>]\n"
            "<|user|>Q2\n<|assistant|><think>[\n\n</think>\n\nA2<|end|>]\n",
        ),
        ends=("<|end|>",),
    ),
    "writes an empty thought in the prompt only": Shape(
        LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=_SPLIT + write("<|assistant|>$(content)<|end|>"))
        + END
        + GEN
        + write("<|assistant|><think>\n\n</think>\n\n")
        + FI,
        (
            "<|user|>Q1<|assistant|><think>\n\n</think>\n\n[A1<|end|>]",
            "<|user|>Q1<|assistant|>A1<|end|><|user|>Q2<|assistant|><think>\n\n</think>\n\n[A2<|end|>]",
        ),
        ends=("<|end|>",),
    ),
    "empty thought for the last answer, earlier thoughts dropped": Shape(
        _LAST_QUERY
        + TOOLS
        + LOOP
        + "{% if m.role == 'assistant' %}"
        + _SPLIT
        + write("<|im_start|>assistant\n")
        + "{% if loop.index0 > ns.last %}"
        + write("<think>\n$(thought)\n</think>\n\n")
        + FI
        + write("$(content)")
        + CALLS
        + "{{- '<|im_end|>\\n' }}{% else %}"
        + ML
        + FI
        + END
        + ML_GEN.replace(
            FI,
            "{% if enable_thinking is defined and not enable_thinking %}" + write("<think>\n\n</think>\n\n") + FI + FI,
        ),
        (
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nA1<|im_end|>]\n",
            "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
            "<|im_start|>assistant\n[<think>\n\n</think>\n\nA2<|im_end|>]\n",
        ),
        eos="<|im_end|>",
    ),
    # --- what of a conversation is written ---
    "system text only before an open question": Shape(
        "{% set ns = namespace(s='') %}{% if messages[0].role == 'system' %}{% set ns.s = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{{- bos_token }}"
        + LOOP
        + by_role(
            user="{% if loop.last %}{% if tools %}{{- '[TOOLS]' + (tools | tojson) }}{% endif %}"
            + write("[INST]$(ns.s + '\\n\\n' if ns.s else '')$(m.content)[/INST]")
            + "{% else %}"
            + write("[INST]$(m.content)[/INST]")
            + FI,
            assistant="{% if m.tool_calls %}{{- '[CALLS]' + (m.tool_calls | tojson) }}{% else %}"
            + write(" $(m.content)")
            + "{% endif %}{{- eos_token }}",
            tool=write("[RESULT]$(m.content | tojson)"),
        )
        + END,
        ("<bos>[INST]Q1[/INST][ A1<eos>][INST]Q2[/INST][ A2<eos>]",),
    ),
    "other roles dropped": Shape(
        LOOP
        + by_role(user=write("<|user|>$(m.content)"), assistant=write("<|assistant|>$(m.content)<|eot|>"), other="")
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        ("<|user|>Q1<|assistant|>[A1<|eot|>]<|user|>Q2<|assistant|>[A2<|eot|>]",),
        stops=("<|eot|>",),
    ),
    "default system text, tools and calls": Shape(
        "{% if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
        + TOOLS
        + LOOP
        + write(f"<|im_start|>$(m.role)\n$({NO_CONTENT})")
        + CALLS
        + "{{- '<|im_end|>\\n' }}"
        + END
        + ML_GEN,
        ("<|im_start|>system\nBe kind.<|im_end|>\n" + ML_TWO,),
        eos="<|im_end|>",
    ),
    "calls with arguments as text": Shape(
        LOOP + "{% if m.tool_calls %}{{- '<|im_start|>assistant\\n' }}{% for c in m.tool_calls %}"
        "{{- '<tool_call>' + c.function.name + '\\n' + c.function.arguments + '</tool_call>' }}{% endfor %}"
        "{{- '<|im_end|>\\n' }}{% else %}" + ML + FI + END + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "calls with arguments one by one": Shape(
        TOOLS
        + LOOP
        + write(f"<|im_start|>$(m.role)\n$({NO_CONTENT})")
        + "{% for c in m.tool_calls or [] %}{{- '<tool_call><function=' + c.function.name + '>' }}"
        "{% for k, v in c.function.arguments | items %}{{- '<parameter=' + k + '>' }}"
        "{{- v if v is string else v | tojson }}{{- '</parameter>' }}{% endfor %}"
        "{{- '</function></tool_call>' }}{% endfor %}"
        "{{- '<|im_end|>\\n' }}" + END + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "calls without a function object": Shape(
        LOOP
        + write(f"<|im_start|>$(m.role)\n$({NO_CONTENT})")
        + "{% for c in m.tool_calls or [] %}{% set f = c.function if c.function else c %}"
        "{{- '<tool_call>' + f.name + (f.arguments | tojson) + '</tool_call>' }}{% endfor %}{{- '<|im_end|>\\n' }}"
        + END
        + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "only the first call": Shape(
        TOOLS
        + LOOP
        + write(f"<|im_start|>$(m.role)\n$({NO_CONTENT})")
        + "{% if m.tool_calls %}{{- '<tool_call>' + (m.tool_calls[0].function | tojson) + '</tool_call>' }}{% endif %}"
        "{{- '<|im_end|>\\n' }}" + END + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "content beside a call lost, results quoted": Shape(
        "{{- bos_token }}" + TOOLS + LOOP + "{% if m.tool_calls %}"
        "{{- '<|header|>assistant<|/header|>' + (m.tool_calls[0].function | tojson) + '<|eot|>' }}"
        "{% elif m.role == 'tool' %}{{- '<|header|>ipython<|/header|>' + (m.content | tojson) + '<|eot|>' }}{% else %}"
        + write("<|header|>$(m.role)<|/header|>$(m.content | trim)<|eot|>")
        + FI
        + END
        + GEN
        + write("<|header|>assistant<|/header|>")
        + FI,
        (
            "<bos><|header|>user<|/header|>Q1<|eot|><|header|>assistant<|/header|>[A1<|eot|>]"
            "<|header|>user<|/header|>Q2<|eot|><|header|>assistant<|/header|>[A2<|eot|>]",
        ),
        eos="<|eot|>",
    ),
    "results in a user's turn, schemas not written": Shape(
        LOOP
        + by_role(
            tool=write("<|im_start|>user\n<tool_response>\n$(m.content)\n</tool_response><|im_end|>\n"),
            assistant=write(f"<|im_start|>assistant\n$({NO_CONTENT})") + CALLS + "{{- '<|im_end|>\\n' }}",
            other=ML,
        )
        + END
        + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "content as a list of parts only": Shape(
        LOOP + "{{- '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{- part.text }}"
        "{% endif %}{% endfor %}{{- '<|im_end|>\\n' }}" + END + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "content as text or parts": Shape(
        LOOP + "{{- '<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}{{- m.content }}{% else %}"
        "{% for part in m.content or [] %}{{- part.text }}{% endfor %}{% endif %}{{- '<|im_end|>\\n' }}" + END + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "thoughts under another key": Shape(
        LOOP
        + write(f"<|im_start|>$(m.role)\n$('<think>' + m.thinking + '</think>' if m.thinking else '')$({NO_CONTENT})")
        + CALLS
        + "{{- '<|im_end|>\\n' }}"
        + END
        + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
    "no header between answers": Shape(
        "{% set ns = namespace(role='') %}"
        + LOOP
        + "{% if m.role != ns.role %}{{- '<|' + m.role + '|>' }}{% endif %}{% set ns.role = m.role %}"
        "{{- m.content + '<|end|>' }}" + END + GEN + write("<|assistant|>") + FI,
        ("<|user|>Q1<|end|><|assistant|>[A1<|end|>]<|user|>Q2<|end|><|assistant|>[A2<|end|>]",),
        ends=("<|end|>",),
    ),
    "the system in front of the loop": Shape(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set rest = messages[1:] %}{% else %}"
        "{% set system = '' %}{% set rest = messages %}{% endif %}{{- '<|system|>' + system + '<|end|>' }}"
        "{% for m in rest %}" + write("<|$(m.role)|>$(m.content)<|end|>") + END + GEN + write("<|assistant|>") + FI,
        ("<|system|><|end|><|user|>Q1<|end|><|assistant|>[A1<|end|>]<|user|>Q2<|end|><|assistant|>[A2<|end|>]",),
        ends=("<|end|>",),
    ),
    "a switch changes the system text": Shape(
        "{{- '<|system|>' + ('/think' if enable_thinking else '/no_think') + '<|end|>' }}"
        + LOOP
        + write("<|$(m.role)|>$(m.content)<|end|>")
        + END
        + GEN
        + write("<|assistant|>")
        + FI,
        (
            "<|system|>/no_think<|end|><|user|>Q1<|end|><|assistant|>[A1<|end|>]"
            "<|user|>Q2<|end|><|assistant|>[A2<|end|>]",
        ),
        ends=("<|end|>",),
    ),
    "generation tags": Shape(
        LOOP
        + by_role(
            assistant=write("<|im_start|>assistant\n")
            + "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}",
            other=ML,
        )
        + END
        + ML_GEN,
        (ML_TWO,),
        eos="<|im_end|>",
    ),
}


@cache
def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(tiny._byte_level(""))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in TAGS])
    return tokenizer.to_str()


def folder_of(shape: Shape, folder: Path) -> Path:
    """A model folder's tokenizer files for a shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": shape.eos,
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": shape.text,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if shape.stops:
        from tokenizers import Tokenizer

        ids = [Tokenizer.from_str(_tokenizer_json()).token_to_id(name) for name in shape.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


def load(shape: Shape, folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.load(folder_of(shape, folder), end_of_turn=shape.end_of_turn)
