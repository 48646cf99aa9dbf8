import json

import numpy as np
import pytest

from client.cohort import Cohort, commit_split
from client.randomness import SecureStream
from client.scoring.review import ReviewCase, from_json, to_json
from client.scoring.score import SiteScores, public_suite, score_site
from common.errors import IntegrityError
from common.telemetry.events import ignore
from tests.stored_pairs import Stored, noise_pairs
from tests.tiny_studies import tiny_audit_plan

PEOPLE = noise_pairs(1, 8)


@pytest.fixture(scope="module")
def scored() -> SiteScores:
    """Four members, of whom the generator repeats the first, and four held out."""
    names = [f"p{i}" for i in range(8)]
    split = commit_split(names[:4], names[4:], SecureStream.from_seed(0))
    cohort = Cohort.from_patients({n: v[None] for n, v in zip(names, PEOPLE, strict=True)}, split)
    plan = tiny_audit_plan(volumes=60, reference_volumes=30)
    suite = public_suite(
        generator=Stored(np.concatenate([np.repeat(PEOPLE[:1], 40, axis=0), noise_pairs(2, 400)])),
        reference=Stored(noise_pairs(3, 60)),
        plan=plan,
        seed=5,
    )
    return score_site(
        cohort=cohort,
        suite=suite,
        plan=plan,
        stream=SecureStream.from_seed(1),
        observer=ignore,
    )


def test_the_reviewer_sees_who_was_copied_and_how_alike_the_copy_is(scored):
    first = scored.review[0]
    assert (first.patient, first.member) == ("p0", True)
    assert first.correlation == pytest.approx(1, abs=0.01)


def test_nobody_is_shown_who_is_no_more_alike_than_fresh_volumes_are(scored):
    assert {case.patient for case in scored.review} == {"p0"}


def test_no_name_is_in_what_leaves(scored):
    assert "p0" not in json.dumps([(h.endpoint, h.group, h.counts) for h in scored.histograms])


def test_the_review_survives_its_file_and_a_damaged_one_is_refused():
    case = ReviewCase(patient="p1", member=False, score=1.5, correlation=0.8, volume=7)
    assert from_json(to_json([case])) == (case,)
    with pytest.raises(IntegrityError, match="scored again"):
        from_json(b'[{"patient": "p1"}]')
