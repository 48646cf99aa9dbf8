"""The report on paper. Needs the `pdf` extra and Pango; says so where they are missing."""

import base64
import subprocess
import sys

import numpy as np
import pytest

try:
    import weasyprint  # noqa: F401
except (ImportError, OSError) as error:
    pytest.skip(f"no WeasyPrint or no Pango ({type(error).__name__})", allow_module_level=True)

from server.audit.pdf import pdf_of
from server.audit.slices import data_uri

PAGE = """<!doctype html><html lang="en"><head><title>t</title>
<style>@page { size: A4; @top-right { content: "decision abc"; } }</style></head><body><h1>One</h1>%s</body></html>"""


def test_a_page_becomes_a_pdf_of_a4():
    written = pdf_of(PAGE % "")
    assert written.startswith(b"%PDF-")


def test_nothing_is_fetched_from_outside(tmp_path):
    """A picture in a file is not drawn, the same picture within the page is: noise that does not compress tells."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    within = data_uri(pixels)
    picture = tmp_path / "secret.png"
    picture.write_bytes(base64.b64decode(within.partition(",")[2]))
    bare, inside, outside = (
        len(pdf_of(PAGE % (f'<img src="{source}" alt="">' if source else "")))
        for source in ("", within, picture.as_uri())
    )
    assert inside > bare + pixels.nbytes / 2
    assert outside < bare + 1000


def test_without_weasyprint_the_remedy_is_named():
    """In a process of its own, where the library cannot be found."""
    code = (
        "import sys; sys.modules['weasyprint'] = None\n"
        "from common.errors import UsageError\nfrom server.audit.pdf import pdf_of\n"
        "try:\n    pdf_of('<p>')\nexcept UsageError as error:\n    print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'consilium[pdf]'" in said
    assert "Pango" in said
    assert "no PDF was written" in said
