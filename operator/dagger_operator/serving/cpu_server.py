"""vLLM's server on the CPU (`python -m dagger_operator.serving.cpu_server`, arguments of vLLM's server), started in two thirds of the time.

- vLLM's engine is a process that imports the program's main module once more: here this one, which is small, not all of vLLM's API.
- What a model's class can do vLLM asks a third process, which imports everything again, unless a file in its cache says it. The image for
  the CPU brings such files; they are copied, as those of other classes are written beside them.

vLLM's package for the CPU has no `vllm serve`; where its server is, is that of the locked version.
Imports vLLM alone, and only where it is the main module.
"""

import shutil
from importlib import import_module
from pathlib import Path

KNOWN = Path("/opt/dagger/vllm")
"""Cache of the image, made by `images/Dockerfile`; elsewhere there is none."""


def main() -> None:
    """Serve until asked to end."""
    copy_known()
    import_module("vllm.entrypoints.launchers.api_server.entry").main()


def copy_known() -> None:
    """Copy what the image knows of models to where vLLM looks."""
    if KNOWN.exists():
        shutil.copytree(KNOWN, import_module("vllm.envs").VLLM_CACHE_ROOT, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
