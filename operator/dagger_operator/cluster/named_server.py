"""Reads from a storage server that a run names, by a process that has to survive whatever the server answers.

obstore reads the whole body of an error response into memory, several times over, and follows any redirect. Here it only signs requests; at
most a bounded part of a response is read, and of an error only its status and code are reported.
"""

import asyncio
import re
import ssl

import aiohttp
from yarl import URL

from dagger_operator.store.credentials import own_identity
from dagger_operator.store.objects import ABSENT, Object, Store, StoreUnavailable, oversized

_PAUSES = (0.2, 1.0)
"""Seconds between attempts, for errors that may pass. A later reconcile of the run is one more attempt."""
_PASSING = frozenset({429, 500, 502, 503, 504})
_SECONDS = 30.0
"""For one attempt, however slowly the server responds."""
_SAID_BYTES = 4096
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


def session() -> aiohttp.ClientSession:
    """Return a session that trusts this machine's CAs and `AWS_CA_BUNDLE`. Raises `StoreUnavailable` if that cannot be read."""
    trust = ssl.create_default_context()
    if bundle := own_identity().environ.get("AWS_CA_BUNDLE"):
        try:
            trust.load_verify_locations(bundle)
        except OSError as error:
            raise StoreUnavailable(
                f"AWS_CA_BUNDLE {bundle!r} of the operator cannot be read: {error}: name a file of certificates"
            ) from None
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=trust, limit=0, limit_per_host=16),  # a limit over all would let hanging hosts block the others
        timeout=aiohttp.ClientTimeout(total=_SECONDS, sock_connect=10.0),
        headers={"Accept-Encoding": "identity", "User-Agent": "dagger-operator"},
        auto_decompress=False,
        trust_env=True,
    )


class NamedServer:
    """`Reads` of a store whose server is not trusted."""

    def __init__(self, store: Store, http: aiohttp.ClientSession) -> None:
        self._store, self._http = store, http

    async def get(self, key: str, most: int) -> Object | None:
        """See `Store.get`."""
        url = URL(await self._store.signed(key), encoded=True)
        for pause in (*_PAUSES, None):
            try:
                async with self._http.get(url, allow_redirects=False) as answer:
                    if answer.status == 200:
                        return Object(await _bounded(answer, key, most), answer.headers.get("ETag", ""))
                    said = await _said(answer)
                    if answer.status == 404 and ABSENT.search(said):
                        return None
                    code = _CODE.search(said)
                    problem = f"the server answers {answer.status} {code[1] if code else ''}".rstrip()
                    passes = answer.status in _PASSING
            except (aiohttp.ClientError, TimeoutError) as error:
                # Some of the other errors have the signed URL in their text.
                problem = str(error) if isinstance(error, aiohttp.ClientConnectorError) else type(error).__name__
                passes = True
            if pause is None or not passes:
                break
            await asyncio.sleep(pause)
        raise StoreUnavailable(f"reading {key} in {self._store.url}: {problem}")


async def _said(answer: aiohttp.ClientResponse) -> str:
    """Return the start of the body, in however many parts it arrives."""
    try:
        said = await answer.content.readexactly(_SAID_BYTES)
    except asyncio.IncompleteReadError as whole:
        said = whole.partial
    return said.decode(errors="replace")


async def _bounded(answer: aiohttp.ClientResponse, key: str, most: int) -> bytes:
    if (answer.content_length or 0) > most:
        raise oversized(key, answer.content_length or 0, most)
    data = bytearray()
    async for part in answer.content.iter_any():
        data += part
        if len(data) > most:  # a server may send more than it announced
            raise oversized(key, len(data), most)
    return bytes(data)
