"""The teacher's prompts: of each sample of a group, and of problems that have no samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from dasd_megatron.config import ARISING_SOURCES, TeacherConfig
from dasd_megatron.data.privileged import (
    Privileged,
    RunTexts,
    UnpairedTexts,
    choose_peer,
    text_of_problem,
    without_thinking,
)
from dasd_megatron.data.prompts import DataError, Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.samples import Sample, ids_array, sampling_seed

STAND_IN = "1"
"""Text that stands for one that arises in the run, where templates are tried before it."""


@dataclass(frozen=True)
class TeacherPrompts:
    """Maker of the teacher's prompts: for each sample the first source of ``teacher.privileged`` that it has.

    A sample's text depends on its group and the run's seed alone, so that it is the same when a step is replayed or
    taken again.

    Args:
        settings: the configuration of the teacher.
        renderer: makes the prompts. Its tokenizer bears one thread alone.
        problems: the training problems, of which ``unpaired`` shows others.
        seed: the run's.
        max_tokens: longest prompt with a text that arises in the run. A source whose prompt is longer is passed over.
        vocab_size: tokens of the model; None where it is not known.
    """

    settings: TeacherConfig
    renderer: PromptRenderer
    problems: Sequence[Problem]
    seed: int
    max_tokens: int
    vocab_size: int | None = None

    def assign(self, group: Sequence[Sample]) -> None:
        """Give all samples of one prompt their privileged text, its source and the teacher's prompt. A sample that has
        no source gets none of them.

        Raises:
            TemplateError: the template fails on a text.
        """
        texts = {place: self._shown(sample) for place, sample in enumerate(group)} if self._arises else {}
        peers = {
            place: tokens
            for place, text in texts.items()
            if self.settings.is_right(group[place].reward) and (tokens := self._run_texts.tokens(text))
        }
        for place, sample in enumerate(group):
            sample.privileged_source, sample.privileged, sample.teacher_prompt_ids = None, "", None
            for source in self.settings.privileged:
                if source == "peer":
                    peer = choose_peer(peers, place, self.settings.peer, self._peer_seed(sample))
                    text = "" if peer is None else texts[peer]
                elif source == "feedback":
                    text = self._feedback(sample, texts[place])
                else:
                    text = self._known(source, _problem_of(sample))
                ids = self._prompt(_problem_of(sample), Privileged(source, text)) if text else None
                if ids is not None:
                    sample.privileged_source, sample.privileged = source, text
                    sample.teacher_prompt_ids = ids_array(ids)
                    break

    def known_text(self, problem: Problem) -> Privileged | None:
        """Return the first text that is known before the run; None for a problem without any."""
        for source in self.settings.privileged:
            text = "" if source in ARISING_SOURCES else self._known(source, problem)
            if text:
                return Privileged(source, text)
        return None

    def texts_to_try(self, problem: Problem) -> list[Privileged]:
        """Return what a teacher of the problem may be shown: stand-ins for texts that arise in the run, and behind them
        the text that is known now.

        Raises:
            DataError: there is none at all.
        """
        arising = [Privileged(source, STAND_IN) for source in self.settings.privileged if source in ARISING_SOURCES]
        known = self.known_text(problem)
        if known is None and not arising:
            raise DataError(
                f"problem {problem.id!r} has nothing of teacher.privileged=[{','.join(self.settings.privileged)}]; add "
                "a reference solution, or write answer or peer behind it, which need none"
            )
        return arising if known is None else [*arising, known]

    def example(self, problem: Problem) -> list[int]:
        """Return the token ids of a teacher's prompt for a problem that has no samples, but a reference solution: it
        stands for texts that arise in the run."""
        arising = Privileged("peer" if "peer" in self.settings.privileged else "solution", problem.reference_solution)
        return self.renderer.teacher(problem, self.known_text(problem) or arising)

    def check_long_texts(self, problem: Problem, tokens: int) -> None:
        """Refuse a template that makes more of a text of the greatest length than one prompt may have: the source would
        always be passed over. ``problem``: the longest; ``tokens``: of the text.

        Raises:
            TemplateError: names the template and what to change.
        """
        text = self._run_texts.stand_in(tokens)
        for source in self.settings.privileged:
            length = len(self.renderer.teacher(problem, Privileged(source, text))) if source in ARISING_SOURCES else 0
            if length > self.max_tokens:
                raise TemplateError(
                    f"{self.renderer.makers['teacher'].describe(problem)} makes a prompt of {length} tokens of a "
                    f"{source} of {tokens}, over {self.max_tokens} (rollout.max_prompt_tokens and the text); show the "
                    "text once, lower teacher.max_privileged_tokens, or raise rollout.max_prompt_tokens"
                )

    def _known(self, source: str, problem: Problem) -> str:
        if source == "unpaired":
            return self.unpaired.of_problem(problem)
        return text_of_problem(source, problem, self.settings.hint_fraction)

    def _shown(self, sample: Sample) -> str:
        """Return the text of a response as another prompt may show it."""
        return self._run_texts.plain(without_thinking(sample.text) if self.settings.remove_thinking else sample.text)

    def _feedback(self, sample: Sample, attempt: str) -> str:
        if sample.feedback is None or self.settings.is_right(sample.reward):
            return ""
        text = self._run_texts.attempt_with_feedback(attempt, self._run_texts.plain(sample.feedback))
        return text if self._run_texts.tokens(text) else ""

    def _prompt(self, problem: Problem, shown: Privileged) -> list[int] | None:
        """Return the token ids of a prompt; None where a text that arose in the run makes it too long."""
        ids = self.renderer.teacher(problem, shown)
        return None if shown.source in ARISING_SOURCES and len(ids) > self.max_tokens else ids

    def _peer_seed(self, sample: Sample) -> int:
        return sampling_seed(self.seed, "peer", sample.position, sample.sample)

    @property
    def _arises(self) -> bool:
        return self.settings.has_arising_texts

    @functools.cached_property
    def unpaired(self) -> UnpairedTexts:
        """The other problems that ``unpaired`` shows."""
        return UnpairedTexts(self.problems, self.seed)

    @functools.cached_property
    def _run_texts(self) -> RunTexts:
        return RunTexts(self.renderer.tokenizer, self.settings.max_privileged_tokens, self.vocab_size)


def _problem_of(sample: Sample) -> Problem:
    return Problem(sample.problem_id, sample.problem, sample.expected_answer, sample.reference_solution)
