import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from maskcast.builder.checkpoint.array_pickle import read_pickle
from maskcast.engines.errors import InputError


def dtype(code: bytes) -> bytes:
    return b"cnumpy\ndtype\n(V%s\nI00\nI01\ntR" % code


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
POINTERS = b"C\x08AAAAAAAA"
FLOAT = dtype(b"f8")


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "names builtins.eval"),
        (b"cnumpy\nload\n(S'x'\ntR.", "names numpy.load"),
        (b"c_codecs\nencode\n(Vx\nVbz2\ntR.", "codec 'bz2'"),
    ],
)
def test_other_names_are_refused(tmp_path: Path, program: bytes, complaint: str) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(program)
    with pytest.raises(InputError, match=complaint):
        read_pickle(path)


@pytest.mark.parametrize(
    "array",
    [
        # numpy.ndarray((1,), "O8", pointers): an object whose address the file chose.
        pytest.param(b"cnumpy\nndarray\n((I1\nt" + dtype(b"O8") + POINTERS + b"tR", id="ndarray"),
        pytest.param(b"cnumpy\nndarray\n((I1\nt" + FLOAT + POINTERS + b"tR", id="call"),
        pytest.param(
            RECONSTRUCT + b"(I1\n(I1\nt" + dtype(b"O8") + b"I00\n" + POINTERS + b"tb", id="state"
        ),
        pytest.param(
            b"cnumpy._core.numeric\n_frombuffer\n(" + POINTERS + dtype(b"O8") + b"(I1\ntS'C'\ntR",
            id="frombuffer",
        ),
        pytest.param(
            b"cnumpy.core.multiarray\nscalar\n(" + dtype(b"O8") + POINTERS + b"tR", id="scalar"
        ),
        # A type of numbers that becomes one of records, with a field outside of them.
        pytest.param(
            FLOAT + b"(I3\nS'|'\nN(S'a'\nt}S'a'\n(" + FLOAT + b"I4096\ntsI8\nI1\nI0\ntb",
            id="records",
        ),
        pytest.param(RECONSTRUCT + b"(I1\n(I1\ntNI00\n" + POINTERS + b"tb", id="no type"),
        pytest.param(
            RECONSTRUCT + b"(I1\n(I99\nt" + FLOAT + b"I00\n" + POINTERS + b"tb", id="shape"
        ),
    ],
)
def test_a_forged_array_is_refused(tmp_path: Path, array: bytes) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(b"}S'model'\n}S'w'\n" + array + b"ss.")
    with pytest.raises(InputError, match="not a checkpoint of arrays") as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["text"]), np.zeros(1, "f4,i2")])
def test_only_arrays_of_numbers_are_read(tmp_path: Path, array) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"w": array}))
    with pytest.raises(InputError, match="not of numbers"):
        read_pickle(path)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big endian": np.arange(6, dtype=">f8"),
        "bool": np.array([True, False]),
        "half": np.ones((2, 1, 2), np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "no axes": np.array(3.5),
        "scalar": np.float64(2.5),
    }
    path = tmp_path / "model.pkl"
    content = {"model": OrderedDict(arrays), "other": OrderedDict(d=[1, "e", None]), **arrays}
    path.write_bytes(pickle.dumps(content, protocol))
    found = read_pickle(path)
    assert found["other"] == {"d": [1, "e", None]}
    for weights in (found, found["model"]):
        for name, array in arrays.items():
            assert weights[name].dtype == array.dtype
            assert weights[name].shape == array.shape
            assert np.array_equal(weights[name], array)


def test_arrays_of_python_2_are_read(tmp_path: Path) -> None:
    # cPickle.dumps({"w": numpy.array([1, 2], "<i2")}, 2) of Python 2: bytes are its str.
    path = tmp_path / "model.pkl"
    path.write_bytes(
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\x02\x00tbs."
    )
    found = read_pickle(path)["w"]
    assert found.dtype == np.int16
    assert found.tolist() == [1, 2]
