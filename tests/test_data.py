"""Data formats, what is dropped and why, splits, tokenization."""

import gzip
import json
from pathlib import Path

import pytest
import tiny

import common
from cleanalign import data
from cleanalign.data import Row
from cleanalign.errors import UserError

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def parse(columns=(), **fields):
    return data.parse_row("f:1", fields, columns)


def test_standard_and_conversational_formats_read_alike():
    messages = [{"role": "user", "content": "hi"}]
    both = ("chosen", "rejected")
    assert parse(both, prompt="hi", chosen="yes", rejected="no") == Row("f:1", "hi", "yes", "no")
    explicit = parse(
        both,
        prompt=messages,
        chosen=[{"role": "assistant", "content": "yes"}],
        rejected=[{"role": "assistant", "content": "no"}],
    )
    implicit = parse(
        both,
        chosen=[*messages, {"role": "assistant", "content": "yes"}],
        rejected=[*messages, {"role": "assistant", "content": "no"}],
    )
    assert explicit == implicit == Row("f:1", messages, "yes", "no")
    ultrafeedback = parse(
        both,
        prompt="hi",
        chosen=[*messages, {"role": "assistant", "content": "yes"}],
        rejected=[*messages, {"role": "assistant", "content": "no"}],
    )
    assert ultrafeedback.prompt == "hi" and ultrafeedback.chosen == "yes"
    assert parse(("response",), prompt="hi", completion="ok").response == "ok"


def test_hh_dialogues_split_at_the_last_assistant_turn():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = parse(("chosen", "rejected"), chosen=text + " yes", rejected=text + " no")
    assert [m["role"] for m in row.prompt] == ["user", "assistant", "user"] and (
        row.chosen,
        row.rejected,
    ) == ("yes", "no")
    assert data.write_dialogue(row.prompt) + "\n\nAssistant:" == text


def test_unusable_rows_give_their_reason():
    both = ("chosen", "rejected")
    assert parse(both, prompt="hi", chosen="same", rejected="same") == "identical chosen and rejected"
    assert parse((), prompt="  ") == "empty"
    assert parse(both, prompt="hi", chosen="x", rejected=" ") == "empty"
    one, other = ([{"role": "user", "content": c}, {"role": "assistant", "content": "r" + c}] for c in "ab")
    assert parse(both, chosen=one, rejected=other) == "mismatched prompts"
    assert "assistant" in parse((), prompt=[{"role": "assistant", "content": "hi"}])
    with pytest.raises(UserError, match="f:1: no column 'rejected'; this row has prompt, chosen"):
        parse(both, prompt="hi", chosen="yes")
    with pytest.raises(UserError, match="f:1: 'prompt' must be text or a list"):
        parse((), prompt=3)


def test_files(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b" if i else "a"} for i in range(40)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "x.jsonl").write_text(text)
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(text)
    loaded = [
        data.load_rows(str(tmp_path / name), ("chosen", "rejected"), held_out=8)
        for name in ("x.jsonl", "x.jsonl.gz")
    ]
    for train, test in loaded:
        assert len(train) == 32 and len(test) == 7  # of 39 usable rows a fifth at most is held out
        assert not {r.prompt for r in train} & {r.prompt for r in test}
    # the same rows are held out every time
    assert [r.prompt for r in loaded[0][1]] == [r.prompt for r in loaded[1][1]]


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": [f"p{i}" for i in range(20)]}), tmp_path / "x.parquet"
    )
    train, test = data.load_rows(str(tmp_path / "x.parquet"), held_out=4)
    assert len(train) == 16 and len(test) == 4


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl:2: not valid JSON"),
        ('{"prompt": "a"}\n[1]\n', r"x\.jsonl:2: a row must be a JSON object, this is a list"),
        ('{"text": "a"}\n', r"x\.jsonl:1: no column 'prompt'; this row has text"),
        ("", "no usable row"),
        ('{"prompt": " "}\n', r"no usable row \(dropped: 1 empty\)"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        data.load_rows(str(tmp_path / "x.jsonl"))


def test_missing_files_and_names():
    with pytest.raises(UserError, match="no such file"):
        data.load_rows("nowhere.jsonl")
    with pytest.raises(UserError, match="Did you mean chitchat"):
        data.load_rows("chichat")
    with pytest.raises(UserError, match="cannot be read"):
        data.load_rows(_not_gzip())


def _not_gzip():
    import tempfile

    path = Path(tempfile.mkdtemp()) / "x.jsonl.gz"
    path.write_text("plain")
    return str(path)


def test_chitchat_splits_are_fixed_and_disjoint():
    pytest.importorskip("chitchat_dataset")
    train, test = data.load_rows("chitchat")
    assert len(train) > 50_000 and len(test) > 5_000
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert not {r.id.split(":")[0] for r in train} & {r.id.split(":")[0] for r in test}
    assert all(5 <= len(r.prompt.split()) <= 25 for r in test)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_real_files():
    train, test = data.load_rows(str(SHARED / "hh_rlhf_harmless_base_test.jsonl.gz"), ("chosen", "rejected"))
    assert len(train) + len(test) > 2000 and all(row.prompt[-1]["role"] == "user" for row in train)
    train, _ = data.load_rows(
        str(SHARED / "alpaca_eval_gpt4_preferences_test.jsonl.gz"), ("chosen", "rejected")
    )
    assert len(train) > 1000


def test_encoding_with_and_without_a_chat_template():
    chat, plain = tiny.tokenizer(), tiny.tokenizer(chat=False)
    messages = [{"role": "user", "content": "good cat"}]
    assert common.encode_prompt(chat, "good cat") == common.encode_prompt(chat, messages)
    assert chat.decode(common.encode_prompt(chat, "good cat")) == "<s> user : good cat </s> <s> assistant :"
    assert plain.decode(common.encode_prompt(plain, "good cat")) == "good cat"
    end = common.turn_end(chat, [chat.eos_token_id])
    assert end == chat.eos_token_id
    assert chat.decode(common.encode_response(chat, "x", "fine dog", end, 9)) == "fine dog </s>"
    # cut, and left open
    assert chat.decode(common.encode_response(chat, "x", "fine dog sun", end, 2)) == "fine dog"


def test_long_prompts_are_dropped_and_counted(capsys):
    rows = [Row(str(i), "good " * (i + 1)) for i in range(10)]
    kept, tokens = common.encode_rows(tiny.tokenizer(chat=False), rows, 6, None, 0, "prompts")
    assert len(kept) == len(tokens) == 6
    assert "4 of 10 rows dropped: 4 longer than --max-prompt-length 6" in capsys.readouterr().out
    with pytest.raises(UserError, match="no usable row"):
        common.encode_rows(tiny.tokenizer(chat=False), rows[8:], 6, None, 0, "prompts")
