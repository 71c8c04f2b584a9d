"""mini-swe-agent as a library, without its import side effects: a banner, a configuration folder, a dotenv file."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dagger_operator.api import Protocol


@dataclass(frozen=True)
class Library:
    """The parts of mini-swe-agent that the scaffold uses; no other module imports it."""

    agent: Any
    """`DefaultAgent(model, environment, **config).run(task)`"""
    submitted: type[Exception]
    format_error: type[Exception]
    parse_text: Callable[..., list[dict[str, Any]]]
    parse_tool_calls: Callable[..., list[dict[str, Any]]]
    observe_text: Callable[..., list[dict[str, Any]]]
    observe_tool_calls: Callable[..., list[dict[str, Any]]]
    bash_tool: dict[str, Any]
    """Schema of the only tool of the ToolCall protocol."""
    configs: Path
    """Folder of the library's own benchmark configurations."""

    def config(self, protocol: Protocol) -> dict[str, Any]:
        """Return the library's SWE-bench configuration for a protocol: the prompts of the public leaderboard."""
        name = "swebench_backticks.yaml" if protocol is Protocol.TEXT else "swebench.yaml"
        loaded: dict[str, Any] = yaml.safe_load((self.configs / name).read_text(encoding="utf-8"))
        return loaded

    def environment(self, protocol: Protocol) -> dict[str, str]:
        """Return that configuration's environment variables for every command: no pagers, no progress bars. BASH_ENV is left out: it
        concerns the images of some tasks (`Task.env`), and the library sets it for one protocol only."""
        return {name: value for name, value in self.config(protocol)["environment"]["env"].items() if name != "BASH_ENV"}


@cache
def library() -> Library:
    """Import mini-swe-agent silently (takes half a second); later calls are free."""
    os.environ["MSWEA_SILENT_STARTUP"] = "1"
    # The library creates this folder and reads the `.env` in it: ours exists already and has none.
    os.environ["MSWEA_GLOBAL_CONFIG_DIR"] = str(Path(__file__).parent)
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.config import builtin_config_dir
    from minisweagent.exceptions import FormatError, Submitted
    from minisweagent.models.utils.actions_text import format_observation_messages, parse_regex_actions
    from minisweagent.models.utils.actions_toolcall import BASH_TOOL, format_toolcall_observation_messages, parse_toolcall_actions

    logging.getLogger("minisweagent").handlers.clear()  # it prints with rich; what matters is in our own logs
    return Library(
        agent=DefaultAgent,
        submitted=Submitted,
        format_error=FormatError,
        parse_text=parse_regex_actions,
        parse_tool_calls=parse_toolcall_actions,
        observe_text=format_observation_messages,
        observe_tool_calls=format_toolcall_observation_messages,
        bash_tool=BASH_TOOL,
        configs=builtin_config_dir / "benchmarks",
    )
