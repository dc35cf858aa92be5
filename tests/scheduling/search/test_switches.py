"""A switch stays true or false: from the YAML to a candidate, its file, Optuna's and the table."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.load import parse_config
from foldrace.run_folder.tables import leaderboard_csv
from foldrace.scheduling.search.export import open_exporter
from foldrace.scheduling.search.samplers import SAMPLERS
from foldrace.scheduling.search.study import open_study
from foldrace.search_spaces.space import build_space
from tests.scheduling.search.searches import ended, tell

YAML = """
data: {train: t}
training: {channels_last: false, gradient_checkpointing: true}
search:
  backbones: [timm/test_resnet, timm/test_vit]
  candidates: 12
  sampler: %s
  space: {compile: {choices: [true, false]}, pretrained: {choices: [true, false, weights]},
          clip_grad: search, momentum: search}
  per_backbone: {timm/test_vit: {gradient_checkpointing: false, channels_last: search}}
"""


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "list"])
def test_switches_come_back_as_they_were(
    make_tiny_run: Callable[..., Any], tmp_path: Path, sampler: str
) -> None:
    store = make_tiny_run().store
    (tmp_path / "c.yaml").write_text(YAML % sampler, encoding="utf-8")
    config = parse_config(tmp_path / "c.yaml").require()
    store.save_config(config)
    assert store.config() == config
    space, problems = build_space(store.config(), "")
    study = open_study(store, config, space)
    exporter = open_exporter(store, config, space)
    assert exporter is not None
    summaries = []
    for number in range(12):
        record = study.ask(number)
        assert record is not None and not problems
        store.save_candidate(record)
        again = store.candidate(record.candidate)
        assert again == record and repr(again) == repr(record)  # True is no 1
        params = TrialParams.from_dict(again.params)
        switches = (params.compile, params.channels_last, params.gradient_checkpointing)
        assert {type(switch) for switch in switches} == {bool}
        assert params.pretrained in (True, False, str(tmp_path / "weights"))
        is_vit = record.backbone == "timm/test_vit"
        assert params.gradient_checkpointing is not is_vit
        assert is_vit or params.channels_last is False
        summaries.append(ended(record, "complete", (0.5 + number / 100, 0.4)))
        for listener in (study, exporter):
            listener.candidate_started(record)
            tell(listener, summaries[-1])
    exporter.close()
    drawn = [summary.candidate.params for summary in summaries]
    assert {params["compile"] for params in drawn} == {True, False}
    assert len({str(params["pretrained"]) for params in drawn}) > 1

    storage = JournalStorage(JournalFileBackend(f"{store.root}/study.journal"))
    [name] = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=name, storage=storage).get_trials()
    kept = {t.user_attrs["candidate"]: t.params["compile"] for t in trials}
    given = {s.candidate.candidate: s.candidate.params["compile"] for s in summaries}
    assert kept == given and {type(on) for on in kept.values()} == {bool}

    table = pd.read_csv(io.StringIO(leaderboard_csv(summaries))).set_index("candidate")
    assert table["hp.compile"].dtype == bool
    assert table["hp.compile"].to_dict() == given


def test_a_grid_goes_over_both_positions(make_tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    store = make_tiny_run().store
    text = """
data: {train: t}
training: {lr: 0.01, weight_decay: 0, warmup: 0, dropout: 0, drop_path: 0, label_smoothing: 0}
augment: {policy: none, flip: 0, mixup_alpha: 0, mixup_prob: 0}
search: {backbones: [timm/a], candidates: 9, sampler: grid, space: {compile: search}}
"""
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    config = parse_config(tmp_path / "c.yaml").require()
    study = open_study(store, config, build_space(config, "")[0])
    asked = []
    for number in range(3):
        asked.append(study.ask(number))
        if asked[-1] is not None:
            study.candidate_started(asked[-1])
    assert {record.params["compile"] for record in asked if record} == {True, False}
    assert asked[2] is None
