"""What commands in a sandbox cannot reach."""

import asyncio
import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from dagger_operator.local.processes import MARK
from dagger_operator.sandbox.interface import SandboxError, SandboxRequest
from dagger_operator.sandbox.process import ProcessSandboxes
from dagger_operator.sandbox.process_sandbox import ProcessSandbox


async def test_the_environment_is_clean(provider: ProcessSandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-worker")
    sandbox = await provider.create(SandboxRequest("env", env={"GIVEN": "a b'c"}), timeout=60)
    result = await sandbox.execute("env -0 | tr '\\0' '\\n' | sort", timeout=60, env={"ALSO": "1"})
    names = {line.split("=")[0] for line in result.output.splitlines()}
    assert names == {"PATH", "HOME", "LANG", "GIVEN", "ALSO", "PWD", "SHLVL", "_"}
    assert "GIVEN=a b'c\n" in result.output
    assert "secret-of-the-worker" not in (await sandbox.execute("cat /proc/*/environ /proc/*/cmdline", timeout=60)).output


async def test_what_holds_a_command_is_known_by_the_mark_of_its_worker(provider: ProcessSandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "the-worker")
    sandbox = await provider.create(SandboxRequest("marked"), timeout=60)
    command = asyncio.create_task(sandbox.execute("sleep 60; env", timeout=60))
    try:
        async with asyncio.timeout(30):
            while not [one for one in psutil.process_iter() if one.name() == "bwrap" and environment(one).get(MARK) == "the-worker"]:
                await asyncio.sleep(0.05)
    finally:
        command.cancel()
        await asyncio.gather(command, return_exceptions=True)
    assert MARK not in (await sandbox.execute("env", timeout=60)).output


def environment(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


KEYS = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
kept = ctypes.create_string_buffer(100)
found = libc.syscall(int(sys.argv[1]), 10, -3, b"user", b"a-token", 0)
for key in (found, int(sys.argv[2])):
    print(libc.syscall(int(sys.argv[1]), 11, key, kept, 100), kept.value)
"""


async def test_keys_of_the_workers_cannot_be_read(provider: ProcessSandboxes) -> None:
    add_key, keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    key = libc.syscall(add_key, b"user", b"a-token", b"secret", 6, -3)  # to the session's keyring
    if key < 0:
        pytest.skip(f"no key can be kept here: {os.strerror(ctypes.get_errno())}")
    try:
        here = subprocess.run([sys.executable, "-c", KEYS, str(keyctl), str(key)], capture_output=True, text=True, check=True)
        assert here.stdout == "6 b'secret'\n" * 2
        sandbox = await provider.create(SandboxRequest("keys", files={"keys.py": KEYS}), timeout=60)
        result = await sandbox.execute(f"python3 keys.py {keyctl} {key}", timeout=60)
    finally:
        libc.syscall(keyctl, 3, key)  # revoke
    assert result.output == "-1 b''\n" * 2


async def test_no_namespaces_can_be_made_whose_file_systems_are_memory(sandbox: ProcessSandbox) -> None:
    result = await sandbox.execute("unshare --user --map-root-user --mount sh -c 'mount -t tmpfs none /tmp && echo mounted'", timeout=60)
    assert result.returncode != 0 and "mounted" not in result.output
    # Threads and processes are made by the same calls.
    script = "import subprocess, threading; threading.Thread(target=subprocess.run, args=(['echo', 'made'],)).start()"
    assert (await sandbox.execute(f'python3 -c "{script}"', timeout=60)).output == "made\n"


HIDES = """
import ctypes
prctl = ctypes.CDLL(None).prctl
print(prctl(4, 0, 0, 0, 0), prctl(3, 0, 0, 0, 0), prctl(4, 1, 0, 0, 0), prctl(4, 7, 0, 0, 0))
"""


async def test_a_command_that_asks_to_be_hidden_is_told_that_it_is_and_is_not(provider: ProcessSandboxes) -> None:
    sandbox = await provider.create(SandboxRequest("hides", files={"hides.py": HIDES}), timeout=60)
    assert (await sandbox.execute("python3 hides.py", timeout=60)).output == "0 1 0 -1\n"


async def test_no_descriptor_is_inherited(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        result = await sandbox.execute("ls /proc/self/fd", timeout=60)
    assert result.output.split() == ["0", "1", "2", "3"]  # 3 is the folder that ls reads


async def test_files_of_the_machine_cannot_be_read(provider: ProcessSandboxes, sandbox: ProcessSandbox, tmp_path: Path) -> None:
    other = await provider.create(SandboxRequest("other", files={"secret": "of the other sandbox"}), timeout=60)
    (tmp_path / "secret").write_text("of the host")
    checkout = Path(__file__).parent
    await sandbox.execute(f"ln -s {tmp_path}/secret link", timeout=60)
    places = [
        tmp_path,
        checkout,
        Path.home(),
        Path(sys.prefix),
        Path("/root"),
        Path("/var/lib"),
        Path("/etc/shadow"),
        Path("/run"),
        Path("/sys"),
    ]
    for place in places:
        if not place.is_relative_to("/usr"):
            result = await sandbox.execute(f"ls -a {place}/. || cat {place}", timeout=60)
            assert result.returncode != 0, place
    result = await sandbox.execute("cat link; find / -xdev -name secret 2>/dev/null; cat /proc/1/root/etc/shadow", timeout=60)
    assert "of the" not in result.output.replace("No such file or directory", "") and "root:" not in result.output
    await other.close()


async def test_processes_of_the_machine_cannot_be_seen_or_signalled(sandbox: ProcessSandbox) -> None:
    result = await sandbox.execute(f"ls -d /proc/[0-9]* | wc -l; kill -0 {os.getpid()}", timeout=60)
    assert int(result.output.split()[0]) < 10 and result.returncode != 0


async def test_system_folders_and_rights_cannot_be_changed(sandbox: ProcessSandbox) -> None:
    for attempt in (
        "touch /usr/x",
        "touch /bin/x",
        "mount -t tmpfs none /mnt",
        "chroot /",
        "echo x > /proc/sys/kernel/hostname",
        "rm -rf /usr /etc",
    ):
        assert (await sandbox.execute(attempt, timeout=60)).returncode != 0, attempt
    result = await sandbox.execute("grep -E '^(CapEff|CapPrm|CapAmb|NoNewPrivs)' /proc/self/status | cut -f2 | sort -u", timeout=60)
    assert result.output.split() == ["0000000000000000", "1"]
    assert (await sandbox.execute("ulimit -f unlimited || ulimit -c unlimited && ulimit -n 100000", timeout=60)).returncode != 0


async def test_planted_links_lead_write_and_read_nowhere_outside(sandbox: ProcessSandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    tmp_path.chmod(0o755)
    await sandbox.execute(f"ln -s {tmp_path} folder; ln -s {secret} file; ln -s /proc/1/root{secret} through", timeout=60)
    assert await sandbox.read("folder/secret") is None
    assert await sandbox.read("file") is None
    assert await sandbox.read("through") is None
    assert await sandbox.read(f"../../../../../..{secret}") is None
    await sandbox.write({"file": "written"})
    assert await sandbox.read("file") == b"written"
    # Either lands in the sandbox's own /tmp or is refused; the machine's file has the same path.
    for path in ("folder/secret", f"../..{secret}", "through"):
        with suppress(SandboxError):
            await sandbox.write({path: "written"})
    with pytest.raises(SandboxError, match=r"WriteFailed.*Read-only"):
        await sandbox.write({"/usr/x": "written"})
    assert secret.read_text() == "untouched"


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """An HTTP server on the loopback address; its answer is long and comes slowly."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(4):
            await response.write(body or b"hello ")
            await asyncio.sleep(0.05)
        return response

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], b'x' * int(sys.argv[2]) or None, 20).read().decode()[:60])
"""


async def test_there_is_no_network(sandbox: ProcessSandbox, server: str) -> None:
    await sandbox.write({"fetch.py": FETCH})
    for place in (server, "10.0.0.1:80", "[::1]:80"):
        result = await sandbox.execute(f"python3 fetch.py http://{place}/ 0", timeout=60)
        assert result.returncode != 0 and "hello" not in result.output


async def test_only_the_one_address_given_can_be_reached(provider: ProcessSandboxes, server: str) -> None:
    port = server.split(":")[1]
    sandbox = await provider.create(SandboxRequest("net", files={"fetch.py": FETCH}, network_to=server), timeout=60)
    result = await sandbox.execute(f"python3 fetch.py http://127.0.0.1:{port}/ 0", timeout=60)
    assert result.output == "hello hello hello hello \n"
    result = await sandbox.execute(
        f"for i in 1 2 3 4 5 6; do python3 fetch.py http://127.0.0.1:{port}/ 300000 & done; wait; ls /proc/self/fd | wc -l", timeout=120
    )
    assert result.output.count("x" * 60) == 6 and result.output.endswith("\n4\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        result = await sandbox.execute(f"python3 fetch.py http://127.0.0.1:{other.getsockname()[1]}/ 0", timeout=60)
        assert result.returncode != 0 and "refused" in result.output
    result = await sandbox.execute(f"(sleep 1; exec python3 fetch.py http://127.0.0.1:{port}/ 9000000) & sleep 1.3; exit 5", timeout=60)
    assert result.returncode == 5


async def test_a_dead_address_is_refused_inside_not_a_broken_sandbox(provider: ProcessSandboxes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    sandbox = await provider.create(SandboxRequest("dead", files={"fetch.py": FETCH}, network_to=address), timeout=60)
    result = await sandbox.execute(f"python3 fetch.py http://{address}/ 0", timeout=60)
    assert result.returncode == 1 and "closed connection" in result.output
    with pytest.raises(SandboxError, match=r"InvalidAddress.*host:port"):
        await provider.create(SandboxRequest("bad", network_to="nowhere"), timeout=60)
