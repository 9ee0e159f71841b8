"""
`deduplicate` and `decontaminate` remove what they say and nothing else: measured against the exact Jaccard similarity
of real sentences, in several scripts.
"""

import gzip
import hashlib
import json
import random

import numpy as np
import pytest
from conftest import read_json_lines, read_lines, write_json_lines

from lusifer_hf.data.prepare import steps
from lusifer_hf.data.prepare.decontamination import decontaminate
from lusifer_hf.data.prepare.deduplication import deduplicate, ngrams, words


pytestmark = pytest.mark.usefixtures("own_cache")

LONG = (
    "The ferry crosses the bay four times a day in summer, and twice a day from October until the ice on the northern "
    "shore has gone, which in most years is the middle of April."
)
NEAR = LONG.replace("middle", "end")
OTHER = "Whoever wants to see the lighthouse takes the bus at noon and walks the last mile along the cliffs."


def row(query: str, *positives: str, **fields) -> dict:
    return {"query": query, "positive": list(positives or ["Some answer."]), **fields}


def run(step, folder, *data, **parameters) -> tuple[list[list[dict]], list[dict[str, int]]]:
    """Of every list of rows those that stay, and the counts of why others went."""
    paths = [write_json_lines(folder / f"{number}.jsonl", rows) for number, rows in enumerate(data)]
    step(paths, folder / "out", **parameters)
    kept = [read_json_lines(folder / "out" / path.name) for path in paths]
    report = json.loads((folder / "out" / "manifest.json").read_text())[-1]["data"]
    for number, (rows, left) in enumerate(zip(data, kept, strict=True)):
        counts = report[str(number)]
        assert counts["rows_in"] == len(rows) and counts["rows_out"] == len(left)
        assert sum(counts["dropped"].values()) == len(rows) - len(left)
    return kept, [report[str(number)]["dropped"] for number in range(len(data))]


# Deduplication


def test_first_of_equal_rows_stays(tmp_path):
    first = [row("a question", LONG, id="1"), row("another one", LONG, id="2"), row("A question?", LONG, id="3")]
    second = [row("a  QUESTION", LONG, id="4"), row("a question", OTHER, id="5")]
    kept, dropped = run(deduplicate, tmp_path, first, second)
    assert kept == [first[:2], second[1:]]
    assert dropped == [{"duplicate": 1}, {"duplicate": 1}]


def test_near_duplicates(tmp_path):
    first, second = [row("when does the ferry go", LONG)], [row("when does the ferry go", NEAR), row("ferry", OTHER)]
    assert run(deduplicate, tmp_path / "near", first, second)[1] == [{}, {"near duplicate": 1}]
    assert run(deduplicate, tmp_path / "exact", first, second, threshold=None)[1] == [{}, {}]
    assert run(deduplicate, tmp_path / "strict", first, second, threshold=1.0)[1] == [{}, {}]


def test_both_texts_must_be_alike(tmp_path):
    """Two questions on one paragraph are two rows, and so are two answers to one question."""
    rows = [row("when does the ferry go", LONG), row("how long is the bay frozen", LONG), row(LONG, "In April.")]
    rows += [row(NEAR, "It has four decks.")]
    assert run(deduplicate, tmp_path / "row", rows) == ([rows], [{}])
    assert run(deduplicate, tmp_path / "query", rows, compare="query") == ([rows[:3]], [{"near duplicate": 1}])


@pytest.mark.parametrize("language", ["en", "ru", "hi", "ar", "zh", "th"])
def test_against_exact_similarity(tmp_path, shared_folder, language):
    """Of sentences with changed copies nearly all above the threshold by 0.1 are found, none below it by 0.15."""
    draw = random.Random(0)
    lines = read_lines(shared_folder / "data" / "raw" / f"{language}.txt.gz", 8000)
    texts = [line for line in dict.fromkeys(lines) if 50 <= len(line) <= 300][:250]
    for text in list(texts):
        for changes in (1, 4):
            characters = list(text)
            for position in draw.sample(range(len(characters)), changes):
                characters[position] = draw.choice(texts[0])
            texts.append("".join(characters))
    texts = list(dict.fromkeys(texts))
    draw.shuffle(texts)
    ((kept,), _) = run(deduplicate, tmp_path, [row(text) for text in texts], compare="query", threshold=0.7)

    sets = [ngrams(words(text)) for text in texts]
    vocabulary = {ngram: number for number, ngram in enumerate(sorted(set.union(*sets)))}
    members = np.zeros((len(sets), len(vocabulary)), dtype=np.float32)
    for number, ngram_set in enumerate(sets):
        members[number, [vocabulary[ngram] for ngram in ngram_set]] = 1
    common, sizes = members @ members.T, members.sum(axis=1)
    similarity = np.tril(common / (sizes[:, None] + sizes - common), -1).max(axis=1)  # to an earlier row
    stays = {item["query"] for item in kept}
    found = np.array([text not in stays for text in texts])
    assert (similarity >= 0.8).sum() > 80 and (similarity < 0.55).sum() > 80, "the texts test nothing"
    missed = (similarity >= 0.8) & ~found
    assert missed.sum() <= 0.01 * (similarity >= 0.8).sum()
    assert not found[similarity < 0.55].any()


def test_shards_do_not_matter(tmp_path, monkeypatch):
    rows = [row(f"{text} {number // 3}") for number in range(9) for text in (LONG, OTHER)]
    expected = run(deduplicate, tmp_path / "one", rows)
    monkeypatch.setattr(steps, "SHARD_ROWS", 4)
    assert run(deduplicate, tmp_path / "many", rows) == expected
    assert expected[1][0]["duplicate"] == 12


@pytest.mark.parametrize(
    "parameters, message", [({"threshold": 0.3}, "threshold=0.3"), ({"compare": "positive"}, "compare='positive'")]
)
def test_bad_parameters(tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message):
        run(deduplicate, tmp_path, [row("a question")], **parameters)


# Decontamination


def test_what_counts_as_contamination(tmp_path):
    against = write_json_lines(
        tmp_path / "eval.jsonl",
        [{"id": "ferry ticket office", "query": LONG, "positive": ["short answer"], "negative": ["Tickets"]}],
    )
    part = "We were told that the ferry crosses the bay four times a day in summer, which was wrong."
    rows = {
        "same": row(LONG.upper(), OTHER),
        "answer": row("an unseen question", OTHER, "Short answer!"),
        "part": row(OTHER, part),
        "near": row(NEAR.replace("bay", "sound").replace("four", "5").replace("October", "May"), OTHER),
        "id": row("ferry ticket office", OTHER),
        "one word": row("tickets", OTHER),
        "seven words": row("ferry crosses the bay four times a week", OTHER),
        "negative": row("an unseen question", OTHER, negative=[LONG]),
    }
    rows = {name: {"negative": [], **fields} for name, fields in rows.items()}
    clean = ["id", "one word", "seven words", "negative"]
    (kept,), (dropped,) = run(decontaminate, tmp_path / "default", list(rows.values()), against=[against])
    assert kept == [rows[name] for name in clean]
    assert sum(dropped.values()) == 4 and dropped["query in evaluation data"] == 1
    assert dropped["positive in evaluation data"] == 1

    (kept,), _ = run(
        decontaminate, tmp_path / "long", list(rows.values()), against=[against], ngram_words=20, threshold=None
    )
    assert [item["query"] for item in kept] == [rows[name]["query"] for name in ("part", "near", *clean)]


def test_near_duplicates_without_common_words(tmp_path):
    changed = LONG.split()
    changed[6::7] = [word + "s" for word in changed[6::7]]  # no eight words in a row are left
    against = tmp_path / "eval.txt"
    against.write_text(LONG + "\n")
    rows = [row(" ".join(changed), OTHER)]
    _, (dropped,) = run(decontaminate, tmp_path / "near", rows, against=[against], threshold=0.7)
    assert dropped == {"query near duplicate of evaluation data": 1}
    assert run(decontaminate, tmp_path / "none", rows, against=[against], threshold=None) == ([rows], [{}])


@pytest.mark.parametrize("form", [".jsonl", ".jsonl.gz", ".json", ".tsv", ".txt", ".parquet", "beir"])
def test_reads_every_evaluation_format(tmp_path, form):
    against = tmp_path / f"eval{form}"
    if form == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": ["1"], "texts": [[OTHER, LONG]]}), against)
    elif form == "beir":
        write_json_lines(against / "corpus.jsonl", [{"_id": "d", "title": "", "text": LONG}])
        (against / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\td\t1\n{OTHER}\td\t1\n")
    elif form == ".tsv":
        against.write_text(f'label\ttext\nferry\t"{LONG}\n')
    elif form == ".txt":
        against.write_text(f"Some text\n{LONG}\n")
    else:
        write_json_lines(against, [{"id": "1", "nested": {"query": LONG}}])
    rows = [row(LONG, "An answer."), row("how many decks has it", "It has four decks.")]
    assert run(decontaminate, tmp_path, rows, against=[against]) == ([rows[1:]], [{"query in evaluation data": 1}])


def test_evaluation_files_are_in_the_manifest(tmp_path):
    against = tmp_path / "eval.txt"
    against.write_text("an unrelated text\n")
    run(decontaminate, tmp_path, [row(LONG)], against=[against])
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())[-1]
    assert record["inputs"][str(against)] == hashlib.sha256(against.read_bytes()).hexdigest()


def test_where(tmp_path):
    """Classification files hold all splits, and topics that may be our labels."""
    against = tmp_path / "eval.tsv"
    against.write_text(f"split\ttopic\ttext\ntrain\tsea-travel\t{LONG}\ntest\tsea-travel\t{OTHER}\n")
    rows = [row(LONG, "sea travel"), row(OTHER, "sea travel")]
    found = run(decontaminate, tmp_path, rows, against=[against], where={"split": "test"})
    assert found == ([rows[:1]], [{"query in evaluation data": 1}])


def test_words_keep_their_marks():
    assert words("Don't हिन्दी, বাংলা; ไทยนี้ 漢字2024かな!") == [
        *("don", "t", "हिन्दी", "বাংলা", "ไ", "ท", "ย", "นี้", "漢", "字", "2024", "か", "な")
    ]


@pytest.mark.parametrize("language", ["hi", "th", "zh", "ja"])
def test_scripts_share_as_little_as_latin(tmp_path, shared_folder, language):
    """What real lines have in common with others by chance: in English one in 3,000."""
    lines = read_lines(shared_folder / "data" / "raw" / f"{language}.txt.gz", 2000)
    against = tmp_path / "eval.txt"
    against.write_text("\n".join(lines[1000:]))
    rows = [row(line) for line in lines[:1000]]
    (kept,), _ = run(decontaminate, tmp_path, rows, against=[against], threshold=None)
    assert len(kept) > 980


@pytest.mark.parametrize("language", ["en", "ru", "hi"])
def test_real_contamination(tmp_path, shared_folder, language):
    """All planted evaluation queries are found among real sentences; hardly any other text is taken for one."""
    evaluation = shared_folder / "data" / "eval" / "retrieval" / "xquad" / language
    planted = [query["text"] for query in read_json_lines(evaluation / "queries.jsonl")][:100]
    lines = read_lines(shared_folder / "data" / "raw" / f"{language}.txt.gz", 3000)
    rows = [row(text) for text in [*lines, *planted]]
    (kept,), _ = run(decontaminate, tmp_path, rows, against=[evaluation])
    stays = {item["query"] for item in kept}
    assert not stays & set(planted)
    assert sum(line not in stays for line in lines) <= 0.005 * len(lines)


@pytest.mark.parametrize(
    "against, parameters, error, message",
    [
        ("absent", {}, FileNotFoundError, "absent"),
        ("eval.doc", {}, ValueError, "eval.doc does not end in one of"),
        ("broken.jsonl", {}, ValueError, r"broken\.jsonl, line 2 is not valid JSON"),
        ("broken.jsonl.gz", {}, ValueError, r"broken\.jsonl\.gz"),
        ("eval.txt", {"ngram_words": 2}, ValueError, "ngram_words=2"),
        ("eval.txt", {"threshold": 2.0}, ValueError, "threshold=2.0"),
    ],
)
def test_bad_evaluation_data(tmp_path, against, parameters, error, message):
    (tmp_path / "eval.doc").write_text(LONG)
    (tmp_path / "eval.txt").write_text(LONG)
    (tmp_path / "broken.jsonl").write_text('{"query": "a b c"}\n{"query": \n')
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"query": "a b c"}\n' * 99)[:-9])
    with pytest.raises(error, match=message):
        run(decontaminate, tmp_path, [row("a question")], against=[tmp_path / against], **parameters)
    assert not (tmp_path / "out").exists()
