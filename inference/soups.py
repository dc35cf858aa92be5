"""Greedy soups: one set of weights that is the mean of several checkpoints of one architecture.

Takes a run folder, writes a further variant `soup` of a group's best candidate where the mean has a
lower calibrated OOF log loss than each checkpoint, and `soups.json`; gives what was tried. At no
time does a record stand over files of another soup. Source: Wortsman et al., Model soups: averaging
weights of multiple fine-tuned models improves accuracy without increasing inference time, ICML
2022.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from pydantic import ConfigDict, TypeAdapter, ValidationError

from foldrace.core.plugins import naming_plugins
from foldrace.inference.run_models import RunModels, best_device
from foldrace.inference.soup_scoring import AveragedModel, Ingredient, Scorer
from foldrace.run_folder.records import (
    CandidateId,
    CandidateSummary,
    MemberName,
    StoredRecord,
    TrialRecord,
    VariantScore,
)
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.variants import EMA, RAW
from foldrace.trainables.models.classifier import ModelConfig
from foldrace.trainables.predict import pack_weights

SOUP = "soup"
_FILE = "ensemble/soups.json"


class SoupTrial(StoredRecord):
    """One member that was tried, in the order of the members' own losses."""

    member: MemberName
    """`c0003 ema`"""
    oof_calibrated_logloss: float | None
    """Calibrated log loss of the soup with it, which decides, in nats; None where a probability is
    not finite."""
    oof_logloss: float | None
    """Uncalibrated log loss of it; None alike."""
    stays: bool


class Soup(StoredRecord):
    """The result of one architecture."""

    model_config = ConfigDict(allow_inf_nan=True)  # JSON has none: such soups are made again

    candidate: CandidateId
    """Whose variant `soup` it is: the one with the best ingredient."""
    backbone: str
    ingredients: tuple[MemberName, ...]
    """`c0003 ema`, the best first; where there is only one, no soup beat it."""
    oof_calibrated_logloss: float
    best_single_oof_calibrated_logloss: float
    """Calibrated log loss of the best ingredient alone, scored as the soup was."""
    oof_logloss: float
    """Uncalibrated log loss."""
    best_single_oof_logloss: float
    """Uncalibrated log loss of the best ingredient alone."""
    tried: tuple[SoupTrial, ...]
    key: str
    """Changes with the members that a group has and with their losses."""

    @property
    def kept(self) -> bool:
        """Say whether there is a soup: a mean that beat its best ingredient."""
        return len(self.ingredients) > 1


def read_soups(store: RunStore) -> list[Soup]:
    """The soups of the last call; none where the file is not whole."""
    try:
        return TypeAdapter(list[Soup]).validate_json(store.files.read(_FILE), strict=True)
    except (OSError, ValidationError):
        return []


def write_soups(store: RunStore, soups: Sequence[Soup]) -> None:
    """Write `ensemble/soups.json`."""
    store.files.write(_FILE, TypeAdapter(list[Soup]).dump_json(list(soups), indent=1))


def soup_trial(model: AveragedModel, stays: bool) -> SoupTrial:
    """The record of trying the ingredient that came last."""
    return SoupTrial(
        member=model.ingredients[-1].name,
        oof_calibrated_logloss=_finite(model.oof_calibrated_logloss),
        oof_logloss=_finite(model.oof_logloss),
        stays=stays,
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def save_soup(scorer: Scorer, model: AveragedModel, model_config: ModelConfig) -> None:
    """Fold by fold, each record last; records of an older soup go before its files."""
    store, best = scorer.models.store, model.ingredients[0]
    plain = [_without_soup(store, record) for record in _trials(store, best.candidate)]
    for fold, record in enumerate(plain):
        score = model.score(fold, record.variants[best.variant].epoch)
        weights = pack_weights(scorer.weights(model.ingredients, fold), model_config)
        store.save_trial(
            record.model_copy(update={"variants": record.variants | {SOUP: score}}),
            oof={SOUP: model.folds[fold]},
            weights={SOUP: weights},
        )


def is_there(store: RunStore, soup: Soup) -> bool:
    """Say whether nothing is left to do for it."""
    if not soup.kept:
        return True
    made = [score.ingredients for score in _scores(store, soup.candidate)]
    is_whole = made == [soup.ingredients] * store.fold_count
    return is_whole and store.has_weights(soup.candidate, SOUP)


def is_last_copy(store: RunStore, candidate: str) -> bool:
    """Say whether a candidate has a soup that could not be made again.

    `ensemble.keep: blend` may have removed what it was made of.
    """
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
    """Scores of the folds that have a soup."""
    return [t.variants[SOUP] for t in _trials(store, candidate) if SOUP in t.variants]


def _trials(store: RunStore, candidate: str) -> list[TrialRecord]:
    """The trials by fold; all of them, where the candidate is complete."""
    found = (store.trial(candidate, fold) for fold in range(store.fold_count))
    return [trial for trial in found if trial is not None]


_MOST_TRIED = 10
_LEAST_GAIN = 1e-6  # nats: another order of additions alone changes a loss by less

Tell = Callable[[str], None]


def make_soups(store: RunStore, workers: int, tell: Tell = lambda line: None) -> tuple[Soup, ...]:
    """Make the soup of every architecture with two or more members.

    Members are raw and EMA weights of complete candidates that are still there. A second call
    scores nothing again where nothing has changed, and leaves a soup whose ingredients' weights
    have been removed since. DataError where the training images are gone, RunFolderError where
    weights are damaged.
    """
    earlier = read_soups(store)
    scorer = Scorer(RunModels(store, best_device()), workers)
    with naming_plugins():
        new = [
            _soup(scorer, model_config, group, earlier, tell)
            for model_config, group in _groups(store, scorer.models)
            if not is_last_copy(store, group[0].candidate)
        ]
    made_of = {soup.candidate for soup in new}
    old = [s for s in earlier if s.kept and s.candidate not in made_of and is_there(store, s)]
    soups = sorted([*old, *new], key=lambda soup: soup.candidate)
    write_soups(store, soups)
    return tuple(soups)


def _groups(store: RunStore, models: RunModels) -> Iterator[tuple[ModelConfig, list[Ingredient]]]:
    """Members of equal architecture, the best first; only groups of two or more."""
    groups: dict[ModelConfig, list[Ingredient]] = defaultdict(list)
    for summary in store.summaries():
        if summary.is_member:
            groups[models.model_config(summary.trials[0])] += _ingredients(store, summary)
    for model_config, group in groups.items():
        if len(group) > 1:
            yield model_config, sorted(group, key=lambda ingredient: ingredient.calibrated_logloss)


def _ingredients(store: RunStore, summary: CandidateSummary) -> Iterator[Ingredient]:
    candidate = summary.candidate.candidate
    for variant in (RAW, EMA):
        if variant in summary.variants and store.has_weights(candidate, variant):
            yield Ingredient(candidate, variant, summary.pooled_calibrated(variant))


def _soup(
    scorer: Scorer,
    model_config: ModelConfig,
    group: Sequence[Ingredient],
    earlier: Sequence[Soup],
    tell: Tell,
) -> Soup:
    """The soup of an earlier call where nothing has changed since, else a new one."""
    store, key = scorer.models.store, _key(scorer.models.store, group)
    same = [soup for soup in earlier if soup.key == key and is_there(store, soup)]
    return same[0] if same else _greedy_soup(scorer, model_config, group, key, tell)


def _greedy_soup(
    scorer: Scorer, model_config: ModelConfig, group: Sequence[Ingredient], key: str, tell: Tell
) -> Soup:
    """The greedy choice, written where it is a soup."""
    best, *others = group[:_MOST_TRIED]
    model = alone = scorer.average([best], model_config)
    tried = [soup_trial(alone, stays=True)]
    for other in others:
        extended = scorer.average([*model.ingredients, other], model_config)
        gain = model.oof_calibrated_logloss - extended.oof_calibrated_logloss
        stays = gain > _LEAST_GAIN
        model = extended if stays else model
        tried.append(soup_trial(extended, stays))
        tell(_line(model_config.backbone, extended, stays))
    soup = Soup(
        candidate=best.candidate,
        backbone=model_config.backbone,
        ingredients=tuple(ingredient.name for ingredient in model.ingredients),
        oof_calibrated_logloss=model.oof_calibrated_logloss,
        best_single_oof_calibrated_logloss=alone.oof_calibrated_logloss,
        oof_logloss=model.oof_logloss,
        best_single_oof_logloss=alone.oof_logloss,
        tried=tuple(tried),
        key=key,
    )
    if soup.kept:
        save_soup(scorer, model, model_config)
    return soup


def _line(backbone: str, model: AveragedModel, stays: bool) -> str:
    done = "stays" if stays else "is left out"
    name = model.ingredients[-1].name
    loss = model.oof_calibrated_logloss
    return f"soup of {backbone}: {name} {done}, OOF log loss with it {loss:.4f}"


def _key(store: RunStore, group: Sequence[Ingredient]) -> str:
    tried = [[i.name, i.calibrated_logloss] for i in group[:_MOST_TRIED]]
    text = json.dumps([store.folds().hash, tried])
    return hashlib.sha256(text.encode()).hexdigest()
