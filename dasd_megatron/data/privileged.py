"""The privileged text of a teacher: what each source of ``teacher.privileged`` has for a problem or for a response.

``solution``, ``hint``, ``answer`` and ``unpaired`` are known before the run. ``peer`` and ``feedback`` arise in it. The
policy or an environment has written them, so they are bounded, and freed of the tokenizer's special tokens, which would
end a turn or begin one in the middle of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dasd_megatron.data.prompts import Problem, normalize_text
from dasd_megatron.samples import sampling_seed

NEEDS_SOLUTION = ("solution", "hint")
"""Sources that a problem without a reference solution lacks."""


class Privileged(NamedTuple):
    """A privileged text and the source of ``teacher.privileged`` that it is from."""

    source: str
    text: str


def text_of_problem(source: str, problem: Problem, hint_fraction: float) -> str:
    """Return the text of ``solution``, ``hint`` or ``answer``; empty where the problem has none."""
    if source == "answer":
        return problem.expected_answer
    solution = problem.reference_solution
    return solution if source == "solution" else solution[: math.ceil(len(solution) * hint_fraction)]


class UnpairedTexts:
    """Other problems with their solutions, as a control: what the teacher sees is right, and not about its problem.

    Args:
        problems: the training problems; those with a reference solution are shown.
        seed: the run's. A problem is shown the same other one throughout a run.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self._solved = [
            (normalize_text(problem.problem), problem) for problem in problems if problem.reference_solution
        ]
        self._seed = seed

    @property
    def distinct(self) -> int:
        """Number of different problem texts that have a solution; with 2, every problem has another one."""
        return len({text for text, _ in self._solved})

    def of_problem(self, problem: Problem) -> str:
        """Return another problem and its solution; empty where none has another text."""
        own, count = normalize_text(problem.problem), len(self._solved)
        first = sampling_seed(self._seed, "unpaired", problem.id) % max(count, 1)
        for place in range(first, first + count):
            text, other = self._solved[place % count]
            if text != own:
                return f"{other.problem}\n{other.reference_solution}"
        return ""


def without_thinking(text: str) -> str:
    """Return what stands behind the last ``</think>``, and before a ``<think>`` that no such mark ends."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def choose_peer(lengths: dict[int, int], own: int, way: str, seed: int) -> int | None:
    """Return the response that a teacher is shown, by its place in the group; None where there is none.

    Args:
        lengths: tokens of the right responses that can be shown, by place.
        own: the place of the response that is scored. It is never chosen; another with the same text may be.
        way: ``shortest`` (of equal ones the first) or ``random``.
        seed: decides where ``way`` is random.
    """
    places = sorted(place for place in lengths if place != own)
    if not places:
        return None
    return min(places, key=lambda place: lengths[place]) if way == "shortest" else places[seed % len(places)]


def unknown_token_id(tokenizer: Any) -> int | None:
    """Return the id that stands for text without a token.

    Some fast tokenizers have such an id although ``unk_token_id`` is None.
    """
    unknown_id: int | None = tokenizer.unk_token_id
    if unknown_id is None and tokenizer.is_fast:
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        unknown_id = None if unknown is None else tokenizer.convert_tokens_to_ids(unknown)
    return unknown_id


class RunTexts:
    """Texts that arise in the run, as a prompt may show them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        most_tokens: longest text.
        vocab_size: tokens of the model; None where it is not known. A text with others cannot be shown.
    """

    def __init__(self, tokenizer: Any, most_tokens: int, vocab_size: int | None) -> None:
        self.tokenizer, self.most_tokens, self.vocab_size = tokenizer, most_tokens, vocab_size
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)} - {""}
        self._special: dict[str, dict[int, set[str]]] = {}
        for text in self._texts:
            self._special.setdefault(text[-1], {}).setdefault(len(text), set()).add(text)
        # The token for unknown text is harmless: it stands for a character of the text.
        self._special_ids = set(tokenizer.all_special_ids) - {unknown_token_id(tokenizer)}

    def plain(self, text: str) -> str:
        """Return the text without literal special tokens, also those that arise where one is taken out.

        It takes time in proportion to the length.
        """
        # Nearly all texts have none.
        if not any(special in text for special in self._texts):
            return text.strip()
        kept: list[str] = []
        for character in text:
            kept.append(character)
            for length, specials in self._special.get(character, {}).items():
                if "".join(kept[-length:]) in specials:
                    del kept[-length:]
                    break
        return "".join(kept).strip()

    def tokens(self, text: str) -> int | None:
        """Return the number of tokens of a text that can be shown; None for one that is empty, too long, or that has
        tokens that no text of a prompt may have."""
        ids = self._encode(text)
        if not 0 < len(ids) <= self.most_tokens or not self._special_ids.isdisjoint(ids):
            return None
        return None if self.vocab_size is not None and max(ids) >= self.vocab_size else len(ids)

    def attempt_with_feedback(self, attempt: str, feedback: str) -> str:
        """Return a failed attempt and what was said of it, within the limit; empty where nothing was said.

        Where they are longer, the feedback keeps its beginning: what the attempt leaves, and half at least. Of the
        attempt the end is kept.
        """
        ids = self._encode(attempt)
        left = self.most_tokens - len(ids) - len(self._encode("Attempt:\n\n\nFeedback:\n"))
        feedback = self._head(feedback, max(1, self.most_tokens // 2, left))
        if not feedback:
            return ""
        alone = f"Feedback:\n{feedback}"
        room = min(len(ids), self.most_tokens - len(self._encode(f"Attempt:\n\n\n{alone}")))
        # Texts may have more tokens together than apart, so it is tried.
        while room > 0:
            end = attempt if room == len(ids) else self.plain(self.tokenizer.decode(ids[-room:]).lstrip("\ufffd"))
            text = f"Attempt:\n{end}\n\n{alone}"
            if end and len(self._encode(text)) <= self.most_tokens:
                return text
            room = room * 7 // 8
        return alone

    def stand_in(self, tokens: int) -> str:
        """Return a text of about so many tokens and no more, for trying templates."""
        # A pair of characters is a token at least where the tokenizer knows no longer ones.
        return self._head("1 " * tokens, tokens)

    def _head(self, text: str, tokens: int) -> str:
        ids = self._encode(text)
        return text if len(ids) <= tokens else self.plain(self.tokenizer.decode(ids[:tokens]).rstrip("\ufffd"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
