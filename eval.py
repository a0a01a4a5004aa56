"""Measure checkpoints: perplexity, multiple-choice tasks, curves; samples, ablations.

    python eval.py configs/amber_tiny.py                       # all that is not measured yet
    python eval.py configs/amber_tiny.py --checkpoints=last    # or =7, =0,4,9, or a path
    python eval.py configs/amber_tiny.py --watch               # follow a run that is going on
    python eval.py configs/amber_tiny.py --text=model.py       # perplexity of any text
    python eval.py configs/amber_tiny.py --prompt="def main("  # text from the newest one
    python eval.py --compare runs/a runs/b                     # settings against results
    torchrun --nproc_per_node=8 eval.py configs/amber_7b.py    # the work shared out

Every result, of one checkpoint in one measure, is a line of runs/NAME/eval.jsonl, written as
soon as it is there; what is there is not measured again. Benchmarks are read from
TASK_DIR/NAME (see README.md); prompts, examples, tokens and scores are those of EleutherAI's
lm-evaluation-harness 0.4.13. Curves are printed, and with matplotlib drawn to curves.png; those of
a run that goes on from another (Crystal's stages) with that one's to stages.png.
"""

import csv
import functools
import json
import math
import os
import re
import statistics
import string
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import kernels
import prepare_data
import train
from configs import Config, load
from model import KVCache, LLaMA

POLL_SECONDS = 10.0  # between two looks at a run that is going on
MIN_SPARED = 0.1  # of a batch's tokens: for less, what it has in common is not computed apart
Row = tuple[np.ndarray, int]  # ids of context and continuation, how many of them are scored


# ---------------------------------------------------------------------------------------------
# benchmarks: a row of the data set -> context (one, or one per choice), choices, right one(s)


def arc(d: dict) -> tuple:
    right = d["choices"]["label"].index(d["answerKey"])
    return f"Question: {d['question']}\nAnswer:", d["choices"]["text"], right


def hellaswag(d: dict) -> tuple:
    def clean(text: str) -> str:  # of what WikiHow's pages left in it
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
    context = f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in d["endings"]], int(d["label"])


def mmlu(d: dict) -> tuple:
    listed = (f"{letter}. {choice}" for letter, choice in zip("ABCD", d["choices"]))
    return "\n".join([d["question"].strip(), *listed, "Answer:"]), list("ABCD"), d["answer"]


def truthfulqa_mc1(d: dict, targets: str = "mc1_targets") -> tuple:
    context = f"{QA_PROMPT}\n\nQ: {d['question']}\nA:"
    return context, d[targets]["choices"], d[targets]["labels"]


def truthfulqa_mc2(d: dict) -> tuple:
    return truthfulqa_mc1(d, "mc2_targets")


def piqa(d: dict) -> tuple:
    return f"Question: {d['goal']}\nAnswer:", [d["sol1"], d["sol2"]], d["label"]


def winogrande(d: dict) -> tuple:  # the sentence's end is scored, after either name
    before, _, after = d["sentence"].partition("_")
    options = [before + d["option1"], before + d["option2"]]
    return options, [after.strip()] * 2, int(d["answer"]) - 1


def boolq(d: dict) -> tuple:
    return f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", ["no", "yes"], d["label"]


def openbookqa(d: dict) -> tuple:
    right = d["choices"]["label"].index(d["answerKey"].lstrip())
    return d["question_stem"], d["choices"]["text"], right


class Task(NamedTuple):
    ask: Callable[[dict], tuple]
    metric: str  # the one that stands for it: of "acc", "acc_norm" (per character), "mc2"
    shots: int  # solved examples before a question
    pool: str  # the split they come from
    split: str  # the split that is asked
    hub: str  # where its files are, on huggingface.co/datasets
    folder: str = ""  # in TASK_DIR; "" = its name


TRUTHFULQA = ("", "validation", "truthfulqa/truthful_qa, folder multiple_choice", "truthfulqa")
TASKS = {
    "arc_challenge": Task(arc, "acc_norm", 25, "train", "test",
                          "allenai/ai2_arc, folder ARC-Challenge"),
    "hellaswag": Task(hellaswag, "acc_norm", 10, "train", "validation", "Rowan/hellaswag"),
    "mmlu": Task(mmlu, "acc", 5, "dev", "test", "cais/mmlu, a folder per subject"),
    "truthfulqa_mc1": Task(truthfulqa_mc1, "acc", 0, *TRUTHFULQA),
    "truthfulqa_mc2": Task(truthfulqa_mc2, "mc2", 0, *TRUTHFULQA),
    "piqa": Task(piqa, "acc_norm", 0, "", "validation", "baber/piqa"),
    "winogrande": Task(winogrande, "acc", 0, "", "validation",
                       "allenai/winogrande, folder winogrande_xl"),
    "boolq": Task(boolq, "acc", 0, "", "validation", "aps/super_glue, folder boolq"),
    "openbookqa": Task(openbookqa, "acc_norm", 0, "", "test",
                       "allenai/openbookqa, folder main"),
}
OWN = ("continuation", "recall")  # made here, from the held-out rows
SUBJECT = "The following are multiple choice questions (with answers) about {}.\n\n"  # MMLU's
QA_PROMPT = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain."""  # TruthfulQA's own (Lin et al. 2021)


class Question(NamedTuple):
    rows: list[Row]  # one per choice
    lengths: np.ndarray  # of the choices, characters
    right: np.ndarray  # 1 where the choice is right


# metric -> what a question adds to it, from the log p of its choices
POINTS: dict[str, Callable[[np.ndarray, Question], float]] = {
    "acc": lambda ll, q: q.right[ll.argmax()],
    "acc_norm": lambda ll, q: q.right[(ll / q.lengths).argmax()],
    "mc2": lambda ll, q: q.right @ np.exp(ll - np.logaddexp.reduce(ll)),
}


def find_split(task: Task, folder: Path, split: str) -> list[Path]:
    files = [p for p in folder.glob(f"{split}[.-]*") if p.suffix in (".jsonl", ".parquet")]
    if not files:
        raise SystemExit(f"{folder} has no {split}.jsonl and no {split}*.parquet: it is the"
                         f" split {split!r} of huggingface.co/datasets/{task.hub}.")
    return sorted(files)


def read_split(files: list[Path]) -> list[dict]:
    """The rows of a split's .jsonl or .parquet files."""
    docs: list[dict] = []
    for file in files:
        if file.suffix == ".parquet":
            rows = prepare_data.optional("pyarrow.parquet").ParquetFile(file)
            docs += prepare_data.naming(str(file), (d for d in rows.read().to_pylist()))
        else:
            lines = file.read_text(encoding="utf-8").split("\n")
            docs += prepare_data.naming(str(file), (json.loads(x) for x in lines if x.strip()))
    if not docs:
        raise SystemExit(f"{files[0]} has no rows.")
    return docs


def examples(task: Task, pool: list[dict], doc: dict, random: Random) -> Iterable[int]:
    """Which of the pool go before a question: the harness's draw, from its one stream."""
    n, everyone = task.shots, range(len(pool))
    if not n or task.pool == "dev":
        return everyone[:n]
    if task.split == "test":
        return random.sample(everyone, n)
    # Without a test split one more is drawn, in case the question itself is among them.
    drawn = [i for i in random.sample(everyone, n + 1) if pool[i] != doc]
    return drawn[:n] if len(drawn) >= n else random.sample(
        [i for i in everyone if pool[i] != doc], n)


def encode(tokenizer: prepare_data.Tokenizer, context: str, choice: str, window: int) -> Row:
    """Context and choice tokenized as one text; the choice's are the ids the context has not.

    Spaces that end the context count with the choice. An empty context is the end of a
    document. What exceeds the window is cut off on the left.
    """
    known = tokenizer.encode(context.rstrip())
    ids = tokenizer.encode(f"{context} {choice}")
    n = max(1, len(ids) - len(known))
    if not len(known):
        ids = np.append([tokenizer.eos_id], ids)
    return ids[-window - 1 :].astype(np.int32), min(n, window)


def parts(task: Task, doc: dict) -> tuple[list[str], list[str], np.ndarray]:
    """A context per choice, the choices, and 1 for those that are right."""
    contexts, choices, right = task.ask(doc)
    if isinstance(contexts, str):
        contexts = [contexts] * len(choices)
    if isinstance(right, int):
        right = [i == right for i in range(len(choices))]
    return contexts, choices, np.array(right, int)


def solved(task: Task, doc: dict) -> str:
    contexts, choices, right = parts(task, doc)
    return f"{contexts[right.argmax()]} {choices[right.argmax()]}\n\n"


def questions(config: Config, task: Task, folder: Path, subject: str) -> list[Question]:
    """The questions of a benchmark (or of one of its subjects), ready to be scored."""
    tokenizer = prepare_data.load_tokenizer(config.data_dir)
    docs, random = read_split(find_split(task, folder, task.split)), Random(1234)  # its seed
    pool = read_split(find_split(task, folder, task.pool)) if task.shots else []
    if len(pool) < task.shots + (task.pool == "train"):
        raise SystemExit(f"{folder} has {len(pool)} rows in {task.pool}: too few to draw"
                         f" {task.shots} examples from.")
    found: list[Question] = []
    try:
        shown = [solved(task, doc) for doc in pool]
        for doc in docs:
            head = SUBJECT.format(subject) if subject else ""
            head += "".join(shown[i] for i in examples(task, pool, doc, random))
            contexts, choices, right = parts(task, doc)
            rows = [encode(tokenizer, head + a, b, config.seq_len)
                    for a, b in zip(contexts, choices)]
            found.append(Question(rows, np.array([len(c) for c in choices]), right))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise SystemExit(f"{folder}, after {len(found)} questions: a row is not in the form of"
                         f" huggingface.co/datasets/{task.hub} ({error!r}).")
    return found


def own_questions(config: Config, manifest: dict, name: str) -> list[Question]:
    """Questions of four choices, made of the first 32 held-out rows of each source.

    continuation: which n tokens follow these 3 n, the row's own or those of other rows of its
    source? It asks what a text is about. recall: a row's first half n tokens come once more
    after 4 n of it; which of its pieces followed them then? They are all of one text, so it
    asks for looking back, which a model learns later (induction heads, Olsson et al. 2022).
    """
    n = 4 * min(4, (manifest["seq_len"] + 1) // 20)
    found: list[Question] = []
    for file in manifest["valid"] if n else []:
        ids = prepare_data.open_valid(config.data_dir, manifest, file["source"])["token_ids"]
        ids = ids[:32, : 4 * n].astype(np.int32)
        for i, row in enumerate(ids if len(ids) > 3 else []):
            if name == "continuation":
                context, choices = row[: 3 * n], [ids[i - k, 3 * n :] for k in range(4)]
            else:
                context = np.append(row, row[: n // 2])
                choices = [row[k * n + n // 2 : k * n + n] for k in range(4)]
            choices = np.roll(choices, i, axis=0)  # the right one stands at i % 4
            rows = [(np.append(context, choice), len(choice)) for choice in choices]
            found.append(Question(rows, np.ones(4), (np.arange(4) == i % 4).astype(int)))
    return found


# ---------------------------------------------------------------------------------------------
# scoring


@torch.no_grad()
def log_likelihoods(model: LLaMA, asked: list[list[Row]], batch: int) -> list[np.ndarray]:
    """log p of the last n ids of each row (ids, n) given those before, one array per question.

    Questions of like length go together, the longest first, about `batch` inputs at once.
    """
    order = sorted(range(len(asked)), key=lambda i: -max(len(ids) for ids, _ in asked[i]))
    parts, filled = [], batch
    for i in order:
        inputs = len({ids[:-1].tobytes() for ids, _ in asked[i]})
        if filled + inputs > batch:
            parts, filled = [*parts, []], 0
        parts[-1].append(i)
        filled += inputs
    found: dict[int, np.ndarray] = {}
    hidden = None if len(parts) > 9 else True  # a bar within the bar, where it takes a while
    for part in tqdm(parts, unit="batch", leave=False, disable=hidden):
        found |= zip(part, score_batch(model, [asked[i] for i in part]))
    return [found[i] for i in range(len(asked))]


def score_batch(model: LLaMA, asked: list[list[Row]]) -> list[np.ndarray]:
    """`log_likelihoods` of one batch, what is common computed once.

    Choices of one token share their input (MMLU). What all inputs begin with (MMLU's examples)
    goes through the model as one row, then what the choices of each question begin with
    (examples and question) as a row per question; its keys and values serve all that follow.
    """
    inputs: list[np.ndarray] = []
    members: list[list[int]] = []  # the inputs of each question
    first: list[int] = []  # position of each input from which it is scored
    picked: list[tuple[int, np.ndarray, int]] = []  # input, ids and n of each choice
    for rows in asked:
        known: dict[bytes, int] = {}
        for ids, n in rows:
            r = known.setdefault(ids[:-1].tobytes(), len(inputs))
            if r == len(inputs):
                inputs.append(ids[:-1])
                first.append(len(ids) - 1 - n)
            first[r] = min(first[r], len(ids) - 1 - n)
            picked.append((r, ids, n))
        members.append(list(known.values()))

    def shared(group: list[int]) -> int:
        """Tokens before any scored position that all inputs of a group begin with."""
        block = np.stack([inputs[r][: min(first[r] for r in group)] for r in group])
        differs = (block != block[0]).any(0)
        return int(differs.argmax()) if differs.any() else block.shape[1]

    device, width = model.lm_head.weight.device, max(map(len, inputs))
    ids = torch.zeros(len(inputs), width, dtype=torch.int64)  # padded on the right: harmless
    for r, row in enumerate(inputs):
        ids[r, : len(row)] = torch.from_numpy(row)
    ids = ids.to(device)
    question = [q for q, group in enumerate(members) for _ in group]
    cache, fed, source = None, 0, [0] * len(inputs)  # source: an input's row of the cache
    for heads, end, children in (
            ([0], shared(list(range(len(inputs)))), [0] * len(inputs)),
            ([group[0] for group in members], min(map(shared, members)), question)):
        spared = (len(inputs) - len(heads)) * (end - fed)
        if spared > MIN_SPARED * ids.numel():
            cache = (fork(cache, [source[r] for r in heads])
                     or KVCache(model, len(heads), width))
            model.model(ids[heads, fed:end], cache)
            fed, source = end, children
    x = model.model(ids[:, fed:], fork(cache, source))  # (inputs, width - fed, D)
    count = [n for _, _, n in picked]
    row = np.repeat([r for r, _, _ in picked], count)
    position = np.concatenate([np.arange(len(i) - 1 - n, len(i) - 1) - fed
                               for _, i, n in picked])
    target = torch.from_numpy(np.concatenate([i[-n:] for _, i, n in picked])).long()
    weight = model.lm_head.weight.to(x.dtype)
    _, losses = kernels.linear_cross_entropy(x[row, position], weight, target.to(device))
    sums = np.add.reduceat(-losses.cpu().double().numpy(), np.cumsum([0, *count[:-1]]))
    return np.split(sums, np.cumsum([len(rows) for rows in asked])[:-1])


def fork(cache: KVCache | None, rows: list[int]) -> KVCache | None:
    """The cache with these of its rows, repeated as often as they are named."""
    if cache is not None:
        cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]
    return cache


def score(model: LLaMA, asked: list[Question], metric: str, batch: int) -> dict[str, Any]:
    """Each metric of a task with its standard error; `metric`: the one that stands for it."""
    ll = log_likelihoods(model, [q.rows for q in asked], batch)
    result: dict[str, Any] = {"metric": metric, "n": len(asked),
                              "chance": statistics.fmean(q.right.mean() for q in asked)}
    for name in dict.fromkeys(("acc", metric) if metric != "mc2" else ("mc2",)):
        points = np.array([POINTS[name](*pair) for pair in zip(ll, asked)], float)
        deviation = points.std(ddof=1) if len(points) > 1 else 0.0
        result |= {name: points.mean(), f"{name}_se": deviation / math.sqrt(len(points))}
    return result


def losses_of(nats: float, tokens: int, n_bytes: int) -> dict[str, float]:
    return {"loss": nats / tokens, "perplexity": perplexity(nats / tokens),
            "bits_per_byte": nats / math.log(2) / n_bytes}


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # a model gone wrong may be beyond what a float holds


def windows(ids: np.ndarray, window: int, stride: int) -> list[Row]:
    """Rows that score each of ids[1:] once: at the end of the text before it in the window.

    All windows but a text's only one are full; each after the first scores its last `stride`
    ids, so that a token has at least window - stride tokens before it, or all there are.
    """
    ends = [*range(window, len(ids) - 1, stride), len(ids) - 1]
    return [(ids[max(0, end - window) : end + 1], end - before)
            for before, end in zip([0, *ends], ends)]


def measure_text(config: Config, documents: list[str], stride: int, batch: int,
                 model: LLaMA) -> dict[str, float]:
    """Loss, perplexity, bits per byte of documents, each after an end of document."""
    tokenizer = prepare_data.load_tokenizer(config.data_dir)
    rows: list[list[Row]] = []
    for text in documents:
        ids = np.append([tokenizer.eos_id], tokenizer.encode(text)).astype(np.int32)
        rows += [[row] for row in windows(ids, config.seq_len, stride)]
    nats = -sum(float(ll[0]) for ll in log_likelihoods(model, rows, batch))
    tokens = sum(n for [(_, n)] in rows)
    n_bytes = sum(len(text.encode()) for text in documents)
    return losses_of(nats, tokens, n_bytes) | {"tokens": tokens, "bytes": n_bytes}


# ---------------------------------------------------------------------------------------------
# what is measured, and of which checkpoints


class Measure(NamedTuple):
    name: str
    of: Any  # what the result depends on, beside the weights
    run: Callable[[LLaMA], Any]


def measures(config: Config, manifest: dict, flags: dict) -> list[Measure]:
    """Everything to measure of a checkpoint, in pieces small enough to be lost by a kill."""
    batch, data = flags["batch"], train.data_sha256(config.data_dir)
    if path := flags["text"]:
        documents, stride = read_texts(path), flags["stride"] or max(1, config.seq_len // 2)
        of = [train.digest(documents), stride, config.seq_len, data]
        return [Measure(f"text {path}", of, functools.partial(
            measure_text, config, documents, stride, batch))]
    found: list[Measure] = []

    def add(name: str, of: list, metric: str, make: Callable[[], list[Question]]) -> None:
        made = functools.cache(make)  # once for all checkpoints
        found.append(Measure(name, of, lambda model: score(model, made(), metric, batch)))

    if manifest["valid"]:
        limit = flags["rows"] or None
        found.append(Measure("held-out", [data, limit], lambda model: {
            name: v | {"perplexity": perplexity(v["loss"])} for name, v in train.validate(
                model, config.data_dir, limit, config.micro_batch_size).items()}))
    root = Path(config.task_dir)
    folders = {name: root / (task.folder or name) for name, task in TASKS.items()}
    there = [*OWN, *(name for name in TASKS if folders[name].is_dir())]
    for name in config.tasks.split(",") if config.tasks else there:
        if name in OWN:
            make = functools.partial(own_questions, config, manifest, name)
            if make():
                add(name, [data], "acc", make)
            continue
        if name not in TASKS:
            raise SystemExit(f"tasks: there is no {name!r}; there are {', '.join(OWN)},"
                             f" {', '.join(TASKS)}.")
        task, subjects = TASKS[name], {""}
        if name == "mmlu":  # the hub has two folders more, which are no subjects
            subjects = {p.parent.name for p in folders[name].glob("*/test[.-]*")}
            subjects = subjects - {"all", "auxiliary_train"} or {"abstract_algebra"}
        for subject in sorted(subjects):
            folder = folders[name] / subject
            splits = [task.split, task.pool] if task.shots else [task.split]
            files = [file for split in splits for file in find_split(task, folder, split)]
            of = [*map(train.sha256, files), config.seq_len, data]
            add(f"{name}/{subject}".rstrip("/"), of, task.metric, functools.partial(
                questions, config, task, folder, subject.replace("_", " ")))
    if not found:
        raise SystemExit(f"There is nothing to measure: {config.data_dir} has no held-out"
                         f" rows and task_dir ({root}) no benchmarks (README.md: how to get them).")
    return found


def read_texts(path: str) -> list[str]:
    if not Path(path).is_file():
        raise SystemExit(f"--text={path}: there is no such file.")
    documents = list(prepare_data.read_documents(path, "stop", Counter()))
    if not documents:
        raise SystemExit(f"--text={path}: there is no text in it.")
    return documents


def chosen(run_dir: str, which: str) -> list[Path]:
    """The checkpoints `which` names: "all" (one per chunk), "last", "7", "0,4,9", or paths.

    A path may be one of a Hugging Face directory (config.json and weights).
    """
    found = train.checkpoints(run_dir)
    kept = [p for p in found if p.name.startswith("ckpt_")]
    if which == "all":
        paths = kept or found[-1:]
    elif which == "last":
        paths = found[-1:]
    else:
        paths = [Path(run_dir) / f"ckpt_{int(part):03d}" if part.isdecimal() else Path(part)
                 for part in which.split(",")]
    for path in paths:
        if not ((path / "manifest.json").exists() or train.is_hugging_face(path)):
            names = ", ".join(p.name for p in found) or "none"
            raise SystemExit(f"There is no checkpoint {path}; {run_dir} has: {names}.")
    if not paths:
        raise SystemExit(f"{run_dir} has no checkpoint yet: run train.py with this config"
                         " first.")
    return paths


def build(config: Config) -> LLaMA:
    """The model of a config on its device, to read and not to train; weights not yet filled."""
    train.tune_cpu(config.threads)
    if torch.cuda.is_available():  # under torchrun a GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    device, dtype = train.choose_device(config)
    with torch.device("meta"):
        model = LLaMA(config, dtype)
    return model.freeze().allocate(device)


Grid = dict[str, tuple[Path, Measure]]  # what a result is of, as JSON -> checkpoint, measure


def grid(model: LLaMA, paths: list[Path], asked: list[Measure]) -> Grid:
    # A result belongs to weights, data and settings, not to a name that may be trained anew.
    weights = {path: train.identity(path) for path in paths}
    return {json.dumps({"weights": weights[path], "dtype": str(model.dtype)[6:],
                        "measure": m.name, "of": m.of}): (path, m)
            for path in paths for m in asked}


def known(file: Path) -> dict[str, dict[str, Any]]:
    """The results there are, by what they are of."""
    return {json.dumps(r["of"]): r for r in train.read_records(file) if "result" in r}


def measure(file: Path, model: LLaMA, todo: Grid, title: str = "evaluating") -> set[Path]:
    """Append results to a .jsonl file as they come; returns the checkpoints that are damaged."""
    damaged: set[Path] = set()
    manifest, loaded = {}, None
    bar = tqdm(todo.items(), desc=title, disable=None if todo else True)
    for key, (path, m) in bar:
        bar.set_postfix_str(f"{path.name} {m.name}")
        if path != loaded and path not in damaged:
            try:
                manifest, loaded = train.load_weights(model, path), path
            except SystemExit:
                problem = train.problem_of(path, ("model",))
                if not problem:  # a sound checkpoint of another model
                    raise
                tqdm.write(f"Skipping {path}: {problem}.")
                damaged.add(path)
        if path not in damaged:
            train.append_record(file, {
                "checkpoint": path.name, "step": manifest["step"],
                "tokens": manifest["tokens"], "measure": m.name, "result": m.run(model),
                "of": json.loads(key)})
    return damaged


def collect(file: Path, whole: Grid, damaged: set[Path], rank: int) -> list[dict[str, Any]]:
    """The results of a grid, when all processes have measured their share, in the grid's order.

    Only the first process gets them, the others end here. torchrun ends all if one of them fails.
    """
    if rank:
        raise SystemExit(0)
    unverified = {path for path, _ in whole.values()}
    while True:
        done = known(file)
        missing = {path for key, (path, _) in whole.items() if key not in done} - damaged
        if not missing:
            break
        for path in missing & unverified:  # another process is at it, or has skipped it
            damaged |= {path} if train.problem_of(path, ("model",)) else set()
        unverified -= missing
        time.sleep(1)
    results = [done[key] for key, (path, _) in whole.items() if path not in damaged]
    if not results:
        raise SystemExit(f"None of the checkpoints could be measured: {file.parent} has no sound"
                         " one among them.")
    return results


def follow(config: Config, model: LLaMA, asked: list[Measure], end: int,
           flags: dict) -> list[dict[str, Any]]:
    """Measure this process's share, with --watch until step `end`; then give all results."""
    file, world = Path(config.run_dir) / "eval.jsonl", flags["world"]
    damaged, over = set(), False
    while not over:
        found = train.checkpoints(config.run_dir)
        steps = [train.read_json(path / "manifest.json").get("step", 0) for path in found]
        over = not flags["watch"] or max(steps, default=0) >= end
        paths = chosen(config.run_dir, flags["checkpoints"]) if over or found else []
        whole, done = grid(model, paths, asked), known(file)
        # A checkpoint is one process's or, when there are fewer of them, several processes'.
        team = max(1, world // max(1, len(paths)))
        owner = [(i * team + j % team) % world
                 for i in range(len(paths)) for j in range(len(asked))]
        damaged |= measure(file, model, {
            key: cell for (key, cell), rank in zip(whole.items(), owner)
            if rank == flags["rank"] and key not in done and cell[0] not in damaged})
        if not over:
            time.sleep(POLL_SECONDS)
    results = collect(file, whole, damaged, flags["rank"])
    return sorted(results, key=lambda r: r["step"] or math.inf)


# ---------------------------------------------------------------------------------------------
# what is said of it

Curves = dict[str, list[tuple[float, float]]]  # name -> points (tokens or FLOPs, value)


def by_checkpoint(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per checkpoint: `text`, losses by source or file, and `tasks`, scores by name."""
    rows: dict[str, dict[str, Any]] = {}
    for r in results:
        row = rows.setdefault(r["of"]["weights"], {
            "checkpoint": r["checkpoint"], "step": r["step"], "tokens": r["tokens"] or 0,
            "text": {}, "tasks": {}})
        if r["measure"] == "held-out":
            row["text"] |= {f"held-out {name}": v for name, v in r["result"].items()}
        elif r["measure"].startswith("text "):
            row["text"][Path(r["measure"][5:]).name] = r["result"]
        else:
            row["tasks"][r["measure"]] = r["result"]
    for row in rows.values():
        subjects = [row["tasks"].pop(name) for name in list(row["tasks"]) if "mmlu/" in name]
        if subjects:
            row["tasks"] |= pooled(subjects)
    return list(rows.values())


def pooled(subjects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """mmlu: the mean over questions, as the harness; mmlu_macro: over subjects, as Amber."""
    n, acc, se = (np.array([p[key] for p in subjects]) for key in ("n", "acc", "acc_se"))
    variance = ((n - 1) * n * se**2).sum() / max(1, n.sum() - len(n))
    same = {"metric": "acc", "n": int(n.sum()), "chance": 0.25}
    return {"mmlu": same | {"acc": float(acc @ n / n.sum()),
                            "acc_se": float(math.sqrt(variance / n.sum()))},
            "mmlu_macro": same | {"acc": float(acc.mean()),
                                  "acc_se": float(np.linalg.norm(se) / len(n))}}


def value(result: dict[str, Any]) -> float:
    return result["bits_per_byte"] if "bits_per_byte" in result else result[result["metric"]]


def table(rows: list[dict[str, Any]], kind: str) -> str:
    """A row per checkpoint, a column per source or task."""
    names = list(rows[-1][kind])
    heads = [name.removeprefix("held-out ")[:13] for name in names]
    lines = [f"{'checkpoint':>14} {'tokens':>15}" + "".join(f"{head:>14}" for head in heads)]
    for r in rows:
        cells = (f"{value(r[kind][n]):.3f}" if n in r[kind] else "" for n in names)
        lines.append(f"{r['checkpoint'][:14]:>14} {r['tokens']:>15,}"
                     + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def curves(rows: list[dict[str, Any]], kind: str) -> Curves:
    """By source or task, for the checkpoints whose tokens are known."""
    return {name: [(r["tokens"], value(r[kind][name])) for r in rows
                   if r["tokens"] and name in r[kind]] for name in rows[-1][kind]}


def published(path: str, rows: list[dict[str, Any]]) -> Curves:
    """Another run's scores in our tasks, as far as ours goes, of a .csv (tokens, tasks...)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
        entries = list(csv.DictReader(x for x in lines if not x.startswith("#")))
        return {name: points for name in rows[-1]["tasks"] if (points := [
            (float(e["tokens"]), float(e[name])) for e in entries
            if e.get(name) and float(e["tokens"]) <= rows[-1]["tokens"]])}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"published = {path!r} cannot be read: {error!r}.")


def read_steps(run_dir: str) -> list[dict[str, Any]]:
    """The records of the steps a run has made; those it left out have no loss."""
    return [r for r in train.read_records(Path(run_dir) / "metrics.jsonl") if "loss" in r]


def short(x: float) -> str:
    """1.26e12 -> 1.26T"""
    power = max(0, min(4, int(math.log10(max(x, 1)) // 3)))
    return f"{x / 1000**power:.3g}{' kMGT'[power].strip()}" if x < 1e15 else f"{x:.3g}"


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 85 points, means of neighbours."""
    size = -(-len(points) // 85) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*group))) for group in groups]


def plot(title: str, lines: Curves, x_name: str) -> str:
    """Curves of letters on 12 lines of text; later letters lie over earlier ones."""
    lines = {name: finite for name, points in lines.items()
             if (finite := [p for p in points if math.isfinite(p[1])])}
    if not lines:
        return f"{title} (no point to draw)"
    x, y = zip(*(point for points in lines.values() for point in points))
    high, low, end = max(y), min(y), max(x)
    marks, legend = [[" "] * 72 for _ in range(12)], []
    for letter, (name, points) in zip(string.ascii_letters, lines.items()):
        legend.append(f"{letter} {name.removeprefix('held-out ')} {points[-1][1]:.3f}")
        for px, py in points:
            row, column = 11 * (high - py) / (high - low or 1), 71 * px / (end or 1)
            marks[round(row)][round(column)] = letter
    edge = {0: f"{high:.3g}", 11: f"{low:.3g}"}
    body = [f"{edge.get(i, ''):>8} |{''.join(row).rstrip()}" for i, row in enumerate(marks)]
    return "\n".join([title, *body, f"{'':>8} 0{'-' * 70}{short(end)} {x_name}",
                      textwrap.indent(textwrap.fill(", ".join(legend), 78), " " * 10)])


def draw(path: Path, panels: list[tuple[str, str, Curves, Curves]]) -> bool:
    """Panels (title, name of x, curves, published curves) as a picture, given matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = [panel for panel in panels if any(panel[2].values())]
    wide, high = max(1, min(3, len(panels))), -(-len(panels) // 3) or 1
    figure, axes = pyplot.subplots(high, wide, figsize=(5 * wide + 1, 3.8 * high),
                                   layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, x_name, ours, theirs) in zip(axes.flat, panels):
        for i, (name, points) in enumerate(ours.items()):
            axis.plot([x for x, _ in points], [y for _, y in points], f"C{i}",
                      linewidth=1, marker="." if len(points) < 50 else "",
                      label=name.removeprefix("held-out "))
            if name in theirs:
                axis.plot(*zip(*theirs[name]), f"C{i}:", label=f"{name}, published")
        axis.set(title=title, xlabel=x_name)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def report(config: Config, rows: list[dict[str, Any]], theirs: Curves, records: list[dict],
           text: str, file: str) -> str:
    """What a run came to, and what to type next."""
    manifest, last = prepare_data.load_manifest(config.data_dir), rows[-1]
    said = {"run": f"{config.run_dir}, {last['checkpoint']}, step {last['step']},"
                   f" {last['tokens']:,} tokens, {config.n_params:,} parameters",
            "data": f"{config.data_dir}, {len(manifest['chunks'])} chunks"}
    if records:
        said["training"] = (
            f"loss {statistics.fmean(r['loss'] for r in records[-20:]):.3f} (last 20 steps),"
            f" {statistics.median(r['tokens_per_s'] for r in records):,.0f} tokens/s (median)")
    for name, v in last["text"].items():
        said[name] = (f"loss {v['loss']:.3f}, perplexity {v['perplexity']:.2f},"
                      f" {v['bits_per_byte']:.3f} bits per byte")
    for name, v in last["tasks"].items():
        said[name] = (f"{v['metric']} {value(v):.3f} ± {v[v['metric'] + '_se']:.3f}"
                      f" of {v['n']:,} (chance {v['chance']:.3f})")
        if name in theirs:
            x, y = zip(*theirs[name])
            said[name] += f", published at these tokens {np.interp(last['tokens'], x, y):.3f}"
    said["sample"] = repr(text)
    lines = "\n".join(f"{key:>24}: {words}" for key, words in said.items())
    return f"""{lines}
Next:
  python eval.py {file} --prompt="import "       # text from this model
  python prepare_data.py {file} --show_step=100  # the rows step 100 learned from
  make ablation  # three learning rates, two seeds each: what differs, and what is chance"""


def summarize(config: Config, model: LLaMA, rows: list[dict[str, Any]], flags: dict,
              file: str) -> None:
    """Print tables, plots and the report, and draw curves.png."""
    records = read_steps(config.run_dir)
    sources = dict.fromkeys(name for r in records for name in r["loss_by_source"])
    losses = {name: smooth([(r["tokens"], r["loss_by_source"][name]) for r in records
                            if name in r["loss_by_source"]]) for name in sources}
    theirs = published(config.published, rows)
    panels = [("training loss", "tokens", losses, {})]
    for kind, title in (("text", "bits per byte"), ("tasks", "accuracy")):
        if rows[-1][kind]:
            ours, other = curves(rows, kind), theirs if kind == "tasks" else {}
            panels.append((title, "tokens", ours, other))
            beside = {f"{name}, published": points for name, points in other.items()}
            print(f"{title}\n{table(rows, kind)}\n\n{plot(title, ours | beside, 'tokens')}\n")
    train.load_weights(model, chosen(config.run_dir, flags["newest"])[-1])
    text = train.continue_text(config, model, config.sample_prompt, flags["tokens"],
                               flags["temperature"])
    print(report(config, rows, theirs, records, text, file))
    picture = Path(config.run_dir) / "curves.png"
    if draw(picture, panels):
        print(f"Curves: {picture}")
        if len(runs := stages(config.run_dir)) > 1:
            draw(picture.with_name("stages.png"), stage_panels(runs))
            print(f"Stages: {picture.with_name('stages.png')}")


def stages(run_dir: str) -> list[tuple[Path, int]]:
    """A run and those it goes on from, oldest first: (directory, tokens seen before it began).

    As the newest checkpoint of each tells in `started_from`; a chain ends where no run is.
    """
    runs, before = [Path(run_dir)], []
    while found := train.checkpoints(runs[0]):
        origin = train.read_json(found[-1] / "manifest.json").get("started_from", {})
        before.insert(0, origin.get("tokens") or 0)
        if not origin or Path(origin["path"]).parent in runs:
            break
        runs.insert(0, Path(origin["path"]).parent)
    runs = runs[len(runs) - len(before) :]
    return [(run, sum(before[: i + 1])) for i, run in enumerate(runs)]


def stage_panels(runs: list[tuple[Path, int]]) -> list[tuple[str, str, Curves, Curves]]:
    """For `draw`: a panel per source, bits per byte over the tokens of all stages."""
    sources: dict[str, Curves] = {}
    for run, before in runs:
        now = {train.identity(path) for path in train.checkpoints(run)}
        found = [r for r in train.read_records(run / "eval.jsonl") if r["of"]["weights"] in now]
        for row in sorted(by_checkpoint(found), key=lambda row: row["tokens"]):
            for name, result in row["text"].items():
                line = sources.setdefault(name, {}).setdefault(run.name, [])
                line.append((before + row["tokens"], value(result)))
    return [(name.removeprefix("held-out "), "tokens", lines, {})
            for name, lines in sources.items()]


def speak(config: Config, model: LLaMA, flags: dict) -> None:
    """Print a prompt and its continuation, each character as soon as it is whole."""
    tokenizer = prepare_data.load_tokenizer(config.data_dir)
    ids = tokenizer.encode(flags["prompt"]).tolist() or [tokenizer.eos_id]
    said = tokenizer.decode(ids)
    print(said, end="", flush=True)
    for token in model.stream([ids], flags["tokens"], flags["temperature"], top_p=0.95):
        ids = [*ids, int(token[0])]
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # else the next may bring the rest of a character
            print(text[len(said) :], end="", flush=True)
            said = text
    print(tokenizer.decode(ids)[len(said) :])


# ---------------------------------------------------------------------------------------------
# runs against each other


def read_run(path: str) -> dict[str, Any]:
    """Settings, figures and loss curve of a run directory."""
    settings = train.read_json(Path(path) / "config.json")
    records = read_steps(path)
    if not (settings and records):
        raise SystemExit(f"{path} is not the directory of a run: config.json and"
                         " metrics.jsonl, which train.py writes, are not there.")
    config = Config(**{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    flops, tokens = config.flops_per_token(config.seq_len), records[-1]["tokens"]
    valid = next((r["valid"] for r in reversed(records) if "valid" in r), {})
    scores = {"training loss": statistics.fmean(r["loss"] for r in records[-20:])}
    if valid:
        scores["held-out loss"] = statistics.fmean(v["loss"] for v in valid.values())
        scores["bits per byte"] = statistics.fmean(v["bits_per_byte"] for v in valid.values())
    shown = {"parameters": short(config.n_params), "tokens": short(tokens),
             "FLOPs": f"{flops * tokens:.3g}",
             "tokens/s": f"{statistics.median(r['tokens_per_s'] for r in records):,.0f}",
             **{name: f"{x:.3f}" for name, x in scores.items()},
             **{f"  {name}": f"{v['bits_per_byte']:.3f}" for name, v in valid.items()}}
    curve = smooth([(r["tokens"], r["loss"]) for r in records])
    return {"settings": settings, "scores": scores, "shown": shown, "flops": flops,
            "curve": curve[len(curve) // 10 :]}  # what falls most says least


def compare(paths: list[str]) -> None:
    """One table and one picture of runs; and where only the seed differs, the spread."""
    if len(paths) < 2:
        raise SystemExit("--compare takes two or more run directories:"
                         " python eval.py --compare runs/a runs/b")
    top = os.path.commonpath([Path(path).resolve().parent for path in paths])
    runs = {os.path.relpath(path, top): read_run(path) for path in paths}
    every = [run["settings"] for run in runs.values()]
    keys = [key for key in every[0] if key not in ("name", "run_dir", "data_dir", "resume")
            and any(s.get(key) != every[0][key] for s in every)]
    names = dict.fromkeys(name for run in runs.values() for name in run["shown"])
    print(columns([["", *runs], *([key, *(str(s.get(key)) for s in every)] for key in keys),
                   *([name, *(run["shown"].get(name, "") for run in runs.values())]
                     for name in names)]))
    groups: dict[str, list[dict[str, float]]] = {}
    for run in runs.values():
        label = ", ".join(f"{key} {run['settings'].get(key)}" for key in keys if key != "seed")
        groups.setdefault(label or "all", []).append(run["scores"])
    if len(groups) < len(runs):
        scores = list(next(iter(runs.values()))["scores"])
        print("\nmean ± standard deviation over seeds")
        print(columns([["", "runs", *scores], *(
            [label, str(len(group)), *(spread([s[name] for s in group if name in s])
                                       for name in scores)]
            for label, group in groups.items())]))
    losses = {name: run["curve"] for name, run in runs.items()}
    costs = {name: [(x * run["flops"], y) for x, y in run["curve"]]
             for name, run in runs.items()}
    panels = [("training loss", "tokens", losses, {}), ("training loss", "FLOPs", costs, {})]
    for title, x_name, lines, _ in panels:
        print(f"\n{plot(title, lines, x_name)}")
    if draw(Path(top) / "compare.png", panels):
        print(f"Picture: {Path(top) / 'compare.png'}")


def columns(rows: list[list[str]]) -> str:
    """Rows of words under each other, each column as wide as its longest."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in rows)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}" if values else ""


def main(argv: list[str]) -> None:
    if "--compare" in argv:
        return compare([argument for argument in argv if argument != "--compare"])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    config, flags = load(argv, checkpoints="all", watch=False, text="", stride=0, rows=1000,
                         batch=32, prompt="", tokens=64, temperature=0.8)
    newest = "last" if flags["checkpoints"] == "all" else flags["checkpoints"]
    flags |= {"rank": rank, "world": world, "newest": newest}
    if min(flags[key] for key in ("stride", "rows", "tokens")) < 0 or flags["batch"] < 1:
        raise SystemExit("--stride, --rows and --tokens must be 0 or more, --batch 1 or more.")
    if flags["stride"] > config.seq_len:
        raise SystemExit(f"--stride={flags['stride']} is more than the window,"
                         f" {config.seq_len} tokens (seq_len): some would be left out.")
    train.choose_kernels(config.kernels)
    manifest = prepare_data.load_manifest(config.data_dir)
    n_vocab, end = manifest["tokenizer"]["n_vocab"], config.max_steps
    if n_vocab > config.vocab_size:
        raise SystemExit(f"The tokenizer of {config.data_dir} has {n_vocab} token ids, the"
                         f" model of this config {config.vocab_size} (vocab_size).")
    model = build(config)
    if flags["prompt"]:
        train.load_weights(model, chosen(config.run_dir, newest)[-1])
        return speak(config, model, flags)
    for path in sorted(Path(config.run_dir).glob("ckpt_*")) if not rank else []:
        if not (path / "manifest.json").exists():
            print(f"Skipping {path}: it is half-written (no manifest.json yet).")
    total = prepare_data.total_steps(manifest, config.global_batch_size)
    try:
        results = follow(config, model, measures(config, manifest, flags),
                         min(total, end or total), flags)
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped. What was measured is in {config.run_dir}/eval.jsonl; the"
                         " same command goes on from there.")
    file = next(argument for argument in argv if not argument.startswith("-"))
    summarize(config, model, by_checkpoint(results), flags, file)


if __name__ == "__main__":
    main(sys.argv[1:])
