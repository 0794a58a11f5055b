"""The web side: routes, streams, errors. Everything that decodes is the worker's."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import jinja2
import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from sftjax.data.sandbox import TemplateError
from sftjax.generate.answer import Answer
from sftjax.serve import protocol
from sftjax.serve.models import Served
from sftjax.serve.protocol import ApiError, Asked, Writer
from sftjax.serve.worker import Job, Worker

MAX_BODY = 16 << 20  # bytes
MAX_OUTSTANDING = 1024  # answers asked for and not yet given
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_LOST = {"stopping": (503, "the server is shutting down"), "failed": (500, "decoding failed; see the server's log")}


def build(models: Mapping[str, Served], worker: Worker, *, max_new_tokens: int, hosts: list[str]) -> Starlette:
    """The application.

    Args:
      models: by name.
      worker: decodes for them.
      max_new_tokens: of a chat answer whose request has no limit.
      hosts: names under which browsers may reach it ("*": any); a page elsewhere can't pose as one of them.
    """
    service = _Service(models, worker, max_new_tokens)
    page = _page(list(models))

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY + "; frame-ancestors 'none'"})

    return Starlette(
        routes=[
            Route("/", index),
            Route("/health", service.health),
            Route("/v1/models", service.list_models),
            Route("/v1/models/{name:path}", service.describe_model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_route},
    )


def _page(names: list[str]) -> str:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("sftjax", "."), autoescape=True)
    return environment.get_template("serve/page.html.j2").render(models=names)


class _Service:
    def __init__(self, models: Mapping[str, Served], worker: Worker, max_new_tokens: int):
        self.models, self.worker, self.max_new_tokens = models, worker, max_new_tokens
        self.outstanding = 0

    # --- routes ----------------------------------------------------------------------------------------------------

    async def health(self, _: Request) -> Response:
        status = "stopping" if self.worker.stopping else "ok" if self.worker.is_alive() else "failed"
        body = {"status": status, "models": self.worker.counts()}
        return _json(body, 200 if status == "ok" else 503)

    async def list_models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [_card(model) for model in self.models.values()]})

    async def describe_model(self, request: Request) -> Response:
        return _json(_card(self._model(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    # --- answers ---------------------------------------------------------------------------------------------------

    def _model(self, name: str) -> Served:
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name!r} here, only {known}", param="model", code="model_not_found")
        return self.models[name]

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        asked = protocol.read(await _body(request), chat=chat)
        model = self._model(asked.model)
        answers = await run_in_threadpool(self._answers, model, asked)
        if self.worker.stopping or not self.worker.is_alive():
            raise ApiError(*_LOST["stopping" if self.worker.stopping else "failed"])
        if self.outstanding + len(answers) > MAX_OUTSTANDING:
            raise ApiError(429, "too many requests at once; try again later", code="rate_limit_exceeded")
        writer = Writer(asked, model.token_text, int(time.time()))
        events, report = _bridge()
        job = Job(model.name, answers, report, texts=asked.stream, tokens=asked.logprobs)
        self.outstanding += len(answers)
        self.worker.submit(job)
        if asked.stream:
            return _Stream(self._stream(job, events, asked, writer), functools.partial(self._leave, job))
        try:
            return await self._collect(request, job, events, writer)
        finally:
            self._leave(job)

    def _answers(self, model: Served, asked: Asked) -> list[Answer]:
        answers = []
        tokenizer = model.generator.tokenizer
        for number, prompt in enumerate(asked.prompts):
            where = "messages" if asked.chat else "prompt"
            try:
                ids = model.encode(prompt)
            except TemplateError as error:
                raise ApiError(400, f"{where}: the chat template refuses them: {error}", param=where) from None
            limit = self._limit(model, asked, ids, where)
            for sample in range(asked.n):
                answers.append(
                    Answer(
                        ids,
                        key=(asked.seed, number, sample),
                        limit=limit,
                        sampling=asked.sampling,
                        tokenizer=tokenizer,
                        stop_ids=frozenset(tokenizer.stop_ids),
                        stop=asked.stop,
                        top_logprobs=asked.top_logprobs,
                    )
                )
        return answers

    def _limit(self, model: Served, asked: Asked, ids: list[int], where: str) -> int:
        if not ids:
            raise ApiError(400, f"{where}: empty; give at least one token", param=where, code="invalid_value")
        if max(ids) >= model.generator.config.vocab_size:
            problem = model.generator.tokenizer.no_row(ids, model.generator.config.vocab_size)
            raise ApiError(400, f"{where}: {problem}", param=where, code="invalid_value")
        room = model.context - len(ids)
        wanted = 1 if asked.max_tokens is None else asked.max_tokens
        if wanted > room:
            message = f"{len(ids)} tokens of prompt and {wanted} of answer don't fit into {model.context} positions"
            raise ApiError(400, message, param=where, code="context_length_exceeded")
        return min(room, self.max_new_tokens) if asked.max_tokens is None else asked.max_tokens

    async def _collect(self, request: Request, job: Job, events: asyncio.Queue, writer: Writer) -> Response:
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            for _ in job.answers:
                event = asyncio.ensure_future(events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return Response(status_code=499)  # nobody reads it
                if event.result()[0] == "lost":
                    raise ApiError(*_LOST[event.result()[1]])
            return _json(writer.whole(job.answers))
        finally:
            gone.cancel()

    async def _stream(self, job: Job, events: asyncio.Queue, asked: Asked, writer: Writer) -> AsyncIterator[bytes]:
        if asked.chat:
            for number in range(len(job.answers)):
                yield _event(writer.opening(number))
        unfinished = len(job.answers)
        while unfinished:
            kind, *what = await events.get()
            if kind == "lost":
                yield _event(ApiError(*_LOST[what[0]]).body())
                return
            if kind == "text":
                number, text, start, stop = what
                yield _event(writer.piece(number, job.answers[number], text, start, stop, None))
            else:
                (number,) = what
                answer = job.answers[number]
                yield _event(writer.piece(number, answer, "", job.told[number], answer.told(), answer.finish_reason))
                unfinished -= 1
        if asked.include_usage:
            yield _event(writer.closing(job.answers))
        yield b"data: [DONE]\n\n"

    def _leave(self, job: Job) -> None:
        self.outstanding -= len(job.answers)
        self.worker.cancel(job)  # what is still in the making, if anything


class _Stream(StreamingResponse):
    """Events, and what has to be done when they end or nobody reads them any longer, started or not."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.leave = leave

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def _bridge():
    """A queue of this event loop, and a function that puts events there from another thread."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def report(event: tuple) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(events.put_nowait, event)

    return events, report


async def _body(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY:
                raise ApiError(413, f"the body has more than {MAX_BODY >> 20} MiB")
    except ClientDisconnect:
        raise ApiError(400, "the body ends too early") from None
    try:
        return orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body isn't JSON: {error}") from None


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(model: Served) -> dict[str, Any]:
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "sftjax"}
    return card | {"max_model_len": model.context}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _json(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")


async def _refuse(_: Request, error: ApiError) -> Response:
    return _json(error.body(), error.status)


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    message = f"{error.detail}: {request.method} {request.url.path}"
    return _json(ApiError(error.status_code, message).body(), error.status_code)
