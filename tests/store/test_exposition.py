"""A stage's `/metrics`: where its environment says, as long as the stage works, and never at the stage's cost."""

import contextlib
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import Counter

from dagger_operator.store.exposition import PORT_VARIABLE, exposed


def free_port(address: str) -> int:
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def scrape(address: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_two_stages_of_one_machine_answer_on_one_port_at_addresses_of_their_own() -> None:
    port = free_port("127.0.0.1")
    with contextlib.ExitStack() as stack:
        for address in ("127.0.0.1", "127.0.0.2"):
            registry = stack.enter_context(exposed({"POD_IP": address, PORT_VARIABLE: str(port)}))
            Counter("turns", "Turns.", registry=registry).inc(int(address[-1]))
        for address in ("127.0.0.1", "127.0.0.2"):
            said = scrape(address, port)
            assert f"turns_total {address[-1]}.0" in said and "process_resident_memory_bytes" in said and "_created" not in said
    with pytest.raises(urllib.error.URLError):
        scrape("127.0.0.1", port)


@pytest.mark.parametrize("port", ["taken", "http", "-1", "70000"])
def test_a_port_that_cannot_be_had_is_logged_and_the_stage_goes_on(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        given = str(other.getsockname()[1]) if port == "taken" else port
        with exposed({PORT_VARIABLE: given}) as registry:
            Counter("turns", "Turns.", registry=registry)
    assert "no metrics" in capsys.readouterr().out


def test_without_a_port_nothing_listens_and_metrics_can_be_made() -> None:
    with exposed({"POD_IP": "127.0.0.1"}) as registry:
        Counter("turns", "Turns.", registry=registry).inc()
        assert registry.get_sample_value("turns_total") == 1
