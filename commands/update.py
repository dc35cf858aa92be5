"""The result so far: blend and submission of what is complete, while a sweep goes on.

Called in a worker of the sweep, with a fold trial's cores and GPU. The heavy imports are in the
function: every worker imports this file.
"""

from __future__ import annotations

from foldrace.run_folder.store import RunStore


def write_so_far(run: str, cpus: int, use_gpu: bool) -> None:
    """Blend what is complete and predict the test set.

    A blend whose cross-fitted loss is at least as low stays, and a submission of it, too.
    """
    import torch

    from foldrace.commands.so_far import blend_so_far
    from foldrace.commands.submit import PLAIN, predict_test_set
    from foldrace.console.terminal import Terminal
    from foldrace.core.consent import allow_plugins

    torch.set_num_threads(cpus)
    store = RunStore.open(run)
    allow_plugins(store.plugins(), remember=False)  # the driver, whose worker this is, has asked
    blend, submission = blend_so_far(store), store.submission()
    is_of_it = submission is not None and submission.crossfit_logloss == blend.crossfit_logloss
    if store.config().data.test is not None and not is_of_it:
        screen = Terminal(quiet=True)
        on_cpu = not use_gpu
        predict_test_set(store, PLAIN, None, screen, on_cpu, workers=cpus, is_interim=True)
