"""Declarations expand to names and shapes; a weights tree is rebuilt, read and replaced by path."""

import dataclasses
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unsloth_core import tree, weights
from unsloth_core.models import llama
from unsloth_core.ops import nf4
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Adapted, Declaration, LoRA, Stacked, blocks

DIMS = {"D": 8, "Q": 12, "R": 4, "F": 10, "L": 3, "V": 20}


@pytree
class Layer:
    norm: torch.Tensor = leaf("D", "norm.weight")
    qkv: torch.Tensor = leaf("Q+2R D", "attn.{q,k,v}_proj.weight")
    qkv_bias: torch.Tensor = leaf("Q+2R", "attn.{q,k,v}_proj.bias", optional=True)
    fused: torch.Tensor = leaf("2F D", "mlp.gate_up_proj.weight")


@pytree
class Weights:
    embed: torch.Tensor = leaf("V D", "embed.weight")
    layers: tuple[Layer, ...] = blocks(Layer, "layers.{i}.")
    head: torch.Tensor = leaf("V D", "head.weight", optional=True)
    config: str = static("")


def numbered(declaration):
    return torch.full(declaration.shape, float(sum(map(ord, declaration.names[0]))))


def test_a_declaration_expands_to_names_and_rows():
    found = {d.path: d for d in weights.declarations(Weights, DIMS)}
    assert len(found) == 2 + 3 * 4
    assert found["layers", 1, "qkv"] == Declaration(
        path=("layers", 1, "qkv"),
        names=tuple(f"layers.1.attn.{x}_proj.weight" for x in "qkv"),
        rows=(12, 4, 4),
        rest=(8,),
        optional=False,
    )
    assert found["layers", 1, "qkv"].shape == (20, 8)
    bias = found["layers", 2, "qkv_bias"]
    assert (bias.shape, bias.rest, bias.optional) == ((20,), (), True)
    # One name is one part, whatever its rows are made of.
    fused = found["layers", 0, "fused"]
    assert (fused.names, fused.rows, fused.shape) == (("layers.0.mlp.gate_up_proj.weight",), (20,), (20, 8))
    assert found[("head",)].optional and not found[("embed",)].optional
    names = [name for d in found.values() for name in d.names]
    assert len(set(names)) == len(names)


@pytree
class Sparse:
    router: torch.Tensor = leaf("E D", "gate.weight", plain=True)
    gate_up: torch.Tensor = leaf("E 2F D", "experts.{e}.{w1,w3}.weight")
    down: torch.Tensor = leaf("E D F", "experts.{e}.w2.weight", optional=True)


@pytree
class SparseWeights:
    layers: tuple[Sparse, ...] = blocks(Sparse, "layers.{i}.moe.")


def test_experts_are_one_leaf_with_every_expert_a_part():
    dims = {**DIMS, "E": 3}
    router, gate_up, down = weights.declarations(SparseWeights, dims)[3:6]
    layer = "layers.1.moe."
    assert (router.names, router.shape, router.linear) == ((f"{layer}gate.weight",), (3, 8), False)
    assert gate_up.names == tuple(f"{layer}experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w3"))
    assert (gate_up.rows, gate_up.rest, gate_up.shape) == ((10,) * 6, (8,), (3, 20, 8))
    assert gate_up.linear and gate_up.experts == 3
    assert gate_up.modules == {f"{layer}experts.{{e}}.w1": 10, f"{layer}experts.{{e}}.w3": 10}
    assert (down.shape, down.modules, down.optional) == ((3, 8, 10), {f"{layer}experts.{{e}}.w2": 8}, True)
    t = torch.arange(3 * 20 * 8).view(3, 20, 8)
    parts = weights.split_parts(t, gate_up.rows)
    assert torch.equal(parts[3], t[1, 10:]) and torch.equal(torch.cat(parts).view(3, 20, 8), t)
    (whole,) = weights.split_parts(t[:1], (20,))
    assert torch.equal(whole, t[0])
    quantised = dataclasses.replace(nf4.quantize(torch.ones(60, 8)), shape=(3, 20, 8))
    with pytest.raises(ValueError, match="NF4 of shape .3, 20, 8. is one node, expected one of 6 parts"):
        weights.split_parts(quantised, gate_up.rows)
    none = weights.declarations(Sparse, {**DIMS, "E": 0})[1]
    assert (none.names, none.experts) == ((), 0)  # of a dense version


def test_layers_may_hold_different_leaves():
    config = types.SimpleNamespace(dims={**DIMS, "E": 2}, num_hidden_layers=3, has=(frozenset(), {"down"}, frozenset()))
    found = [d.path for d in weights.declared_leaves(SparseWeights, config)]
    assert [path for path in found if path[-1] == "down"] == [("layers", 1, "down")] and len(found) == 7


def test_llama_declares_what_its_checkpoints_hold():
    dims = {"D": 8, "F": 10, "L": 2, "V": 20, "H": 2, "G": 1, "K": 4, "Q": 8, "R": 4}
    shapes = {
        name: (rows, *d.rest)
        for d in weights.declarations(llama.Weights, dims)
        if not d.optional
        for name, rows in zip(d.names, d.rows, strict=True)
    }
    layer = {
        "input_layernorm": (8,), "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8), "post_attention_layernorm": (8,), "mlp.gate_proj": (10, 8), "mlp.up_proj": (10, 8),
        "mlp.down_proj": (8, 10),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    assert shapes == {**expected, "model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,)}


@pytest.mark.parametrize(
    "letters, name, message",
    [
        ("Q+R D", "{q,k,v}_proj", "'Q[+]R' has 2 parts, but its name has 3"),
        ("3R D", "{q,k}_proj", "'3R' has 3 parts, but its name has 2"),
        ("Z D", "w", "dimension 'Z', expected one of the config's letters"),
        ("D Z", "w", "dimension 'Z', expected one of the config's letters"),
        ("d D", "w", "dimension 'd', expected a letter with an optional factor"),
        ("D 2*F", "w", "dimension '2[*]F', expected a letter with an optional factor"),
        ("D+ D", "w", "dimension '', expected a letter"),
        ("QR D", "w", "dimension 'QR', expected a letter"),
    ],
)
def test_bad_declarations_are_refused(letters, name, message):
    @dataclasses.dataclass
    class Bad:
        w: torch.Tensor = leaf(letters, name)

    with pytest.raises(ValueError, match=message):
        weights.declarations(Bad, DIMS)


def test_build_get_and_replace_by_path():
    built = weights.build(Weights, DIMS, numbered, config="c")
    assert isinstance(built.layers, tuple) and len(built.layers) == 3 and built.config == "c"
    for d in weights.declarations(Weights, DIMS):
        assert torch.equal(weights.get(built, d.path), numbered(d)), d.path
    assert weights.get(built, ()) is built

    a, b = torch.zeros(1), torch.ones(2)
    other = weights.replace(built, {("layers", 1, "norm"): a, ("head",): b})
    assert other.layers[1].norm is a and other.head is b and other.config == "c"
    assert built.layers[1].norm is not a  # a copy
    replaced = {"layers.1.norm", "head"}
    same = [x is y for (p, x), (_, y) in zip(tree.items(built), tree.items(other), strict=True) if p not in replaced]
    assert len(same) == len(tree.leaves(built)) - 2 and all(same)
    assert other.layers[0] is built.layers[0]
    assert weights.replace(built, {(): a}) is a
    assert all(x is y for x, y in zip(tree.leaves(weights.replace(built, {})), tree.leaves(built), strict=True))
    with pytest.raises(ValueError, match="no entry 3 in a tuple of 3"):
        weights.replace(built, {("layers", 3, "norm"): a})
    with pytest.raises(AttributeError):
        weights.replace(built, {("layers", 0, "nonsense"): a})


def test_an_optional_leaf_may_be_absent():
    built = weights.build(Weights, DIMS, lambda d: ABSENT if d.optional else numbered(d))
    assert built.head is ABSENT and built.layers[2].qkv_bias is ABSENT
    assert len(tree.leaves(built)) == 1 + 3 * 3


@given(rows=st.lists(st.integers(1, 7), min_size=1, max_size=4), width=st.integers(1, 9))
def test_parts_of_every_kind_of_weight(rows, width):
    rows = tuple(rows)
    dense = torch.arange(sum(rows) * width, dtype=torch.float32).view(sum(rows), width)
    views = weights.split_parts(dense, rows)
    assert [tuple(v.shape) for v in views] == [(r, width) for r in rows]
    assert torch.equal(torch.cat(views), dense)
    assert all(v.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr() for v in views)
    quantised = [nf4.quantize(v) for v in views]
    stacked = Stacked(parts=tuple(quantised))
    assert weights.split_parts(stacked, rows) == quantised
    for base in (dense, stacked):
        a, b = torch.zeros(2, width), torch.zeros(rows[0], 2)
        one = LoRA(a=a, b=b, scale=1.0)
        adapted = Adapted(base=base, parts=(one, *[ABSENT] * (len(rows) - 1)), rows=rows)
        assert weights.shape(adapted) == weights.shape(base) == (sum(rows), width)
        parts = weights.split_parts(adapted, rows)
        assert [weights.shape(p) for p in parts] == [(r, width) for r in rows]
    assert weights.split_parts(quantised[0], rows[:1]) == quantised[:1]
    assert weights.shape(quantised[0]) == (rows[0], width)
