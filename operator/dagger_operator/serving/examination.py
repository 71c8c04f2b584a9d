"""Checks of a policy before round 1: it is queried as the rollouts will query it, with the run's own sampling."""

import json
from difflib import get_close_matches

from dagger_operator.api import MaxTokensParameter, Protocol, Role, ScaffoldType, Serving, Student, Teacher
from dagger_operator.api.training import Loss
from dagger_operator.serving.agents import AgentStatus, said, wait_for
from dagger_operator.serving.asking import Answer, Asker, Json, Policy
from dagger_operator.serving.tokens import token_flaw
from dagger_operator.store.stage import Stage, StageFailure

ENDPOINT_PATIENCE_SECONDS = 120.0
"""How long to retry an endpoint that is unreachable, overloaded or failing."""
_SERVED_REQUEST_SECONDS = 300.0
_TOOL_TRIES = 3
_WITHOUT_THOUGHTS = """student.serving.extraArgs ["--default-chat-template-kwargs", '{"enable_thinking": false}']"""
_QUESTION: list[Json] = [{"role": "user", "content": "Which command lists the files of a folder? Answer with one short line."}]
_TOOL_QUESTION: list[Json] = [{"role": "user", "content": "Use the bash tool to run the command `pwd`."}]
_TOOL: Json = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Runs a command in bash.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}


class Examination:
    """The checks of one policy."""

    def __init__(self, stage: Stage, role: Role, version: str, student: str) -> None:
        """`student`: version of the student that will be trained."""
        self._stage, self._role, self._version, self._student = stage, role, version, student
        self._top_logprobs = stage.run.spec.labels.top_logprobs if role is Role.TEACHER else 0
        self._spec: Student | Teacher = stage.run.spec.student if role is Role.STUDENT else stage.run.spec.teacher
        self._serving: Serving | None = self._spec.served if isinstance(self._spec, Student) else self._spec.serving
        self._checks: dict[str, str] = {}
        self.context = 0
        """Context length in tokens; 0 if unknown."""

    async def run(self) -> dict[str, str]:
        """Run all checks and return the findings by name of the check."""
        policies = await self._replicas()
        async with Asker(policies[0]) as asker:
            await self._known(asker)
            answer = await self._answers(asker)
            self._ends_by_itself(asker, answer)
            self._thinks(answer)
            if self._top_logprobs:
                await self._tells_logprobs(asker, answer)
            await self._streams(asker)
            if self._stage.run.spec.scaffold.protocol is Protocol.TOOL_CALL:
                await self._calls_tools(asker)
        if len(policies) > 1:
            await self._agree(policies)
        return self._checks

    async def _replicas(self) -> list[Policy]:
        urls = self._stage.environ.get(f"DAGGER_{self._role.upper()}_URL", "")
        if not urls:
            name = f"DAGGER_{self._role.upper()}_URL"
            raise StageFailure("IncompleteEnvironment", f"{name} is not set: stages are started by `daggerctl run` or the operator")
        if self._serving is None:
            return [self._policy(urls.strip().rstrip("/"))]
        statuses = await self._served(urls, self._serving)
        return [self._policy(f"{status.url}/v1") for status in statuses]

    def _policy(self, url: str) -> Policy:
        endpoint = self._spec.endpoint
        return Policy(
            role=self._role,
            url=url,
            token=self._stage.token(self._role),
            model=(endpoint.model or self._spec.model) if endpoint else self._version,
            sampling=self._spec.sampling,
            served=endpoint is None,
            request_seconds=endpoint.timeout_seconds if endpoint else _SERVED_REQUEST_SECONDS,
            patience_seconds=ENDPOINT_PATIENCE_SECONDS if endpoint else 60.0,
            max_tokens_parameter=endpoint.max_tokens_parameter if endpoint else MaxTokensParameter.MAX_TOKENS,
            top_logprobs=self._top_logprobs,
        )

    async def _served(self, urls: str, serving: Serving) -> tuple[AgentStatus, ...]:
        """Return every replica, once all of them serve the expected version with the same weights."""
        agents = ",".join(url.removesuffix("/v1") for url in (part.strip().rstrip("/") for part in urls.split(",")))
        deadline, version = serving.startup_deadline_seconds, self._version
        done, found = await wait_for(agents, serving.replicas, seconds=deadline, done=lambda status: status.serves(version))
        if not done:
            raise StageFailure(
                f"{self._role.capitalize()}NotServed",
                f"{version} is not served by every replica after {deadline} s: {said(found, serving.replicas)}. Look at the logs of the "
                f"{self._role}'s pods; raise {self._role}.serving.startupDeadlineSeconds where loading only takes longer",
                permanent=False,
            )
        if len({status.weights for status in found}) > 1:
            held = ", ".join(f"{status.url} {status.weights}" for status in found)
            raise StageFailure(
                f"{self._role.capitalize()}ReplicasDisagree",
                f"replicas of {version} hold different weights: {held}. Delete its pods, so that they load it again",
                permanent=False,
            )
        self._checks["replicas"] = f"{len(found)} serve {version} with weights {found[0].weights}"
        return found

    async def _known(self, asker: Asker) -> None:
        """Check that the model is listed, if any is, and that its context has room for a turn."""
        listed = await asker.models()
        model = asker.policy.model
        names = [str(entry.get("id")) for entry in listed or []]
        entry = next((entry for entry in listed or [] if entry.get("id") == model), {})
        self._checks["model"] = f"{model} is listed" if entry else f"{model} is not listed" if listed else "no list of models is offered"
        if names and not entry and (close := get_close_matches(model, names, n=1)):
            self._checks["model"] += f"; the closest that is: {close[0]}"
        reported = entry.get("max_model_len")
        self.context = reported if isinstance(reported, int) else 0
        self._checks["context"] = f"{self.context} tokens" if self.context else "not reported"
        turn = self._spec.sampling.max_tokens
        if 0 < self.context <= turn:
            asker.fail(
                "ContextTooShort",
                f"its context of {self.context} tokens leaves no room for a state beside a turn of {turn}: "
                f"lower {self._role}.sampling.maxTokens, or raise {self._role}.serving.maxModelLen",
            )

    async def _answers(self, asker: Asker) -> Answer:
        try:
            answer = await asker.chat(_QUESTION)
        except StageFailure as failure:
            if failure.reason.endswith("Unknown") and "closest" in self._checks["model"]:
                raise StageFailure(failure.reason, f"{failure.message}; {self._checks['model']}", permanent=failure.permanent) from None
            raise
        tokens = answer.usage.get("prompt_tokens")
        counted = f", {tokens} tokens of prompt and {answer.usage.get('completion_tokens')} of answer" if tokens else ", no token counts"
        self._checks["answers"] = f"in {answer.seconds:.2f} s{counted}"
        return answer

    def _ends_by_itself(self, asker: Asker, answer: Answer) -> None:
        limit = self._spec.sampling.max_tokens
        if answer.finish_reason in ("stop", "tool_calls"):
            self._checks["stop"] = f"ends by itself ({answer.finish_reason})"
        elif answer.finish_reason == "length":
            if self._role is Role.TEACHER:
                asker.fail(
                    "Truncates",
                    f"one short line was cut off after {limit} tokens (finish_reason length), so labels would be too: raise "
                    "teacher.sampling.maxTokens, or look at the endpoint's own limit and the model's stop tokens",
                )
            self._checks["stop"] = f"warning: does not end by itself within {limit} tokens; an untrained student may not"
        else:
            asker.fail("Garbled", f"finish_reason is {answer.finish_reason!r}, which is neither stop, length nor tool_calls")

    def _thinks(self, answer: Answer) -> None:
        """Warn about a student to be trained that thinks: its labels contain thoughts only if the teacher thinks too."""
        if self._role is Role.STUDENT and self._serving is not None and answer.thinks:
            self._checks["thinking"] = (
                f"warning: it thinks before it answers, and labels teach that only where the teacher does: write {_WITHOUT_THOUGHTS}"
            )

    async def _tells_logprobs(self, asker: Asker, answer: Answer) -> None:
        flaw = await token_flaw(answer, self._stage.store, self._student)
        if flaw and self._stage.run.spec.training.loss is Loss.FORWARD_KL:
            asker.fail(
                "TellsNoSoftTargets",
                f"{flaw}. ForwardKL needs a teacher with the student's tokenizer behind vLLM: write training.loss CrossEntropy, or another "
                "teacher",
            )
        told = f"{self._top_logprobs} at each token, which are the student's"
        self._checks["logprobs"] = f"warning: {flaw}; labels are hard targets" if flaw else told

    async def _streams(self, asker: Asker) -> None:
        wrong = await asker.streamed(_QUESTION)
        if wrong and self._stage.run.spec.scaffold.type is ScaffoldType.COMMAND:
            asker.fail("DoesNotStream", f"{wrong}: a Command scaffold may ask for streams; use an endpoint that has them")
        self._checks["streaming"] = f"warning: {wrong}; this scaffold does not need it" if wrong else "works"

    async def _calls_tools(self, asker: Asker) -> None:
        """Check that a tool is called with readable arguments, and that its result is accepted."""
        wrong = ""
        for _ in range(_TOOL_TRIES):
            answer = await asker.chat(_TOOL_QUESTION, tools=[_TOOL])
            wrong = _tool_call_flaw(answer.message)
            if wrong:
                continue
            calls = answer.message["tool_calls"]
            turn = {"role": "assistant", "content": answer.message.get("content") or "", "tool_calls": calls}
            results = [{"role": "tool", "tool_call_id": call["id"], "content": "/testbed"} for call in calls]
            await asker.chat([*_TOOL_QUESTION, turn, *results], tools=[_TOOL])
            self._checks["tools"] = "calls a tool and takes its result"
            return
        if self._role is Role.TEACHER:
            parser = "teacher.serving.toolCallParser" if self._serving else "whether the endpoint supports tools"
            asker.fail(
                "CallsNoTools", f"asked {_TOOL_TRIES} times to call a tool: {wrong}. Look at {parser}, or use scaffold.protocol Text"
            )
        self._checks["tools"] = f"warning: {wrong}; an untrained student may not"

    async def _agree(self, policies: list[Policy]) -> None:
        """Compare the replicas' answers: with the same weights, they may still differ on different hardware."""
        answers = set()
        for policy in policies:
            async with Asker(policy) as asker:
                answers.add(json.dumps((await asker.chat(_QUESTION, temperature=0, top_p=1, max_tokens=32)).message.get("content")))
        same = len(answers) == 1
        self._checks["agreement"] = "same greedy answer" if same else "warning: greedy answers differ although weights are the same"


def _tool_call_flaw(message: Json) -> str:
    """Return what is wrong with the first tool call of a message; empty if it can be executed."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return "it answered without a tool call"
    try:
        function = calls[0]["function"]
        arguments = json.loads(function["arguments"])
        if function["name"] != "bash" or not isinstance(arguments["command"], str) or not calls[0]["id"]:
            return "it called something else than the tool that it was given"
    except (KeyError, TypeError, ValueError):
        return "its tool call cannot be read"
    return ""
