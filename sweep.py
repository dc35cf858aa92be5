"""The command line: parse, call one function, print. No logic lives here.

Heavy packages are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated

try:
    import typer

    from foldrace.console.boundary import exit_codes
    from foldrace.console.terminal import Terminal, screen
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    # The only message that a clone without its environment can give.
    print(
        f"Foldrace is not installed for {sys.executable} (no module {error.name!r}): type `make`, "
        "then `.venv/bin/foldrace`; or `pip install -e .` in the folder of sweep.py",
        file=sys.stderr,
    )
    sys.exit(2)

app = typer.Typer(
    name="foldrace",
    help="Race fold × backbone × hyperparameter trials and blend the best image classifiers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# Names of tables that are too heavy to import for `--help`; a test holds them equal.
METHODS = (
    "greedy, optimal, uniform, top-k, soft-vote, hard-vote, snapshot, geometric, stacking, soup, "
    "auto, or a plugin's"
)
CHOSEN_METRICS = "log_loss, accuracy, macro_f1, balanced_accuracy, qwk, or a plugin's"
TEACHERS = "blend, best, best-fold"
TTAS = "none, flip, flip-rotate, multi-scale, or a plugin's"

Config = Annotated[Path, typer.Argument(help="YAML or JSON file of the sweep.")]
Source = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG|DATA", help="YAML or JSON file; or a folder, zip or table of images."
    ),
]
Data = Annotated[Path, typer.Argument(metavar="DATA", help="Folder, zip or table of images.")]
Time = Annotated[
    str | None,
    typer.Option("--time", help="Wall time of the whole run: 30m, 2h. Key: resources.time_budget."),
]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="Run folder: a path or s3://...")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; repeatable."),
]
Address = Annotated[
    str | None,
    typer.Option(help="A Ray cluster that runs already: auto, or host:port."),
]
DataRoot = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="Where all data lie now, after they have moved."),
]
SetPlace = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=PATH", help="Place of data, as data.test=F; repeatable."),
]
TrustPlugins = Annotated[
    bool,
    typer.Option(
        "--trust-plugins",
        help="Let the run's plugins run here, now and from now on: they are code.",
    ),
]
OtherRuns = Annotated[
    list[str] | None,
    typer.Option("--run", metavar="DIR", help="A further run folder of its blend; repeatable."),
]
Out = Annotated[str | None, typer.Option(help="Run folder. Default: runs/<name>.")]
Tta = Annotated[
    str,
    typer.Option(
        help=f"Average over views of an image: {TTAS}; or a list: flip,scale:1.15,rotate:10."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory for models at a time: 2GB. Default: half of it."),
]
OutFile = Annotated[Path | None, typer.Option("--out", help="File to write.")]


def _print_version(asked: bool) -> None:
    if asked:
        from foldrace import __version__

        print(f"foldrace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    context.obj = debug


@app.command(epilog="Example: foldrace demo --out runs/demo")
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for data and run.")] = Path("runs/demo"),
) -> None:
    """Run a real sweep from nothing, on scikit-learn's handwritten digits."""
    with _exit_codes(context):
        from foldrace.commands.demo import demo as command

        command(out, _console())


@app.command(epilog="Example: foldrace init photos/ --time 2h --out photos.yaml")
def init(
    context: typer.Context,
    data: Data,
    time: Time = None,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("sweep.yaml"),
) -> None:
    """Write the config that `run` would choose for a folder of images, to be changed by hand."""
    with _exit_codes(context):
        from foldrace.commands.init import init as command

        command(data, _overrides(set_, time), out, _console())


@app.command(epilog="Example: foldrace check cars.yaml --set search.candidates=40")
def check(context: typer.Context, config: Source, set_: Set = None, time: Time = None) -> None:
    """Validate config and data, print every problem, train nothing."""
    with _exit_codes(context):
        from foldrace.commands.check import check as command

        command(config, _overrides(set_, time), _console())


@app.command(epilog="Example: foldrace run photos/ --time 30m --out runs/photos")
def run(
    context: typer.Context,
    config: Source,
    time: Time = None,
    out: Out = None,
    set_: Set = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the checks.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny version of the sweep.")] = False,
) -> None:
    """Run the whole job: check, folds, sweep, blend, submission, report."""
    with _exit_codes(context):
        started = monotonic()  # the imports are within the time budget, too
        from foldrace.commands.run import run as command

        command(config, out, _overrides(set_, time), address, dry_run, smoke, _console(), started)


@app.command(epilog="Example: foldrace resume runs/cars --set search.candidates=80")
def resume(
    context: typer.Context,
    folder: Folder,
    set_: Set = None,
    address: Address = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed fold trials again.")
    ] = False,
    data_root: DataRoot = None,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Go on after an interruption, or extend a finished run (--set search.candidates=80)."""
    with _exit_codes(context):
        started = monotonic()
        from foldrace.commands.resume import resume as command

        screen = _console()
        command(
            folder, set_ or (), retry_failed, address, screen, started, data_root, trust_plugins
        )


@app.command(epilog="Example: foldrace split cars.yaml --out folds.csv")
def split(context: typer.Context, config: Config, set_: Set = None, out: OutFile = None) -> None:
    """Write folds.csv alone."""
    with _exit_codes(context):
        from foldrace.commands.split import split as command

        command(config, set_ or (), out, _console())


@app.command(epilog="Example: foldrace augment cars.yaml --set augment.policy=heavy")
def augment(
    context: typer.Context,
    config: Config,
    set_: Set = None,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("grid.png"),
    images: Annotated[int, typer.Option(min=1, max=100, help="Rows of the picture.")] = 6,
) -> None:
    """Draw training images as they are scored, and as training sees them."""
    with _exit_codes(context):
        from foldrace.commands.augment import augment as command

        command(config, set_ or (), out, images, _console())


@app.command(epilog="Example: foldrace doctor")
def doctor(context: typer.Context, address: Address = None) -> None:
    """Look at devices, packages, disks, limits and Ray, and say what to mend."""
    with _exit_codes(context):
        from foldrace.commands.doctor import doctor as command

        command(address, _console())


@app.command(epilog="Example: foldrace status runs/cars --watch")
def status(
    context: typer.Context,
    folder: Folder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep printing until the sweep ends.")
    ] = False,
) -> None:
    """Print the leaderboard and what is left to train."""
    with _exit_codes(context):
        from foldrace.commands.status import status as command

        command(folder, watch, _console())


@app.command(epilog="Example: foldrace trial cars.yaml --backbone timm/resnet18")
def trial(
    context: typer.Context,
    config: Config,
    backbone: Annotated[str, typer.Option(help="Backbone, such as timm/resnet18.")],
    fold: Annotated[int, typer.Option(help="The fold that is scored.")] = 0,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: a temporary one.")] = None,
) -> None:
    """Train one fold trial in this process, without Ray."""
    with _exit_codes(context):
        from foldrace.commands.trial import trial as command

        command(config, backbone, fold, set_ or (), out, _console())


@app.command(epilog="Example: foldrace ensemble runs/cars --method auto --max-members 8")
def ensemble(
    context: typer.Context,
    folder: Folder,
    method: Annotated[str | None, typer.Option(help=f"{METHODS}. Default: the config's.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help=f"What the last selection goes by: {CHOSEN_METRICS}. Default: log_loss."),
    ] = None,
    max_members: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of members in the blend.")
    ] = None,
    max_ms_per_image: Annotated[
        float | None,
        typer.Option(
            help="Maximum ms per image of all models of the blend together, on this machine."
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum total size of the blend's weight files, in bytes."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out a candidate, one variant ('c0001 ema') or a backbone; RUN: before it "
            "means that run folder only (':c0001' is that of DIR). Repeatable."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Force a member into the blend; named as in --exclude. Repeatable."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=OOF[:TEST]",
            help="Predictions made elsewhere, CSV or npy; NAME=:TEST has no OOF. Repeatable.",
        ),
    ] = None,
    run_: Annotated[
        list[str] | None,
        typer.Option("--run", metavar="DIR", help="A further run folder to blend; repeatable."),
    ] = None,
    data_root: DataRoot = None,
    set_: SetPlace = None,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Blend again from the stored OOF predictions."""
    with _exit_codes(context, "interrupted; the old blend is unchanged"):
        from foldrace.commands.ensemble import Changes, reblend
        from foldrace.commands.moved_data import DataOptions

        changes = Changes(
            method=method,
            metric=metric,
            max_members=max_members,
            max_ms_per_image=max_ms_per_image,
            max_bytes=max_bytes,
            exclude=tuple(exclude or ()),
            include=tuple(include or ()),
        )
        data = DataOptions(data_root, set_ or ())
        reblend(folder, changes, add or (), run_ or (), _console(), data, trust_plugins)


@app.command(epilog="Example: foldrace submit runs/cars --tta flip --out flip.csv")
def submit(
    context: typer.Context,
    folder: Folder,
    tta: Annotated[
        str,
        typer.Option(
            help=f"As for predict ({TTAS}; or a list); auto: what pays on OOF rows, or none."
        ),
    ] = "none",
    members: Annotated[
        str | None,
        typer.Option(help="Only the blend's N strongest members, or names: 2; c0007,c0001."),
    ] = None,
    zipped: Annotated[
        bool, typer.Option("--zip", help="Write it as a zip beside the CSV, too.")
    ] = False,
    float_format: Annotated[
        str, typer.Option(help="How probabilities are written, such as %.6f.")
    ] = "%.9g",
    prior_shift: Annotated[
        str,
        typer.Option(help="Other class frequencies in the test set: tell them, or apply them."),
    ] = "tell",
    max_memory: MaxMemory = None,
    out: OutFile = None,
    test: Annotated[
        str | None, typer.Option(help="Another test set: a CSV, a folder or zip of images.")
    ] = None,
    test_images: Annotated[
        str | None, typer.Option(help="Folder or zip that its paths are relative to.")
    ] = None,
    sample_submission: Annotated[
        str | None, typer.Option(help="CSV with its ids and columns.")
    ] = None,
    data_root: DataRoot = None,
    set_: SetPlace = None,
    trust_plugins: TrustPlugins = False,
    run_: OtherRuns = None,
) -> None:
    """Predict the test set with the blend; write the submission and its receipt."""
    with _exit_codes(context):
        from foldrace.commands.moved_data import DataOptions
        from foldrace.commands.submit import How
        from foldrace.commands.submit import submit as command

        data = DataOptions(data_root, set_ or (), test, test_images, sample_submission)
        how = How(tta, members, max_memory, zipped, float_format, prior_shift)
        command(folder, how, out, _console(), data, trust_plugins, run_ or ())


@app.command(epilog="Example: foldrace predict runs/cars photo.jpg photos/ --out classes.csv")
def predict(
    context: typer.Context,
    folder: Folder,
    paths: Annotated[list[Path] | None, typer.Argument(help="Images, folders or zips.")] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="A table of paths, relative to itself.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Its column of paths. Default: image_path or the likely one."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="The likeliest classes in place of all classes."),
    ] = None,
    tta: Tta = "none",
    max_memory: MaxMemory = None,
    out: OutFile = None,
    trust_plugins: TrustPlugins = False,
    run_: OtherRuns = None,
) -> None:
    """Print class, confidence and probabilities of any images."""
    with _exit_codes(context, "interrupted; nothing was written"):
        from foldrace.commands.predict import Asked
        from foldrace.commands.predict import predict as command

        asked = Asked(tuple(paths or ()), table, column, top_k, tta, max_memory)
        command(folder, asked, out, _console(), trust_plugins, run_ or ())


@app.command(epilog="Example: foldrace compare runs/cars runs/cars2 --out comparison")
def compare(
    context: typer.Context,
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR DIR...", help="Two run folders or more.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: comparisons/<time>.")
    ] = None,
    no_test: Annotated[bool, typer.Option("--no-test", help="Leave the test sets out.")] = False,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Compare runs image by image: differences, agreement, and their blends together."""
    with _exit_codes(context):
        from foldrace.commands.compare import compare as command

        command(folders, out, _console(), trust_plugins, no_test)


@app.command(epilog="Example: foldrace evaluate runs/cars --data labelled/ --explain 24")
def evaluate(
    context: typer.Context,
    folder: Folder,
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled images: a folder per class, a table or a zip of either."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder. Default: DIR/evaluations/run_<time>_<id>.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Mistakes on the images trained on, too (runs models).")
    ] = False,
    explain: Annotated[
        int, typer.Option(min=0, max=1000, help="Activation maps of so many highest losses.")
    ] = 0,
    data_root: DataRoot = None,
    set_: SetPlace = None,
    trust_plugins: TrustPlugins = False,
    run_: OtherRuns = None,
) -> None:
    """Write a row an image, the mistakes, metrics, confusions; show what models look at."""
    with _exit_codes(context):
        from foldrace.commands.evaluate import Asked
        from foldrace.commands.evaluate import evaluate as command
        from foldrace.commands.moved_data import DataOptions

        asked = Asked(data, train, explain, out)
        places = DataOptions(data_root, set_ or ())
        command(folder, asked, _console(), places, trust_plugins, run_ or ())


@app.command(epilog="Example: foldrace labels runs/cars")
def labels(
    context: typer.Context,
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option(help="New folder. Default: DIR/labels/run_<time>_<id>.")
    ] = None,
    most: Annotated[
        int, typer.Option(min=1, max=20_000, help="Maximum number of images on the page.")
    ] = 1000,
    data_root: DataRoot = None,
    set_: SetPlace = None,
    trust_plugins: TrustPlugins = False,
    run_: OtherRuns = None,
) -> None:
    """Find labels that look wrong, and write a page to keep, relabel or drop them by keyboard."""
    with _exit_codes(context):
        from foldrace.commands.labels import labels as command
        from foldrace.commands.moved_data import DataOptions

        places = DataOptions(data_root, set_ or ())
        command(folder, out, most, _console(), places, trust_plugins, run_ or ())


@app.command(epilog="Example: foldrace distill runs/cars --backbone timm/resnet18 --refit")
def distill(
    context: typer.Context,
    folder: Folder,
    backbone: Annotated[
        list[str] | None,
        typer.Option(help="Student's backbone; repeatable. Default: the best candidate's."),
    ] = None,
    candidates: Annotated[int, typer.Option(min=0, help="Number of students to try.")] = 4,
    teacher: Annotated[str, typer.Option(help=f"Who teaches: {TEACHERS}.")] = "blend",
    unlabelled: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder or zip of further images, without labels."),
    ] = None,
    test: Annotated[
        bool, typer.Option("--test", help="Learn from the run's test images, too.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Train the best student on all images, to deploy it.")
    ] = False,
    time: Time = None,
    set_: Set = None,
    address: Address = None,
    data_root: DataRoot = None,
    trust_plugins: TrustPlugins = False,
) -> None:
    """Train small students that imitate the blend, as further candidates of the run."""
    with _exit_codes(context):
        started = monotonic()
        from foldrace.commands.distill import Wish
        from foldrace.commands.distill import distill as command

        wish = Wish(tuple(backbone or ()), candidates, teacher, unlabelled, test, refit)
        changes = _overrides(set_, time)
        command(folder, wish, changes, address, _console(), started, data_root, trust_plugins)


@app.command(epilog="Example: foldrace export runs/cars cars-onnx --format onnx --int8")
def export(
    context: typer.Context,
    folder: Folder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    form: Annotated[
        str, typer.Option("--format", help="bundle (weights, for torch and timm), or onnx.")
    ] = "bundle",
    members: Annotated[int | None, typer.Option(min=1, help="Only the N heaviest members.")] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="ONNX: also with models in 16 bits.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="ONNX: also quantised to 8 bits.")] = False,
    kaggle: Annotated[
        bool, typer.Option("--kaggle", help="Add offline wheels and a notebook that submits.")
    ] = False,
    data_root: DataRoot = None,
    set_: SetPlace = None,
    trust_plugins: TrustPlugins = False,
    run_: OtherRuns = None,
) -> None:
    """Write the blend as a folder that runs without Foldrace."""
    with _exit_codes(context, "interrupted; nothing was written"):
        from foldrace.commands.export import ExportOptions
        from foldrace.commands.export import export as command
        from foldrace.commands.moved_data import DataOptions

        options = ExportOptions(form, members, fp16, int8, kaggle)
        data = DataOptions(data_root, set_ or ())
        command(folder, out, options, _console(), data, trust_plugins, run_ or ())


@app.command(epilog="Example: foldrace report runs/cars")
def report(context: typer.Context, folder: Folder) -> None:
    """Write the HTML report."""
    with _exit_codes(context):
        from foldrace.commands.report import report as command

        command(folder, _console())


def _overrides(set_: list[str] | None, time: str | None) -> list[str]:
    """The overrides of --set, and --time as one of them."""
    return [*(set_ or ()), *([f"resources.time_budget={time}"] if time is not None else [])]


def _console() -> Terminal:
    return Terminal(screen(sys.stdout))


@contextmanager
def _exit_codes(
    context: typer.Context,
    interrupted: str = (
        "interrupted; if the run had started, continue it with `foldrace resume DIR`"
    ),
) -> Iterator[None]:
    with exit_codes(bool(context.obj), interrupted):
        yield


def _debug_first(arguments: list[str]) -> list[str]:
    """The arguments with a `--debug` that stands after the command's name before it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    ours = [argument for argument in arguments[:end] if argument != "--debug"]
    return [*["--debug"][: end - len(ours)], *ours, *arguments[end:]]


def main() -> None:
    """The `foldrace` entry point."""
    from foldrace.console.process_list import take_arguments

    app(args=_debug_first(take_arguments()))


if __name__ == "__main__":
    main()
