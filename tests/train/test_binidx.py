"""Tokenised documents in .bin/.idx pairs: the bytes of the format by hand, and what is refused."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashbone.errors import FormatError
from flashbone.train.data.binidx import BinIdx, is_binidx, pair
from helpers.binidx import CODES, write_binidx

SEQUENCES = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


def by_hand(folder, sequences=SEQUENCES, documents=(0, 1, 3, 4), letter="H", **header):
    return write_binidx(folder / "d", sequences, documents, letter, **header)


@pytest.mark.parametrize("letter", CODES)
def test_documents_are_joined_from_their_sequences_in_every_integer_type(tmp_path, letter):
    documents = BinIdx(by_hand(tmp_path, letter=letter))
    assert [ids.tolist() for ids in documents] == [[5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]
    assert len(documents) == 3
    assert {ids.dtype.str[1:] for ids in documents} == {np.dtype(letter).str[1:]}
    with pytest.raises(IndexError, match="document 3 of 3"):
        documents[3]


@pytest.mark.parametrize("name", ["d", "d.bin", "d.idx"])
def test_a_pair_goes_by_either_file_or_the_name_of_both(tmp_path, name):
    by_hand(tmp_path)
    assert is_binidx(tmp_path / name)
    assert pair(tmp_path / name) == (tmp_path / "d.idx", tmp_path / "d.bin")
    assert len(BinIdx(tmp_path / name)) == 3


def test_dots_in_a_name_are_part_of_it_and_a_folder_of_the_name_comes_first(tmp_path):
    assert pair("pile_0.87_text") == pair("pile_0.87_text.bin")
    by_hand(tmp_path)
    (tmp_path / "d").mkdir()
    assert not is_binidx(tmp_path / "d")


@pytest.mark.parametrize("entries", [[], [0]])
def test_without_a_document_index_each_sequence_is_a_document_and_that_is_said(tmp_path, entries, caplog):
    with caplog.at_level("INFO", logger="flashbone"):
        documents = BinIdx(by_hand(tmp_path, documents=entries))
    assert [ids.tolist() for ids in documents] == SEQUENCES
    assert "d.idx has no document index: each of its 4 sequences is a document" in caplog.text


def test_documents_may_be_empty_and_sequences_in_any_order(tmp_path):
    path = by_hand(tmp_path, documents=[0, 0, 2, 4], pointers=[14, 6, 8, 0], sizes=[3, 1, 0, 3])
    assert [ids.tolist() for ids in BinIdx(path)] == [[], [12, 13, 14, 8], [5, 6, 7]]


def test_reading_is_a_view_of_the_file_and_not_a_copy(tmp_path):
    documents = BinIdx(by_hand(tmp_path))
    assert not documents[0].flags.owndata
    assert not documents[0].flags.writeable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, r"d\.idx: starts with b'TNTIDX.*', b'MMIDIDX.*' was wanted; is it another"),
        ({"version": 2}, r"d\.idx: version 2, 1 was wanted; write it with a Megatron or RWKV tool"),
        (
            {"code": 6},
            r"d\.idx: dtype code 6 is not of integers, wanted one of 1, 2, 3, 4, 5, 8; write the token",
        ),
        ({"code": 0}, r"dtype code 0 is not of integers"),
        (
            {"code": 5},
            r"d\.bin: holds 20 bytes, but sequence 0 of d\.idx is 24 bytes from byte 0 on; .* copy both",
        ),
        (
            {"n": 3},
            r"d\.idx: holds 114 bytes, 102 were wanted for 3 sequences and 4 entries of the document index;",
        ),
        ({"n": 2**61}, r"d\.idx: holds 114 bytes, \d+ were wanted for 2305843009213693952 sequences"),
        ({"sizes": [3, 1, 2, 5]}, r"holds 20 bytes, but sequence 3 of d\.idx is 10 bytes from byte 12 on"),
        ({"sizes": [3, -1, 2, 4]}, r"sequence 1 of d\.idx is -2 bytes"),
        ({"pointers": [0, 6, 8, 2**63 - 1]}, r"sequence 3 of d\.idx is 8 bytes from byte 9223372036854775807 on"),
        ({"pointers": [-2, 6, 8, 12]}, r"sequence 0 of d\.idx is 6 bytes from byte -2 on"),
        (
            {"documents": [0, 3, 1, 4]},
            r"the document index has 1 after 3, ascending ones from 0 to the 4 sequences",
        ),
        ({"documents": [0, 1, 3]}, r"the document index has entries from 0 to 3, .* write it again"),
        ({"documents": [0, 1, 5]}, r"the document index has entries from 0 to 5"),
        ({"documents": [1, 4]}, r"the document index has entries from 1 to 4"),
        ({"documents": [4]}, r"the document index has entries from 4 to 4"),
        ({"sequences": [], "documents": [0]}, r"d\.idx: no sequences, one or more were wanted"),
    ],
)
def test_what_is_wrong_with_a_pair_is_one_line_with_file_and_remedy(tmp_path, changes, message):
    with pytest.raises(FormatError, match=message) as error:
        BinIdx(by_hand(tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("gone", "other"), [("d.bin", "d.idx"), ("d.idx", "d.bin")])
def test_half_a_pair_is_refused_with_the_name_of_the_other_half(tmp_path, gone, other):
    by_hand(tmp_path)
    (tmp_path / gone).unlink()
    assert is_binidx(tmp_path / "d")
    with pytest.raises(FormatError, match=rf"{gone}: no such file, wanted beside .*{other}; put both into one folder"):
        BinIdx(tmp_path / "d")


@pytest.mark.parametrize("name", ["d.idx", "d.bin"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, name):
    by_hand(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for length in range(len(whole)):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(FormatError, match=rf"{name}: holds {length} bytes"):
            BinIdx(tmp_path / "d")


def test_an_index_that_goes_on_after_its_end_is_refused(tmp_path):
    path = by_hand(tmp_path).with_suffix(".idx")
    path.write_bytes(path.read_bytes() + bytes(4))  # as the modes of a multimodal one
    with pytest.raises(FormatError, match="holds 118 bytes, 114 were wanted for 4 sequences"):
        BinIdx(path)


@given(place=st.integers(0, 113), byte=st.integers(0, 255))
def test_an_index_with_a_wrong_byte_is_refused_or_read_without_leaving_the_file(tmp_path_factory, place, byte):
    path = by_hand(tmp_path_factory.mktemp("d"))
    index = bytearray(path.with_suffix(".idx").read_bytes())
    index[place] = byte
    path.with_suffix(".idx").write_bytes(index)
    with suppress(FormatError):
        documents = list(BinIdx(path))
        assert sum(map(len, documents)) * documents[0].itemsize <= 4 * 20
