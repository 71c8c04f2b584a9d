"""What tests of the gateway ask, and how policies answer."""

from aiohttp import web

from dagger_operator.api import Mixing, Schedule, ScheduleType

STATE = [{"role": "user", "content": "task"}]


def beta(value):
    return Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=value))


def fail(status, text="no"):
    async def behave(stub, http, request):
        return web.Response(status=status, text=text)

    return behave
