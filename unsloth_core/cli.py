"""The command line: ``unsloth-core finetune`` trains adapters, ``generate`` talks to a model, ``ops`` lists kernels.

A thin layer over ``uc.finetune``, ``uc.generate`` and the catalogue of ops. Its own decisions: the options of a run are
the fields of :class:`~unsloth_core.train.Options`; whatever is wrong with input or machine is one line on stderr and
exit code 1.
"""

import contextlib
import dataclasses
import enum
import inspect
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import typer

from . import __version__, catalogue, checkpoint, hub, lora, random, tree
from .data import read_examples
from .generate import Prompt, stream
from .load import load
from .models.container import text_config
from .models.decoder import Model
from .plan import Plan
from .plan import plan as make_plan
from .train import OPTIMIZER_STATES, SCHEDULES, Options, refuse_to_replace
from .train import finetune as run_finetune

INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended
# What a user can put right: everything else is a bug of ours and keeps its traceback.
SMALLER = "fewer --tokens or --max-new-tokens, --quantize nf4 or a smaller model"
EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, torch.OutOfMemoryError)

# One line for every field of Options.
OPTION_HELP = {
    "output": "Folder for the adapter, metrics.jsonl, loss.png, run.toml and checkpoints.",
    "rank": "Rank of the adapters: how much they can learn, and how large they are. By name, q_proj=8,v_proj=16:"
    " then only those are adapted.",
    "alpha": "Strength of the adapters; their scale is alpha / rank. Default: the rank.",
    "rslora": "Scale by alpha / sqrt(rank) instead.",
    "targets": "What is adapted: all-linear, attention, or names such as q_proj,v_proj.",
    "dropout": "Part of each adapter's input that is left out at random, anew in every step. 0: nothing.",
    "lr": "Highest learning rate.",
    "schedule": f"How the learning rate changes: {', '.join(SCHEDULES)}.",
    "warmup": "Steps in which the learning rate rises to its highest.",
    "weight_decay": "AdamW's weight decay.",
    "optimizer_states": f"How AdamW stores its moments: {', '.join(OPTIMIZER_STATES)}. 8bit takes a quarter as much.",
    "max_norm": "Longest gradient; a longer one is scaled down to it. inf: never.",
    "steps": "Number of updates. Default: as many as the epochs hold.",
    "epochs": "How often every example is seen.",
    "tokens": "Tokens in a microbatch: examples are packed until it is full. Less of it takes less memory.",
    "accumulate": "Microbatches in an update.",
    "train_on": "responses: learn what the assistant says; all: prompts too.",
    "eval_fraction": "Part of the examples that is kept out of training and measured.",
    "eval_every": "Steps between these measurements.",
    "save_every": "Steps between checkpoints, from which an interrupted run goes on.",
    "seed": "Seed of the adapters' first values and of the order of examples.",
    "capture": "Replay the step as a CUDA graph, with the same results: the GPU never waits. Default: on a GPU.",
}  # fmt: skip


class Dtype(enum.StrEnum):
    """Data types of weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Quantization(enum.StrEnum):
    """Ways to store frozen weights in fewer bits."""

    nf4 = "nf4"


class Where(enum.StrEnum):
    """Where the embedding or the head is, and how: ``load.PLACES``."""

    device = "device"
    host = "host"
    nf4 = "nf4"


ModelArgument = Annotated[
    str, typer.Argument(help="A Hub id (org/name), a folder of safetensors, or a .gguf file.", metavar="MODEL")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1, cpu. Default: the GPU if there is one.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Of the model's weights. Default: bfloat16 on a GPU, float32 on a CPU.")
]
QuantizeOption = Annotated[
    Quantization | None, typer.Option(help="Store the model's linear layers in 4 bits: a quarter of the memory.")
]
EmbedOption = Annotated[
    Where | None,
    typer.Option(
        help="The embedding: on the device, on the host (its rows come over the link), or there in 4 bits (nf4)."
        " Default: on the device; with --memory, device or host, as the plan says."
    ),
]
HeadOption = Annotated[
    Where | None, typer.Option(help="The head, likewise. A tied head is the embedding: give that alone.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show where in the code an error happened.")]

app = typer.Typer(
    help="Fine-tune open language models on your own examples, and talk to them.",
    epilog="`unsloth-core COMMAND --help` explains a command and shows an example.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="unsloth-core")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"unsloth-core {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of Options; None, its default, stands for "not given"."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        kinds = get_args(types[field.name]) or (types[field.name],)  # `float | None`, `str | list[str]`
        kind = str if any(get_origin(k) is dict for k in kinds) else kinds[0]
        default = "" if field.default is None else f"  [default: {field.default}]"
        annotation = Annotated[kind | None, typer.Option(help=OPTION_HELP[field.name] + default)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, keyword, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@app.command()
@_takes_options
def finetune(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="Examples: a .jsonl, .json or .parquet file.", metavar="DATA")],
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file, such as the run.toml of a run, with options from --output on; those given here win."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Most that tensors may take on the GPU, such as 24GiB: the fastest run that fits is chosen."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    embed: EmbedOption = None,
    head: HeadOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on from a checkpoint in the output folder, if there is any."),
    ] = True,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Train LoRA adapters for MODEL on the examples in DATA.

    \b
    Example:
      unsloth-core finetune HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --output runs/first --epochs 3
      unsloth-core generate HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/first

    Each line of train.jsonl is one example, {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
    "content": "..."}]}; conversations, prompt and completion, instruction and output, and text work too. A run that
    was stopped goes on from its last checkpoint when the same command is given again.
    """
    with _one_line_errors(debug):
        chosen = Options.from_toml(config) if config else {}
        chosen |= {name: value for name, value in options.items() if value is not None}
        if isinstance(names := chosen.get("targets"), str):
            chosen["targets"] = _names(names)
        if isinstance(text := chosen.get("rank"), str):
            chosen["rank"] = _ranks(text)
        run = Options(**chosen)
        checkpoints = Path(run.output) / "checkpoints"
        if resume:
            refuse_to_replace(Path(run.output))
        examples = read_examples(data)  # before the model, which may take minutes to come
        planned = None
        if memory is not None:
            planned = _plan(model, run, memory, None, dtype, quantize, embed, head)
            best = planned.best
            _say(f"{best.describe()}: {best.peak / 2**30:.2f} GiB predicted; `unsloth-core plan` shows what else fits")
        places = {"embed": planned.best.embed, "head": planned.best.head} if planned else _places(embed, head)
        bound, params = _load(model, device, dtype, quantize, **places)
        if params.head is tree.ABSENT and head not in (None, embed) and not planned:
            raise ValueError(f"--head is {head}, but the head of {model} is its embedding: --embed says where that is")
        if resume and (last := checkpoint.newest(checkpoints)):
            _say(f"Going on from {last}; --no-resume would start over.")
        try:
            policy = planned.schedule if planned else None
            _, history = run_finetune(bound, params, examples, policy=policy, resume=resume, **dataclasses.asdict(run))
        except KeyboardInterrupt:
            last = checkpoint.newest(checkpoints)
            kept = f"the last checkpoint is {last}: give the same command again to go on" if last else (
                f"there is no checkpoint yet (one is written every {run.save_every} steps: --save-every)"
            )  # fmt: skip
            _say(f"\nStopped; {kept}.")
            raise typer.Exit(INTERRUPTED) from None
        _say(f"Loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f} in {len(history)} steps.")
        _say(f"The adapter, metrics.jsonl, loss.png and run.toml are in {run.output}. Try it:")
        _say(f"  unsloth-core generate {shlex.quote(model)} --adapter {shlex.quote(run.output)}")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Default: chat on a terminal, else what comes in on standard input.", metavar="PROMPT"),
    ] = None,
    *,
    adapter: Annotated[Path | None, typer.Option(help="Folder that finetune (or PEFT) wrote an adapter to.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Send the prompt as a message to the assistant, or have it continued as it stands."
            " Default: chat, if the model has a chat template.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions to the assistant before the chat.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer, in tokens; memory for all of them is taken at once.", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(help="0: always the likeliest token; 1: drawn as the model says.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="With --temperature: draw among this many likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="With --temperature: draw among the likeliest tokens of this much probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same answer.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantize: QuantizeOption = None,
    debug: DebugOption = False,
) -> None:
    """Let MODEL answer PROMPT, or chat with it.

    \b
    Example:
      unsloth-core generate HuggingFaceTB/SmolLM2-135M-Instruct "Why is the sky blue?"
      unsloth-core generate HuggingFaceTB/SmolLM2-135M-Instruct --adapter runs/first
      cat letter.txt | unsloth-core generate model.gguf --raw --max-new-tokens 100
    """
    with _one_line_errors(debug):
        bound, params = _load(model, device, dtype, quantize)
        if adapter is not None:
            params = lora.adapt(params, lora.load(adapter, params))
        if chat is None:
            chat = bound.tokenizer is not None and bound.tokenizer.chat_template is not None
        if system is not None and not chat:
            raise ValueError("generate: --system needs a chat, but the prompt is continued as it stands (--raw)")
        messages = [{"role": "system", "content": system}] if system is not None else []
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}

        def answer(text: str, turn: int) -> None:
            """Stream the answer; in a chat it becomes part of the conversation."""
            messages.append({"role": "user", "content": text})
            request: Prompt = messages if chat else text
            key = random.fold_in(random.key(seed), turn)
            pieces = []
            with contextlib.suppress(KeyboardInterrupt) if interactive else contextlib.nullcontext():
                for piece in stream(bound, params, request, key=key, **sampling):
                    pieces.append(piece)
                    typer.echo(piece, nl=False)
            typer.echo()
            messages.append({"role": "assistant", "content": "".join(pieces)})

        interactive = prompt is None and _on_a_terminal()
        try:
            if interactive:
                _say("Ctrl-C stops an answer, Ctrl-D ends the chat.")
                for turn, text in enumerate(_lines()):
                    answer(text, turn)
            else:
                answer(sys.stdin.read().removesuffix("\n") if prompt is None else prompt, 0)
        except KeyboardInterrupt:
            typer.echo()
            raise typer.Exit(INTERRUPTED) from None


@app.command(short_help="Say how much memory a fine-tuning step takes, and how fast it is.")
def plan(
    model: Annotated[
        str,
        typer.Argument(help="A Hub id, a folder with a config.json, that file, or a .gguf file.", metavar="MODEL"),
    ],
    *,
    tokens: Annotated[int, typer.Option(help="Tokens in a microbatch.")] = Options.tokens,
    memory: Annotated[
        str | None, typer.Option(help="Most that tensors may take on the GPU, such as 24GiB. Default: any amount.")
    ] = None,
    sequence: Annotated[int | None, typer.Option(help="Length of the examples. Default: one of all tokens.")] = None,
    rank: Annotated[str, typer.Option(help=OPTION_HELP["rank"])] = str(Options.rank),
    targets: Annotated[str, typer.Option(help=OPTION_HELP["targets"])] = "all-linear",
    dropout: Annotated[float, typer.Option(help=OPTION_HELP["dropout"])] = Options.dropout,
    optimizer_states: Annotated[str, typer.Option(help=OPTION_HELP["optimizer_states"])] = Options.optimizer_states,
    accumulate: Annotated[int, typer.Option(help=OPTION_HELP["accumulate"])] = Options.accumulate,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the model's weights. Default: bfloat16.")] = None,
    quantize: QuantizeOption = None,
    embed: EmbedOption = None,
    head: HeadOption = None,
    debug: DebugOption = False,
) -> None:
    """Show the fastest way to fine-tune MODEL in so much memory: what is kept, its size, where the peak is, and the
    alternatives. From the model's config.json alone; neither weights nor a GPU are needed.

    \b
    Example:
      unsloth-core plan meta-llama/Llama-3.1-8B --tokens 8192 --memory 12GiB --quantize nf4
    """
    with _one_line_errors(debug):
        run = Options(
            tokens=tokens, rank=_ranks(rank), targets=_names(targets), dropout=dropout,
            optimizer_states=optimizer_states, accumulate=accumulate,
        )  # fmt: skip
        typer.echo(str(_plan(model, run, memory, sequence, dtype, quantize, embed, head)))


def _names(targets: str) -> str | list[str]:
    return targets if targets in ("all-linear", "attention") else [name.strip() for name in targets.split(",")]


def _ranks(text: str) -> int | dict[str, int]:
    """``"16"``, or ``"q_proj=8,v_proj=16"``; how large they may be, Options says."""
    try:
        if "=" not in text:
            return int(text)
        return {name.strip(): int(rank) for name, rank in (item.split("=") for item in text.split(","))}
    except ValueError:
        expected = "a number, or numbers by name such as q_proj=8,v_proj=16"
        raise ValueError(f"rank is {text!r}, expected {expected}") from None


def _places(embed: Where | None, head: Where | None) -> dict[str, str]:
    """What was asked for, as keywords of ``load`` and ``plan``."""
    return {name: place.value for name, place in (("embed", embed), ("head", head)) if place is not None}


def _plan(
    source: str, run: Options, memory: str | None, sequence: int | None, dtype: Dtype | None,
    quantize: Quantization | None, embed: Where | None, head: Where | None,
) -> Plan:  # fmt: skip
    config = text_config(hub.read_config(source), source)
    return make_plan(
        {**config, "_name_or_path": source}, run.tokens, memory, sequence=sequence, rank=run.rank, targets=run.targets,
        dropout=run.dropout, optimizer_states=run.optimizer_states, accumulate=run.accumulate,
        capture=run.capture is not False, quantize=None if quantize is None else quantize.value,
        dtype=getattr(torch, (dtype or Dtype.bfloat16).value), **_places(embed, head),
    )  # fmt: skip


@app.command(short_help="List the kernels and their measured speed, or explain one.")
def ops(
    op: Annotated[str | None, typer.Argument(help="Show the whole contract of this one.", metavar="NAME")] = None,
    *,
    debug: DebugOption = False,
) -> None:
    """List the kernels: formula, what is kept for backward, bytes and operations, and measured speed.

    \b
    Example:
      unsloth-core ops
      unsloth-core ops rms_norm
    """
    with _one_line_errors(debug):
        rows = catalogue.read_records()
        typer.echo(catalogue.table(rows) if op is None else catalogue.contract(op, rows))


def _on_a_terminal() -> bool:
    return sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """What is typed at the prompt, line by line, until Ctrl-D."""
    while True:
        try:
            text = input("> ")
        except EOFError:
            typer.echo()
            return
        if text.strip():
            yield text


def _load(
    source: str, device: str | None, dtype: Dtype | None, quantize: Quantization | None, **places: str
) -> tuple[Model, Any]:
    kind = None if dtype is None else getattr(torch, dtype.value)
    bits = None if quantize is None else quantize.value
    model, params = load(source, device=device, dtype=kind, quantize=bits, **places)
    size = f"{tree.nbytes(params) / 2**30:.2f} GiB, {params.embed.dtype}".replace("torch.", "")
    _say(f"{source}: {size}{f', linears in {quantize.value}' if quantize else ''}, on {params.norm.device}")
    return model, params


def _say(text: str) -> None:
    """To stderr: stdout is for what the model says."""
    typer.echo(text, err=True)


@contextlib.contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """What a user can put right ends the command with one line; warnings are one line too."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        try:
            yield
        except BrokenPipeError:
            raise  # the reader of our output left (`| head`): typer ends quietly
        except (*EXPECTED, RuntimeError) as error:
            full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's, on a CPU
            if debug or not (full or isinstance(error, EXPECTED)):
                raise
            text = str(error) or type(error).__name__
            if full:
                text = f"this machine's memory is full: try {SMALLER}"
            elif isinstance(error, OSError) and error.filename:
                text = f"{error.filename}: {error.strerror}"
            elif isinstance(error, torch.OutOfMemoryError):
                text = f"the GPU's memory is full: try {SMALLER}"
            _say(f"error: {' '.join(text.split())}")
            raise typer.Exit(1) from None
