"""Bodies of requests to the embedded server: read within limits of size and time, and parsed strictly.

A body is JSON as RFC 8259 has it. Lone surrogates, NaN and deep nesting are refused here for all routes, since each of
them breaks something behind: answers that cannot be encoded, comparisons, recursion.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar

from fastapi import Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from dasd_megatron.rollout.embedded.schema import brief

T = TypeVar("T")

MAX_GENERATE_BYTES = 16 << 20
MAX_CONTROL_BYTES = 4 << 20
"""Largest bodies of /generate and of all other routes."""
MAX_BUFFERED_BYTES = 8 * MAX_GENERATE_BYTES
"""Most bytes of bodies that are being received or wait to be parsed, of all requests together."""
MAX_CONTAINERS = 1 << 18
"""Most brackets and braces of a body. A container takes a hundred times the memory of its two bytes."""
BODY_SECONDS = 60.0

_MOST_SHOWN_ERRORS = 3
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """Return the JSON value of a body; raises ValueError with one line."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} brackets and braces")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        if _ESCAPED_SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string holds half of a surrogate pair") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError:
        raise
    # Python bounds the digits of an integer, since reading them takes quadratic time.
    except ValueError as error:
        raise ValueError(str(error).split(";")[0]) from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class Bodies:
    """Reader of the bodies of one server. It bounds what all of them take together.

    One thread parses, one body after another, so that only one is being expanded at a time.
    """

    def __init__(self) -> None:
        self._buffered = 0
        self._parser = ThreadPoolExecutor(1, thread_name_prefix="parse")

    async def parse(self, request: Request, most: int, build: Callable[[Any], T]) -> T:
        """Return ``build`` of the JSON body, of at most ``most`` bytes.

        Raises HTTPException when the body cannot be had, RequestValidationError when it is not JSON, and what
        ``build`` raises.
        """
        with self._count() as counted:
            raw = await self._read(request, most, counted)
            return await asyncio.get_running_loop().run_in_executor(self._parser, _build, raw, build)

    def of(self, kind: type[T], *, optional: bool = False) -> Any:
        """Return the default of a handler's parameter that takes a control request's body as ``kind``.

        An ``optional`` body may be empty. As in SGLang a body has to be declared as JSON, so that a page in a browser
        cannot send it to a server on its user's machine.
        """
        validate = TypeAdapter(kind).validate_python

        async def read(request: Request) -> T:
            declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if optional and not declared:
                return kind()
            if not re.fullmatch(r"application/(.+\+)?json", declared):
                message = f"Content-Type has to be application/json, got {brief(declared)}"
                raise RequestValidationError([{"type": "content_type", "loc": ("header",), "msg": message}])
            return await self.parse(request, MAX_CONTROL_BYTES, validate)

        return Depends(read)

    @contextmanager
    def _count(self) -> Iterator[Callable[[int], None]]:
        """Give a function that counts bytes of a body as buffered, until the body of the ``with`` statement ends."""
        mine = 0

        def add(count: int) -> None:
            nonlocal mine
            if self._buffered + count > MAX_BUFFERED_BYTES:
                raise HTTPException(
                    HTTPStatus.SERVICE_UNAVAILABLE, "Too many bodies are being received; try again later."
                )
            mine += count
            self._buffered += count

        try:
            yield add
        finally:
            self._buffered -= mine

    async def _read(self, request: Request, most: int, counted: Callable[[int], None]) -> bytes:
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise HTTPException(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"Content-Encoding {brief(coding)} is not read: send the body as it is.",
            )
        too_long = HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body is larger than the {most} bytes that {request.url.path} takes.",
        )
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    counted(len(chunk))
                    body += chunk
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise HTTPException(
                HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {BODY_SECONDS:g} seconds."
            ) from None
        except ClientDisconnect:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "The connection ended before the body did.") from None
        return bytes(body)


def _build(raw: bytes, build: Callable[[Any], T]) -> T:
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise RequestValidationError(
            [{"type": "json_invalid", "loc": ("body",), "msg": f"JSON decode error: {error}"}]
        ) from None
    try:
        return build(value)
    except ValidationError as error:  # pydantic's, a subclass of ValueError
        raise RequestValidationError(
            [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False, include_input=False)]
        ) from None


def validation_message(errors: Sequence[Any]) -> str:
    """Return one line about what is wrong with a body or a query; it repeats none of it."""
    shown = [
        f"{'.'.join(brief(part, quote=False) for part in error.get('loc', ()))}: {error.get('msg', '')[:300]}"
        for error in errors[:_MOST_SHOWN_ERRORS]
    ]
    count = f"{len(errors)} validation error{'s' if len(errors) != 1 else ''}"
    more = f"; and {len(errors) - len(shown)} more" if len(errors) > len(shown) else ""
    return f"{count}: {'; '.join(shown)}{more}"
