"""``perf/run.py`` with tiny shapes: every op's entry works, wrong results get no row, rows are complete."""

import ast
import collections
import dataclasses
import itertools
import json
import sys

import pytest
import torch
from oprule import DEVICE

from perf import ops, peers, run
from perf.random_model import raw_config
from unsloth_core import ops as uc

KEYS = {
    *("op", "impl", "direction", "shape", "dtype", "ms", "gbps", "tflops", "pct_of_ceiling", "extra_mib"),
    *("host_us", "ratio_to_best_peer", "gpu", "torch", "triton", "commit", "date"),
}
CASES = {case.op: case for case in ops.cases(DEVICE)}


@pytest.fixture(scope="module")
def machine():
    machine = run.Machine(DEVICE, smoke=True)
    machine.find_ceilings()
    return machine


def measured(machine, case, libraries=None):
    rows = []
    bench = run.Bench(machine, run.facts(machine, "none"), rows.append, libraries=libraries or {})
    bench.op(case)
    return bench, rows


def test_every_op_is_measured():
    variants = {"softmax_wide", "cross_entropy_loss_and_grad", "linear_cross_entropy_low_memory"}
    variants |= {"linear_lora", "linear_lora_qkv", "linear_nf4", "linear_lora_nf4", "nf4_dequantize"}
    variants |= {"grouped_linear_combine", "grouped_linear_layer"}
    variants |= {"nf4_quantize", "nf4_matvec", "adamw", "adamw_8bit", "global_norm"}
    variants |= {f"attention_{what}" for what in ("head_64", "head_96", "head_256", "packed", "window")}
    assert set(uc.__all__) | variants == CASES.keys()


@pytest.mark.parametrize("op", CASES)
def test_entry(machine, op):
    bench, rows = measured(machine, CASES[op])
    assert not bench.failures
    assert {"ours", "torch", *CASES[op].yardsticks} <= {row["impl"] for row in rows}
    assert {row["direction"] for row in rows} in ({"fwd"}, {"fwd", "bwd"}, {"fwd+bwd"})
    for row in rows:
        assert row.keys() == KEYS | (set(run.RATIOS) if op.startswith("attention") else set())
        assert json.loads(json.dumps(row)) == row
        assert row["op"] == op and row["shape"] == list(CASES[op].tiny)
        assert row["ms"] > 0 and row["gbps"] > 0 and row["tflops"] > 0
        compared = row["impl"] not in CASES[op].yardsticks and any(ops.is_peer(other["impl"]) for other in rows)
        assert row["ratio_to_best_peer"] > 0 if compared else row["ratio_to_best_peer"] is None
    assert {len(shape) for shape in (*CASES[op].shapes, CASES[op].small)} == {len(CASES[op].tiny)}


@pytest.mark.parametrize("count", range(1, 10))
def test_rounds_are_balanced(count):
    rounds = run.rounds_of(count)
    assert len(rounds) >= run.LEAST_ROUNDS and len(rounds) % (2 * count if count % 2 else count) == 0
    assert all(sorted(turns) == list(range(count)) for turns in rounds)
    follows = collections.Counter(pair for turns in rounds for pair in itertools.pairwise(turns))
    assert set(follows) == set(itertools.permutations(range(count), 2)) and len(set(follows.values())) <= 1
    for place in zip(*rounds, strict=True):
        assert set(collections.Counter(place).values()) == {len(rounds) // count}


@pytest.mark.parametrize(
    ("ms", "turns", "calls"), [(0.05, 6, (8, 8)), (3, 4, (8, 9)), (10, 4, (2, 3)), (45, 4, (1, 2))]
)
def test_a_turn_begins_with_calls_that_are_not_timed_and_long_calls_are_few(ms, turns, calls):
    assert run.turn_of(ms, turns) == calls


def test_times_are_those_of_balanced_turns_after_their_lead(monkeypatch):
    """A machine that is slow for 20 ms after the implementation "hot" and otherwise takes 10 ms for each call."""
    machine, log = run.Machine(DEVICE, smoke=False), []

    def milliseconds(call, host_us, keep):
        recent = [name for name, _ in log[-2:]]
        log.append((call(), host_us))
        return 10.0 + 3.0 * ("hot" in recent and log[-1][0] != "hot")

    monkeypatch.setattr(machine, "milliseconds", milliseconds)
    ready = {name: [lambda name=name: name] for name in ("hot", "a", "same as a", ops.REFERENCE)}
    host_us = {"hot": 3.0, "a": 7.0, "same as a": 5.0, ops.REFERENCE: 99.0}
    times = run.Bench(machine, {}, print)._in_turns(ready, dict.fromkeys(ready, 10.0), host_us)
    assert set(times.values()) == {10.0} and times.keys() == ready.keys()
    rests = {"hot": 7.0, "a": 7.0, "same as a": 7.0, ops.REFERENCE: 99.0}
    assert collections.Counter(log) == dict.fromkeys(rests.items(), 4 * sum(run.turn_of(10.0, turns=4)))


def test_a_yardstick_is_measured_in_turns_checked_by_its_own_reference_and_nobodys_peer(machine):
    case = CASES["linear_logprob"]
    ((name, beside),) = case.yardsticks.items()
    bench, rows = measured(machine, case)
    assert not bench.failures and {row["impl"] for row in rows} == {"ours", "torch", name}
    assert not ops.is_peer(name) and all(row["ratio_to_best_peer"] is None for row in rows)
    wrong = dataclasses.replace(beside, call=lambda *args: 1.1 * beside.call(*args))
    bench, rows = measured(machine, dataclasses.replace(case, yardsticks={name: wrong}))
    assert len(bench.failures) == 1 and "is wrong" in bench.failures[0]
    assert {row["impl"] for row in rows} == {"ours", "torch"}


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.1 * y, lambda y: y * torch.nan, lambda y: y[:1], lambda y: y.detach() + 0 * y]
)
def test_a_wrong_result_or_gradient_gets_no_row(machine, wrong):
    case = dataclasses.replace(CASES["glu"], ours=lambda gate_up: wrong(uc.glu(gate_up)))
    bench, rows = measured(machine, case)
    assert rows == [] and len(bench.failures) == 1 and bench.failures[0].startswith("glu ours")


def test_a_peer_that_does_not_run_is_a_note(machine):
    def missing(gate_up):
        raise NotImplementedError("not on this machine")

    case = dataclasses.replace(CASES["glu"], peers={**CASES["glu"].peers, "missing": missing})
    bench, rows = measured(machine, case)
    assert bench.failures == [] and bench.notes == ["glu missing: NotImplementedError: not on this machine"]
    assert {row["impl"] for row in rows} == {"ours", "torch"}


@pytest.fixture(scope="module")
def eager():
    libraries, notes = peers.load(["pytorch"])
    assert notes == []
    return libraries


def test_eager_pytorch_computes_the_same(machine, eager):
    assert eager.keys() <= CASES.keys()
    for op in eager:
        bench, rows = measured(machine, CASES[op], eager)
        assert not bench.failures and not bench.notes
        assert "eager" in {row["impl"] for row in rows}


def test_a_library_that_is_not_there_is_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    sys.modules.pop("perf.peers.liger", None)
    libraries, notes = peers.load(["liger"])
    assert libraries == {} and len(notes) == 1 and notes[0].startswith("liger: ModuleNotFoundError: ")


def test_every_peer_has_an_adapter_and_names_cases_that_exist():
    for name in peers.NAMES:
        source = ast.parse((run.ROOT / "perf" / "peers" / f"{name}.py").read_text("utf-8"))
        values = [node.value for node in source.body if isinstance(node, ast.Assign) and node.targets[0].id == "PEERS"]
        assert {key.value for key in values[0].keys} <= CASES.keys() | {"layer_norm", "softmax"}


def test_a_peer_that_writes_gets_copies_and_its_preparation_is_not_timed(machine):
    prepared = []

    def prepare(gate_up):
        prepared.append(gate_up)
        return (peers.fresh(gate_up),)

    def writes(gate_up):
        y = uc.glu(gate_up)
        with torch.no_grad():
            gate_up.zero_()
        return y

    case = dataclasses.replace(
        CASES["glu"], costs=lambda *args: {"fwd": CASES["glu"].costs(*args)["fwd"]}, wanted=lambda x: []
    )
    bench, rows = measured(machine, case, {"glu": {"writes": peers.Peer(writes, prepare)}})
    assert not bench.failures and not bench.notes and "writes" in {row["impl"] for row in rows}
    assert all(t.count_nonzero() > 0 for t in prepared)


def test_a_peer_with_a_layout_of_its_own_gives_gradients_back_in_ours(machine):
    def halves(gate_up):
        return (torch.stack(gate_up.detach().chunk(2, -1)).requires_grad_(),)

    def glu(both):
        return torch.nn.functional.silu(both[0]) * both[1]

    for restore, right in ((lambda g: torch.cat([*g], -1), True), (lambda g: torch.cat([*g.flip(0)], -1), False)):
        bench, rows = measured(machine, CASES["glu"], {"glu": {"stacked": peers.Peer(glu, halves, restore)}})
        assert not bench.failures and ("stacked" in {row["impl"] for row in rows}) == right
        assert right or "result 1 is wrong" in bench.notes[0]


@pytest.mark.parametrize(
    ("op", "best"), [("glu", "eager"), ("rms_norm", "F.rms_norm"), ("add_rms_norm", "eager"), ("dropout", "torch")]
)
def test_compiled_is_what_a_user_would_compile(eager, op, best):
    candidates = {**CASES[op].peers, **eager.get(op, {})}
    assert run.plain(candidates) is candidates[best]


def test_attention_states_its_speed_beside_cudnn_and_flash(machine):
    def sdpa(*args):
        return CASES["attention"].peers["sdpa"](*args)

    case = dataclasses.replace(CASES["attention"], peers={**CASES["attention"].peers, "sdpa cudnn": sdpa})
    _, rows = measured(machine, case)
    for direction in ("fwd", "bwd"):
        some = {row["impl"]: row for row in rows if row["direction"] == direction}
        expected = some["sdpa cudnn"]["ms"] / some["ours"]["ms"]
        assert some["ours"]["ratio_to_cudnn"] == pytest.approx(expected, rel=2e-3)


def test_ratio_is_the_fastest_peers_time_over_this_one(machine):
    _, rows = measured(machine, CASES["rms_norm"])
    for direction in ("fwd", "bwd"):
        some = {row["impl"]: row for row in rows if row["direction"] == direction}
        best = min(row["ms"] for impl, row in some.items() if ops.is_peer(impl))
        assert some["ours"]["ratio_to_best_peer"] == pytest.approx(best / some["ours"]["ms"], rel=2e-3)


def test_every_record_is_complete_and_its_ratio_is_over_all_peers_of_its_run():
    rows = [json.loads(line) for line in (run.ROOT / "perf/records/ops.jsonl").read_text("utf-8").splitlines()]
    runs = collections.defaultdict(list)
    for row in rows:
        assert row.keys() - {"flaw"} == KEYS | (row.keys() & set(run.RATIOS))
        assert row["op"] in CASES and row["direction"] in ("fwd", "bwd", "fwd+bwd") and row["ms"] > 0
        runs[row["op"], *row["shape"], row["direction"], row["commit"], row["date"]].append(row)
    for some in runs.values():
        assert len({row["impl"] for row in some}) == len(some)
        best = min((row["ms"] for row in some if ops.is_peer(row["impl"])), default=None)
        for row in some:
            if best is None or row["impl"].startswith("ours: "):
                assert row["ratio_to_best_peer"] is None
            else:
                assert row["ratio_to_best_peer"] == pytest.approx(best / row["ms"], rel=2e-3)


def test_smoke_prints_a_table_and_writes_nothing(tmp_path, capsys):
    assert run.main(["--smoke", "glu", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("glu", "4x32", "fwd", "bwd", "ours", "GB/s"))


def test_a_failure_is_the_exit_code_and_the_others_go_on(monkeypatch, capsys):
    def broken(gate_up):
        raise RuntimeError("out of order")

    cases = [dataclasses.replace(CASES["glu"], ours=broken), CASES["rope"]]
    monkeypatch.setattr(ops, "cases", lambda device: cases)
    assert run.main(["--smoke"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED glu ours: RuntimeError: out of order" in printed and "rope  " in printed


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--smoke", "convolution"])
    assert "no op 'convolution', expected some of embedding, rms_norm" in capsys.readouterr().err


def test_a_repeated_layer_makes_the_model_that_has_so_many():
    """What Unsloth reads is one layer; here without it."""
    transformers = pytest.importorskip("transformers")
    steps = pytest.importorskip("perf.peers.steps")

    def model(layers, tensors=None):
        config = transformers.AutoConfig.for_model(**{**raw_config("tiny"), "num_hidden_layers": layers})
        return steps.random_llama(config, DEVICE, tensors=tensors, dtype=torch.float32)

    one = model(1)
    tensors = {
        name.replace("layers.0.", f"layers.{i}."): t.detach() for name, t in one.named_parameters() for i in range(3)
    }
    steps.repeat_layer(one, 3)
    ids = torch.arange(12, device=DEVICE).view(2, 6)
    assert torch.equal(one(ids).logits, model(3, tensors)(ids).logits)
    assert len({p.data_ptr() for p in one.parameters()}) == len(tensors)
    assert all(layer.self_attn.config is one.config for layer in one.model.layers)
