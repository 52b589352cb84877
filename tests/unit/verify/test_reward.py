"""A user's reward function: found by its path, applied to every sample, and named when it fails."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from dasd_megatron.config import VerifyConfig
from dasd_megatron.data.prompts import Problem
from dasd_megatron.errors import ConfigError
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.grading import make_samples
from dasd_megatron.samples import Sample
from dasd_megatron.verify.grader import Grader
from dasd_megatron.verify.reward import LONGEST_FEEDBACK, RewardError

EXAMPLE = Path(__file__).parents[3] / "examples" / "custom_reward"


def graded(path: str | None, *responses: str, needs_feedback: bool = False) -> list[Sample]:
    tokenizer = character_tokenizer()
    completions = []
    for response in responses:
        ids = [*tokenizer.encode(response), tokenizer.eos_token_id]
        completions.append(Completion(ids, [-0.5] * len(ids), "stop", [("1", len(ids))], ""))
    with Grader(VerifyConfig(workers=0, reward=path)) as grader:
        problem = Problem("p", "1+1 =", "2", "")
        return make_samples(
            [problem],
            [0],
            [[1]],
            completions,
            grader,
            samples_per_group=len(responses),
            tokenizer=tokenizer,
            needs_feedback=needs_feedback,
        )


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(
        "import functools, math\n"
        "constant = 3\n"
        "def fails(sample): return 1 / (len(sample.text) - len(sample.text))\n"
        "def endless(sample): return math.inf\n"
        "def text(sample): return 'much'\n"
        "def exits(sample): raise SystemExit(3)\n"
        "def huge(sample): return 1e308\n"
        "def low(sample): return -1.5e15\n"
        "def largest(sample): return -1e15\n"
        "def said(sample): return 0.25, 'too \\ud800 short ' + 'x' * 10**6\n"
        "def silent(sample): return 1, ' \\n' if sample.sample else None\n"
        "def three(sample): return 1, 'a', 'b'\n"
        "def code(sample): return 1, b'a'\n"
        "def wordy(sample): return 'much', 'a'\n"
        "def vandal(sample):\n"
        "    for ids in (sample.prompt_ids, sample.response_ids, sample.rollout_log_probs): ids[:] = 0\n"
        "    sample.weight_versions[0][0] = 'other'; sample.text = None; return 0.25\n"
        "partial = functools.partial(lambda sample, by: 1 / by, by=0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine"
    sys.modules.pop("mine", None)


def test_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    short, long, wrong = graded("rewards:brief", "#### 2", "well #### 2", "#### 3")
    assert 1.2 > short.reward > long.reward > 1.0 and wrong.reward == 0.0
    # The verifier's own verdict stays as it was.
    assert (short.predicted_answer, wrong.predicted_answer) == ("2", "3")


def test_the_example_with_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    found = graded("rewards:explained", "#### 2", "#### 3", "well", needs_feedback=True)
    assert [(sample.reward, sample.feedback) for sample in found] == [
        (1.0, None),
        (0.0, "3 is not the answer."),
        (0.0, "No answer was found in the response."),
    ]


def test_without_one_the_verdict_is_the_reward() -> None:
    assert [sample.reward for sample in graded(None, "#### 2", "#### 3")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "ZeroDivisionError"),
        ("endless", f"gave {math.inf}"),
        ("text", "could not convert string"),
        ("exits", "SystemExit: 3"),
        ("huge", r"gave 1e\+308; a reward lies between -1e\+15 and 1e\+15"),
        ("three", r"float.*; return a number, or \(number, text\)"),
        ("code", "gave the feedback b'a'; return"),
        ("wordy", "could not convert string"),
        ("low", r"gave -1\.5e\+15; a reward lies between"),
    ],
)
def test_what_fails_is_named(module: str, name: str, said: str) -> None:
    with pytest.raises(RewardError, match=f"{module}:{name} on problem p, sample 0.*{said}"):
        graded(f"{module}:{name}", "#### 2")


def test_a_text_beside_the_number_is_the_feedback(module: str) -> None:
    (sample,) = graded(f"{module}:said", "#### 2", needs_feedback=True)
    assert sample.reward == 0.25 and sample.feedback.startswith("too ? short xxx")
    assert len(sample.feedback) == LONGEST_FEEDBACK
    assert [sample.feedback for sample in graded(f"{module}:silent", "#### 2", "3", needs_feedback=True)] == [None] * 2
    # Without a teacher that is shown it, a number is enough.
    assert [sample.feedback for sample in graded(f"{module}:largest", "#### 2")] == [None]


@pytest.mark.parametrize("name", ["largest", "three"])
def test_a_number_alone_is_refused_where_the_teacher_is_shown_feedback(module: str, name: str) -> None:
    with pytest.raises(
        RewardError, match=rf"{module}:{name} on problem p, sample 0 gave .*feedback; return \(number, text\)"
    ) as caught:
        graded(f"{module}:{name}", "#### 2", needs_feedback=True)
    assert "\n" not in str(caught.value)


def test_what_a_function_changes_in_its_sample_changes_nothing(module: str) -> None:
    before, after = (graded(path, "#### 2", "3") for path in (None, f"{module}:vandal"))
    assert [sample.reward for sample in after] == [0.25, 0.25]
    for sample, other in zip(before, after, strict=True):
        other.reward = sample.reward
        assert sample == other


def test_the_largest_reward_has_finite_statistics(module: str) -> None:
    (sample,) = graded(f"{module}:largest", "#### 2")
    rewards = torch.tensor([sample.reward, -sample.reward] * 4096, dtype=torch.float32)
    assert rewards.std().isfinite() and (rewards**2).sum().isfinite()


def test_a_callable_without_a_name_is_named_too(module: str) -> None:
    with pytest.raises(RewardError, match="partial.* on problem p, sample 0: ZeroDivisionError"):
        graded(f"{module}:partial", "#### 2")


def test_what_cannot_be_found_is_refused(module: str) -> None:
    with pytest.raises(ConfigError, match="verify.reward=mine:absent"):
        Grader(VerifyConfig(workers=0, reward="mine:absent"))
