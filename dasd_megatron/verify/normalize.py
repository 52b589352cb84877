r"""One spelling of answers, before anything is compared.

The same mathematics is written in many ways: ``½``, ``\dfrac12`` and ``\frac{1}{2}``; ``\mathrm{e}^2`` and ``e^2``;
``70~\text{m}`` and ``70\text{ m}``. :func:`normalize` gives all of them one spelling, and it is applied to the answer
of a response and to the expected one alike. It knows notation alone: what is equal in value is decided afterwards.

Every function takes time in proportion to its input.
"""

from __future__ import annotations

import functools
import re
import unicodedata

# A pass can uncover what an earlier step of it would have changed.
_MOST_PASSES = 6

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓ", "0123456789+-=()nx")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓ]+")
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho",
    "σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega",
    "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi",
    "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_SIGNS = {
    "×": "times", "·": "cdot", "⋅": "cdot", "÷": "div", "±": "pm", "∓": "mp", "≤": "le", "⩽": "le", "≦": "le",
    "≥": "ge", "⩾": "ge", "≧": "ge", "≠": "ne", "≈": "approx", "∞": "infty", "∪": "cup", "⋃": "cup", "∩": "cap",
    "∈": "in", "∉": "notin", "∅": "emptyset", "⌀": "emptyset", "∨": "lor", "∧": "land", "∠": "angle", "△": "triangle",
    "∑": "sum", "∏": "prod", "∫": "int", "∂": "partial", "→": "to", "⟨": "langle", "⟩": "rangle", "⌊": "lfloor",
    "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "∖": "setminus", "⊂": "subset", "⊆": "subseteq", "ℓ": "ell",
}  # fmt: skip
_DOUBLE_STRUCK = {"ℝ": "R", "ℤ": "Z", "ℕ": "N", "ℚ": "Q", "ℂ": "C"}
_CHARACTERS = str.maketrans(
    {letter: f"\\{name} " for letter, name in {**_GREEK, **_SIGNS}.items()}
    | {letter: f"\\mathbb{{{name}}}" for letter, name in _DOUBLE_STRUCK.items()}
    | dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")
    | dict.fromkeys("\u2044\u2215", "/")
    | dict.fromkeys("\u2032\u2019", "'")
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad", "")
    | {"\u2033": "''", "°": "^{\\circ}", "∛": "\\sqrt[3]√", "∜": "\\sqrt[4]√", "\u2217": "*", "\u2236": ":", "、": ","}
)
_ROOT_ARGUMENT = re.compile(r"[0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+")

# The order matters: a command stands before those that begin like it.
_COMMANDS = (
    (re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|boldmath)(?![A-Za-z])\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\(?:varnothing)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:vee|lor)(?![A-Za-z])|\\(?:text|mbox)\{\s*or\s*\}"), " or "),
    (re.compile(r"\\(?:wedge|land)(?![A-Za-z])|\\(?:text|mbox)\{\s*,?\s*and\s*\}"), " and "),
    (re.compile(r"\\(?:colon|ratio)(?![A-Za-z])\s*|\{:\}"), ":"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\lbrack(?![A-Za-z])"), "["),
    (re.compile(r"\\rbrack(?![A-Za-z])"), "]"),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:ldots|cdots|dotsc)(?![A-Za-z])|…"), r"\\dots "),
    (re.compile(r"\\(?:degrees?|textdegree)(?![A-Za-z])|\\circ(?![A-Za-z])"), r"\\circ "),
    (
        re.compile(r"\^\s*\{\s*\^\s*\{\s*\\circ\s*\}\s*\}|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ\s*"),
        r"\\circ ",
    ),
    (re.compile(r"(?<=[0-9])(?:,\\!\s?|\{,\}\s?|\\,|\\!)(?=[0-9]{3}(?![0-9]))|\\!|\{\}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:[,;:> ]|(?:q?quad|enspace|thinspace|medspace|thickspace)(?![A-Za-z]))|~"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),
    # A comma that stands outside the formulas separates two answers. A number is one formula.
    (re.compile(r"\\?\$\s*,\s*\\?\$"), ", "),
    (re.compile(r"\\?[$€£¥₹]"), ""),
    (re.compile(r"\\([%&#_])"), r"\1"),
    (re.compile(r"\{?\s?([0-9A-Za-z]{1,9})\s?\\choose\s?([0-9A-Za-z]{1,9})\s?\}?"), r"\\binom{\1}{\2}"),
)
_OF_TEXT = frozenset(
    (
        "text", "textrm", "textnormal", "textup", "textsf", "texttt", "textmd", "mbox", "hbox", "mathrm", "mathsf",
        "mathtt", "mathnormal", "operatorname", "ensuremath",
    )
)  # fmt: skip
_OF_STYLE = frozenset(
    (
        "textbf", "textit", "textsl", "textsc", "emph", "underline", "fbox", "boxed", "framebox", "mathbf", "mathit",
        "boldsymbol", "bm", "pmb", "bold", "uline",
    )
)  # fmt: skip
_OF_COLOR = frozenset({"textcolor", "color", "mathcolor", "colorbox"})
_SWITCH = re.compile(r"\\(?:rm|bf|it|sf|tt|bfseries|itshape)(?![A-Za-z])\s*")
_WRAPPER = re.compile(r"\\([A-Za-z]+)\*?\s*(\{)?")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'/]*(?:-[A-Za-z][A-Za-z .,'/]*)*")
_ENDS_IN_COMMAND = re.compile(r"\\[A-Za-z]+\Z")
_ORDINAL = re.compile(r"(?<=[0-9])\s*(?:\^\s*)?\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)(?:\s*\})?\s*\}?(?![A-Za-z])")
_BARE_DENOMINATOR = re.compile(r"\s*([0-9A-Za-z])")
_GREEK_NUMERATOR = re.compile(r"\\frac\s*(\\(?:pi|theta|alpha|beta|lambda|phi))(?=\s*[0-9{]|\s+[A-Za-z])")
_MIXED = re.compile(
    r"(?<![0-9A-Za-z./^_{}\\)])([0-9]{1,18})(?:\s+([0-9]{1,18})\s*/\s*([0-9]{1,18})(?![0-9.]|\s*[/^])"
    r"|\s*\\frac\{([0-9]{1,18})\}\{([0-9]{1,18})\})"
)
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{0,30})\.([0-9]{0,30})\\(?:overline|bar|dot|overbar)\s*(?:\{([0-9]{1,30})\}|([0-9]))(?![0-9])"
)
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z])")
_EMPHASIZED = re.compile(r"\s*\*\*(.+)\*\*\s*", re.DOTALL)
_NEEDS_MORE = re.compile(r"[A-Za-z^*{\\$~]")
_SPACES = re.compile(r"\s+")


_FUNCTIONS = frozenset(
    (
        "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log",
        "exp", "sqrt", "max", "min", "gcd", "lcm", "det", "infty", "pi",
    )
)  # fmt: skip
_BARE_FUNCTION = re.compile(
    r"(?<![A-Za-z\\{])(?:(sqrt|cbrt)(?=\s*\()|(infinity|inf)(?![A-Za-z])"
    r"|(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|exp|pi)(?=[\s(0-9^_*/+)\-,]|\Z))"
)
_ROOT = re.compile(r"\\?sqrt\s*(?=\()")
_POWER = re.compile(r"\^\s*([+-]?\s?[0-9]+(?![0-9]))|\*\*\s*")


@functools.lru_cache(maxsize=4096)
def normalize(answer: str) -> str:
    """Return the answer in the one spelling of this module.

    The result is its own spelling: to normalize it again changes nothing, but for nests that no answer has.
    """
    if answer.isascii() and not _NEEDS_MORE.search(answer):
        return _numbers(_SPACES.sub(" ", answer).strip())
    text = answer
    emphasized = _EMPHASIZED.fullmatch(text)
    if emphasized is not None:
        text = emphasized[1]
    for _ in range(_MOST_PASSES):
        before = text
        text = _normalize_once(text)
        if text == before:
            break
    return text


def _normalize_once(text: str) -> str:
    if not text.isascii():
        text = _from_unicode(text)
    if "\\\\" in text:
        # The end of a matrix's row must not be read with what follows. Elsewhere a doubled backslash is a slip.
        text = text.replace("\0", "") if "\\begin" in text else _DOUBLED.sub(r"\\", text)
        text = text.replace("\\\\", "\0")
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = _with_functions(_unwrapped(text))
    return _numbers(_braced_arguments(_SPACES.sub(" ", text).strip())).replace("\0", "\\\\")


def _with_functions(text: str) -> str:
    r"""Return the text with ``\sin`` for ``sin``, braces around the argument of a root, and powers in braces."""
    text = _BARE_FUNCTION.sub(_function_name, text)
    if _ROOT.search(text):
        text = _with_roots(_ROOT.sub("√", text))
    text = _POWER.sub(lambda match: f"^{{{match[1].replace(' ', '')}}}" if match[1] else "^", text)
    return _with_powers(text) if "^(" in text else text


def _function_name(match: re.Match[str]) -> str:
    if match[1]:
        return "\\sqrt" if match[1] == "sqrt" else "\\sqrt[3]√"
    return "\\infty " if match[2] else f"\\{match[3]} "


def _with_powers(text: str) -> str:
    """Return the text with braces around exponents in parentheses."""
    partner = _pairs(text, "(", ")")
    characters = list(text)
    for opening, closing in partner.items():
        if opening and text[opening - 1] == "^":
            characters[opening], characters[closing] = "{", "}"
    return "".join(characters)


def _numbers(text: str) -> str:
    """Return the text with ordinals, mixed numbers and repeating decimals as plain numbers and fractions."""
    text = _ORDINAL.sub("", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    return _MIXED.sub(_mixed_fraction, text)


def _from_unicode(text: str) -> str:
    text = _RAISED.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda run: f"_{{{run[0].translate(_SUBSCRIPTS)}}}", text)
    text = text.translate(_CHARACTERS)
    characters = []
    for character in text:
        if character.isascii():
            characters.append(character)
            continue
        plain = unicodedata.normalize("NFKC", character).translate(_CHARACTERS)
        numerator, slash, denominator = plain.partition("/")
        if slash and numerator.isdigit() and denominator.isdigit():
            plain = f"\\frac{{{numerator}}}{{{denominator}}}"
        elif character.isdecimal():
            plain = str(unicodedata.decimal(character))
        characters.append(plain)
    text = "".join(characters)
    return _with_roots(text) if "√" in text else text


def _with_roots(text: str) -> str:
    r"""Return the text with ``\sqrt{...}`` in place of root signs, whose argument is a group in parentheses, a number
    or a letter."""
    partner = _pairs(text, "(", ")")
    pieces: list[str] = []
    closing: set[int] = set()
    position = 0
    while position < len(text):
        if text[position] in "()" and position in closing:
            pieces.append("}")
            position += 1
        elif text[position] != "√":
            pieces.append(text[position])
            position += 1
        else:
            position += 1
            if not (pieces and pieces[-1] == "]"):
                pieces.append("\\sqrt")
            while position < len(text) and text[position] == " ":
                position += 1
            argument = _ROOT_ARGUMENT.match(text, position)
            if position in partner:
                closing.add(partner[position])
                pieces.append("{")
                position += 1
            elif argument is not None and argument[0] != "\\frac":
                pieces.append(f"{{{argument[0]}}}")
                position = argument.end()
    return "".join(pieces)


def _pairs(text: str, opening: str, closing: str) -> dict[int, int]:
    """Return where each opening bracket is closed. Brackets behind a backslash do not count."""
    pairs: dict[int, int] = {}
    open_at: list[int] = []
    escaped = False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == opening:
            open_at.append(position)
        elif character == closing and open_at:
            pairs[open_at.pop()] = position
    return pairs


def _unwrapped(text: str) -> str:
    r"""Return the text without commands that only say how something looks.

    Words stay in ``\text{...}``, which tells them from products of letters. What stands in an exponent keeps its
    braces.
    """
    partner = _pairs(text, "{", "}")
    pieces: list[str] = []
    # What to write in place of a closing brace, by its position.
    closing: dict[int, str] = {}
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            piece, position = _command_at(text, position, partner, closing, pieces)
        elif character == "}" and position in closing:
            piece, position = closing[position], position + 1
        elif character == "{" and (switch := _SWITCH.match(text, position + 1)) and position in partner:
            closing[partner[position]] = ""
            piece, position = "", switch.end()
            _keep_apart(pieces, text[position : position + 1])
        else:
            piece, position = character, position + 1
        pieces.append(piece)
    return "".join(pieces)


def _command_at(
    text: str, position: int, partner: dict[int, int], closing: dict[int, str], pieces: list[str]
) -> tuple[str, int]:
    """Return what replaces the command at ``position`` with its opening brace, and where the text goes on.

    ``closing`` takes note of what replaces the closing brace. ``pieces`` is what was written before.
    """
    match = _WRAPPER.match(text, position)
    if match is None:
        return text[position : position + 2], position + 2
    name, brace = match[1], match.end() - 1
    if name in _OF_COLOR and match[2] and brace in partner:
        after = partner[brace] + 1
        while after < len(text) and text[after] == " ":
            after += 1
        if after < len(text) and text[after] == "{" and after in partner:
            closing[partner[after]] = ""
            after += 1
        _keep_apart(pieces, text[after : after + 1])
        return "", after
    switch = _SWITCH.match(text, position)
    if switch is not None:
        _keep_apart(pieces, text[switch.end() : switch.end() + 1])
        return "", switch.end()
    if name not in _OF_TEXT and name not in _OF_STYLE or not match[2] or brace not in partner:
        return text[position : match.start() + 1 + len(name)], match.start() + 1 + len(name)
    content = text[brace + 1 : partner[brace]].strip() if partner[brace] - brace <= 200 else None
    if content in _FUNCTIONS and name in _OF_TEXT:
        return f"\\{content} ", partner[brace] + 1
    if content == "":
        return " ", partner[brace] + 1
    if (
        name in _OF_TEXT
        and content is not None
        and _WORDS.fullmatch(content)
        and (len(content) > 1 or _is_unit(content, name, text, position))
    ):
        return f"\\text{{{content}}}", partner[brace] + 1
    raised = position > 0 and text[position - 1] in "^_"
    closing[partner[brace]] = "}" if raised else ""
    if not raised:
        _keep_apart(pieces, text[brace + 1 : brace + 2])
    return "{" if raised else "", brace + 1


def _is_unit(letter: str, name: str, text: str, position: int) -> bool:
    """Return whether an upright letter behind a number is a unit, and no constant or symbol."""
    before = text[:position].rstrip()[-1:] if position <= 200 else text[position - 20 : position].rstrip()[-1:]
    return name in _OF_TEXT and letter not in "eidABCDEFGHIJ" and bool(before) and (before.isdigit() or before in "}/")


def _keep_apart(pieces: list[str], following: str) -> None:
    """Add a space where a letter would otherwise become part of the command before it."""
    if following.isalpha() and pieces and _ENDS_IN_COMMAND.search(pieces[-1]):
        pieces.append(" ")


def _braced_arguments(text: str) -> str:
    r"""Return the text with braces around the arguments of ``\frac`` and ``\sqrt``: ``\frac12`` becomes
    ``\frac{1}{2}``."""
    if "\\frac" not in text and "\\sqrt" not in text:
        return text
    text = re.sub(r"\\sqrt\s*(\[[^\[\]{}]{1,8}\])?\s*([0-9A-Za-z])", r"\\sqrt\1{\2}", text)
    text = re.sub(r"\\sqrt\s+(?=[\[{])", r"\\sqrt", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*([0-9A-Za-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([0-9A-Za-z])\s*(?=[{\\])", r"\\frac{\1}", text)
    text = _GREEK_NUMERATOR.sub(r"\\frac{\1}", text)
    text = re.sub(r"\\frac\s+(?=\{)", r"\\frac", text)
    if "\\frac{" not in text:
        return text
    partner = _pairs(text, "{", "}")
    pieces, done = [], 0
    for match in re.finditer(r"\\frac\{", text):
        end = partner.get(match.end() - 1)
        if end is None:
            continue
        denominator = _BARE_DENOMINATOR.match(text, end + 1)
        if denominator is not None and end >= done:
            pieces.append(text[done : end + 1] + f"{{{denominator[1]}}}")
            done = denominator.end()
    return "".join(pieces) + text[done:]


def _mixed_fraction(match: re.Match[str]) -> str:
    whole, numerator, denominator = match[1], match[2] or match[4], match[3] or match[5]
    if not 0 < int(numerator) < int(denominator):
        return match[0]
    return f"\\frac{{{int(whole) * int(denominator) + int(numerator)}}}{{{denominator}}}"


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    denominator = (10 ** len(period) - 1) * 10 ** len(fixed)
    numerator = int(whole + fixed + period) - int(whole + fixed)
    return f"\\frac{{{numerator}}}{{{denominator}}}"
