"""Checks whether a teacher's token ids are the student's."""

import asyncio

from dagger_operator.serving.asking import Answer
from dagger_operator.store import layout
from dagger_operator.store.objects import Store


async def token_flaw(answer: Answer, store: Store, student: str) -> str:
    """Return why this answer of the teacher cannot be a soft target of that student; empty if it can."""
    if answer.logprobs is None:
        return "it does not tell the log-probabilities of its tokens by token ids (`return_tokens_as_token_ids`), as vLLM does"
    found = await store.get(layout.policy(student) + "tokenizer.json")
    if found is None:
        return f"the student {student} has no tokenizer.json to hold its token ids against"
    read = await asyncio.to_thread(_decoded, found.data, answer.logprobs.token_ids.tolist())
    said = str(answer.message.get("content") or "").strip()
    if not said or said in read:
        return ""
    return f"its token ids for {said[:80]!r} read {read.strip()[:80]!r} under the student's tokenizer: it has another one"


def _decoded(tokenizer: bytes, ids: list[int]) -> str:
    from tokenizers import Tokenizer  # only needed with log-probabilities

    return str(Tokenizer.from_buffer(tokenizer).decode(ids, skip_special_tokens=True))
