"""HTTP side of the embedded server: routes that read a body, ask the engine and answer in SGLang's words.

Handlers only wait; other threads do the work. The engine's own errors become statuses here and nowhere else. FastAPI
reads the annotations of handlers, which name local variables. So they are not kept as text here.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dasd_megatron import access
from dasd_megatron.rollout.embedded.bodies import MAX_GENERATE_BYTES, Bodies, validation_message
from dasd_megatron.rollout.embedded.engine import Engine, EngineClosedError
from dasd_megatron.rollout.embedded.replies import DecodingError, write_reply
from dasd_megatron.rollout.embedded.requests import MAX_REQUEST_TOKENS, GenerateJob, InvalidRequestError
from dasd_megatron.rollout.embedded.schema import (
    AbortReq,
    CheckWeightsReqInput,
    ContinueGenerationReqInput,
    ContractError,
    DestroyWeightsUpdateGroupReqInput,
    InitWeightsUpdateGroupReqInput,
    MemoryOccupationReqInput,
    PauseGenerationReqInput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromTensorReqInput,
    UpdateWeightVersionReqInput,
    brief,
)
from dasd_megatron.rollout.embedded.weight_receiver import MAX_JOINS, ReceiveError, WeightReceiver

HEALTH_TIMEOUT_SECONDS = 20.0
DISCONNECT_POLL_SECONDS = 1.0
IDLE_POLL_SECONDS = 0.02
MAX_FLUSH_SECONDS = 3600.0
MAX_HELD_TOKENS = 16 * MAX_REQUEST_TOKENS
"""Most tokens of all requests that wait, run or are being answered, as requests.row_tokens counts them."""
PIECE_BYTES = 1 << 20
"""An answer is handed to the connection in pieces, so that a client that reads slowly does not make it pile up."""

# All modules of the embedded server log under the name of its entry point.
logger = logging.getLogger("dasd_megatron.rollout.server")


def build_app(engine: Engine, settings: dict[str, Any]) -> FastAPI:
    """Return the HTTP side of an engine. ``settings`` is what /server_info adds to the live state."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    key = access.api_key()
    if key is not None:
        app.add_middleware(_KeyCheck, key=key)
    _answer_errors(app)
    bodies = Bodies()
    for router in (
        _generation_routes(engine, bodies),
        _control_routes(engine, bodies),
        _health_routes(engine),
        _info_routes(engine, settings),
        _update_routes(engine, bodies),
        _weight_routes(engine, bodies),
        _memory_routes(engine, bodies),
    ):
        app.include_router(router)
    return app


class _KeyCheck:
    """ASGI middleware that refuses requests without the API key, with 401, before it reads their body.

    As in SGLang, paths that are about health alone are open, for those who watch over the server.
    """

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith("/health"):
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not access.shows_key(given, self._key):
                message = "Unauthorized: this server asks for its API key, as Authorization: Bearer KEY"
                await JSONResponse({"error": message}, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _answer_errors(app: FastAPI) -> None:
    """Let errors that leave a handler be answered in SGLang's shape."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error_reply(error.status_code, str(error.detail))

    @app.exception_handler(EngineClosedError)
    async def engine_closed(request: Request, error: EngineClosedError) -> JSONResponse:
        return _error_reply(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    @app.exception_handler(DecodingError)
    async def decoding_failed(request: Request, error: DecodingError) -> JSONResponse:
        return _error_reply(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        message = validation_message(error.errors())
        return JSONResponse(
            {"object": "error", "message": message, "type": "Bad Request", "param": None, "code": 400}, status_code=400
        )


def _error_reply(status: int, message: str) -> JSONResponse:
    return JSONResponse(
        {"object": "error", "message": message, "type": str(int(status)), "param": None, "code": int(status)},
        status_code=status,
    )


def _refusal(message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status_code=400)


def _outcome(success: bool, message: str, **more: Any) -> JSONResponse:
    return JSONResponse({"success": success, "message": message, **more}, status_code=200 if success else 400)


class _Room:
    """Room for the rows of all requests that wait, run or are being answered, in tokens."""

    def __init__(self) -> None:
        self._held = 0

    def take(self, job: GenerateJob) -> None:
        """Raise HTTPException where there is no room for a job, in SGLang's words for a full queue."""
        if self._held + job.tokens > MAX_HELD_TOKENS:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The request queue is full.")
        self._held += job.tokens

    def give_back(self, job: GenerateJob) -> None:
        """Free the room of a job."""
        self._held -= job.tokens


class _Answer(Response):
    """A JSON answer in pieces. ``sent`` is called once it has been sent, or the client is gone."""

    def __init__(self, content: bytes, sent: Callable[[], None]):
        super().__init__(content, media_type="application/json")
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), PIECE_BYTES):
                end = start + PIECE_BYTES
                piece = {"body": bytes(self.body[start:end]), "more_body": end < len(self.body)}
                await send({"type": "http.response.body", **piece})
        finally:
            self._sent()


def _generation_routes(engine: Engine, bodies: Bodies) -> APIRouter:
    router = APIRouter()
    room = _Room()
    # One thread writes, so that only one answer is being built at a time.
    writer = ThreadPoolExecutor(1, thread_name_prefix="write")

    async def answer(job: GenerateJob, request: Request) -> Response:
        engine.submit(job)
        done = asyncio.wrap_future(job.done)
        while not (await asyncio.wait({done}, timeout=DISCONNECT_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                engine.abort(job=job)
        content = await asyncio.get_running_loop().run_in_executor(writer, write_reply, job, engine.tokenizer)
        return _Answer(content, lambda: room.give_back(job))

    @router.api_route("/generate", methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        try:
            job = await bodies.parse(request, MAX_GENERATE_BYTES, engine.parse_request)
            room.take(job)
            try:
                return await answer(job, request)
            except BaseException:
                room.give_back(job)
                raise
        except ContractError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        # Tokenizers refuse a text with a ValueError, too.
        except ValueError as error:
            return _refusal(str(error))

    return router


def _control_routes(engine: Engine, bodies: Bodies) -> APIRouter:
    router = APIRouter()

    @router.post("/pause_generation")
    async def pause_generation(
        obj: Annotated[PauseGenerationReqInput, bodies.of(PauseGenerationReqInput)],
    ) -> JSONResponse:
        jobs = engine.pause(obj.mode)
        if jobs:
            await asyncio.wait({asyncio.wrap_future(job) for job in jobs})
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    @router.post("/continue_generation")
    async def continue_generation(
        obj: Annotated[ContinueGenerationReqInput, bodies.of(ContinueGenerationReqInput)],
    ) -> JSONResponse:
        engine.resume()
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    @router.post("/abort_request")
    async def abort_request(obj: Annotated[AbortReq, bodies.of(AbortReq)]) -> Response:
        engine.abort(rid=obj.rid or "", everything=obj.abort_all)
        return Response(status_code=200)

    @router.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache(
        request: Request, timeout: Annotated[float, Query(ge=0.0, le=MAX_FLUSH_SECONDS)] = 0.0
    ) -> Response:
        limit = time.monotonic() + timeout
        while engine.running or (engine.waiting and not engine.paused):
            if time.monotonic() >= limit or await request.is_disconnected():
                return Response("Flush cache failed: requests are running or waiting.\n", status_code=400)
            await asyncio.sleep(IDLE_POLL_SECONDS)
        return Response("Cache flushed.\n", status_code=200)

    return router


def _health_routes(engine: Engine) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if engine.alive else 503)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        if not engine.alive or engine.missing_memory:
            return Response(status_code=503)
        job = None
        steps = engine.steps
        if not engine.running:
            job = engine.parse_request({"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}})
            engine.submit(job)
        limit = time.monotonic() + HEALTH_TIMEOUT_SECONDS
        while time.monotonic() < limit:
            if engine.steps > steps:
                return Response(status_code=200)
            await asyncio.sleep(IDLE_POLL_SECONDS)
        if job is not None:
            engine.abort(job=job)
        return Response(status_code=503)

    return router


def _info_routes(engine: Engine, settings: dict[str, Any]) -> APIRouter:
    router = APIRouter()

    @router.get("/get_model_info")
    @router.get("/model_info")
    async def model_info() -> dict[str, Any]:
        return {
            "model_path": engine.model_path,
            "served_model_name": engine.model_path,
            "tokenizer_path": settings["tokenizer_path"],
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": engine.weight_version,
            "load_format": "auto",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": engine.config.model_type,
            "architectures": engine.config.architectures,
        }

    @router.get("/get_server_info")
    @router.get("/server_info")
    async def server_info() -> dict[str, Any]:
        state = {"paused": engine.paused, "weight_version": engine.weight_version, "decoding_steps": engine.steps}
        return {**settings, "internal_states": [state]}

    @router.get("/v1/loads")
    async def loads() -> dict[str, Any]:
        return {"loads": [{"dp_rank": 0, "num_running_reqs": engine.running, "num_waiting_reqs": engine.waiting}]}

    return router


def _update_routes(engine: Engine, bodies: Bodies) -> APIRouter:
    """Return the routes of an update whose tensors come over a process group or out of memory."""
    router = APIRouter()
    receiver = WeightReceiver(lambda: engine.model, engine.shapes)
    # Calls that wait for other processes have threads of their own, so that they hold back nothing else. One thread
    # does all that touches the update, one thing after another.
    updating = ThreadPoolExecutor(1, thread_name_prefix="update")
    joining = ThreadPoolExecutor(MAX_JOINS + 1, thread_name_prefix="join")

    async def receive(
        threads: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any, message: str
    ) -> JSONResponse:
        try:
            await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
        except ReceiveError as error:
            logger.error("%s", error)
            return _outcome(False, str(error))
        return _outcome(True, message)

    @router.post("/init_weights_update_group")
    async def init_weights_update_group(
        obj: Annotated[InitWeightsUpdateGroupReqInput, bodies.of(InitWeightsUpdateGroupReqInput)],
    ) -> JSONResponse:
        place = (obj.master_address, obj.master_port, obj.rank_offset, obj.world_size, obj.group_name, obj.backend)
        return await receive(joining, receiver.join, *place, message="Succeeded to initialize custom process group.")

    @router.post("/destroy_weights_update_group")
    async def destroy_weights_update_group(
        obj: Annotated[DestroyWeightsUpdateGroupReqInput, bodies.of(DestroyWeightsUpdateGroupReqInput)],
    ) -> JSONResponse:
        return await receive(
            joining, receiver.leave, obj.group_name, message="Succeeded to destroy custom process group."
        )

    @router.post("/begin_weight_update")
    async def begin_weight_update() -> JSONResponse:
        return await receive(updating, receiver.begin, message="Success")

    @router.post("/update_weights_from_distributed")
    async def update_weights_from_distributed(
        obj: Annotated[UpdateWeightsFromDistributedReqInput, bodies.of(UpdateWeightsFromDistributedReqInput)],
    ) -> JSONResponse:
        bucket = (obj.names, obj.dtypes, obj.shapes, obj.group_name, obj.load_format)
        return await receive(updating, receiver.receive, *bucket, message="Succeeded to update parameter online.")

    @router.post("/update_weights_from_tensor")
    async def update_weights_from_tensor(
        obj: Annotated[UpdateWeightsFromTensorReqInput, bodies.of(UpdateWeightsFromTensorReqInput)],
    ) -> JSONResponse:
        return await receive(updating, receiver.load, obj.serialized_named_tensors, obj.load_format, message="Success")

    @router.post("/end_weight_update")
    async def end_weight_update() -> JSONResponse:
        try:
            applied = await asyncio.get_running_loop().run_in_executor(updating, receiver.end, engine.replace_model)
        except ReceiveError as error:
            return _outcome(False, str(error))
        return _outcome(*await asyncio.wrap_future(applied))

    return router


def _weight_routes(engine: Engine, bodies: Bodies) -> APIRouter:
    """Return the routes of an update from disk, and of names and checksums of the served weights."""
    router = APIRouter()

    @router.post("/update_weights_from_disk")
    async def update_weights_from_disk(
        obj: Annotated[UpdateWeightFromDiskReqInput, bodies.of(UpdateWeightFromDiskReqInput)],
    ) -> JSONResponse:
        if obj.load_format not in (None, "auto", "safetensors", "pt"):
            message = f"load_format={brief(obj.load_format)} is not supported by the embedded rollout server; use auto."
            return _outcome(False, message, num_paused_requests=0)
        if obj.abort_all_requests:
            engine.abort(everything=True)
        result = await asyncio.wrap_future(engine.update_from_disk(obj.model_path, obj.weight_version))
        return _outcome(*result, num_paused_requests=0)

    @router.post("/update_weight_version")
    async def update_weight_version(
        obj: Annotated[UpdateWeightVersionReqInput, bodies.of(UpdateWeightVersionReqInput)],
    ) -> JSONResponse:
        if obj.abort_all_requests:
            engine.abort(everything=True)
        engine.name_weights(obj.new_version)
        return _outcome(True, f"Weight version updated to {obj.new_version}", new_version=obj.new_version)

    @router.api_route("/weights_checker", methods=["GET", "POST"])
    async def weights_checker(
        obj: Annotated[CheckWeightsReqInput, bodies.of(CheckWeightsReqInput, optional=True)],
    ) -> JSONResponse:
        if obj.action != "checksum":
            return _outcome(
                False, f"action={brief(obj.action)} is not supported by the embedded rollout server; checksum is"
            )
        checksums = await asyncio.to_thread(engine.checksums, obj.skip_tensor_list or ())
        overall = hashlib.sha256("".join(name + checksums[name] for name in sorted(checksums)).encode()).hexdigest()
        # There is one process, and so every rank is 0 and every size 1.
        alone = {"role": "target", **{f"{kind}_rank": 0 for kind in ("tp", "dp", "pp")}, "rank": 0}
        alone |= {f"{kind}_size": 1 for kind in ("tp", "dp", "pp")} | {"size": 1}
        ranks = [{"checksums": checksums, "per_gpu_checksum": overall, "parallelism_info": [alone]}]
        engine_checksum = hashlib.sha256(overall.encode()).hexdigest()
        return _outcome(True, "Success.", ranks=ranks, per_engine_checksum=engine_checksum)

    return router


def _memory_routes(engine: Engine, bodies: Bodies) -> APIRouter:
    router = APIRouter()

    async def occupy(change: Callable[[Sequence[str] | None], None], tags: Sequence[str] | None) -> JSONResponse:
        try:
            await asyncio.to_thread(change, tags)
        except InvalidRequestError as error:
            return _refusal(str(error))
        return JSONResponse(None)

    @router.api_route("/release_memory_occupation", methods=["GET", "POST"])
    async def release_memory_occupation(
        obj: Annotated[MemoryOccupationReqInput, bodies.of(MemoryOccupationReqInput)],
    ) -> JSONResponse:
        return await occupy(engine.release_memory, obj.tags)

    @router.api_route("/resume_memory_occupation", methods=["GET", "POST"])
    async def resume_memory_occupation(
        obj: Annotated[MemoryOccupationReqInput, bodies.of(MemoryOccupationReqInput)],
    ) -> JSONResponse:
        return await occupy(engine.resume_memory, obj.tags)

    return router
