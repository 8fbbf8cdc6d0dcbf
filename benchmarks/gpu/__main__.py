"""Merging and federated LoRA on a CUDA device beside the CPU, in one run; nothing new begins after some 7 minutes.

    python -m benchmarks.gpu --glue-dir GLUE                # all parts; writes results/gpu
    python -m benchmarks.gpu --only adapters full           # some of them
    python -m benchmarks.gpu --device cpu --quick           # a rehearsal without a GPU, which prints and writes nothing

adapters: `merge` of Llama-3-8B-shaped adapters by each method on the device and on the CPU, and PEFT's svd on the
device. full: bfloat16 models of 1.2 billion parameters by FroM, average and TIES. federated: rounds a minute and peak
memory of federated LoRA on SST-2 and QNLI. It needs neither ray nor datasets nor flwr_datasets.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import needs
from benchmarks.gpu.needs import PARTS

OUT = Path("results/gpu")
# seconds of a part, of the longest merge of one module, and after which a median is not repeated; most runs of a median
LIMITS = {"adapters": (220, 8, 1.5, 5), "full": (100, 15, 3, 3), "federated": (110, 0, 0, 1)}
LIMITS_QUICK = {"adapters": (30, 2, 0.2, 1), "full": (20, 2, 0.2, 1), "federated": (40, 0, 0, 1)}


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="some parts [default: all]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal [default: cuda]")
    parser.add_argument("--quick", action="store_true", help="small models: under two minutes on two slow cores")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the tables [default: {OUT}; with --quick or --device cpu none]"
    )
    parser.add_argument("--glue-dir", default="", help=f"folder with GLUE's TSV files (or set {needs.VARIABLE})")
    parser.add_argument("--model", default="minilm", help="of federated: minilm, a folder, or a Hub name")
    return parser.parse_args(arguments)


def lacking(parts: Sequence[str], device: str, glue_folder: str, model: str) -> list[str]:
    """Return a sentence for each thing that the parts lack on this machine."""
    found = needs.missing_packages(parts)
    if found:  # the other checks import some of them
        return found
    sentences = [needs.missing_gpu() if device == "cuda" else None]
    if "federated" in parts:
        sentences += [needs.missing_glue(glue_folder), needs.missing_model(model)]
    return [sentence for sentence in sentences if sentence is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts asked for; return 2 where something is lacking, which is then all that is said."""
    asked = options_of(arguments)
    parts = asked.only or list(PARTS)
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: nothing of a rehearsal runs on a GPU
    glue_folder = asked.glue_dir or os.environ.get(needs.VARIABLE, "")
    if sentences := lacking(parts, asked.device, glue_folder, asked.model):
        print("\n".join(sentences), file=sys.stderr)
        return 2
    folder = asked.out or (None if asked.quick or asked.device == "cpu" else OUT)
    from benchmarks.gpu import run
    from fedfrom.errors import BadInput

    limits = LIMITS_QUICK if asked.quick else LIMITS
    try:
        run.parts(
            [part for part in PARTS if part in parts],
            run.sizes(asked.quick),
            {part: run.limits(*limits[part]) for part in parts},
            asked.device,
            folder,
            Path(os.path.expanduser(glue_folder)),
            asked.model,
        )
    except BadInput as error:  # a model or a file that can't be read
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
