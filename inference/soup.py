"""Greedy soups: one set of weights that is the mean of several checkpoints of one architecture.

Takes a run folder, writes a further variant `soup` of a group's best candidate where the mean has
a lower OOF log loss than each checkpoint; gives what was tried. Source: Wortsman et al., Model
soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
inference time, ICML 2022.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from experiment.plugins import naming_plugins
from experiment.records import CandidateSummary
from experiment.store import RunStore
from experiment.variants import EMA, RAW
from inference.fold_model import RunModels, best_device
from inference.plugins import use_run_plugins
from inference.soup_files import (
    Soup,
    is_last_copy,
    is_there,
    read_soups,
    save_soup,
    tasted,
    write_soups,
)
from inference.soup_scoring import Ingredient, Scorer, Served
from trainables.card import ModelCard

_MOST_TRIED = 10
_LEAST_GAIN = 1e-6  # nats: another order of additions alone changes a loss by less

Tell = Callable[[str], None]


def make_soups(store: RunStore, workers: int, tell: Tell = lambda line: None) -> tuple[Soup, ...]:
    """Of every architecture with two or more members (raw and EMA weights of complete candidates
    that are still there). A second call scores nothing again where nothing has changed, and leaves
    a soup whose ingredients' weights have been removed since. DataError where the training images
    are gone, RunFolderError where weights are damaged."""
    use_run_plugins(store)
    earlier = read_soups(store)
    scorer = Scorer(RunModels(store, best_device()), workers)
    with naming_plugins():
        new = [
            _soup(scorer, card, group, earlier, tell)
            for card, group in _groups(store, scorer.models)
            if not is_last_copy(store, group[0].candidate)
        ]
    made_of = {soup.candidate for soup in new}
    old = [s for s in earlier if s.kept and s.candidate not in made_of and is_there(store, s)]
    soups = sorted([*old, *new], key=lambda soup: soup.candidate)
    write_soups(store, soups)
    return tuple(soups)


def _groups(store: RunStore, models: RunModels) -> Iterator[tuple[ModelCard, list[Ingredient]]]:
    """Members of equal architecture, the best first; only groups of two or more."""
    groups: dict[ModelCard, list[Ingredient]] = defaultdict(list)
    for summary in store.summaries():
        if summary.status == "complete":
            groups[models.card(summary.trials[0])] += _ingredients(store, summary)
    for card, group in groups.items():
        if len(group) > 1:
            yield card, sorted(group, key=lambda ingredient: ingredient.oof_logloss)


def _ingredients(store: RunStore, summary: CandidateSummary) -> Iterator[Ingredient]:
    candidate = summary.candidate.candidate
    for variant in (RAW, EMA):
        if variant in summary.variants and store.has_weights(candidate, variant):
            yield Ingredient(candidate, variant, summary.pooled_logloss(variant))


def _soup(
    scorer: Scorer,
    card: ModelCard,
    group: Sequence[Ingredient],
    earlier: Sequence[Soup],
    tell: Tell,
) -> Soup:
    """That of an earlier call, where nothing has changed since."""
    store, key = scorer.models.store, _key(scorer.models.store, group)
    same = [soup for soup in earlier if soup.key == key and is_there(store, soup)]
    return same[0] if same else _cooked(scorer, card, group, key, tell)


def _cooked(
    scorer: Scorer, card: ModelCard, group: Sequence[Ingredient], key: str, tell: Tell
) -> Soup:
    """The greedy choice, written where it is a soup."""
    best, *others = group[:_MOST_TRIED]
    served = alone = scorer.serve([best], card)
    tried = [tasted(alone, stays=True)]
    for other in others:
        further = scorer.serve([*served.ingredients, other], card)
        stays = further.oof_logloss < served.oof_logloss - _LEAST_GAIN
        served = further if stays else served
        tried.append(tasted(further, stays))
        tell(_line(card.backbone, further, stays))
    soup = Soup(
        candidate=best.candidate,
        backbone=card.backbone,
        ingredients=tuple(ingredient.name for ingredient in served.ingredients),
        oof_logloss=served.oof_logloss,
        best_single_oof_logloss=alone.oof_logloss,
        tried=tuple(tried),
        key=key,
    )
    if soup.kept:
        save_soup(scorer, served, card)
    return soup


def _line(backbone: str, served: Served, stays: bool) -> str:
    done = "stays" if stays else "is left out"
    name = served.ingredients[-1].name
    return f"soup of {backbone}: {name} {done}, OOF log loss with it {served.oof_logloss:.4f}"


def _key(store: RunStore, group: Sequence[Ingredient]) -> str:
    tried = [[i.name, i.oof_logloss] for i in group[:_MOST_TRIED]]
    text = json.dumps([store.folds().hash, tried])
    return hashlib.sha256(text.encode()).hexdigest()
