"""The final answer of a response."""

from __future__ import annotations

import re
from typing import NamedTuple

from dasd_megatron.verify.normalize import normalize
from dasd_megatron.verify.plain_numbers import plain_number

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t\n]{0,20}")
# What TeX would put into a box without braces is one token. A number is meant whole.
_TOKEN = re.compile(
    r"[+-]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)|\\[A-Za-z]+(?:\{[^{}\n]{0,200}\}){1,2}|[A-Za-z](?![A-Za-z])"
)
_HEADING = re.compile(r"####[^\n]*")
# Markdown may close its emphasis before the colon or behind it.
_ANSWER_IS = re.compile(
    r"(?<![A-Za-z0-9])answer[*_]{0,3}(?:\s{1,20}[*_]{0,3}is\b[*_]{0,3}\s{0,20}[:\uff1a]?|\s{0,20}[:\uff1a])[*_]{0,3}",
    re.IGNORECASE,
)
# A line of its own, like "## Final Answer", marks the next one.
_TITLE = re.compile(
    r"^[ \t]{0,4}#{0,6}[ \t]{0,4}[*_]{0,3}(?:the )?(?:final )?answer[*_]{0,3}[ \t]{0,4}$", re.IGNORECASE | re.MULTILINE
)
# "5! = 120" goes on. A tag or a special token ends the text before it.
_SENTENCE_END = re.compile(
    r"(?:[.?]|!(?!\s{1,3}[-=+*/^<>\\]))(?=\s|[*_]{1,3}(?:\s|\Z)|\Z)|</[A-Za-z]{1,20}>|<\|[A-Za-z_]{1,30}\|>"
)
_FULL_STOP = re.compile(r"(?<!\\right)\.\Z")
_DISPLAYS = (
    ("$$", "$$"),
    ("\\[", "\\]"),
    ("\\begin{equation*}", "\\end{equation*}"),
    ("\\begin{equation}", "\\end{equation}"),
    ("\\begin{align*}", "\\end{align*}"),
    ("\\begin{displaymath}", "\\end{displaymath}"),
)
_INLINE = (("$", "$"), ("\\(", "\\)"), ("`", "`"))
_LEADING = " \t\n\r*_:\uff1a"
_FENCE = re.compile(r"```[A-Za-z]{0,12}\n?")
_FILLER = re.compile(
    r"(?:(?:therefore|thus|hence|then|simply|just|exactly|approximately|about|equal to|indeed|clearly|now|given by)\b,?"
    r"\s{0,3}:?\s{0,3}|[*_]{1,3}|[=:]\s{0,3}){1,4}",
    re.IGNORECASE,
)
# What may follow an answer in its sentence.
_REMARK = re.compile(
    r",\s{1,3}(?:not|i\.e|as|since|because|which|where|so|and|when|by|that|meaning|hence|after|thus|therefore|if|it|this|we)\b"
    r"|\s{1,3}(?:as|since|because|which|meaning|hence|thus|therefore|after|and\s(?:then|so|that|we|it))\b"
    r"|\s{1,3}\((?!(?:mod|or)\b)(?=[A-Za-z]{2,}[^a-zA-Z(])|\s{1,3}(?:--|\u2014|\u2013)\s"
)
_FORMULA = re.compile(r"[0-9$\\=<>\u221a\u03c0\u221e\u00b2\u00b3\u00bd]|\S[+*/^]\S")
_ONE_SYMBOL = re.compile(r"[\s*_(]*[A-Za-z][\s*_).:]*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_FUNCTION_WORDS = frozenset(("sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "and", "or", "mod"))
_NUMBERED_TITLE = re.compile(r"[0-9]{1,3}[.):]\s+[^\W\d_]{2,}")
# "We check our answer: 3 + 4 = 7" gives none.
_CHECKED = re.compile(
    r"(?:check|verif|confirm)[a-z]*\s{1,3}(?:(?:that|the|our|this|my|your)\s{1,3}){0,3}\Z", re.IGNORECASE
)
_CHECK_CHARS = 40
_SEARCHED = 400
# Bounds of the work on a response that says nothing but "the answer is", or speaks of boxes without end.
_MOST_MARKS = 100
_LONGEST_SENTENCE = 20_000


class _Mark(NamedTuple):
    """A mark and what it says."""

    start: int
    answer: str | None
    """None where a mark is cut off or has nothing in it."""
    is_certain: bool
    """Whether the mark counts whatever else there is. A sentence that says no number or formula counts where nothing
    else does."""
    end: int = 0
    """Of a box: where it ends."""


def extract_answer(response: str) -> str | None:
    r"""Return the final answer that ``response`` marks as such, or None.

    The marks are

    - ``\boxed{...}`` and ``\fbox{...}`` with balanced braces, also with space before the brace or, around a number, a
      letter or a command, without braces;
    - ``####`` and what stands behind it on its line, if that is a number or formula and no title;
    - ``answer is`` or ``answer:``, any case, with Markdown's emphasis or without, and a title ``Answer`` or ``Final
      Answer`` on a line of its own: the sentence behind it, up to its end or the line's, or the formula in display
      mathematics that stands there.

    The last mark in the text decides. A box within a sentence or a heading is its answer. A sentence that names no
    number and no formula gives way to marks that do.

    A mark with nothing behind it, and a box that is not closed, give None rather than an earlier attempt: a length
    limit can cut them. A response without a mark gives None even where it ends in ``= 12``: the format is part of the
    task, and to guess at the last number would reward intermediate steps.

    The time is linear in the length of the response.
    """
    box = _last_box(response)
    others = [mark for mark in (_last_heading(response), *_last_sentences(response)) if mark is not None]
    # What stands within the box is part of its answer.
    marks = [mark for mark in others if box is None or not box.start < mark.start < box.end]
    marks += [] if box is None else [box]
    certain = [mark for mark in marks if mark.is_certain]
    return max(certain or marks, key=lambda mark: mark.start).answer if marks else None


def normalize_answer(answer: str) -> str:
    """Return the one spelling of all answers that text and numbers alone show to be equal.

    A plain number has no leading or trailing zeros. Other text is normalized, without white space.
    """
    text = normalize(answer)
    number = plain_number(text)
    if number is None:
        return "".join(text.split())
    return f"{number.value.normalize():f}" if -50 < number.value.adjusted() < 50 else str(number.value.normalize())


def _last_box(response: str) -> _Mark | None:
    start = len(response)
    # A command that is only spoken of is passed over, but not for ever.
    for _ in range(_MOST_MARKS):
        start = max(response.rfind("\\boxed", 0, start), response.rfind("\\fbox", 0, start))
        if start < 0:
            break
        match = _BOX.match(response, start)
        mark = None if match is None else _box_at(response, match)
        if mark is not None:
            return mark
    return None


def _box_at(response: str, command: re.Match[str]) -> _Mark | None:
    """Return what a command puts into a box; None where it is only spoken of."""
    start, position = command.span()
    if response[position : position + 1] == "{":
        end = _end_of_group(response, position + 1)
        answer = None if end is None else _clean(response[position + 1 : end])
        return _Mark(start, answer, True, len(response) if end is None else end)
    token = _TOKEN.match(response, position)
    if token is not None:
        return _Mark(start, token[0].rstrip(","), True)
    return _Mark(start, None, True) if position == len(response) else None


def _last_heading(response: str) -> _Mark | None:
    end_of_text = len(response.rstrip())
    for line in reversed(list(_HEADING.finditer(response))):
        # Of several marks in a line the last one counts, so that each character is looked at once.
        start = response.rfind("####", line.start(), line.end())
        behind = response[start + len("####") : line.end()]
        if not behind.strip():
            if line.end() >= end_of_text:
                return _Mark(start, None, True)
        elif _is_formula(behind, title=True):
            return _Mark(start, _clean(_without_remark(behind.strip())), True)
    return None


def _last_sentences(response: str) -> list[_Mark]:
    """Return the last sentence that says an answer, and the last one that says a number or formula."""
    if "answer" not in response.lower():
        return []
    starts = [(match.start(), match.end()) for match in _ANSWER_IS.finditer(response)]
    titles = {match.start(): match.end() for match in _TITLE.finditer(response)}
    found: list[_Mark] = []
    for start, end in sorted([*starts, *titles.items()], reverse=True)[:_MOST_MARKS]:
        if _CHECKED.search(response, max(0, start - _CHECK_CHARS), start):
            continue
        answer = _sentence(response, end)
        certain = answer is None or _is_formula(answer, title=False)
        if start in titles and not certain:
            continue
        if certain or not found:
            found.append(_Mark(start, answer, certain))
        if certain:
            break
    return found


def _sentence(response: str, start: int) -> str | None:
    """Return the answer in the sentence that starts there; None where nothing stands there."""
    while start < len(response) and response[start] in _LEADING:
        start += 1
    fence = _FENCE.match(response, start)
    if fence is not None:
        block = response[fence.end() : fence.end() + _LONGEST_SENTENCE]
        return _clean(block.split("```", 1)[0].strip().split("\n", 1)[0])
    for opening, closing in _DISPLAYS:
        if response.startswith(opening, start):
            block = response[start + len(opening) : start + _LONGEST_SENTENCE]
            return _clean(block.split(closing, 1)[0])
    end = response.find("\n", start, start + _LONGEST_SENTENCE)
    line = response[start : end if end >= 0 else start + _LONGEST_SENTENCE]
    return _clean(_without_remark(_first_sentence(line)))


def _first_sentence(line: str) -> str:
    filler = _FILLER.match(line)
    line = line[filler.end() :] if filler is not None else line
    for opening, closing in _INLINE:
        if line.startswith(opening):
            end = line.find(closing, len(opening))
            if end >= 0:
                end += len(closing)
                return line[:end] + _SENTENCE_END.split(line[end:], maxsplit=1)[0]
    return _SENTENCE_END.split(line, maxsplit=1)[0]


def _without_remark(sentence: str) -> str:
    """Return an answer without the reasons that follow it: ``42, as required`` and ``42 (since 6*7)`` are 42."""
    end = 0
    for opening, closing in _INLINE:
        if sentence.startswith(opening):
            found = sentence.find(closing, len(opening))
            end = found + len(closing) if found >= 0 else 0
            break
    remark = _REMARK.search(sentence, end)
    before = sentence if remark is None else sentence[: remark.start()]
    return before if _FORMULA.search(before) or _ONE_SYMBOL.fullmatch(before) else sentence


def _is_formula(text: str, *, title: bool) -> bool:
    """Return whether the text is a number or formula, maybe with a unit, and not prose or the title of a section."""
    text = text[:_SEARCHED].strip()
    if _ONE_SYMBOL.fullmatch(text):
        return True
    first = _FORMULA.search(text)
    if first is None or (title and _NUMBERED_TITLE.match(text)):
        return False
    before = text[: first.start() + 1]
    return all(word.lower() in _FUNCTION_WORDS for word in _WORD.findall(before))


def _end_of_group(text: str, start: int) -> int | None:
    """Return where the brace is that closes one opened before ``start``; escaped braces do not count."""
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return None


def _clean(answer: str) -> str | None:
    """Remove surrounding space, Markdown's marks and a full stop; return None where nothing is left."""
    text = answer.strip().strip("*`").strip()
    if text.startswith("_") or text.endswith("_"):
        text = text.strip("_").strip()
    return _FULL_STOP.sub("", text).rstrip().rstrip("*`").rstrip() or None
