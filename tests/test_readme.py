"""README and docs against the program: what they show is what it prints, and what they name exists."""

import ast
import logging
import os
import re
import shlex
from importlib.metadata import entry_points

import pytest
import structlog
from readme_blocks import PAGES, ROOT, block, blocks, help_text, renewed, study_keys, table_rows

from common.cli import COMMANDS
from common.errors import ExitCode
from common.settings.study import Study
from common.telemetry.quiet import TALKATIVE

README = (ROOT / "README.md").read_text(encoding="utf-8")
STUDIES = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
INSTALLED = {point.name for point in entry_points(group=COMMANDS)}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OUR_PATH = re.compile(r"`((?:common|client|server|tests|docs|deploy)/[\w./-]+|\.ci/\w+)`")
NAMED_TEST = re.compile(r"`(test_\w+)`")
RENEW = "run: .venv/bin/python -m tests.readme_blocks"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(autouse=True)
def _libraries_talk_again(monkeypatch):
    """`run` is made for a process of its own: it silences libraries and sets their environment."""
    monkeypatch.setattr("os.environ", dict(os.environ))
    yield
    structlog.reset_defaults()
    logging.captureWarnings(False)
    for name in TALKATIVE:
        logging.getLogger(name).filters.clear()


@each_page
def test_generated_parts_are_what_the_program_says(page):
    text = page.read_text(encoding="utf-8")
    assert text == renewed(text), RENEW


def test_every_command_and_no_other_has_its_help_in_the_readme():
    shown = {name.removeprefix("help").strip() for name in blocks(README) if name.startswith("help")}
    assert shown == {"", *INSTALLED}


def test_a_help_text_that_is_out_of_date_is_noticed():
    stale = README.replace("Seed of the whole simulation.", "Seed of a part of the simulation.")
    assert stale != README
    assert renewed(stale) == README


def test_exit_codes_are_those_of_the_program_and_each_is_explained():
    rows = table_rows(blocks(README)["exit codes"])
    assert {int(code): name for code, name, _ in rows[: len(ExitCode)]} == {c.value: c.name.lower() for c in ExitCode}
    assert [code for code, _, _ in rows[len(ExitCode) :]] == ["130", "141"]
    assert [code for code, _, when in rows if not when] == []


def test_every_key_of_a_study_is_listed_and_explained():
    rows = table_rows(blocks(STUDIES)["study keys"])
    assert [key for key, *_ in rows] == [key for key, *_ in study_keys(Study)]
    assert [key for key, *_, meaning in rows if not meaning] == []


def test_a_new_key_appears_without_an_explanation_and_old_explanations_stay():
    old = blocks(STUDIES)["study keys"]
    first, *_ = table_rows(old)
    without_first = "".join(line for line in old.splitlines(keepends=True) if not line.startswith(f"| {first[0]} |"))
    assert without_first != old
    again = table_rows(block("study keys", without_first))
    assert again[0] == (*first[:-1], "")
    assert again[1:] == table_rows(old)[1:]


@each_page
def test_every_link_and_path_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in LINK.findall(text) if not target.startswith(("http:", "https:"))]
    missing = [target for target in links if not _leads_somewhere(page, target)]
    missing += [path for path in OUR_PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []


def _leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    found = page.parent / path if path else page
    return found.exists() and (not anchor or anchor in _anchors(found.read_text(encoding="utf-8")))


def _anchors(text):
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_test_that_is_named_exists(page):
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert sorted(set(NAMED_TEST.findall(page.read_text(encoding="utf-8"))) - defined) == []


@each_page
def test_every_command_line_shown_can_be_typed(page):
    for line in _shell_lines(page.read_text(encoding="utf-8")):
        match shlex.split(line, comments=True):
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
            case ["consilium", *words]:
                command = next((words[:n] for n in (2, 1) if " ".join(words[:n]) in INSTALLED), None)
                assert command is not None, line
                options = {word for word in words if word.startswith("--")}
                assert options <= set(re.findall(r"--[\w-]+", help_text(*command))), line


def _shell_lines(text):
    shown = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    inline = re.findall(r"`((?:make|consilium) [a-z][^`]*)`", text)
    return [line for part in [*shown, *inline] for line in part.splitlines() if line.strip()]
