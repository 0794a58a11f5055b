"""Starts and ends the server. What `tools/serve.py` calls."""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
import sys
from collections.abc import Sequence

from sftjax.errors import ConfigError
from sftjax.serve import models
from sftjax.serve.worker import Worker

try:
    import uvicorn

    from sftjax.serve import app
except ImportError as error:
    raise ConfigError(f"serving needs {error.name}: pip install 'sftjax[serve]'") from None


def serve(
    wanted: Sequence[tuple[str, str]],
    *,
    host: str,
    port: int,
    dtype: str,
    batch_size: int,
    max_length: int | None,
    max_new_tokens: int,
    grace: float,
) -> int:
    """Serves until SIGINT or SIGTERM, then answers what is in the making, for at most `grace` seconds.

    Prints one line with the address once requests are taken.

    Args:
      wanted: see `models.load`.
      host: address to listen on. port: 0: a free one.
      batch_size: answers of one model that decode together.
      max_length: see `models.load`. max_new_tokens: see `app.build`.

    Returns:
      the exit code.

    Raises:
      ConfigError: the address can't be had, and what `models.load` raises.
    """
    if not wanted:
        raise ConfigError("name at least one model: --model DIR")
    listener = _bind(host, port)
    with listener:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        served = models.load(wanted, dtype=dtype, batch_size=batch_size, steps=4, max_length=max_length)
        worker = Worker({name: model.generator for name, model in served.items()})
        application = app.build(served, worker, max_new_tokens=max_new_tokens, hosts=_hosts(host))
        config = uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(grace) + 30,  # for clients that don't read
        )
        worker.start()
        try:
            listener.listen(2048)
            _announce(listener, list(served))
            _Server(config, worker, grace).run(sockets=[listener])
        finally:
            worker.stop(0.0)
            worker.join()
    return 0


class _Server(uvicorn.Server):
    """A signal ends it with exit code 0; a second one gives up on what is in the making; a third waits for nobody."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float):
        super().__init__(config)
        self.worker, self.grace, self.signals = worker, grace, 0

    def handle_exit(self, sig, frame) -> None:
        self.signals += 1
        self.worker.stop(self.grace if self.signals == 1 else 0.0)
        self.should_exit = True
        self.force_exit = self.signals > 2


def _bind(host: str, port: int) -> socket.socket:
    """Has the address before models are loaded; connections are refused until they are."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}:{port} ({error}): choose another --host or --port") from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts(host: str) -> list[str]:
    return ["localhost", "127.0.0.1", "::1", "[::1]", host] if _is_loopback(host) else ["*"]


def _announce(listener: socket.socket, names: list[str]) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not _is_loopback(host):
        print("warning: everybody who reaches this address can use the models", file=sys.stderr)
    print(f"http://{shown}:{port}/  models: {', '.join(names)}", flush=True)
