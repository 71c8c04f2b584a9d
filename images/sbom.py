"""Writes the contents of this image to `sbom.cdx.json` beside itself: CycloneDX 1.6, from dpkg's and Python's own records.

    python sbom.py NAME
    python sbom.py NAME GO_VERSION    for an image with a program that uses only Go's standard library; such as go1.26.6

No time and no serial number: the same packages give the same file.
"""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path


def main(name: str, go: str | None = None) -> None:
    held = [go_library(go)] if go else [*debian_packages(), *python_packages()]
    components = sorted(held, key=lambda one: one["purl"])
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": f"dagger-operator/{name}"}},
        "components": components,
    }
    Path(__file__).with_name("sbom.cdx.json").write_text(json.dumps(document, indent=1) + "\n")


def debian_packages() -> list[dict[str, str]]:
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version} ${Architecture}\n"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [component(name, version, f"pkg:deb/debian/{name}@{version}?arch={arch}&distro=bookworm") for name, version, arch in rows]


def python_packages() -> list[dict[str, str]]:
    found = {(one.name.lower().replace("_", "-").replace(".", "-"), one.version) for one in distributions()}
    return [component(name, version, f"pkg:pypi/{name}@{version}") for name, version in found]


def go_library(version: str) -> dict[str, str]:
    number = version.removeprefix("go")
    return component("stdlib", number, f"pkg:golang/stdlib@{number}")


def component(name: str, version: str, purl: str) -> dict[str, str]:
    # Unescaped, a plus sign in a version means a space.
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl.replace("+", "%2B")}


if __name__ == "__main__":
    main(*sys.argv[1:])
