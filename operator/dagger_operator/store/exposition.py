"""`/metrics` of a stage, from which Prometheus reads its progress while it runs. The metrics: docs/metrics.md."""

import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import structlog
from prometheus_client import CollectorRegistry, GCCollector, MetricsHandler, PlatformCollector, ProcessCollector, disable_created_metrics

PORT_VARIABLE = "DAGGER_METRICS_PORT"
"""Environment variable; if it is set, a stage with metrics serves them to Prometheus on that port of `POD_IP`."""


def fresh_registry() -> CollectorRegistry:
    """Return an empty registry, without the extra series per counter that gives its creation time."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client does not type it
    return CollectorRegistry()


@contextmanager
def exposed(environ: Mapping[str, str]) -> Iterator[CollectorRegistry]:
    """Serve a registry, with this process's own metrics in it, while the context lasts. Without a port it is not served.

    Served from a thread, so a process that computes for minutes can be read too. An unavailable port costs the metrics, not the stage.
    """
    registry = fresh_registry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    server = _listening(environ.get("POD_IP") or "127.0.0.1", environ.get(PORT_VARIABLE, ""), registry)
    if server is None:
        yield registry
        return
    with server:
        threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics", daemon=True).start()
        try:
            yield registry
        finally:
            server.shutdown()


def _listening(address: str, port: str, registry: CollectorRegistry) -> "_Server | None":
    if not port:
        return None
    try:
        return _Server(address, int(port), registry)
    except (OSError, ValueError, OverflowError) as error:  # no number, out of range, taken
        structlog.get_logger().warning("no metrics", address=address, port=port, problem=str(error))
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), MetricsHandler.factory(registry))

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own resolves this host's name by DNS
