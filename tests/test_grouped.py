"""How the rows of a prompt's plan are cut into products; what these compute, test_cuda.py sees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertflow import grouped, ops


def plan_row(**columns):
    row = [0] * 6
    for name, value in columns.items():
        row[getattr(ops, name)] = value
    return row


@st.composite
def plans(draw):
    """Rows, and how many of them are hits; the others take some slots in turn.

    These are slots of their own or, where none could be taken, those of the hits.
    """
    slots = draw(st.lists(st.integers(0, 6000), min_size=1, max_size=40, unique=True))
    num_hits = draw(st.integers(0, len(slots)))
    first, in_turn = num_hits, draw(st.sampled_from([1, 2, 3, 4, 16]))
    if num_hits > 0 and draw(st.booleans()):
        first, in_turn = 0, num_hits
    rows = []
    for index in range(len(slots)):
        takes_turns = index >= first
        rows.append(
            plan_row(
                EXPERT=index,
                SLOT=slots[first + (index - first) % in_turn if takes_turns else index],
                STATE=ops.HIT if index < num_hits else ops.MISS,
                COUNT=draw(st.integers(1, 9)),
                NEXT_ROW=index + in_turn
                if takes_turns and index + in_turn < len(slots)
                else ops.NO_ROW,
            )
        )
    return rows, num_hits


def parts_of(rows, num_hits):
    return [*grouped._windows(rows, num_hits), *grouped._arrivals(rows, num_hits)]


@given(plans())
def test_every_row_is_in_one_part_with_its_slot_and_count(plan):
    rows, num_hits = plan
    parts = parts_of(rows, num_hits)
    assert sorted(index for part in parts for index in part.rows) == list(range(len(rows)))
    for part in parts:
        slots = range(part.slots.start, part.slots.stop, part.slots.step)
        found = [(slot, count) for slot, count in zip(slots, part.counts, strict=True) if count]
        of_part = [rows[index] for index in part.rows]
        assert found == [(row[ops.SLOT], row[ops.COUNT]) for row in of_part]
        assert len({index < num_hits for index in part.rows}) == 1


@given(plans())
def test_a_part_waits_for_no_slot_that_it_holds_or_a_later_one_releases(plan):
    rows, num_hits = plan
    waiting = {row[ops.NEXT_ROW] for row in rows} - {ops.NO_ROW}
    for part in parts_of(rows, num_hits):
        assert not waiting.intersection(part.rows)
        waiting -= {rows[index][ops.NEXT_ROW] for index in part.rows}


@pytest.mark.parametrize(("in_turn", "size"), [(1, 1), (3, 1), (4, 2), (16, 2)])
def test_arrivals_are_twos_where_that_leaves_slots_to_fill(in_turn, size):
    rows = [
        plan_row(SLOT=index % in_turn * 100, COUNT=1, STATE=ops.MISS, NEXT_ROW=index + in_turn)
        for index in range(8)
    ]
    assert [len(part.rows) for part in grouped._arrivals(rows, 0)] == [size] * (8 // size)
    assert all(len(part.counts) == len(part.rows) for part in grouped._arrivals(rows, 0))
