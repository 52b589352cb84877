"""Examples of a warm start from a file: what a row becomes, and what is refused with its file, line and field."""

from __future__ import annotations

import json
import secrets
from array import array
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.data.examples import Example, load_examples, read_examples, write_examples
from dasd_megatron.data.privileged import Privileged
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.reading import UnreadableError
from tests.support.chat_templates import tokenizer_with

RENDERER = PromptRenderer(character_tokenizer(), teacher_template="teacher_bare.jinja")
GOOD = {"prompt": "1+1=", "response": "#### 2"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(
    path: Path, renderer: PromptRenderer = RENDERER, *, vocab_size: int = 200, max_tokens: int = 64
) -> list[Example]:
    return load_examples(path, renderer, vocab_size=vocab_size, max_tokens=max_tokens)


def refusal(path: Path, renderer: PromptRenderer = RENDERER, **limits: int) -> str:
    with pytest.raises((DataError, TemplateError)) as caught:
        load(path, renderer, **limits)
    message = str(caught.value)
    assert "warm_start.path" in message and "\n" not in message
    return message


def test_a_row_becomes_the_ids_that_training_would_see(tmp_path: Path) -> None:
    problem = Problem("", "1+1=", "", "1+1=2\n#### 2")
    student, teacher = (
        RENDERER.student(problem),
        RENDERER.teacher(problem, Privileged("solution", problem.reference_solution)),
    )
    turns = [
        {"role": "user", "content": "1+1=", "name": 0.5},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "2+2="},
    ]
    path = write(
        tmp_path / "sft.jsonl",
        GOOD,
        {"problem": "1+1=", "response": "#### 2", "weight": 0.25, "other": [1.5]},
        {"problem": "1+1=", "privileged": "1+1=2\n#### 2", "response": "#### 2", "prompt": None},
        {"prompt": turns, "response": "4", "weight": 3},
    )
    examples = load(path)
    tokenizer = RENDERER.tokenizer
    end = [tokenizer.eos_token_id]
    assert [list(example.prompt) for example in examples[:3]] == [student, student, teacher]
    assert tokenizer.decode(examples[3].prompt) == (
        "<|user|>1+1=<|end|><|assistant|>?<|end|><|user|>2+2=<|end|><|assistant|>"
    )
    assert list(examples[0].response) == tokenizer.encode("#### 2", add_special_tokens=False) + end
    assert [example.weight for example in examples] == [1.0, 0.25, 1.0, 3.0]


def test_the_students_template_is_for_problems_and_not_for_prompts(tmp_path: Path) -> None:
    (tmp_path / "student.jinja").write_text("Add: {{ problem }}")
    renderer = PromptRenderer(character_tokenizer(), tmp_path / "student.jinja")
    path = write(tmp_path / "sft.jsonl", GOOD, {"problem": "1+1=", "response": "#### 2"})
    texts = [renderer.tokenizer.decode(example.prompt) for example in load(path, renderer)]
    assert texts == ["<|user|>1+1=<|end|><|assistant|>", "<|user|>Add: 1+1=<|end|><|assistant|>"]


def test_examples_are_read_back_as_they_were(tmp_path: Path) -> None:
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    weights = [1.0, 1 / 3, seed / 7 + 1e-9, 5e-324]
    examples = [
        Example(array("i", [index, 2**31 - 1]), array("i", [3]), weight) for index, weight in enumerate(weights)
    ]
    write_examples(tmp_path / "run" / "examples.jsonl", examples)
    assert read_examples(tmp_path / "run" / "examples.jsonl") == examples


@pytest.mark.parametrize(
    "line", ['{"prompt_ids": [1], "response_ids": [2]}', "[1]", "{", '{"prompt_ids": [4294967296]']
)
def test_damage_of_the_runs_own_copy_is_named(tmp_path: Path, line: str) -> None:
    write_examples(tmp_path / "examples.jsonl", [Example(array("i", [1]), array("i", [2]), 1.0)])
    with (tmp_path / "examples.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UnreadableError, match="line 2 is damaged"):
        read_examples(tmp_path / "examples.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not JSON"),
        ([1], "not an object"),
        ({"response": "2"}, "neither prompt nor problem"),
        ({**GOOD, "problem": "1+1="}, "both prompt and problem"),
        ({**GOOD, "privileged": "2"}, "privileged goes with problem"),
        ({"prompt": "1+1="}, "response is absent or empty"),
        ({**GOOD, "response": " \n"}, "response is absent or empty"),
        ({**GOOD, "response": 2}, "response is 2 and no text"),
        ({**GOOD, "response": "\ud800"}, "response has half of a surrogate pair"),
        ({**GOOD, "prompt": ""}, "prompt is an empty text"),
        ({**GOOD, "prompt": 5}, "prompt is 5"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "among its messages"),
        ({**GOOD, "prompt": [{"role": "assistant", "content": "2"}]}, "last is the assistant's"),
        ({"problem": 5, "response": "2"}, "problem is 5 and no text"),
        ({"problem": "1+1=", "privileged": ["2"], "response": "2"}, "privileged is ['2'] and no text"),
        *(
            ({**GOOD, "weight": weight}, "weight is ")
            for weight in (0, -1, 1e-7, 5e-324, True, "1", 1e7, float("nan"), float("inf"), [1])
        ),
        ('{"prompt": "1+1=", "response": "2", "weight": 1e999}', "weight is '1e999'"),
        ({**GOOD, "response": "é"}, "response has 'é', for which the tokenizer has no token"),
        ({**GOOD, "prompt": "é"}, "prompt has 'é', for which the tokenizer has no token"),
        ({**GOOD, "response": "x" * 60}, "over the model's max_position_embeddings=64"),
    ],
    ids=str,
)
def test_a_row_that_is_no_example_is_named(tmp_path: Path, row: Any, said: str) -> None:
    message = refusal(write(tmp_path / "sft.jsonl", GOOD, row))
    assert f"{tmp_path / 'sft.jsonl'} line 2" in message and said in message


def test_the_longest_example_fits_to_the_token(tmp_path: Path) -> None:
    path = write(tmp_path / "sft.jsonl", GOOD)
    [example] = load(path)
    length = len(example.prompt) + len(example.response)
    assert load(path, max_tokens=length) == [example]
    assert f"max_position_embeddings={length - 1}" in refusal(path, max_tokens=length - 1)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "sft.jsonl", GOOD)
    [example] = load(path)
    highest = max(example.prompt)
    assert f"prompt has the token '=' (id {highest})" in refusal(path, vocab_size=highest)
    path = write(tmp_path / "sft.jsonl", {"prompt": "!", "response": "~"})
    assert "response has the token '~'" in refusal(path, vocab_size=RENDERER.encode("~")[0])


def test_files_without_examples_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.jsonl")
    assert "holds no examples" in refusal(write(tmp_path / "empty.jsonl"))


def test_a_template_that_never_ends_is_broken_off(tmp_path: Path) -> None:
    (tmp_path / "teacher.jinja").write_text(
        "{{ problem }}{{ privileged }}{% if problem == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}"
    )
    renderer = PromptRenderer(character_tokenizer(), teacher_template=tmp_path / "teacher.jinja")
    row = {"problem": "loop", "privileged": "2", "response": "2"}
    path = write(tmp_path / "sft.jsonl", row)
    with pytest.raises(TemplateError, match=r"sft.jsonl line 1.*does not end within 1 s"):
        load(path, renderer)


def test_chat_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write(tmp_path / "sft.jsonl", {"prompt": [{"role": "user", "content": "1+1="}], "response": "2"})
    assert "line 1" in refusal(path, PromptRenderer(tokenizer_with(None)))
