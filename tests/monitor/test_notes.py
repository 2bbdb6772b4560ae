"""Values that a user notes: they are converted or refused at once, and no later write fails because of them."""

from __future__ import annotations

import decimal
import enum
import fractions
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import distclip
from distclip import ArgumentError, GradClipper
from distclip.monitor import Recorder


class Level(enum.IntEnum):
    ONE = 1


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Unreadable:
    def __float__(self) -> float:
        raise RuntimeError("no number")


def record(folder: Path, *notes: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """Record a step per note, with a spike in the last one, and return the lines."""
    weight = torch.nn.Parameter(torch.zeros(4))
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0))
    with Recorder(clipper, folder, **options) as recorder:
        for i in range(8):
            weight.grad = torch.ones(4) * (1 if i < 7 else 100)
            clipper.clip()
            if i >= 8 - len(notes):
                recorder.note(**notes[i - 8])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


NUMBERS: dict[str, tuple[Any, Any]] = {
    "float": (0.5, 0.5),
    "int": (7, 7),
    "true": (True, True),
    "beyond int64": (10**30, 10**30),
    "enum": (Level.ONE, 1),
    "nan": (float("nan"), None),
    "inf": (float("inf"), None),
    "np.float32": (np.float32(0.5), 0.5),
    "np.float64": (np.float64(0.5), 0.5),
    "np.float16": (np.float16(0.5), 0.5),
    "np.longdouble": (np.longdouble("0.5"), 0.5),
    "np.int64": (np.int64(7), 7),
    "np.uint64": (np.uint64(2**64 - 1), 2**64 - 1),
    "np.bool": (np.bool_(True), True),
    "nan of numpy": (np.float32("nan"), None),
    "0-d array": (np.array(0.5), 0.5),
    "array of one": (np.array([[7]]), 7),
    "decimal": (decimal.Decimal("0.5"), 0.5),
    "fraction": (fractions.Fraction(1, 2), 0.5),
    "tensor": (torch.tensor(0.5), 0.5),
    "tensor of one": (torch.tensor([7]), 7),
    "loss with a graph": (torch.tensor(0.5, requires_grad=True) * 1, 0.5),
    "parameter": (torch.nn.Parameter(torch.tensor(0.5)), 0.5),
    "bool tensor": (torch.tensor(True), True),
    "float8": (torch.tensor(0.5).to(torch.float8_e4m3fn), 0.5),
    "uint32": (torch.tensor(7).to(torch.uint32), 7),
    "view": (torch.arange(4.0)[2], 2),
}
"""Values, and what the log has for them."""


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_library_are_numbers_in_the_log(name: str, tmp_path: Path) -> None:
    value, expected = NUMBERS[name]
    received: list[Any] = []
    line = record(tmp_path, {"lr": value, "loss": value}, sinks=lambda numbers, step: received.append(numbers))[-1]
    assert line["lr"] == expected
    assert type(line["lr"]) in (type(expected), float)
    assert line["loss"] == (None if expected is None else float(expected))
    assert expected is None or received[-1]["lr"] == expected


REFUSED: dict[str, Any] = {
    "text": "0.5",
    "text of numpy": np.str_("0.5"),
    "bytes": b"0.5",
    "None": None,
    "complex": 1j,
    "complex of numpy": np.complex64(1j),
    "complex tensor": torch.tensor(1j),
    "array": np.ones(2),
    "tensor": torch.ones(2),
    "empty": torch.ones(0),
    "list": [0.5],
    "dict": {"a": 1},
    "huge int": 10**400,
    "meta": torch.ones((), device="meta"),
    "sparse": torch.ones(1).to_sparse(),
    "fake": FakeTensorMode().from_tensor(torch.ones(())),
    "object": object(),
    "class": float,
    "unprintable": Unprintable(),
    "unreadable": Unreadable(),
    "date": np.datetime64("2020-01-01"),
    "array of objects": np.array([None], dtype=object),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("key", ["loss", "lr", "step"])
@pytest.mark.filterwarnings("ignore")
def test_other_values_are_refused_at_once(name: str, key: str, tmp_path: Path) -> None:
    """Refuse the value with all others of the call, and record the step without them."""
    with pytest.raises(ArgumentError, match=rf"^note\({key}=.*: .*Pass a number"):
        record(tmp_path, {key: REFUSED[name], "other": 1.0})
    with Recorder(*make_step(), tmp_path / "second") as recorder:
        recorder._clipper.clip()
        with pytest.raises(ArgumentError):
            recorder.note(other=1.0, **{key: REFUSED[name]})
    line = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[-1])
    assert not {"other", "loss", "lr"} & line.keys()


def make_step() -> tuple[GradClipper]:
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    return (GradClipper([("weight", weight)], distclip.global_norm(1.0)),)


@pytest.mark.parametrize("step", [7, 7.0, np.int32(7), np.float64(7), torch.tensor(7), torch.tensor([7.0]), Level.ONE])
def test_step_is_a_whole_number(step: Any, tmp_path: Path) -> None:
    assert record(tmp_path, {"step": step})[-1]["step"] == int(step)


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 7.5, True, torch.tensor(float("nan")), 2**63], ids=str)
def test_other_steps_are_refused(step: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"note\(step=.*whole number"):
        record(tmp_path, {"step": step})


IDS: dict[str, tuple[Any, list[Any]]] = {
    "list": ([3, "b", 1.5], [3, "b", 1.5]),
    "tuple": ((3, 4), [3, 4]),
    "set": ({3}, [3]),
    "range": (range(2), [0, 1]),
    "empty": ([], []),
    "tensor": (torch.tensor([3, 4]), [3, 4]),
    "array": (np.array([3, 4]), [3, 4]),
    "texts of numpy": (np.array(["a", "b"]), ["a", "b"]),
    "objects of numpy": (np.array([3, "b"], dtype=object), [3, "b"]),
    "numbers of numpy": ([np.int64(3), np.str_("b"), np.float32(0.5)], [3, "b", 0.5]),
    "tensors": ([torch.tensor(3), torch.tensor([4])], [3, 4]),
    "enum": ([Level.ONE], [1]),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_an_outlier(name: str, tmp_path: Path) -> None:
    ids, expected = IDS[name]
    line = record(tmp_path, {"ids": ids})[-1]
    assert line["spike"] > 2
    assert line.get("ids", []) == expected


REFUSED_IDS: dict[str, Any] = {
    "number": 7,
    "text": "abc",
    "bytes": b"abc",
    "dict": {"a": 1},
    "lists": [[1], [2]],
    "dicts": [{"a": 1}],
    "nones": [None],
    "complex": [1j],
    "objects": [object()],
    "unprintable": [Unprintable()],
    "bytes in a list": [b"a"],
    "2-d tensor": torch.ones(2, 2),
    "0-d tensor": torch.ones(()),
    "2-d array": np.ones((2, 2)),
    "0-d array": np.array(3),
    "meta": torch.ones(2, device="meta"),
    "complex tensor": torch.ones(2) * 1j,
    "generator": (i for i in range(3)),
    "None": None,
}


@pytest.mark.parametrize("name", REFUSED_IDS)
def test_other_ids_are_refused_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^note\(ids=.*a sequence of numbers or strings"):
        record(tmp_path, {"ids": REFUSED_IDS[name]})


def test_ids_may_be_modified_afterwards(tmp_path: Path) -> None:
    """Reuse one list and one array for all steps, as a data loader may."""
    weight = torch.nn.Parameter(torch.zeros(4))
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0))
    for number, ids in enumerate(([0, 0], np.zeros(2, int), torch.zeros(2, dtype=torch.int64))):
        with Recorder(clipper, tmp_path / str(number)) as recorder:
            for i in range(8):
                weight.grad = torch.ones(4) * (100 if i == 6 else 1)
                clipper.clip()
                ids[0], ids[1] = i, 10 * i
                recorder.note(ids=ids)
        lines = [json.loads(line) for line in recorder.path.read_text().splitlines()]
        assert [line["ids"] for line in lines if "ids" in line] == [[6, 60]]


@pytest.mark.filterwarnings("ignore:recorder")
def test_tensor_that_cannot_be_read_any_more_is_left_out(tmp_path: Path) -> None:
    """Free the storage of a noted tensor."""
    loss = torch.tensor(0.5)
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    clipper = GradClipper([("weight", weight)], distclip.global_norm(1.0))
    recorder = Recorder(clipper, tmp_path)
    clipper.clip()
    recorder.note(loss=loss, lr=0.1)
    loss.untyped_storage().resize_(0)
    with pytest.warns(RuntimeWarning, match="loss of step 1 cannot be read any more"):
        recorder.flush()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (line["norm"], line["lr"], line.get("loss")) == (2.0, 0.1, None)


def test_facts_of_numpy_are_numbers(tmp_path: Path) -> None:
    facts = {"batch": np.int64(512), "rates": np.array([0.5, float("nan")]), "precision": "fp16", "note": object}
    header = record(tmp_path, facts=facts)[0]
    assert (header["batch"], header["rates"], header["precision"]) == (512, [0.5, None], "fp16")
    assert header["note"] == str(object)


@pytest.mark.parametrize("name", ["every", "top"])
def test_counts_of_numpy_are_counts(name: str, tmp_path: Path) -> None:
    assert len(record(tmp_path, **{name: np.int64(3)})) == 9
