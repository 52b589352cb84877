"""The rollout client against a small HTTP server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from dasd_megatron.rollout.answers import Completion
from dasd_megatron.rollout.client import RolloutClient
from dasd_megatron.rollout.pool import Event, ServerPool, Status
from dasd_megatron.rollout.transport import (
    AccessDeniedError,
    RequestRefusedError,
    RolloutServerError,
    WeightVersionError,
)

VERSION = "7"


def row(prompt, seed, version=VERSION, reason="stop"):
    """A sound answer to one row; the output says which prompt and seed it belongs to."""
    ids = [*prompt, seed]
    return {
        "text": "t",
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "weight_version": version,
            "output_token_logprobs": [[-0.5 * (i + 1), token, None] for i, token in enumerate(ids)],
        },
    }


def sound(body):
    rows, params = body["input_ids"], body["sampling_params"]
    params = [params] * len(rows) if isinstance(params, dict) else params
    return [row(prompt, options["sampling_seed"]) for prompt, options in zip(rows, params, strict=True)]


class FakeServer:
    """Answers /generate with the next of ``script``, then soundly: a status, bytes, a function of the body, hang, drop
    or trickle."""

    def __init__(self, script=()):
        self.script = list(script)
        self.requests: list[tuple[str, str, dict]] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0
        self.replies: dict[str, tuple[int, object]] = {}
        self.delay = 0.0

    async def handle(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            lines = [line.split(": ", 1) for line in head.split("\r\n")[1:] if line]
            self.headers.append({name.lower(): value for name, value in lines})
            length = next(
                (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length")), 0
            )
            body = json.loads(await reader.readexactly(length) or b"{}")
            self.requests.append((method, path, body))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            await asyncio.sleep(self.delay)
            action = self.script.pop(0) if path == "/generate" and self.script else None
            if action == "hang":
                await asyncio.sleep(30)
            if action == "drop":
                return
            if action == "trickle":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            status, content = 200, sound(body) if path == "/generate" else {}
            if path in self.replies:
                status, content = self.replies[path]
            elif isinstance(action, tuple):
                status, content = action
            elif isinstance(action, bytes):
                content = action
            elif action is not None:
                content = action(body)
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            writer.write(
                f"HTTP/1.1 {status} X\r\ncontent-length: {len(payload)}\r\nconnection: close\r\n\r\n".encode() + payload
            )
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client gave up, which some tests make it do
        finally:
            self.running -= 1
            writer.close()

    @asynccontextmanager
    async def serve(self):
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()


def client(*urls, **changes):
    options = {"connect_timeout": 1.0, "request_timeout": 1.0, "max_retries": 2, "backoff": 0.01, "max_in_flight": 4}
    return RolloutClient(urls, **{**options, **changes})


PROMPTS = [[i, i + 1] for i in range(10)]
PARAMS = [{"sampling_seed": 100 + i, "max_new_tokens": 4} for i in range(10)]
EXPECTED = [[i, i + 1, 100 + i] for i in range(10)]


async def sample(c, prompts=PROMPTS, params=PARAMS, *, weight_version=VERSION, rows_per_request=3, vocab_size=None):
    async with c:
        return await c.generate(
            prompts, params, weight_version=weight_version, rows_per_request=rows_per_request, vocab_size=vocab_size
        )


async def test_rows_keep_their_order_over_requests_and_servers():
    first, second = FakeServer(), FakeServer()
    async with first.serve() as a, second.serve() as b:
        completions = await sample(client(a, b))
    assert [c.output_ids.tolist() for c in completions] == EXPECTED
    assert completions[0].log_probs.tolist() == [-0.5, -1.0, -1.5]
    assert (completions[0].finish_reason, completions[0].weight_version, completions[0].text) == ("stop", VERSION, "t")
    assert sorted(len(body["input_ids"]) for _, _, body in first.requests) == [3, 3]  # requests 0 and 2
    assert sorted(len(body["input_ids"]) for _, _, body in second.requests) == [1, 3]  # requests 1 and 3
    assert all(body["return_logprob"] is True for _, _, body in first.requests + second.requests)


async def test_no_prompts_is_no_request():
    server = FakeServer()
    async with server.serve() as url:
        assert await sample(client(url), [], []) == []
    assert server.requests == []


def changed(path, value):
    """A sound answer in which one thing of its last row is wrong."""

    def answer(body):
        rows = sound(body)
        target = rows[-1]
        for key in path[:-1]:
            target = target[key]
        if value is KeyError:
            del target[path[-1]]
        else:
            target[path[-1]] = value
        return rows

    return answer


def sampled(ids, reason="stop"):
    """An answer whose last row has these tokens, with a log-prob for each."""

    def answer(body):
        return sound(body)[:-1] + [row(ids[:-1], ids[-1], reason=reason) if ids else row_without_tokens(reason)]

    return answer


def row_without_tokens(reason):
    empty = row([], 0, reason=reason)
    empty["output_ids"] = empty["meta_info"]["output_token_logprobs"] = []
    return empty


GARBAGE = {
    "http 500": (500, {"error": {"message": "boom"}}),
    "http 503": (503, b"busy"),
    "http 429": (429, {"message": "slow down"}),
    "not json": b"<html>proxy</html>",
    "empty": b"",
    "dropped connection": "drop",
    "an object": lambda body: {"text": "x"},
    "a row too few": lambda body: sound(body)[:-1],
    "a row too many": lambda body: sound(body) + sound(body)[:1],
    "row is no object": lambda body: [None] * len(body["input_ids"]),
    "no meta_info": changed(["meta_info"], KeyError),
    "finish_reason is a string": changed(["meta_info", "finish_reason"], "stop"),
    "aborted": changed(["meta_info", "finish_reason"], {"type": "abort", "message": "Aborted"}),
    "no log-probs": changed(["meta_info", "output_token_logprobs"], KeyError),
    "a log-prob too few": changed(["output_ids"], [1, 2, 3, 4]),
    "no tokens, stopped": sampled([]),
    "no tokens, at the limit": sampled([], "length"),
    "more than max_new_tokens": sampled([1, 2, 3, 4, 5], "length"),
    "negative token id": sampled([1, -1]),
    "NaN log-prob": changed(["meta_info", "output_token_logprobs", 0, 0], float("nan")),
    "-inf log-prob": changed(["meta_info", "output_token_logprobs", 0, 0], float("-inf")),
    "null log-prob": changed(["meta_info", "output_token_logprobs", 0, 0], None),
    "positive log-prob": changed(["meta_info", "output_token_logprobs", 0, 0], 0.01),
    "log-prob of another token": changed(["meta_info", "output_token_logprobs", 0, 1], 99999),
    "token id is a float": changed(["output_ids", 0], 1.0),
    "token id is a bool": changed(["output_ids", 0], True),
    "wrong version": changed(["meta_info", "weight_version"], "6"),
    "mixed versions": changed(
        ["meta_info", "weight_versions"],
        [{"version": "6", "start": 0, "end": 1}, {"version": "7", "start": 1, "end": 3}],
    ),
}


@pytest.mark.parametrize("action", GARBAGE.values(), ids=GARBAGE.keys())
async def test_one_bad_answer_is_asked_for_again(action):
    server = FakeServer([action])
    async with server.serve() as url:
        completions = await sample(client(url))
    assert [c.output_ids.tolist() for c in completions] == EXPECTED
    assert len(server.requests) == 5  # four requests, one of them twice


@pytest.mark.parametrize("action", GARBAGE.values(), ids=GARBAGE.keys())
async def test_bad_answers_without_end_are_an_error(action):
    server = FakeServer([action] * 20)
    async with server.serve() as url:
        with pytest.raises(RolloutServerError) as caught:
            await sample(client(url), rows_per_request=10)
        assert caught.value.url == url
        assert caught.value.tries == 3 and "3 tries" in str(caught.value)
    assert len(server.requests) == 3


async def test_ids_outside_the_vocabulary_are_asked_for_again():
    largest = max(ids[-1] for ids in EXPECTED)
    server = FakeServer([sampled([1, largest + 1])])
    async with server.serve() as url:
        completions = await sample(client(url), vocab_size=largest + 1)
    assert [c.output_ids.tolist() for c in completions] == EXPECTED  # the largest id of the vocabulary among them
    assert len(server.requests) == 5


@pytest.mark.parametrize("token", [110, 2**40, -1])
async def test_ids_outside_the_vocabulary_without_end_are_an_error(token):
    server = FakeServer([sampled([1, token])] * 20)
    async with server.serve() as url:
        with pytest.raises(RolloutServerError, match=f"row 9: id {token} of token 1 is outside the vocabulary of 110"):
            await sample(client(url), rows_per_request=10, vocab_size=110)
    assert len(server.requests) == 3


async def test_each_row_has_its_own_limit_or_none():
    params = [
        {"sampling_seed": 100, "max_new_tokens": 3},
        {"sampling_seed": 101},
        {"sampling_seed": 102, "max_new_tokens": 2},
    ]
    server = FakeServer()
    async with server.serve() as url:
        assert [c.output_ids.tolist() for c in await sample(client(url), PROMPTS[:2], params[:2])] == EXPECTED[:2]
        with pytest.raises(RolloutServerError, match="row 2: 3 tokens, but max_new_tokens is 2"):
            await sample(client(url), PROMPTS[:3], params)


@pytest.mark.parametrize("action", ["hang", "trickle"])
async def test_a_server_that_does_not_finish_is_given_up(action):
    server = FakeServer([action] * 20)
    async with server.serve() as url:
        with pytest.raises(RolloutServerError, match="no answer within 0.2 s"):
            async with asyncio.timeout(5):
                await sample(client(url, request_timeout=0.2), rows_per_request=10)
    assert len(server.requests) == 3


async def test_a_hanging_request_is_repeated():
    server = FakeServer(["hang"])
    async with server.serve() as url:
        completions = await sample(client(url, request_timeout=0.3))
    assert [c.output_ids.tolist() for c in completions] == EXPECTED


async def test_version_error_names_the_expected_version():
    server = FakeServer([changed(["meta_info", "weight_version"], "6")] * 20)
    async with server.serve() as url:
        with pytest.raises(WeightVersionError, match=r"expected weight version '7', but row 9 was sampled under '6'"):
            await sample(client(url), rows_per_request=10)
        assert len(await sample(client(url), weight_version=None)) == 10


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"message": "prompt too long"}}, "prompt too long"),
        (400, {"error": "unknown field `x`"}, "unknown field `x`"),
        (400, {"object": "error", "message": "validation", "type": "Bad Request", "code": 400}, "validation"),
        (404, {"detail": "Not Found"}, "Not Found"),
    ],
)
async def test_a_refusal_is_raised_at_once_with_the_servers_words(status, body, message):
    server = FakeServer([(status, body)] * 20)
    async with server.serve() as url:
        with pytest.raises(RequestRefusedError, match=message) as caught:
            await sample(client(url), rows_per_request=10)
    assert caught.value.tries == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", [None, "0123456789abcdef"])
async def test_a_server_that_does_not_take_the_key_is_named_at_once_and_another_one_used(key):
    denying, sound = FakeServer([(401, {"error": "Unauthorized"})] * 20), FakeServer()
    async with denying.serve() as a, sound.serve() as b:
        with pytest.raises(
            AccessDeniedError, match="does not take the API key" if key else "asks for an API key"
        ) as caught:
            await sample(client(a, api_key=key), rows_per_request=10)
        assert caught.value.tries == 1 and len(denying.requests) == 1
        assert key is None or key not in str(caught.value)
        assert [c.output_ids.tolist() for c in await sample(client(a, b, api_key=key), rows_per_request=10)] == EXPECTED
        denying.replies["/model_info"] = (403, {"error": "Forbidden"})
        both = client(a, b, "http://127.0.0.1:9", api_key=key)
        async with both:
            with pytest.raises(AccessDeniedError, match="403"):
                await both.check_access()
        async with client(b, "http://127.0.0.1:9", api_key=key) as other:
            await other.check_access()
    expected = {None} if key is None else {f"Bearer {key}"}
    assert {headers.get("authorization") for headers in sound.headers} == expected


async def test_a_dead_server_is_replaced_by_the_next():
    server = FakeServer()
    async with server.serve() as url:
        completions = await sample(client("http://127.0.0.1:9", url))
    assert [c.output_ids.tolist() for c in completions] == EXPECTED


async def test_a_server_that_fails_gets_nothing_more_while_another_serves():
    bad, good = FakeServer(), FakeServer()
    bad.script = [(500, {})] * 100
    async with bad.serve() as a, good.serve() as b, client(a, b, max_in_flight=1) as c:
        for _ in range(5):
            completions = await c.generate(PROMPTS, PARAMS, weight_version=VERSION, rows_per_request=1)
            assert [completion.output_ids.tolist() for completion in completions] == EXPECTED
        assert len(bad.requests) == 1
        assert c.pool.with_status(Status.SUSPECT) == [a] and c.pool.with_status(Status.SERVING) == [b]


async def test_a_server_under_other_weights_serves_again_only_after_an_update():
    old, new = FakeServer(), FakeServer()
    old.script = [changed(["meta_info", "weight_version"], "6")] * 100
    async with old.serve() as a, new.serve() as b, client(a, b, max_in_flight=1) as c:
        c.pool.expect(VERSION)
        await c.generate(PROMPTS, PARAMS, weight_version=VERSION, rows_per_request=1)
        assert c.pool.with_status(Status.STALE) == [a]
        old.replies["/model_info"] = (200, {"weight_version": "old"})
        await c.probe([a])
        assert c.pool.with_status(Status.STALE) == [a]
        old.replies["/update_weights_from_disk"] = (200, {"success": True, "message": "ok"})
        old.replies["/model_info"] = new.replies["/model_info"] = (200, {"weight_version": VERSION})
        new.replies["/update_weights_from_disk"] = (400, {"success": False, "message": "disk is gone"})
        await c.update_weights_from_disk("/w", VERSION)
        # One took them, so the run goes on; the other is not asked again.
        assert c.pool.with_status(Status.SERVING) == [a] and c.pool.with_status(Status.DEAD) == [b]


async def test_nobody_holds_the_weights():
    server = FakeServer()
    async with server.serve() as url, client(url) as c:
        c.pool.expect("next")
        c.pool.record(url, Event.ANSWERED, VERSION)
        with pytest.raises(WeightVersionError, match="no server holds the weights 'next'"):
            await c.generate(PROMPTS, PARAMS, weight_version="next", rows_per_request=1)
    assert server.requests == []


async def test_nobody_listens():
    with pytest.raises(RolloutServerError, match="Cannot connect to host"):
        await sample(client("http://127.0.0.1:9", max_retries=0))


async def test_requests_in_flight_are_limited():
    server = FakeServer()
    server.delay = 0.05
    async with server.serve() as url:
        await sample(client(url, max_in_flight=2), rows_per_request=1)
    assert server.most_running == 2


async def test_the_first_failure_cancels_the_rest():
    server = FakeServer([(400, {"error": "no"})] + ["hang"] * 3)
    async with server.serve() as url:
        async with asyncio.timeout(3):
            with pytest.raises(RequestRefusedError):
                await sample(client(url, request_timeout=20))


@pytest.mark.parametrize(
    ("prompts", "params", "rows"),
    [([[1]], [], 1), ([[1]], [{}], 0), ([[1]], [{"n": 2}], 1)],
)
async def test_calls_that_cannot_work_are_refused(prompts, params, rows):
    with pytest.raises(ValueError):
        await sample(client("http://127.0.0.1:9"), prompts, params, rows_per_request=rows)


async def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        await sample(client("http://127.0.0.1:9"), vocab_size=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"urls": []},
        {"urls": ["127.0.0.1:1"]},
        {"max_in_flight": 0},
        {"max_retries": -1},
        {"request_timeout": 0},
        {"backoff": -1},
    ],
)
def test_options_that_cannot_work_are_refused(changes):
    changes = dict(changes)
    with pytest.raises(ValueError):
        client(*changes.pop("urls", ["http://h"]), **changes)


def test_one_client_serves_several_event_loops():
    server = FakeServer()
    c = client("http://x")

    async def once():
        async with server.serve() as url:
            c.urls, c.pool = [url], ServerPool([url])
            return await c.generate(PROMPTS, PARAMS, weight_version=VERSION, rows_per_request=5)

    for _ in range(2):
        assert [x.output_ids.tolist() for x in asyncio.run(once())] == EXPECTED


async def test_control_calls_reach_every_server():
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        server.replies["/update_weights_from_disk"] = (
            200,
            {"success": True, "message": "ok", "num_paused_requests": 0},
        )
        server.replies["/model_info"] = (200, {"weight_version": "8"})
    async with servers[0].serve() as a, servers[1].serve() as b, client(a, b) as c:
        await c.pause_generation("abort")
        await c.update_weights_from_disk("/weights/8", "8")
        await c.continue_generation()
        await c.flush_cache()
        await c.abort_request("r1")
        await c.abort_request()
        assert await c.model_info() == [{"weight_version": "8"}] * 2
        assert await c.server_info() == [{}] * 2
        assert await c.health() == {a: True, b: True}
    for server in servers:
        assert [(m, p, body) for m, p, body in server.requests if m == "POST"] == [
            ("POST", "/pause_generation", {"mode": "abort"}),
            ("POST", "/update_weights_from_disk", {"model_path": "/weights/8", "weight_version": "8"}),
            ("POST", "/continue_generation", {}),
            ("POST", "/flush_cache", {}),
            ("POST", "/abort_request", {"rid": "r1"}),
            ("POST", "/abort_request", {"abort_all": True}),
        ]


async def test_a_refused_update_carries_the_servers_message():
    server = FakeServer()
    server.replies["/update_weights_from_disk"] = (
        400,
        {"success": False, "message": "other shape", "num_paused_requests": 0},
    )
    async with server.serve() as url, client(url) as c:
        with pytest.raises(RequestRefusedError, match="other shape"):
            await c.update_weights_from_disk("/w", "8")


async def test_an_update_that_did_not_take_names_the_expected_version():
    server = FakeServer()
    server.replies["/update_weights_from_disk"] = (200, {"success": True, "message": "ok"})
    server.replies["/model_info"] = (200, {"weight_version": "7"})
    async with server.serve() as url, client(url) as c:
        with pytest.raises(
            WeightVersionError, match="expected weight version '8' after the update, but the server reports '7'"
        ):
            await c.update_weights_from_disk("/w", "8")


async def test_waiting_for_health_ends():
    server = FakeServer()
    server.replies["/health"] = (503, b"")
    async with server.serve() as url, client(url) as c:
        assert await c.health() == {url: False}
        with pytest.raises(RolloutServerError, match="not healthy within 0.3 s"):
            await c.wait_until_healthy(0.3)
        asyncio.get_running_loop().call_later(0.2, server.replies.clear)
        await c.wait_until_healthy(5.0)


async def test_through_a_router_go_single_rows_and_nothing_else():
    router, servers = FakeServer(), [FakeServer(), FakeServer()]
    async with router.serve() as r, servers[0].serve() as a, servers[1].serve() as b, client(a, b, router=r) as c:
        completions = await c.generate(PROMPTS, PARAMS, weight_version=VERSION, rows_per_request=3)
        await c.pause_generation()
        await c.continue_generation()
    assert [c.output_ids.tolist() for c in completions] == EXPECTED
    assert sorted(body["input_ids"] for _, _, body in router.requests) == [[prompt] for prompt in PROMPTS]
    assert {path for _, path, _ in router.requests} == {"/generate"} and router.most_running <= 4
    # not in a list
    assert sorted(body["sampling_params"]["sampling_seed"] for _, _, body in router.requests) == list(range(100, 110))
    for server in servers:
        assert [path for _, path, _ in server.requests] == ["/pause_generation", "/continue_generation"]


async def test_a_failure_behind_a_router_makes_every_server_suspect():
    """Nobody knows which it was: a probe finds out."""
    old = (200, [row([1], 1, version="6")])
    router, servers = FakeServer([old, (500, {}), old]), [FakeServer(), FakeServer()]
    for server, version in zip(servers, ("6", VERSION), strict=True):
        server.replies["/model_info"] = (200, {"weight_version": version})
    async with router.serve() as r, servers[0].serve() as a, servers[1].serve() as b, client(a, b, router=r) as c:
        c.pool.expect(VERSION)
        for url in (a, b):
            c.pool.record(url, Event.ANSWERED, VERSION)
        with pytest.raises(WeightVersionError, match=f"{r}: expected weight version '7'.*under '6'.*3 tries"):
            await c.generate(PROMPTS[:1], PARAMS[:1], weight_version=VERSION, rows_per_request=1)
        assert c.pool.with_status(Status.SUSPECT) == [a, b]
        assert await c.probe([a, b]) == []
        assert (c.pool.health[a].status, c.pool.health[b].status) == (Status.STALE, Status.SERVING)


async def test_a_router_heeds_the_limits_of_a_request():
    router = FakeServer(["hang"])
    async with router.serve() as r, client("http://127.0.0.1:9", router=r, request_timeout=0.2) as c:
        (completion,) = await c.generate(PROMPTS[:1], PARAMS[:1], weight_version=VERSION, rows_per_request=1)
    assert completion.output_ids.tolist() == EXPECTED[0]
    with pytest.raises(ValueError, match="must start with http"):
        client("http://a:1", router="a:2")


async def test_an_answer_that_was_done_before_an_update_leaves_its_server_serving():
    server = FakeServer()
    async with server.serve() as url, client(url) as c:
        c.pool.expect("8")
        c.pool.record(url, Event.ANSWERED, "8")
        await c.generate(PROMPTS, PARAMS, weight_version={VERSION, "8"}, rows_per_request=3)
        assert c.pool.with_status(Status.SERVING) == [url]


def test_rows_that_were_done_before_an_update_say_nothing_of_what_their_server_holds() -> None:
    c = client("http://server")
    before = Completion([1], [-0.5], "stop", [("v0", 1)], "")
    across = Completion([1, 2], [-0.5, -0.5], "stop", [("v0", 1), ("v1", 1)], "")
    assert c._version_after([before]) == "v0"
    c.pool.expect("v1")
    assert c._version_after([before, across]) == "v1" and c._version_after([before]) is None
