"""How programs share a matrix product, and the sums that they leave."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infir2.kernels.split_k import PartialSums, Split


@given(st.integers(1, 7), st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_every_step_has_the_owner_whose_piece_it_lies_in(tiles: int, blocks: int, data: st.DataObject) -> None:
    programs = data.draw(st.integers(1, tiles * blocks))
    split = Split(tiles, blocks, programs)
    pieces = [range(p * split.steps // programs, (p + 1) * split.steps // programs) for p in range(programs)]
    owners = [program for program, piece in enumerate(pieces) for _ in piece]
    assert [split.owner(step) for step in range(split.steps)] == owners
    for tile in range(tiles):
        mine = owners[tile * blocks : (tile + 1) * blocks]
        assert sorted(set(mine)) == list(range(mine[0], mine[-1] + 1)), "parts are numbered without gaps"
        assert split.parts(tile) == len(set(mine))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1, "all have the same to do"


def test_an_even_split_gives_every_tile_the_same_parts() -> None:
    split = Split(tiles=28, blocks=148, programs=4 * 28)
    assert split.even
    assert [split.parts(tile) for tile in range(split.tiles)] == [4] * 28


@pytest.mark.parametrize("programs", [3, 5, 6, 8])
def test_parts_are_added_in_order_and_what_is_not_there_is_not_read(programs: int) -> None:
    split = Split(tiles=3, blocks=4, programs=programs)
    sums = torch.randn(split.most, 5, 3 * 128, generator=torch.Generator().manual_seed(programs))
    expected = torch.zeros(5, 3 * 128)
    for tile in range(3):
        cols = slice(tile * 128, (tile + 1) * 128)
        sums[split.parts(tile) :, :, cols] = torch.nan
        for part in range(split.parts(tile)):
            expected[:, cols] += sums[part, :, cols]
    assert torch.equal(PartialSums(sums, split).total(torch.float32), expected)
    assert PartialSums(sums, split).total(torch.bfloat16).dtype == torch.bfloat16
