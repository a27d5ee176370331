"""Sources: every kind of file is read with exact lines, damage is named, identity is content; real data sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from lora_tune.data.checking import read_conversations
from lora_tune.data.readers import read_file
from lora_tune.data.rows import MAX_ROW_BYTES
from lora_tune.errors import DataError, RecipeError, UsageError
from lora_tune.recipe import DataSource

ROWS = [{"prompt": f"p{i}", "completion": f"c{i} \u2028é"} for i in range(5)]


def read(path, **keys):
    return read_conversations([DataSource(source=str(path), **keys)], hold_out=0, seed=1)


def places(path, **keys):
    return [(row.line, row.messages[0].content) for row in read(path, **keys).train]


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows, separator=","):
    lines = [separator.join(rows[0])]
    lines += [separator.join(f'"{value}"' if separator == "," else value for value in row.values()) for row in rows]
    return "\n".join(lines)


def parquet(path, rows):
    import pyarrow as pa
    from pyarrow import parquet as writer

    writer.write_table(pa.Table.from_pylist(rows), path)
    return path


EACH_LINE = [(i + 1, f"p{i}") for i in range(5)]
KINDS = {
    "rows.jsonl": (jsonl(ROWS), EACH_LINE),
    "bom.jsonl": (b"\xef\xbb\xbf" + jsonl(ROWS).encode(), EACH_LINE),
    "crlf.jsonl": (jsonl(ROWS).replace("\n", "\r\n"), EACH_LINE),
    "no_final_newline.jsonl": (jsonl(ROWS)[:-1], EACH_LINE),
    "lines_named.json": (jsonl(ROWS), EACH_LINE),
    "gzip_named.jsonl": (gzip.compress(jsonl(ROWS).encode()), EACH_LINE),
    "rows.jsonl.gz": (gzip.compress(jsonl(ROWS).encode()), EACH_LINE),
    "one_line.json": (json.dumps(ROWS), [(1, f"p{i}") for i in range(5)]),
    "indented.json": (json.dumps(ROWS, indent=1), [(2 + 4 * i, f"p{i}") for i in range(5)]),
    "array_named.jsonl": (json.dumps(ROWS, indent=1), [(2 + 4 * i, f"p{i}") for i in range(5)]),
    "objects.jsonl": ("\n".join(json.dumps(row, indent=1) for row in ROWS), [(1 + 4 * i, f"p{i}") for i in range(5)]),
    "rows.csv": (csv_text(ROWS), [(i + 2, f"p{i}") for i in range(5)]),
    "semicolons.csv": (csv_text(ROWS).replace(",", ";"), [(i + 2, f"p{i}") for i in range(5)]),
    "rows.tsv": (csv_text(ROWS, "\t"), [(i + 2, f"p{i}") for i in range(5)]),
    "rows.csv.gz": (gzip.compress(csv_text(ROWS).encode()), [(i + 2, f"p{i}") for i in range(5)]),
    "json_named.csv": (json.dumps(ROWS), [(1, f"p{i}") for i in range(5)]),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_read_with_exact_lines(tmp_path, name):
    data, expected = KINDS[name]
    assert places(written(tmp_path / name, data)) == expected


def test_parquet_counts_rows_and_drops_filled_nulls(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]},
        {
            "messages": [
                {"role": "user", "content": "c"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
                {"role": "tool", "content": "d", "tool_call_id": "1"},
                {
                    "role": "assistant",
                    "content": "e",
                    "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}],
                },
            ]
        },
    ]
    found = read(parquet(tmp_path / "rows.parquet", rows)).train
    assert [row.line for row in found] == [1, 2]
    assert found[1].messages[1].tool_calls[0]["function"]["arguments"] == {"x": 1}
    assert found[1].messages[3].tool_calls[0]["function"]["arguments"] == {"y": 2}
    damaged = written(tmp_path / "damaged.parquet", (tmp_path / "rows.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged Parquet file"):
        read(damaged)


def test_a_csv_record_over_several_lines_keeps_its_first_line(tmp_path):
    text = 'prompt,completion\n"a\nb",c\nd,e\n'
    assert places(written(tmp_path / "a.csv", text)) == [(2, "a\nb"), (4, "d")]


def test_columns_by_number_read_a_table_without_a_header(tmp_path):
    path = written(tmp_path / "a.tsv", 'q1\ta1\tbecause\n"q2"\ta2\t\n')
    assert places(path, columns={"prompt": "1", "completion": "2"}) == [(1, "q1"), (2, '"q2"')]


def test_a_text_file_is_one_document_cut_at_line_ends_only_where_it_is_huge(tmp_path):
    assert [row.text for row in read(written(tmp_path / "a.txt", "one\n\ntwo\n")).train] == ["one\n\ntwo"]
    lines = [f"line {i} " + "x" * 80 for i in range(8000)]
    found = read(written(tmp_path / "b.txt", "\n".join(lines))).train
    assert len(found) > 1 and "\n".join(row.text for row in found) == "\n".join(lines)
    assert all(lines[row.line - 1] == row.text.split("\n")[0] for row in found)


BROKEN = {
    "cut.json": (json.dumps(ROWS, indent=1)[:-40], "not JSON: unfinished object", 19),
    "no_comma.json": (json.dumps(ROWS, indent=1).replace("},\n", "}\n", 1), "missing comma between two rows", 6),
    "trailing.json": ("[{}\n,]", "trailing comma", 2),
    "unclosed.json": ("[{}\n", "`]` is missing", 2),
    "unclosed_comma.json": ("[{},\n", "unfinished array", 2),
    "after.json": ("[{}]\n[]", "more text after the end of the array", 2),
    "objects.json": ('{\n"a": 1\n}\n{\n"a": }', "not JSON", 5),
    "numbers.json": ("[{}, 5]", "a row must be an object, got the number 5", 1),
    "python.jsonl": ('{"a": None}', "None is Python, not JSON", 1),
    "two.jsonl": ('{"a": 1} {"b": 2}', "more text after the end of the row", 1),
    "raw_tab.jsonl": ('{"a": "\tb"}', "control character", 1),
    "escape.jsonl": ('{"a": "\\x"}', "invalid escape", 1),
    "colon.jsonl": ('{"a" 1}', "missing colon", 1),
    "comma.jsonl": ('{"a": 1 "b": 2}', "missing comma", 1),
    "quote.jsonl": ('{"a": bc}', "text outside quotation marks", 1),
    "open.jsonl": ('{"a": 1', "unfinished object", 1),
    "latin.csv": (csv_text(ROWS[:2]).encode("latin-1", "replace").replace(b"p1", b"p\xe91"), "byte 0xe9", 2),
    "latin.json": (json.dumps(ROWS, indent=1).encode().replace(b"p3", b"p\xe93"), "byte 0xe9", 15),
    "fields.csv": ("prompt,completion\na,b,c\n", "3 fields, but the header has 2", 2),
    "twice.csv": ("prompt,prompt\na,b\n", "column `prompt` stands twice", 1),
    "quotes.csv": ('prompt,completion\na,"b\nc,d\n', "a quoted field does not end", 2),
    "blank.csv": ("prompt,completion\na,b\n\nc,d\n", "blank line", 3),
    "utf16.csv": (csv_text(ROWS).encode("utf-16"), "looks like UTF-16", 1),
    "binary.jsonl": (bytes(range(64)).replace(b"\n", b""), "binary data", 1),
    "rows.zip": (b"PK\x03\x04aaaa", "a zip archive", 1),
    "cut.jsonl.gz": (gzip.compress(jsonl(ROWS * 500).encode())[:-30], "damaged gzip file", None),
    "header_only.csv": ("prompt,completion\n", "no rows", None),
    "spaces.json": (" \n ", "blank line", 1),
    "empty.json": ("[]", "no rows", None),
    "reserved.jsonl": (jsonl([{**ROWS[0], "attention_mask": [1]}]), "reserved for tokens", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named_with_its_line(tmp_path, name):
    data, reason, line = BROKEN[name]
    with pytest.raises(DataError) as caught:
        read(written(tmp_path / name, data), format="prompt_completion")
    found = [problem for problem in caught.value.problems if reason in problem.reason]
    assert found, str(caught.value)
    assert line is None or found[0].line == line


def test_a_huge_row_is_refused_before_it_is_parsed_in_any_container(tmp_path):
    huge = [ROWS[0], {"prompt": "x" * (3 * MAX_ROW_BYTES), "completion": "y"}, ROWS[1]]
    for name, data in (("a.jsonl", jsonl(huge)), ("a.json", json.dumps(huge, indent=1))):
        with pytest.raises(DataError, match="over the size cap of 1 MiB"):
            read(written(tmp_path / name, data))


def test_nesting_is_capped_in_any_container(tmp_path):
    deep = '{"a": ' + "[" * 70 + "]" * 70 + "}"
    very_deep = deep.replace("[" * 70, "[" * 100_000).replace("]" * 70, "]" * 100_000)
    for name, data in (
        ("a.jsonl", deep),
        ("b.json", f"[{deep}]"),
        ("c.jsonl", very_deep),
        ("d.json", f"[{very_deep}]"),
    ):
        with pytest.raises(DataError, match="nested too deep"):
            read(written(tmp_path / name, data), format="text")


def test_a_large_array_is_read_block_by_block(tmp_path):
    rng = random.Random(1)
    rows = [{"prompt": f"{i} " + "wörd " * rng.randint(1, 2000), "completion": "c"} for i in range(1500)]
    path = written(tmp_path / "a.json", json.dumps(rows, indent=2, ensure_ascii=False))
    assert path.stat().st_size > 4 * MAX_ROW_BYTES
    found = [(record.line, record.row) for record in read_file(path)]
    assert found == [(2 + 4 * i, row) for i, row in enumerate(rows)]


def test_folder_and_glob_read_their_files_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0]), ("sub/c.json", ROWS[2])):
        written(tmp_path / name, json.dumps(row))
    written(tmp_path / "README.md", "not data")
    written(tmp_path / ".hidden.jsonl", "not data")
    assert [content for _, content in places(tmp_path)] == ["p0", "p1", "p2"]
    assert [content for _, content in places(tmp_path / "*.jsonl")] == ["p0", "p1"]
    assert {Path(row.file).name for row in read(tmp_path).train} == {"a.jsonl", "b.jsonl", "c.json"}


def test_identity_is_the_content_and_never_the_time(tmp_path):
    path = written(tmp_path / "a.jsonl", jsonl(ROWS))
    first = read(path).identities[0]
    os.utime(path, (1, 1))
    assert read(path).identities[0] == first
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (first.name, first.format, first.rows) == ("a.jsonl", "prompt_completion", 5)
    time = path.stat().st_mtime_ns
    written(path, jsonl(ROWS).replace("p4", "p5"))
    os.utime(path, ns=(time, time))
    assert read(path).identities[0].sha256 != first.sha256


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("./nowhere/x.csv", "no such file or folder"),
        ("*.parquet", "no file matches"),
        ("empty_folder", "no data file in the folder"),
        ("someone/some_data", "cannot be reached"),
    ],
)
def test_a_source_that_is_not_there_is_a_usage_error(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UsageError, match=words) as caught:
        read(source)
    assert not isinstance(caught.value, DataError) and caught.value.problems[0].key == "data.0.source"


def test_a_mistyped_file_gets_the_nearest_name(tmp_path):
    written(tmp_path / "train.jsonl", jsonl(ROWS))
    with pytest.raises(UsageError, match=r"did you mean `train\.jsonl`"):
        read(tmp_path / "trian.jsonl")


def test_unknown_fields_in_columns_are_a_recipe_error(tmp_path):
    path = written(tmp_path / "a.jsonl", jsonl(ROWS))
    with pytest.raises(RecipeError) as caught:
        read(path, format="prompt_completion", columns={"promt": "prompt"})
    assert caught.value.problems[0].key == "data.0.columns.promt" and "`prompt`" in caught.value.problems[0].fix


def test_bad_rows_are_dropped_and_counted_where_the_recipe_says_so(tmp_path):
    path = written(tmp_path / "a.jsonl", jsonl([*ROWS, {"prompt": "a", "completion": ""}, {"prompt": "a"}]) + "{\n")
    found = read(path, on_bad_row="drop", format="prompt_completion")
    assert len(found.train) == 5 and found.ledger.balances()
    assert {cause: (c.rows, c.first) for cause, c in found.ledger.sources[0].dropped.items()} == {
        "empty answer": (1, "a.jsonl:6"),
        "wrong shape": (1, "a.jsonl:7"),
        "not JSON": (1, "a.jsonl:8"),
    }
    damaged = written(tmp_path / "b.json", json.dumps(ROWS)[:-3])
    with pytest.raises(DataError, match="the rest of the file was not read"):
        read(damaged, on_bad_row="drop")


READ = {
    "llamafactory/alpaca_en_demo.json": ("alpaca", 999),
    "llamafactory/alpaca_zh_demo.json": ("alpaca", 1000),
    "llamafactory/identity.json": ("alpaca", 91),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "llamafactory/reason_tool_use_demo_50.jsonl": ("messages", 50),
    "llamafactory/v1_sft_demo.jsonl": ("messages", 500),
    "llamafactory/c4_demo.jsonl": ("text", 300),
    "gsm8k/train.jsonl": ("prompt_completion", 7473),
    "gsm8k/test.jsonl": ("prompt_completion", 1319),
    "t0/ag_news_classify_with_choices.jsonl": ("prompt_completion", 200),
    "t0/xsum_DOC_tldr.jsonl": ("prompt_completion", 200),
    "alpacacleaned/toolformer-similarity-0.6.json": ("alpaca", 2396),
    "messages_sql/train_stageA.jsonl": ("messages", 301),
    "openai_chat/toy_chat_fine_tuning.jsonl": ("messages", 5),
    "dolly/dolly.json": ("alpaca", 12),
    "dolly/dolly_jsonl_named_json.json": ("alpaca", 12),
    "longform/longform_train.json": ("prompt_completion", 17),
    "parquet/turkish_dialogues_test.parquet": ("messages", 525),
    "parquet/turkish_dialogues_test.jsonl": ("messages", 525),
    "alpaca_tiny_torchtune.json": ("alpaca", 100),
    "messy/whoami_crlf.json": ("alpaca", 11),
    "messy/roles_human-assistant.json": ("sharegpt", 1),
    "messy/json-named-csv.csv": ("sharegpt", 4),
}
MAPPED = {
    "csv/peft_twitter.csv": ({"prompt": "Tweet text", "completion": "Label"}, 3449),
    "flan_cot/strategyqa_train.tsv": ({"prompt": "1", "completion": "2"}, 2061),
    "flan_cot/qasc_train.tsv": ({"prompt": "1", "completion": "2"}, 1084),
    "flan_cot/creak_train.tsv": ({"prompt": "1", "completion": "3"}, 6915),
    "messy/wiki_long_jsonl-named-json.json": ({"text": "content"}, 2),
}
REFUSED = {
    "messy/gsm8k_test_unescaped-quote_line120.jsonl": [120],
    "messy/qa_crlf_empty-output.json": [1957],
    "messy/openai_blank-lines.jsonl": [2, 4, 6, 8, 10, 12, 14, 16, 18],
    "messy/conversation_extra-empty-row.json": [14],
    "messy/comments-in-jsonl.jsonl": [*range(1, 17), 70],
    "messy/roles_Customer-gpt.jsonl": list(range(1, 11)),
    "messy/dataset_info_missing-comma.json": [378],
    "messy/trec_fine_grained_ABBR_0-bytes.jsonl": [None],
    "llamafactory/mllm_demo.json": [2, 26, 49, 72, 96, 119],
    "llamafactory/dpo_en_demo.json": [2],
    "llamafactory/kto_en_demo.json": [2],
    "mlx_dpo/train.jsonl": [1],
    "natural_instructions/task591_sciq_answer_generation/dev.json": [1],
    "self_instruct/seed_tasks.jsonl": [1],
    "csv/peft_twitter.csv": [2],
    "flan_cot/qasc_train.tsv": [2],
}


@pytest.mark.parametrize("name", READ)
def test_real_data_is_read_as_its_format(corpus, name):
    found = read(corpus / "data" / "datasets" / name)
    assert (found.ledger.sources[0].format, len(found.train)) == READ[name]
    assert found.ledger.balances()


@pytest.mark.parametrize("name", MAPPED)
def test_real_tables_are_read_by_their_columns(corpus, name):
    columns, rows = MAPPED[name]
    assert len(read(corpus / "data" / "datasets" / name, columns=columns).train) == rows


@pytest.mark.parametrize("name", REFUSED)
def test_messy_data_is_refused_with_its_lines(corpus, name):
    with pytest.raises(DataError) as caught:
        read(corpus / "data" / "datasets" / name)
    lines = [problem.line for problem in caught.value.problems]
    assert sorted(set(lines) - {None}) == [line for line in REFUSED[name] if line] and lines


def test_parquet_and_jsonl_of_the_same_rows_are_the_same_conversations(corpus):
    folder = corpus / "data" / "datasets" / "parquet"
    parquet_rows, json_rows = (read(folder / f"turkish_dialogues_test.{end}").train for end in ("parquet", "jsonl"))
    assert (parquet_rows.digests == json_rows.digests).all()
