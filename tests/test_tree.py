"""Trees: structure survives every transformation, holes are ABSENT, paths are readable."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unsloth_core import tree
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT


@tree.pytree
class Node:
    """A node with two children and a static."""

    left: object
    right: object
    scale: float = tree.static(1.0)


leaves = st.integers().map(lambda i: torch.tensor(i % 1000))
trees = st.recursive(
    leaves | st.just(ABSENT),
    lambda t: st.one_of(
        st.tuples(t, t),
        st.dictionaries(st.sampled_from("abc"), t, max_size=3),
        st.builds(lambda a, b, s: Node(left=a, right=b, scale=s), t, t, st.sampled_from([1.0, 2.0])),
    ),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_back(t):
    found, spec = tree.flatten(t)
    again, spec_again = tree.flatten(tree.unflatten(found, spec))
    assert spec == spec_again
    assert all(a is b for a, b in zip(found, again, strict=True))
    assert [leaf for _, leaf in tree.items(t)] == found
    assert len({path for path, _ in tree.items(t)}) == len(found)


@given(trees, st.integers(0, 2))
def test_partition_and_merge_are_inverse(t, modulus):
    kept, rest = tree.partition(t, lambda path, leaf: len(path) % 3 == modulus)
    assert len(tree.leaves(kept)) + len(tree.leaves(rest)) == len(tree.leaves(t))
    merged = tree.merge(kept, rest)
    assert tree.flatten(merged)[1] == tree.flatten(t)[1]
    assert all(a is b for a, b in zip(tree.leaves(merged), tree.leaves(t), strict=True))


def test_merge_refuses_two_values_in_one_place():
    a = Node(left=torch.zeros(2), right=ABSENT)
    with pytest.raises(
        ValueError, match=r"tree.merge: both trees have a value in one place: Tensor\(2,\) and Tensor\(2,\)"
    ):
        tree.merge(a, a)


def test_broadcast_fills_whole_subtrees_with_absent():
    t = (torch.zeros(1), Node(left=torch.zeros(1), right=(torch.zeros(1), ABSENT)))
    assert tree.broadcast((ABSENT, ABSENT), t) == [ABSENT] * 3
    g = torch.ones(1)
    assert tree.broadcast((g, Node(left=ABSENT, right=(g, ABSENT))), t) == [g, ABSENT, g]
    with pytest.raises(ValueError, match="tree.broadcast: expected Node or ABSENT, got tuple"):
        tree.broadcast((g, (g, g)), t)


def test_absent_is_one_false_object():
    assert not ABSENT
    assert copy.deepcopy(ABSENT) is ABSENT and pickle.loads(pickle.dumps(ABSENT)) is ABSENT
    assert tree.leaves((ABSENT, {"a": ABSENT})) == []


def test_map_keeps_statics_and_any_reads_booleans():
    t = Node(left=torch.ones(2), right=(ABSENT, torch.ones(3)), scale=3.0)
    doubled = tree.map(lambda x: 2 * x, t)
    assert doubled.scale == 3.0 and float(doubled.right[1].sum()) == 6.0
    assert not tree.any(tree.map(lambda _: False, t)) and tree.any(Node(left=False, right=(ABSENT, True)))
    assert tree.any(True) and not tree.any(False) and not tree.any(ABSENT)
    assert tree.nbytes(t) == 20


def test_nodes_are_frozen():
    node = Node(left=torch.ones(1), right=ABSENT)
    with pytest.raises(AttributeError):
        node.left = torch.zeros(1)  # type: ignore[misc]


@given(st.integers(0, 4), st.integers(0, 7))
def test_uniform_segments_are_a_batch(batch, length):
    s = Segments.uniform(batch, length)
    assert s.starts_S.tolist() == [b * length for b in range(batch)]
    assert s.ends_S.tolist() == [(b + 1) * length for b in range(batch)]


def test_packed_segments_check_their_input():
    with pytest.raises(ValueError, match=r"cu_seqlens has dtype torch.int64, expected torch.int32"):
        Segments.packed(torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match=r"cu_seqlens has shape \(2, 1\), expected \(S \+ 1,\)"):
        Segments.packed(torch.zeros(2, 1, dtype=torch.int32), 3)


def test_repr_is_one_short_line():
    layer = Node(left=torch.ones(3, 2), right=ABSENT, scale=2.0)
    assert repr(layer) == "Node(left=float32[3, 2], right=ABSENT, scale=2.0)"
    assert tree.describe({"a": (layer, layer), "b": torch.ones((), dtype=torch.int32), "c": [], "d": 1}) == (
        "{'a': (2 x Node(left=float32[3, 2], right=ABSENT, scale=2.0)), 'b': int32[], ... 4 in all}"
    )
