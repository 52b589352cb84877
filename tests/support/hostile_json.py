"""JSON values that a client may send by mistake or on purpose, as the text of a body has them."""

from __future__ import annotations

import json

from hypothesis import strategies

# Written as text, since json.dumps cannot write all of them.
HOSTILE_TEXTS = (
    "null",
    "true",
    "false",
    "0",
    "-0",
    "1",
    "-1",
    "-2",
    "1.5",
    "-0.0",
    "5e-324",
    "1e308",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    *(str(sign * (2**bits + shift)) for bits in (31, 32, 63, 64) for sign in (1, -1) for shift in (-1, 0)),
    "1" + "0" * 400,
    "-1" + "0" * 4299,
    "9" * 5000,
    '""',
    '"a"',
    '"\\ud800"',
    '"\\udfff x"',
    '"\\ud83d\\ude00"',
    '"\\u0000"',
    '"' + "x" * 5000 + '"',
    "[]",
    "[[]]",
    "[null]",
    "[true]",
    "[1, 2.5]",
    '[1, "a"]',
    "[1, [2]]",
    "[" + "1," * 4999 + "1]",
    "[" + '"a",' * 4999 + '"a"]',
    "[" * 900 + "]" * 900,
    "[" * 5000 + "]" * 5000,
    "{}",
    '{"a": {"a": {"a": 1}}}',
    '{"": null}',
    '{"a": 1, "a": "b"}',
    '{"max_new_tokens": 1, "n": 2}',
    "[{}, {}]",
)


def body_text(fields: dict[str, str]) -> str:
    """Return a JSON object whose fields have these texts as values."""
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in fields.items()) + "}"


def hostile_values() -> strategies.SearchStrategy[str]:
    """Return a strategy of texts of JSON values: one of HOSTILE_TEXTS, or a value that is made up."""
    leaves = (
        strategies.none()
        | strategies.booleans()
        | strategies.integers(-(2**70), 2**70)
        | strategies.floats()
        | strategies.text(max_size=20)
    )
    made_up = strategies.recursive(
        leaves,
        lambda inner: (
            strategies.lists(inner, max_size=4)
            | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=10,
    )
    return strategies.sampled_from(HOSTILE_TEXTS) | made_up.map(json.dumps)
