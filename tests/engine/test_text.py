import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from runtime.engine.errors import ContextLengthExceeded, InvalidRequest
from runtime.engine.text import Detokenizer, OutputText
from runtime.engine.tokenizer import Tokenizer, TokenizerError, read_tokenizer_files
from security.manifest import ManifestMismatch, ModelFiles, build_manifest
from tests.engine.fakes import Characters
from tests.engine.models import byte_fallback, byte_level, files_of


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    makers = {"level": byte_level, "fallback": byte_fallback}
    tokenizers = {
        name: Tokenizer(files_of(make(), tmp_path_factory.mktemp(name)))
        for name, make in makers.items()
    }
    yield tokenizers
    for tokenizer in tokenizers.values():
        tokenizer.close()


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("kind", ["level", "fallback"])
@pytest.mark.parametrize(
    "text",
    ["hello hello", "hello 你好 🙂🙂 x", "  two  spaces", "мир", "a\n\n b\t", "é" * 20, "\ufffdx"],
)
def test_streamed_text_is_the_text(loaded, kind, text):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text, 1000, special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 319), max_size=40))
@example([98, 0, 0, 0, 0, 0, 0, 130, 98])  # special tokens inside a character
def test_any_tokens_stream_to_their_text(loaded, ids):
    tokenizer = loaded["level"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


# Bytes that begin, continue and end characters, or are in none, a letter and a special token.
SPLIT = [0xF0, 0x9F, 0x99, 0x82, 0xE4, 0xBD, 0xA0, 0xC3, 0xA9, 0xFF, ord("a")]


@given(st.lists(st.sampled_from([*SPLIT, None]), max_size=60))
@example([0xFF] * 7 + [0xF0, 0x9F, 0x99, 0x82])
@example([0xF0, 0x9F] * 9 + [None] * 9 + [0x99, 0x82])
def test_bytes_in_any_order_stream_to_their_text(loaded, content):
    tokenizer = loaded["level"]
    of_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocabulary)}
    end = tokenizer.eos_token_id
    ids = [end if byte is None else of_byte[bytes([byte])] for byte in content]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    # Three bytes may wait for a fourth, and one character for what shows that it is none.
    shown = 0
    for place, piece in enumerate(pieces[:-1], 1):
        shown += len(piece)
        assert shown >= len(tokenizer.decode(ids[:place])) - 4


def test_bytes_that_are_no_character_are_not_waited_for(loaded):
    for kind, bad in (("fallback", 3 + 0xFF), ("level", None)):
        tokenizer = loaded[kind]
        if bad is None:
            bad = next(t for t in range(320) if tokenizer.token_bytes(t) == b"\xff")
        pieces = stream(tokenizer, [bad] * 30)
        assert len("".join(pieces)) == 30
        assert all(len("".join(pieces[:end])) >= end - 4 for end in range(30))


def test_a_stream_decodes_few_tokens_at_a_time(loaded):
    class Counting:
        longest = 0

        def decode(self, token_ids):
            self.longest = max(self.longest, len(token_ids))
            return loaded["level"].decode(token_ids)

        def has_text(self, token):
            return loaded["level"].has_text(token)

    counting = Counting()
    bad = next(t for t in range(320) if loaded["level"].token_bytes(t) == b"\xff")
    stream(counting, ([bad] * 50 + [0] * 50 + [98]) * 3)
    assert counting.longest <= 8


def test_which_tokens_have_text(loaded):
    for tokenizer in loaded.values():
        assert not tokenizer.has_text(tokenizer.eos_token_id)
        assert not tokenizer.has_text(10**6)
    fallback = loaded["fallback"]
    # A space at the very start is dropped; that does not make its token a silent one.
    space = fallback.encode(" ", 9, special_tokens=False)[0]
    assert fallback.decode([space]) == "" and fallback.has_text(space)
    assert all(
        tokenizer.has_text(token) == bool(tokenizer.decode([token, token]))
        for tokenizer in loaded.values()
        for token in range(tokenizer.vocabulary)
    )


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_whatever_the_borders(text, stops):
    output = OutputText(Characters(), tuple(stops))
    shown = ""
    for character in text:
        shown += output.push(ord(character))
        if output.stopped:
            break
    if not output.stopped:
        shown += output.finish()
    # One character at a time, the stop that is complete first wins.
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    assert shown == (text if not ends else text[: min(ends)[0] + min(ends)[1]])
    assert output.stopped == bool(ends)


def test_only_what_may_become_a_stop_string_is_held_back():
    output = OutputText(Characters(), ("END",))
    assert [output.push(ord(c)) for c in "aEbEN."] == ["a", "", "Eb", "", "", "EN."]
    assert output.push(ord("E")) == "" and output.finish() == "E"


def test_encoding_is_that_of_transformers(loaded, tmp_path):
    reference = byte_level()
    for text in ("hello world", "<|user|>\nhi<|end|>", "你好"):
        assert loaded["level"].encode(text, 99, special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
    assert loaded["level"].eos_token_id == reference.eos_token_id
    assert loaded["level"].vocabulary == len(reference)


def test_prompts_that_are_no_text_or_absurdly_long(loaded):
    with pytest.raises(InvalidRequest, match="surrogate"):
        loaded["level"].encode("a\ud800b", 100, special_tokens=True)
    with pytest.raises(ContextLengthExceeded):
        loaded["level"].encode("a" * 10_000_000, 10, special_tokens=True)


def test_special_tokens_have_no_text(loaded):
    ids = loaded["level"].encode("hello<|end|>", 100, special_tokens=False)
    assert loaded["level"].decode(ids) == "hello"


def test_files_that_make_no_tokenizer():
    with pytest.raises(TokenizerError, match="expected files of TOKENIZER_FILES"):
        Tokenizer({"tokenizer.py": b""})
    with pytest.raises(TokenizerError, match="transformers can load"):
        Tokenizer({"tokenizer.json": b"{", "config.json": b"{}"})


def test_a_tokenizer_that_needs_code_is_refused(tmp_path):
    files = files_of(byte_level(), tmp_path)
    files["tokenizer_config.json"] = (
        b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'
    )
    try:
        tokenizer = Tokenizer(files)
    except TokenizerError:
        return
    # transformers may fall back to the files it knows; what matters is that no code ran.
    assert type(tokenizer).__module__ == "runtime.engine.tokenizer"
    tokenizer.close()


def test_a_tokenizer_from_a_manifested_model(tmp_path):
    expected = files_of(byte_level(), tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    manifest = build_manifest(tmp_path)
    with ModelFiles(tmp_path, manifest) as files:
        assert read_tokenizer_files(files) == expected
    (tmp_path / "tokenizer.json").write_bytes(expected["tokenizer.json"] + b" ")
    with ModelFiles(tmp_path, manifest) as files, pytest.raises(ManifestMismatch):
        read_tokenizer_files(files)


def test_a_stop_string_may_be_shown():
    output = OutputText(Characters(), ("END", "EN"), include_stop=True)
    assert [output.push(ord(c)) for c in "aEN"] == ["a", "", "EN"]
    assert output.stopped and (output.produced, output.shown) == (3, 3)
    hidden = OutputText(Characters(), ("END",))
    assert [hidden.push(ord(c)) for c in "aEEND"] == ["a", "", "E", "", ""]
    assert hidden.stopped and (hidden.produced, hidden.shown) == (5, 2)


@given(st.text(alphabet="ab", max_size=20), st.sampled_from(["ab", "aab", "bbb"]))
def test_what_is_shown_is_counted(text, stop):
    output = OutputText(Characters(), (stop,))
    shown = ""
    for character in text:
        shown += output.push(ord(character))
        assert output.shown == len(shown) <= output.produced
        if output.stopped:
            return
    shown += output.finish()
    assert output.shown == output.produced == len(shown) == len(text)


@pytest.mark.parametrize("kind", ["level", "fallback"])
@pytest.mark.parametrize("text", ["hello hello", "a b", "naïve café 你好 мир 🙂", "x\ny"])
def test_bytes_of_tokens_make_up_the_text(loaded, kind, text):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text, 1000, special_tokens=False)
    found = b"".join(tokenizer.token_bytes(token) for token in ids)
    assert found.decode().removeprefix(" ") == tokenizer.decode(ids)


def test_bytes_of_every_token(loaded):
    level, fallback = loaded["level"], loaded["fallback"]
    # The 256 single bytes are tokens of both kinds.
    single = {level.token_bytes(token) for token in range(level.vocabulary)}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert [fallback.token_bytes(3 + byte) for byte in (0x0A, 0x41, 0xC3)] == [b"\n", b"A", b"\xc3"]
    assert level.token_bytes(level.eos_token_id) == b"<|end|>"
    assert level.token_bytes(10**6) == b""
