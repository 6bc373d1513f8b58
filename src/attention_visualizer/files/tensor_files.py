"""Read files of tensors from untrusted sources, checked before they are believed: torch's zips and safetensors.

Nothing in them can run code, use more memory than a small multiple of the file's size, or differ from what was
written without being noticed (safetensors: where the file holds a hash).
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from attention_visualizer.files.digests import file_digest, weights_digest
from attention_visualizer.support.errors import UserError, prevents_reading, reading, summary

CHECKPOINT_KEY = "attention_visualizer"  # this project's own entry in a Lightning checkpoint, or in a safetensors file
HASH = "attention_visualizer_sha256"
EXPECTED = "expected a checkpoint written by torch.save (.ckpt, .pth, .pt) or a .safetensors file"
FOLDER_FLAG = 0x10  # in a zip member's external attributes
MAX_PICKLE_BYTES = 2_000_000  # beside the tensors; the default model has 35,000
MAX_DEPTH = 60  # of containers in containers
# Narrower than torch's own list: that has bytearray, which makes as many bytes as a file says, and storages by size.
ALLOWED_NAME = re.compile(
    r"collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.(set|complex)|_codecs\.encode"
    r"|torch\.(_utils\._rebuild_(tensor(_v2|_v3)?|parameter)|\w+Storage|storage\.\w+Storage|nn\.parameter\.Parameter"
    r"|Size|device|bool|b?float\w+|complex\w+|u?int\w+)"
)
TENSOR_NAME = re.compile(r"torch\.(_utils\._rebuild_|_tensor\.|serialization\._get_layout|\w+Tensor|sparse\.|Tensor|q)")


def existing_file(path: str | Path) -> Path:
    """Return `path` if it is a file that is not empty. Raise UserError otherwise, UnreadableError where its folder may
    not be entered."""
    if re.match(r"[a-z]{2,}:/", str(path), re.IGNORECASE):  # Path makes one slash of two
        raise UserError(f"{path} is an address: download the checkpoint and give the file's path")
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise UserError(f"{path} does not exist: give the path of a checkpoint")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UserError(f"{path} is {kind}: give the path of a checkpoint, such as <run>/checkpoints/best.ckpt")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: choose another checkpoint")
    return path


@dataclass(frozen=True)
class TensorFile:
    """The content of a file that was read whole and checked."""

    content: Any  # plain data and tensors: what torch.save was given, or the same made of a safetensors file
    size: int  # bytes
    digest: str  # the first 16 hex digits of the file's SHA-256


def read_tensor_file(path: Path, kind: str = "checkpoint") -> TensorFile:
    """Read a torch archive or a safetensors file. Raise UserError for any that is broken, unsafe or not a `kind`,
    UnreadableError for one that cannot be read at the moment."""
    # One handle: a run that is still training may replace the file meanwhile.
    with reading(path), path.open("rb") as file:
        start = file.read(9)
        if start.startswith(b"PK\x03\x04"):
            content = read_torch(file, path)
        elif start[8:] == b"{":  # eight bytes of length, then a JSON header
            content = read_safetensors(path)
        else:
            raise UserError(f"{path} is not a {kind}: {EXPECTED}")
        return TensorFile(content, file.seek(0, io.SEEK_END), file_digest(file))


# --- torch's archives --------------------------------------------------------------------------------------------


def read_torch(file: BinaryIO, path: Path, map_location: Any = "cpu") -> Any:
    """Read an intact torch zip that holds nothing but tensors and plain data. Raise UserError, which names `path`,
    for any other file."""
    size = check_zip(file, path)
    file.seek(0)
    try:
        content = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise objects_refused(name.group(1) if name else "", path) from error
    except Exception as error:  # torch and its unpickler raise many kinds for content that makes no sense
        if prevents_reading(error):
            raise
        reason = f"{summary(error):.120}"
        raise UserError(f"{path} cannot be read by torch.load ({reason}): choose another checkpoint") from error
    check_content(content, size, path)
    return content


def objects_refused(name: str, path: Path) -> UserError:
    which = f" ({name:.80})" if name else ""
    return UserError(
        f"{path} holds Python objects{which} besides tensors and plain data; loading them could run code, "
        "so it was refused: save a state dict instead"
    )


def check_zip(file: BinaryIO, path: Path) -> int:
    """Return the file's size in bytes. Raise UserError unless every byte of every member is as it was written, nothing
    can unpack to more, and its pickle makes nothing but tensors and plain data.

    torch.load itself checks no sums: one flipped bit can give wrong weights without a word.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.start_dir != declared_directory(file, size):
                raise UserError(f"{path} holds two archives in one: {EXPECTED}")
            members = archive.infolist()
            names = [member.filename for member in members]
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > size:
                wrong = "is compressed, or unpacks to more than its size, as torch.save does not"
                raise UserError(f"{path} {wrong}: {EXPECTED}")
            # torch's own zip reader looks names up without regard to case, and reads nothing, without a word, from a
            # member that is flagged as a folder: what it reads must be what is checked here.
            if len({name.lower() for name in names}) < len(names):
                raise UserError(f"{path} holds two members of one name: choose another checkpoint")
            if any(member.external_attr & FOLDER_FLAG for member in members):
                raise UserError(f"{path} is corrupt (a member is flagged as a folder): choose another checkpoint")
            pickles = [member for member in members if member.filename.lower().endswith(".pkl")]
            if sum(member.file_size for member in pickles) > MAX_PICKLE_BYTES:
                raise UserError(
                    f"{path} holds far more besides its tensors than a checkpoint: save a state dict instead"
                )
            broken = archive.testzip()
            if broken is not None:
                place = f"the checksum of {broken!r:.80} is wrong"
                raise UserError(f"{path} is corrupt ({place}): choose another checkpoint")
            if not any(name.endswith("/data.pkl") for name in names):
                raise UserError(f"{path} is a zip archive but not a checkpoint: {EXPECTED}")
            for member in pickles:
                check_pickle(archive.read(member), size, path)
    except UserError:
        raise
    except Exception as error:  # zipfile raises many kinds for a broken file
        if prevents_reading(error):
            raise
        reason = f"{summary(error):.120}"
        raise UserError(f"{path} is truncated or corrupt ({reason}): choose another checkpoint") from error
    return size


def declared_directory(file: BinaryIO, size: int) -> int:
    """Return the offset at which a zip archive declares that its directory begins. zipfile finds the directory from
    the end, torch by its declared offset: where these differ, they read different files. Raise struct.error or
    ValueError for other endings."""

    def read(offset: int, form: str) -> tuple[Any, ...]:
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))

    end = size - 22
    signature, _, _, _, _, length, offset, comment = read(end, "<4s4H2LH")
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("something comes after its end")
    if read(end - 20, "<4s")[0] == b"PK\x06\x07":  # the longer form, with its own directory of the end before it
        end = read(end - 20, "<4sLQL")[2]
        length, offset = read(end, "<4sQ2H2L4Q")[8:10]
        if end + 56 != size - 42:
            raise ValueError("its end record is ambiguous")
    if offset + length != end:
        raise ValueError("its directory is not before its end")
    return int(offset)


def check_pickle(program: bytes, size: int, path: Path) -> None:
    """Raise UserError for a pickle that names more than torch needs for tensors, or whose tuples, written out, would
    be longer than `size`: looking one up in a dictionary would take for ever."""
    stack: list[int] = []  # the written-out length of each object on the pickle machine's stack
    marks: list[int] = []
    memory: dict[Any, int] = {}
    for operation, argument, _ in pickletools.genops(program):
        name, before = operation.name, operation.stack_before
        if name in ("GLOBAL", "INST"):
            check_name(str(argument).replace(" ", ".", 1), path)
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memory[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memory[argument])
        else:
            # As pickletools declares it: what is taken from the stack, and what is put there.
            since_mark = pickletools.stackslice in before
            start = marks.pop() if since_mark else len(stack)
            start -= before.index(pickletools.markobject) if since_mark else len(before)
            if start < 0:
                raise ValueError("a pickle that takes more than there is")
            written = 1 + sum(stack[start:])
            if written > size:
                raise UserError(f"{path} refers to parts of itself, as no checkpoint does: choose another checkpoint")
            stack[start:] = [written] * len(operation.stack_after)


def check_name(name: str, path: Path) -> None:
    """Raise UserError for a function or class of which a checkpoint has no need."""
    if ALLOWED_NAME.fullmatch(name):
        return
    if TENSOR_NAME.match(name):
        raise UserError(f"{path} holds a sparse or otherwise special tensor ({name:.80}): save dense weights")
    raise objects_refused(name, path)


def check_content(content: Any, size: int, path: Path) -> None:
    """Raise UserError where `content`, walked through, is longer or deeper than a file of `size` bytes can mean, or a
    tensor has more elements than were stored for it: a kilobyte can stand for 10^12."""
    budget = size  # of containers and their elements
    pending = [(content, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Tensor):
            check_tensor(value, path)
            continue
        budget -= 1 + (len(value) if isinstance(value, Mapping | list | tuple | set | str | bytes) else 0)
        if budget < 0 or depth > MAX_DEPTH:
            raise UserError(f"{path} refers to parts of itself, as no checkpoint does: choose another checkpoint")
        if isinstance(value, Mapping):
            pending += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list | tuple | set):
            pending += [(each, depth + 1) for each in value]


def check_tensor(tensor: Tensor, path: Path) -> None:
    """Raise UserError for a tensor that is not dense, or that declares more bytes than are stored for it."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
        raise UserError(f"{path} holds a sparse or otherwise special tensor: save dense weights")
    declared, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if declared > stored:
        difference = f"declares {declared:,} bytes of a tensor where {stored:,} are stored"
        raise UserError(f"{path} {difference}: choose another checkpoint")


# --- safetensors -------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read tensors with their metadata, in the layout of a `.ckpt` where `export_safetensors` wrote the file, else of
    a `.pth`. Raise UserError where the file is broken, or its own hash does not fit."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if CHECKPOINT_KEY not in metadata and HASH not in metadata:
            return {"model_state_dict": tensors, "config": json.loads(metadata.get("config", "{}"))}
        if metadata.get(HASH) != weights_digest(tensors, metadata.get(CHECKPOINT_KEY, "")):
            raise UserError(
                f"{path} is corrupt (its weights or its settings are not those of its hash): export it again"
            )
        return {"state_dict": tensors, **json.loads(metadata[CHECKPOINT_KEY])}
    except UserError:
        raise
    except Exception as error:  # the reader's own kind, or broken JSON
        if prevents_reading(error):
            raise
        raise UserError(f"{path} is truncated, corrupt or no safetensors file ({summary(error):.120})") from error
