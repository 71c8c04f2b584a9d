"""A real Prometheus scrapes a run while it works: everything that docs/metrics.md promises is there, and nothing else is."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from dashboards.run import RUN
from fixtures.metrics import queries

pytestmark = pytest.mark.heavy

PORT = 9090
OF_WORKERS = ("dagger_rollout", "dagger_rollouts", "dagger_sandbox", "dagger_grade", "dagger_infrastructure", "dagger_gateway")


class Flaky:
    """The scripted policies behind a server that answers the student's next requests with the status codes in `faults`."""

    def __init__(self, policies: str) -> None:
        faults = self.faults = list[int]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                model = json.loads(body)["model"]
                code = faults.pop(0) if faults and model == "scripted-student" else 200
                answer = b"{}" if code != 200 else self._passed_on(body)
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def _passed_on(self, body: bytes) -> bytes:
                url = policies.removesuffix("/v1") + self.path
                with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=30) as answer:
                    said: bytes = answer.read()
                    return said

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def flaky(scripted: str) -> Iterator[Flaky]:
    made = Flaky(scripted)
    threading.Thread(target=made.server.serve_forever, args=(0.1,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.timeout(300)
def test_prometheus_scrapes_a_run_while_it_works(runs: Any, flaky: Flaky, prometheus: Any, documented_metrics: Any) -> None:
    endpoint = {"url": flaky.url}
    document = runs.document(
        "measured",
        rounds=1,
        student={"model": "scripted-student", "endpoint": endpoint, "serving": None},
        teacher={"endpoint": endpoint},
        mixing={"strategy": "PerTurn", "beta": {"type": "Constant", "value": 0.5}},
        tasks={"firstRound": 24, "perRound": 24},
        rollouts={"workers": 2, "concurrency": 2},
        training={"mode": "Disabled"},
    )
    process, exposition = runs.start("run", str(document)), b""
    while process.poll() is None:
        if addresses := listening(process.pid):
            if not exposition:  # past preflight, which would refuse such a student
                flaky.faults += [500, 401]
            prometheus.watch("workers", *addresses)
            exposition = scraped(addresses[0]) or exposition
        time.sleep(0.2)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    assert documented_metrics.differences(prometheus.series("workers"), "Worker", "Gateway") == []
    assert prometheus.lint(exposition) == ""
    assert prometheus.value("sum(max_over_time(dagger_gateway_turns_total[1h])) > 0")
    assert prometheus.value('sum(max_over_time(dagger_infrastructure_failures_total{reason="Unauthorized"}[1h]))') == 1
    # Two workers on one machine, each at an address of its own.
    assert prometheus.value("count(count by (instance) (max_over_time(dagger_rollouts_under_way[1h])))") == 2
    drawn = [(title, query) for title, query in queries(RUN) if re.findall(r"dagger_(?!operator_dev)[a-z]+", query)[0] in OF_WORKERS]
    empty = [title for title, query in drawn if prometheus.value(f"count(last_over_time(({query})[1h:1s]))") is None]
    assert drawn
    assert empty == [], "each panel of the dashboard draws something"
    text = json.dumps(prometheus.series("workers"))
    assert "measured" not in text, "no run is named, or the number of series grows for ever"


def listening(pid: int) -> list[str]:
    """Where the processes below `pid` answer Prometheus."""
    try:
        below = {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return []
    found = psutil.net_connections("tcp")
    return [f"{one.laddr.ip}:{PORT}" for one in found if one.status == psutil.CONN_LISTEN and one.laddr.port == PORT and one.pid in below]


def scraped(address: str) -> bytes:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text: bytes = answer.read()
            return text
    except OSError:  # it has ended meanwhile
        return b""
