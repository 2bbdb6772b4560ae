"""Run random layouts, and check that they notice what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import distclip
from distclip.sharding import table as tables
from distclip.testing import Answer, check_case, find_failure, random_case
from distclip.testing.__main__ import main
from tests.ranks import gather_from_ranks, on_ranks


def first_failure(seeds: range, num_ranks: int) -> str | None:
    """Run the cases of some seeds on all ranks up to one that fails, and describe that one."""
    for seed in seeds:
        case = random_case(seed, num_ranks)
        failure = find_failure(case, gather_from_ranks(check_case(case)))
        if failure is not None:
            return f"{case}: {failure}"
    return None


@on_ranks(2, 4)
def test_random_layouts(num_ranks: int) -> None:
    assert first_failure(range(20), num_ranks) is None


@on_ranks(4)
@pytest.mark.parametrize("what", ["replicas", "factor", "bits"])
def test_wrong_numbers_are_noticed(what: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if what == "replicas":
            patch.setattr(tables, "num_replicas", lambda size, layout, axes, num_meshes=None: size / layout.num_pieces)
        elif what == "factor":
            patch.setattr(distclip.engine.execution, "scale_", lambda shards, factors: None)
            patch.setattr(distclip.functional, "scale_", lambda shards, factors, foreach=None: None)
        else:
            real = distclip.testing.check.clip_grad_norm_
            noise = 1 + 1e-7 * torch.distributed.get_rank()
            patch.setattr(distclip.testing.check, "clip_grad_norm_", lambda *args, **kw: real(*args, **kw) * noise)
        assert first_failure(range(100, 120), 4) is not None


def test_answers_of_ranks_are_compared() -> None:
    case = dataclasses.replace(random_case(0, 2), named=True)
    assert find_failure(case, [Answer(b"1"), Answer(b"1")]) is None
    assert find_failure(case, [Answer(b"1"), Answer(b"2")]) == "ranks [0, 1] have different bits"
    assert find_failure(case, [Answer(refusal="a"), Answer(b"1")]) is not None
    assert find_failure(case, [Answer(refusal="a"), Answer(refusal="a")]) == "refused: a"
    assert find_failure(dataclasses.replace(case, named=False), [Answer(refusal="a"), Answer(refusal="a")]) is None
    assert find_failure(case, [Answer(b"1"), Answer(failure="b")]) == "rank 1: b"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--layouts", "3", "--ranks", "2"]) == 0
    assert "3 layouts, 0 failed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--ranks", "1"])
