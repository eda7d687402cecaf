"""Read a ``.pt2`` archive from outside and refuse one that could run code when loaded.

``torch.export.load`` unpickles what the archive tells it to, evaluates shape expressions and
guards as Python, compiles source code with the archive's names in it, imports the modules of
its containers and resolves operator names anywhere below ``torch``. A program saved by
``torch.export.save`` from tensors and ATen operators needs next to nothing of that. What is
beyond it is refused here, member by member and text by text, before torch sees the file;
this module imports no torch.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, Final

from edge_runtime.contract.archives import check_zip, check_zip_stream
from edge_runtime.contract.errors import NearfarError
from edge_runtime.contract.program_text import (
    is_expression,
    is_guard,
    is_name,
    is_operator,
    is_path,
    is_tree,
    is_word,
)

__all__ = ["screen_program"]

_MAX_JSON_BYTES: Final = 256 * 2**20
_MAX_RECORD_BYTES: Final = 2**20
_MAX_PICKLE_BYTES: Final = 2**20
_MAX_TEXT_CHARS: Final = 10_000
_MEMBERS: Final = re.compile(
    r"data/weights/(?:weight_\d+|model_weights_config\.json)"
    r"|data/constants/(?:tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|extra/[^/]+"
    r"|archive_format|archive_version|byteorder|version|\.data/[a-z_]+"
)
_NAME_KEYS: Final = frozenset({"name", "as_name", "forward_arg_names"})
_PATH_KEYS: Final = frozenset(
    {"buffer_name", "fqn", "parameter_name", "tensor_constant_name", "torch_version"}
)
_OBJECT_KEYS: Final = frozenset({"as_custom_obj", "custom_obj", "custom_obj_name", "class_fqn"})
# What rebuilds a tensor from its bytes; none of these runs anything.
_GLOBALS: Final = re.compile(
    r"collections OrderedDict|torch [A-Z][A-Za-z0-9]*Storage|torch Size|torch device"
    r"|torch\.storage UntypedStorage|torch\._utils _rebuild_(?:tensor_v[23]|parameter)"
)
_OPCODES: Final = frozenset(
    {"PROTO", "FRAME", "GLOBAL", "REDUCE", "BINPERSID", "STOP", "MARK", "MEMOIZE",
     "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINUNICODE", "SHORT_BINUNICODE",
     "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE", "NONE",
     "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
     "EMPTY_DICT", "SETITEM", "SETITEMS"}
)  # fmt: skip


def screen_program(path: Path, record_name: str, error: type[NearfarError]) -> bytes | None:
    """Refuse ``path`` unless it is plain; returns its extra file ``record_name``, if any.

    Raises ``error`` with what is wrong and how to write the file anew.
    """
    return _Screen(path, error).run(record_name)


class _Screen:
    def __init__(self, path: Path, error: type[NearfarError]) -> None:
        self.path = path
        self.error = error

    def run(self, record_name: str) -> bytes | None:
        listed = check_zip(self.path, "a torch.export program", self.error)
        members = {member.filename: member for member in listed}
        roots = {name.split("/", 1)[0] for name in members}
        root = next(iter(roots), "")
        if len(roots) != 1 or f"{root}/models/model.json" not in members:
            raise self.error(
                f"{self.path.name} is no program of this torch.export: save it again with "
                "torch.export.save of torch 2.9 or later"
            )
        for name in members:
            tail = name.removeprefix(f"{root}/")
            if not _MEMBERS.fullmatch(tail):
                raise self._refused(f"it holds {tail[:80]!r}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                for kind in ("weights", "constants"):
                    name = f"{root}/data/{kind}/model_{kind}_config.json"
                    self._check_payloads(self._json(archive, name))
                self._check_program(self._json(archive, f"{root}/models/model.json"))
                self._check_samples(self._read(archive, f"{root}/data/sample_inputs/model.pt"))
                extra = members.get(f"{root}/extra/{record_name}")
                if extra is None:
                    return None
                if extra.file_size > _MAX_RECORD_BYTES:
                    raise self.error(f"{self.path.name}: its {record_name} is too large")
                return archive.read(extra)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as reason:
            raise self._unreadable(reason) from None

    def _refused(self, reason: str) -> NearfarError:
        return self.error(
            f"{self.path.name} could run code when it is loaded ({reason}): save the model "
            "again with torch.export.save from tensors and ATen operators only"
        )

    def _unreadable(self, reason: object) -> NearfarError:
        return self.error(f"{self.path.name} is no readable torch.export program: {reason}")

    def _read(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            return archive.read(name)
        except KeyError:
            raise self._unreadable(f"no {name.split('/', 1)[1]}") from None

    def _json(self, archive: zipfile.ZipFile, name: str) -> Any:
        try:
            if archive.getinfo(name).file_size > _MAX_JSON_BYTES:
                raise self.error(f"{self.path.name}: {name} is too large")
            return json.loads(self._read(archive, name))
        except (KeyError, ValueError, RecursionError) as reason:
            raise self._unreadable(reason) from None

    def _check_payloads(self, config: Any) -> None:
        """The table of tensors: raw bytes only, and nothing that torch would unpickle."""
        entries = config.get("config") if isinstance(config, dict) else None
        if not isinstance(entries, dict):
            raise self._unreadable("no tensor table")
        for entry in entries.values():
            if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                raise self._refused("its tensors are pickled")
            name = str(entry.get("path_name"))
            if not re.fullmatch(r"(weight|tensor)_\d+", name):
                raise self._refused(f"it holds the object {name[:80]!r}")
        self._walk(config)

    def _check_program(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise self._unreadable("no program")
        constraints = document.get("range_constraints") or {}
        guards = document.get("guards_code") or []
        if not isinstance(constraints, dict) or not isinstance(guards, list):
            raise self._unreadable("no program")
        for text in constraints:
            if not is_expression(text):
                raise self._refused(f"its shape expression {text[:80]!r}")
        for guard in guards:
            if not isinstance(guard, str) or not is_guard(guard):
                raise self._refused(f"its guard {str(guard)[:80]!r}")
        rest = {k: v for k, v in document.items() if k not in ("range_constraints", "guards_code")}
        self._walk(rest)

    def _walk(self, document: Any) -> None:
        """Every key and every text of a JSON document, by what it stands for."""
        stack: list[tuple[str, Any]] = [("", document)]
        while stack:
            key, value = stack.pop()
            if isinstance(value, list):
                stack.extend((key, inner) for inner in value)
            elif isinstance(value, dict):
                for inner_key, inner in value.items():
                    if not is_path(inner_key):
                        raise self._refused(f"the name {inner_key[:80]!r}")
                    if inner_key in _OBJECT_KEYS and inner:
                        raise self._refused("it holds an object that is no tensor")
                    # A node's notes are for people; torch resolves names in them at most.
                    if inner_key != "metadata":
                        stack.append((inner_key, inner))
            elif isinstance(value, str):
                self._check_text(key, value)

    def _check_text(self, key: str, text: str) -> None:
        if key in ("target", "as_operator"):
            if not is_operator(text):
                raise self._refused(f"it calls {text[:80]!r}")
        elif key in ("expr_str", "as_expr"):
            if not is_expression(text):
                raise self._refused(f"its shape expression {text[:80]!r}")
        elif key in ("in_spec", "out_spec"):
            if not is_tree(text):
                raise self._refused(f"its {key} {text[:80]!r}")
        elif key in ("as_string", "as_strings"):  # quoted wherever they go
            if len(text) > _MAX_TEXT_CHARS:
                raise self._refused("a text that is too long")
        elif key in _NAME_KEYS:
            if text and not is_name(text):
                raise self._refused(f"the name {text[:80]!r}")
        elif not (is_path(text) if key in _PATH_KEYS else is_word(text)):
            raise self._refused(f"the text {text[:80]!r}")

    def _check_samples(self, data: bytes) -> None:
        """The example inputs are a pickle that torch trusts when all else fails."""
        if not data:
            return
        stream = io.BytesIO(data)
        what = "an archive of example inputs"
        for member in check_zip_stream(stream, self.path.name, what, self.error):
            if not member.filename.endswith(".pkl"):
                continue
            if member.file_size > _MAX_PICKLE_BYTES:
                raise self._refused("its example inputs are too large")
            with zipfile.ZipFile(stream) as archive:
                if not _plain_pickle(archive.read(member)):
                    raise self._refused("its example inputs are more than tensors")


def _plain_pickle(data: bytes) -> bool:
    """Whether a pickle holds nothing but tensors, numbers, texts and containers of them."""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                return False
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
                return False
    except (ValueError, IndexError, UnicodeDecodeError, MemoryError):
        return False
    return True
