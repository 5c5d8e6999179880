"""An interpreter of pickles in which nothing can be imported or called. Knows nothing of arrays.

A pickle is a program that names functions and calls them. Here a name is looked up in a table of stand-ins
and never imported; a name outside of the table ends the reading, and the refusal says which it was. Steps
follow the table of CPython's `pickletools.py`, protocols 2 to 5.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_HIGHEST_PROTOCOL = 5
_STOP, _FLOAT = 0x2E, 0x47
_MARK = object()


class PickleRefused(ValueError):
    """The pickle asks for something that is no array, number, text or known container."""


class PickleDamaged(PickleRefused):
    """The pickle is cut short or malformed."""


@dataclass(slots=True, eq=False)
class Record:
    """An object of a known class as a plain mapping of its state.

    Attributes:
        kind: "module.name" of the class the pickle names.
        state: what the pickle sets on it.
    """

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


class StandIn:
    """A value between its making and the setting of its state."""

    def complete(self, state: tuple[Any, ...]) -> object:
        """The value itself. Raises PickleRefused if the state is not one of its kind."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Name:
    """A name that a pickle may refer to.

    Attributes:
        text: "module.name".
        build: makes its value from the arguments of a call; None if it may not be called.
        is_record: objects of it become `Record`s.
    """

    text: str
    build: Callable[[tuple[Any, ...]], Any] | None = None
    is_record: bool = False


class Machine:
    """The interpreter: a stack, a memo, and one method per kind of step."""

    def __init__(
        self,
        data: bytes,
        names: Mapping[str, Name],
        *,
        at: int = 0,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._data = data
        self._names = names
        self._persistent = persistent
        self.at = at
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """Interprets up to STOP and returns the top of the stack."""
        try:
            while (step := self._byte()) != _STOP:
                self._step(step)
            return self._stack.pop()
        except (IndexError, struct.error):
            raise PickleDamaged("it is cut short or malformed") from None
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, PickleRefused):
                raise
            raise PickleDamaged(f"it is malformed ({type(error).__name__}: {error})"[:200]) from None

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self._data):
            raise PickleDamaged("it is cut short")
        self.at += count
        return self._data[self.at - count : self.at]

    def _number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at)
        return self._take(end + 1 - self.at)[:-1].decode("utf-8")

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleDamaged("it is malformed (no mark)")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _step(self, step: int) -> None:
        push = self._stack.append
        if step in _CONSTANTS:
            push(_CONSTANTS[step])
        elif step in _NUMBERS:
            push(self._number(_NUMBERS[step]))
        elif step == _FLOAT:
            push(struct.unpack(">d", self._take(8))[0])
        elif step in _TEXTS:
            push(self._take(self._number(_TEXTS[step])).decode("utf-8", "surrogatepass"))
        elif step in _BYTES:
            push(self._take(self._number(_BYTES[step])))
        elif step in _LONGS:
            push(int.from_bytes(self._take(self._number(_LONGS[step])), "little", signed=True))
        elif step in _TUPLES:
            count = _TUPLES[step]
            items = self._stack[len(self._stack) - count :]
            del self._stack[len(self._stack) - count :]
            push(tuple(items))
        elif step in _GETS:
            push(self._memo[self._number(_GETS[step])])
        elif step in _PUTS:
            self._memo[self._number(_PUTS[step])] = self._stack[-1]
        elif step in _STEPS:
            _STEPS[step](self)
        else:
            raise PickleRefused(f"step {bytes([step])!r} at byte {self.at - 1} is not one that data need")

    # Steps that are more than a constant or a copy.

    def memoize(self) -> None:
        """Remembers the top of the stack under the next number."""
        self._memo[len(self._memo)] = self._stack[-1]

    def protocol(self) -> None:
        """States the protocol."""
        if self._byte() > _HIGHEST_PROTOCOL:
            raise PickleRefused("it is of a newer pickle protocol")

    def frame(self) -> None:
        """Announces how many bytes follow; the steps say so themselves."""
        self._number("<Q")

    def mark(self) -> None:
        """Puts a mark."""
        self._stack.append(_MARK)

    def pop(self) -> None:
        """Drops the top."""
        self._stack.pop()

    def pop_mark(self) -> None:
        """Drops all down to the mark."""
        self._pop_mark()

    def empty_list(self) -> None:
        """Puts a new list."""
        self._stack.append([])

    def empty_dict(self) -> None:
        """Puts a new dict."""
        self._stack.append({})

    def make_tuple(self) -> None:
        """Makes a tuple of what lies above the mark."""
        self._stack.append(tuple(self._pop_mark()))

    def append(self) -> None:
        """Appends one item to a list."""
        item = self._stack.pop()
        self._list().append(item)

    def appends(self) -> None:
        """Appends what lies above the mark to a list."""
        items = self._pop_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        top = self._stack[-1]
        if type(top) is not list:
            raise PickleRefused("it appends to something that is no list")
        return top

    def set_item(self) -> None:
        """Sets one item of a dict."""
        value, key = self._stack.pop(), self._stack.pop()
        self._dict()[key] = value

    def set_items(self) -> None:
        """Sets items of a dict."""
        items = self._pop_mark()
        self._dict().update(zip(items[::2], items[1::2], strict=True))

    def _dict(self) -> dict[Any, Any]:
        top = self._stack[-1]
        if type(top) is not dict:
            raise PickleRefused("it sets items of something that is no dict")
        return top

    def name_in_line(self) -> None:
        """Refers to a name written out in the pickle."""
        module, name = self._line(), self._line()
        self._refer(module, name)

    def name_on_stack(self) -> None:
        """Refers to a name whose parts lie on the stack."""
        name, module = self._stack.pop(), self._stack.pop()
        self._refer(str(module), str(name))

    def _refer(self, module: str, name: str) -> None:
        known = self._names.get(f"{module}.{name}")
        if known is None:
            raise PickleRefused(
                f"it refers to {module}.{name}"[:100] + ", which is no array and no known container"
            )
        self._stack.append(known)

    def reduce(self) -> None:
        """Where a pickle would call something: a known container is built."""
        arguments, name = self._stack.pop(), self._stack.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise PickleRefused("it calls something that is no name")
        if name.build is None:
            raise PickleRefused(f"it calls {name.text}")
        self._stack.append(name.build(arguments))

    def new_object(self) -> None:
        """Makes an empty record of a known class."""
        self._stack.pop()
        name = self._stack.pop()
        if not isinstance(name, Name) or not name.is_record:
            raise PickleRefused("it makes an object of something that is no known container")
        self._stack.append(Record(name.text))

    def build(self) -> None:
        """Sets the state of a record, or completes a stand-in."""
        state, top = self._stack.pop(), self._stack[-1]
        if isinstance(top, Record) and isinstance(state, dict):
            top.state.update(state)
        elif isinstance(top, StandIn) and isinstance(state, tuple):
            self._replace_top(top.complete(state))
        else:
            raise PickleRefused("it sets the state of something that has none")

    def _replace_top(self, value: object) -> None:
        """The stand-in on top becomes its value, in the memo too."""
        stand_in = self._stack[-1]
        self._stack[-1] = value
        for key, remembered in self._memo.items():
            if remembered is stand_in:
                self._memo[key] = value

    def persistent(self) -> None:
        """Refers to something kept beside the pickle."""
        identity = self._stack.pop()
        if self._persistent is None:
            raise PickleRefused("it refers to an object outside of itself")
        self._stack.append(self._persistent(identity))


_CONSTANTS: Mapping[int, Any] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
_NUMBERS = {0x4B: "<B", 0x4D: "<H", 0x4A: "<i"}
_TEXTS = {0x8C: "<B", 0x58: "<I", 0x8D: "<Q"}
_BYTES = {0x43: "<B", 0x42: "<I", 0x8E: "<Q", 0x55: "<B", 0x54: "<i", 0x96: "<Q"}
_LONGS = {0x8A: "<B", 0x8B: "<i"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_GETS = {0x68: "<B", 0x6A: "<I"}
_PUTS = {0x71: "<B", 0x72: "<I"}
_STEPS: Mapping[int, Callable[[Machine], None]] = {
    0x80: Machine.protocol,
    0x95: Machine.frame,
    0x94: Machine.memoize,
    0x28: Machine.mark,
    0x30: Machine.pop,
    0x31: Machine.pop_mark,
    0x5D: Machine.empty_list,
    0x7D: Machine.empty_dict,
    0x74: Machine.make_tuple,
    0x61: Machine.append,
    0x65: Machine.appends,
    0x73: Machine.set_item,
    0x75: Machine.set_items,
    0x63: Machine.name_in_line,
    0x93: Machine.name_on_stack,
    0x52: Machine.reduce,
    0x81: Machine.new_object,
    0x62: Machine.build,
    0x51: Machine.persistent,
}
