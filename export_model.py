"""Export weights: python export_model.py --weights FILE --format minimind|llama|gguf --output PATH

Without --weights it takes the best there is: out/rl_512.pth, then multi-turn, single-turn, the
demo's. An adapter given by --lora is merged. And back, to a .pth file:
python export_model.py --from FOLDER_OR_GGUF --output FILE.pth
"""

import argparse
from pathlib import Path

from model.flags import add_switch, quick_imports, run_main, weights_flags
from model.script_parser import ScriptParser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(
        __doc__,
        conflict_handler="resolve",  # --dtype is another here: what is written, not computed in
    )
    group = parser.add_argument_group("export")
    add = group.add_argument
    add("--format", choices=("minimind", "llama", "gguf"), help="minimind: with v1's own code")
    add("--output", metavar="PATH", required=True, help="a folder; gguf: also a .gguf file")
    add("--from", dest="source", metavar="PATH", help="a folder or .gguf file to read back")
    add("--quantize", type=str.lower, metavar="TYPE", help="gguf: q8_0, q5_1, q5_0, q4_1, q4_0, …")
    add_switch(group, "--bin", "pytorch_model.bin in place of model.safetensors", default=False)
    add_switch(group, "--overwrite", "replace an export of that name", default=False)
    add("--push_to_hub", metavar="NAME", help="upload the folder as user/model, with a model card")
    weights_flags(parser)
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="precision of what is written; auto: float32, as trained "
        "(with --quantize float16 for what cannot be quantized)",
    )
    args = parser.parse_args(argv)
    if (args.source is None) == (args.format is None):
        parser.error("give --format to export, or --from to read an export back")
    if args.source and not args.output.endswith(".pth"):
        parser.error(f"--output {args.output} does not end in .pth: --from makes a weights file")
    if args.quantize and args.format != "gguf":
        parser.error("--quantize goes with --format gguf: only GGUF files have quantized types")
    if args.format != "gguf" and args.output.endswith(".gguf"):
        parser.error(f"--output {args.output}: {args.format} is a folder; .gguf is --format gguf")
    if args.bin and args.format not in ("minimind", "llama"):
        parser.error("--bin goes with --format minimind or llama")
    if args.push_to_hub and (args.source or args.output.endswith(".gguf")):
        parser.error("--push_to_hub uploads a folder: give --output a folder's name")
    for name in ("weights", "load_from", "lora"):
        if args.source and getattr(args, name):
            parser.error(f"--{name} and --from exclude one another: --from names the weights")
    return args


def read_back(args: argparse.Namespace) -> None:
    """Make a .pth file of an export."""
    with quick_imports():
        from model.checkpoint import save_weights, sidecar
        from model.export import check_output
        from model.readback import read_back

    output = Path(args.output)
    for path in (output, sidecar(output)):
        check_output(path, args.overwrite)
    loaded = read_back(Path(args.source), args)
    save_weights(loaded.model, output, loaded.tokenizer, read_from=args.source)
    print(f"wrote {output} and {sidecar(output)}\nchat: python 2-eval.py --weights {output}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.source:
        read_back(args)
        return
    with quick_imports():
        from model.checkpoint import load_for_inference
        from model.export import export
        from model.hub import push

    output, written_in = Path(args.output), args.dtype
    args.dtype = "float32"  # loaded and merged in full precision; rounded once, when written
    loaded = load_for_inference(args, purpose="chat", packed=False)
    made = export(
        loaded,
        output,
        args.format,
        dtype=written_in,
        quantize=args.quantize,
        binary=args.bin,
        overwrite=args.overwrite,
        hub_name=args.push_to_hub,
    )
    merged = f" with the adapter {loaded.adapter} merged" if loaded.adapter else ""
    print(f"{loaded.path}{merged} as {args.format}:")
    for path in made.files:
        print(f"  {path.stat().st_size:>13,} bytes  {path}")
    print("\n".join([*made.notes, *made.usage]))
    if args.push_to_hub:
        print(f"pushed to {push(output, args.push_to_hub)}")


if __name__ == "__main__":
    run_main(main)
