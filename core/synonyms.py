"""What a name was meant to be: names of other tools for our keys and parts, and misspellings.

Takes a name and those that are allowed, gives the words of a hint.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SYNONYMS: dict[str, tuple[str, ...]] = {
    # keys of the config
    "accumulation": ("micro_batch",), "accumulationsteps": ("micro_batch",),
    "accumulategradbatches": ("micro_batch",), "gradaccum": ("micro_batch",),
    "gradaccumsteps": ("micro_batch",), "gradientaccumulation": ("micro_batch",),
    "gradientaccumulationsteps": ("micro_batch",), "alg": ("sampler",), "algorithm": ("sampler",),
    "algo": ("sampler",), "amp": ("precision",), "architecture": ("backbones",),
    "architectures": ("backbones",), "autoaugment": ("policy",), "augmentation": ("policy",),
    "augmentations": ("policy",), "backbone": ("backbones",), "balanced": ("class_weights",),
    "batch": ("batch_size",), "bf16": ("precision",), "bs": ("batch_size",),
    "budget": ("time_budget",), "checkpoint": ("pretrained",), "classmap": ("merge_classes",),
    "classmapping": ("merge_classes",), "cpus": ("cpus_per_trial",), "csv": ("train",),
    "cutmix": ("cutmix_alpha", "cutmix_prob"), "cutout": ("random_erasing",),
    "database": ("storage",), "db": ("storage",), "datadir": ("train",), "dir": ("train",),
    "dropconnect": ("drop_path",), "droppathrate": ("drop_path",), "droprate": ("dropout",),
    "dtype": ("precision",), "ema": ("ema_epochs",), "emadecay": ("ema_epochs",),
    "enabled": ("rule",),
    "erasing": ("random_erasing",), "erasingprob": ("random_erasing",), "files": ("train",),
    "fliplr": ("flip",), "foldcolumn": ("column",), "folder": ("train",), "folds": ("k",),
    "fp16": ("precision",), "gpu": ("gpus_per_trial",), "gpus": ("gpus_per_trial",),
    "gradcheckpointing": ("gradient_checkpointing",), "gradclip": ("clip_grad",),
    "gradclipnorm": ("clip_grad",), "gradientclipping": ("clip_grad",),
    "gradientclipval": ("clip_grad",), "group": ("group_column",), "groups": ("group_column",),
    "groupcol": ("group_column",), "hflip": ("flip",), "holdout": ("test_fraction",),
    "horizontalflip": ("flip",), "imagecol": ("image_column",), "imagedir": ("train_images",),
    "imagefolder": ("train_images",), "images": ("train_images",), "imagesdir": ("train_images",),
    "imgdir": ("train_images",), "imgsize": ("image_size",), "imgsz": ("image_size",),
    "inputsize": ("image_size",), "initlr": ("lr",), "jobs": ("max_concurrent",),
    "label": ("label_column",), "labelcol": ("label_column",), "labels": ("label_column",),
    "layerlrdecay": ("layer_decay",), "layerwisedecay": ("layer_decay",),
    "layerwiselrdecay": ("layer_decay",), "learningrate": ("lr",), "llrd": ("layer_decay",),
    "lr0": ("lr",), "lrscheduler": ("schedule",), "maxepochs": ("epochs",),
    "maxgradnorm": ("clip_grad",), "maxlr": ("lr",), "maxmodels": ("max_members",),
    "maxparallel": ("max_concurrent",), "maxretries": ("max_failures",),
    "maxruntime": ("time_budget",), "maxtime": ("time_budget",), "maxtrials": ("candidates",),
    "mixedprecision": ("precision",), "mixup": ("mixup_alpha", "mixup_prob"),
    "model": ("backbones",), "modelema": ("ema_epochs",), "modelname": ("backbones",),
    "models": ("backbones",), "nepochs": ("epochs",), "nfolds": ("k",),
    "njobs": ("max_concurrent",), "nrepeats": ("repeats",), "numrepeats": ("repeats",),
    "nsplits": ("k",), "ntrials": ("candidates",), "numepochs": ("epochs",), "numfolds": ("k",),
    "numgpus": ("gpus_per_trial",), "numcpus": ("cpus_per_trial",), "numsamples": ("candidates",),
    "numsplits": ("k",), "numtrials": ("candidates",), "nworkers": ("cpus_per_trial",),
    "numworkers": ("cpus_per_trial",), "workers": ("cpus_per_trial",), "opt": ("optimizer",),
    "optim": ("optimizer",), "oversample": ("class_weights",), "parallel": ("max_concurrent",),
    "path": ("train",), "randaug": ("policy", "randaugment"), "randaugment": ("policy",),
    "rdrop": ("rdrop_alpha",), "resolution": ("image_size",), "retries": ("max_failures",),
    "root": ("train",), "runtime": ("time_budget",), "sam": ("sam_rho",),
    "sample": ("sample_submission",), "samplecsv": ("sample_submission",),
    "samples": ("candidates",), "scheduler": ("schedule",), "searchalg": ("sampler",),
    "scoring": ("metric",), "size": ("image_size",), "smoothing": ("label_smoothing",),
    "startlr": ("lr",),
    "stochasticdepth": ("drop_path",), "submissionfile": ("sample_submission",),
    "target": ("label_column",), "targetcol": ("label_column",),
    "targetcolumn": ("label_column",), "testcsv": ("test",), "testdir": ("test",),
    "testsize": ("test_fraction",), "time": ("time_budget",), "timeout": ("time_budget",),
    "timelimit": ("time_budget",), "traincsv": ("train",), "traindir": ("train",),
    "transform": ("policy", "transforms"), "trials": ("candidates",),
    "trivialaugment": ("policy",), "valfraction": ("valid_fraction",),
    "validationsplit": ("valid_fraction",), "valsize": ("valid_fraction",),
    "valsplit": ("valid_fraction",), "warmupepochs": ("warmup",), "warmupsteps": ("warmup",),
    "wd": ("weight_decay",),
    "weightedsampler": ("class_weights",), "weights": ("pretrained",),
    # of a range
    "distribution": ("log",), "loguniform": ("low", "high", "log"), "lower": ("low",),
    "max": ("high",), "maximum": ("high",), "min": ("low",), "minimum": ("low",),
    "options": ("choices",), "quniform": ("low", "high"), "scale": ("log",), "type": ("log",),
    "uniform": ("low", "high"), "upper": ("high",), "values": ("choices",),
    # of the tables' rows and other values
    "asha": ("gain",), "average": ("uniform",), "bayes": ("tpe",), "bayesian": ("tpe",),
    "bfloat16": ("bf16",), "caruana": ("greedy",), "stacking": ("optimal",),
    "ce": ("cross_entropy",),
    "centercrop": ("crop",), "cos": ("cosine",), "cosineannealing": ("cosine",),
    "cosineannealinglr": ("cosine",), "crossentropyloss": ("cross_entropy",),
    "float16": ("fp16",), "float32": ("fp32",), "half": ("fp16",), "hyperband": ("gain",),
    "letterbox": ("pad",), "mean": ("uniform",), "median": ("forgiving",),
    "nll": ("cross_entropy",),
    "off": ("none",), "onecyclelr": ("one_cycle",), "optuna": ("tpe",),
    "reducelronplateau": ("plateau",), "steplr": ("step",), "stretch": ("squash",),
    "trivialaugmentwide": ("trivialaugment",),
}  # fmt: skip
"""Name in other tools, as `plain_name` has it -> our names for the same."""


def plain_name(name: str) -> str:
    """A name as tables of synonyms have it: small letters, no `_` or `-`."""
    return re.sub(r"[-_ ]", "", name.lower())


def closest(name: str, allowed: Iterable[str], n: int = 3) -> list[str]:
    """The names in `allowed` that `name` is probably a misspelling of, best first."""
    return difflib.get_close_matches(name, list(allowed), n=n, cutoff=0.6)


def meant(name: str, allowed: Iterable[str]) -> list[str]:
    """The names in `allowed` that are the same but for case and `_`, or other tools' words for."""
    names = list(allowed)
    alike = [n for n in names if plain_name(n) == plain_name(name)]
    return alike or [n for n in SYNONYMS.get(plain_name(name), ()) if n in names]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """'did you mean 'lr'? ', from synonyms and similar names; empty where nothing is near."""
    names = list(allowed)
    near = meant(name, names) or closest(name, names, n=1)
    return f"did you mean {' and '.join(map(repr, near))}? " if near else ""
