"""A run as a model folder for any serving stack: its adapter merged into its base, or its model.

    python export.py results/td_dpo_b2.5_t2_s42
        the model in 16 bits -> results/td_dpo_b2.5_t2_s42/merged/
    python export.py results/RUN --out models/mine --dtype float32
    python export.py results/RUN --push me/llama-2-7b-td-dpo        (needs `hf auth login`)

Reads   results/RUN/args.json, adapter/, the base model, and the run's validation pairs; or model/.
Writes  OUT/: *.safetensors (at most 5 GB each), config, tokenizer and chat template of the base,
        README.md (a model card) and export.json, which says what was merged and how far log-probs
        moved. It appears whole or not at all.

The base is loaded in 16 bits, also where training had it in 4: an adapter that was trained on a
4-bit base meets weights that it has not seen, and how far that moves the log-probs of the
validation pairs is printed. Before anything is written, the merged model's log-probs are compared
with those of base + adapter.

A run of --tune full has nothing to merge, and its model/ is such a folder already. Its export, in
results/RUN/exported/, has a model card beside the same files (hard links: no second copy on the
disk), or the weights in another --dtype.

Then transformers and vLLM load OUT as it is, `python gen_mtbench.py RESULTS --base --model OUT`
answers with it, and llama.cpp's convert_hf_to_gguf.py makes a GGUF file of it.
"""

import pref.files.interrupts  # noqa: F401  isort: skip

import argparse
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pref.files import console, disk, model_card, run_folders
from pref.files.console import UserError
from pref.files.pairs import read_pairs
from pref.model import (
    architecture,
    chat,
    hub,
    loading,
    lora,
    merge,
    model_folder,
    token_check,
    weights,
)
from pref.model.ranks import pick_device
from pref.model.weights import ModelFiles

WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a weight
SEED = 0  # the adapter's matrices are loaded: nothing is drawn
# A share of the adapter's own effect: above it, rounding hides what was trained.
MUCH = 0.25


class Run(NamedTuple):
    """A trained run."""

    folder: Path
    record: dict  # args.json
    summary: dict  # summary.json

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def is_full(self) -> bool:
        return run_folders.tune_of(self.record) == "full"

    @property
    def model(self) -> Path:
        """Of a run that trained all parameters."""
        return self.folder / run_folders.WEIGHTS["full"]


class Wanted(NamedTuple):
    """What is to be written, and to where."""

    out: Path
    dtype: str
    record: dict  # export.json, as far as it is known before


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="export.py results/RUN [--option VALUE ...]  (--help explains all of them)",
        description=__doc__,
        formatter_class=console.HelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run, with its adapter/ or model/")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/merged, RUN/exported for a model/")
    dtypes = ["auto", "bfloat16", "float16", "float32"]
    add(
        "--dtype",
        choices=dtypes,
        default="auto",
        help="auto: the base's own 16-bit type, of model/ its own",
    )
    add("--model", help="base model, if it has moved (default: the one the run was trained on)")
    add("--data", type=Path, help="pairs to compare on, if they have moved (default: the run's)")
    add("--num_pairs", type=int, default=32, help="validation pairs to compare (default: 32)")
    add("--push", metavar="USER/NAME", help="upload the folder to this repository on the hub")
    add("--private", action="store_true", help="of --push: make a new repository private")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    # 1) Everything that can be wrong without weights.
    args = parse_args(argv)
    if args.num_pairs < 1:
        raise UserError(f"--num_pairs {args.num_pairs}: at least one pair is needed to compare")
    if args.private and not args.push:
        raise UserError("--private is for --push; give that too, or leave it out")
    run = read_run(args.run)
    if run.is_full and args.data:
        raise UserError("--data: a run of --tune full has nothing to compare; leave it out")
    files = weights.find_model(str(run.model), "") if run.is_full else find_base(run, args.model)
    wanted = what_is_wanted(run, files, args)
    if args.push:
        hub.check_push(args.push, args.private)

    # 2) The model, merged, compared and written, unless that was done before.
    if read_done(wanted):
        source = "model" if run.is_full else "adapter and base"
        print(f"{wanted.out}: is there already, from the same {source}")
    elif run.is_full:
        write_whole(run, files, wanted, args.model)
    else:
        merge_and_write(run, files, wanted, args)

    # 3) What to do with it.
    if args.push:
        print(f"pushed: {hub.push(wanted.out, args.push)}")
    print_next(wanted.out)
    return 0


# ---- what is merged -----------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Raises UserError for a folder that is no run, or has nothing that can be exported."""
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder}: no run there (no args.json); give results/RUN_ID")
    record = disk.read_json(folder / "args.json")
    if not (folder / "summary.json").is_file():
        raise UserError(
            f"{folder}: its training has not finished; continue it first (train_pref.py --status "
            f"{folder} says how)"
        )
    run = Run(folder, record, disk.read_json(folder / "summary.json"))
    kind = run_folders.weights_of(folder)
    if not kind.is_dir():
        article = "an" if kind.name == "adapter" else "a"
        raise UserError(
            f"{folder}: its training ended without {article} {kind.name} (it diverged before an "
            "evaluation); export another run"
        )
    if not run.is_full:
        lora.lora_config(run.adapter)
    if run.summary.get("status") == "diverged":
        print(f"warning: {folder}: diverged; its {kind.name} is the best before that")
    if record.get("mode") == "trial":
        print(f"warning: {folder}: is a trial run, trained for a few steps")
    return run


def find_base(run: Run, model: str | None) -> ModelFiles:
    """The base model that the adapter was trained on. Raises UserError if it is not found, or is
    quantised itself, so that nothing can be added to its weights.
    """
    name = model or run.record["model"]
    try:
        files = weights.find_model(name)
    except UserError as error:
        if model:
            raise
        raise UserError(f"{error}. If it has moved, give its place with --model") from None
    if files.quantisation:
        raise UserError(
            f"--model {name}: its weights are quantised ({files.quantisation}), and an adapter "
            "cannot be added to them; give the model's release that is not, with --model"
        )
    if files.is_local:
        check_same(run, files)
    return files


def check_same(run: Run, files: ModelFiles) -> None:
    """Raise UserError if the weights of the base are not those that training started from."""
    expected, found = run.record.get("model_sha256"), weights.identity(files)
    if expected and found != expected:
        raise UserError(
            f"--model {files.name}: is another model (hash {found[:8]}) than the one that "
            f"{run.folder} was trained on ({expected[:8]}): it has changed, or is of another "
            "revision; give the base that it was trained on"
        )


def what_is_wanted(run: Run, files: ModelFiles, args: argparse.Namespace) -> Wanted:
    """files: of the base, or of the model of a run that trained all parameters. Raises UserError if
    the place is taken by something else, or there is no room for it.
    """
    out = args.out or run.folder / ("exported" if run.is_full else "merged")
    dtype, stored = args.dtype, stored_dtype(files)
    if dtype == "auto":
        usable = WIDTH if run.is_full else ("bfloat16", "float16")
        dtype = stored if stored in usable else "bfloat16"
    name = "weights_sha256" if run.is_full else "adapter_sha256"
    record = {
        "run": run.record["run_id"],
        name: run_folders.weights_sha256(run.folder),
        "model_sha256": run.record.get("model_sha256"),
        "dtype": dtype,
    }
    wanted = Wanted(out, dtype, record)
    if out.exists() and not read_done(wanted):
        source = "model" if run.is_full else "adapter"
        raise UserError(
            f"{out}: is there, and not from this {source} in {dtype}; give another --out, or "
            "remove it"
        )
    return wanted


def stored_dtype(files: ModelFiles) -> str:
    return str(files.config.get("dtype") or files.config.get("torch_dtype"))


def read_done(wanted: Wanted) -> dict | None:
    """export.json, if the folder is what is wanted."""
    path = wanted.out / "export.json"
    found = disk.read_json(path) if path.is_file() else {}
    return found if wanted.record.items() <= found.items() else None


# ---- merged and written -------------------------------------------------------------------------


def merge_and_write(run: Run, files: ModelFiles, wanted: Wanted, args: argparse.Namespace) -> dict:
    """export.json, when the folder is there."""
    # 1) The pairs to compare on, and room for the result.
    pairs = tokenised(run, files, args)
    check_room(wanted, files)

    # 2) Base and adapter.
    dtype, device = getattr(torch, wanted.dtype), pick_device(0)
    base = loading.load_base(files.name, dtype, "none", device)
    if not files.is_local:  # its weights are here only now
        check_same(run, files)
    adapted = lora.add_lora(base, 0, 0, 0.0, "", SEED, init=run.adapter, is_reference=False)
    if lora.tied_head_warning(adapted):
        raise UserError(
            f"{run.adapter}: adapts the output head, which is the embedding too, so that it cannot "
            "be merged; serve base and adapter"
        )

    # 3) Log-probs of the base, of base + adapter, and of both in one.
    attention = architecture.read(files.name).attention

    def logps_of(model, what: str) -> Tensor:
        return merge.token_logps(
            model, pairs, attention, lambda p: console.progress(p, what, unit="pairs")
        )

    with lora.adapter_off(adapted):
        untrained = logps_of(adapted, "log-probs, base")
    expected = logps_of(adapted, "log-probs, base + adapter")
    model = merge.merged(adapted, f"--dtype {wanted.dtype}")
    found = merge.compare(untrained, expected, logps_of(model, "log-probs, merged"), dtype)
    print_comparison(found, run, wanted)

    # 4) The folder, whole or not at all.
    record = wanted.record | {"comparison": found._asdict(), "versions": disk.versions()}
    write(model, run, files, wanted, record)
    return record


def tokenised(run: Run, files: ModelFiles, args: argparse.Namespace) -> list[chat.TokenPair]:
    """The first validation pairs of the run, as it saw them."""
    data, record = args.data or Path(run.record["data"]), run.record
    path = data / "val.jsonl"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give the folder of the run's pairs, or of others, with --data"
        )
    tokenizer = chat.load_tokenizer(files.name)
    rows = read_pairs(path, args.num_pairs)
    checked = token_check.tokenize_checked(
        tokenizer, rows, record["max_length"], record["truncation"], record.get("append_eos", False)
    )
    if not checked.pairs:
        raise UserError(f"{path}: none of its first {len(rows)} pairs can be used; give another")
    return checked.pairs


def check_room(wanted: Wanted, files: ModelFiles) -> None:
    """Raise UserError if the disk has no room for the model."""
    shapes = loading.load_base(files.name, torch.bfloat16, "none", torch.device("meta"))
    needed = sum(p.numel() for p in shapes.parameters()) * WIDTH[wanted.dtype]
    place = disk.nearest(wanted.out)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{place}: has {free / 1e9:.1f} GB free, and the model takes "
            f"{needed / 1e9:.1f}; make room, or give an --out on another disk"
        )


def write(model, run: Run, files: ModelFiles, wanted: Wanted, record: dict) -> None:
    """Write the merged model and its card."""
    with appearing(wanted.out) as partial:
        model_folder.write(model, partial, files.folder, getattr(torch, wanted.dtype))
        card = model_card.text(run.record, run.summary, files.name, files.folder, record)
        disk.write_text(partial / "README.md", card)
        disk.write_json(partial / "export.json", record)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, put there at the end: it appears whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(out)


# ---- a model as it is ---------------------------------------------------------------------------


def write_whole(run: Run, files: ModelFiles, wanted: Wanted, base: str | None) -> None:
    """The model of a run that trained all parameters, with its card. base: where the model is that
    it was trained from, if that has moved; its licence is named if it is found. Raises UserError
    if `base` is not that model.
    """
    # 1) What the card says of the base, which need not be there any more.
    name, folder = base or run.record["model"], run.folder
    try:
        origin = weights.find_model(name)
        if origin.is_local:
            check_same(run, origin)
        folder = origin.folder
    except UserError as error:
        if base:
            raise
        print(f"note: the card names no licence: {error}")

    # 2) The same files, or weights in another dtype.
    model, is_same = None, wanted.dtype == stored_dtype(files)
    if not is_same or disk.nearest(wanted.out).stat().st_dev != files.folder.stat().st_dev:
        check_room(wanted, files)
    if not is_same:
        model = loading.load_base(files.name, getattr(torch, wanted.dtype), "none", pick_device(0))
        check_finite(model, wanted)
        print(f"weights in {stored_dtype(files)}, rounded to {wanted.dtype}")
    record = wanted.record | {"versions": disk.versions()}
    with appearing(wanted.out) as partial:
        if model is None:
            same_files(files.folder, partial)
        else:
            model_folder.write(model, partial, files.folder, getattr(torch, wanted.dtype))
        card = model_card.text(run.record, run.summary, name, folder, record)
        disk.write_text(partial / "README.md", card)
        disk.write_json(partial / "export.json", record)


def check_finite(model: torch.nn.Module, wanted: Wanted) -> None:
    """Raise UserError if a weight has no value in the dtype that it was rounded to."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"--dtype {wanted.dtype}: {name} has values that are too large for it; give "
                "bfloat16 or float32"
            )


def same_files(source: Path, target: Path) -> None:
    """Put every file of `source` into `target`: weights as hard links where the disk can, which
    take no room, everything else as copies, which can be edited.
    """
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix != ".safetensors":
                raise OSError
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)


# ---- what is printed ----------------------------------------------------------------------------


def print_comparison(found: merge.Comparison, run: Run, wanted: Wanted) -> None:
    print(
        f"merged in {wanted.dtype}: log-probs of {found.tokens:,} response tokens differ from base "
        f"+ adapter by {found.merging:.2g} nats a token; the adapter itself changes them by "
        f"{found.adapter:.2g}"
    )
    if found.share > MUCH:
        print(
            f"warning: rounding to {wanted.dtype} changes {found.share:.0%} as much as the adapter "
            "does: little of what was trained is left. Give --dtype float32, or serve base and "
            "adapter"
        )
    if run.record.get("quant") == "nf4":
        print(
            "note: the adapter was trained on the base in 4 bits, and is merged into it in "
            f"{8 * WIDTH[wanted.dtype]}: its answers can differ from those of the run, which "
            "gen_mtbench.py gives with the base in 4 bits"
        )


def print_next(out: Path) -> None:
    print(f"model: {out}")
    print(f"  transformers  AutoModelForCausalLM.from_pretrained({str(out)!r})")
    typed = shlex.quote(str(out))
    print(f"  vLLM          vllm serve {typed}")
    print(f"  GGUF          python llama.cpp/convert_hf_to_gguf.py {typed} --outfile NAME.gguf")


if __name__ == "__main__":
    console.run_main(main)
