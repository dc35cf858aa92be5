"""What soups leave in the run folder: a variant of the best ingredient's trials, and `soups.json`.

Takes and gives records and weights; at no time does a record stand over files of another soup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from experiment.records import TrialRecord, VariantScore
from experiment.store import RunStore
from inference.soup_scoring import Scorer, Served
from trainables.card import ModelCard
from trainables.predict import pack_weights

SOUP = "soup"
_FILE = "ensemble/soups.json"


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


def read_soups(store: RunStore) -> list[Soup]:
    """Those of the last call; none where the file is not whole."""
    try:
        return TypeAdapter(list[Soup]).validate_json(store.files.read(_FILE))
    except (OSError, ValidationError):
        return []


def write_soups(store: RunStore, soups: Sequence[Soup]) -> None:
    store.files.write(_FILE, TypeAdapter(list[Soup]).dump_json(list(soups), indent=1))


def tasted(served: Served, stays: bool) -> Taste:
    """Of the ingredient that came last."""
    loss = served.oof_logloss
    finite = loss if math.isfinite(loss) else None
    return Taste(member=served.ingredients[-1].name, oof_logloss=finite, stays=stays)


def save_soup(scorer: Scorer, served: Served, card: ModelCard) -> None:
    """Fold by fold, each record last; records of an older soup go before its files."""
    store, best = scorer.models.store, served.ingredients[0]
    plain = [_without_soup(store, record) for record in _trials(store, best.candidate)]
    for fold, record in enumerate(plain):
        score = served.score(fold, record.variants[best.variant].best_epoch)
        weights = pack_weights(scorer.weights(served.ingredients, fold), card)
        store.save_trial(
            record.model_copy(update={"variants": record.variants | {SOUP: score}}),
            oof={SOUP: served.folds[fold]},
            weights={SOUP: weights},
        )


def is_there(store: RunStore, soup: Soup) -> bool:
    """Whether nothing is left to do for it."""
    if not soup.kept:
        return True
    made = [score.ingredients for score in _scores(store, soup.candidate)]
    is_whole = made == [soup.ingredients] * store.fold_count
    return is_whole and store.has_weights(soup.candidate, SOUP)


def is_last_copy(store: RunStore, candidate: str) -> bool:
    """Whether a candidate has a soup that could not be made again, as `ensemble.keep: blend`
    removed what it was made of."""
    scores = _scores(store, candidate)
    if len(scores) < store.fold_count or not store.has_weights(candidate, SOUP):
        return False
    names = [name.split() for name in scores[0].ingredients]
    return not all(store.has_weights(name, variant) for name, variant in names)


def _without_soup(store: RunStore, record: TrialRecord) -> TrialRecord:
    if SOUP not in record.variants:
        return record
    others = {name: score for name, score in record.variants.items() if name != SOUP}
    plain = record.model_copy(update={"variants": others})
    store.save_trial(plain)
    return plain


def _scores(store: RunStore, candidate: str) -> list[VariantScore]:
    """Of the folds that have a soup."""
    return [t.variants[SOUP] for t in _trials(store, candidate) if SOUP in t.variants]


def _trials(store: RunStore, candidate: str) -> list[TrialRecord]:
    """By fold; all of them, where the candidate is complete."""
    found = (store.trial(candidate, fold) for fold in range(store.fold_count))
    return [trial for trial in found if trial is not None]
