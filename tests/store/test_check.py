"""The check tells stores that keep conditional writes from those that only say so."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from obstore.store import GCSStore

from dagger_operator.store import check as check_module
from dagger_operator.store.check import check, require_honest
from dagger_operator.store.objects import Object, ObjectInfo, Store, StoreUnavailable
from dagger_operator.store.stage import StageFailure


async def test_an_honest_store_passes_and_is_left_empty(store: Store) -> None:
    report = await check(store, rounds=5, writers=8)
    assert report.honest, str(report)
    assert report.races == 5 and report.updates >= 5 and report.round_trip_seconds > 0
    assert "honours conditional writes" in str(report)
    assert await store.list() == []
    assert (await require_honest(store)).honest


class Ignoring(Store):
    """Takes the conditions and ignores them, as some S3-compatible servers do."""

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        await self.put(key, data)
        return await self.get(key) or Object(data, "")


class CheckThenAct(Store):
    """Checks the condition, and writes a moment later: versitygw before 1.8.0."""

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        there = await self.get(key)
        if (there and there.etag) != (expected and expected.etag):
            return None
        await asyncio.sleep(0.01)
        await self.put(key, data)
        return await self.get(key)


class Lagging(Store):
    """Lists what was there a while ago."""

    async def list(self, prefix: str = "") -> list[ObjectInfo]:
        return (await super().list(prefix))[:-1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Ignoring, "ignores If-None-Match"), (CheckThenAct, "not exactly one winner"), (Lagging, "listings lag behind")],
)
async def test_a_store_that_only_says_so_is_refused_in_words(store: Store, kind: type[Store], words: str) -> None:
    lying = kind(store._backend, store.url, scheme=store._scheme, prefix=store._prefix, folder=store._folder)
    report = await check(lying, rounds=5, writers=8)
    assert not report.honest and words in str(report)
    with pytest.raises(StageFailure, match="StorageNotHonest"):
        await require_honest(lying)


class Throttling(Store):
    """Takes few writes to one object in a time, as GCS does: one in a second, whatever the client's own repeats."""

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        now, last = time.monotonic(), self.__dict__.setdefault("written", {})
        if now - last.get(key, 0.0) < 0.01:
            raise StoreUnavailable(f"replacing {key}: Server returned non-2xx status code: 429 Too Many Requests: SlowDown")
        last[key] = now
        return await super().swap(key, data, expected)


async def test_a_store_that_takes_few_writes_to_one_object_at_a_time_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_PAUSE_SECONDS", 0.05)
    slow = Throttling(store._backend, store.url, scheme=store._scheme, prefix=store._prefix, folder=store._folder)
    assert (await require_honest(slow)).honest


async def test_a_store_that_takes_no_writes_at_all_is_not_waited_for_without_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "_PAUSE_SECONDS", 0.0)

    class Refusing(Throttling):
        async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
            raise StoreUnavailable("429 Too Many Requests")

    with pytest.raises(StoreUnavailable):
        await check(Refusing(store._backend, store.url, scheme=store._scheme, prefix=store._prefix, folder=store._folder))


@pytest.fixture
def busy() -> Iterator[tuple[str, list[str]]]:
    """A server of GCS's protocol that answers the first two writes with 429, and takes the others; what it was asked."""
    asked: list[str] = []

    class Busy(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.headers.get("x-goog-if-generation-match", ""))
            self.send_response(429 if len(asked) <= 2 else 200)
            for name, value in {"ETag": "e", "x-goog-generation": "7", "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize(("repeats", "taken"), [(3, True), (1, False)])
async def test_the_client_repeats_a_write_that_is_throttled_and_says_so_once_it_gives_up(
    busy: tuple[str, list[str]], repeats: int, taken: bool
) -> None:
    url, asked = busy
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    backend = GCSStore(
        "bucket",
        service_account_key=json.dumps(account),
        client_options={"allow_http": True},
        retry_config={"max_retries": repeats},
    )
    store = Store(backend, "gs://bucket", scheme="gs")
    if taken:
        assert await store.create("key", b"data")
    else:
        with pytest.raises(StoreUnavailable, match=check_module._THROTTLED):
            await store.create("key", b"data")
    assert asked == ["0"] * (3 if taken else 2)
