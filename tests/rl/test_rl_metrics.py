import re
from dataclasses import fields

import numpy as np

from bittrue.rl.metrics import METRICS, StepReports, flatten
from bittrue.rl.parity import Parity, Selection
from bittrue.rl.reports import CorrectionReport, GroupReport, PolicyReport

REPORTS = StepReports(
    groups=GroupReport(8, {"all_zero": 2, "unscored": 1}, 0.25, 0.25, 0.0),
    policy=PolicyReport(1.0, 0.5, 2.0, 0.1, 0.2, 0.3, 0.01),
    correction=CorrectionReport(1.1, 0.2, 3.0, 0.9, 0.4, 0.5, 0.6, 0.7),
    sequence_mask=CorrectionReport(1.1, 0.2, 3.0, 0.9, 0.0, 0.8, 0.85, 0.7),
    parity=Parity(10, 3, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, np.zeros(1), None),
    routing=Selection(10, 0.1, 0.2, 0.95, 0.0, 3),
    index=Selection(10, 0.3, 0.4, 0.85, 0.0, 4),
)


def test_a_name_and_a_meaning_occur_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_@{}/]+", name) for name in names)
    sources = [metric.source for metric in METRICS if metric.source]
    assert len(set(sources)) == len(sources)
    assert all(metric.meaning.endswith(".") for metric in METRICS)


def test_every_number_of_a_report_has_a_name() -> None:
    named = {metric.source for metric in METRICS}
    unnamed = {
        (part.name, field.name)
        for part in fields(StepReports)
        for field in fields(getattr(REPORTS, part.name))
        if (part.name, field.name) not in named
    }
    # The worst of each sequence and the first difference are for the certificate; the shift for the check;
    # off-policy masking bounds no ratio, and its tokens are those of the correction.
    left = {("parity", "worst"), ("parity", "first")}
    left |= {(p, f) for p in ("routing", "index") for f in ("num_tokens", "shifted_overlap", "first_token")}
    ratios = ("ratio_mean", "ratio_min", "ratio_max", "ess", "clipped", "catastrophic")
    assert unnamed == left | {("sequence_mask", field) for field in ratios}


def test_reports_become_numbers_under_their_names() -> None:
    found = flatten(REPORTS)
    assert found["rollout/frac_reward_zero_std"] == 0.25
    assert (found["rollout/dropped/all_zero"], found["rollout/dropped/unscored"]) == (2, 1)
    assert (found["train/clip_ratio/low"], found["train/clip_ratio/high"]) == (0.1, 0.2)
    assert (found["is/ess_ratio"], found["is/masked"], found["opsm/masked"]) == (0.9, 0.5, 0.8)
    assert (found["parity/k3"], found["parity/frac_beyond_ln2"]) == (0.4, 0.6)
    assert (found["parity/router_flips"], found["parity/index_flips"]) == (0.1, 0.3)
    assert all(type(value) is float for value in found.values())


def test_what_was_not_measured_is_not_named() -> None:
    assert flatten(StepReports()) == {}
    assert {name.split("/")[0] for name in flatten(StepReports(policy=REPORTS.policy))} == {"train"}
