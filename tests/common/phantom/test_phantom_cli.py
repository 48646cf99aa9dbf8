"""`consilium phantom`: folders that hospitals could have, or one clear refusal."""

from __future__ import annotations

import json

import numpy as np

from common.cli import run
from common.phantom.draw import draw, patient_rng
from common.phantom.scanner import site_scanner
from common.settings.study import PhantomKind
from common.volume.layouts import find_pairs
from common.volume.nifti import read_nifti
from common.volume.volume import Grid

SMALL = ["--spacing", "2", "2", "2", "--shape", "16", "16", "16"]


def test_each_site_gets_a_folder_of_pairs_and_some_patients_two_scans(tmp_path, capsys):
    out = tmp_path / "phantoms"
    code = run(["phantom", "vessels", str(out), "--sites", "2", "--patients", "5", *SMALL, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [site["scans"] for site in told["sites"]] == [6, 6]
    for site in ("site-1", "site-2"):
        found = find_pairs(out / site)
        assert len(found.pairs) == 6
        assert len({pair.patient for pair in found.pairs}) == 5
        assert not found.refused


def test_no_patient_name_occurs_at_two_sites(tmp_path):
    out = tmp_path / "phantoms"
    run(["phantom", "vessels", str(out), "--sites", "2", "--patients", "2", *SMALL])
    one, two = ({pair.patient for pair in find_pairs(out / site).pairs} for site in ("site-1", "site-2"))
    assert not one & two


def test_files_hold_the_scans_that_are_drawn_in_memory(tmp_path):
    out = tmp_path / "phantoms"
    run(["phantom", "hippocampus", str(out), "--sites", "1", "--patients", "1", "--seed", "4"])
    (pair,) = find_pairs(out / "site-1").pairs
    kind, grid = PhantomKind.HIPPOCAMPUS, Grid(shape=(64, 64, 64), spacing_mm=(1.0, 1.0, 1.0))
    image, label = draw(kind, patient_rng(kind, 4, 1, 0), site_scanner(4, 1), grid)
    assert np.array_equal(read_nifti(pair.image).voxels, image.voxels)
    assert np.array_equal(read_nifti(pair.label).voxels, label.voxels)
    assert read_nifti(pair.image).same_geometry(image)


def test_a_folder_that_holds_something_is_refused_and_left_as_it_was(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    code = run(["phantom", "vessels", str(tmp_path), "--sites", "1", "--patients", "1", *SMALL])
    assert code == 2
    assert "already holds something" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_impossible_grid_is_refused_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "phantoms"
    for wrong in (["--shape", "4", "4", "4"], ["--spacing", "1", "0", "1"], ["--shape", "4000", "4000", "4000"]):
        assert run(["phantom", "vessels", str(out), *wrong]) == 2
        assert "nothing was written" in capsys.readouterr().err
    assert not out.exists()
