"""An exported blend against the run's own: images a second, memory, size and log loss of each form.

    python benchmarks/export.py --data RUN

RUN is a finished run folder whose data are in place. Each form predicts the same training images
from their files in a process of its own, on the CPU: `Predictor`, the bundle, and the graphs in
float32, float16 and 8 bits. The losses are of OOF rows, each by the models that have not seen it.
Without --data the blend is of untrained models (five ResNet-18 and five MobileNet-V3 at 128 px),
whose losses mean nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Results, environment, options

from foldrace.export.blend import open_blend
from foldrace.export.bundle import write_bundle
from foldrace.export.folder import new_folder
from foldrace.export.onnx_folder import HALF, INT8, PLAIN, write_onnx
from foldrace.run_folder.belonging import training_data
from foldrace.run_folder.store import RunStore

_IMAGES, _FEW = 256, 64

_LOADED = """
import json, sys, time
paths = json.load(open(sys.argv[1]))
start = time.perf_counter()
"""
_TIMED = """
loaded = time.perf_counter() - start
predict(paths[:16])
runs, cpu = [], []
for _ in range(3):
    start, used = time.perf_counter(), time.process_time()
    predict(paths)
    runs.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) / 1e3  # ru_maxrss would have the parent's, too
print(json.dumps([len(paths) / min(runs), 1000 * min(cpu) / len(paths), loaded, peak]))
"""
_RUN = """
from foldrace.inference.predictor import Predictor
from pathlib import Path
predictor = Predictor({folder!r}, {workers}, device="cpu")
predict = lambda paths: predictor.probabilities([Path(path) for path in paths])
"""
_EXPORT = """
sys.path.insert(0, {folder!r})
from predict import Blend
predict = Blend({folder!r}{graph})
"""


def main() -> None:
    given = options(__doc__, data="a finished run folder")
    results = Results("export")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = RunStore.open(given.data) if given.data else _untrained(folder)
        _measure(results, store, folder, _FEW if given.quick else _IMAGES)
    results.publish(given)


def _measure(results: Results, store: RunStore, folder: Path, count: int) -> None:
    blend = open_blend(store)
    with new_folder(folder / "bundle") as made:
        parity = write_bundle(blend, made, 2)
    with new_folder(folder / "onnx") as made:
        onnx_parity, measured = write_onnx(blend, made, fp16=True, int8=True, workers=2)
    manifest = training_data(store)
    files = [str(manifest.file(row % len(manifest))) for row in range(0, 7 * count, 7)]
    (folder / "paths.json").write_text(json.dumps(files))
    part = f"{store.config().name}: {len(blend.members)} members, {blend.folds} folds each"
    size = sum(file.stat().st_size for file in (folder / "bundle").rglob("*.safetensors"))
    own = _timed(folder, _RUN.format(folder=store.root, workers=2))
    results.add(part, form="Predictor", MB=size / 1e6, **own, max_difference=0.0)
    bundle = _timed(folder, _EXPORT.format(folder=str(folder / "bundle"), graph=""))
    results.add(
        part,
        form="bundle",
        MB=size / 1e6,
        **bundle,
        max_difference=parity.max_difference_from_files,
    )
    for each in measured:
        code = _EXPORT.format(folder=str(folder / "onnx"), graph=f", {each.file!r}")
        difference = onnx_parity.max_difference_from_files if each.file == PLAIN else None
        results.add(
            part, form=each.file, MB=each.bytes / 1e6, **_timed(folder, code),
            max_difference=difference, ms_of_models=each.ms_per_image, logloss=each.oof_logloss,
            change=each.change, change_se=each.change_se, accuracy=each.accuracy,
        )  # fmt: skip
    assert [each.file for each in measured] == [PLAIN, HALF, INT8]
    results.at_most(f"{part}: difference of the float32 graph", 1e-4, onnx_parity.max_difference)


def _timed(folder: Path, code: str) -> dict[str, float]:
    """Images a second, CPU time, seconds to load, and memory of a process that predicts them."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADED + code + _TIMED, str(folder / "paths.json")],
        cwd=folder, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    names = ("images_per_s", "cpu_ms_per_image", "load_s", "peak_MB")
    return dict(zip(names, found, strict=True))


def _untrained(folder: Path) -> RunStore:
    """A run of untrained models on images of noise."""
    import numpy as np
    from PIL import Image

    from tests.export.exported_runs import MadeModel, make_run

    rng = np.random.default_rng(0)
    for i in range(200):
        path = folder / "images" / "abcd"[i % 4] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(path)
    models = [
        MadeModel(name, 0.5, image_size=128)
        for name in ("timm/resnet18", "timm/mobilenetv3_large_100")
    ]
    return make_run(folder / "untrained", folder / "images", models, k=5)


if __name__ == "__main__":
    main()
