"""What every store promises, on a folder and on a real S3 server."""

import asyncio
import contextlib
import errno
import os
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from dagger_operator.api import Storage
from dagger_operator.store import objects
from dagger_operator.store.credentials import Keys
from dagger_operator.store.objects import DamagedObject, Store, StoreUnavailable
from fixtures.recorder import NO_SUCH_KEY, recording, saying

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret"}


async def test_what_is_not_there_is_an_answer_and_no_error(store: Store, tmp_path: Path) -> None:
    assert await store.get("a/b.json") is None
    assert not await store.exists("a/b.json")
    assert await store.list("a") == []
    assert not await store.download("a/b.json", tmp_path / "b.json")
    await store.delete("a/b.json")


async def test_an_object_is_created_once(store: Store) -> None:
    assert await store.create("a/b.json", b"first")
    assert not await store.create("a/b.json", b"second")
    there = await store.get("a/b.json")
    assert there is not None and there.data == b"first"


async def test_the_first_try_of_a_repeated_creation_counts_as_ours(store: Store) -> None:
    assert await store.create("a/b.json", b"mine, worker 7")
    assert await store.create("a/b.json", b"mine, worker 7")


async def test_a_swap_succeeds_only_from_the_state_it_was_made_for(store: Store) -> None:
    first = await store.swap("a/b.json", b"1", None)
    assert first is not None
    second = await store.swap("a/b.json", b"2", first)
    assert second is not None and second == await store.get("a/b.json")
    assert await store.swap("a/b.json", b"3", first) is None
    await store.delete("a/b.json")
    assert await store.swap("a/b.json", b"3", second) is None
    assert not await store.exists("a/b.json")


async def test_of_many_writers_of_one_state_one_wins(store: Store) -> None:
    now = await store.swap("counter", b"start", None)
    for number in range(5):
        made = await asyncio.gather(*(store.swap("counter", f"{number} by {writer}".encode(), now) for writer in range(12)))
        winners = [one for one in made if one is not None]
        assert len(winners) == 1
        now = winners[0]
        assert now == await store.get("counter")


async def test_a_listing_is_of_a_folder_and_in_order(store: Store) -> None:
    for key in ("a/2.json", "a/1.json", "a/b/3.json", "ab/4.json"):
        await store.put(key, key.encode())
    assert [info.key for info in await store.list("a/")] == ["a/1.json", "a/2.json", "a/b/3.json"]
    assert [(info.key, info.size) for info in await store.list("ab")] == [("ab/4.json", 9)]
    assert len(await store.list()) == 4


async def test_an_object_beyond_its_bound_is_damage_and_one_within_is_read(store: Store) -> None:
    await store.put("a/b.json", bytes(100))
    there = await store.get("a/b.json", 100)
    assert there is not None and there == await store.get("a/b.json")
    with pytest.raises(DamagedObject, match=r"^a/b\.json: has 100 bytes or more, where 99 at most are expected"):
        await store.get("a/b.json", 99)
    assert await store.get("a/nothing.json", 99) is None


@pytest.mark.parametrize("told", [{}, {"content_length": "10", "transfer_encoding": "chunked"}])
async def test_of_an_object_beyond_its_bound_no_more_is_read_whatever_its_server_says_of_it(told: dict[str, str]) -> None:
    head, size = saying(200, **(told or {"content_length": str(1 << 30)})), 0

    def answer(handler: BaseHTTPRequestHandler) -> None:
        nonlocal size
        head(handler)
        with contextlib.suppress(OSError):
            for _ in range(1 << 10):
                part = bytes(1 << 20)
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if told else part)
                size += len(part)
        handler.close_connection = True

    with recording(answer) as server:
        store = Store.open(Storage(url="s3://bucket/run", endpoint_url=server.url), Keys(KEYS, "Secret keys"))
        with pytest.raises(DamagedObject, match=r"^run\.json: has .* bytes or more, where 1000 at most are expected"):
            await store.get("run.json", 1000)
    assert size < 100 << 20


@pytest.mark.parametrize("body", [b"", b"default backend - 404", b"<Error><Code>NoSuchBucket</Code></Error>"])
async def test_only_who_speaks_of_the_object_says_that_it_is_not_there(body: bytes) -> None:
    answers = [saying(404, body), saying(404, NO_SUCH_KEY)]
    with recording(lambda handler: answers.pop(0)(handler)) as server:
        store = Store.open(Storage(url="s3://bucket/run", endpoint_url=server.url), Keys(KEYS, "Secret keys"))
        with pytest.raises(StoreUnavailable, match=r"^reading run\.json in s3://bucket/run: .*404"):
            await store.get("run.json")
        assert await store.get("run.json") is None


async def test_a_404_to_a_question_without_an_answers_body_is_asked_for_its_reason(tmp_path: Path) -> None:
    for body, there in ((b"default backend - 404", None), (NO_SUCH_KEY, False)):
        with recording(saying(404, body)) as server:
            store = Store.open(Storage(url="s3://bucket/run", endpoint_url=server.url), Keys(KEYS, "Secret keys"))
            for ask in (store.exists("run.json"), store.download("run.json", tmp_path / "file")):
                if there is None:
                    with pytest.raises(StoreUnavailable, match=r"run\.json in s3://bucket/run: .*404"):
                        await ask
                else:
                    assert await ask is there


async def test_what_a_server_says_is_told_in_few_words() -> None:
    with recording(saying(403, b"x" * 100_000)) as server:
        store = Store.open(Storage(url="s3://bucket/run", endpoint_url=server.url), Keys(KEYS, "Secret keys"))
        with pytest.raises(StoreUnavailable) as refused:
            await store.get("run.json")
    assert "403" in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("url", ["az://container/run", "abfss://container@account.dfs.core.windows.net/run"])
async def test_a_server_for_azures_protocol_may_speak_plain_http(url: str) -> None:
    with recording(saying(200, b"{}")) as server:
        keys = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0", "AZURE_STORAGE_ENDPOINT": server.url}
        found = await Store.open(Storage(url=url), Keys(keys, "Secret keys")).get("run.json")
    assert found is not None and found.data == b"{}" and server.asked[0][0] == "/container/run/run.json"


async def test_conditional_writes_leave_nothing_but_their_objects(store: Store) -> None:
    now = await store.swap("a", b"1", None)
    await store.swap("a", b"2", now)
    assert [info.key for info in await store.list()] == ["a"]


async def test_a_file_of_many_parts_comes_back_as_it_was(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_PART", 5 << 20)  # the least that S3 takes
    data = os.urandom((13 << 20) + 17)
    (tmp_path / "up").write_bytes(data)
    await store.upload("big/file", tmp_path / "up")
    assert await store.download("big/file", tmp_path / "new folder" / "down")
    assert (tmp_path / "new folder" / "down").read_bytes() == data
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["down"]


async def test_an_empty_file_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    (tmp_path / "up").touch()
    await store.upload("empty", tmp_path / "up")
    assert await store.download("empty", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b""


async def test_a_failed_download_leaves_no_file(store: Store, tmp_path: Path) -> None:
    await store.put("file", b"x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        await store.download("file", tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.parametrize("place", ["/proc/nowhere/file", "/dev/null/file"])
async def test_a_place_that_cannot_be_written_is_blamed_and_not_the_storage(store: Store, place: str) -> None:
    await store.put("file", b"x")
    with pytest.raises(OSError, match=place):
        await store.download("file", Path(place))


@pytest.mark.parametrize("room", [True, False], ids=["for a part of it", "for nothing"])
async def test_a_full_disk_is_blamed_and_not_the_storage(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    def full(*_: object) -> int:
        if room:
            return 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    await store.put("file", b"some")
    monkeypatch.setattr(objects.os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device: .*down"):
        await store.download("file", tmp_path / "down")
    assert not list(tmp_path.glob(".*partial"))


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(StoreUnavailable, match="/dev/null/run"):
        Store.open(Storage(url="file:///dev/null/run"))


@pytest.mark.heavy
async def test_a_missing_bucket_is_no_empty_run(versitygw: tuple[str, Path], s3: Any) -> None:
    storage = Storage(url="s3://no-such-bucket/run", endpoint_url=versitygw[0], region="us-east-1")
    store = Store.open(storage, s3.keys)
    with pytest.raises(StoreUnavailable, match="no-such-bucket"):
        await store.list()
    with pytest.raises(StoreUnavailable, match="create it first"):
        await store.create("a", b"1")


@pytest.mark.heavy
async def test_wrong_credentials_are_said_and_not_shown(s3: Any) -> None:
    environ = {**s3.environ, "AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}
    store = Store.open(s3.storage, Keys(environ, "Secret keys"))
    with pytest.raises(StoreUnavailable) as refused:
        await store.get("a")
    assert "a-wrong-secret" not in str(refused.value) and "Debug source" not in str(refused.value)
