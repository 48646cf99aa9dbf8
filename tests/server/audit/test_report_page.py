import base64
import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_example import REPORTS, VARIANTS, example_facts, example_pairs, example_study, rendered

from common.evidence.predicate import Outcome
from server.audit.facts import ReportFacts
from server.audit.report import chapters, render_report, render_summary
from server.audit.slices import mid_planes, planes_png
from server.audit.wording import largest_epsilon


class Page(HTMLParser):
    """Tags, ids, text and attribute values of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def bare(**changes: Any) -> ReportFacts:
    """Facts without anything to draw, for tests of words."""
    facts = example_facts(audited=False, **changes)
    nothing = np.zeros((0, *facts.gallery.synthetic.shape[1:]), dtype=np.float32)
    return replace(
        facts,
        gallery=replace(facts.gallery, synthetic=nothing, phantom=nothing),
        campaign=replace(facts.campaign, rounds=()),
    )


def with_decision(facts: ReportFacts, **changes: Any) -> ReportFacts:
    """The same report about a decision that differs."""
    decision = facts.campaign.decision.model_copy(update=changes)
    return replace(facts, campaign=replace(facts.campaign, decision=decision))


@pytest.fixture(scope="module")
def document() -> str:
    return rendered("release")


@pytest.fixture(scope="module")
def page(document) -> Page:
    return Page(document)


def test_the_same_facts_give_the_same_bytes(document):
    assert render_report(example_facts()) == document


def test_nothing_is_fetched_and_nothing_runs(page, document):
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    addresses = [a[k] for _, a in page.tags for k in ("src", "href") if a.get(k)]
    assert {address.split(":")[0] if ":" in address else address[0] for address in addresses} == {"data", "#"}
    assert not re.search(r"url\((?!#|&#)|@import", document)
    assert "default-src 'none'" in html.unescape(document)


def test_no_id_is_used_twice_and_every_inner_link_has_its_target(page):
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")}
    assert targets <= set(ids)


def test_everything_drawn_has_words_for_those_who_cannot_see_it(page):
    assert page.all("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == 4
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_the_verdict_and_the_plain_words_come_before_any_number_of_the_audit(page):
    text = page.text
    order = ["Simulated run.", "RELEASE", "In plain words", "Subject of this report", "Epsilon of every hospital"]
    places = [text.index(words, len("RELEASE · ") + 40) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_outcome_is_stated_as_it_is(name):
    decision = example_facts(**VARIANTS[name]).campaign.decision
    text = Page(rendered(name)).text
    words = {"RELEASE", "REJECT", "INCONCLUSIVE"}
    banner = text[: text.index("In plain words")]
    assert {word for word in words if word in banner} == {decision.outcome.value}
    assert all(reason in text for reason in decision.reasons)


def test_the_fourteen_points_are_there_in_their_order(page):
    headings = [chapter.title for chapter in chapters(example_facts())]
    assert [chapter.number for chapter in chapters(example_facts())] == list(range(1, 15))
    body = page.text[page.text.index("In plain words") :]
    body = body[body.index("1 Subject") :]
    places = [body.index(f"{number} {title}") for number, title in enumerate(headings, start=1)]
    assert places == sorted(places)


def test_an_audit_alone_claims_no_privacy_and_decides_nothing():
    text = Page(rendered("alone")).text
    for words in ("PASS", "This report decides nothing", "No differential privacy is claimed", "not drawn at random"):
        assert words in text
    assert "Epsilon of every hospital" not in text
    assert "consilium verify" not in text


def test_exact_answers_are_said_to_have_no_noise_and_no_epsilon():
    text = Page(rendered("exact")).text
    assert "the answers are exact and have no epsilon" in text
    assert "include the noise" not in text
    assert "counts with noise" not in text


def test_every_printed_page_is_marked_with_what_was_decided_or_found(document):
    assert f'@top-right {{ content: "decision {example_facts().campaign.decision.id}"; }}' in document
    assert f'content: "audit result {REPORTS["alone"]().audit.digest}"' in rendered("alone")


def test_whoever_signs_finds_room_for_opinion_names_and_signatures(page):
    for words in ("Operated by", "Reviewed by", "Opinion of the data-protection officer", "Date and signature"):
        assert words in page.text


def test_a_sign_stands_beside_every_colour(document):
    coloured = re.findall(r'class="(?:note )?(yes|no)">\s*(.)', document)
    assert coloured
    assert all(sign == {"yes": "✓", "no": "✕"}[name] for name, sign in coloured)


def test_a_coarser_study_says_so_before_anything_else():
    text = rendered("inconclusive")
    body = text[text.index("<main>") :]
    assert body.index("coarser than the defaults") < body.index("<h1>")
    assert "release.max_auc is 0.7; the default is 0.6" in body


def test_a_real_campaign_is_not_called_simulated_and_a_simulated_one_always_is(page):
    real = Page(render_report(bare(simulated=False))).text
    assert "Simulated run" not in real
    assert "Simulated run. All hospitals ran on one computer" in page.text
    assert "(seed 7)" in page.text


def test_epsilon_of_every_site_stands_with_both_accountants(page):
    for number in ("8.00", "(7.99 to 8.01)", "8.48", "7.90", "8.37", "7.80", "8.27"):
        assert number in page.text


def test_a_site_without_a_guarantee_is_shown_as_such():
    facts = bare()
    sites = dict(facts.campaign.decision.sites)
    spent = sites["site-2"].members.model_copy(
        update=dict.fromkeys(("epsilon", "lower", "upper", "second_opinion"), "infinite")
    )
    sites["site-2"] = sites["site-2"].model_copy(update={"members": spent})
    text = Page(render_report(with_decision(facts, sites=sites, outcome=Outcome.REJECT))).text
    assert "∞ (∞ to ∞)" in text
    assert "no epsilon and no guarantee" in text


def test_the_largest_epsilon_counts_held_out_patients_too():
    facts = bare()
    sites = dict(facts.campaign.decision.sites)
    spent = sites["site-1"].nonmembers.model_copy(update={"upper": 11.5})
    sites["site-1"] = sites["site-1"].model_copy(update={"nonmembers": spent})
    assert largest_epsilon(facts.campaign) == 8.01
    assert largest_epsilon(with_decision(facts, sites=sites).campaign) == 11.5


def test_a_limit_that_is_not_kept_is_marked_with_a_word_and_a_sign():
    text = Page(rendered("reject")).text
    assert "✕ not kept" in text
    assert "✕ no" in text


def test_a_campaign_without_audit_utility_and_rounds_still_has_a_report():
    facts = bare(outcome=Outcome.INCONCLUSIVE)
    text = Page(render_report(replace(facts, campaign=replace(facts.campaign, utility=None)))).text
    for words in ("There was no audit.", "No control was run", "Not measured.", "No round was held"):
        assert words in text


def test_what_others_wrote_is_shown_and_never_interpreted():
    study = example_study(purpose="<script>alert('x')</script> & more than ten letters")
    text = render_report(bare(study=study, reasons=("<img src=x onerror=alert(1)>",), outcome=Outcome.REJECT))
    assert "<script>" not in text
    assert "<img src=x" not in text
    assert "&lt;script&gt;" in text


def test_the_gallery_shows_what_it_was_given(page):
    first = page.all("img")[0]["src"]
    assert first == planes_png(example_pairs(seed=1, count=1)[0])
    assert len(page.all("img")) == 12


def test_slices_are_shown_with_the_right_on_the_left_anterior_and_superior_up():
    pair = np.zeros((2, 8, 8, 8), dtype=np.float32)
    pair[0, 7, 7, 4] = 1  # right, anterior, middle
    pair[0, 7, 4, 7] = 2  # right, middle, superior
    pair[0, 4, 7, 7] = 3  # middle, anterior, superior
    axial, coronal, sagittal = mid_planes(pair)
    assert axial[0, 0, 0] == 1
    assert coronal[0, 0, 0] == 2
    assert sagittal[0, 0, 0] == 3


def test_outlines_lie_on_the_labels_and_nowhere_else():
    pair = np.zeros((2, 8, 8, 8), dtype=np.float32)
    pair[1, 2:6, 2:6, 2:6] = 1
    png = base64.b64decode(planes_png(pair).split(",")[1])
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGB"))[:, :32]
    coloured = np.ptp(pixels.astype(int), axis=2) > 0
    assert coloured.any()
    rows, columns = np.nonzero(coloured)
    assert min(rows.min(), columns.min()) >= 8
    assert max(rows.max(), columns.max()) < 24
    assert not coloured[12:20, 12:20].any()


def test_the_summary_says_verdict_reasons_and_epsilon_in_plain_text():
    text = render_summary(example_facts(**VARIANTS["inconclusive"]))
    assert text.startswith("> **Coarser than the default thresholds:**")
    for words in ("# INCONCLUSIVE: hippocampus-example", "Simulated run", "11.0%", "8.00 (prv)", "0.772", "report.md"):
        assert words in text
    assert "<" not in text.replace("> ", "")
