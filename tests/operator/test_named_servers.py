"""Storage servers that a run names: an honest one is read, and what another one answers costs that run alone."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import aiohttp
import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.cluster import named_server
from dagger_operator.cluster.stores import Stores
from dagger_operator.store.credentials import Keys
from dagger_operator.store.objects import DamagedObject, Object, Store, StoreUnavailable
from dagger_operator.store.owner import owner_of, take_prefix
from dagger_operator.store.progress import report
from dagger_operator.store.results import StageProgress, save_result
from fixtures.recorder import NO_SUCH_KEY, recording, saying
from fixtures.results import result
from fixtures.s3 import S3
from fixtures.secrets import Secrets

KEYS = Keys({"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "for-tests-on-loopback-only"}, "Secret keys")
MORE_THAN_BUFFERS = 64 << 20
"""Bytes that a sender gets rid of where the other side reads all, and not where it stops."""


@pytest.fixture
async def stores() -> AsyncIterator[Stores]:
    secrets = Secrets()
    secrets.held["keys"] = ("1", dict(KEYS.values))
    opened = Stores(secrets)  # type: ignore[arg-type]  # in a Client's place
    yield opened
    await opened.close()


def at(make_run: Callable[..., DAggerRun], url: str) -> DAggerRun:
    return make_run(url="s3://bucket/run", endpointUrl=url, secretRef={"name": "keys"})


class Endless:
    """Answers with a body that has no end, and counts what is taken of it."""

    def __init__(self, status: int, **headers: str) -> None:
        self.head, self.chunked, self.taken = saying(status, **headers), "transfer_encoding" in headers, 0
        self.begins = b""

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        part = self.begins + bytes(1 << 20)
        with contextlib.suppress(OSError):
            self.head(handler)
            while self.taken < 2 * MORE_THAN_BUFFERS:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if self.chunked else part)
                self.taken += len(part)


CHUNKED, LONG = {"content_length": "", "transfer_encoding": "chunked"}, {"content_length": str(1 << 40)}


@pytest.mark.parametrize("told", [CHUNKED, LONG])
async def test_an_object_without_end_is_damage(stores: Stores, make_run: Callable[..., DAggerRun], told: dict[str, str]) -> None:
    answer = Endless(200, **told)
    with recording(answer) as server, pytest.raises(DamagedObject, match=r"^run\.json: has .* bytes or more, where 65536 at most"):
        await stores.read(at(make_run, server.url))
    assert answer.taken < MORE_THAN_BUFFERS


@pytest.mark.parametrize("told", [CHUNKED, LONG])
@pytest.mark.parametrize("status", [403, 500])
async def test_a_refusal_without_end_is_a_refusal(
    stores: Stores, make_run: Callable[..., DAggerRun], status: int, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_server, "_PAUSES", (0.0,))
    answer = Endless(status, **told)
    with recording(answer) as server, pytest.raises(StoreUnavailable, match=rf"run\.json in s3://bucket/run: the server answers {status}$"):
        await stores.read(at(make_run, server.url))
    assert answer.taken < MORE_THAN_BUFFERS and len(server.asked) == (2 if status == 500 else 1)


async def test_what_is_not_there_is_not_there_however_much_is_said_of_it(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    answer = Endless(404, **LONG)
    answer.begins = NO_SUCH_KEY
    with recording(answer) as server:
        results, _ = await stores.read(at(make_run, server.url))
    assert not results.records and answer.taken < 2 * MORE_THAN_BUFFERS


@pytest.mark.parametrize(
    ("body", "told"), [(b"", "404"), (b"default backend - 404", "404"), (b"<Error><Code>NoSuchBucket</Code></Error>", "404 NoSuchBucket")]
)
async def test_a_404_that_does_not_speak_of_the_object_does_not_say_that_it_is_not_there(
    stores: Stores, make_run: Callable[..., DAggerRun], body: bytes, told: str
) -> None:
    with recording(saying(404, body)) as server, pytest.raises(StoreUnavailable, match=rf"the server answers {told}$"):
        await stores.read(at(make_run, server.url))


async def test_what_is_not_there_is_not_there_in_however_many_parts_it_is_said(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    head = saying(404, content_length=str(len(NO_SUCH_KEY)))

    def answer(handler: BaseHTTPRequestHandler) -> None:
        head(handler)
        for part in NO_SUCH_KEY.splitlines(keepends=True):
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(0.05)

    with recording(answer) as server:
        results, _ = await stores.read(at(make_run, server.url))
    assert not results.records


async def test_headers_without_end_are_no_answer(
    stores: Stores, make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_server, "_PAUSES", ())
    taken = 0

    def answer(handler: BaseHTTPRequestHandler) -> None:
        nonlocal taken
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while taken < 2 * MORE_THAN_BUFFERS:
                taken += handler.connection.send(b"x-a: " + b"b" * 4000 + b"\r\n")

    with recording(answer) as server, pytest.raises(StoreUnavailable):
        await stores.read(at(make_run, server.url))
    assert taken < MORE_THAN_BUFFERS


async def test_servers_that_hang_hold_up_no_other(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    owner, asked, over = owner_of(make_run()), 0, threading.Event()

    def hangs(handler: BaseHTTPRequestHandler) -> None:
        nonlocal asked
        asked += 1
        over.wait(60)
        handler.close_connection = True

    async def read(http: aiohttp.ClientSession, url: str, key: str) -> Object | None:
        return await named_server.NamedServer(Store.open(at(make_run, url).spec.storage, KEYS), http).get(key, 1000)

    with contextlib.ExitStack() as stack:
        hanging = [stack.enter_context(recording(hangs)) for _ in range(7)]
        honest = stack.enter_context(recording(saying(200, owner.model_dump_json().encode())))
        stack.callback(over.set)
        async with named_server.session() as http:
            waiting = [asyncio.create_task(read(http, server.url, f"{number}")) for server in hanging for number in range(16)]
            while asked < 100:
                await asyncio.sleep(0.02)
            assert await asyncio.wait_for(read(http, honest.url, "run.json"), 20) is not None
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_server_sends_the_operator_nowhere_else(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    with recording(saying(200, b"within")) as within, recording(saying(302, location=within.url)) as server:
        with pytest.raises(StoreUnavailable, match=r"the server answers 302$"):
            await stores.read(at(make_run, server.url))
        assert len(server.asked) == 1 and not within.callers


async def test_of_what_a_server_says_a_word_is_told_on(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>and what the service within keeps to itself</Message></Error>"
    with recording(saying(403, body)) as server, pytest.raises(StoreUnavailable, match=r"the server answers 403 AccessDenied$"):
        await stores.read(at(make_run, server.url))


async def test_a_server_that_is_busy_for_a_moment_is_asked_again(
    stores: Stores, make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_server, "_PAUSES", (0.0, 0.0))
    run, busy = make_run(), [saying(503), saying(429)]
    owner = saying(200, owner_of(run).model_dump_json().encode())

    def answer(handler: BaseHTTPRequestHandler) -> None:
        (busy.pop(0) if busy else owner if "/run.json" in handler.path else saying(404, NO_SUCH_KEY))(handler)

    with recording(answer) as server:
        await stores.read(at(make_run, server.url))
    asked = [path for path, _ in server.asked]
    assert all("/run.json?" in path for path in asked[:3]) and all("/run.json?" not in path for path in asked[3:])


async def test_of_a_request_nothing_is_told_that_others_could_make_it_with(
    stores: Stores, make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_server, "_PAUSES", ())
    answer = saying(200, content_length="10", transfer_encoding="chunked")
    with recording(answer) as server, pytest.raises(StoreUnavailable) as refused:
        await stores.read(at(make_run, server.url))
    assert "Signature" in server.asked[0][0] and "ignature" not in str(refused.value) and server.url not in str(refused.value)


async def test_a_server_that_is_not_there_is_said_so(
    stores: Stores, make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_server, "_PAUSES", ())
    with pytest.raises(StoreUnavailable, match=r"reading run\.json in s3://bucket/run: Cannot connect to host 127\.0\.0\.1:1 "):
        await stores.read(at(make_run, "http://127.0.0.1:1"))


async def test_keys_to_encrypt_with_are_refused_before_a_named_server_is_asked(stores: Stores, make_run: Callable[..., DAggerRun]) -> None:
    held: Any = stores._client
    held.held["keys"] = ("2", {**KEYS.values, "AWS_SERVER_SIDE_ENCRYPTION": "sse-c", "AWS_SSE_CUSTOMER_KEY_BASE64": "bm90LXNob3du"})
    said = (
        r"^Secret keys in namespace lab .* has AWS_SSE_CUSTOMER_KEY_BASE64, .*: leave it out, or the endpoint \(spec\.storage\.endpointUrl"
    )
    with recording(saying(404, NO_SUCH_KEY)) as server, pytest.raises(StoreUnavailable, match=said) as refused:
        await stores.read(at(make_run, server.url))
    assert not server.callers and "bm90" not in str(refused.value)


@pytest.mark.heavy
async def test_an_honest_server_is_read(stores: Stores, make_run: Callable[..., DAggerRun], s3: S3) -> None:
    named = {"url": s3.url, "endpointUrl": s3.storage.endpoint_url, "region": "us-east-1", "secretRef": {"name": "keys"}}
    run, store = make_run(**named), s3.open()
    assert (await stores.read(run))[0].records == {}
    await take_prefix(store, run)
    await asyncio.gather(*(save_result(store, 0, result(stage, 0)) for stage in ("prepare", "preflight")))
    await report(store, 1, "rollout", 0, StageProgress(done=3, total=9, unit="rollouts"))
    results, progress = await stores.read(run)
    assert set(results.records) == {(0, "prepare"), (0, "preflight")}
    assert [one.done for workers in progress.values() for one in workers.values()] == [3]


@pytest.mark.heavy
async def test_keys_that_an_honest_server_does_not_know_are_refused(stores: Stores, make_run: Callable[..., DAggerRun], s3: S3) -> None:
    held: Any = stores._client
    held.held["keys"] = ("2", {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "another"})
    run = make_run(url=s3.url, endpointUrl=s3.storage.endpoint_url, region="us-east-1", secretRef={"name": "keys"})
    with pytest.raises(StoreUnavailable, match=r"the server answers 403 SignatureDoesNotMatch$"):
        await stores.read(run)
