"""Report section: the commands, seeds, versions and config that give the run again."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex

from foldrace.config.load import to_public_yaml
from foldrace.reporting.content import Code, Collapsible, Facts, Heading, Note, Part
from foldrace.reporting.context import ReportContext
from foldrace.reporting.formats import UNKNOWN

_PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "albumentations", "ray", "optuna",
    "numpy", "pandas", "scikit-learn", "scipy", "numba", "matplotlib",
)  # fmt: skip


def reproduce(ctx: ReportContext) -> list[Part]:
    """List the commands, the config and the versions."""
    folder = shlex.quote(ctx.store.root)
    saved = shlex.quote(f"{ctx.store.root}/sweep.yaml")
    commands = (
        f"foldrace run {saved} --out NEW   # the same sweep again, in a new folder\n"
        f"foldrace resume {folder}   # go on after an interruption\n"
        f"foldrace submit {folder}   # predict the test set with the blend"
    )
    facts = [
        ("Folds hash", ctx.store.folds().hash),
        ("Fold seed", str(ctx.config.folds.seed)),
        ("Search seed", str(ctx.config.search.seed)),
        ("Devices", _devices(ctx)),
        *_versions(),
    ]
    return [
        Code(commands),
        Heading("Seeds and versions"),
        Note("Versions are those of the machine that wrote this page."),
        Facts(tuple(facts)),
        Collapsible("sweep.yaml, the resolved config", (Code(to_public_yaml(ctx.config)),)),
    ]


def _devices(ctx: ReportContext) -> str:
    names = sorted({t.device for s in ctx.summaries for t in s.trials if t.device})
    return ", ".join(names) or UNKNOWN


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
