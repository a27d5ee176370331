"""What is kept of data: a second run reads nothing again, gets the same to the last byte, and never something stale."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import pytest

from lora_tune.data import cache, checking, columns, kept_conversations, overlap, packed_file, store
from lora_tune.data.checking import read_conversations
from lora_tune.errors import DataError
from lora_tune.recipe import DataSource, Eval, Limits, Train

ANY = Limits(dropped_rows="100%", lost_tokens="100%", lost_end_tokens="100%")


@pytest.fixture(scope="module")
def chat(tiny_base):
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template

    return load_chat_template(AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, which keeps few rows as well."""
    monkeypatch.setenv("LORA_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for module in (kept_conversations, packed_file, overlap):
        monkeypatch.setattr(module, "WORTH_ROWS", 1)
    return tmp_path / "cache"


@pytest.fixture
def passes(monkeypatch):
    """One entry for each source that is really read."""
    found: list[str] = []
    read = checking._CheckingPass.read

    def counted(self, source, wanted, *, number):
        found.append(source.name)
        return read(self, source, wanted, number=number)

    monkeypatch.setattr(checking._CheckingPass, "read", counted)
    return found


def write(path, count=60, *, first=0):
    rows = [{"prompt": f"question {i % 50}", "completion": f"the answer {i} {'x ' * (i % 9)}"} for i in range(count)]
    rows[3] = {"prompt": "odd", "completion": "odd", "extra": first}
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(chat, data, *, hold_out="10%", seed=1, **train):
    from lora_tune.data.pipeline import encode

    found = read_conversations(data, hold_out=hold_out, seed=seed)
    settings = Train(**{"max_length": 128, **train})
    return found, encode(found, chat, loss_on="assistant", train=settings, limits=ANY, seed=seed)


def as_values(found, prepared):
    """All that a run takes from its data."""
    rows = (*prepared.held_out_rows, *prepared.documents)
    return (
        list(found.train), list(found.held_out), found.has_tools, found.identities, asdict(prepared.ledger),
        prepared.train.to_dict(), prepared.train._fingerprint, prepared.held_out,
        [(row.input_ids.tolist(), row.mask.tolist(), row.line) for row in rows],
        asdict(overlap.known_overlap(found.train, found.held_out)),
    )  # fmt: skip


def test_a_second_run_reads_nothing_and_gets_the_same(chat, passes):
    data = [DataSource(source=write("a.jsonl")), DataSource(source=write("b.jsonl", 30, first=7), weight=0.5)]
    first = as_values(*prepare(chat, data))
    assert passes == ["a.jsonl", "b.jsonl"]
    assert as_values(*prepare(chat, data)) == first
    assert passes == ["a.jsonl", "b.jsonl"]
    for kind in cache.KINDS:
        assert list((Path("cache") / kind).glob("*.json")), kind


def test_what_was_kept_equals_what_is_read_anew(chat, monkeypatch):
    data = [DataSource(source=write("a.jsonl"))]
    prepare(chat, data)
    again = as_values(*prepare(chat, data))
    monkeypatch.setenv("LORA_TUNE_CACHE", "another")
    fresh = as_values(*prepare(chat, data))
    times = [values[-1].pop("seconds") for values in (again, fresh)]
    assert again == fresh and len(times) == 2


CHANGES = {
    "content": lambda: (write("a.jsonl", first=1), "10%", 1),
    "a row more": lambda: (write("a.jsonl", 61), "10%", 1),
    "the same content elsewhere": lambda: (write("b.jsonl"), "10%", 1),
    "the share held out": lambda: ("a.jsonl", "20%", 1),
    "a file held out": lambda: ("a.jsonl", write("held.jsonl", 5, first=3), 1),
    "seed": lambda: ("a.jsonl", "10%", 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_read_anew(change, passes):
    read_conversations([DataSource(source=write("a.jsonl"))], hold_out="10%", seed=1)
    before = os.stat("a.jsonl")
    path, hold_out, seed = CHANGES[change]()
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    if change == "a file held out":  # its rows must not be those of the training
        Path("held.jsonl").write_text('{"prompt": "new", "completion": "new"}\n')
    passes.clear()
    read_conversations([DataSource(source=path)], hold_out=hold_out, seed=seed)
    assert passes and passes[0] == path


def test_a_held_out_file_that_changed_is_read_anew(passes):
    data = [DataSource(source=write("a.jsonl"))]
    for number, text in enumerate(("new", "newer")):
        Path("held.jsonl").write_text(json.dumps({"prompt": text, "completion": "new"}) + "\n")
        for _ in range(2):
            found = read_conversations(data, hold_out=Eval(hold_out="held.jsonl"), seed=1)
            assert found.held_out[0].messages[0].content == text
        assert len(passes) == 2 * (number + 1)


@pytest.mark.parametrize("keys", [{"max_rows": 20}, {"on_bad_row": "drop"}, {"weight": 2.0}, {"format": "table"}])
def test_every_key_of_a_source_is_part_of_the_question(keys, passes):
    plain = DataSource(source=write("a.jsonl"))
    named = {"columns": {"prompt": "prompt", "completion": "completion"}} if "format" in keys else {}
    read_conversations([plain], hold_out=0, seed=1)
    read_conversations([plain.model_copy(update={**keys, **named})], hold_out=0, seed=1)
    assert len(passes) == 2


def test_other_code_reads_anew(passes, monkeypatch):
    data = [DataSource(source=write("a.jsonl"))]
    read_conversations(data, hold_out=0, seed=1)
    monkeypatch.setattr(kept_conversations, "code_sha256", lambda: "other")
    read_conversations(data, hold_out=0, seed=1)
    assert len(passes) == 2


@pytest.mark.parametrize("kind", cache.KINDS)
def test_a_damaged_entry_is_made_again(kind, chat, own_cache):
    data = [DataSource(source=write("a.jsonl"))]
    first = as_values(*prepare(chat, data))
    (stored, *_) = sorted((own_cache / kind).glob("*.arrow"), key=lambda path: -path.stat().st_size)
    whole, note = stored.read_bytes(), stored.with_suffix(".json").read_text()
    for damaged in (whole[:-1], b"", whole[:-20] + bytes(20), None):
        if damaged is None:
            stored.with_suffix(".json").write_text(note[: len(note) // 2])
        else:
            stored.unlink()  # what is mapped stays as it was
            stored.write_bytes(damaged)
        again = as_values(*prepare(chat, data))
        first[-1].update(seconds=0)
        again[-1].update(seconds=0)
        assert again == first
        assert stored.stat().st_size in range(len(whole) - 30, len(whole) + 30)


def test_rows_that_are_refused_are_refused_every_time():
    Path("bad.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 5)
    for _ in range(2):
        with pytest.raises(DataError, match="empty answer"):
            read_conversations([DataSource(source="bad.jsonl")], hold_out=0, seed=1)
    assert not list(Path("cache").rglob("*.json"))


def test_few_rows_are_not_worth_it(monkeypatch, passes):
    monkeypatch.setattr(kept_conversations, "WORTH_ROWS", 1000)
    for _ in range(2):
        read_conversations([DataSource(source=write("a.jsonl"))], hold_out=0, seed=1)
    assert len(passes) == 2 and not list(Path("cache").rglob("*.arrow"))


def test_a_full_disk_is_no_reason_to_stop(monkeypatch, passes):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.ConversationStore, "write", full)
    for _ in range(2):
        assert len(read_conversations([DataSource(source=write("a.jsonl"))], hold_out=0, seed=1).train) == 60
    assert len(passes) == 2 and not list(Path("cache").rglob("*.tmp"))


def test_a_cache_that_is_denied_is_no_reason_to_stop(own_cache):
    own_cache.mkdir()
    for kind in ("conversations", "overlap"):
        (own_cache / kind).write_text("no folder")
    found = read_conversations([DataSource(source=write("a.jsonl"))], hold_out="10%", seed=1)
    assert len(found.train) + len(found.held_out) == 60
    assert overlap.known_overlap(found.train, found.held_out).rows == len(found.held_out)


def test_where_the_disk_is_full_other_entries_go_before_the_run_stops(own_cache, monkeypatch):
    def filled(kind, size):
        with cache.entry(kind, "0") as path:
            cache.write_entry(path, lambda temporary: {"size": temporary.write_bytes(bytes(size))})
        return path

    def full(path, write):
        if old.exists():
            raise OSError(28, "No space left on device")
        return written(path, write)

    old, written = filled("conversations", 10), cache._written
    monkeypatch.setattr(cache, "_written", full)
    assert filled("tokens", 20).stat().st_size == 20 and not old.exists()


def test_rows_of_this_process_alone_get_the_room_of_other_entries(chat, own_cache, monkeypatch):
    def full(*given):
        if any((own_cache / "conversations").glob("*.arrow")):
            raise OSError(28, "No space left on device")
        return written(*given)

    monkeypatch.setattr(packed_file, "WORTH_ROWS", 1000)
    written = packed_file._write
    monkeypatch.setattr(packed_file, "_write", full)
    assert len(prepare(chat, [DataSource(source=write("a.jsonl"))])[1].train)
    assert not list((own_cache / "packed").iterdir())


def test_what_another_process_is_about_to_open_stays(own_cache, monkeypatch):
    monkeypatch.setattr(cache, "_KEPT_BYTES", 0)
    for key in ("held", "free", "new"):
        with cache.entry("tokens", key) as path:
            cache._written(path, lambda temporary: {"size": temporary.write_bytes(b"x")})
            if key == "held":
                lock = cache.FileLock(path.with_suffix(".lock"))
        if key == "held":
            lock.acquire()
    assert {path.stem for path in own_cache.rglob("*.arrow")} == {"held", "new"}
    lock.release()


def test_nobody_else_may_read_what_is_kept(chat, own_cache):
    (own_cache / "tokens").mkdir(parents=True, mode=0o755)
    before = os.umask(0o022)
    try:
        as_values(*prepare(chat, [DataSource(source=write("a.jsonl"))]))
    finally:
        os.umask(before)
    for kind in cache.KINDS:
        assert (own_cache / kind).stat().st_mode & 0o777 == 0o700
    kept = [path for path in own_cache.rglob("*.*") if path.suffix in (".arrow", ".json")]
    assert len(kept) == 10 and {path.stat().st_mode & 0o777 for path in kept} == {0o600}


def test_a_link_in_the_place_of_an_entry_is_not_followed(own_cache):
    Path("other").write_text("mine")
    with cache.entry("tokens", "0") as path:
        path.with_suffix(f".{os.getpid()}.tmp").symlink_to(Path("other").absolute())
        cache.write_entry(path, lambda temporary: {"size": temporary.write_bytes(b"x")})
    assert Path("other").read_text() == "mine" and not path.is_symlink()


def test_a_note_whose_numbers_changed_is_damage(passes, own_cache):
    data = [DataSource(source=write("a.jsonl"))]
    first = read_conversations(data, hold_out=0, seed=1)
    (note,) = (own_cache / "conversations").glob("*.json")
    note.write_text(note.read_text().replace('"read": 60', '"read": 68'))
    assert asdict(read_conversations(data, hold_out=0, seed=1).ledger) == asdict(first.ledger) and len(passes) == 2


def test_a_pipe_is_not_read_to_look_for_it():
    os.mkfifo("pipe.jsonl")
    reader = os.open("pipe.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    with open("pipe.jsonl", "wb", buffering=0) as pipe:
        pipe.write(b"{}\n")
    source = kept_conversations.Source("pipe", files=(Path("pipe.jsonl"), Path("none")))
    assert kept_conversations.key_of([source], [], data=[]) is None
    assert os.read(reader, 9) == b"{}\n"
    os.close(reader)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_two_bases_that_differ_in_their_eos_alone_share_no_token_rows(tiny_base):
    """As base and chat models of one family do: texts without turns end in the eos that the tokenizer came with."""
    from transformers import AutoTokenizer

    from lora_tune.data.chat_template import load_chat_template
    from lora_tune.data.conversation import Conversation
    from lora_tune.data.token_file import encoder_fingerprint

    rows, fingerprints = [], set()
    for eos in ("<|im_end|>", "<|endoftext|>"):
        tokenizer = AutoTokenizer.from_pretrained(tiny_base, eos_token=eos, pad_token="<|endoftext|>")
        chat = load_chat_template(tokenizer, template=TEMPLATE)
        fingerprints.add(encoder_fingerprint(chat))
        rows.append(chat.rows([Conversation(text="a text")], loss_on="assistant")[0][0].input_ids.tolist())
        assert tokenizer.eos_token == "<|im_end|>"
    assert rows[0] != rows[1] and len(fingerprints) == 2


def test_rows_with_the_date_of_a_template_for_tools_are_of_one_day(tiny_base, monkeypatch):
    from transformers import AutoTokenizer

    from lora_tune.data import token_file
    from lora_tune.data.chat_template import load_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = {
        "default": TEMPLATE,
        "tool_use": "{{ strftime_now('%d %b %Y') }}\n{% for tool in tools or [] %}{{ tool }}{% endfor %}" + TEMPLATE,
    }
    chat, found = load_chat_template(tokenizer), set()
    for day in ("2026-01-01", "2026-01-02"):
        monkeypatch.setattr(token_file, "date", type("Day", (), {"today": lambda day=day: day}))
        found.add(token_file.encoder_fingerprint(chat))
    assert len(found) == 2


def test_the_cache_stays_within_its_size(chat, monkeypatch, own_cache):
    monkeypatch.setattr(cache, "_KEPT_BYTES", 60_000)
    for number in range(6):
        prepare(chat, [DataSource(source=write(f"{number}.jsonl", 60 + number))])
        kept = [path.stat().st_size for path in own_cache.rglob("*.arrow")]
        assert sum(kept) - max(kept) <= 60_000 and kept


@pytest.mark.parametrize("time", ["first", "again"])
def test_what_stays_in_memory_of_a_row_is_some_bytes(monkeypatch, time):
    """Which rows are trained, and no text: places, hashes and offsets are mapped."""
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 1 << 10)
    kept = []
    for count in (600, 1800):
        data = [DataSource(source=write(f"{count}.jsonl", count))]
        read_conversations(data, hold_out=10 if time == "again" else 0, seed=1)
        tracemalloc.start()
        found = read_conversations(data, hold_out=10, seed=1)
        kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(found.train) == count - 10
    assert (kept[1] - kept[0]) / 1200 < 10


def test_what_encoding_and_packing_take_of_a_row_is_some_bytes(chat, monkeypatch):
    """Rows that are encoded already: the arrays of pieces and their packing."""
    monkeypatch.setattr(store, "_IN_MEMORY_BYTES", 1)
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 1 << 10)
    kept, peaks = [], []
    for count in (300, 1500):
        data = [DataSource(source=write(f"{count}.jsonl", count))]
        for _ in range(2):
            tracemalloc.start()
            found = prepare(chat, data, hold_out=0)
            now, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        kept.append(now)
        peaks.append(peak)
        assert len(found[1].documents) == count
    assert (kept[1] - kept[0]) / 1200 < 40 and (peaks[1] - peaks[0]) / 1200 < 80


PACKED_ANEW = {
    "nothing": {},
    "seed": {"seed": 2},
    "max_length": {"max_length": 100},
    "packing": {"packing": False},
    "too_long": {"max_length": 20, "too_long": "split"},
    "weight": {"weight": 2.0},
    "pack": {"pack": False},
    "place": {"line": "{}\n"},
    "content": {"line": '{"prompt": "one more", "completion": "row"}\n'},
}


@pytest.mark.parametrize("change", PACKED_ANEW)
def test_packed_rows_are_those_of_the_question(change, chat, monkeypatch, own_cache):
    """After a first run, a changed one gives what it gives with an empty cache, from a packed entry of its own."""
    data = DataSource(source=write("a.jsonl"), on_bad_row="drop")
    first = prepare(chat, [data])[1].train
    keys = dict(PACKED_ANEW[change])
    text = Path("a.jsonl").read_text()
    Path("a.jsonl").write_text(keys.pop("line", "") + text)
    data = data.model_copy(update={key: keys.pop(key) for key in ("weight", "pack") if key in keys})
    found = []
    for folder in (own_cache, "another"):
        monkeypatch.setenv("LORA_TUNE_CACHE", str(folder))
        found.append(prepare(chat, [data], **keys)[1])
    rows, fresh = found
    assert rows.train.to_dict() == fresh.train.to_dict() and rows.ledger == fresh.ledger
    assert rows.train._fingerprint == fresh.train._fingerprint
    assert (rows.train.to_dict() == first.to_dict()) == (change == "nothing")
    assert len(list((own_cache / "packed").glob("*.json"))) == 1 + (change != "nothing")


# --- what another user put there


@pytest.fixture
def said(monkeypatch):
    """What was warned of; once for each folder, as in a process of its own."""
    found: list[str] = []
    monkeypatch.setattr(cache, "print_problems", lambda problems: found.extend(map(str, problems)))
    monkeypatch.setattr(cache, "_warn_of", functools.cache(cache._warn_of.__wrapped__))
    monkeypatch.setattr(cache, "_temporary", functools.cache(lambda: Path(tempfile.mkdtemp(dir="."))))
    return found


def plant(path, content=b"rows of a stranger"):
    """A whole entry with a note that is right, as somebody else would write it. Returns the note."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    note = {"errors": {}, "sha256": hashlib.sha256(content).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps({"note": note, "sha256": cache._note_sha256(note)}))
    return note


def write_mine(path):
    return cache.write_entry(path, lambda temporary: {"size": temporary.write_bytes(b"mine")})


def everything_in(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_an_entry_of_ones_own_is_taken(own_cache, said):
    note = plant(own_cache / "tokens" / "0.arrow")
    with cache.entry("tokens", "0") as path:
        assert cache.valid_note(path) == note and path.parent == own_cache / "tokens"
    assert not said


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner")
def test_a_cache_of_another_user_is_neither_read_nor_written(own_cache, said, chat, passes, monkeypatch):
    data = [DataSource(source=write("a.jsonl"))]
    first = as_values(*prepare(chat, data))
    plant(own_cache / "tokens" / "0.arrow")
    before, me = everything_in(own_cache), os.geteuid()
    passes.clear()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    again = as_values(*prepare(chat, data))
    times = [values[-1].pop("seconds") for values in (first, again)]
    assert again == first and passes == ["a.jsonl"] and len(times) == 2
    with cache.entry("tokens", "0") as path:
        assert cache.valid_note(path) is None
        write_mine(path)
        assert cache.valid_note(path)
    assert everything_in(own_cache) == before and own_cache not in path.parents
    (line,) = said
    assert str(own_cache) in line and f"user {me}" in line and "LORA_TUNE_CACHE" in line


def test_what_stands_in_elsewhere_is_for_this_user_and_goes_with_the_process(tmp_path):
    code = (
        "import os, sys; from lora_tune.data import cache; os.geteuid = lambda: -1\n"
        "with cache.entry('tokens', '0') as path:\n"
        "    cache.write_entry(path, lambda file: {'size': file.write_bytes(b'x')})\n"
        "print(path, oct(path.parent.parent.stat().st_mode & 0o777))"
    )
    environment = os.environ | {"LORA_TUNE_CACHE": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path, mode = done.stdout.split()
    assert mode == "0o700" and tmp_path in Path(path).parents and not list(tmp_path.iterdir())
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("warning: cache folder: ")


@pytest.mark.parametrize("what", ["a link", "a file"])
def test_a_folder_of_entries_that_is_none_is_not_followed(what, own_cache, said, tmp_path):
    own_cache.mkdir()
    elsewhere = tmp_path / "elsewhere"
    plant(elsewhere / "0.arrow")
    if what == "a link":
        (own_cache / "tokens").symlink_to(elsewhere)
    else:
        (own_cache / "tokens").write_text("x")
    before = everything_in(elsewhere)
    with cache.entry("tokens", "0") as path:
        assert cache.valid_note(path) is None
        write_mine(path)
    with cache.entry("packed", "1") as other:  # making room goes through all folders
        write_mine(other)
        cache._make_room(own_cache, keep=other, most=0)
    assert everything_in(elsewhere) == before and other.exists() and own_cache not in path.parents
    assert len(said) == 1 and str(own_cache / "tokens") in said[0]


@pytest.mark.parametrize("what", ["a link", "a second name", "a pipe", "a folder", "another user's"])
@pytest.mark.parametrize("suffix", [".arrow", ".json", ".lock"])
def test_a_file_that_is_not_ones_own_is_neither_used_nor_written_through(what, suffix, own_cache, said, tmp_path):
    place = own_cache / "tokens" / "0.arrow"
    plant(place)
    victim, at = tmp_path / "victim", place.with_suffix(suffix)
    victim.write_bytes(at.read_bytes() if at.exists() else b"mine")
    at.unlink(missing_ok=True)
    if what == "a link":
        at.symlink_to(victim)
    elif what == "a second name":
        os.link(victim, at)
    elif what == "a pipe":
        os.mkfifo(at)
    elif what == "a folder":
        at.mkdir()
    else:
        at.write_bytes(victim.read_bytes())
        try:
            os.chown(at, 12345, -1)
        except PermissionError:
            pytest.skip("only root can give a file away")
    before = victim.read_bytes()
    with cache.entry("tokens", "0") as path:
        assert suffix == ".lock" or cache.valid_note(path) is None
        write_mine(path)
        assert cache.valid_note(path) and path.read_bytes() == b"mine"
    assert victim.read_bytes() == before
    assert (own_cache in path.parents) == (what != "a folder") == (not said)
