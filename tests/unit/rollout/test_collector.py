"""Collecting rollouts: from prompts to a step's groups, with servers' answers made up here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dasd_megatron.config import Config, load_config
from dasd_megatron.data.order import DataOrder
from dasd_megatron.data.prompts import Problem
from dasd_megatron.data.rendering import TemplateError
from dasd_megatron.data.teacher_prompts import TeacherPrompts
from dasd_megatron.data.templates import PromptRenderer
from dasd_megatron.models.tiny import character_tokenizer
from dasd_megatron.plugins import PluginError
from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.buffer import BufferState, read_groups
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.collector import Collector
from dasd_megatron.rollout.transport import RolloutServerError
from dasd_megatron.rollout_files import save_samples
from dasd_megatron.samples import version_name
from dasd_megatron.verify.grader import Grader
from tests.support.teachers import teacher_of

TOKENIZER = character_tokenizer()
PROBLEMS = [Problem(f"p{index}", f"{index}+1 =", str(index + 1), "") for index in range(10)]
GROUPS, SAMPLES = 2, 2
RIGHT, WRONG = "right", "wrong"


class Servers(RolloutClient):
    """Answers in the place of servers, which hold the weights ``step``. What each response is, ``answer`` says of
    (problem, sample)."""

    def __init__(self) -> None:
        super().__init__(
            ["http://server"], connect_timeout=1, request_timeout=1, max_retries=0, backoff=0, max_in_flight=1
        )
        self.step = 0
        self.hold: set[int] = set()
        """Problems that are not answered as long as they are here."""
        self.answer: Callable[[int, int], str] = lambda problem, sample: RIGHT if sample else WRONG
        self.asked: list[tuple[int, int]] = []
        """(problem, version) of each prompt that was asked."""
        self.seeds: dict[int, list[int]] = {}
        self.requests: list[str] = []
        self.error: Exception | None = None
        self.paused = False

    async def generate(self, prompts: Any, sampling_params: Any, *, weight_version: Any, **_: Any) -> list[Completion]:
        if self.error is not None:
            raise self.error
        began = self.step
        problem = int(re.search(r"(\d+)\+", TOKENIZER.decode(prompts[0]))[1])
        self.asked.append((problem, began))
        self.seeds[problem] = [params["sampling_seed"] for params in sampling_params]
        while problem in self.hold or self.paused:
            await asyncio.sleep(0.005)
        completions = []
        for sample in range(len(prompts)):
            text = f"#### {problem + 1 if self.answer(problem, sample) is RIGHT else 0}"
            ids = TOKENIZER.encode(text)
            spans = [(version_name(began), 2), (version_name(self.step), len(ids) - 2)]
            completions.append(
                Completion(
                    ids, [-0.5] * len(ids), "stop", spans if began != self.step else [(spans[0][0], len(ids))], text
                )
            )
            if not {version for version, _ in completions[-1].weight_versions} <= set(weight_version):
                raise RolloutServerError("http://server", "another version", 1, "")
        return completions

    async def pause_generation(self, mode: str = "abort") -> None:
        self.requests.append(f"pause {mode}")
        self.paused = True

    async def continue_generation(self) -> None:
        self.requests.append("continue")
        self.paused = False

    async def abort_request(self, rid: str | None = None) -> None:
        self.requests.append("abort")


def configuration(*overrides: str) -> Config:
    return load_config(
        [
            "experiment=quickstart",
            f"batch.groups={GROUPS}",
            f"batch.samples_per_group={SAMPLES}",
            "rollout.groups_per_request=1",
            "verify.workers=0",
            "data.shuffle=false",
            "rollout.step_timeout_seconds=5",
            *overrides,
        ]
    )


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Collector, Servers]]]:
    made: list[tuple[Collector, Grader]] = []

    def of(
        *overrides: str, state: BufferState | None = None, step: int = 0, teacher: TeacherPrompts | None = None
    ) -> tuple[Collector, Servers]:
        config = configuration(*overrides)
        grader = Grader(config.verify)
        collector = Collector(
            config.rollout,
            config.batch,
            problems=PROBLEMS,
            order=DataOrder(len(PROBLEMS), config.run.seed, config.data.shuffle),
            renderer=PromptRenderer(TOKENIZER),
            teacher=teacher,
            grader=grader,
            tokenizer=TOKENIZER,
            vocab_size=1000,
            state=state or BufferState(),
        )
        made.append((collector, grader))
        servers = Servers()
        servers.step = step
        collector.connect(servers)
        collector.after_sync(step)
        return collector, servers

    yield of
    for collector, grader in made:
        collector.close()
        grader.close()


def sync(collector: Collector, servers: Servers) -> None:
    """One update of the weights."""
    collector.before_sync()
    servers.step += 1
    collector.after_sync(servers.step)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def positions(collector: Collector) -> list[int]:
    return [group.position for group in collector.take().groups]


FILTER = "rollout.filter=dasd_megatron.rollout.filters:rewards_differ"


def test_on_policy_rollouts_are_sampled_when_they_are_asked_for(
    start: Callable[..., tuple[Collector, Servers]],
) -> None:
    collector, servers = start()
    batch = collector.take()
    assert [group.position for group in batch.groups] == [0, 1] and batch.counts.drawn == 2
    assert [[sample.reward for sample in group.samples] for group in batch.groups] == [[0.0, 1.0]] * 2
    sample = batch.groups[1].samples[1]
    assert (sample.position, sample.problem_id, sample.sample, sample.weight_version) == (1, "p1", 1, "step_000000")
    collector.start_ahead(0)
    sync(collector, servers)
    time.sleep(0.05)
    assert [problem for problem, _ in servers.asked] == [0, 1] and servers.requests == []
    assert positions(collector) == [2, 3]


def test_a_prompt_has_its_own_seeds_whatever_was_drawn_before(start: Callable[..., tuple[Collector, Servers]]) -> None:
    _, plain = first = start()
    positions(first[0]), positions(first[0])
    filtering, servers = start(FILTER, "rollout.over_sampling=2", "rollout.groups_per_request=1")
    servers.answer = lambda problem, sample: RIGHT if sample or problem == 0 else WRONG
    assert positions(filtering) == [1, 2]
    assert all(servers.seeds[problem] == plain.seeds[problem] for problem in range(4))
    assert len({seed for seeds in plain.seeds.values() for seed in seeds}) == 8


def test_groups_without_an_advantage_are_replaced(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start(FILTER)
    servers.answer = lambda problem, sample: RIGHT if sample and problem > 2 else WRONG
    batch = collector.take()
    assert [group.position for group in batch.groups] == [3, 4]
    assert (batch.counts.drawn, batch.counts.filtered) == (5, 3)


def test_where_no_group_has_an_advantage_a_step_still_comes(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start(FILTER, "rollout.filter_limit=2")
    servers.answer = lambda problem, sample: RIGHT
    batch = collector.take()
    assert [group.position for group in batch.groups] == [0, 1] and batch.counts.filtered == 4


def test_stragglers_are_broken_off_and_come_first_in_the_next_step(
    start: Callable[..., tuple[Collector, Servers]],
) -> None:
    collector, servers = start("rollout.over_sampling=1.5", "rollout.unfinished=abort")
    servers.hold = {1}
    assert positions(collector) == [0, 2]
    assert servers.requests == ["abort"] and collector.state().pending == [1]
    servers.hold = set()
    sync(collector, servers)
    batch = collector.take()
    assert 1 in [group.position for group in batch.groups]
    assert servers.asked[3] == (1, 1)  # under the new weights


def test_one_step_ahead_is_sampled_while_the_trainer_computes(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1")
    assert positions(collector) == [0, 1]
    collector.start_ahead(1)
    eventually(lambda: len(collector.state().ready) == 2)
    sync(collector, servers)
    batch = collector.take()
    assert [(group.position, group.version) for group in batch.groups] == [(2, 0), (3, 0)]
    collector.start_ahead(0)
    sync(collector, servers)
    batch = collector.take()
    assert [(group.position, group.version) for group in batch.groups] == [(4, 2), (5, 2)]


def test_an_update_waits_for_rollouts_in_flight(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1")
    positions(collector)
    servers.hold = {3}
    collector.start_ahead(1)
    eventually(lambda: len(servers.asked) == 4)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), collector._loop).add_done_callback(
        lambda _: servers.hold.clear()
    )
    collector.before_sync()
    assert not servers.hold and len(collector.state().ready) == 2 and servers.requests == []


def test_retracted_rollouts_go_on_and_carry_both_versions(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1", "rollout.unfinished=retract")
    positions(collector)
    servers.hold = {3}
    collector.start_ahead(1)
    eventually(lambda: len(collector.state().ready) == 1)
    sync(collector, servers)
    assert servers.requests == ["pause retract", "continue"]
    servers.hold = set()
    batch = collector.take()
    assert [(group.position, group.version) for group in batch.groups] == [(2, 0), (3, 0)]
    versions = batch.groups[1].samples[0].weight_versions
    assert versions == [["step_000000", 2], ["step_000001", len(batch.groups[1].samples[0].response_ids) - 2]]


def test_rollouts_that_have_become_too_old_begin_again(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1", "rollout.unfinished=retract", "rollout.over_sampling=1.5")
    servers.hold = {1}
    assert positions(collector) == [0, 2]
    collector.start_ahead(1)
    sync(collector, servers)
    assert positions(collector) == [3, 4]
    collector.start_ahead(1)
    sync(collector, servers)  # the one held is from step 0 and could train in step 2 at the latest
    servers.hold = set()
    assert collector.buffer.pending == [1]
    batch = collector.take()
    assert min(group.version for group in batch.groups) >= 1 and batch.counts.restarted == 1
    collector.start_ahead(1)
    eventually(lambda: (1, 2) in servers.asked)


def test_what_was_collected_ahead_is_saved_and_used(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1")
    positions(collector)
    collector.start_ahead(1)
    sync(collector, servers)
    state = collector.state()
    again, fresh = start("rollout.max_staleness=1", state=state, step=1)
    assert positions(again) == [2, 3] and fresh.asked == []
    stricter, fresh = start(state=state, step=1)  # resumed on-policy: too old
    assert positions(stricter) == [2, 3] and fresh.asked == [(2, 1), (3, 1)]


def test_samples_have_the_teachers_prompt_also_where_a_checkpoint_has_them(
    start: Callable[..., tuple[Collector, Servers]], tmp_path: Path
) -> None:
    teacher = teacher_of(PromptRenderer(TOKENIZER), "peer")
    collector, _ = start("rollout.max_staleness=1", teacher=teacher)
    for sample in (sample for group in collector.take().groups for sample in group.samples):
        # The second response is right, and has no other one that is.
        assert sample.privileged_source == (None if sample.sample else "peer")
    collector.start_ahead(1)
    eventually(lambda: len(collector.state().ready) == 2)
    state = collector.state()
    expected = [sample for group in state.ready for sample in group.samples]
    assert [sample.teacher_prompt_ids is None for sample in expected] == [False, True] * 2
    path = tmp_path / "ready.safetensors"
    save_samples(path, expected)
    read_back = dataclasses.replace(state, ready=read_groups(path), refused=[])
    again, servers = start("rollout.max_staleness=1", state=read_back, step=1, teacher=teacher)
    assert [sample for group in again.take().groups for sample in group.samples] == expected and servers.asked == []


def test_a_template_that_fails_in_the_run_is_raised_by_take(
    start: Callable[..., tuple[Collector, Servers]], tmp_path: Path
) -> None:
    path = tmp_path / "brittle.jinja"
    path.write_text("{{ problem }}{{ privileged }}{% if '####' in privileged %}{{ 1 // 0 }}{% endif %}")
    collector, servers = start(teacher=teacher_of(PromptRenderer(TOKENIZER, None, path), "peer"))
    servers.answer = lambda problem, sample: RIGHT
    with pytest.raises(TemplateError, match="ZeroDivisionError"):
        collector.take()


def test_a_failure_loses_nothing(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start()
    servers.error = RolloutServerError("http://server", "it is gone", 1, "mend it")
    with pytest.raises(RolloutServerError, match="it is gone"):
        collector.take()
    servers.error = None
    assert positions(collector) == [0, 1]


def test_a_failure_ahead_is_made_good_by_the_next_update(
    start: Callable[..., tuple[Collector, Servers]], caplog: pytest.LogCaptureFixture
) -> None:
    collector, servers = start("rollout.max_staleness=1")
    positions(collector)
    servers.error = RolloutServerError("http://server", "it is gone", 1, "mend it")
    with caplog.at_level(logging.WARNING):
        collector.start_ahead(1)
        eventually(lambda: collector.buffer.pending == [2, 3])
        servers.error = None
        sync(collector, servers)
    assert "it is gone" in caplog.text
    assert positions(collector) == [2, 3]


def test_a_step_does_not_wait_for_ever(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.step_timeout_seconds=1")
    servers.hold = {0}
    with pytest.raises(RolloutServerError, match=r"rollout\.step_timeout_seconds=1"):
        collector.take()
    assert collector.state().pending[0] == 0
    servers.hold = set()
    assert positions(collector) == [0, 1]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rollouts.py").write_text(
        "import dataclasses\n"
        "async def twice(request, generate):\n"
        "    n = len(request.sampling_params)\n"
        "    both = await generate([request.prompt_ids] * 2 * n, request.sampling_params * 2)\n"
        "    return both[n:]\n"
        "async def fails(request, generate):\n    raise KeyError('oh')\n"
        "async def too_few(request, generate):\n    return []\n"
        "async def texts(request, generate):\n    return ['a'] * len(request.sampling_params)\n"
        "async def short(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    return [dataclasses.replace(one, log_probs=one.log_probs[1:]) for one in found]\n"
        "async def nan(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    return [dataclasses.replace(one, log_probs=[float('nan')] * len(one.log_probs)) for one in found]\n"
        "async def tool(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    return [dataclasses.replace(one, output_ids=[7, 7, *one.output_ids], log_probs=[0.0, 0.0, "
        "*one.log_probs],\n"
        "        weight_versions=[('step_000000', 2 + len(one.output_ids))], response_mask=[0, 0, *[1] * "
        "len(one.output_ids)])\n"
        "        for one in found]\n"
        "async def unmasked(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    return [dataclasses.replace(one, response_mask=[0] * len(one.output_ids)) for one in found]\n"
        "async def endless(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    return [dataclasses.replace(one, finish_reason=None) for one in found]\n"
        "async def fractions(request, generate):\n"
        "    found = await generate([request.prompt_ids] * len(request.sampling_params), request.sampling_params)\n"
        "    for one in found: one.output_ids = [0.5] * len(one.output_ids)\n"
        "    return found\n"
        "import asyncio, sys\n"
        "async def exits(request, generate):\n    sys.exit(3)\n"
        "async def interrupts(request, generate):\n    raise KeyboardInterrupt\n"
        "async def cancels(request, generate):\n    raise GeneratorExit\n"
        "async def leaves_a_task(request, generate):\n"
        "    async def end(): sys.exit(3)\n"
        "    asyncio.get_running_loop().create_task(end())\n"
        "    await asyncio.sleep(60)\n"
        "class Unspeakable(Exception):\n    def __str__(self): raise ValueError\n"
        "def exits_too(group):\n    sys.exit(3)\n"
        "def stops(group):\n    raise StopIteration\n"
        "def speechless(group):\n    raise Unspeakable\n"
        "def reward_exits(sample):\n    sys.exit(3)\n"
        "def reward_interrupts(sample):\n    raise KeyboardInterrupt\n"
        "def hangs(group):\n    import time\n    time.sleep(60)\n"
        "def none(group):\n    return None\n"
        "def divides(group):\n    return 1 / 0\n"
        "def odd(group):\n    return group[0].position % 2 == 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_rollouts", None)
    return "own_rollouts"


def test_a_function_of_ones_own_samples_groups(start: Callable[..., tuple[Collector, Servers]], module: str) -> None:
    collector, servers = start(f"rollout.function={module}:twice")
    batch = collector.take()
    assert [[sample.reward for sample in group.samples] for group in batch.groups] == [[1.0, 1.0]] * 2
    assert [len(seeds) for seeds in servers.seeds.values()] == [4, 4]


def test_tokens_that_the_policy_did_not_sample_are_masked(
    start: Callable[..., tuple[Collector, Servers]], module: str
) -> None:
    collector, _ = start(f"rollout.function={module}:tool")
    sample = collector.take().groups[0].samples[1]
    assert (
        sample.response_ids[:2].tolist() == [7, 7]
        and sample.response_mask[:3].tolist() == [0, 0, 1]
        and sample.reward == 1.0
    )


def test_a_filter_of_ones_own_chooses_groups(start: Callable[..., tuple[Collector, Servers]], module: str) -> None:
    collector, _ = start(f"rollout.filter={module}:odd")
    assert positions(collector) == [1, 3]


def test_rollouts_of_other_weights_are_refused_from_functions_too(
    start: Callable[..., tuple[Collector, Servers]], module: str
) -> None:
    collector, _ = start(f"rollout.function={module}:tool", step=3)
    with pytest.raises(PluginError, match=r"of the weights \['step_000000'\], not of \['step_000003'\]"):
        collector.take()


def test_a_function_that_hangs_holds_nothing_up(start: Callable[..., tuple[Collector, Servers]], module: str) -> None:
    collector, _ = start(f"rollout.filter={module}:hangs", "rollout.step_timeout_seconds=1")
    begun = time.monotonic()
    with pytest.raises(RolloutServerError, match="or their grading"):
        collector.take()
    collector.close()
    assert time.monotonic() - begun < 20


def test_saved_groups_of_another_size_are_sampled_again(start: Callable[..., tuple[Collector, Servers]]) -> None:
    collector, servers = start("rollout.max_staleness=1")
    positions(collector)
    collector.start_ahead(1)
    sync(collector, servers)
    more, fresh = start("rollout.max_staleness=1", "batch.samples_per_group=4", state=collector.state(), step=1)
    batch = more.take()
    assert [(group.position, len(group.samples)) for group in batch.groups] == [(2, 4), (3, 4)]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rollout.function={}:fails", r"rollout\.function=own_rollouts:fails on problem p\d: KeyError: 'oh'"),
        ("rollout.function={}:too_few", "return a list of 2 Completions"),
        ("rollout.function={}:texts", "a str in its place"),
        ("rollout.function={}:short", r"\d+ output_ids, \d+ log_probs"),
        ("rollout.function={}:nan", "log_probs that are none"),
        ("rollout.function={}:unmasked", "response_mask must"),
        ("rollout.function={}:endless", "finish_reason=None"),
        ("rollout.function={}:fractions", "token ids are a list of whole numbers"),
        ("rollout.function={}:exits", r"rollout\.function=own_rollouts:exits on problem p\d: SystemExit: 3"),
        ("rollout.function={}:interrupts", "on problem p.: KeyboardInterrupt: KeyboardInterrupt"),
        ("rollout.function={}:cancels", "on problem p.: GeneratorExit"),
        ("rollout.function={}:leaves_a_task", "the thread of the rollouts has ended"),
        ("rollout.filter={}:exits_too", r"rollout\.filter=own_rollouts:exits_too on problem p\d: SystemExit: 3"),
        ("rollout.filter={}:stops", "on problem p.: StopIteration"),
        ("rollout.filter={}:speechless", "on problem p.: Unspeakable: Unspeakable"),
        ("verify.reward={}:reward_exits", r"own_rollouts:reward_exits on problem p\d, sample 0: SystemExit: 3"),
        ("verify.reward={}:reward_interrupts", r"on problem p\d, sample 0: KeyboardInterrupt"),
        ("rollout.filter={}:none", "gave None; return True or False"),
        ("rollout.filter={}:divides", r"rollout\.filter=own_rollouts:divides on problem p\d: ZeroDivisionError"),
    ],
)
def test_functions_that_fail_are_named(
    start: Callable[..., tuple[Collector, Servers]], module: str, override: str, said: str
) -> None:
    collector, _ = start(override.format(module))
    with pytest.raises(PluginError, match=said):
        collector.take()
