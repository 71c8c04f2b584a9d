"""What sequences share exists once, and each token sees what came before it in its own sequence, and nothing else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dagger_operator.training.tree import Chain, Chains, TreeBuilder, forest, paths, visits

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=9)
"""Over three tokens, beginnings meet by chance, on several levels."""


def built(lists: list[list[int]]) -> tuple[TreeBuilder, list[list[int]], list[list[int]]]:
    """The tree, the sequences as they were added, and the places of each."""
    tree = TreeBuilder()
    added = sorted(lists, key=len, reverse=True)
    places = [tree.add(np.array(tokens)).tolist() for tokens in added]
    return tree, added, places


def seen(chains: Chains) -> list[set[int]]:
    """By definition: a token sees its own chain up to itself, and what the chain it hangs from sees at that place."""
    found: list[set[int]] = []
    for chain in chains:
        before: set[int] = set()
        if chain.parent >= 0:
            before = found[chains[chain.parent].start + chain.at - 1]
        found += [before | set(range(chain.start, token + 1)) for token in range(chain.start, chain.end)]
    return found


@given(sequences)
def test_every_sequence_can_be_read_off_the_tree(lists: list[list[int]]) -> None:
    tree, added, places = built(lists)
    for tokens, where in zip(added, places, strict=True):
        assert tree.tokens()[where].tolist() == tokens
        assert tree.positions()[where].tolist() == list(range(len(tokens)))


@given(sequences)
def test_every_beginning_exists_once(lists: list[list[int]]) -> None:
    tree, added, _ = built(lists)
    beginnings = {tuple(tokens[: length + 1]) for tokens in added for length in range(len(tokens))}
    assert tree.length == len(beginnings) == len(tree.tokens())


@given(sequences)
def test_a_token_sees_its_own_sequence_up_to_itself(lists: list[list[int]]) -> None:
    tree, _, places = built(lists)
    sees = seen(tuple(tree.chains))
    for where in places:
        for depth, place in enumerate(where):
            assert sees[place] == set(where[: depth + 1])


@given(sequences, sequences)
def test_two_comparisons_say_who_sees_whom_and_no_tree_sees_another(one: list[list[int]], other: list[list[int]]) -> None:
    parts = [tuple(built(lists)[0].chains) for lists in (one, other)]
    chains = forest(parts)
    first, last = visits(chains)
    tokens = len(first)
    assert sorted(first) == list(range(tokens))
    by_numbers = [{key for key in range(tokens) if first[key] <= first[query] < last[key]} for query in range(tokens)]
    assert by_numbers == seen(chains)
    before = sum(map(len, parts[0]))
    assert all((key < before) == (query < before) for query in range(tokens) for key in by_numbers[query])


@given(sequences)
def test_a_chains_path_is_what_its_first_token_sees_before_itself(lists: list[list[int]]) -> None:
    chains = tuple(built(lists)[0].chains)
    sees = seen(chains)
    for chain, spans in zip(chains, paths(chains), strict=True):
        assert {token for span in spans for token in range(*span)} == sees[chain.start] - {chain.start}


@given(sequences, st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_what_a_sequence_will_cost_is_known_before(lists: list[list[int]], more: list[int]) -> None:
    tree, added, _ = built(lists)
    more = more[: len(added[-1])]
    before = tree.length
    cost = tree.cost(np.array(more))
    tree.add(np.array(more))
    assert tree.length == before + cost


def test_labels_of_a_conversation_branch_off_one_trunk() -> None:
    conversation = list(range(10, 22))
    tree, _, places = built([conversation, [*conversation[:4], 90, 91], [*conversation[:8], 92], conversation[:6]])
    assert tree.chains == [Chain(0, 12), Chain(12, 13, 0, 8), Chain(13, 15, 0, 4)]
    assert places[-1] == list(range(6)), "a label that history agrees with lies on the trunk"
