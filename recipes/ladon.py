"""Train ladon, the small reference model that comes with manyheads.

python recipes/ladon.py --out runs/ladon --minutes 100     trains (again: goes on where it stopped)
python recipes/ladon.py evaluate runs/ladon                measures held-out accuracy of every task
python recipes/ladon.py export runs/ladon                  writes src/manyheads/reference/ladon with its card
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import print
from safetensors.torch import load_model, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ladon_card import card_text, evaluate_model, write_card
from ladon_data import Batches, real_texts, train_tokenizer
from manyheads.progress import progressing
from manyheads.reference import ladon_path
from manyheads.training import Progress, TrainSettings, fit, next_token_loss
from manyheads.training.checkpoint import states

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
KEPT_AT = (0, 100, 200, 400, 700, 1000, 1500, 2000, 3000, 4500, 6000, 8000, 10000)  # steps of the kept checkpoints
EVAL_MINUTES = 6.0
BUNDLED = ladon_path()


def build_model(vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation="sdpa",
        )
    )


def prepare(out: Path) -> PreTrainedTokenizerFast:
    """The tokenizer and the encoded real texts, made once a folder."""
    if not (out / "corpus.npy").exists():
        print("training the tokenizer and encoding the text that ships with Python ...")
        out.mkdir(parents=True, exist_ok=True)
        train_tokenizer().save_pretrained(out / "tokenizer")
        tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
        ids = [[*encoding.ids, 1] for encoding in tokenizer.encode_batch_fast(list(real_texts()))]
        np.save(out / "corpus.partial.npy", np.concatenate([np.array(one, np.uint16) for one in ids]))
        (out / "corpus.partial.npy").replace(out / "corpus.npy")
    return PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one is resumed.")] = Path("runs/ladon"),
    minutes: Annotated[float, typer.Option(help="Wall-clock budget of training, over all resumes.")] = 100.0,
    steps: Annotated[int | None, typer.Option(help="Stop after so many steps at the latest.")] = None,
    seed: int = 0,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    threads: Annotated[int, typer.Option(help="Threads of torch; the number of cores is best.")] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the loss; needs a C++ compiler.")
    ] = True,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run in OUT.")] = True,
) -> None:
    """Train ladon (resumable; Ctrl-C keeps the state)."""
    if context.invoked_subcommand:
        return
    torch.set_num_threads(threads)
    tokenizer = prepare(out)
    torch.manual_seed(seed)
    model = build_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    last = {"eval": time.monotonic()}

    def after_step(progress: Progress, _: torch.optim.Optimizer) -> None:
        if progress.step in KEPT_AT:
            keep(model, out / "checkpoints" / f"step-{progress.step:06d}.safetensors")
        if progress.step % 50 == 0:
            print(
                f"step {progress.step} loss {progress.loss:.3f} {progress.tokens / progress.minutes / 60:.0f} tokens/s"
            )
        if time.monotonic() - last["eval"] > 60 * EVAL_MINUTES:
            scores = evaluate_model(model, tokenizer, n=64, needle_lengths=(64, 256))
            record(out, {**vars(progress), "scores": scores})
            last["eval"] = time.monotonic()

    if not states(out / "state"):
        (out / "run.json").write_text(json.dumps({"seed": seed, "peak": peak}) + "\n")
        keep(model, out / "checkpoints" / "step-000000.safetensors")
    settings = TrainSettings(steps=steps, minutes=minutes, rate=peak, seed=seed, compile=compiled)
    with progressing() as bar:
        progress = fit(
            model,
            Batches(out, seed),
            settings,
            out / "state",
            loss=next_token_loss,
            after_step=after_step,
            resume=resume,
            bar=bar.step("steps", steps),
        )
    keep(model, out / "checkpoints" / f"step-{progress.step:06d}.safetensors")
    record(out, {**vars(progress), "scores": evaluate_model(model, tokenizer, n=200)})


def keep(model: LlamaForCausalLM, path: Path) -> None:
    """A small copy of the weights, for work on how heads form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    save_file(weights, str(path), metadata={"format": "pt"})


def record(out: Path, line: dict[str, Any]) -> None:
    print(line["scores"])
    with (out / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def load(out: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, dict[str, Any]]:
    """The newest state of a run: model, tokenizer, and its progress and settings."""
    if not (saved := states(out / "state")):
        raise typer.BadParameter(f"{out} holds no run; train one with --out {out}.")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    model = build_model(len(tokenizer))
    load_model(model, str(saved[-1] / "model.safetensors"))
    progress = json.loads((saved[-1] / "progress.json").read_text()) | json.loads((out / "run.json").read_text())
    return model.eval(), tokenizer, progress


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder, or a folder Transformers can load.")] = Path(
        "runs/ladon"
    ),
    n: int = 400,
    seed: int = 0,
) -> None:
    """Print the held-out accuracy of every task."""
    if (model / "config.json").exists():
        bundled = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        print(evaluate_model(bundled, AutoTokenizer.from_pretrained(model), n, seed=seed))
        return
    trained, tokenizer, _ = load(model)
    print(evaluate_model(trained, tokenizer, n, seed=seed))


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The run's folder.")] = Path("runs/ladon"),
    to: Annotated[Path, typer.Option(help="Where the bundled model lives.")] = BUNDLED,
    notes: Annotated[Path | None, typer.Option(help="A text file of what else the card should say.")] = None,
    n: int = 400,
    seed: int = 0,
) -> None:
    """Write config, float16 weights, tokenizer and card to the package."""
    model, tokenizer, progress = load(out)
    to.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    partial = to / ".model.safetensors.partial"
    save_file(weights, str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(to / "model.safetensors")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = torch.float32  # stored in half, computed in single precision
    model.config.save_pretrained(to)
    tokenizer.save_pretrained(to)
    stored = AutoModelForCausalLM.from_pretrained(to).eval()
    card = write_card(stored, tokenizer, progress, n, seed)
    card["notes"] = notes.read_text().strip() if notes else ""
    (to / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (to / "card.md").write_text(card_text(card))
    print(f"{to}: {sum(file.stat().st_size for file in to.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    app()
