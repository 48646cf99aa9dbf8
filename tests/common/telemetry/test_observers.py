import io
import json
from datetime import UTC, datetime

from common.telemetry.events import CampaignStarted, Progress, RoundFinished, SiteExcluded, StageFinished, ignore
from common.telemetry.logs import events_file, fan_out
from common.telemetry.metrics import metrics_file
from common.telemetry.show import showing

STARTED = CampaignStarted(study="demo", sites=3, rounds=4, first_round=1, simulated=True)
EXCLUDED = SiteExcluded(site="site-2", round=1, reason="reply after deadline")


def round_finished(number, spent=1.5):
    return RoundFinished(round=number, rounds=4, sites_used=2, sites_excluded=1, epsilon_spent=spent, seconds=2.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def noon():
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


def test_events_are_lines_of_json_and_progress_is_told_once_a_task(tmp_path):
    write = events_file(tmp_path / "events.jsonl", noon)
    for event in (STARTED, *(Progress(task="scoring", done=n, total=5) for n in range(6)), round_finished(1)):
        write(event)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["CampaignStarted", "Progress", "RoundFinished"]
    assert lines[2]["epsilon_spent"] == 1.5
    assert lines[2]["time"] == "2026-01-01T12:00:00.000+00:00"


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "Round')
    events_file(path, noon)(EXCLUDED)
    assert json.loads(path.read_text().splitlines()[1])["site"] == "site-2"


def test_every_observer_is_told_in_order():
    told = []
    fan_out(lambda e: told.append(("first", e)), ignore, lambda e: told.append(("second", e)))(EXCLUDED)
    assert told == [("first", EXCLUDED), ("second", EXCLUDED)]


def test_metrics_count_rounds_epsilon_and_exclusions(tmp_path):
    path = tmp_path / "metrics.prom"
    count = metrics_file(path)
    for event in (STARTED, round_finished(1), EXCLUDED, round_finished(2, spent=2.5)):
        count(event)
    count(StageFinished(stage="training", outcome="done", seconds=5.0))
    lines = path.read_text().splitlines()
    for line in (
        "consilium_rounds_total 2.0",
        "consilium_epsilon_spent 2.5",
        "consilium_sites_used 2.0",
        'consilium_sites_excluded_total{site="site-2"} 1.0',
        "consilium_round_seconds_sum 5.0",
        'consilium_stage_seconds{outcome="done",stage="training"} 5.0',
    ):
        assert line in lines


def test_training_without_privacy_shows_no_epsilon_instead_of_zero(tmp_path):
    metrics_file(tmp_path / "metrics.prom")(round_finished(1, spent=None))
    assert "epsilon" not in (tmp_path / "metrics.prom").read_text()


def test_a_terminal_sees_rounds_epsilon_and_what_went_wrong():
    terminal = Terminal()
    with showing(stream=terminal) as observe:
        observe(STARTED)
        for done in range(3):
            observe(Progress(task="warm start", done=done, total=2))
        observe(round_finished(1))
        observe(EXCLUDED)
        observe(StageFinished(stage="training", outcome="done", seconds=5.0))
    shown = terminal.getvalue()
    for part in ("simulated campaign demo: 3 sites, 4 rounds", "1/4", "epsilon 1.50", "site-2 left out", "(5.0 s)"):
        assert part in shown


def test_nothing_is_shown_in_a_pipe_or_with_json():
    pipe, terminal = io.StringIO(), Terminal()
    with showing(stream=pipe) as one, showing(stream=terminal, quiet=True) as other:
        for event in (STARTED, round_finished(1), EXCLUDED):
            one(event)
            other(event)
    assert (pipe.getvalue(), terminal.getvalue()) == ("", "")
