"""Scorecards of SmolLM2-135M in three quantizations of the same weights, and the same questions evaluated by other means.

`python -m benchmarks.scorecard --mmlu FOLDER --gsm8k FILE [--sample N] [--gsm8k-sample N] [--shots K] [--agree N] [--agree-only]`, or `make bench-score`.
Makes Q8_0 and Q4_0 from the Q4_1 file that the examples use (all three keep its Q8_0 embedding), adds them to a server of its own, and runs
`whimbrel score` on Q4_1 against Q4_0, on Q4_1 against Q8_0, on Q4_0 against Q8_0, and on Q8_0 alone, and puts the three side by side on two
hardware tiers (`whimbrel tradeoffs`). Then N questions of MMLU are evaluated again, by a way that shares no code with the scorecard: llama-cpp-python's
own class, every prompt from its first token, in one batch and token by token, and lm-evaluation-harness's formula (`loglikelihood` of " A" to " D", the
largest wins). Intervals are computed again with SciPy and by drawing questions. A run that was stopped goes on.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import msgspec
import numpy as np
from scipy import stats

from examples.smollm2.fetch import CACHE, fetch
from examples.smollm2.llama import quantize
from protocol.errors import RequestError, WhimbrelError
from protocol.ids import DeviceId
from protocol.messages import Capacity, Report
from protocol.release import HealthPlan
from server.fleet.registry import DeviceRecord
from server.home import opened
from server.operations import show_release
from server.scorecard.items import Question, Reply, question_key
from server.scorecard.journal import Journal
from server.scorecard.suites import Asking, read_prompts

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "smollm2"
FAMILY = "smollm2"
FILE_TYPES = {"q8_0": 7, "q4_0": 2}  # llama.h, llama_ftype
EMBEDDING_TYPE = 8  # ggml.h: Q8_0
PAIRS = (("q4_1", "q4_0"), ("q4_1", "q8_0"), ("q4_0", "q8_0"))
REFERENCE = "q8_0"
TIERS = {
    "gateway": "memory_mb = 480\nmemory_gb_per_s = 8.0\nstop_first = true",
    "pi4": "memory_mb = 1024\nmemory_gb_per_s = 4.0\ntoken_ms_max = 120.0",
}
FLEET = {"gateway": (20, ""), "pi4": (400, REFERENCE)}  # how many, and what they run
LETTERS = "ABCD"
CONTEXT = 4096
DRAWS = 20_000


def prepare(folder: Path) -> dict[str, Path]:
    """The three files and a server with a draft of each; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"q4_1": fetch(ROOT / CACHE)}
    for name, kind in FILE_TYPES.items():
        files[name] = folder / f"{name}.gguf"
        if not files[name].exists():
            partial = files[name].with_suffix(".partial")
            quantize(files["q4_1"], partial, kind, token_embedding_type=EMBEDDING_TYPE, allows_quantized=True)
            partial.rename(files[name])
    home = folder / "server"
    if not home.exists():
        health = folder / "health.json"
        plan = HealthPlan(
            prompts=read_prompts(EXAMPLE / "golden.toml")[:1],
            latency_p99_ms_max=10_000,
            memory_peak_bytes_max=1_000_000_000,
        )
        health.write_bytes(msgspec.json.encode(plan))
        whimbrel("init", str(home), "--fleet", "bench")
        for name, file in files.items():
            options = ("--runtime", "llama", "--health", str(health), "--dir", str(home))
            whimbrel("release", "add", FAMILY, name, str(file), *options)
    return files


def whimbrel(*words: str) -> str:
    """Runs the command; what it says on stderr is shown."""
    command = [sys.executable, "-m", "server.cli", *words]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode not in {0, 1} or not run.stdout:
        raise SystemExit(run.returncode)
    return run.stdout


def score(home: Path, version: str, against: str, options: argparse.Namespace) -> tuple[Any, float]:
    """A scorecard and the seconds that it took.

    Args:
        home: The server's folder.
        version: What is scored.
        against: What it is compared with; empty for nothing.
        options: How.
    """
    words = [
        "score",
        FAMILY,
        version,
        "--dir",
        str(home),
        "--json",
        *(("--against", against) if against else ()),
    ]
    words += ["--suite", f"golden={EXAMPLE / 'golden.toml'}", "--suite", f"edge={EXAMPLE / 'edge.toml'}"]
    words += ["--suite", f"mmlu={options.mmlu}", "--suite", f"gsm8k={options.gsm8k}"]
    words += ["--sample", f"mmlu={options.sample}", "--sample", f"gsm8k={options.gsm8k_sample}"]
    words += ["--shots", str(options.shots), "--answer-tokens", str(options.answer_tokens)]
    words += ["--threads", str(options.threads), "--context", str(CONTEXT)]
    words += ["--drift-texts", str(options.drift_texts)]
    words += [word for tokens in options.memory_at for word in ("--memory-at", str(tokens))]
    words += ["--html", str(home.parent / f"{version}{f'-against-{against}' if against else ''}.html")]
    begin = time.perf_counter()
    told = json.loads(whimbrel(*words))
    return told["scorecard"], time.perf_counter() - begin


def weigh(home: Path) -> None:
    """The three versions side by side, for boards that run Q8_0 and new gateways; tiers, devices and prices are assumed."""
    (home / "tiers").mkdir(exist_ok=True)
    for name, lines in TIERS.items():
        (home / "tiers" / f"{name}.toml").write_text(f'disk_mb = 4096\nruntime = "llama"\n{lines}\n')
    prices = home.parent / "prices.toml"
    prices.write_text('currency = "EUR"\nper_mb = 0.01\n')
    record = show_release(home, FAMILY, REFERENCE).record
    if record.published_ms is None:
        whimbrel("release", "publish", FAMILY, REFERENCE, "--dir", str(home))
    files = {file.name: file.sha256 for file in record.release.files}
    with opened(home) as there:
        now_ms = there.clock.now_ms()
        for tier, (count, version) in FLEET.items():
            held = files if version else {}
            there.store.save(
                [device(f"{tier}-{number}", tier, version, held, now_ms) for number in range(count)]
            )
    words = ["tradeoffs", FAMILY, REFERENCE, "q4_1", "q4_0", "--dir", str(home), "--prices", str(prices)]
    print("\n" + whimbrel(*words, "--deltas", "--html", str(home.parent / "tradeoffs.html")))


def device(name: str, tier: str, version: str, files: dict[str, str], now_ms: int) -> DeviceRecord:
    """A device as the server knows it."""
    said = Report(
        device=name,
        sequence=1,
        state="idle",
        family=FAMILY,
        version=version,
        files=files,
        tier=tier,
        capacity=Capacity(
            link_bytes_per_s=250_000, processor_percent=50, delta_memory_bytes=256 << 20, links_max=4
        ),
    )
    return DeviceRecord(device=DeviceId(name), report=said, seen_ms=now_ms)


def show(by_version: dict[str, Any], cards: dict[tuple[str, str], Any]) -> None:
    print("\nversion  size MB  load ms  p50 ms  p95 ms  p99 ms (high)  tok/s  prompt tok/s  peak MB at 512")
    for version, card in by_version.items():
        speed, memory = card["speed"], card["memory"]["contexts"][0]
        high = speed["p99_ms"]["high"]
        print(
            f"{version:<8} {card['resources']['size_bytes'] / 1e6:7.1f} {speed['load_ms']:8.1f} {speed['p50_ms']['value']:7.1f}"
            f" {speed['p95_ms']['value']:7.1f} {speed['p99_ms']['value']:7.1f} ({high and round(high, 1)})"
            f" {speed['steps_per_s']:8.1f} {speed['prompt_tokens_per_s']:10.1f} {memory['peak_bytes'] / 1e6:12.1f}"
        )
    print("\nversion  suite        right of asked   accuracy (95 %)")
    for version, card in by_version.items():
        for suite in card["suites"]:
            share = suite["accuracy"]
            print(
                f"{version:<8} {suite['name']:<12} {suite['right']:4} of {suite['count']:<6} "
                f"{100 * share['value']:6.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"
            )
    print("\nprompt                     mean log-probability under " + ", ".join(by_version))
    rows: dict[str, list[float]] = {}
    for card in by_version.values():
        for suite in card["suites"]:
            for prompt in suite["prompts"] if suite["name"] in {"golden", "edge"} else ():
                rows.setdefault(prompt["name"], []).append(prompt["logprob_mean"])
    for name, values in rows.items():
        print(f"{name:<26} " + "  ".join(f"{value:6.2f}" for value in values))
    print("\nversion  suite        accuracy before them, on the same questions")
    for (version, against), card in cards.items():
        for suite in card["drift"]["suites"]:
            share = suite["before"]
            print(
                f"{against:<8} {suite['name']:<12} {100 * share['value']:6.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"
                f"   before {version}"
            )
    print("\npair                 suite     gained lost other   points (95 %)            p")
    for (version, against), card in cards.items():
        for suite in card["drift"]["suites"]:
            flips = suite["paired"]
            change = flips["difference"]
            print(
                f"{version + ' after ' + against:<20} {suite['name']:<12} {flips['gained']:3} {flips['lost']:4} {suite['changed']:5}"
                f"   {100 * change['value']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})   {flips['p_value']:.2g}"
            )
    print("\npair                 KL mean (95 %)               median    p99  same first choice  parted")
    for (version, against), card in cards.items():
        texts, parted = card["drift"]["texts"], card["drift"]["divergences"]
        mean = texts["mean"]
        print(
            f"{version + ' after ' + against:<20} {mean['value']:.5f} ({mean['low']:.5f} to {mean['high']:.5f})"
            f" {texts['median']:.5f} {texts['p99']:.4f} {100 * texts['same']:10.1f} %"
            f" {sum(each['token'] is not None for each in parted):6} of {len(parted)}"
        )


def check_intervals(cards: dict[tuple[str, str], Any]) -> None:
    """Every interval again: Wilson by SciPy, differences by drawing questions with replacement."""
    rng = np.random.default_rng(7)
    worst_share = worst_change = 0.0
    drawn_count = 0
    for card in cards.values():
        for suite in card["suites"]:
            direct = stats.binomtest(suite["right"], suite["count"]).proportion_ci(method="wilson")
            found = suite["accuracy"]
            worst_share = max(worst_share, abs(direct.low - found["low"]), abs(direct.high - found["high"]))
        for suite in card["drift"]["suites"]:
            flips = suite["paired"]
            if flips["gained"] + flips["lost"] < 10:
                continue  # drawing questions cannot draw what has not been seen
            drawn_count += 1
            count = flips["count"]
            shares = [flips["gained"] / count, flips["lost"] / count]
            drawn = rng.multinomial(count, [*shares, 1 - sum(shares)], DRAWS)
            low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / count, [2.5, 97.5])
            change = flips["difference"]
            worst_change = max(worst_change, abs(low - change["low"]), abs(high - change["high"]))
            exact = stats.binomtest(flips["gained"], flips["gained"] + flips["lost"], 0.5).pvalue
            assert abs(exact - flips["p_value"]) < 1e-9, (exact, flips)
    print(
        f"\nintervals: shares differ from SciPy's Wilson by at most {worst_share:.1e}, McNemar's p-values are SciPy's"
    )
    if drawn_count:
        print(
            f"{drawn_count} changes with ten flips or more: their ends differ from {DRAWS:,} draws of the questions by at"
            f" most {100 * worst_change:.2f} points"
        )
    else:
        print("no suite had the ten flips that it takes to draw its questions again")


def independent(
    file: Path, questions: Sequence[tuple[str, str]], threads: int, batch: int
) -> list[list[float]]:
    """Log-likelihoods of " A" to " D" after each prompt, from its first token on, so many tokens at a time."""
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p())
    model = llama_cpp.Llama(os.fspath(file), n_ctx=CONTEXT, n_threads=threads, n_batch=batch, verbose=False)
    found = []
    for prompt, _ in questions:
        context = model.tokenize(prompt.encode(), add_bos=False, special=True)
        model.reset()
        model.eval(context)
        pointer = llama_cpp.llama_get_logits(model.ctx)
        row = np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),)).astype(np.float64)
        row = row - np.logaddexp.reduce(row)
        joined = [
            model.tokenize(f"{prompt} {letter}".encode(), add_bos=False, special=True) for letter in LETTERS
        ]
        found.append([float(row[each[len(context)]]) for each in joined])
    model.close()
    return found


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # llama-cpp-python publishes no types
def _silence(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Swallows what llama.cpp would print."""


def harness_prompts(mmlu: Path, names: Sequence[str], shots: int) -> list[tuple[str, str]]:
    """Prompts as lm-evaluation-harness writes them (`tasks/mmlu/default`), with the right letter, straight from the files."""
    made = []
    for name in names:
        subject, _, line = name.partition(" line ")
        with (mmlu / "dev" / f"{subject}_dev.csv").open(newline="") as file:
            dev = list(csv.reader(file))[1:]
        with (mmlu / "test" / f"{subject}_test.csv").open(newline="") as file:
            reader = csv.reader(file)
            row = next(each for each in reader if reader.line_num == int(line))
        text = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for question, *choices, answer in dev[:shots]:
            text += f"{question.strip()}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer: {LETTERS[int(answer)]}\n\n"
        question, *choices, answer = row
        text += (
            f"{question.strip()}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"
        )
        made.append((text, LETTERS[int(answer)]))
    return made


def _known(folder: Path, file: Path, questions: Sequence[Question]) -> list[Reply]:
    """What the scorecards of a file have as the answers to questions."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    found: dict[int, Reply] = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as opened:
            if msgspec.json.decode(opened.readline()).get("files") != [digest]:
                continue
        kept = Journal(path, {})
        for number, question in enumerate(questions):
            if reply := kept.get(f"reply:{question_key(question)}", Reply):
                found[number] = reply
        kept.close()
    if len(found) < len(questions):
        raise RequestError(
            f"the scorecards have asked {len(found)} of {len(questions)} questions", hint="see --agree"
        )
    return [found[number] for number in range(len(questions))]


def agree(file: Path, options: argparse.Namespace) -> None:
    """The scorecard's own answers beside the independent ones."""
    from server.scorecard.items import LETTERS as LETTERS_OF_SUITE  # noqa: PLC0415 - only this part looks inside
    from server.scorecard.suites import read_suite  # noqa: PLC0415 - likewise

    suite = read_suite("mmlu", options.mmlu, Asking(sample=options.agree, shots=options.shots))
    questions = harness_prompts(options.mmlu, [item.name for item in suite.items], options.shots)
    known = _known(options.out / "server" / "scorecards", file, [item.question for item in suite.items])
    ours = [reply.scores for reply in known]
    rights = [LETTERS_OF_SUITE.index(right) for _, right in questions]

    def right_of(found: Sequence[Sequence[float]]) -> int:
        return sum(int(np.argmax(scores)) == right for scores, right in zip(found, rights, strict=False))

    print(
        f"\nMMLU, {file.name}, {options.shots}-shot, {len(ours)} questions: the scorecard has {right_of(ours)} right"
    )
    for name, batch, count in (
        ("512 tokens at a time", 512, len(ours)),
        ("token by token", 1, options.agree_tokens),
    ):
        theirs = independent(file, questions[:count], options.threads, batch)
        pairs = list(zip(ours, theirs, strict=False))
        others = [
            (question[0][-60:], one, other)
            for question, (one, other) in zip(questions, pairs, strict=False)
            if int(np.argmax(one)) != int(np.argmax(other))
        ]
        gap = max(abs(one - other) for both in pairs for one, other in zip(*both, strict=True))
        print(
            f"  the independent evaluation, {name}: {right_of(theirs)} of {len(theirs)} right, where the scorecard has"
            f" {right_of(ours[: len(theirs)])}; the same answer to {len(theirs) - len(others)};"
            f" log-likelihoods differ by at most {gap:.4f}",
            flush=True,
        )
        for question, one, other in others:
            print(f"    {question!r}: {np.round(one, 4)} and {np.round(other, 4)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scorecard", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--mmlu", type=Path, required=True, metavar="FOLDER", help="with test/ and dev/")
    parser.add_argument("--gsm8k", type=Path, required=True, metavar="FILE", help="test.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "score", metavar="FOLDER")
    parser.add_argument(
        "--sample", type=int, default=200, metavar="N", help="questions of MMLU (default: 200; 14042 are all)"
    )
    parser.add_argument(
        "--gsm8k-sample",
        type=int,
        default=40,
        metavar="N",
        help="problems of GSM8K (default: 40; 1319 are all)",
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)"
    )
    parser.add_argument("--shots", type=int, default=5, metavar="K", help="solved examples (default: 5)")
    parser.add_argument(
        "--agree", type=int, default=40, metavar="N", help="questions that are evaluated again (default: 40)"
    )
    parser.add_argument(
        "--agree-tokens",
        type=int,
        default=40,
        metavar="N",
        help="of these, token by token, too (default: 40)",
    )
    parser.add_argument("--agree-only", action="store_true", help="no scorecards, only these questions")
    parser.add_argument(
        "--drift-texts",
        type=int,
        default=40,
        metavar="N",
        help="problems over which distributions are compared (default: 40)",
    )
    parser.add_argument(
        "--memory-at",
        type=int,
        nargs="*",
        default=[512, 2048],
        metavar="N",
        help="lengths of context (default: 512 2048)",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of llama.cpp (default: 1)")
    options = parser.parse_args(arguments)
    try:
        files = prepare(options.out)
        if options.agree_only:
            agree(files["q4_1"], options)
            return 0
        cards, seconds = {}, {}
        for version, against in PAIRS:
            print(f"{version} against {against}", file=sys.stderr, flush=True)
            cards[version, against], seconds[version, against] = score(
                options.out / "server", version, against, options
            )
        show({version: card for (version, _), card in cards.items()}, cards)
        check_intervals(cards)
        _, again = score(options.out / "server", *PAIRS[-1], options)
        print(f"\nthe last scorecard took {seconds[PAIRS[-1]]:.0f} s, the same again {again:.1f} s")
        score(
            options.out / "server", REFERENCE, "", options
        )  # before it is published, so that it names its scorecard
        weigh(options.out / "server")
        if options.agree:
            agree(files["q4_1"], options)
    except WhimbrelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
