"""The regular expressions behind the rules."""

from __future__ import annotations

import re

STOCK_OPENER = re.compile(
    r"\W{0,3}(?:"
    r"(?:sure|certainly|of course|absolutely|definitely|no problem|gladly)(?: thing)?\s*"
    r"(?:[!.]|,\s*(?:here|i\b|i'|let|happy|below|this|we|my|no problem|glad))|"
    r"(?:oh,? )?(?:what an? |that'?s an? |that is an? |this is an? |an? |very )?"
    r"(?:great|good|excellent|wonderful|fantastic|interesting|amazing) question\b|"
    r"(?:i'd|i would|i'll|i will|i am|i'm) (?:be )?(?:more than )?(?:happy|glad|delighted) to "
    r"(?:help|assist|answer|explain|provide)|"
    r"(?:happy|glad) to (?:help|assist)|"
    r"thank(?:s| you) for (?:asking|your question|reaching out|the question))",
    re.I,
)

CITATION_MARK = re.compile(r"\[\s*citation needed\s*\]", re.I)

_NOT_ABLE = (
    r"(?:can(?:no|')?t|can not|could ?n[o']t|won't|will not|am not able to|'m not able to|am unable to|'m unable to"
    r"|be able to|must decline to|have to decline|not comfortable|unable to)"
)
_TO_HELP = (
    r"(?:help|assist|provide|answer|compl(?:y|ete)|fulfil+|support|do th(?:at|is)|discuss|offer|give|share|generate"
    r"|create|write|engage|respond|continue|participate|process)"
)
REFUSAL = re.compile(
    r"(?:\bi\b|\bi'm|\bi am|^\W*(?:sorry|unfortunately))"
    rf"[^.!?\n]{{0,60}}?{_NOT_ABLE}[^.!?\n]{{0,25}}?\b{_TO_HELP}\b"
    r"|\b(?:must|have to) (?:respectfully )?decline\b|\bi decline to\b"
    r"|\bagainst my (?:guidelines|programming|policy)\b",
    re.I,
)

BOILERPLATE = re.compile(
    r"\b(?:as|being|i am|i'm) (?:just |only |merely )?an? (?:\w+ )?"
    r"(?:ai\b|a\.i\.|artificial intelligence|language model|(?:large|big) language model|chatbot|virtual assistant"
    r"|computer program)"
    r"|\bmy (?:knowledge|training)(?: data)? ?(?:cut-?off|ends|ended|only goes|was last updated)"
    r"|\b(?:knowledge|training) cut-?off\b|\bas of my last (?:\w+ )?update|\bmy last (?:knowledge|training) update"
    r"|\bi (?:do not|don't|cannot|can't) have (?:personal (?:opinion|experience|feeling|belief|preference)s?|feelings"
    r"|emotions|(?:access to )?(?:real-time|the internet|up-to-date))"
    r"|\b(?:trained|developed|created) by (?:openai|anthropic|google|meta|microsoft)\b",
    re.I,
)

PLACEHOLDER = re.compile(
    r"(?i:(?<![\w\])])\[(?:your|insert|enter|add|company|customer|recipient|sender|first|last|full|user|client"
    r"|placeholder|example|specify|fill|date|time|name|address|number|link|url|tbd|todo|phone|email|city|state|product|title|position|topic)"
    r"(?:[ _][^\]\n]{0,40})?\])"
    r"|(?i:<(?:your|insert|enter|add|placeholder|fill)[ _][^>\n]{1,40}>)|\{\{\s*\w+\s*\}\}"
    r"|\bTODO\b|\bFIXME\b|\bTBD\b|\bXXX+\b|(?i:\blorem ipsum\b)"
    r"|\b(?i:insert) (?:\w+ )?\w+ (?:HERE|here)\b",
)

DANGLING = re.compile(
    r"(?:,|\b(?:the|a|an|and|or|but|of|to|in|on|at|for|with|by|from|as|that|which|who|because|if|when|than|into|is|are|was"
    r"|were|be|been|has|have|had|will|would|can|could|should|may|might|must|its|their|his|her|my|your|our|this|these|those"
    r"|very|such|not|so|while|where|between|about|after|before|during|per|each|every))$",
    re.I,
)
SENTENCE_END = re.compile(r"[.!?](?:[\"')\]]*)(?=\s|$)")
LIST_LINE = re.compile(r"(?:[-*+•]|\d+[.)]|[A-Za-z][.)]|#+)\s|[^:]{1,40}:\s")
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.M)
ENUMERATION = re.compile(r"^\s*\w{1,3}\)", re.M)  # 1) a) iv)
LINE_OR_SENTENCE = re.compile(r"\n+|(?<=[.!?])\s+")
TABLE_LINE = re.compile(r"^.*\|.*\|.*$", re.M)
LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}|[*+-]|\d+[.)])[ \t]", re.M)  # headings, bullets
SYMBOL_WORD = re.compile(  # not operators and dashes, which stand alone between words too
    r"(?<!\S)(?!(?:--|—|–|->|=>|==|!=|<=|>=|&&|\|\||//|\.\.\.|<<|>>|\+=|:\))(?!\S))"
    r"(?:[^\w\s]{2,}|[#|~@^_$*\\`])(?!\S)"
)
URL = re.compile(r"(?:https?://|www\.)\S+", re.I)
UNDECODED = re.compile(r"&(?:amp|quot|lt|gt|nbsp|apos|#\d{2,5}|#x[0-9a-fA-F]{2,4});|\\u[0-9a-fA-F]{4}|\\x[0-9a-f]{2}")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")

_HARM = (
    r"(?:kill(?:ing)?|murder\w*|bombs?|explosives?|weapons?|poison\w*|hack(?:ing)?|malware|ransomware|phishing"
    r"|steal(?:ing)?|fraud\w*|launder\w*|suicid\w*|self-harm|illegal(?:ly)?|drugs?|meth|cocaine|heroin"
    r"|racis[mt]|sexis[mt]|hate speech|slurs?|harass\w*|stalk(?:ing)?|abus(?:e|ive)|porn\w*|sexual\w*"
    r"|terroris[mt]s?|counterfeit\w*|forg(?:e|ing|ery)|ddos|keylogger|shoplift\w*|tortur\w*|kidnap\w*|smuggl\w*|insult\w*|doxx?(?:ing)?"
    r"|without getting caught)"
)
ADVERSARIAL = re.compile(
    r"\b(?:how (?:to|do|can|could|would|should)|help me|teach me|tell me|give me|show me|write|create|make|generate"
    rf"|explain|(?:best )?ways? to|steps to|instructions|i want to)\b[^.?!\n]{{0,80}}\b{_HARM}\b"
    r"|\bignore (?:all |your |the )*(?:previous|prior|above) instructions|\bjailbreak",
    re.I,
)

_SUSPECT = re.compile("[\u0080-\u00ffŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™]{2,}")
_MEANT = re.compile(
    "[\u00a0-\u017f\u0400-\u04ff\u2000-\u206f\u20ac\u2122\u2190-\u21ff\u3040-\u30ff\u4e00-\u9fff\ufeff"
    "\U0001f300-\U0001faff]"
)
_CP1252 = {char: bytes([0x80 + i]) for i, char in enumerate("€\x81‚ƒ„…†‡ˆ‰Š‹Œ\x8dŽ\x8f\x90‘’“”•–—˜™š›œ\x9džŸ")}


def mojibake(text: str) -> bool:
    """Whether some characters are UTF-8 that was read as Latin-1 or Windows-1252: turned back, they are text."""
    for run in _SUSPECT.findall(text):
        raw = b"".join(_CP1252.get(char) or char.encode("latin-1", "ignore") for char in run)
        for start in range(len(raw) - 1):
            try:
                meant = raw[start : start + _size(raw[start])].decode()
            except UnicodeDecodeError:
                continue
            if _MEANT.match(meant):
                return True
    return False


def _size(first: int) -> int:
    """Bytes of the UTF-8 character that starts with this one; 0 where none does."""
    return 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
