r"""The answers of a benchmark, each written in twelve ways that change nothing, and changed in six that do.

A reference is what a problem file has, like ``\frac{1}{2}``, ``1,234`` or ``(0,9) \cup (9,36)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMERAL = re.compile(r"[0-9]+")
_INTEGER = re.compile(r"-?[0-9]+")
_WORDS = re.compile(r"\\text\{[^{}]*\}|[A-Za-z]{3,}")
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
_SUPERSCRIPT = {"2": "²", "3": "³"}
_UNICODE = (
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\sqrt\{([0-9]+)\}"), r"√\1"),
    (re.compile(r"\\sqrt([0-9])(?![0-9])"), r"√\1"),
    (re.compile(r"\\infty(?![A-Za-z])"), "∞"),
    (re.compile(r"\\cup(?![A-Za-z])"), "∪"),
    (re.compile(r"\\(?:geq?|geqslant)(?![A-Za-z])"), "≥"),
    (re.compile(r"\\(?:leq?|leqslant)(?![A-Za-z])"), "≤"),
    (re.compile(r"\\in(?![A-Za-z])"), "∈"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\^\{?\\circ\}?"), "°"),
    (re.compile(r"-"), "−"),
)


def bare(reference: str) -> str:
    """Return the reference without the dollar signs around it, where they are a pair of them."""
    text = reference.strip()
    return text[1:-1].strip() if re.fullmatch(r"\$[^$]*\$", text) else text


def _is_word(text: str) -> bool:
    return _WORDS.fullmatch(text) is not None


def _as_delimited(text: str) -> str:
    if "$" in text or text.count("(") != text.count(")") or re.search(r"\\left|\{\(|\\!", text):
        return f" {text} "
    return text.replace("(", "\\left( ").replace(")", " \\right)").replace(", ", ",").replace(",", ",\\, ")


def _in_unicode(text: str) -> str:
    for pattern, replacement in _UNICODE:
        text = pattern.sub(replacement, text)
    return re.sub(r"\^(?:\{([23])\}|([23]))(?![0-9}])", lambda match: _SUPERSCRIPT[match[1] or match[2]], text)


def _labelled(text: str) -> str:
    if "=" in text or "," in text or "\\in" in text or re.search(r"[<>]|\\[gl]e|\\pm", text) or _is_word(text):
        return f"\\boxed{{{text}}}"
    return f"z = {text}"


def _in_full_width(text: str) -> str:
    if "\\" in text or "_" in text or "^" in text:
        return f"\\bm{{{text}}}"
    return text.translate(_FULL_WIDTH)


def _with_unit(text: str) -> str:
    return f"{text}~\\text{{cm}}" if re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", text) else f"{text}."


def _as_other_number(text: str) -> str:
    if not _INTEGER.fullmatch(text) or text.startswith("0"):
        return f"\\displaystyle {text}"
    return f"{int(text):,}" if len(text.lstrip("-")) > 3 else f"{text}.0"


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "dollars": lambda text: f"${text}$",
    "parentheses of LaTeX": lambda text: f"\\({text}\\)",
    "bold": lambda text: f"\\mathbf{{{text}}}",
    "colour": lambda text: f"\\textcolor{{red}}{{{text}}}",
    "delimiters and spaces": _as_delimited,
    "fractions": lambda text: text.replace("\\frac", "\\dfrac") if "\\frac" in text else f"\\boldsymbol{{{text}}}",
    "label": _labelled,
    "Unicode": _in_unicode,
    "unit or full stop": _with_unit,
    "another spelling of the number": _as_other_number,
    "full width": _in_full_width,
}


def _with_numeral(text: str, index: int, change: Callable[[int], int]) -> str | None:
    numerals = list(_NUMERAL.finditer(text))
    if not numerals:
        return None
    numeral = numerals[index]
    return text[: numeral.start()] + str(change(int(numeral[0]))) + text[numeral.end() :]


def _other_sign(text: str) -> str | None:
    if "=" in text or "," in text or "\\pm" in text or re.search(r"[<>]|\\[gl]e|\\in|\\cup|\\begin|\\circ|_", text):
        return None
    if _is_word(text) or text.strip("0.") == "":
        return None
    if re.fullmatch(r"-?[0-9A-Za-z.]+", text):
        return text[1:] if text.startswith("-") else f"-{text}"
    return f"-({text})"


def _other_letter(text: str) -> str | None:
    letters = re.findall(r"(?<![A-Za-z\\{])([a-zA-Z])(?![A-Za-z}])", text)
    if not letters or _is_word(text):
        return None
    letter = letters[-1]
    other = "q" if letter != "q" else "w"
    return re.sub(rf"(?<![A-Za-z\\{{]){letter}(?![A-Za-z}}])", other, text)


def _reversed_digits(text: str) -> str | None:
    if not re.fullmatch(r"[0-9]{2,}", text) or text == text[::-1] or int(text[::-1]) == int(text):
        return None
    return text[::-1]


def near_misses(reference: str) -> dict[str, str]:
    """Return six wrong answers that look like the reference, by what was changed."""
    text = bare(reference)
    if not _NUMERAL.search(text):
        return _near_misses_of_words(text)
    digits = [
        _with_numeral(text, 0, lambda value: value + 1),
        _with_numeral(text, -1, lambda value: 10 * value + 7),
        _other_sign(text) or _with_numeral(text, 0, lambda value: value + 3),
        _other_letter(text) or _reversed_digits(text) or _with_numeral(text, -1, lambda value: value + 2),
    ]
    one, other, sign, letter = (text if miss is None else miss for miss in digits)
    return {
        "first numeral": one,
        "last numeral": other,
        "sign": sign,
        "letter or order of digits": letter,
        "one element more": f"{text}, 1009",
        "another base": f"{text}_{{17}}" if re.fullmatch(r"[0-9]+", text) else f"\\frac{{{text}}}{{1009}}",
    }


def _near_misses_of_words(text: str) -> dict[str, str]:
    others = {
        "another word": "\\text{neither}",
        "a number": "1009",
        "one element more": f"{text}, 1009",
        "a factor": f"1009 {text}",
        "a sum": f"{text}+1009",
        "a power": f"{text}^{{1011}}",
    }
    return others


def forms(reference: str) -> dict[str, str]:
    """Return twelve spellings of the reference, by name."""
    text = bare(reference)
    return {name: write(text) for name, write in FORMS.items()}
