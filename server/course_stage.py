"""The course of training as the campaign follows it: a hook after rounds, and the choice after the last one.

`CourseStage.after`, called with every checkpoint:
(1) a point that is already in `course.json` is not asked about again
(2) the segmenter is trained on volumes of the round's average and stored, so that a campaign that is resumed asks the
    very same question, which the sites answer from their stores
(3) one `CourseOrder` to every site whose weights are in the average
(4) each answer is validated against the manifest; pooled; written; recorded in the evidence
`CourseStage.choose`, after the last round: the study's rule chooses; recorded before anything is audited.

The time all of this takes is part of what is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from common.errors import IntegrityError
from common.evidence.atomic import write_atomic
from common.evidence.canonical import Json, sha256_hex
from common.evidence.chain import EvidenceChain
from common.generator.network import generator_from, read_weights, save_weights
from common.generator.sampling import sample_pairs
from common.generator.weights import Weights
from common.measure.segmentation import train_segmenter
from common.privacy.mechanism import Plan
from common.protocol import codec
from common.protocol.manifest import objections
from common.protocol.messages import CourseOrder, CourseReply, RefusalReply, Reply
from common.settings.load import study_digest
from common.settings.study import CourseSettings, Study
from common.telemetry.events import Observer
from server.checkpoint import Checkpoint, CheckpointStore
from server.course import Asked, Chosen, Course, CourseRow, chosen_by, pooled, rule_of
from server.evidence_log import append_once
from server.round import training_epsilon
from server.run_folder import RunFolder
from server.seeds import derive
from server.sites import NoReply, Sites

COURSE_RECORD = "course"
CHOICE_RECORD = "course-choice"


@dataclass(frozen=True, kw_only=True, eq=False)
class CourseStage:
    """Everything that points are made with. participants: enrolled sites. released: those whose warm-up was used."""

    study: Study
    settings: CourseSettings
    plan: Plan
    sites: Sites
    run: RunFolder
    store: CheckpointStore
    participants: tuple[str, ...]
    released: frozenset[str]
    seed: int
    chain: EvidenceChain
    observer: Observer
    now: Callable[[], datetime]

    def after(self, checkpoint: Checkpoint) -> None:
        """Steps (1) to (4) for every due round up to this checkpoint's."""
        course = read_course(self.run)
        for number in self.settings.rounds(checkpoint.record.round):
            if course is None or course.row(number) is None:  # (1)
                began = time.monotonic()
                at = checkpoint if number == checkpoint.record.round else self.store.read(number)
                course = (course or self._begun()).with_row(self._measure(at, began))
                write_atomic(self.run.course, course.to_json().encode())  # (4)
        self._record_once(() if course is None else course.rows)

    def choose(self, last: Checkpoint) -> tuple[Checkpoint, Chosen]:
        """The chosen round's checkpoint, or the last one when the rule allows no point.

        Raises IntegrityError when the checkpoint is not the one that the chosen point is about.
        """
        course = read_course(self.run) or self._begun()
        chosen = chosen_by(course, rule_of(self.settings))
        at = last
        if chosen.row is not None:
            at = last if chosen.row.round == last.record.round else self.store.read(chosen.row.round)
            if at.average.digest != chosen.row.weights_digest:
                raise IntegrityError(
                    f"the checkpoint of round {chosen.row.round} is not the generator that {self.run.course} is about; "
                    "nothing was audited. One of the two was changed after it was written: restore it."
                )
        body: dict[str, Json] = {
            "max_auc": chosen.rule.max_auc,
            "max_epsilon": chosen.rule.max_epsilon,
            "round": at.record.round,
            "by_rule": chosen.row is not None,
            "weights_digest": at.average.digest,
            "reason": chosen.reason,
            "free": chosen.free,
            "course": sha256_hex(course.to_json().encode()),
        }
        append_once(self.chain, CHOICE_RECORD, body, self.now)
        return at, chosen

    def share_of_time(self) -> tuple[float, float]:
        """Seconds that all points took, and their share of training and points together."""
        course = read_course(self.run)
        spent = math.fsum(row.seconds for row in course.rows) if course else 0.0
        trained = math.fsum(record.seconds for record in self.store.records())
        return spent, spent / (spent + trained) if spent + trained > 0 else 0.0

    def _begun(self) -> Course:
        name, digest = "", ""
        if self.settings.exact:
            from common.measure.fidelity.encoder import study_encoder  # noqa: PLC0415  only where it is measured

            encoder = study_encoder(self.study)
            name, digest = encoder.name, encoder.digest
        return Course(
            labels=tuple(self.study.labels[value] for value in sorted(self.study.labels)),
            exact=self.settings.exact,
            feature_net=name,
            feature_net_digest=digest,
            rows=(),
        )

    def _measure(self, at: Checkpoint, began: float) -> CourseRow:
        number = at.record.round
        order = CourseOrder(
            study_digest=study_digest(self.study),
            round=number,
            weights=at.average,
            weights_digest=at.average.digest,
            segmenter=self._segmenter(at),  # (2)
            seed=self._latents(number),
            volumes=self.settings.volumes,
            training_steps=self.settings.training_steps,
            epsilon=None if self.settings.exact else self.settings.epsilon_per_answer,
        )
        entered = {
            *self.released,
            *(site for r in self.store.records() if r.round <= number for site in r.replies),
        }
        asked = [name for name in self.participants if name in entered]
        answers = self.sites.ask(dict.fromkeys(asked, order), self.study.federation.deadline_s)  # (3)
        usable, missing = sorted_out(answers, order, labels=len(self.study.labels))  # (4)
        row = pooled(
            self.study,
            Asked(
                round=number,
                weights_digest=order.weights_digest,
                epsilon_spent=training_epsilon(self.plan, number),
                epsilon_answer=order.epsilon,
            ),
            usable,
            digests={name: codec.digest(reply) for name, reply in usable.items()},
            missing=missing,
        )
        return replace(row, seconds=round(time.monotonic() - began, 3))

    def _segmenter(self, at: Checkpoint) -> Weights:
        folder = self.run.course_segmenters
        folder.mkdir(exist_ok=True)
        file = folder / f"round-{at.record.round:04d}.safetensors"
        if not file.exists():
            pairs = sample_pairs(
                generator_from(self.study, at.average),
                seed=self._latents(at.record.round),
                first=0,
                count=self.settings.volumes,
            )
            trained = train_segmenter(
                pairs,
                labels=len(self.study.labels),
                steps=self.settings.training_steps,
                seed=derive(self.seed, "course segmenter"),
                observer=self.observer,
            )
            save_weights(file, trained)
        return read_weights(file)

    def _latents(self, number: int) -> int:
        return derive(self.seed, "course", number)

    def _record_once(self, rows: Sequence[CourseRow]) -> None:
        """Put into the evidence what is not there yet: also after a kill between file and record."""
        recorded = {record.body.get("round") for record in self.chain.verify() if record.kind == COURSE_RECORD}
        for row in rows:
            if row.round not in recorded:
                self.chain.append(COURSE_RECORD, _facts(row), self.now())


def sorted_out(
    answers: Mapping[str, Reply | NoReply], order: CourseOrder, *, labels: int
) -> tuple[dict[str, CourseReply], dict[str, str]]:
    """Usable answers, and why others are missing as a fixed phrase."""
    usable: dict[str, CourseReply] = {}
    missing: dict[str, str] = {}
    for name, answer in answers.items():
        match answer:
            case NoReply(reason=reason):
                missing[name] = str(reason)
            case RefusalReply(code=code):
                missing[name] = f"site refused ({code})"
            case CourseReply() if not objections(answer, order=order, shapes={}, labels=labels):
                usable[name] = answer
            case _:
                missing[name] = "reply is not what was asked for"
    return usable, missing


def read_course(run: RunFolder) -> Course | None:
    """The points so far; None before the first. Raises IntegrityError when the file is damaged."""
    if not run.course.exists():
        return None
    try:
        return Course.from_json(run.course.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{run.course} is damaged; nothing was chosen. Delete it and repeat the command: the sites answer again "
            "from their stores, at no further cost."
        ) from error


def _facts(row: CourseRow) -> dict[str, Json]:
    return {
        "round": row.round,
        "weights_digest": row.weights_digest,
        "exact": row.epsilon_answer is None,
        "epsilon_answer": row.epsilon_answer,
        "answers": dict(row.answers),
        "missing": dict(row.missing),
    }
