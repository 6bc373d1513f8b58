"""Read small JSON and YAML files within size and depth limits; no tags, no aliases."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from attention_visualizer.support.errors import UserError, one_line, reading

MAX_BYTES_JSON = 16_000_000  # bytes; an analysis of a large model writes 1 MB
MAX_BYTES_YAML = 100_000  # a run's configuration has 2,000
MAX_DEPTH_YAML = 30  # YAML's reader takes quadratic time for what is nested deeply


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read the whole file. Raise UserError for one of more than `max_bytes` bytes and for what is no file: a pipe
    would never answer, a device never end. Raise FileNotFoundError where there is none, UnreadableError where it
    cannot be read at the moment."""
    with reading(path), open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size:,} bytes are too many: repair or delete it")
        return file.read(max_bytes)


def open_file(path: Path) -> BinaryIO:
    """Open the regular file at `path`. Raise UserError for a pipe or a device, OSError as `open` does."""
    file = open(path, "rb", opener=open_at_once)
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UserError(f"{path}: not a readable file: repair or delete it")


def open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: str | Path, max_bytes: int = MAX_BYTES_JSON) -> Any:
    """Read JSON. Raise UserError for a file that is not JSON, FileNotFoundError where there is none."""
    content = read_bytes(Path(path), max_bytes)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON or UTF-8
        raise UserError(f"{path} cannot be read as JSON ({error!s:.200}): repair or delete it") from error


def read_yaml(path: Path) -> Any:
    """Read plain values. Raise UserError for tags and for aliases, with which a kilobyte of YAML can expand beyond any
    memory. Raise FileNotFoundError where there is none."""
    content = read_bytes(path, MAX_BYTES_YAML)
    try:
        text = content.decode("utf-8")
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):
                raise UserError(f"{path} refers to parts of itself, as no configuration of this program does")
            opens = isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
            opens |= isinstance(token, yaml.BlockSequenceStartToken | yaml.BlockMappingStartToken)
            closes = isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken | yaml.BlockEndToken)
            depth += opens - closes
            if depth > MAX_DEPTH_YAML:
                raise UserError(f"{path} cannot be read: it is nested too deeply for a configuration")
        return yaml.safe_load(text)
    except UserError:
        raise
    except Exception as error:  # YAML's reader raises many kinds for values that are not what their tags say
        raise UserError(f"{path} cannot be read: {one_line(error):.200}") from error
