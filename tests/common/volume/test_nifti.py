"""NIfTI in and out: what is written comes back, what is damaged is refused."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from common.errors import DataError
from common.volume.nifti import NoOrientation, NotThreeDimensional, nifti_bytes, read_nifti, write_nifti
from common.volume.volume import Volume

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def volume(dtype: str = "float32") -> Volume:
    return Volume(voxels=np.arange(24).reshape(2, 3, 4).astype(dtype), affine=AFFINE)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16"])
def test_voxels_type_and_affine_survive_a_round_trip(tmp_path: Path, dtype: str) -> None:
    write_nifti(tmp_path / "scan.nii.gz", volume(dtype))
    back = read_nifti(tmp_path / "scan.nii.gz")
    assert back.voxels.dtype == dtype
    np.testing.assert_array_equal(back.voxels, volume(dtype).voxels)
    np.testing.assert_allclose(back.affine, AFFINE)


def test_header_states_millimetres_and_both_affines(tmp_path: Path) -> None:
    write_nifti(tmp_path / "scan.nii.gz", volume())
    header = nibabel.load(tmp_path / "scan.nii.gz").header
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_sform(), AFFINE)
    np.testing.assert_allclose(header.get_qform(), AFFINE, atol=1e-5)


def test_equal_volumes_give_equal_bytes_without_a_time() -> None:
    data = nifti_bytes(volume())
    assert data == nifti_bytes(volume())
    assert data[4:8] == bytes(4)  # the gzip header's time  [RFC 1952]


def test_a_trailing_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((2, 3, 4, 1, 1), np.float32), AFFINE), tmp_path / "a.nii.gz")
    assert read_nifti(tmp_path / "a.nii.gz").shape == (2, 3, 4)


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (2, 3)])
def test_a_series_or_a_plane_is_not_three_dimensional(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.float32), AFFINE), tmp_path / "a.nii")
    with pytest.raises(NotThreeDimensional):
        read_nifti(tmp_path / "a.nii")


def test_a_file_without_orientation_is_refused_instead_of_guessed(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.float32), None)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(NoOrientation):
        read_nifti(tmp_path / "a.nii")


def test_one_flipped_byte_in_a_compressed_file_is_noticed(tmp_path: Path) -> None:
    """Stored blocks decode without complaint: only the checksum at the end of the file shows the change."""
    path = tmp_path / "scan.nii.gz"
    raw = bytearray(gzip.compress(gzip.decompress(nifti_bytes(volume())), compresslevel=0, mtime=0))
    raw[-20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        read_nifti(path)


@pytest.mark.parametrize("keep", [0, 3, 100, -9])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(nifti_bytes(volume())[:keep])
    with pytest.raises(DataError, match="damaged"):
        read_nifti(path)


def test_text_in_place_of_a_scan_is_refused_without_naming_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / "Jane_Doe.nii"
    path.write_text("not a scan " * 100)
    with pytest.raises(DataError) as refusal:
        read_nifti(path)
    assert "Jane" not in str(refusal.value)
    assert capfd.readouterr().err == ""


def test_a_header_that_claims_more_than_any_scan_holds_is_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), AFFINE)
    image.header.set_data_shape((30000, 30000, 30000))
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(100))
    with pytest.raises(DataError):
        read_nifti(tmp_path / "a.nii")


def test_big_endian_and_scaled_integers_are_read_as_values(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header(endianness=">")
    image = nibabel.Nifti1Image(np.arange(24, dtype=">i2").reshape(2, 3, 4), AFFINE, header)
    image.header.set_data_dtype(">i2")
    nibabel.save(image, tmp_path / "big.nii")
    back = read_nifti(tmp_path / "big.nii")
    assert back.voxels.dtype == np.int16
    assert back.voxels.dtype.isnative
    np.testing.assert_array_equal(back.voxels, np.arange(24).reshape(2, 3, 4))
    scaled = nibabel.Nifti1Image(np.linspace(0, 1, 24).reshape(2, 3, 4), AFFINE, dtype=np.int16)
    nibabel.save(scaled, tmp_path / "scaled.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "scaled.nii").voxels.ravel(), np.linspace(0, 1, 24), atol=1e-4)


def test_types_that_nifti_does_not_know_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16"):
        write_nifti(tmp_path / "a.nii.gz", volume("float16"))
    assert not list(tmp_path.iterdir())
