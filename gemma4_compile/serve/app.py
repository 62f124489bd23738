"""The ASGI application: routes, and what is done around each request."""

import hmac
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from llguidance.hf import from_tokenizer
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma4_compile import __version__
from gemma4_compile.runtime.async_engine import AsyncEngine

from .answers import response_template
from .chat import chat_completions
from .completions import completions
from .config import ServeConfig
from .context import Context
from .errors import ApiError, fault
from .gate import Gate
from .grammars import Grammars
from .logs import event
from .sampling import SamplingDefaults
from .schema import DetokenizeRequest, TokenizeRequest, parse
from .texts import Texts

_OPEN = ("/health", "/metrics", "/version")  # to those who have no key: probes and scrapers
_GONE = 499  # in logs and metrics alone: nobody reads the response

Endpoint = Callable[[Context, Request], Awaitable[Response]]


def create_app(engine: AsyncEngine, config: ServeConfig) -> Starlette:
    """The application on an engine that somebody else closes. Raises ValueError for a model without a tokenizer."""
    tokenizer = engine.engine.tokenizer
    if tokenizer is None:
        raise ValueError(f"a server needs a tokenizer, got none with {config.model}; use a checkpoint folder with one")
    served = engine.engine
    pieces = from_tokenizer(tokenizer, served.runner.vocabulary.size, sorted(served.stop_tokens) or None)
    texts = Texts(tokenizer, pieces, config.chat_template)
    template = response_template(tokenizer, texts.chat_template)
    context = Context(
        config, engine, texts, Grammars(pieces, tokenizer.get_vocab()),
        SamplingDefaults.of(getattr(served.model, "generation_config", None)), template,
        Gate(served.config.max_requests, config.max_waiting), int(time.time()),
    )  # fmt: skip
    observed = _Observed(context.gate)

    def route(path: str, method: str, endpoint: Endpoint) -> Route:
        async def respond(request: Request) -> Response:
            try:
                return await endpoint(context, request)
            except ApiError as error:
                return error.response()
            except ClientDisconnect:
                return Response(status_code=_GONE)
            except Exception as error:
                return fault(error).response()

        return Route(path, respond, methods=[method])

    async def metrics(context: Context, request: Request) -> Response:
        return PlainTextResponse(
            engine.engine.metrics.prometheus() + observed.prometheus(), media_type="text/plain; version=0.0.4"
        )

    middleware = [Middleware(_Around, config=config, observed=observed)]
    if config.cors_origins:
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
        )
    app = Starlette(
        routes=[
            route("/v1/chat/completions", "POST", chat_completions),
            route("/v1/completions", "POST", completions),
            route("/v1/models", "GET", _models),
            route("/v1/models/{name:path}", "GET", _model),
            route("/tokenize", "POST", _tokenize),
            route("/detokenize", "POST", _detokenize),
            route("/health", "GET", _health),
            route("/metrics", "GET", metrics),
            route("/version", "GET", _version),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _no_route},
    )
    app.state.context = context
    return app


async def _models(context: Context, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(context)]})


async def _model(context: Context, request: Request) -> Response:
    context.check_model(request.path_params["name"])
    return JSONResponse(_described(context))


def _described(context: Context) -> dict[str, Any]:
    return {
        "id": context.config.model, "object": "model", "created": context.started, "owned_by": "gemma4-compile",
        "max_model_len": context.engine.engine.max_model_len,
    }  # fmt: skip


async def _tokenize(context: Context, request: Request) -> Response:
    asked = parse(TokenizeRequest, await context.body(request))
    context.check_model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "either prompt or messages must be given; leave one out", "prompt")
    if asked.prompt is not None:
        tokens = await context.texts.encode(asked.prompt, asked.add_special_tokens)
    else:
        _, tokens = await context.texts.chat(
            asked.messages or [], asked.tools, asked.chat_template_kwargs, add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
        )  # fmt: skip
    found = {"count": len(tokens), "max_model_len": context.engine.engine.max_model_len, "tokens": tokens}
    if asked.return_token_strs:
        found["token_strs"] = [context.texts.piece(token).decode(errors="replace") for token in tokens]
    return JSONResponse(found)


async def _detokenize(context: Context, request: Request) -> Response:
    asked = parse(DetokenizeRequest, await context.body(request))
    context.check_model(asked.model)
    return JSONResponse({"prompt": await context.texts.decode(asked.tokens, asked.skip_special_tokens)})


async def _health(context: Context, request: Request) -> Response:
    """503 while draining, and once the engine has failed: nothing should be sent here."""
    if context.gate.draining:
        raise ApiError(503, "the server is shutting down; ask another", code="draining")
    if not context.engine.is_running:
        raise ApiError(503, "the engine has failed; see the server's log", code="engine_stopped")
    return JSONResponse({"status": "ok"})


async def _version(context: Context, request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers).response()


class _Observed:
    """Prometheus metrics of HTTP, beside the engine's."""

    def __init__(self, gate: Gate):
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "gemma4_compile_http_requests", "HTTP requests by path and status", ("path", "status"), registry=self._registry
        )
        inside = Gauge("gemma4_compile_http_sequences", "Sequences that run or wait", registry=self._registry)
        inside.set_function(lambda: gate.inside)

    def prometheus(self) -> str:
        return generate_latest(self._registry).decode()


class _Around:
    """Around each request: an id, the key, a line in the log, a count."""

    def __init__(self, app: ASGIApp, config: ServeConfig, observed: _Observed):
        self._app, self._config, self._observed = app, config, observed
        self._key = None if config.api_key is None else f"Bearer {config.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, first = time.perf_counter(), 500, 0.0
        request_id = scope.setdefault("state", {})["id"] = uuid.uuid4().hex

        async def observed_send(message: Message) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status, first = message["status"], time.perf_counter()
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._refuses(scope):
                wrong = ApiError(401, "an API key is needed; send authorization: Bearer KEY", code="invalid_api_key")
                await wrong.response()(scope, receive, observed_send)
            else:
                await self._app(scope, receive, observed_send)
        finally:
            self._note(scope, status, begun, first)

    def _refuses(self, scope: Scope) -> bool:
        if self._key is None or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return False
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not hmac.compare_digest(given, self._key)

    def _note(self, scope: Scope, status: int, begun: float, first: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")  # not what clients make up: each value is a series
        self._observed.requests.labels(path, str(status)).inc()
        if self._config.access_log:
            event(
                "request", id=scope["state"]["id"], method=scope["method"], path=path, status=status,
                first_ms=round(1e3 * (first - begun), 1) if first else None, ms=round(1e3 * (time.perf_counter() - begun), 1),
            )  # fmt: skip
