"""Where the time of a round goes that is not training, from a profile of `hold_round`.

A part is a list of calls (caller, called function); the calls of all parts are disjoint, so their times add up.
"""

from __future__ import annotations

import cProfile
import pstats
from pathlib import Path

Call = tuple[str, str]  # caller, "file stem:function"

TRAINING: tuple[Call, ...] = (("train", "loop:train_round"),)
PARTS: dict[str, tuple[Call, ...]] = {
    "copies of messages": (("push_messages", "copy:deepcopy"), ("pull_messages", "copy:deepcopy")),
    "codec": (
        ("<listcomp>", "codec:encode"),
        ("answer", "codec:encode"),
        ("egress", "codec:encode"),
        ("_order", "codec:decode_order"),
        ("_declared", "codec:decode_reply"),
        ("_read", "codec:decode_reply"),
    ),
    "manifest": (("handle", "manifest:objections"), ("_declared", "manifest:check_reply")),
    "policy, with the plan's epsilon": (("_answer", "site:_check_policy"),),
    "ledger": (
        ("<listcomp>", "ledger:reserve"),
        ("_answer_once", "ledger:commit"),
        ("_answer_once", "site:_ledger"),
    ),
    "site's store, read": (
        ("_answer", "site:_enrolled"),
        ("_answer_once", "store:reply"),
        ("_answer_once", "store:last_round"),
        ("_task", "store:cohort"),
        ("_do", "store:last_state"),
    ),
    "site's store, written": (("_answer_once", "store:save_state"), ("_answer_once", "store:save_reply")),
    "networks and optimisers rebuilt": (
        ("train", "state:start"),
        ("train", "state:restore"),
        ("train", "state:tensors"),
    ),
    "randomness keyed by the order": (("_task", "site:_stream"),),
    "site's log": (("handle", "site:_log"),),
    "aggregation": (
        ("hold_round", "aggregation:screen"),
        ("hold_round", "aggregation:weighted_mean"),
        ("hold_round", "aggregation:moving_average"),
        ("<dictcomp>", "aggregation:update_norm"),
    ),
    "checkpoint": (("hold_round", "checkpoint:save"),),
    "evidence": (("hold_round", "round:_record_once"),),
    "telemetry, with the epsilon so far": (("hold_round", "round:_tell"),),
}


def shares(profile: cProfile.Profile) -> list[tuple[str, float]]:
    """(part, fraction of what is not training), largest first; `other` is what no part names."""
    spent = _seconds_by_call(profile)
    # The profile was taken with `runcall`, so the whole of it is the one function that nobody in it calls.
    overhead = spent["", "round:hold_round"] - sum(spent.get(call, 0.0) for call in TRAINING)
    parts = {part: sum(spent.get(call, 0.0) for call in calls) / overhead for part, calls in PARTS.items()}
    parts["other"] = 1.0 - sum(parts.values())
    return sorted(parts.items(), key=lambda entry: -entry[1])


def _seconds_by_call(profile: cProfile.Profile) -> dict[Call, float]:
    """Cumulative seconds by (caller, called function); caller "" holds the function's total."""
    spent: dict[Call, float] = {}
    for (file, _, function), (_, _, _, total, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        name = f"{Path(file).stem}:{function}"
        spent["", name] = spent.get(("", name), 0.0) + total
        for (_, _, caller), (_, _, _, seconds) in callers.items():
            spent[caller, name] = spent.get((caller, name), 0.0) + seconds
    return spent
