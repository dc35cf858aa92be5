"""Nested values with tensors in them as one safetensors file, and back: no pickle.

Takes dicts, lists, tuples and deques of tensors, arrays, numbers, texts and None; gives the same,
bit by bit, types and memory layouts included.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8  # bytes; every view below needs its own element size


class UnpackableError(TypeError):
    """A value of another kind."""


def pack(tree: object) -> memoryview:
    """The file's bytes; each tensor is copied once, from its device into its place. Call `seal`
    before they are written. Raises UnpackableError."""
    tensors: list[Tensor] = []
    structure = json.dumps(_encoded(tree, tensors))
    places, size = _places(tensors)
    header = _header(tensors, places, structure, checksum=0)
    file = torch.empty(len(header) + size, dtype=torch.uint8)
    file[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        if tensor.numel():
            start = len(header) + place
            room = file[start : start + tensor.numel() * tensor.element_size()]
            room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return file.numpy().data


def seal(file: memoryview) -> None:
    """Write the checksum of the tensors' bytes into the header: it takes a second for 2 GB."""
    start = _header_end(file)
    header = bytes(file[:start])
    sealed = header.replace(_checksum(0), _checksum(zlib.crc32(file[start:])), 1)
    file[:start] = sealed


def unpack(file: bytes) -> Any:
    """What was packed, on the CPU. Raises ValueError where the file is torn, damaged or none of
    ours."""
    try:
        start = _header_end(file)
        metadata = json.loads(file[8:start])["__metadata__"]
        if zlib.crc32(memoryview(file)[start:]) != int(metadata["crc32"], 16):
            raise ValueError("its checksum is another")
        tensors = load(file)
        return _decoded(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"not a sound file: {error!r}") from error


def _encoded(value: object, tensors: list[Tensor]) -> object:
    """JSON with tensors replaced by their number. What JSON has not is an object of one key."""
    if isinstance(value, np.ndarray):
        return {"array": _encoded(torch.from_numpy(value), tensors)}
    if isinstance(value, Tensor):
        return {"tensor": _number(value.detach(), tensors), "stride": _layout(value)}
    if isinstance(value, dict):
        pairs = [[_key(key), _encoded(inner, tensors)] for key, inner in value.items()]
        return {"dict": pairs}  # not JSON's own, whose keys are texts alone
    if isinstance(value, deque):
        return {"deque": [_encoded(inner, tensors) for inner in value], "maxlen": value.maxlen}
    if isinstance(value, torch.dtype):
        return {"dtype": _DTYPES.get(value) or _refuse(f"{value}")}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(inner, tensors) for inner in value]}
    if isinstance(value, list):
        return [_encoded(inner, tensors) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _refuse(f"a {type(value).__name__}")


def _refuse(what: str) -> NoReturn:
    raise UnpackableError(f"{what} cannot be kept without pickle")


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return _decoded(value["array"], tensors).numpy()
    if "tensor" in value:
        return _laid_out(tensors[str(value["tensor"])], value["stride"])
    if "tuple" in value:
        return tuple(_decoded(inner, tensors) for inner in value["tuple"])
    if "deque" in value:
        return deque((_decoded(inner, tensors) for inner in value["deque"]), value["maxlen"])
    if "dtype" in value:
        return next(dtype for dtype, name in _DTYPES.items() if name == value["dtype"])
    pairs = value["dict"]
    return {_decoded(key, tensors): _decoded(inner, tensors) for key, inner in pairs}


def _key(key: object) -> object:
    """Numbers, texts and tuples of them: what is equal when it comes back."""
    plain = key is None or isinstance(key, (int, float, str))
    if plain or (isinstance(key, tuple) and all(_key(part) is not None for part in key)):
        return _encoded(key, [])
    return _refuse(f"a {type(key).__name__} as a key")


def _number(tensor: Tensor, tensors: list[Tensor]) -> int:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        _refuse(f"a tensor of {tensor.dtype}, {tensor.layout}")
    tensors.append(tensor)
    return len(tensors) - 1


def _layout(tensor: Tensor) -> list[int] | None:
    """Strides of a tensor that is dense but not in order of its dimensions, such as a
    channels-last one: torch's fused optimisers walk through a parameter and its state in the
    order of their memory."""
    if tensor.is_contiguous():
        return None
    dense = torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format)
    return list(dense.stride())


def _laid_out(tensor: Tensor, stride: list[int] | None) -> Tensor:
    if stride is None:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _places(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins after the header, and the end: no gaps, as the format asks, and
    wide types first, so that each is aligned to its own element size."""
    places, end = [0] * len(tensors), 0
    for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size()):
        places[i] = end
        end += tensors[i].numel() * tensors[i].element_size()
    return places, end


def _header(tensors: list[Tensor], places: list[int], structure: str, checksum: int) -> bytes:
    """The format's: length, then JSON, padded with blanks so that the tensors are aligned."""
    entries: dict[str, Any] = {
        "__metadata__": {"crc32": _checksum(checksum).decode(), "tree": structure}
    }
    for i, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
        end = place + tensor.numel() * tensor.element_size()
        entries[str(i)] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _checksum(value: int) -> bytes:
    return b"0x%08x" % value


def _header_end(file: memoryview | bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")
