"""Draws are the same for ever."""

from dagger_operator.store.draws import draw

GOLDEN = [9237202757853135329, 16757688668279815347, 13502995573926226610, 13333311399403206847, 5884902076652855084]


def test_draws_are_the_same_for_ever_and_each_part_of_the_key_counts() -> None:
    keys = [
        ("training step", 0, 0, 0),
        ("training step", 0, 0, 1),
        ("training step", 0, 1, 0),
        ("training step", 1, 0, 0),
        ("adapter", 0, 1),
    ]
    assert [draw(*key) for key in keys] == GOLDEN
    assert len({draw(*key) for key in keys}) == len(keys)
