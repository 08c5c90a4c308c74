"""Redis scripts, run by a real Lua 5.1.

One Lua runtime and one compiled function per script serve all simulations of the Python process. A script
runs whole: it never gives way.
"""

import json
from functools import lru_cache
from typing import Any, Protocol

import redis
from lupa import lua51

from simulation.commands import Status

_PRELUDE = """
local execute, decode, encode = ...
local function call(...)
  for i = 1, select('#', ...) do
    local kind = type((select(i, ...)))
    if kind ~= 'string' and kind ~= 'number' then
      error('ERR Lua redis lib command arguments must be strings or integers')
    end
  end
  local arguments = {...}
  for i, argument in ipairs(arguments) do
    if type(argument) == 'number' then arguments[i] = string.format('%.17g', argument) end
  end
  return execute(unpack(arguments))
end
redis = {
  call = function(...)
    local reply = call(...)
    if type(reply) == 'table' and reply.err then error(reply, 0) end
    return reply
  end,
  pcall = call,
  error_reply = function(text) return {err = text} end,
  status_reply = function(text) return {ok = text} end,
  log = function() end,
  LOG_DEBUG = 0, LOG_VERBOSE = 1, LOG_NOTICE = 2, LOG_WARNING = 3,
}
cjson = {decode = decode, encode = encode}
os, io, require, python, dofile, loadfile, package = nil
setmetatable(_G, {
  __index = function(_, name) error('nonexistent global variable ' .. name, 2) end,
  __newindex = function(_, name) error('a script may not make a global variable: ' .. name, 2) end,
})
"""


class Server(Protocol):
    """Where commands of scripts go."""

    def execute(self, name: str, *arguments: str) -> Any: ...


class _Bridge:
    """The runtime, and the server of the script that runs now."""

    def __init__(self) -> None:
        self._lua: Any = lua51.LuaRuntime(unpack_returned_tuples=True, register_eval=False)
        self._table = self._lua.table_from
        self._server: Server | None = None
        self._run_prelude = self._lua.eval(f"function(...) {_PRELUDE} end")
        self._run_prelude(self._execute, self._decode, self._encode)

    def compile(self, source: str) -> Any:
        """A function of KEYS and ARGV."""
        return self._lua.execute(f"return function(KEYS, ARGV) {source}\nend")

    def run(self, function: Any, server: Server, keys: list[str], arguments: list[str]) -> Any:
        """Run a compiled script and convert its reply."""
        self._server = server
        try:
            return self._reply(function(self._table(keys), self._table(arguments)))
        except lua51.LuaError as error:
            raise redis.ResponseError(str(error)) from None
        finally:
            self._server = None

    def _execute(self, name: str, *arguments: str) -> Any:
        assert self._server is not None
        try:
            return self._to_lua(self._server.execute(name, *arguments))
        except redis.ResponseError as error:
            return self._table({"err": str(error)})

    def _to_lua(self, reply: Any) -> Any:
        if reply is None:
            return False
        if isinstance(reply, Status):
            return self._table({"ok": str(reply)})
        if isinstance(reply, list):
            return self._table([self._to_lua(item) for item in reply])
        return reply

    def _reply(self, value: Any) -> Any:
        """A script's value as the protocol sends it: numbers cut to integers, arrays up to the first nil."""
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, float):
            return int(value)
        if lua51.lua_type(value) != "table":
            return value
        if value["err"] is not None:
            raise redis.ResponseError(str(value["err"]))
        if value["ok"] is not None:
            return Status(value["ok"])
        items: list[Any] = []
        while (item := value[len(items) + 1]) is not None:
            items.append(self._reply(item))
        return items

    def _decode(self, text: str) -> Any:
        return self._from_json(json.loads(text))

    def _from_json(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self._table({key: self._from_json(item) for key, item in value.items()})
        if isinstance(value, list):
            return self._table([self._from_json(item) for item in value])
        return value

    def _encode(self, value: Any) -> str:
        return json.dumps(self._to_json(value), separators=(",", ":"))

    def _to_json(self, value: Any) -> Any:
        if lua51.lua_type(value) != "table":
            return value
        keys = list(value)
        if keys == list(range(1, len(keys) + 1)) and keys:
            return [self._to_json(value[key]) for key in keys]
        return {str(key): self._to_json(value[key]) for key in keys}


@lru_cache(maxsize=1)
def _bridge() -> _Bridge:
    return _Bridge()


@lru_cache(maxsize=1000)
def _compiled(source: str) -> Any:
    return _bridge().compile(source)


def run_script(source: str, server: Server, keys: list[str], arguments: list[str]) -> Any:
    """Run a script's source on a server's data.

    Raises:
        redis.ResponseError: a command in it failed, or the script did.
    """
    return _bridge().run(_compiled(source), server, keys, arguments)
