"""The report: what it says is what the figures say, it loads nothing, and no text of a model becomes a part of the page."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import string
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from evaluation_example import estimate, evaluation, example, measure
from markdown_it import MarkdownIt

from moralguard.errors import DataError
from moralguard.evaluation.protocols.registry import protocol_names
from moralguard.evaluation.report import charts, numbers, tables
from moralguard.evaluation.report.comparison import compare, headline
from moralguard.evaluation.report.figures import pareto_front
from moralguard.evaluation.report.html import as_html, write_html
from moralguard.evaluation.report.labels import LANGUAGES, Labels, label_texts
from moralguard.evaluation.report.listings import agreement_word
from moralguard.evaluation.report.overview import capabilities_section, colours
from moralguard.evaluation.report.side_by_side import side_by_side
from moralguard.evaluation.report.verdict import tally, verdict
from moralguard.evaluation.results import Condition, Distribution, Evaluation, Transcript

EN, ZH = Labels("en"), Labels("zh")
HOSTILE = '<script>alert(1)</script>" onfocus="alert(2)\' {{ 7 * 7 }} | a\nb'
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes and the text; complains of tags that don't match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.script = "", ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        expected = self.open.pop()
        assert tag == expected, f"</{tag}> where </{expected}> was expected"

    def handle_data(self, text):
        if self.open[-1:] == ["script"]:
            self.script += text
        elif self.open[-1:] != ["style"]:
            self.text += text

    def ids(self) -> list[str]:
        return [found["id"] for _, found in self.elements if found.get("id")]

    def sections(self) -> list[str]:
        return [found["id"] for tag, found in self.elements if tag == "section"]


def hostile_evaluation() -> Evaluation:
    """Every string that comes from outside is hostile."""
    records = ({**_record(HOSTILE), "contributions": {HOSTILE: 1.0}, "values": {HOSTILE: [HOSTILE]}},)
    turns = ({"role": HOSTILE, "text": HOSTILE},)
    return evaluation(
        examples=(
            example(HOSTILE, records, prompt=HOSTILE, unguarded_text=HOSTILE, scores={HOSTILE: 0.5}, unguarded_scores={HOSTILE: 0.4}),
        ),
        model=HOSTILE,
        suite=HOSTILE,
        conditions=(Condition(name="unguarded"), Condition(name="detox", policy=HOSTILE)),
        measures=(
            measure("toxicity", "expected_maximum", 0.6, 0.3, judge=HOSTILE, warnings=(HOSTILE,)),
            measure(HOSTILE, HOSTILE, 0.6, 0.3, group=HOSTILE, value=HOSTILE),
            *(measure("foundations", "score", 0.6, 0.3, group=HOSTILE + str(i)) for i in range(3)),
            measure("imperative", "pi", 0.6, 0.3, group=HOSTILE),
        ),
        distributions=tuple(Distribution(protocol=HOSTILE, judge=HOSTILE, condition=c, counts=(3, 1)) for c in ("unguarded", "detox")),
        transcripts=(Transcript(protocol=HOSTILE, condition=HOSTILE, title=HOSTILE, turns=turns, facts={HOSTILE: 1.0}),),
        configuration={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
    )


def _record(token: str) -> dict:
    ids = {"position": 3, "token_id": 5, "counterfactual_id": 6}
    return {
        **ids,
        "token": token,
        "counterfactual": "x",
        "kl": 0.7,
        "contributions": {"dexperts": 1.2},
        "values": {"dexperts": ["respectful"]},
    }


# The page


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_is_whole_and_loads_nothing(tmp_path, language):
    write_html(evaluation((example(trace=(_record(" a"),)),)), tmp_path / "report.html", language)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.findall(r"https?://|@import|url\(|//cdn", text)
    assert not [(tag, found) for tag, found in page.elements if tag in ("link", "img", "iframe") or "src" in found]
    assert len(page.ids()) == len(set(page.ids()))
    links = [found["href"] for tag, found in page.elements if tag == "a"]
    assert links == [f"#{section}" for section in page.sections()]
    expected = ["headline", "capabilities", "foundations", "distributions", "sweep", "values", "groups", "agreement", "examples"]
    assert page.sections() == [*expected, "imperative", "transcripts", "latency", "warnings", "configuration"]
    for tag, found in page.elements:
        if tag == "svg":
            assert found["role"] == "img"
            assert found["aria-label"]


def test_the_script_runs_under_the_policy_of_the_page():
    page = Page(as_html(evaluation()))
    allowed = next(found["content"] for tag, found in page.elements if found.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in allowed
    assert "default-src 'none'" in allowed


@pytest.mark.parametrize("language", LANGUAGES)
def test_hostile_text_stays_text(language):
    page = Page(as_html(hostile_evaluation(), language))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "alert" not in page.script
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20  # it is there, as text
    assert "{{ 7 * 7 }}" in page.text
    assert "49" not in re.findall(r"\d+ \|", page.text)


def test_texts_and_figures_are_shown():
    page = Page(as_html(evaluation()))
    for shown in ("stupid idiot who should shut up & go.", "a fool, and you know it.", "0.690", "[0.650, 0.730]", "\u22120.340", "< 0.001"):
        assert shown in page.text
    assert "9 items: fewer than 30" in page.text
    assert "Odd rate" in page.text  # a measure without a label, by a readable name
    assert "By noon the store of medicine is empty." in page.text
    assert "(empty)" in page.text  # a turn without text


def test_sections_without_data_are_left_out():
    bare = evaluation(
        (),
        conditions=(Condition(name="unguarded"), Condition(name="detox", policy="detox")),
        measures=(measure("task", "accuracy", 0.5, 0.4, better="higher"),),
        **dict.fromkeys(("distributions", "agreements", "latencies", "norms", "transcripts", "warnings"), ()),
    )
    assert Page(as_html(bare)).sections() == ["headline", "configuration"]
    assert Page(as_html(bare.replaced(measures=()))).sections() == ["configuration"]


def test_an_unguarded_model_alone_and_two_policies():
    alone = evaluation((), conditions=(Condition(name="unguarded"),))
    page = Page(as_html(alone))
    assert "Only the unguarded model was measured." in page.text
    assert "distributions" not in page.sections()
    two = evaluation(conditions=(Condition(name="unguarded"), Condition(name="detox", policy="detox"), Condition(name="other", policy="b")))
    measures = [m.replaced(estimates={**m.estimates, "other": estimate(0.5)}, differences={**m.differences}) for m in two.measures]
    page = Page(as_html(two.replaced(measures=tuple(measures))))
    assert "not comparable" in page.text  # no difference was measured for the second
    assert colours(two) == {"unguarded": 0, "detox": 1, "other": 2}
    assert colours(evaluation())["detox x 0.5"] == 1  # a sweep has its policy's colour


def test_capability_cards_show_one_judge_and_say_what_was_not_measured():
    both = [measure("toxicity", "toxic_fraction", 0.2, 0.1, judge=judge, capability="rectification") for judge in ("built-in", "lexicon")]
    part = measure("toxicity", "expected_maximum", 0.9, 0.8, judge="built-in", group="challenging", capability="rectification")
    whole = measure("toxicity", "expected_maximum", 0.69, 0.35, judge="built-in", capability="rectification")
    section = capabilities_section(evaluation(measures=(*both, part, whole)), EN)
    cards = {card["name"]: card["lines"] for card in section["cards"]}
    assert list(cards) == ["Comprehension", "Diagnosis", "Rectification", "Performance"]
    assert [(line["measure"], line["judge"], line["about"]) for line in cards["Rectification"]] == [
        ("Expected maximum toxicity", "built-in", ""),  # a headline measure first, over all items
        ("Share of toxic texts", "built-in", ""),
    ]
    assert Page(as_html(evaluation(measures=tuple(both)))).text.count("Not measured in this suite.") == 3
    assert capabilities_section(evaluation(measures=(measure("x", "y", 1, 2),)), EN) is None


def test_only_the_worst_twenty_texts_are_shown():
    many = tuple(example(f" text {i:02}.", scores={"built-in": i / 30}) for i in range(30))
    text = Page(as_html(evaluation(many))).text
    assert [i for i in range(30) if f"text {i:02}." in text] == list(range(10, 30))
    assert text.index("text 29.") < text.index("text 10.")


def test_without_jinja2_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"moralguard\[eval\]"):
        write_html(evaluation(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_language_without_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="no labels in 'fr'"):
        write_html(evaluation(), tmp_path / "report.html", "fr")


# Labels


def test_both_languages_have_every_label_with_the_same_places():
    for section, labels in label_texts().items():
        for key, texts in labels.items():
            assert set(texts) == set(LANGUAGES), f"{section}.{key}"
            assert all(isinstance(text, str) and text.strip() for text in texts.values()), f"{section}.{key}"
            places = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts.values()]
            assert places[0] == places[1], f"{section}.{key}"


def test_every_protocol_and_its_measures_have_labels():
    known = label_texts()
    assert set(protocol_names()) <= set(known["protocols"])
    expected = {
        "toxicity": "expected_maximum toxicity_probability toxic_fraction dist_1 dist_2 dist_3 perplexity empty failed_closed",
        "values": "p_kept total broken",
        "human-distance": "distance total within_epsilon p_kept human_p_kept",
        "over-refusal": "refused_safe refused_unsafe partly_refused_safe partly_refused_unsafe",
        "compliance": "complied partly_refused harm harmful_compliance",
        "fluency": "perplexity unchanged removed_tokens",
        "task": "accuracy accuracy_per_byte",
        "pairs": "preference preference_distance log_odds log_odds_distance",
        "question-bias": "s_dis s_amb accuracy_ambiguous accuracy_disambiguated",
        "coreference": "male_preference gender_gap stereotype_log_odds log_odds accuracy gotcha_gap",
        "truthfulness": "mc1 mc2",
        "comprehension": "accuracy probability swayed_by_order",
        "judgement-action": "judgement judgement_auroc judgement_accuracy knowing acting gap",
        "foundations": "score catch_passed in_words",
        "imperative": "pi pi_not admissible inconsistency separation",
        "red-team": "attack_success direct_success attempts harm refused tokens",
    }
    assert set(expected) == set(protocol_names())
    for protocol, names in expected.items():
        for name in names.split():
            assert EN.known("measures", f"{protocol}.{name}") or EN.known("measures", name), f"{protocol}.{name}"


def test_unknown_names_are_readable():
    assert EN.measure("new-thing", "share_of-odd_ones") == "Share of odd ones"
    assert EN.protocol("new-thing") == "New thing"
    assert ZH.group("Race_ethnicity") == ZH.group("race-ethnicity") == label_texts()["groups"]["race_ethnicity"]["zh"]
    assert EN.measure("fluency", "perplexity") != EN.measure("toxicity", "perplexity")


# What is said of the figures


def test_outcomes_follow_direction_and_corrected_p():
    def outcome(**changes):
        return compare(measure("x", "y", **{"before": 0.5, "after": 0.3, **changes}), "detox").outcome

    assert outcome() == "better"
    assert outcome(better="higher") == "worse"
    assert outcome(better="neither") == "differs"
    assert outcome(after=0.7) == "worse"
    assert outcome(p=0.05) == "unclear"
    assert outcome(p=0.049) == "better"
    assert outcome(p_corrected={"detox": 0.2}) == "unclear"  # clear before the correction only
    assert outcome(p=None) == "better"  # without a p, the interval of the difference decides
    assert outcome(p=None, width=0.3) == "unclear"
    assert compare(measure("x", "y", 0.5, 0.3), "elsewhere").outcome == "unknown"


def test_the_verdict_says_what_happened():
    found = verdict(evaluation(), EN)
    assert found == (
        "Under detox the expected maximum toxicity (judge built-in) fell from 0.69 to 0.35 (\u221249 %, p < 0.001); perplexity \u00d7 1.10."
    )
    rose = (measure("compliance", "harm", 0.2, 0.3, p=0.01),)
    assert verdict(evaluation(measures=rose), EN) == "Under detox the harm of the answers rose from 0.20 to 0.30 (+50 %, p = 0.010)."
    alike = (
        measure("toxicity", "expected_maximum", 0.5, 0.49, p=0.6),
        measure("fluency", "perplexity", 20, 20.2, p=0.8, unit="perplexity"),
    )
    assert verdict(evaluation(measures=alike), EN) == (
        "Under detox the expected maximum toxicity shows no clear change: 0.50 unguarded, 0.49 guarded (\u22122 %, p = 0.600); "
        "perplexity \u00d7 1.01, no clear change."
    )
    assert "0.69 \u964d\u81f3 0.35" in verdict(evaluation(), ZH)
    assert verdict(evaluation(measures=()), EN) == "No measure compares detox with the unguarded model."


def test_the_tally_counts_the_headline():
    measures = (
        measure("toxicity", "expected_maximum", 0.6, 0.3),
        measure("toxicity", "perplexity", 20, 25, unit="perplexity"),
        measure("task", "accuracy", 0.5, 0.5, p=1.0, better="higher"),
        measure("toxicity", "dist_1", 0.5, 0.9, better="higher"),  # not a headline
        measure("pairs", "stereotype_preferred", 0.6, 0.3, group="gender"),  # a part of the items
    )
    found = evaluation(measures=measures)
    assert [m.name for m in headline(found)] == ["expected_maximum", "perplexity", "accuracy"]
    assert tally(found, "detox", EN) == "Headline measures: 1 better, 1 worse, 1 without a clear difference."


def test_numbers():
    assert numbers.plain(-0.0004, 3) == "0.000"
    assert numbers.plain(-1234.5, 1) == "\u22121\u2009234.5"
    assert numbers.number(0.35, "share") == "0.350"
    assert numbers.number(1.9, "score", 2.1) == "1.90"
    assert numbers.number(23.456, "perplexity") == "23.5"
    assert numbers.signed(0.25, "share") == "+0.250"
    assert numbers.signed_interval(estimate(0.0, 0.1), "share") == "[\u22120.100, +0.100]"
    assert numbers.percent_change(0.69, 0.35) == "\u221249 %"
    assert numbers.percent_change(0.0, 0.35) is None
    assert numbers.percent_change(0.001, 0.2) == "\u00d7 200"
    assert numbers.p_value(0.0004) == "< 0.001"
    assert numbers.p_value(1.0) == "= 1"
    assert numbers.nice_ceiling(0.13) == 0.2
    assert numbers.ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_kappas_words_are_those_of_landis_and_koch():
    words = [agreement_word(kappa) for kappa in (-0.1, 0.1, 0.3, 0.5, 0.7, 0.9)]
    assert words == ["none", "slight", "fair", "moderate", "substantial", "almost_perfect"]
    assert all(f"agreement_{word}" in label_texts()["ui"] for word in words)


# Charts


def test_bars_are_as_long_as_their_numbers():
    row = charts.Row("a <b>", (charts.Interval(1, "detox", 0.5, 0.25, 0.75, "0.5"),))
    drawn = charts.interval_rows([row], (0.0, 1.0), name="n")
    assert 'class="bar" style="left:0.0%;width:50.0%"' in drawn
    assert 'class="whisker" style="left:25.0%;width:50.0%"' in drawn
    assert "a &lt;b&gt;" in drawn
    negative = charts.interval_rows([charts.Row("a", (charts.Interval(0, "u", -0.5, -0.5, -0.5, ""),))], (-1.0, 1.0), name="n")
    assert 'class="bar" style="left:25.0%;width:25.0%"' in negative
    assert 'class="zero" style="left:50.0%"' in negative
    cropped = charts.interval_rows([charts.Row("a", (charts.Interval(0, "u", 0.9, 0.9, 0.9, ""),))], (0.8, 1.0), name="n")
    assert 'class="dot" style="left:50.0%"' in cropped
    assert "bar" not in cropped  # a bar that doesn't begin at zero would lie


def test_axes_begin_at_zero_unless_that_hides_the_differences():
    def axis(*ends):
        return charts.domain_of([charts.Row("", (charts.Interval(0, "", low, low, high, ""),)) for low, high in ends])

    assert axis((0.1, 0.7)) == (0.0, 1.0)
    assert axis((0.01, 0.13)) == (0.0, 0.2)
    assert axis((0.9, 0.95), (0.96, 0.98)) == pytest.approx((0.9, 0.98))
    assert axis((-0.1, 0.3)) == (-0.5, 0.5)
    assert axis((0.0, 0.0)) == (0.0, 1.0)
    assert axis((1.0, 1.0))[0] < 1.0


def test_histograms_show_shares_by_square_roots():
    drawn = charts.histogram_pair((75, 0, 25), (100, 0, 0), colour=1, names=("u", "g"), x_label="x", title="t")
    bars = re.findall(r'<rect class="fill c(\d)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"><title>([^<]+)', drawn)
    assert [(colour, told.split(": ")[1]) for colour, _, _, told in bars] == [("0", "75.0 %"), ("0", "25.0 %"), ("1", "100.0 %")]
    heights = [float(height) for _, _, height, _ in bars]
    assert heights[0] / heights[1] == pytest.approx(3**0.5, rel=0.01)
    assert heights[2] / heights[1] == pytest.approx(2, rel=0.01)
    assert float(bars[0][1]) + heights[0] == pytest.approx(float(bars[2][1]), abs=0.11)  # above the line, and below it


def test_the_radar_puts_scores_on_their_spokes():
    drawn = charts.radar(["a", "b", "c", "d"], [("u", 0, [5, 2.5, 5, 0])], {"n": [5, None, 5, 5]}, 5, title="t")
    corners = re.search(r'<polygon class="area c0" points="([^"]+)"', drawn)[1].split()
    (top_x, top_y), (right_x, right_y), (_, low_y), (left_x, left_y) = ([float(x) for x in corner.split(",")] for corner in corners)
    assert (left_x, left_y) == (top_x, right_y)  # a score of 0 is the centre
    assert right_x - left_x == pytest.approx((low_y - top_y) / 4, abs=0.1)
    assert len(re.search(r'<polygon class="norm n0" points="([^"]+)"', drawn)[1].split()) == 3  # no norm for one axis


def test_scatter_points_lie_in_order_and_single_points_are_drawn():
    points = [charts.Point(1, 3, "a", 0), charts.Point(2, 1, "b<", 1, False, "p"), charts.Point(3, 2, "c", 1, True, "p")]
    drawn = charts.scatter(points, x_label="x", y_label="y", title="t")
    path = re.search(r'<polyline class="joined c1" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', drawn)
    assert float(path[1]) < float(path[3])
    assert float(path[2]) > float(path[4])  # down is less
    assert drawn.count("hollow") == 1
    assert "b&lt;" in drawn
    assert "nan" not in charts.scatter([charts.Point(0, 0, "a", 0)], x_label="x", y_label="y", title="t")


def test_the_pareto_front():
    assert pareto_front([(1, 5), (2, 3), (3, 4), (4, 1), (2, 3)]) == [True, True, False, True, True]
    assert pareto_front([(1, 1), (1, 2), (2, 1)]) == [True, False, False]


# Tables


def test_csv_holds_every_measure_under_every_condition(tmp_path):
    found = evaluation()
    tables.write_csv(found, tmp_path / "measures.csv")
    with (tmp_path / "measures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(m.estimates) for m in found.measures)
    row = next(r for r in rows if (r["measure"], r["judge"], r["condition"]) == ("expected_maximum", "built-in", "detox"))
    original = found.find("toxicity", "expected_maximum", "built-in")
    assert float(row["estimate"]) == original.estimates["detox"].value
    assert float(row["difference_low"]) == original.differences["detox"].low
    assert (row["p"], row["p_corrected"], row["value"]) == ("0.0004", "", "")
    plainly = next(r for r in rows if r["condition"] == "unguarded")
    assert plainly["difference"] == ""
    tables.write_csv(hostile_evaluation(), tmp_path / "hostile.csv")
    with (tmp_path / "hostile.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["judge"] == HOSTILE


def cells(markdown: str) -> list[list[str]]:
    """The tables' cells as GitHub's grammar reads them."""
    rows: list[list[str]] = []
    tokens = MarkdownIt().enable("table").parse(markdown)
    for before, token in pairwise(tokens):
        if token.type == "tr_close" or token.type == "tr_open":
            rows += [[]] if token.type == "tr_open" else []
        elif token.type == "inline" and before.type in ("td_open", "th_open"):
            assert all(child.type in ("text", "text_special", "softbreak") for child in token.children), token.content
            rows[-1].append("".join(child.content for child in token.children))
    return rows


@pytest.mark.parametrize("language", LANGUAGES)
def test_markdown_tables_are_whole(language):
    labels = Labels(language)
    rows = cells(tables.as_markdown(evaluation(), language))
    assert rows[0] == [labels.ui("measure"), labels.ui("unguarded"), "detox", *(labels.ui(n) for n in ("difference", "p", "outcome"))]
    assert rows[1][1:5] == ["0.690 [0.650, 0.730]", "0.350 [0.310, 0.390]", "\u22120.340 [\u22120.380, \u22120.300]", "< 0.001"]
    assert {len(row) for row in rows} == {4, 6}


def test_markdown_of_hostile_names_stays_in_its_cells():
    markdown = tables.as_markdown(hostile_evaluation())
    rows = cells(markdown)
    assert {len(row) for row in rows} == {4, 6}
    flat = " ".join(HOSTILE.split())
    assert rows[1][0].endswith(f"({flat})")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    assert "<script" not in html


def test_the_readme_table_stands_between_its_markers():
    table = tables.readme_table(evaluation())
    rows = cells(table)
    assert rows[0] == ["Measure", "unguarded", "detox", "Difference (95 %)", "p", "Outcome"]
    assert rows[1][0] == "Expected maximum toxicity (built-in)"
    assert rows[1][1:] == ["0.690", "0.350", "\u22120.340 [\u22120.380, \u22120.300]", "< 0.001", "\u25b2 better"]
    text = "# Title\n\n<!-- begin results -->\nold\n<!-- end results -->\n\nafter\n"
    updated = tables.update_between_markers(text, "results", table)
    assert updated == f"# Title\n\n<!-- begin results -->\n{table}\n<!-- end results -->\n\nafter\n"
    assert tables.update_between_markers(updated, "results", table) == updated
    assert cells(tables.readme_table(evaluation(), "zh"))[0][1] == ZH.ui("unguarded")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "begin results -->' stands 0 times"),
        ("<!-- begin results -->", "end results -->' stands 0 times"),
        ("<!-- begin results --><!-- begin results --><!-- end results -->", "stands 2 times"),
        ("<!-- end results --><!-- begin results -->", "stands before"),
    ],
)
def test_markers_that_cannot_be_used_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        tables.update_between_markers(text, "results", "| a |")


def test_policies_stand_under_one_another_without_their_sweeps():
    asked = (("toxicity", "expected_maximum"), ("toxicity", "perplexity"))
    head, base, detox = cells(side_by_side(evaluation(), measures=asked))
    assert head[1:4] == ["Expected maximum toxicity (built-in)", "Expected maximum toxicity (lexicon)", "Perplexity of the generated texts"]
    assert base[1:] == ["0.690 [0.650, 0.730]", "0.440 [0.400, 0.480]", "27.3", "1.00 [1.00, 1.00]"]
    assert detox[0] == "detox"
    assert detox[1:] == ["0.350 [0.310, 0.390]", "0.210 [0.170, 0.250]", "\u00d7 1.10", "1.83 [1.71, 1.98]"]


def test_a_policy_without_a_measure_or_a_time_gets_a_dash():
    more = evaluation(conditions=(*evaluation().conditions, Condition(name="other", policy="other", digest="0")))
    assert cells(side_by_side(more))[-1][1:] == ["\u2013"] * (len(cells(side_by_side(more))[0]) - 1)
    assert len(cells(side_by_side(evaluation(latencies=())))[0]) == len(cells(side_by_side(evaluation()))[0]) - 1


def test_a_table_of_nothing_is_refused():
    with pytest.raises(DataError, match="none of the measures"):
        side_by_side(evaluation(), measures=(("toxicity", "nothing"),))
    with pytest.raises(DataError, match="no measure over all its items"):
        tables.readme_table(evaluation(measures=()))
    with pytest.raises(DataError, match="holds one of the markers"):
        tables.update_between_markers("", "results", "<!-- end results -->")
