"""A policy.yaml is changed where a list changes, and nowhere else."""

import pytest
import yaml
from small_site import COORDINATOR, STUDY_DIGEST, approval, policy

from client.policy_text import policy_text
from common.privacy.ledger_witness import public_hex
from common.settings.load import parse_settings, settings_yaml
from common.settings.site import OrderKind, SitePolicy

COMMENTED = f"""\
# Approved by the committee.
studies:            # one line for each
  - digest: {STUDY_DIGEST}
    study: tiny
    coordinator_key: {public_hex(COORDINATOR)}
    approved_by: Dr. Test     # deputy
    approved_on: 2026-11-01
  # last looked through in November

purposes: [testing the rules of a site]   # in their own words
orders:
- enrol   # always
- train
code_digests: []  # none yet
epsilon_cap: 40.0   # the committee's
delta_cap: 1e-4
minimum_noise: 1.0
maximum_rounds: 50
maximum_steps: 100
minimum_patients: 2
expires: 2027-01-01
"""
OTHER = approval("1" * 64, study="other", coordinator_key="2" * 64)


def read(text: str) -> SitePolicy:
    return parse_settings(text, SitePolicy, "policy.yaml")


def changed(text: str, **lists: object) -> str:
    before = read(text)
    after = before.model_copy(update=lists)
    new = policy_text(text, before, after)
    assert read(new) == after
    return new


def lost(old: str, new: str) -> set[str]:
    return set(old.splitlines()) - set(new.splitlines())


def test_an_item_is_added_behind_the_others_and_every_other_line_stays():
    before = read(COMMENTED)
    new = changed(COMMENTED, studies=(*before.studies, OTHER))
    assert lost(COMMENTED, new) == set()
    assert new.index("digest: '" + "1" * 64) > new.index("deputy")


def test_an_item_goes_without_its_neighbours_and_without_the_comments_of_others():
    two = changed(COMMENTED, studies=(*read(COMMENTED).studies, OTHER))
    new = changed(two, studies=(OTHER,))
    assert lost(two, new) == set(COMMENTED.splitlines()[2:7])
    assert "# last looked through in November" in new


def test_the_last_item_goes_and_an_empty_list_is_left():
    new = changed(COMMENTED, studies=())
    assert "studies: []" in new
    assert "epsilon_cap: 40.0   # the committee's" in new


def test_an_empty_list_is_filled_and_its_comment_stays():
    new = changed(COMMENTED, code_digests=("a" * 64,))
    assert "code_digests:   # none yet\n- " + "a" * 64 in new
    assert lost(COMMENTED, new) == {"code_digests: []  # none yet"}


def test_a_list_on_one_line_becomes_one_of_many_and_its_comment_stays():
    new = changed(COMMENTED, purposes=("testing the rules of a site", "another purpose"))
    assert "purposes:   # in their own words\n- testing the rules of a site\n- another purpose\n" in new


def test_a_list_that_is_not_there_is_added_at_the_end():
    new = changed(COMMENTED.rstrip("\n"), app_digests=("b" * 64,))
    assert new.endswith("expires: 2027-01-01\napp_digests:\n- " + "b" * 64 + "\n")


def test_several_lists_change_at_once():
    new = changed(
        COMMENTED,
        orders=(OrderKind.ENROL, OrderKind.TRAIN, OrderKind.SCORE),
        code_digests=("a" * 64,),
        studies=(OTHER,),
    )
    assert "- enrol   # always" in new
    assert new.count("#") == COMMENTED.count("#") - 1  # the deputy's went with the entry


def test_windows_line_ends_stay():
    text = COMMENTED.replace("\n", "\r\n")
    new = changed(text, studies=(OTHER,), code_digests=("a" * 64,))
    assert new.count("\n") == new.count("\r\n")


@pytest.mark.parametrize(
    "text",
    [
        yaml.safe_dump(policy().model_dump(mode="json"), default_flow_style=True),
        settings_yaml(policy()).replace("studies:\n-", "studies:\n-\n "),
        "---\n" + settings_yaml(policy()) + "...\n",
        settings_yaml(policy(purposes=("first line\n\nsecond line, which is a long one",))),
    ],
    ids=["one pair of braces", "a dash alone", "a marked document", "a text over several lines"],
)
def test_whatever_way_it_is_written_it_reads_as_what_was_meant(text):
    before = read(text)
    changed(text, studies=(*before.studies, OTHER), purposes=("new purpose here",), code_digests=())


def test_a_shared_value_is_not_changed_in_both_places():
    text = COMMENTED.replace(
        "code_digests: []  # none yet", "code_digests: &same [" + "c" * 64 + "]\napp_digests: *same"
    )
    new = changed(text, code_digests=("c" * 64, "d" * 64))
    assert read(new).app_digests == ("c" * 64,)


def test_a_limit_is_never_changed_here():
    before = read(COMMENTED)
    with pytest.raises(ValueError, match="only the lists"):
        policy_text(COMMENTED, before, before.model_copy(update={"epsilon_cap": 99.0}))
