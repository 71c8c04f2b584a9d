"""Ownership of a prefix: it belongs to one run, permanently."""

from pydantic import ValidationError

from dagger_operator.api import DAggerRun
from dagger_operator.store import layout
from dagger_operator.store.objects import SMALL_BYTES, DamagedObject, Reads, Store
from dagger_operator.store.records import Record
from dagger_operator.store.stage import StageFailure


class Owner(Record):
    """The run that a prefix belongs to."""

    name: str
    namespace: str
    uid: str | None
    """Distinguishes a run from an earlier one of the same name; None on a runtime without UIDs."""


def owner_of(run: DAggerRun) -> Owner:
    """Return the owner that `run` records in its prefix."""
    return Owner(name=run.metadata.name, namespace=run.metadata.namespace, uid=run.metadata.uid)


async def take_prefix(store: Store, run: DAggerRun) -> Owner:
    """Claim the prefix for this run, or verify that it owns it. Another run's raises `StageFailure("PrefixTaken")`, permanent."""
    me = owner_of(run)
    if await store.create(layout.RUN, me.model_dump_json(indent=1).encode()):
        return me
    owner = await read_owner(store)
    if owner != me:
        whose = f"run {owner.namespace}/{owner.name}" + (f" (uid {owner.uid})" if owner.uid else "") if owner else "nobody any more"
        message = (
            f"{store.url} belongs to {whose}: set storage.url to a prefix of its own, or, if that run's data is no longer wanted, "
            "delete everything below this prefix"
        )
        raise StageFailure("PrefixTaken", message)
    return me


async def read_owner(store: Reads) -> Owner | None:
    """Return the run that owns the prefix, or None if no run does."""
    found = await store.get(layout.RUN, SMALL_BYTES)
    if found is None:
        return None
    try:
        return Owner.model_validate_json(found.data)
    except ValidationError as error:
        raise DamagedObject(layout.RUN, "does not say whose prefix this is", "write the owner's name, namespace and uid into it") from error
