"""The built-in scaffold's prompts: the library's SWE-bench prompts, or the resource's own."""

import re
from dataclasses import dataclass
from typing import Any

from dagger_operator.api import Protocol, Scaffold
from dagger_operator.rollout.library import library
from dagger_operator.store.stage import StageFailure

FENCED_BLOCK = r"```mswea_bash_command\s*\n(.*?)\n```"
"""The library's own action regex for the text protocol."""


@dataclass(frozen=True)
class Templates:
    """jinja2 templates and the action regex, all of them set."""

    system: str
    instance: str
    observation: str
    format_error: str
    action_regex: str


def templates(scaffold: Scaffold) -> Templates:
    """Return a scaffold's templates and action regex. Raises `StageFailure` if they cannot work for any task."""
    config = library().config(scaffold.protocol)
    chosen = Templates(
        system=_or(scaffold.system_template, config["agent"]["system_template"]),
        instance=_or(scaffold.instance_template, config["agent"]["instance_template"]),
        observation=_or(scaffold.observation_template, config["model"]["observation_template"]),
        format_error=_or(scaffold.format_error_template, config["model"]["format_error_template"]),
        action_regex=_or(scaffold.action_regex, FENCED_BLOCK),
    )
    _check(chosen, scaffold.protocol)
    return chosen


def _or(given: str | None, default: str) -> str:
    return default if given is None else given


def _check(chosen: Templates, protocol: Protocol) -> None:
    """Render every template once as a rollout would, so that a mistake fails the stage at once rather than every rollout."""
    from jinja2 import StrictUndefined, Template, TemplateError

    output = {"output": "text", "returncode": 0, "exception_info": ""}
    trials: dict[str, tuple[str, dict[str, Any]]] = {
        "systemTemplate": (chosen.system, {"task": "text"}),
        "instanceTemplate": (chosen.instance, {"task": "text"}),
        "observationTemplate": (chosen.observation, {"output": output}),
        "formatErrorTemplate": (
            chosen.format_error,
            {"error": "text", "actions": [], "finish_reason": "stop", "has_tool_calls": False},
        ),
    }
    for field, (template, variables) in trials.items():
        try:
            Template(template, undefined=StrictUndefined).render(**variables)
        except TemplateError as error:
            known = ", ".join(sorted(variables))
            raise StageFailure("InvalidScaffold", f"spec.scaffold.{field} cannot be rendered: {error}; it may use: {known}") from error
    if protocol is not Protocol.TEXT:
        return
    field = f"spec.scaffold.actionRegex {chosen.action_regex!r}"
    try:
        groups = re.compile(chosen.action_regex, re.DOTALL).groups
    except re.error as error:
        raise StageFailure("InvalidScaffold", f"{field} is no regular expression: {error}") from error
    if groups > 1:
        raise StageFailure("InvalidScaffold", f"{field} has {groups} groups: give it one, the command; write (?:...) for the others")
