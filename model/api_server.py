"""The HTTP routes of the API server: OpenAI's chat, completions and models, and a few beside."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .api_errors import ApiError, not_served, too_large, unavailable
from .api_metrics import CONTENT_TYPE, Metrics
from .api_middleware import Journal, KeyCheck
from .api_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    TokenizeRequest,
    parse,
    schemas,
)
from .api_responses import (
    ChatForm,
    Chunks,
    CompletionForm,
    TokenTable,
    to_json,
    tokens_of_text,
)
from .api_service import Job, Reply, Served, Service
from .api_streams import EventStream, failure, watch

INLINE_BYTES = 1 << 16  # parsing so much takes the event loop no longer than a millisecond
INLINE_MESSAGES = 256  # likewise
BODY_TIME_S = 60
NOT_SERVED = (
    "embeddings images audio moderations files uploads fine_tuning batches responses assistants "
    "threads vector_stores realtime evals containers videos conversations rerank score"
).split()
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Json(JSONResponse):
    """JSON in UTF-8, as readable as it was written."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def error_response(error: ApiError) -> Response:
    return Json(error.body, error.status, headers=error.headers)


# ----------------------------------------------------------------------------- requests


async def read_body(request: Request, limit: int) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: it is larger than ``limit`` bytes, or does not come.
    """
    stated = request.headers.get("content-length", "0")
    if request.headers.get("expect") and stated.isdigit() and int(stated) > limit:
        raise too_large(limit)  # before it is sent
    body, n_bytes = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_TIME_S):
            async for part in request.stream():
                n_bytes += len(part)
                if n_bytes <= limit:
                    body += part
                # a client that is cut off while it sends may not read why: some more is thrown away
                elif n_bytes > 4 * limit:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_TIME_S} seconds") from None
    if n_bytes > limit:
        raise too_large(limit)
    return bytes(body)


class Api:
    """What the routes do.

    Args:
        max_body: most bytes of a request.
    """

    def __init__(self, service: Service, metrics: Metrics, max_body: int) -> None:
        self.service = service
        self.metrics = metrics
        self.max_body = max_body
        self._tables: dict[Served, TokenTable] = {}

    async def parsed(self, request: Request, kind: type) -> Any:
        body = await read_body(request, self.max_body)
        if len(body) <= INLINE_BYTES:
            return parse(kind, body)
        return await asyncio.to_thread(parse, kind, body)

    def table(self, served: Served) -> TokenTable:
        if served not in self._tables:
            self._tables[served] = TokenTable(served.tokenizer)
        return self._tables[served]

    async def chat(self, request: Request) -> Response:
        wish: ChatRequest = await self.parsed(request, ChatRequest)
        served = self.service.model(wish.model)
        messages = await conversation(wish)
        options = wish.options(self.service.defaults, served.tokenizer.vocab_size)
        prompt_ids = await served.encode_chat(messages)
        jobs = [Job(prompt_ids, seeded(options, i)) for i in range(wish.n or 1)]
        form = ChatForm(served.name, served.fingerprint)
        return await self._respond(request, wish, served, jobs, form, 1)

    async def complete(self, request: Request) -> Response:
        wish: CompletionRequest = await self.parsed(request, CompletionRequest)
        served = self.service.model(wish.model)
        options = wish.options(self.service.defaults, served.tokenizer.vocab_size)
        jobs, echoed = [], []
        for prompt in wish.prompt:
            ids = await served.encode_text(prompt) if isinstance(prompt, str) else prompt
            served.check_ids(ids)
            text = prompt if isinstance(prompt, str) else served.tokenizer.decode(ids)
            echoed += [text] * (wish.n or 1) if wish.echo else []
            jobs += [Job(ids, seeded(options, i)) for i in range(wish.n or 1)]
        form = CompletionForm(served.name, served.fingerprint, echoed)
        return await self._respond(request, wish, served, jobs, form, len(wish.prompt))

    async def _respond(
        self,
        request: Request,
        wish: Sampled,
        served: Served,
        jobs: Sequence[Job],
        form: ChatForm | CompletionForm,
        n_prompts: int,
    ) -> Response:
        table = None if wish.n_logprobs is None else self.table(served)
        reply = Reply(served, jobs, every_piece=bool(wish.stream))
        reply.start()
        request.scope["reply"] = reply
        if wish.stream:
            wants_usage = bool(wish.stream_options and wish.stream_options.include_usage)
            chunks = [Chunks(form, i, table, wants_usage) for i in range(len(jobs))]
            return EventStream(request, reply, form, chunks, n_prompts if wants_usage else None)
        watcher = asyncio.create_task(watch(request, reply))
        try:
            while not reply.is_read:
                for _, piece in await reply.pieces():
                    if error := failure(reply, piece):
                        raise error
        finally:
            watcher.cancel()
            reply.abandon()
        if not all(answer and answer.is_done for answer in reply.answers):
            raise ClientDisconnect
        choices = []
        for index, answer in enumerate(reply.answers):
            tokens = tokens_of_text(table, answer) if table else []
            logprobs = form.logprobs(table, tokens) if table else None
            choices.append(form.choice(index, answer, logprobs))
        return Json(form.whole(choices, reply.answers, n_prompts))

    def models(self) -> Response:
        if self.service.state == "loading":
            raise unavailable("loading")
        entries = [model_entry(served) for served in self.service.models.values()]
        return Json({"object": "list", "data": entries})

    def one_model(self, name: str) -> Response:
        if self.service.state == "loading":
            raise unavailable("loading")
        return Json(model_entry(self.service.named(name)))

    async def tokenize(self, request: Request) -> Response:
        wish: TokenizeRequest = await self.parsed(request, TokenizeRequest)
        served = self.service.model(wish.model)
        tokenizer = served.tokenizer
        if wish.messages is not None:
            messages = await conversation(wish)
            served.check_length(messages, "messages")
            ids = await asyncio.to_thread(
                tokenizer.encode_chat, messages, add_generation_prompt=True
            )
        else:
            served.check_length(wish.the_text, "content")
            ids = await asyncio.to_thread(tokenizer.encode, wish.the_text)
            ids = tokenizer.encode_document("")[:-1] * bool(wish.add_special) + ids
        return Json({"tokens": ids, "count": len(ids), "max_model_len": served.context})

    async def detokenize(self, request: Request) -> Response:
        wish: DetokenizeRequest = await self.parsed(request, DetokenizeRequest)
        served = self.service.model(wish.model)
        served.check_length(wish.tokens, "tokens")
        served.check_ids(wish.tokens, "tokens")
        text = await asyncio.to_thread(
            served.tokenizer.decode, wish.tokens, skip_special_tokens=False
        )
        return Json({"content": text, "prompt": text})

    def health(self) -> Response:
        state = self.service.state
        if state != "ok":
            error = unavailable(state)
            return Json({"status": state, **error.body}, error.status, headers=error.headers)
        engines = [served.engine for served in self.service.models.values()]
        active, queued = (sum(getattr(e, n) for e in engines) for n in ("n_active", "n_queued"))
        return Json({"status": "ok", "active": active, "queued": queued})

    def show_metrics(self) -> Response:
        return PlainTextResponse(self.metrics.text(self.service), media_type=CONTENT_TYPE)


async def conversation(wish: ChatRequest | TokenizeRequest) -> list[dict[str, str]]:
    """Return the messages as the chat template takes them; a body has room for 250,000, a second's
    work.
    """
    if len(wish.messages) <= INLINE_MESSAGES:
        return ChatRequest.conversation(wish)
    return await asyncio.to_thread(ChatRequest.conversation, wish)


def seeded(options: Any, index: int) -> Any:
    """Return the options of a request's answer: a seed gives each of them another text."""
    return options if options.seed is None else replace(options, seed=options.seed + index)


def model_entry(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "minimind",
        "max_model_len": served.context,
        "meta": {
            "n_ctx_train": served.context,
            "n_params": served.n_params,
            "n_vocab": served.tokenizer.vocab_size,
        },
    }


# ----------------------------------------------------------------------------- the application


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    allowed_origins: Sequence[str] = ("*",),
    max_body: int = 8 << 20,
) -> Any:
    """Return the ASGI application.

    Args:
        api_key: what clients must know; None: nothing.
        allowed_origins: pages of which a browser may call this server; ``*``: all.
        max_body: most bytes of a request.
    """
    metrics = Metrics()
    api = Api(service, metrics, max_body)
    app = FastAPI(
        title="MiniMind",
        version="1.0.0",
        docs_url=None,  # its page is made of files from elsewhere, and blank where there is no way
        redoc_url=None,
        redirect_slashes=False,
        responses={status: {"description": "OpenAI's error object"} for status in ("4XX", "5XX")},
    )
    add_routes(app, api)
    add_error_handlers(app)
    app.openapi = lambda: document(app)
    outside: Any = app if api_key is None else KeyCheck(app, api_key)
    # outside of what answers 500, so that a browser may read that too
    outside = CORSMiddleware(
        outside,
        allow_origins=list(allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,  # who may call is for allowed_origins to say
        expose_headers=["Retry-After"],
        max_age=600,
    )
    return Journal(outside, metrics)


def add_routes(app: FastAPI, api: Api) -> None:
    """Add all routes; OpenAI's are there without /v1 too, as in llama.cpp's server."""

    def post(path: str, handle: Callable[[Request], Any], kind: type, summary: str) -> None:
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}

        async def route(request: Request) -> Response:
            return await handle(request)

        app.post(
            path,
            summary=summary,
            operation_id=kind.__name__,
            response_class=Json,
            openapi_extra={"requestBody": body},
        )(route)
        if path.startswith("/v1/"):
            app.post(path.removeprefix("/v1"), include_in_schema=False)(route)

    post("/v1/chat/completions", api.chat, ChatRequest, "Answer a conversation")
    post("/v1/completions", api.complete, CompletionRequest, "Continue texts")
    post("/tokenize", api.tokenize, TokenizeRequest, "Ids of a text or a conversation")
    post("/detokenize", api.detokenize, DetokenizeRequest, "Text of ids")

    @app.get("/models", include_in_schema=False)
    @app.get("/v1/models", response_class=Json, summary="The models")
    async def models() -> Response:
        return api.models()

    @app.get("/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}", response_class=Json, summary="One model")
    async def model(name: str) -> Response:
        return api.one_model(name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=Json, summary="200: ready; 503: not")
    async def health() -> Response:
        return api.health()

    @app.get("/metrics", response_class=PlainTextResponse, summary="For Prometheus")
    async def metrics() -> Response:
        return api.show_metrics()

    for family in NOT_SERVED:
        for path in (f"/v1/{family}", f"/v1/{family}/{{rest:path}}"):

            @app.api_route(path, methods=METHODS, include_in_schema=False)
            async def refuse(request: Request) -> Response:
                raise not_served(request.url.path)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Nothing()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        hint = (
            "; the API is under /v1, see /openapi.json" if error.status_code in (404, 405) else ""
        )
        message = f"{error.detail}: {where}{hint}"
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def unknown(_: Request, __: Exception) -> Response:
        message = "the server failed to answer: see its log"
        return error_response(ApiError(500, message, type="server_error", code="internal_error"))


class Nothing(Response):
    """The answer to a client that has left."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        return


def document(app: FastAPI) -> dict[str, Any]:
    """Return /openapi.json; the requests' schemas are those that check them."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        kinds = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
        components |= schemas(kinds)
        app.openapi_schema = schema
    return app.openapi_schema
