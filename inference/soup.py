"""Greedy soups: one set of weights that is the mean of several checkpoints of one architecture.

Takes a run folder, writes a further variant `soup` of a group's best candidate where the mean has
a lower OOF log loss than each checkpoint; gives what was tried. Source: Wortsman et al., Model
soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time, ICML 2022.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from experiment.plugins import naming_plugins
from experiment.records import EMA, RAW, CandidateSummary, TrialRecord
from experiment.store import RunStore
from inference.fold_model import RunModels, best_device
from inference.plugins import use_run_plugins
from inference.soup_scoring import Ingredient, Scorer, Served
from trainables.card import ModelCard
from trainables.predict import pack_weights

SOUP = "soup"
_FILE = "ensemble/soups.json"
_MOST_TRIED = 10
_LEAST_GAIN = 1e-6  # nats: another order of additions alone changes a loss by less

Tell = Callable[[str], None]


class Taste(BaseModel):
    """One member that was tried, in the order of the members' own losses."""

    model_config = ConfigDict(frozen=True)

    member: str
    """`c0003 ema`"""
    oof_logloss: float | None
    """Of the soup with it, in nats; None where a probability is not finite."""
    stays: bool


class Soup(BaseModel):
    """What came of one architecture."""

    model_config = ConfigDict(frozen=True)

    candidate: str
    """Whose variant `soup` it is: the one with the best ingredient."""
    backbone: str
    ingredients: tuple[str, ...]
    """`c0003 ema`, the best first; where there is only one, no soup beat it."""
    oof_logloss: float
    best_single_oof_logloss: float
    """Of the best ingredient alone, scored as the soup was."""
    tried: tuple[Taste, ...]
    key: str
    """Changes with the members that a group has and with their losses."""

    @property
    def kept(self) -> bool:
        return len(self.ingredients) > 1


def make_soups(store: RunStore, workers: int, tell: Tell = lambda line: None) -> tuple[Soup, ...]:
    """Of every architecture with two or more members (raw and EMA weights of complete candidates
    that are still there). A second call scores nothing again where nothing has changed, and leaves
    a soup whose ingredients' weights have been removed since. DataError
    where the training images are gone, RunFolderError where weights are damaged."""
    use_run_plugins(store)
    earlier = _read(store)
    scorer = Scorer(RunModels(store, best_device()), workers)
    with naming_plugins():
        new = [
            _soup(scorer, group, earlier, tell)
            for group in _groups(store, scorer.models)
            if not _is_last_copy(store, group[0].candidate)
        ]
    made_of = {soup.candidate for soup in new}
    old = [s for s in earlier if s.kept and s.candidate not in made_of and _is_there(store, s)]
    soups = sorted([*old, *new], key=lambda soup: soup.candidate)
    store.files.write(_FILE, TypeAdapter(list[Soup]).dump_json(soups, indent=1))
    return tuple(soups)


def _groups(store: RunStore, models: RunModels) -> list[list[Ingredient]]:
    """Members of equal architecture, the best first; only groups of two or more."""
    groups: dict[ModelCard, list[Ingredient]] = defaultdict(list)
    for summary in store.summaries():
        if summary.status == "complete":
            groups[models.card(summary.trials[0])] += _ingredients(store, summary)
    ordered = [sorted(group, key=lambda i: i.oof_logloss) for group in groups.values()]
    return [group for group in ordered if len(group) > 1]


def _ingredients(store: RunStore, summary: CandidateSummary) -> Iterable[Ingredient]:
    candidate = summary.candidate.candidate
    for variant in (RAW, EMA):
        if variant in summary.variants and store.has_weights(candidate, variant):
            yield Ingredient(candidate, variant, summary.pooled_logloss(variant))


def _is_last_copy(store: RunStore, candidate: str) -> bool:
    """Whether a candidate has a soup that could not be made again, as `ensemble.keep: blend`
    removed what it was made of."""
    trials = [store.trial(candidate, fold) for fold in range(store.fold_count)]
    soups = [t.variants[SOUP] for t in trials if t is not None and SOUP in t.variants]
    names = [name.split() for name in soups[0].ingredients] if soups else []
    is_whole = len(soups) == store.fold_count and store.has_weights(candidate, SOUP)
    return is_whole and not all(store.has_weights(name, variant) for name, variant in names)


def _soup(scorer: Scorer, group: Sequence[Ingredient], earlier: Sequence[Soup], tell: Tell) -> Soup:
    """That of an earlier call, where nothing has changed since."""
    store = scorer.models.store
    key = _key(store, group)
    same = [soup for soup in earlier if soup.key == key and _is_there(store, soup)]
    return same[0] if same else _cooked(scorer, group, key, tell)


def _cooked(scorer: Scorer, group: Sequence[Ingredient], key: str, tell: Tell) -> Soup:
    """The greedy choice, written where it is a soup."""
    best, *others = group[:_MOST_TRIED]
    trial = scorer.models.store.trial(best.candidate, 0)
    assert trial is not None  # of a complete candidate
    card = scorer.models.card(trial)
    served = alone = scorer.serve([best], card)
    tried = [_taste(alone, stays=True)]
    for other in others:
        further = scorer.serve([*served.ingredients, other], card)
        stays = further.oof_logloss < served.oof_logloss - _LEAST_GAIN
        served = further if stays else served
        tried.append(_taste(further, stays))
        tell(_line(trial.backbone, further, stays))
    soup = Soup(
        candidate=best.candidate,
        backbone=trial.backbone,
        ingredients=tuple(ingredient.name for ingredient in served.ingredients),
        oof_logloss=served.oof_logloss,
        best_single_oof_logloss=alone.oof_logloss,
        tried=tuple(tried),
        key=key,
    )
    if soup.kept:
        _write(scorer, served, card)
    return soup


def _write(scorer: Scorer, served: Served, card: ModelCard) -> None:
    """Fold by fold, each record last. Records of an older soup go first: at no time does one stand
    over files of another soup."""
    store, candidate = scorer.models.store, served.ingredients[0].candidate
    records = [_record(store, candidate, fold) for fold in range(store.fold_count)]
    plain = [
        r.model_copy(update={"variants": {v: s for v, s in r.variants.items() if v != SOUP}})
        for r in records
    ]
    for record, without in zip(records, plain, strict=True):
        if SOUP in record.variants:
            store.save_trial(without)
    for fold, record in enumerate(plain):
        score = served.score(fold, record.variants[served.ingredients[0].variant].best_epoch)
        weights = pack_weights(scorer.weights(served.ingredients, fold), card)
        store.save_trial(
            record.model_copy(update={"variants": record.variants | {SOUP: score}}),
            oof={SOUP: served.folds[fold]},
            weights={SOUP: weights},
        )


def _record(store: RunStore, candidate: str, fold: int) -> TrialRecord:
    record = store.trial(candidate, fold)
    assert record is not None  # of a complete candidate
    return record


def _taste(served: Served, stays: bool) -> Taste:
    loss = served.oof_logloss
    finite = loss if math.isfinite(loss) else None
    return Taste(member=served.ingredients[-1].name, oof_logloss=finite, stays=stays)


def _line(backbone: str, served: Served, stays: bool) -> str:
    done = "stays" if stays else "is left out"
    name = served.ingredients[-1].name
    return f"soup of {backbone}: {name} {done}, OOF log loss with it {served.oof_logloss:.4f}"


def _is_there(store: RunStore, soup: Soup) -> bool:
    """Whether nothing is left to do for it."""
    if not soup.kept:
        return True
    trials = [store.trial(soup.candidate, fold) for fold in range(store.fold_count)]
    made = [t.variants[SOUP].ingredients for t in trials if t and SOUP in t.variants]
    is_whole = made == [soup.ingredients] * store.fold_count
    return is_whole and store.has_weights(soup.candidate, SOUP)


def _key(store: RunStore, group: Sequence[Ingredient]) -> str:
    tried = [[i.name, i.oof_logloss] for i in group[:_MOST_TRIED]]
    text = json.dumps([store.folds().hash, tried])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(store: RunStore) -> list[Soup]:
    """Those of the last call; none where the file is not whole."""
    try:
        return TypeAdapter(list[Soup]).validate_json(store.files.read(_FILE))
    except (OSError, ValidationError):
        return []
