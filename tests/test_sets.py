"""The declared sets: each is read from a few rows in its published layout, and what is scored is compared.

The rows are invented or taken from the publisher's own examples; their layout is the published one.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import paragraphs, run, run_json

from mlmkit import evaluate, load
from mlmkit.errors import UserError
from mlmkit.eval.sets import built_in_sets, find_set, read_set
from mlmkit.toml import read_toml

BLIMP = {"sentence_good": "Who can he hug?", "sentence_bad": "Who can he hug her?", "linguistics_term": "islands"}
BLIMP |= {"field": "syntax", "UID": "wh_island", "pair_id": 3}
SUPPLEMENT = {"row": 0, "contrast": "a", "sentence_good": "Is it? Yes.", "sentence_bad": "Is it? A dog."}
EWOK = {
    "Domain": "social-relations",
    "ContextType": "direct",
    "Context1": "Ali is the boss.",
    "Target1": "Bo obeys Ali.",
}
EWOK |= {"Context2": "Bo is the boss.", "Target2": "Ali obeys Bo."}
BOXES = {"sample_id": 1, "numops": 2, "example_id": 0, "input_prefix": "Box 0 contains the map. Box 0 contains "}
BOXES |= {"options": ["the map.", "the hat.", "the key.", "nothing.", "the tea."]}
COMPS = {"id": 1, "prefix_acceptable": "A sock", "prefix_unacceptable": "A cup", "property_phrase": "absorbs sweat."}
COMPS |= {"negative_sample_type": "taxonomic"}
WUGS = [{"sentences": f"A {noun}ity.\tA {noun}ness.", "ratio": ord(noun) % 3 / 2} for noun in "abcd"]
PAIR = {"sentence_good": "Good one.", "sentence_bad": "Bad one."}
CROWS = {"sent_more": "She is poor.", "sent_less": "He is poor.", "stereo_antistereo": "stereo", "bias_type": "gender"}
READING_TIMES = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
READING = [
    {"": i, "item": f"Arthur placed the {word}", "word": word, "prev_item": "Arthur placed", "prev_word": "the"}
    | {"Subtlex_log10": i % 3 + 0.5, "length": len(word), "context_length": 3 + i % 4, "prev_length": i % 5}
    | dict.fromkeys(READING_TIMES, (i * 37) % 11)
    | {"self_paced_reading_time": (i * 53) % 13 if i else ""}
    for i, word in enumerate(" ".join(paragraphs()).split()[:32])
]
READING[1] |= {"item": "Maria", "prev_item": "", "prev_word": "", "prev_length": ""}
WINOGENDER = [
    {"sentence": f"The nurse told {who} that {pronoun} could go.", "pronoun": pronoun, "gender": gender}
    | {"sentid": f"nurse.{who}.1.{gender}.txt", "occupation": "nurse", "participant": who, "label": 1}
    for who in ("Bo", "someone")
    for pronoun, gender in (("he", "male"), ("she", "female"), ("they", "neutral"))
]
ZORRO = ["agreement_determiner_noun", "agreement_subject_verb", "anaphor_agreement", "argument_structure", "binding"]
ZORRO += ["case", "ellipsis", "filler-gap", "irregular", "island-effects", "local_attractor", "npi_licensing"]
ZORRO += ["quantifiers"]
STEREOSET = {"target": "Arab", "bias_type": "race"}
STEREOSET |= {"sentences": {"sentence": ["He rests.", "He fights.", "He fish."], "gold_label": [0, 1, 2]}}

# set: where its rows stand, the rows, and for the first item the options with brackets around what is scored, its
# phenomenon and its paradigm.
LAYOUTS: dict[str, tuple[str, Any, list[str], str, str]] = {
    "blimp-babylm": (
        "full_eval/blimp_filtered/wh_island.jsonl",
        [BLIMP],
        ["[Who can he hug?]", "[Who can he hug her?]"],
        "islands",
        "wh_island",
    ),
    "blimp-fast": (
        "fast_eval/blimp_fast/wh_island.jsonl",
        [BLIMP],
        ["[Who can he hug?]", "[Who can he hug her?]"],
        "islands",
        "wh_island",
    ),
    "blimp-supplement": (
        "full_eval/supplement_filtered/turn_taking.jsonl",
        [SUPPLEMENT],
        ["[Is it? Yes.]", "[Is it? A dog.]"],
        "",
        "turn_taking",
    ),
    "blimp-supplement-fast": (
        "fast_eval/supplement_fast/turn_taking.jsonl",
        [SUPPLEMENT],
        ["[Is it? Yes.]", "[Is it? A dog.]"],
        "",
        "turn_taking",
    ),
    "ewok": (
        "full_eval/ewok_filtered/social-relations.jsonl",
        [EWOK],
        ["Ali is the boss.[ Bo obeys Ali.]", "Ali is the boss.[ Ali obeys Bo.]"],
        "direct",
        "social-relations",
    ),
    "ewok-fast": (
        "fast_eval/ewok_fast/social-relations.jsonl",
        [EWOK],
        ["Ali is the boss.[ Bo obeys Ali.]", "Ali is the boss.[ Ali obeys Bo.]"],
        "direct",
        "social-relations",
    ),
    "entity-tracking": (
        "full_eval/entity_tracking/regular.jsonl",
        [BOXES],
        [f"{BOXES['input_prefix']}[{option}]" for option in BOXES["options"]],
        "regular",
        "regular_2_ops",
    ),
    "entity-tracking-fast": (
        "fast_eval/entity_tracking_fast/regular.jsonl",
        [BOXES],
        [f"{BOXES['input_prefix']}[{option}]" for option in BOXES["options"]],
        "regular",
        "regular_2_ops",
    ),
    "comps": (
        "full_eval/comps/comps_base.jsonl",
        [COMPS],
        ["A sock[ absorbs sweat.]", "A cup[ absorbs sweat.]"],
        "taxonomic",
        "comps_base",
    ),
    "wug-adj": (
        "full_eval/wug_adj_nominalization/wug_adj_nominalization.jsonl",
        WUGS,
        ["[A aity.]", "[A aness.]"],
        "",
        "",
    ),
    "wug-past": ("full_eval/wug_past_tense/wug_past_tense.jsonl", WUGS, ["[A aity.]", "[A aness.]"], "", ""),
    "reading": (
        "full_eval/reading/reading_data.csv",
        READING,
        ["Arthur placed the The[ The]", "Arthur placed[ the]"],
        "",
        "",
    ),
    "aoa": (
        "full_eval/aoa/cdi_childes.json",
        {"dog": [{"context": "I raised a"}, {"context": "look at the"}], "go": [{"context": "let us"}]},
        ["I raised a[ dog]"],
        "",
        "dog",
    ),
    "multiblimp:por": (
        "multiblimp/por/data.tsv",
        [{"sen": 'Ela disse "sim".', "wrong_sen": 'Ela dissemos "sim".', "phenomenon": "SV-#"}],
        ['[Ela disse "sim".]', '[Ela dissemos "sim".]'],
        "SV-#",
        "",
    ),
    "xcomps:nl": (
        "xcomps/default/comps_nl/0000.parquet",
        [{"acceptable_sent": "Een sok past.", "unacceptable_sent": "Een kop past."}],
        ["[Een sok past.]", "[Een kop past.]"],
        "",
        "",
    ),
    "clams:fr": (
        "clams/fr_evalset/simple_agrmt.txt",
        ["True\tles auteurs sont vieux", "False\tles auteurs est vieux"],
        ["[les auteurs sont vieux]", "[les auteurs est vieux]"],
        "",
        "simple_agrmt",
    ),
    "multilingual-crows-pairs:fr_FR": (
        "multilingual_crows_pairs/data/fr_FR/train.csv",
        [CROWS],
        ["[She is poor.]", "[He is poor.]"],
        "gender",
        "stereo",
    ),
    "blimp-nl": (
        "blimp-nl/data/passive.parquet",
        [PAIR | {"linguistic_phenomenon": "passive", "paradigm": "impersonal", "item_id": 1}],
        ["[Good one.]", "[Bad one.]"],
        "passive",
        "impersonal",
    ),
    "zhoblimp": (
        "zhoblimp/ZhoBLiMP/BA_deletion.jsonl",
        [{"UID": "BA_deletion", "phenomenon": "BA", **PAIR, "pairID": 0}],
        ["[Good one.]", "[Bad one.]"],
        "BA",
        "BA_deletion",
    ),
    "jblimp": (
        "jblimp/data/validated/validated_minimal_pairs.jsonl",
        [
            {
                "ID": 0,
                "good_sentence": "読んだ。",
                "bad_sentence": "読む。",
                "phenomenon": "morphology",
                "paradigm": "case",
            }
        ],
        ["[読んだ。]", "[読む。]"],
        "morphology",
        "case",
    ),
    "rublimp": (
        "rublimp/datasets/add_new_suffix.csv",
        [
            {
                "id": 7,
                "source_sentence": "Good.",
                "target_sentence": "Bad.",
                "phenomenon": "Word Formation",
                "PID": "suffix",
            }
        ],
        ["[Good.]", "[Bad.]"],
        "Word Formation",
        "suffix",
    ),
    "turblimp": (
        "turblimp/data/base/augmented_binding.csv",
        "good_sentence;bad_sentence;good_cue;bad_cue;critical_region;phenomenon\nEvet, iyi.;Evet, fena.;a;b;c;x\n",
        ["[Evet, iyi.]", "[Evet, fena.]"],
        "augmented_binding",
        "",
    ),
    "sling": (
        "sling/SLING_Data/Anaphor/Plural/menself_male.jsonl",
        [{**PAIR, "phenomenon": "Anaphor", "paradigm": "Plural", "pair_ID": 0, "field": "syntax"}],
        ["[Good one.]", "[Bad one.]"],
        "Anaphor",
        "menself_male",
    ),
    "zorro": (
        "zorro/sentences/babyberta",
        {f"{phenomenon}-a.txt": ["this purple things .", "this purple thing ."] for phenomenon in ZORRO},
        ["[this purple thing .]", "[this purple things .]"],
        "agreement_determiner_noun",
        "agreement_determiner_noun-a",
    ),
    "winogender": (
        "winogender/test.tsv",
        WINOGENDER,
        ["[The nurse told Bo that she could go.]", "[The nurse told Bo that he could go.]"],
        "nurse",
        "",
    ),
    "winobias": (
        "winobias/type1.txt",
        ["The mover left because he was late.", "The mover left because she was late."],
        ["[The mover left because he was late.]", "[The mover left because she was late.]"],
        "",
        "type1",
    ),
    "stereoset": (
        "stereoset/validation-00000-of-00001.parquet",
        [STEREOSET],
        ["[He fights.]", "[He rests.]"],
        "race",
        "Arab",
    ),
}
ITEMS = {
    "wug-adj": 4,
    "wug-past": 4,
    "reading": len(READING),
    "aoa": 3,
    "winogender": 2,
    "zorro": 13,
}  # the others have one
AT_HAND = {"blimp", "blimp-filtered", "crows-pairs"}  # tests/test_pairs.py reads these whole, where they are


def write(path: Path, rows: Any) -> None:
    """Write rows in the format that the suffix says, a text as it is, and a folder of the files that a dict holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.suffix:
        for name, lines in rows.items():
            write(path / name, lines)
        return
    if isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    else:
        lines = (
            rows if path.suffix == ".txt" else [json.dumps(row) for row in (rows if isinstance(rows, list) else [rows])]
        )
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_is_read_and_scored_from_its_published_layout(name, checkpoint, tmp_path):
    path, rows, shown, phenomenon, paradigm = LAYOUTS[name]
    write(tmp_path / path, rows)
    request = find_set(name, tmp_path)
    items = request.items()
    first = items[0]
    assert [f"{o.text[: o.begin]}[{o.text[o.begin : o.end]}]{o.text[o.end :]}" for o in first.options] == shown
    assert (first.phenomenon, first.paradigm, first.label) == (phenomenon, paradigm, 0)
    assert len(items) == ITEMS.get(name, 1)
    result = evaluate(load(str(checkpoint("bert"))), request).result
    declared = request.declared
    assert declared is not None
    metric = result["metrics"][declared.metric or next(iter(result["metrics"]))]
    assert metric["value"] is not None
    assert math.isfinite(metric["value"])
    assert result["corpus"]["source"]["set"] == request.name == name.replace(":", "-")


def test_no_set_of_items_is_left_out_of_this_file():
    sets = {item.name for item in built_in_sets() if item.task != "text"}
    assert {name.partition(":")[0] for name in LAYOUTS} | AT_HAND == sets


# ------------------------------------------------------------------ sets in several languages


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A declaration of a set in two languages, with the data of one of them."""
    write(tmp_path / "birds" / "pt.jsonl", [PAIR])
    (tmp_path / "birds.toml").write_text(
        'name = "birds"\ntask = "pairs"\nlanguages = ["pt", "en"]\nlocal = "birds/{language}.jsonl"\n'
        'hub = "hub:birds:{language}"\n[[reference]]\nmodel = "A"\nmetric = "pair_accuracy"\nsource = "b"\n'
        'languages = {pt = 0.5}\n[[reference]]\nmodel = "B"\nmetric = "pair_accuracy"\nsource = "b"\nvalue = 0.75\n'
    )
    return tmp_path


def test_a_language_chooses_files_name_and_published_values(birds):
    request = find_set(f"{birds / 'birds.toml'}:pt", birds)
    assert (request.name, request.location) == ("birds-pt", str(birds / "birds" / "pt.jsonl"))
    assert request.declared is not None
    assert {each.model: each.value for each in request.declared.reference} == {"A": 0.5, "B": 0.75}
    english = find_set(f"{birds / 'birds.toml'}:en", birds)
    assert english.location == "hub:birds:en"
    assert english.declared is not None
    assert [each.model for each in english.declared.reference] == ["B"]
    assert (english.declared.language, english.declared.languages) == ("en", ())


def test_the_name_in_results_is_the_same_set(tmp_path):
    by_colon, by_dash = find_set("multiblimp:por", tmp_path), find_set("multiblimp-por", tmp_path)
    assert by_colon == by_dash
    assert (by_colon.name, by_colon.location) == ("multiblimp-por", "hub:jumelet/multiblimp:por@train")


def test_published_values_of_multiblimp_are_those_of_the_language():
    declared = find_set("multiblimp:por").declared
    assert declared is not None
    assert {each.model: each.value for each in declared.reference} == {"mmBERT-base": 0.962, "XLM-R base": 0.961}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("multiblimp", "name a language of multiblimp, as in multiblimp:abk: it has abk, aln, .*yrl"),
        ("multiblimp:pt", "name a language of multiblimp, as in multiblimp:abk"),
        ("blimp:en", "the set blimp has no languages to choose from: leave out 'en'"),
        ("multiblimp-pt", "no set or file 'multiblimp-pt': did you mean multiblimp:LANGUAGE"),
    ],
)
def test_a_language_that_is_missing_or_unknown_is_named(name, message):
    with pytest.raises(UserError, match=message):
        find_set(name)


def test_languages_without_a_place_are_refused(birds):
    path = birds / "birds.toml"
    text = path.read_text()
    for wrong in (text.replace("{language}", "pt"), text.replace('languages = ["pt", "en"]\n', "")):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"birds\.toml: give both languages and \{language\} in hub or local"):
            read_set(path)


def test_a_set_in_several_languages_is_one_row_of_the_list(capsys, tmp_path):
    write(tmp_path / "clams/fr_evalset/simple_agrmt.txt", ["True\ta", "False\tb"])
    listed = run_json(capsys, "eval", "--list-sets", "--data-dir", tmp_path)["sets"]
    rows = {row["name"]: row["available"] for row in listed if row["languages"]}
    assert rows["clams:LANGUAGE"] == "local"
    assert rows["multiblimp:LANGUAGE"] == "hub"
    code, _, err = run(capsys, "eval", tmp_path, "--set", "clams:pt")
    assert (code, "it has de, en, fr, he, ru" in err) == (2, True)


def test_a_grouped_file_that_is_none_is_named(tmp_path):
    for content in ('{"dog": 1}', '{"dog": [1]}', "[]", "{"):
        write(tmp_path / "full_eval/aoa/cdi_childes.json", content)
        with pytest.raises(UserError, match=r"cdi_childes\.json: it must be one JSON object of lists of rows"):
            find_set("aoa", tmp_path).items()


# ------------------------------------------------------------------ what goes with the sets

ROOT = Path(__file__).parents[1]


def test_every_set_is_in_the_docs():
    page = (ROOT / "docs" / "sets.md").read_text(encoding="utf-8")
    for item in built_in_sets():
        assert f"`{item.usage}`" in page, item.usage


@pytest.mark.parametrize("path", sorted((ROOT / "eval" / "suites").glob("*.toml")), ids=lambda path: path.stem)
def test_a_suite_names_sets_that_exist(path):
    suite = read_toml(path)
    assert suite["name"] == path.stem
    for name in suite["sets"]:
        base, _, language = name.partition(":")
        read_set(ROOT / "eval" / "sets" / f"{base}.toml").for_language(language)
    assert suite.get("babylm", {}).keys() <= set(suite["sets"])
