"""Pickles read as plain data: nothing that they name is imported or called.

A pickle is a program for a small stack machine that can call anything. This module is such a
machine without calls. It knows a handful of names (`_KNOWN`), for which it makes tensors, arrays
and containers itself; an object of any other class becomes a dictionary of its state, with the name
of the class under `"__class__"`. The opcodes are those of the standard library's `pickletools`.
"""

from __future__ import annotations

import io
import pickletools
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLASS = "__class__"
"""The key under which an object's dictionary holds the name of its class."""

ARGUMENTS = "__args__"
"""The key of the arguments that an object's constructor would have received."""

STATE = "__state__"
"""The key of a state that is not a dictionary."""

ITEMS = "__items__"
"""The key of the elements of an object that is a list or a set."""

_SPREAD = 2**24
"""A tensor that was `expand`ed may have this many more elements than its storage."""

_MOST_MODULES = 10_000

_COPIED = 2**24
"""Largest number of elements and bytes that are copied, beyond the size of the file."""

MOST_AXES = 64
"""Largest number of axes of a tensor."""

_LARGEST_KEY = 2**61 - 1
"""Larger integers can be made to share a hash, and filling a dictionary with them is slow."""

_DEEPEST = 8
"""Deepest nesting of pickles within pickles."""


class PickleError(Exception):
    """The bytes are not a pickle, are cut off, or hold what cannot be plain data."""


@dataclass(frozen=True)
class Name:
    """Something to which a pickle refers by name (a class, a function, a dtype); never imported."""

    name: str

    def __str__(self) -> str:
        return self.name


def text_of(value: Any) -> str:
    """Return a text or a name as text; "" for anything else.

    `str` and `repr` would never end for a list of lists of lists … in which each list occurs many
    times.
    """
    return str(value) if isinstance(value, str | Name) else ""


def shown(value: Any) -> str:
    """Return `repr` for messages; long or nested values are cut."""
    return reprlib.repr(value)


@dataclass(frozen=True)
class Storage:
    """The bytes behind tensors, one-dimensional."""

    data: Tensor


class _Mark:
    pass


_MARK = _Mark()


@dataclass
class Budget:
    """The elements and bytes that may still be copied, so that a small file cannot fill memory.

    What a file holds once can be named in it a thousand times, in a few bytes each.

    Attributes:
        left: how many are left; at first, the size of the file and some more.
    """

    left: int = _COPIED

    def spend(self, count: int) -> None:
        """Account for copying `count` elements or bytes.

        Raises:
            PickleError: fewer are left.
        """
        self.left -= count
        if self.left < 0:
            raise PickleError("it copies the same values again and again")


@dataclass
class Reader:
    """Reads the pickles of one file.

    Attributes:
        storage: returns the storage that a persistent id names.
        budget: what may be copied; nested pickles share it.
        depth: how many pickles contain this one.
    """

    storage: Callable[[tuple[Any, ...]], Any] | None = None
    budget: Budget = field(default_factory=Budget)
    depth: int = 0
    _stack: list[Any] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def load(self, file: io.BufferedIOBase) -> Any:
        """Read the next pickle of a file, as plain data, up to its end.

        Raises:
            PickleError: the bytes are not a pickle, are cut off or contradict one another.
        """
        self._stack, self._memo = [], {}
        try:
            for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except PickleError:
            raise
        except RecursionError as error:
            raise PickleError("nested too deep") from error
        except MemoryError as error:
            raise PickleError("does not fit into memory") from error
        except Exception as error:
            # The stack machine can fail in as many ways as there are wrong programs.
            raise PickleError(f"{type(error).__name__}: {error}") from error
        raise PickleError("it ends before its last opcode")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode]())
        elif opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _IGNORED:
            pass
        elif opcode == "BYTEARRAY8":
            stack.append(bytes(argument))
        elif opcode == "MARK":
            stack.append(_MARK)
        elif opcode == "POP":
            stack.pop()
        elif opcode == "POP_MARK":
            self._above_mark()
        elif opcode == "DUP":
            stack.append(stack[-1])
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[int(argument)] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(argument)])
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(opcode[-1])
            if len(stack) < size:
                raise PickleError("a tuple is cut off")
            stack[-size:] = [tuple(stack[-size:])]
        elif opcode == "TUPLE":
            stack.append(tuple(self._above_mark()))
        elif opcode == "LIST":
            stack.append(self._above_mark())
        elif opcode == "FROZENSET":
            stack.append(frozenset(map(_key, self._above_mark())))
        elif opcode == "DICT":
            stack.append(_pairs(self._above_mark()))
        elif opcode in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if opcode == "APPEND" else self._above_mark()
            _add(stack[-1], items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = [stack.pop() for _ in range(2)][::-1]
            if opcode == "SETITEMS":
                stack.extend(items)
                items = self._above_mark()
            if not isinstance(stack[-1], dict):
                raise PickleError(f"keys are set on a {type(stack[-1]).__name__}")
            stack[-1].update(_pairs(items))
        elif opcode == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = _text(stack.pop()), _text(stack.pop())
            self.budget.spend(len(module) + len(name))
            stack.append(Name(f"{module}.{name}"))
        elif opcode in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            extras = stack.pop() if opcode == "NEWOBJ_EX" else {}
            arguments, function = stack.pop(), stack.pop()
            result = self._call(function, arguments)
            if extras and isinstance(result, dict):
                result["__kwargs__"] = extras
            stack.append(result)
        elif opcode in ("INST", "OBJ"):
            arguments = self._above_mark()
            function = Name(argument.replace(" ", ".", 1)) if opcode == "INST" else arguments.pop(0)
            stack.append(self._call(function, tuple(arguments)))
        elif opcode == "BUILD":
            state = stack.pop()
            stack[-1] = self._build(stack[-1], state)
        elif opcode == "BINPERSID":
            if self.storage is None:
                raise PickleError("it refers to data outside of it")
            stack.append(self.storage(stack.pop()))
        else:
            raise PickleError(f"the opcode {opcode} has no place in a checkpoint")

    def _above_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while place >= 0 and self._stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise PickleError("a mark is missing")
        above = self._stack[place + 1 :]
        del self._stack[place:]
        return above

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the value of a call that the pickle asks for; nothing that it names is called."""
        if not isinstance(arguments, tuple):
            raise PickleError(f"arguments are a {type(arguments).__name__}")
        self.budget.spend(len(arguments))
        name = function.name if isinstance(function, Name) else None
        if name == "torch._utils._rebuild_tensor_v3":
            storage, dtype = arguments[0], _DTYPES[arguments[6].name]
            return self._tensor(Storage(storage.data.view(dtype)), *arguments[1:4])
        if name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_tensor":
            return self._tensor(*arguments)
        if name in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
        ):
            return arguments[0]
        if name == "torch._tensor._rebuild_from_type_v2":
            return self._call(arguments[0], arguments[2])
        if name == "torch.storage._load_from_bytes":
            return self._nested(arguments[0])
        if name in ("torch.storage.TypedStorage", "torch.storage._TypedStorage") and arguments:
            return arguments[0]
        if name in _KNOWN:
            self.budget.spend(sum(map(_size, arguments)))
            return _KNOWN[name](*arguments)
        if name == "copyreg._reconstructor":
            kind, _, content = arguments
            self.budget.spend(_size(content))
            state = {CLASS: str(kind)}
            return state if content is None else _with_items(state, content)
        if name == "copyreg.__newobj__":
            return self._call(arguments[0], arguments[1:])
        state = {CLASS: str(function) if isinstance(function, Name) else "unknown"}
        return {**state, ARGUMENTS: arguments} if arguments else state

    def _build(self, built: Any, state: Any) -> Any:
        if isinstance(built, _Array):
            self.budget.spend(_size(state[-1]))
            return built.filled(state)
        if isinstance(built, _Dtype):
            built.order = state[1]
            return built
        if not isinstance(built, dict) or CLASS not in built:
            return built  # attributes of a tensor or a container are not data of a checkpoint
        halves = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(half is None or isinstance(half, dict) for half in halves):
            for half in halves:
                self.budget.spend(_size(half))
                # No attribute can pretend to be the name of the class.
                built.update({k: v for k, v in (half or {}).items() if k != CLASS})
        else:
            built[STATE] = state
        return built

    def _tensor(self, storage: Any, offset: int, size: Iterable[int], stride: Iterable[int]) -> Any:
        if not isinstance(storage, Storage):
            raise PickleError("a tensor has no storage")
        size, stride = tuple(size), tuple(stride)
        if len(size) > MOST_AXES:
            raise PickleError(f"a tensor has {len(size):,} axes")
        if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
            raise PickleError(f"a tensor has size {list(size)} and stride {list(stride)}")
        data, elements, last = storage.data, 1, offset
        for length, step in zip(size, stride, strict=True):
            elements *= length
            last += (length - 1) * step
        if elements == 0:
            return data.new_zeros(size)
        if last >= len(data) or elements > len(data) + _SPREAD:
            raise PickleError(
                f"a tensor of size {list(size)} is larger than its {len(data)} values"
            )
        return data.as_strided(size, stride, offset)

    def _nested(self, data: Any) -> Any:
        if self.depth >= _DEEPEST:
            raise PickleError("pickles within pickles within pickles")
        self.budget.spend(len(data))
        return read_legacy(io.BytesIO(data), len(data), depth=self.depth + 1, budget=self.budget)


def read_legacy(
    file: io.BufferedIOBase, size: int, *, depth: int = 0, budget: Budget | None = None
) -> Any:
    """Read what `torch.save` wrote before it wrote zip archives: pickles, then the storages.

    Args:
        file: the file, at its beginning.
        size: size of the file, in bytes.
        depth: how many pickles contain this one.
        budget: what may be copied; by default according to the size.

    Raises:
        PickleError: it is not such a file, or is cut off.
    """
    storages: dict[str, Storage] = {}
    budget = budget or budget_of(size)
    total = 0

    def storage(identity: tuple[Any, ...]) -> Any:
        nonlocal total
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
            return identity[1]  # a class, with its source code
        if not isinstance(identity, tuple) or len(identity) not in (5, 6):
            raise PickleError("a storage has no name")
        _, kind, key, _, elements, *_ = identity
        if _text(key) not in storages:
            dtype = storage_dtype(kind)
            total += elements * dtype.itemsize
            if elements < 0 or total > size:
                raise PickleError(
                    f"its tensors take {total:,} bytes, but the file has only {size:,}"
                )
            storages[key] = Storage(torch.zeros(elements, dtype=dtype))
        view = identity[5] if len(identity) == 6 else None
        if view is None:
            return storages[key]
        _, start, length = view
        if not 0 <= start <= start + length <= len(storages[key].data):
            raise PickleError("a view is larger than its storage")
        return Storage(storages[key].data[start : start + length])

    plain = Reader(depth=depth, budget=budget)
    if plain.load(file) != LEGACY_MAGIC:
        raise PickleError("it is not a file that torch.save wrote")
    plain.load(file), plain.load(file)  # the protocol and the system
    content = Reader(storage, depth=depth, budget=budget).load(file)
    for key in plain.load(file):
        count = int.from_bytes(file.read(8), "little")
        if _text(key) not in storages or count != len(storages[key].data):
            raise PickleError(f"the storage {key!r} does not have the announced size")
        fill(file, storages[key].data)
    return content


def budget_of(size: int) -> Budget:
    """Return what may be copied from a pickle of `size` bytes."""
    return Budget(_COPIED + 2 * size)


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def fill(file: io.BufferedIOBase, data: Tensor) -> None:
    """Read a tensor's bytes from a file.

    Raises:
        PickleError: the file ends too early.
    """
    if data.numel() == 0:
        return
    into: Any = memoryview(data.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(into):
        count = file.readinto(into[done : done + 2**24])
        if not count:
            raise PickleError("it is cut off within its tensors")
        done += count


def storage_dtype(kind: Any) -> torch.dtype:
    """Return the dtype of a storage class: `torch.FloatStorage`, or bytes for an untyped one.

    Raises:
        PickleError: the class is unknown.
    """
    name = text_of(kind).rpartition(".")[2]
    if name not in _STORAGES:
        raise PickleError(f"tensors of the kind {name!r} are not supported")
    return _STORAGES[name]


def tensors_of(module: Any) -> dict[str, Tensor]:
    """Return the tensors of an `nn.Module` that was pickled as a whole, by state dictionary key.

    Args:
        module: the module's dictionary, as `Reader` returns it.

    Raises:
        PickleError: there are more modules than in any checkpoint, e.g. because they hold
            themselves.
    """
    tensors: dict[str, Tensor] = {}
    waiting = [("", module)]
    for _ in range(_MOST_MODULES):
        if not waiting:
            return tensors
        prefix, module = waiting.pop()
        if not isinstance(module, dict):
            continue
        for group in ("_parameters", "_buffers"):
            for name, tensor in dict(module.get(group) or {}).items():
                if isinstance(tensor, Tensor):
                    tensors[f"{prefix}{name}"] = tensor
        inner = dict(module.get("_modules") or {})
        waiting += [(f"{prefix}{name}.", child) for name, child in reversed(inner.items())]
    raise PickleError(f"it has more than {_MOST_MODULES:,} modules, or they hold themselves")


@dataclass
class _Dtype:
    code: str
    order: str = "<"

    @property
    def numpy(self) -> np.dtype[Any]:
        if len(self.code) < 2 or self.code[0] not in "biuf" or not self.code[1:].isdigit():
            raise PickleError(f"arrays of the kind {self.code!r} are not supported")
        return np.dtype(f"{'>' if self.order == '>' else '<'}{self.code}")


@dataclass
class _Array:
    """A numpy array before it has its state: (version, shape, dtype, columns first, bytes)."""

    def filled(self, state: Any) -> Any:
        _, shape, dtype, fortran, data = state
        if isinstance(data, str):
            data = data.encode("latin1")
        flat = np.frombuffer(data, dtype.numpy)
        return flat.reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return np.frombuffer(data if isinstance(data, bytes) else b"", dtype.numpy)[0].item()


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: str = "C") -> Any:
    return _Array().filled((1, shape, dtype, order == "F", data))


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "utf-8", "utf8", "ascii"):
        raise PickleError(f"text is encoded as {encoding!r}")
    return text.encode(encoding)


def _dictionary(content: Any = ()) -> dict[Any, Any]:
    pairs = content.items() if isinstance(content, dict) else content
    return {_key(key): value for key, value in pairs}


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(k): value for k, value in zip(items[::2], items[1::2], strict=True)}


def _key(value: Any) -> Any:
    """Check a key of a dictionary: hashing tuples nested without end would end the process."""
    if isinstance(value, int) and abs(value) > _LARGEST_KEY:
        raise PickleError("a key is a number of more than 61 bits")
    plain = isinstance(value, str | bytes | int | float | Name | None)
    if plain or (isinstance(value, tuple) and all(isinstance(v, str | int) for v in value)):
        return value
    raise PickleError(f"a key is a {type(value).__name__}")


def _path(*parts: str) -> str:
    return PurePosixPath(*map(_text, parts)).as_posix()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PickleError(f"a name is {type(value).__name__}")
    return value


def _size(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _add(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_key, items))
    elif isinstance(target, dict):
        target.setdefault(ITEMS, []).extend(items)
    else:
        raise PickleError(f"elements are added to a {type(target).__name__}")


def _with_items(result: dict[str, Any], content: Any) -> dict[str, Any]:
    if isinstance(content, dict):
        return {**content, **result}
    return {
        **result,
        ITEMS: list(content) if isinstance(content, list | tuple | set) else [content],
    }


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}

_IGNORED = {"PROTO", "FRAME"}

_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _dictionary,
    "builtins.list": lambda content=(): list(content),
    "builtins.tuple": lambda content=(): tuple(content),
    "builtins.set": lambda content=(): set(map(_key, content)),
    "builtins.frozenset": lambda content=(): frozenset(map(_key, content)),
    "builtins.bytes": lambda content=b"", *_: _encode(content) if content else b"",
    "__builtin__.set": lambda content=(): set(map(_key, content)),
    "_codecs.encode": _encode,
    "pathlib.PosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib._local.PosixPath": _path,
    "pathlib._local.WindowsPath": _path,
    "torch.Size": lambda content=(): tuple(content),
    "torch.device": lambda kind="cpu", index=None: kind if index is None else f"{kind}:{index}",
    "numpy.dtype": lambda code, *_: _Dtype(code.lstrip("<>=|")),
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy._core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
}

_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
}

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
