"""Weights into a module: tensors by name, and a backbone's from a file of the user's own.

Everything but that file's classifier must fit: a backbone that is in part random would look like
a pretrained one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foldrace.core.errors import EnvironmentProblem
from foldrace.core.opening import GB, open_regular, unreadable

_MOST_BYTES = 100 * GB
_PICKLES = (b"PK\x03\x04", b"\x80")  # as torch.save begins: a zip, or in old versions a pickle


def weights_file(pretrained: str, backbone: str) -> Path:
    """The file of a backbone's weights under a `training.pretrained` path.

    The path itself, or `<name>.safetensors` in that folder, `<name>` without `timm/`.
    """
    path = Path(pretrained)
    return path / f"{backbone.partition('/')[2]}.safetensors" if path.is_dir() else path


def load_weights(module: nn.Module, file: Path) -> None:
    """Load the tensors of the same name; the file's own classifier is left out.

    What a wrapper or a larger model put before all names (`module.`, `model.backbone.`) is left
    out, too. Raises EnvironmentProblem where one is missing or has another shape.
    """
    own = module.state_dict()
    given = _unwrapped(_read(file), own)
    fitting = {name: tensor for name, tensor in given.items() if name in own}
    _require_shapes(fitting, own, file)
    _require_all(fitting, own, file)
    load_tensors(module, fitting, strict=False)


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], strict: bool = True) -> None:
    """Load tensors that come without PyTorch's record of layout versions.

    Some modules ask for it (torchvision's MNASNet): the tensors are taken to be of their own.
    """
    state = OrderedDict(tensors)
    # Private: `load_state_dict` takes the versions from nowhere else.
    state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(state, strict=strict)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with open_regular(file, _MOST_BYTES) as start:
            if start.read(4).startswith(_PICKLES):
                raise EnvironmentProblem.single(_where(file), _of_pickle(file))
            return load_file(file)
    except OSError as error:
        raise EnvironmentProblem.single(_where(file), unreadable(error)) from error
    except SafetensorError as error:
        raise EnvironmentProblem.single(
            _where(file), f"cannot be read as safetensors: {error}"
        ) from error


def _of_pickle(file: Path) -> str:
    """What a message says of a file that torch.save wrote."""
    return (
        "is a file of torch.save, a pickle, which can run code and is not read. Where you trust "
        'it, convert it once: python -c "import torch, safetensors.torch as s; '
        f"t = torch.load({file.name!r}, weights_only=True); t = t.get('state_dict', t); "
        "s.save_file({k: v.clone() for k, v in t.items() if torch.is_tensor(v)}, "
        f'{file.stem + ".safetensors"!r})"'
    )


def _unwrapped(given: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors without what stands before the names of the most that are `own`."""
    known = set(own)
    before = Counter(
        name.removesuffix(end)
        for name in given
        for parts in (name.split("."),)
        for end in (".".join(parts[i:]) for i in range(len(parts)))
        if end in known
    )
    if not before:
        return given
    most = max(before, key=lambda prefix: (before[prefix], -len(prefix)))
    return {n.removeprefix(most): tensor for n, tensor in given.items() if n.startswith(most)}


def _require_shapes(fitting: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    other = [name for name, tensor in fitting.items() if own[name].shape != tensor.shape]
    if not other:
        return
    file_shape, own_shape = tuple(fitting[other[0]].shape), tuple(own[other[0]].shape)
    raise EnvironmentProblem.single(
        _where(file),
        f"{len(other)} tensors have another shape than the backbone's: {other[0]} is "
        f"{file_shape} in the file, {own_shape} in the backbone; it is of another backbone, or "
        "was trained at another image size (training.image_size)",
    )


def _require_all(fitting: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    """Raise where a weight is missing; counters of batches and position indices may be."""
    missing = [n for n, t in own.items() if n not in fitting and t.is_floating_point()]
    if not missing:
        return
    listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    raise EnvironmentProblem.single(
        _where(file),
        f"fits {len(fitting)} of the backbone's {len(own)} tensors; {len(missing)} are missing: "
        f"{listed}; it is of another backbone, or of another version of it",
    )


def _where(file: Path) -> str:
    return f"training.pretrained: {file}"
