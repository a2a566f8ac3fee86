"""Vocabulary files: what is read, written and refused."""

import importlib.util
import sys

import pytest

from flashbone.errors import ConfigError, FormatError
from flashbone.rwkv.tokenizer import RwkvTokenizer
from flashbone.rwkv.vocabulary import VOCABULARY_NAME, packaged_vocabulary, read_vocabulary, write_vocabulary

MORE = [b"ab", b"abc", b" the", "é".encode(), "中文".encode(), b"\n\n", b" \xe4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A vocabulary with a few tokens besides the single bytes."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.txt"
    write_vocabulary([b"", *(bytes([byte]) for byte in range(256)), *MORE], path)
    return path


def test_the_world_vocabulary_is_read_and_written_again(tmp_path):
    pytest.importorskip("rwkv.rwkv_tokenizer", reason="the vocabulary is in the rwkv package")
    tokens = read_vocabulary(packaged_vocabulary())
    assert len(tokens) == 65530
    assert (tokens[24], tokens[129], tokens[34550], tokens[65529]) == (b"\x17", b"\x80", b"hello", b" " * 128)
    write_vocabulary(tokens, tmp_path / "written.txt")
    assert read_vocabulary(tmp_path / "written.txt") == tokens


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("264 'x y' 4", "line 264: 'x y' has 3 bytes, not 4"),
        ("264 'é' 1", "line 264: 'é' has 2 bytes, not 1"),
        ("5 'xyz' 3", "line 264: id 5 was given before"),
        ("264 'abc' 3", "line 264: b'abc' is token 258 already"),
        ("264 3 1", "line 264: 3 is not a str or bytes"),
        ("264 '' 0", "line 264: '' is not a str or bytes, or empty"),
        ("264 open('x') 1", "is not a literal"),
        ("264 'x 1", "is not a literal"),
        ("264 '\\ud800' 3", "surrogates not allowed"),
        ("x 'xyz' 3", "is not `<id> <literal> <length>`"),
        ("-264 'xyz' 3", "is not `<id> <literal> <length>`"),
        ("", "line 264: '' is not `<id> <literal> <length>`"),
        ("265 'xyz' 3", "its 264 tokens must have the ids 1 to 264, but 264 is missing"),
        ("264 '\\\\xe4' 4", r"two tokens are both written '\\xe4'"),
    ],
)
def test_bad_lines_are_named(small, tmp_path, line, complaint):
    path = tmp_path / "bad.txt"
    path.write_text(small.read_text() + line + "\n")
    with pytest.raises(FormatError) as caught:
        RwkvTokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_bad_lines_are_counted_and_the_first_are_quoted(small, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(small.read_bytes() + b"264 'x' 1\n\xff\n1\n2\n3\n")
    with pytest.raises(FormatError, match=r"line 264: .*; line 265: not UTF-8; line 266: .*; and 2 more"):
        RwkvTokenizer(path)


def test_a_cut_or_missing_file_is_refused(small, tmp_path):
    path = tmp_path / "cut.txt"
    path.write_text("".join(small.read_text().splitlines(keepends=True)[:200]))
    with pytest.raises(FormatError, match=r"no token for the single byte b'\\xc8' \(in all 56 of 256"):
        RwkvTokenizer(path)
    with pytest.raises(FormatError, match=r"absent\.txt: cannot be read as a vocabulary: No such file"):
        RwkvTokenizer(tmp_path / "absent.txt")


def test_line_ends_may_be_crlf(small, tmp_path):
    path = tmp_path / "crlf.txt"
    path.write_bytes(small.read_bytes().replace(b"\n", b"\r\n"))
    assert read_vocabulary(path) == read_vocabulary(small)


def test_the_packages_vocabulary_is_found_without_importing_the_package(tmp_path, monkeypatch):
    (tmp_path / "rwkv").mkdir()
    (tmp_path / "rwkv" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "rwkv" / VOCABULARY_NAME).touch()
    monkeypatch.delitem(sys.modules, "rwkv", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_vocabulary() == tmp_path / "rwkv" / VOCABULARY_NAME


def test_without_the_rwkv_package_a_path_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install rwkv.*give the file's path"):
        RwkvTokenizer()
