"""What a fuzzer needs: mutations that know the structure of text, and a watch over what code does to the machine."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_.]*|\d+(?:\.\d+)?|\s+|.', re.DOTALL)
_NUMBERS = (
    "0", "-1", "1", "2", "3", "255", "65536", "2147483648", "9223372036854775807", "9223372036854775808", "1e308",
    "1e999", "NaN", "Infinity", "-0.0", "0.5", "9" * 40, "9" * 5000, "9**9**9", "10**18",
)  # fmt: skip
_WORDS = (
    "operator.attrgetter", "operator.call", "operator.getitem", "operator.pow", "aten.from_file.default",
    "aten.set_.source_Tensor", "aten.empty.memory_format", "aten.as_strided.default", "aten.add_.Tensor", "prim.device",
    "aten.full.default", "aten.unbind.int", "aten.repeat.default", "__import__", "__class__", "os.system", "torch.load",
    "aten.randn.default", "aten.arange.default", "tfqc.quantize.default", "math.floor", "torch.sym_max", "None", "true",
    "null", "%sample", "%timestep", "@conv_in.weight", "Bx4xf32", "(B*B)xf32", "int<B>", "bool<>", "B", "R", "H", "{",
    "}", "[", "]", "(", ")", ",", "=", ":", "#", "-", "\n", "\r", "\x00", "\ud800", "\u2028", "\uff11", "&a", "*a",
    "!!python/none", "../../x", "/etc/passwd", '"', "'", "\\", "\\u0000", "x" * 5000, "[" * 500, "(" * 500,
    "- " * 300, "{a: " * 300,
)  # fmt: skip


def mutated(seed: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A seed with one to four changes; a header of safetensors is changed as the text that it is."""
    size = int.from_bytes(seed[:8], "little")
    if len(seed) > 8 and seed[8:9] == b"{" and size <= len(seed) - 8:
        if rng.random() < 0.2:
            return _bytes(seed, rng)
        header = _text(seed[8 : 8 + size].decode("latin-1"), [], rng).encode("utf-8", "surrogatepass")
        length = len(header) if rng.random() < 0.8 else rng.choice((0, size, 2**31, 2**63, 2**64 - 1))
        return length.to_bytes(8, "little") + header + seed[8 + size :]
    try:
        text = seed.decode()
    except UnicodeDecodeError:
        return _bytes(seed, rng)
    return _text(text, others, rng).encode("utf-8", "surrogatepass")


def _text(text: str, others: Sequence[bytes], rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(10)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(rng.randrange(len(lines) + 1), lines[at])
        elif kind == 2 and others:
            donor = rng.choice(others).decode("utf-8", "replace").split("\n")
            begin = rng.randrange(len(donor))
            lines[at : at + rng.randrange(3)] = donor[begin : begin + rng.randrange(1, 6)]
        elif kind == 3:
            lines[at] = _bytes(lines[at].encode("utf-8", "replace"), rng).decode("utf-8", "replace")
        else:
            lines[at] = _line(lines[at], rng.choice(lines), rng)
        text = "\n".join(lines)
    return text


def _line(line: str, other: str, rng: random.Random) -> str:
    tokens, spare = _TOKEN.findall(line) or [""], _TOKEN.findall(other) or [""]
    at = rng.randrange(len(tokens))
    kind = rng.randrange(7)
    numbers = [i for i, t in enumerate(tokens) if t[:1].isdigit()]
    if kind == 0 and numbers:
        tokens[rng.choice(numbers)] = rng.choice(_NUMBERS)
    elif kind == 1:
        tokens[at] = rng.choice(_WORDS)
    elif kind == 2:
        tokens.insert(at, rng.choice(_WORDS))
    elif kind == 3:
        del tokens[at]
    elif kind == 4:
        tokens[at] = rng.choice(spare)
    elif kind == 5:
        tokens[at] *= rng.choice((2, 2, 2, 40, 2000))
    else:
        to = rng.randrange(len(tokens))
        tokens[at], tokens[to] = tokens[to], tokens[at]
    return "".join(tokens)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del changed[at : at + rng.randrange(1, 17)]
            case _:
                del changed[at:]
    return bytes(changed)


class Forbidden(BaseException):
    """Code did what reading a file never needs: it is no Exception, so that nobody takes it for one of theirs."""


_PROCESSES = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "socket.",
              "ctypes.dlopen", "shutil.", "urllib.", "webbrowser.", "marshal.", "pickle.find_class")  # fmt: skip
_OWN_EXEC = ("typing.py", "dataclasses.py", "collections/__init__.py", "functools.py")


class Watch:
    """An audit hook over this process: while it is on, files may be written in one directory alone, no process is
    started, no socket opened, and nothing imported or executed but what tfqc, torch and Python's library are."""

    def __init__(self, work: Path, packages: Sequence[str]) -> None:
        self.work, self.packages, self.on = str(work), tuple(packages), False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and (reason := self._objection(event, args)):
            self.seen.append(reason)
            raise Forbidden(reason)

    def _objection(self, event: str, args: tuple[Any, ...]) -> str:
        if event.startswith(_PROCESSES):
            return f"{event} {args!r:.200}"
        if event in ("open", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink", "os.link"):
            path, mode = str(args[0]), args[1] if event == "open" else "w"
            writes = isinstance(mode, str) and any(c in mode for c in "wax+")
            if writes and not path.startswith(self.work) and path != "/dev/null":
                return f"{event} of {path!r:.200} for writing"
        if event == "import" and str(args[0]).partition(".")[0] not in self.packages:
            return f"import of {args[0]}"
        if event == "exec":
            caller = sys._getframe(2).f_code.co_filename
            name = getattr(args[0], "co_filename", "")
            if name in ("<string>", "<unknown>") and not caller.endswith(_OWN_EXEC):
                return f"exec of text in {caller}"
        return ""
