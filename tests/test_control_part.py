"""The control part stands alone: it imports without what only stages on GPUs need, and importing it does nothing else."""

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys

HEAVY = {"torch", "vllm", "transformers", "deepspeed", "peft", "safetensors", "minisweagent", "swebench", "datasets", "numpy"}
HEAVY |= {"accelerate", "huggingface_hub"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            raise ImportError(f"{name} is no dependency of the control part")

sys.meta_path.insert(0, Refuse())
import dagger_operator
for room in pkgutil.iter_modules(dagger_operator.__path__):
    package = importlib.import_module(f"dagger_operator.{room.name}")
    for module in pkgutil.iter_modules(package.__path__):
        if room.name != "training" or module.name == "__main__":  # the launcher; its ranks run beside torch only
            importlib.import_module(f"dagger_operator.{room.name}.{module.name}")
"""


def test_every_room_imports_without_torch_and_says_nothing() -> None:
    ended = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
