"""A release in the words that data catalogues read: Croissant 1.1, JSON-LD over schema.org.

[github.com/mlcommons/croissant, docs/croissant-spec-1.1.md and docs/croissant-rai-spec.md]
Everything said here is a fact of the card or a digest. The vocabulary has no field for the evidence of a privacy
audit, so the signed decision, the report and the evidence chain are linked with their SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from common.evidence.predicate import Predicate
from common.evidence.verification import ATTESTATION, DECISION, EVIDENCE, GENERATOR, REPORT
from server.release.card import epsilon_lines

CROISSANT: Final = "croissant.json"

_VERSIONS = ("http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0")
_LABEL_NAMES = "dseg.tsv"
_NIFTI = ("application/gzip", "https://nifti.nimh.nih.gov/nifti-1/")  # NIfTI has no registered media type
_CR_TERMS = (
    "annotation", "arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "excludes", "extract",
    "field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath",
    "key", "md5", "parentField", "path", "readLines", "recordSet", "references", "regex", "repeated", "replace",
    "samplingRate", "sdVersion", "separator", "source", "subField", "transform", "unArchive", "value",
)  # fmt: skip
_CONTEXT: Final[Mapping[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _CR_TERMS},
}


def croissant_facts(*, card: Mapping[str, Any], predicate: Predicate, digests: Mapping[str, str]) -> dict[str, Any]:
    """The JSON-LD of one release.

    card: as `card_facts` made it. digests: SHA-256 of the files written so far, by path relative to the release; the
    manifest and the signature come after this file and hold its own digest. Raises KeyError when a file is missing.
    """
    modality = card["data"]["modality"]
    return {
        "@context": dict(_CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": list(_VERSIONS),
        "name": card["title"],
        "description": _description(card),
        "url": f"urn:consilium:decision:{predicate.decision_id}",
        "identifier": predicate.decision_id,
        "version": "1.0.0",  # the only one there will be: other volumes are another decision
        "datePublished": predicate.issued.isoformat(),
        "expires": predicate.expires.isoformat() if predicate.expires else None,
        "license": card["licence_url"] or card["licence"],
        "citeAs": card["citation"],
        "creator": [{"@type": "sc:Organization", "name": _organisation(site, card)} for site in card["sites"]],
        "keywords": ["synthetic", "medical imaging", "differential privacy", "federated learning", modality],
        "usageInfo": "Not for: " + " ".join(card["not_for"]),
        **_responsible_use(card),
        "prov:wasDerivedFrom": {"@id": GENERATOR},
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": f"drawn by Consilium {card['code_version']} from a generator that the sites trained together",
        },
        "subjectOf": _evidence(predicate, digests),
        "distribution": _distribution(modality, digests),
        "recordSet": _record_sets(modality, digests),
    }


def _description(card: Mapping[str, Any]) -> str:
    coarser = f"COARSER THAN THE DEFAULT THRESHOLDS: {'; '.join(card['coarser'])}. " if card["coarser"] else ""
    simulated = "SIMULATED sites: the epsilon protects nobody. " if card["simulated"] else ""
    return (
        f"{coarser}{simulated}SYNTHETIC: {card['data']['volumes']} image and label pairs drawn from a generator; "
        f"no volume is a scan of a person. Purpose of the study: {card['purpose']}"
    )


def _organisation(site: str, card: Mapping[str, Any]) -> str:
    return f"{site} (simulated)" if card["simulated"] else site


def _responsible_use(card: Mapping[str, Any]) -> dict[str, Any]:
    """The properties of Croissant RAI 1.0 for which there is a fact."""
    privacy, training = card["privacy"], card["training"]
    return {
        "rai:dataCollection": "No scan was collected for this set. Its volumes were drawn from a generator that was "
        "trained where the scans are; scans and critics stayed there.",
        "rai:dataCollectionType": "Others: drawn from a generative model",
        "rai:dataCollectionRawData": f"Scans ({card['data']['modality']}) of {', '.join(card['sites'])}. "
        f"Public start: {card['warm_start']}.",
        "rai:dataPreprocessingProtocol": [
            f"At each site scans were brought to one voxel grid and {training['intensity']}.",
        ],
        "rai:dataAnnotationProtocol": "Each label map was drawn together with its image; no person labelled it.",
        "rai:annotationsPerItem": "0 by people",
        "rai:dataUseCases": list(card["intended_use"]),
        "rai:dataLimitations": [*card["limitations"], *(f"Not for: {use}" for use in card["not_for"])],
        "rai:personalSensitiveInformation": [
            "Health. The volumes are synthetic; the generator learned from the scans of the sites.",
            f"Differential privacy for each {privacy['unit']}; neighbours are {privacy['neighbours']}.",
            *epsilon_lines(card),
            *(f"Not covered: {gap}" for gap in privacy["not_covered"]),
        ],
        "rai:dataReleaseMaintenancePlan": f"Issued {card['issued']}, expires {card['expires']}. The auditor may "
        "revoke it before. Changed volumes are another release with another decision; there are no updates in place.",
    }


def _evidence(predicate: Predicate, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was signed and what it rests on; the signature itself covers this file and has no digest here."""
    told = {
        DECISION: ("The gate's decision and every fact it rests on", "application/json"),
        REPORT: ("The audit report", "text/html"),
        EVIDENCE: ("Hash-linked records of the campaign, up to the decision", "application/jsonlines"),
    }
    signature = {
        "@type": "sc:MediaObject",
        "name": "The auditor's signature over every file",
        "contentUrl": ATTESTATION,
        "encodingFormat": "application/vnd.in-toto+json",
        "identifier": predicate.decision_id,
    }
    records = [
        {
            "@type": "sc:MediaObject",
            "name": name,
            "contentUrl": path,
            "encodingFormat": media_type,
            "identifier": predicate.decision_id,
            "sha256": digests[path],
        }
        for path, (name, media_type) in told.items()
    ]
    return [*records, signature]


def _distribution(modality: str, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        _file(GENERATOR, "https://github.com/huggingface/safetensors", "The released generator's weights.", digests),
        _file(_LABEL_NAMES, "text/tab-separated-values", "The name of each value of a label map.", digests),
        _files("images", modality, "Synthetic images. SHA-256 of each: record set `subjects`."),
        _files("labels", "dseg", "Their label maps. SHA-256 of each: record set `subjects`."),
    ]


def _file(path: str, media_type: str, text: str, digests: Mapping[str, str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "description": text,
        "contentUrl": path,
        "encodingFormat": media_type,
        "sha256": digests[path],
    }


def _files(name: str, suffix: str, text: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "description": text,
        "encodingFormat": list(_NIFTI),
        "includes": f"sub-*/anat/*_{suffix}.nii.gz",
    }


def _record_sets(modality: str, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    columns = {
        "subject": "A synthetic subject; the number says nothing about any patient.",
        "image": "Path of the image.",
        "image_sha256": "SHA-256 of the image's file.",
        "label": "Path of the label map.",
        "label_sha256": "SHA-256 of the label map's file.",
    }
    names = {"index": ("sc:Integer", "Value in a label map."), "name": ("sc:Text", "What it marks.")}
    return [
        {
            **_record_set("subjects", "One pair of volumes for each synthetic subject.", key="subject"),
            "field": [_field(f"subjects/{column}", "sc:Text", text) for column, text in columns.items()],
            "data": _rows(modality, digests),
        },
        _volumes("images", ["sc:ImageObject"], "The image."),
        _volumes("labels", ["cr:SegmentationMask", "sc:ImageObject"], "The label map."),
        {
            **_record_set("label_names", "What the values of a label map mean.", key="index"),
            "field": [
                {
                    **_field(f"label_names/{column}", kind, text),
                    "source": {"fileObject": {"@id": _LABEL_NAMES}, "extract": {"column": column}},
                }
                for column, (kind, text) in names.items()
            ],
        },
    ]


def _volumes(files: str, kinds: Sequence[str], text: str) -> dict[str, Any]:
    """The voxels of one file set and whose they are. Its id differs from the file set's: both are ids of this file."""
    name = f"{files}_of_subjects"
    whose = _field(f"{name}/subject", "sc:Text", "Whose it is.")
    voxels = _field(f"{name}/volume", list(kinds), text)
    found = {"fileSet": {"@id": files}}
    return {
        **_record_set(name, f"{text} One for each subject.", key="subject"),
        "field": [
            {
                **whose,
                "source": {
                    **found,
                    "extract": {"fileProperty": "filename"},
                    "transform": {"regex": "^(sub-[A-Za-z0-9]+)_"},
                },
                "references": {"field": {"@id": "subjects/subject"}},
            },
            {**voxels, "source": {**found, "extract": {"fileProperty": "content"}}},
        ],
    }


def _record_set(name: str, text: str, *, key: str) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": text,
        "key": {"@id": f"{name}/{key}"},
    }


def _field(name: str, kind: str | list[str], text: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": name, "name": name.rpartition("/")[2], "description": text, "dataType": kind}


def _rows(modality: str, digests: Mapping[str, str]) -> list[dict[str, str]]:
    """One record for each pair, in the order of the subjects."""
    ending = f"_{modality}.nii.gz"
    pairs = [(name, f"{name.removesuffix(ending)}_dseg.nii.gz") for name in sorted(digests) if name.endswith(ending)]
    return [
        {
            "subjects/subject": image.partition("/")[0],
            "subjects/image": image,
            "subjects/image_sha256": digests[image],
            "subjects/label": label,
            "subjects/label_sha256": digests[label],
        }
        for image, label in pairs
    ]
