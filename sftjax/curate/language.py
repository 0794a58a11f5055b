"""Which language and which scripts a text is in, by script ranges and function words. Rough, and without a model.

It answers only when it is sure: a text of few words, names or code is in no language.
"""

from __future__ import annotations

import re

_SCRIPTS = {
    "latin": r"[A-Za-z\u00c0-\u024f]",
    "cyrillic": r"[\u0400-\u04ff]",
    "greek": r"[\u0370-\u03ff]",
    "hebrew": r"[\u0590-\u05ff]",
    "arabic": r"[\u0600-\u06ff]",
    "devanagari": r"[\u0900-\u097f]",
    "bengali": r"[\u0980-\u09ff]",
    "tamil": r"[\u0b80-\u0bff]",
    "thai": r"[\u0e00-\u0e7f]",
    "cjk": r"[\u3040-\u30ff\u3400-\u9fff]",
    "hangul": r"[\uac00-\ud7af]",
}
_LETTERS = {name: re.compile(pattern) for name, pattern in _SCRIPTS.items()}
_BEYOND_LATIN = re.compile(r"[\u0370-\ud7af]")
_KANA = re.compile(r"[\u3040-\u30ff]")

_FUNCTION_WORDS = {
    "en": "the of and to is in that it for was on are with as you this be have from or not but what which they an can "
    "his her my we your do if there would their been has how so will i a at by he she were had me him who when "
    "while could should than about any more make get please write explain give why where does did out just some "
    "other only between",
    "de": "der die das und ist nicht ein eine zu den mit von sich auf für es im dem wir ich sie wird auch als noch an "
    "werden aus er hat dass kann wenn aber nach bei einer oder sind zum haben nur über man mehr dann vor",
    "fr": "le la les de des et est un une que dans en pour pas ce qui il sur au plus par je ne se avec sont nous vous "
    "du mais cette ou elle son aux comme être fait leur cela ces y même tout",
    "es": "el la los las de y que en un una es no se por con para su lo como más pero sus le ya o este sí porque esta "
    "son entre cuando muy sin sobre también hay todo nos yo del al si",
    "it": "il lo la gli le di e che un una è non si per con in sono da del della come più anche ma questo ha i al nel "
    "alla se ci sul delle dei o io quando dopo molto essere",
    "pt": "o a os as de e que em um uma é não se por com para seu sua como mais mas dos das ao na no foi ele eu isso "
    "também já ou ser quando muito nos há está são pelo pela",
    "nl": "de het een en van is niet dat in op te zijn voor met die aan er ook als om maar wordt bij nog of we je uit "
    "naar dan heeft door kan ze ik hij wel meer deze over worden veel",
    "sv": "och det att en är som på för inte med av till den har de ett om var jag han från vi men så kan när ska "
    "eller också efter där mycket",
    "pl": "i w na nie się z do to że jest o jak ale po co tak za od przez dla może ich tym był są już tylko jego oraz "
    "który która jeśli więc",
    "tr": "ve bir bu da de için ile çok daha ne var gibi ama olarak olan en kadar sonra ben değil her mi şey o biz "
    "veya ise olduğu",
    "cs": "a se na je že v to s z do o i ale jako pro by jsem jsou není který která při také nebo když už jen tak "
    "ještě bylo může podle aby jeho její",
    "fi": "ja on ei se että oli hän mutta kun niin myös ovat joka tai sen mitä voi ole tämä jos kuin olen kanssa vain "
    "sitten ennen hyvin",
    "hu": "a az és hogy nem is egy ez meg de van csak volt már mint még ha kell vagy el azt lehet nagyon akkor minden",
    "id": "yang dan di ini itu dengan untuk tidak dari dalam akan pada juga ke ada bisa saya kami mereka atau karena "
    "oleh sudah adalah lebih seperti",
    "ro": "și în de la a cu nu este pe un o din care că mai sunt pentru se ce au fost dar sau fi prin ca după când "
    "foarte",
    "vi": "và của là có không được cho một các trong với này những để người đã khi đến từ ra cũng như về nhiều",
}  # fmt: skip
WITH_LATIN_LETTERS = frozenset(_FUNCTION_WORDS)
_OF_WORD: dict[str, list[str]] = {}
for _language, _text in _FUNCTION_WORDS.items():
    for _word in (one for one in _text.split() if len(one) > 1):  # a letter may be a name or a variable
        _OF_WORD.setdefault(_word, []).append(_language)
_LATIN_WORDS = re.compile(r"[^\W\d_]+")

# A prompt that names a language, or asks for a translation, may be answered in another one.
ABOUT_LANGUAGES = re.compile(
    r"translat|traduc|tradui|übersetz|\blanguages?\b|\b(?:english|german|french|spanish|italian|portuguese|dutch|"
    r"swedish|polish|turkish|russian|chinese|mandarin|japanese|korean|arabic|hebrew|hindi|greek|latin|thai|bengali|"
    r"deutsch|englisch|español|inglés|français|anglais|italiano)\b",
    re.I,
)


def scripts(text: str) -> dict[str, int]:
    """Letters of each script that occurs."""
    if text.isascii() or not _BEYOND_LATIN.search(text):
        return {"latin": len(_LETTERS["latin"].findall(text))}
    counts = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
    return {name: count for name, count in counts.items() if count}


def language(text: str, sure: bool = True) -> str | None:
    """A code such as "en", a script's name where a script settles it ("cyrillic"), or None when it isn't clear.

    With `sure=False` a Latin text of few known words gets the likeliest language, or else "latin".
    """
    text = text[:1500]
    counts = scripts(text)
    total = sum(counts.values())
    if total < 12:
        return None
    main = max(counts, key=counts.__getitem__)
    if counts[main] < 0.7 * total:
        return None
    if main == "cjk":
        return "ja" if len(_KANA.findall(text)) > 0.1 * counts[main] else "zh"
    if main != "latin":
        return main
    votes: dict[str, float] = {}
    found = _LATIN_WORDS.findall(text.lower())
    for word in found:
        for name in (owners := _OF_WORD.get(word, ())):
            votes[name] = votes.get(name, 0.0) + 1 / len(owners)
    if not votes:
        return None if sure else "latin"
    best, *others = sorted(votes.values(), reverse=True)
    if best < (max(3, 0.12 * len(found)) if sure else 2) or (others and best < 1.5 * others[0]):
        return None if sure else "latin"
    winner = max(votes, key=votes.__getitem__)
    different = {word for word in found if winner in _OF_WORD.get(word, ())}
    return winner if len(different) > 1 or not sure else None
