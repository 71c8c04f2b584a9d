"""Uploads the quickstart's tasks and student below a run's storage prefix, where a cluster's pods find them.

    python examples/quickstart/inputs.py s3://dagger/quickstart --endpoint-url http://s3.example:7070

Credentials come from the environment, for example AWS_ACCESS_KEY_ID. Existing objects are kept: it can be run again.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dagger_operator.api import Storage
from dagger_operator.store.objects import Store
from run import HELD_OUT, TRAIN, make_inputs

PREFIX = "inputs"
"""Folder below the storage prefix: `inputs/tasks.jsonl` and `inputs/student/`."""


async def upload(files: Mapping[str, Path], store: Store) -> None:
    for key, path in files.items():
        await store.create(key, path.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url", help="storage.url of the run")
    parser.add_argument("--endpoint-url", help="its storage.endpointUrl")
    parser.add_argument("--region", help="its storage.region")
    options = parser.parse_args()
    store = Store.open(Storage(url=options.url, endpoint_url=options.endpoint_url, region=options.region))
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), seed=1, train=TRAIN, held_out=HELD_OUT)
        files = {f"{PREFIX}/{path.relative_to(folder)}": path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        asyncio.run(upload(files, store))
    print("\n".join(f"{options.url}/{key}" for key in files))


if __name__ == "__main__":
    main()
