"""The report on paper: the very page, laid out on A4. Needs the `pdf` extra and the system's Pango."""

from __future__ import annotations

from common.errors import UsageError


def pdf_of(page: str) -> bytes:
    """A self-contained HTML report as PDF, with the page's own print rules; nothing outside of it is fetched.

    Raises UsageError when WeasyPrint or the libraries it draws with are not installed.
    """
    try:
        # Here, because it is optional and loads the system's Pango as soon as it is imported.
        from weasyprint import HTML, URLFetcher  # noqa: PLC0415
    except (ImportError, OSError) as error:
        raise UsageError(
            f"PDF needs WeasyPrint and the system library Pango ({type(error).__name__}); no PDF was written. "
            "Run `pip install 'consilium[pdf]'` and install Pango (Debian: `apt-get install libpango-1.0-0 "
            "libpangoft2-1.0-0`), or print report.html from a browser."
        ) from error
    written: bytes = HTML(string=page, url_fetcher=URLFetcher(allowed_protocols={"data"})).write_pdf()
    return written
