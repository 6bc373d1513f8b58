"""SHA-256 digests that tell files, weights and models apart."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SHOWN = 16  # hex digits of a digest that is shown to the user


def file_digest(file: BufferedReader | Path) -> str:
    """Return the first 16 hex digits of a file's digest."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return file_digest(opened)
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()[:SHOWN]


def model_digest(model: nn.Module) -> str:
    """Return the first 16 hex digits of a digest of all parameters and buffers, to tell models of one class apart."""
    digest = hashlib.sha256()
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        digest.update(_content(tensor))
    return digest.hexdigest()[:SHOWN]


def _content(tensor: Tensor) -> bytes:
    """Return what a tensor holds, as bytes; of one without content, such as a meta tensor, its type."""
    if is_lazy(tensor) or tensor.device.type == "meta":
        return type(tensor).__name__.encode()
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.dequantize()
    if plain.layout is not torch.strided:
        plain = plain.to_dense()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    return plain.float().cpu().contiguous().numpy().tobytes()


def weights_digest(weights: Mapping[str, Tensor], settings: str) -> str:
    """Return the digest, all 64 hex digits, of the settings and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
