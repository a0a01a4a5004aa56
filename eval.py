"""Measure checkpoints: bits per byte, perplexity, multiple-choice tasks; continue a prompt.

    python eval.py configs/amber_tiny.py                       # all that is not measured yet
    python eval.py configs/amber_tiny.py --checkpoints=last    # or =7, =0,4,9, or a path
    python eval.py configs/amber_tiny.py --watch               # follow a run that is going on
    python eval.py configs/amber_tiny.py --text=model.py       # perplexity of any text
    python eval.py configs/amber_tiny.py --prompt="def main("  # text from the newest checkpoint
    torchrun --nproc_per_node=8 eval.py configs/amber_7b.py    # the work is shared

Every result is a line of runs/NAME/eval.jsonl, written as soon as it is measured, and not measured
again. Prompts, few-shot examples, token ids and scores of the benchmarks are those of EleutherAI's
lm-evaluation-harness 0.4.13; docs/evaluation.md says where their files come from.
"""

import csv
import functools
import hashlib
import json
import math
import os
import re
import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import kernels
from checkpoint import Evaluation
from configs import Config, UserError, load, read_regular, run_command
from data import Data, load_data, sha256_file, sha256_json
from model import KVCache, LLaMA, build_for_inference, choose_kernels, continue_text
from parallel import all_gather_object
from tokenizer import Tokenizer, open_tokenizer, replace_invalid_utf8

POLL_SECONDS = 10.0  # --watch: between two looks at the run
MIN_SHARED = 0.1  # of a batch's tokens: a prefix that spares less is not computed apart


@dataclass
class Flags:
    """What eval.py takes beside the settings."""

    checkpoints: str = "all"  # "last", "7", "0,4,9" or paths; "all" = one per chunk
    watch: bool = False  # measure the checkpoints of a run that is going on, until it ends
    text: str = ""  # a file or folder: its perplexity, and nothing else
    stride: int = 0  # tokens scored per window of --text; 0 = half a window
    sequences: int = 1000  # validation sequences of each source; 0 = all
    batch: int = 32  # sequences in memory at a time
    prompt: str = ""  # continue this text, and nothing else
    tokens: int = 64  # of a continuation
    temperature: float = 0.8  # of a continuation; 0 = the likeliest token


@torch.no_grad()
def validate(model: LLaMA, data: Data, limit: int | None, batch: int,
             rank: int = 0, world: int = 1) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte of the first `limit` validation sequences of each
    source (None = all), any `batch` at a time. With world > 1 every process must call this."""
    # Nothing here draws a random number or moves the data order: training goes on as without it.
    token_bytes = data.tokenizer.token_bytes  # (V,)
    device = model.lm_head.weight.device
    results = {}
    for source in data.validation_sources:
        sequences = data.validation(source)["token_ids"][:limit]
        sums = []  # of each batch: nats, tokens, bytes
        for start in range(0, len(sequences), batch * world):
            mine = sequences[start + batch * rank :][:batch]
            # A process without sequences of its own computes too, on one that does not count,
            # because FSDP gathers the weights from all processes.
            ids = mine if len(mine) else sequences[:1]
            ids = torch.from_numpy(ids.astype(np.int64)).to(device)  # (B, T + 1)
            _, token_losses = model(ids[:, :-1], ids[:, 1:])  # (B, T)
            nats, targets = token_losses[: len(mine)].double().sum(), mine[:, 1:]
            sums.append([float(nats), targets.size, float(token_bytes[targets].sum())])
        everyones = all_gather_object(sums) if world > 1 else [sums]
        # fsum rounds once, at its end: the order of the batches and processes does not matter.
        nats, tokens, n_bytes = (math.fsum(column) for column in zip(*sum(everyones, [])))
        results[source] = text_figures(nats, tokens, n_bytes)
    return results


def text_figures(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """Nats per token, and bits per byte, which can be compared between tokenizers."""
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes}


# ---------------------------------------------------------------------------------------------
# questions: what the files of benchmarks hold, and how it is asked


class Task(NamedTuple):
    metric: str  # the one that is reported: "acc", "acc_norm" (per character) or "mc2"
    num_fewshot: int  # solved examples before a question
    fewshot_split: str  # where these come from
    split: str  # the split whose questions are asked
    hub: str  # where its files are, on huggingface.co/datasets
    folder: str = ""  # under task_dir; "" = the task's name


TRUTHFULQA = ("", "validation", "truthfulqa/truthful_qa, folder multiple_choice", "truthfulqa")
TASKS = {
    # These two are made here, of validation sequences: see synthetic_questions.
    "continuation": Task("acc", 0, "", "", ""),
    "recall": Task("acc", 0, "", "", ""),
    # The files of these must be downloaded. Shots are those of LLM360's evaluation of Amber.
    "arc_challenge": Task("acc_norm", 25, "train", "test", "allenai/ai2_arc, folder ARC-Challenge"),
    "hellaswag": Task("acc_norm", 10, "train", "validation", "Rowan/hellaswag"),
    "mmlu": Task("acc", 5, "dev", "test", "cais/mmlu, a folder per subject"),
    "truthfulqa_mc1": Task("acc", 0, *TRUTHFULQA),
    "truthfulqa_mc2": Task("mc2", 0, *TRUTHFULQA),
    "piqa": Task("acc_norm", 0, "", "validation", "baber/piqa"),
    "winogrande": Task("acc", 0, "", "validation", "allenai/winogrande, folder winogrande_xl"),
    "boolq": Task("acc", 0, "", "validation", "aps/super_glue, folder boolq"),
    "openbookqa": Task("acc_norm", 0, "", "test", "allenai/openbookqa, folder main"),
}
MMLU_HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
TRUTHFULQA_PROMPT = """\
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
A: The 1992 Olympics were held in Barcelona, Spain."""  # Lin et al. 2021


def format_doc(task: str, doc: dict) -> tuple[list[str], list[str], np.ndarray]:
    """(a context per choice, the choices, 1 for those that are right) of an entry of a data set."""
    if task == "arc_challenge":
        # The answer is a label, one of A to E or of 1 to 5.
        context, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"]
        gold = doc["choices"]["label"].index(doc["answerKey"])
    elif task == "hellaswag":
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        # Many of these texts are of WikiHow, whose pages left marks in them.
        texts = [text.strip().replace(" [title]", ". ") for text in (context, *doc["endings"])]
        texts = [re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in texts]
        context, *choices = texts
        gold = int(doc["label"])
    elif task == "mmlu":
        # The four choices are listed in the question, and only their letters are scored.
        listed = [f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"])]
        context = "\n".join([doc["question"].strip(), *listed, "Answer:"])
        choices, gold = list("ABCD"), doc["answer"]
    elif task in ("truthfulqa_mc1", "truthfulqa_mc2"):
        # mc1 has one right choice, mc2 several.
        context = f"{TRUTHFULQA_PROMPT}\n\nQ: {doc['question']}\nA:"
        targets = doc[task.removeprefix("truthfulqa_") + "_targets"]
        choices, gold = targets["choices"], targets["labels"]
    elif task == "piqa":
        context = f"Question: {doc['goal']}\nAnswer:"
        choices, gold = [doc["sol1"], doc["sol2"]], doc["label"]
    elif task == "winogrande":
        # Either name is put into the gap, and the rest of the sentence is scored after it.
        before, _, after = doc["sentence"].partition("_")
        context = [before + doc["option1"], before + doc["option2"]]
        choices, gold = [after.strip()] * 2, int(doc["answer"]) - 1
    elif task == "boolq":
        context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
        choices, gold = ["no", "yes"], doc["label"]
    else:  # openbookqa
        context, choices = doc["question_stem"], doc["choices"]["text"]
        gold = doc["choices"]["label"].index(doc["answerKey"].lstrip())
    contexts = [context] * len(choices) if isinstance(context, str) else context
    if isinstance(gold, int):
        gold = [i == gold for i in range(len(choices))]
    return contexts, choices, np.array(gold, int)


def find_files(config: Config, name: str, split: str) -> list[Path]:
    """SPLIT.jsonl or SPLIT-*.parquet of a benchmark, none for ""; UserError if they are missing."""
    task, _, subject = name.partition("/")
    folder = Path(config.task_dir, TASKS[task].folder or task, subject)
    files = [p for p in folder.glob(f"{split}[.-]*") if p.suffix in (".jsonl", ".parquet")]
    if split and not files:
        raise UserError(f"{folder} has no {split}.jsonl and no {split}*.parquet: it is the split"
                        f" {split!r} of huggingface.co/datasets/{TASKS[task].hub}.")
    return sorted(files) if split else []


def read_docs(files: list[Path]) -> list[dict]:
    """The entries of .jsonl and .parquet files; UserError if one cannot be read."""
    docs: list[dict] = []
    for file in files:
        try:
            if file.suffix == ".parquet":
                from pyarrow import parquet
                docs += parquet.ParquetFile(file).read().to_pylist()
            else:
                # Not splitlines: a JSON string may hold U+2028, which that takes for a line's end.
                lines = read_regular(file).decode().split("\n")
                docs += [json.loads(line) for line in lines if line.strip()]
        except Exception as error:  # pyarrow has many kinds of its own
            raise UserError(f"{file} cannot be read ({error}). Is the download whole? .parquet also"
                            " needs pyarrow: pip install pyarrow.")
    return docs


class Request(NamedTuple):
    ids: np.ndarray  # (length,) token ids; the model reads all but the last
    n: int  # of them, the last n are scored, each given all those before it


class Question(NamedTuple):
    requests: list[Request]  # one per choice
    lengths: np.ndarray  # of the choices, in characters
    gold: np.ndarray  # 1 where a choice is right, else 0


def build_questions(config: Config, data: Data, name: str) -> list[Question]:
    """The questions of a task, or of a subject of MMLU, ready to be scored."""
    task_name, _, subject = name.partition("/")
    task = TASKS[task_name]
    if not task.hub:
        return synthetic_questions(data, name)
    docs = read_docs(find_files(config, name, task.split))
    pool = read_docs(find_files(config, name, task.fewshot_split))
    # From a training split draw_examples draws one more than it needs.
    if not docs or len(pool) < task.num_fewshot + (task.fewshot_split == "train"):
        raise UserError(f"{name} has {len(docs)} questions, and {len(pool)} entries to draw"
                        f" {task.num_fewshot} examples from: too few. Is the download whole?")
    header = MMLU_HEADER.format(subject.replace("_", " ")) if subject else ""
    random = Random(1234)  # the harness's seed, and one stream for all questions
    solved: list[str] = []  # the pool's questions, each with its right answer
    questions: list[Question] = []
    try:
        for doc in pool:
            contexts, choices, gold = format_doc(task_name, doc)
            solved.append(f"{contexts[gold.argmax()]} {choices[gold.argmax()]}\n\n")
        for doc in docs:
            prompt = header + "".join(solved[i] for i in draw_examples(task, pool, doc, random))
            contexts, choices, gold = format_doc(task_name, doc)
            requests = [encode_request(data.tokenizer, prompt + context, choice, config.seq_len)
                        for context, choice in zip(contexts, choices)]
            questions.append(Question(requests, np.array([len(c) for c in choices]), gold))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{name}, after {len(questions)} questions: an entry is not in the form of"
                        f" huggingface.co/datasets/{task.hub} ({error!r}).")
    return questions


def draw_examples(task: Task, pool: list[dict], doc: dict, random: Random) -> list[int]:
    """Which entries of the pool stand before a question, drawn as the harness draws them."""
    n, everything = task.num_fewshot, range(len(pool))
    if n == 0 or task.fewshot_split == "dev":
        # MMLU puts the same five before all questions of a subject.
        return list(range(n))
    if task.split == "test":
        return random.sample(everything, n)
    # Where there is no test split (HellaSwag), the harness draws one example more, and leaves out
    # those that are the question itself.
    drawn = [i for i in random.sample(everything, n + 1) if pool[i] != doc]
    if len(drawn) < n:
        return random.sample([i for i in everything if pool[i] != doc], n)
    return drawn[:n]


def encode_request(tokenizer: Tokenizer, context: str, choice: str, window: int) -> Request:
    """Context and choice tokenized as one text, of which the ids the context has not are scored."""
    # As in the harness, spaces at the end of the context count with the choice, and what exceeds
    # the window is cut off on the left.
    n_context = len(tokenizer.encode(context.rstrip()))
    ids = tokenizer.encode(f"{context} {choice}")
    n = max(1, len(ids) - n_context)
    if n_context == 0:
        # The first id needs something to be predicted from: a document's end.
        ids = np.append([tokenizer.eos_id], ids)
    return Request(ids[-window - 1 :].astype(np.int32), min(n, window))


def synthetic_questions(data: Data, name: str) -> list[Question]:
    """Questions of four choices, made of the first 64 validation sequences of each source."""
    # With n tokens as the unit, 16 or less, so that 5 n ids fit in a sequence:
    n = 4 * min(4, (data.seq_len + 1) // 20)
    questions: list[Question] = []
    for source in data.validation_sources if n else []:
        sequences = data.validation(source)["token_ids"][:64, : 4 * n].astype(np.int32)
        if len(sequences) < 4:
            continue  # three others are needed for wrong choices
        for i, ids in enumerate(sequences):
            if name == "continuation":
                # Which n tokens follow these 3 n, the sequence's own or another's? This asks what a
                # text is about.
                context = ids[: 3 * n]
                choices = [sequences[i - k, 3 * n :] for k in range(4)]
            else:  # recall
                # After 4 n tokens the first n / 2 come once more: which n / 2 followed them? All
                # choices are of this text, so the model must look back, which models learn later
                # (induction heads, Olsson et al. 2022).
                context = np.append(ids, ids[: n // 2])
                choices = [ids[k * n + n // 2 : (k + 1) * n] for k in range(4)]
            # The right choice, until here the first, moves to i % 4: no place is favoured.
            choices = np.roll(choices, i, axis=0)
            gold = (np.arange(4) == i % 4).astype(int)
            requests = [Request(np.append(context, choice), len(choice)) for choice in choices]
            questions.append(Question(requests, np.ones(4), gold))
    return questions


def windows(ids: np.ndarray, window: int, stride: int) -> list[Request]:
    """Requests that score each of ids[1:] once, `stride` of them in each window but the first."""
    # They stand at the window's end: a token has at least window - stride tokens before it, or all
    # there are.
    requests: list[Request] = []
    scored = 0
    for end in [*range(window, len(ids) - 1, stride), len(ids) - 1]:
        requests.append(Request(ids[max(0, end - window) : end + 1], end - scored))
        scored = end
    return requests


# ---------------------------------------------------------------------------------------------
# scoring: the log-likelihood of every choice, and all that is measured with it


def log_likelihoods(model: LLaMA, questions: list[list[Request]], batch: int) -> list[np.ndarray]:
    """log p of the last n ids of each request given those before them, one array per question.
    batch: rows of a forward pass, at most; the choices of a question stay together."""
    # Like lengths go together, which spares padding; the longest first, so that a lack of memory
    # shows at once.
    order = sorted(range(len(questions)), key=lambda i: -max(len(r.ids) for r in questions[i]))
    batches: list[list[int]] = [[]]
    rows = 0
    for i in order:
        n = len({request.ids[:-1].tobytes() for request in questions[i]})  # as in score_batch
        if batches[-1] and rows + n > batch:
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += n
    found: dict[int, np.ndarray] = {}
    hide = None if len(batches) > 9 else True  # a bar only where it takes a while
    for numbers in tqdm(batches, unit="batch", leave=False, disable=hide):
        found |= zip(numbers, score_batch(model, [questions[i] for i in numbers]))
    return [found[i] for i in range(len(questions))]


@torch.no_grad()
def score_batch(model: LLaMA, questions: list[list[Request]]) -> list[np.ndarray]:
    """`log_likelihoods` of a few questions, in one forward pass."""
    requests = [request for question in questions for request in question]
    sizes = [len(question) for question in questions]
    # Padded on the right, with anything: no position that counts attends to what follows it.
    ids = torch.zeros(len(requests), max(len(r.ids) for r in requests) - 1, dtype=torch.int64)
    for row, request in zip(ids, requests):
        row[: len(request.ids) - 1] = torch.from_numpy(request.ids[:-1])
    # Requests that read the same ids share a row (MMLU: four choices of one token, one row).
    ids, row_of = torch.unique(ids, dim=0, return_inverse=True)  # (rows, width), (requests,)
    question_of = torch.empty(len(ids), dtype=torch.int64)
    question_of[row_of] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    # Position i predicts id i + 1. What comes before all scored positions may be computed once.
    starts = [len(request.ids) - 1 - request.n for request in requests]
    ids = ids.to(model.lm_head.weight.device)
    cache, known = compute_shared_prefix(model, ids, question_of.tolist(), min(starts))
    hidden = model.model(ids[:, known:], cache)  # (rows, width - known, D)
    # Logits are large, and only the scored positions need them: their states are lined up.
    states: list[Tensor] = []
    targets: list[Tensor] = []
    for row, start, request in zip(row_of.tolist(), starts, requests):
        states.append(hidden[row, start - known : start - known + request.n])  # (n, D)
        targets.append(torch.from_numpy(request.ids[-request.n :]))
    x = torch.cat(states) * (model.config.logit_scale * model.config.width_scale)
    weight = model.lm_head.weight.to(x.dtype)
    _, losses = kernels.linear_cross_entropy(x, weight, torch.cat(targets).to(ids))
    parts = losses.double().cpu().split([request.n for request in requests])
    values = np.array([-float(part.sum()) for part in parts])  # one per request
    return np.split(values, np.cumsum(sizes)[:-1])


def compute_shared_prefix(model: LLaMA, ids: Tensor, question_of: list[int],
                          end: int) -> tuple[KVCache | None, int]:
    """Run what rows of `ids` begin with, before `end`, once: (keys and values per row, length)."""
    # Either all rows begin alike (MMLU: its five examples), or the choices of each question do (ARC
    # and HellaSwag: examples of its own, and the question). One level is enough: no task has much
    # of both. For each row, the row that computes its prefix:
    whole = [0] * len(ids)
    by_question = [question_of.index(question) for question in question_of]
    best, length, leaders = MIN_SHARED * ids.numel(), 0, None
    for candidate in (whole, by_question):
        same = (ids[:, :end] == ids[candidate, :end]).all(dim=0)  # (end,)
        shared = int(same.int().cumprod(0).sum())  # positions before the first that differs
        spared = (len(ids) - len(set(candidate))) * shared
        if spared > best:
            best, length, leaders = spared, shared, candidate
    if leaders is None:
        return None, 0
    computed, copy_of = np.unique(leaders, return_inverse=True)
    cache = KVCache(model, len(computed), ids.shape[1])
    model.model(ids[computed, :length], cache)
    cache.k, cache.v = cache.k[:, copy_of], cache.v[:, copy_of]  # one for each row again
    return cache, length


def score_questions(model: LLaMA, questions: list[Question], metric: str,
                    batch: int) -> dict[str, Any]:
    """A task's metrics with their standard errors; `metric` is the one that is reported."""
    points: dict[str, list[float]] = {"acc": [], "acc_norm": [], "mc2": []}
    log_p = log_likelihoods(model, [question.requests for question in questions], batch)
    for values, question in zip(log_p, questions):
        points["acc"].append(question.gold[values.argmax()])
        # Per character, or short choices would have an advantage.
        points["acc_norm"].append(question.gold[(values / question.lengths).argmax()])
        # Of the probability of all choices, the share of those that are true.
        points["mc2"].append(question.gold @ np.exp(values - np.logaddexp.reduce(values)))
    chance = statistics.fmean(question.gold.mean() for question in questions)
    result: dict[str, Any] = {"metric": metric, "n": len(questions), "chance": chance}
    for name in ("acc", "acc_norm") if metric == "acc_norm" else (metric,):
        # The questions are a sample of those that could be asked: n - 1, as in the harness.
        deviation = np.std(points[name], ddof=1) if len(questions) > 1 else 0.0
        result[name] = float(np.mean(points[name]))
        result[f"{name}_se"] = float(deviation) / math.sqrt(len(questions))
    return result


def measure_text(model: LLaMA, tokenizer: Tokenizer, documents: list[str], stride: int,
                 window: int, batch: int) -> dict[str, float]:
    """Loss and bits per byte of documents, each read after an end of document."""
    questions: list[list[Request]] = []
    for text in documents:
        ids = np.append([tokenizer.eos_id], tokenizer.encode(text)).astype(np.int32)
        questions += [[request] for request in windows(ids, window, stride)]
    nats = -sum(float(values[0]) for values in log_likelihoods(model, questions, batch))
    tokens = sum(request.n for [request] in questions)
    n_bytes = sum(len(text.encode()) for text in documents)
    return text_figures(nats, tokens, n_bytes) | {"tokens": tokens, "bytes": n_bytes}


def text_evaluation(config: Config, tokenizer: Tokenizer, flags: Flags) -> Evaluation:
    """Of --text. Its second entry is what the result depends on beside the weights: when that has
    changed, it is measured again."""
    window, documents = config.seq_len, read_texts(flags.text)
    stride = flags.stride or max(1, window // 2)
    inputs = [sha256_json(documents), stride, window, hashlib.sha256(tokenizer.data).hexdigest()]
    return Evaluation(f"text {flags.text}", inputs, lambda model: measure_text(
        model, tokenizer, documents, stride, window, flags.batch))


def list_evaluations(config: Config, data: Data, flags: Flags) -> list[Evaluation]:
    """All that is measured of a checkpoint, in pieces small enough to be lost by a kill."""
    batch, window = flags.batch, config.seq_len
    evaluations: list[Evaluation] = []
    if data.validation_sources:
        limit = flags.sequences or None
        evaluations.append(Evaluation("validation", [data.sha256, limit], lambda model: validate(
            model, data, limit, config.micro_batch_size)))
    # To tokenize the questions of all benchmarks takes minutes: it is done when the first
    # checkpoint needs them, and once for all checkpoints.
    questions = functools.cache(lambda name: build_questions(config, data, name))
    for name in task_names(config):
        task = TASKS[name.split("/")[0]]
        files = find_files(config, name, task.split) + find_files(config, name, task.fewshot_split)
        inputs = [*(sha256_file(file) for file in files), window, data.sha256]
        # Of very few or short validation sequences no questions can be made.
        if files or questions(name):
            evaluations.append(Evaluation(name, inputs, lambda model, name=name, task=task: (
                score_questions(model, questions(name), task.metric, batch))))
    if not evaluations:
        raise UserError(f"There is nothing to measure: {config.data_dir} has no validation"
                        f" sequences and task_dir ({config.task_dir}) no benchmarks"
                        " (docs/evaluation.md says where to get them).")
    return evaluations


def read_texts(path: str) -> list[str]:
    """The documents of a text file, or those in a .jsonl or .parquet file (`text`, `content`)."""
    if path.endswith((".jsonl", ".parquet")):
        texts = [doc.get("text", doc.get("content")) for doc in read_docs([Path(path)])]
    else:
        # Invalid bytes become lone surrogates, which replace_invalid_utf8 knows.
        texts = [read_regular(path).decode("utf-8", "surrogateescape")]
    if not any(texts) or any(not isinstance(text, str) or "\0" in text for text in texts):
        raise UserError(f"--text={path}: there is no text in it, or not only text.")
    return [replace_invalid_utf8(text.removeprefix("\ufeff")) for text in texts if text]


def task_names(config: Config) -> list[str]:
    """The tasks that the setting `tasks` names, or all that can be asked; MMLU as its subjects."""
    root, names = Path(config.task_dir), config.tasks.split(",")
    if not config.tasks:
        names = [name for name, task in TASKS.items()
                 if not task.hub or (root / (task.folder or name)).is_dir()]
    for name in names:
        if name not in TASKS:
            raise UserError(f"tasks: there is no {name!r}; there are {', '.join(TASKS)}.")
    if "mmlu" in names:
        # A subject is a result of its own, since MMLU is large. The hub has two folders more.
        subjects = {path.parent.name for path in root.glob("mmlu/*/test[.-]*")}
        subjects -= {"all", "auxiliary_train"}
        # Where there is none, one is named all the same, so that find_files says what is missing.
        names = [name for name in names if name != "mmlu"]
        names += [f"mmlu/{subject}" for subject in sorted(subjects) or ["abstract_algebra"]]
    return names


# ---------------------------------------------------------------------------------------------
# what is printed


def by_checkpoint(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An entry per checkpoint, in order of steps: its losses (`text`) and its scores (`tasks`)."""
    # By weights and not by name: two directories may have one name.
    entries: dict[str, dict[str, Any]] = {}
    for r in sorted(results, key=lambda r: r["step"] or math.inf):
        entry = entries.setdefault(r["of"]["weights"], {
            "checkpoint": r["checkpoint"], "step": r["step"], "tokens": r["tokens"] or 0,
            "text": {}, "tasks": {}})
        if r["evaluation"] == "validation":
            entry["text"] |= {f"validation {source}": r["result"][source] for source in r["result"]}
        elif r["evaluation"].startswith("text "):
            entry["text"][Path(r["evaluation"].removeprefix("text ")).name] = r["result"]
        else:
            entry["tasks"][r["evaluation"]] = r["result"]
    for entry in entries.values():
        names = [name for name in entry["tasks"] if name.startswith("mmlu/")]
        if names:
            entry["tasks"] |= aggregate_subjects([entry["tasks"].pop(name) for name in names])
    return list(entries.values())


def aggregate_subjects(subjects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """mmlu: the mean over questions, as the harness; mmlu_macro: over subjects, as Amber."""
    n, acc, se = (np.array([r[key] for r in subjects]) for key in ("n", "acc", "acc_se"))
    # Variances are pooled as in the harness: (n - 1) n se^2 is a subject's sum of squares.
    variance = ((n - 1) * n * se**2).sum() / max(1, n.sum() - len(n))
    mean = {"metric": "acc", "n": int(n.sum()), "chance": 0.25, "acc": float(acc @ n / n.sum()),
            "acc_se": math.sqrt(variance / n.sum())}
    macro = {"acc": float(acc.mean()), "acc_se": float(np.linalg.norm(se) / len(n))}
    return {"mmlu": mean, "mmlu_macro": mean | macro}


def value(result: dict[str, Any]) -> float:
    """The figure that stands for a result: bits per byte of a text, the metric of a task."""
    return result["bits_per_byte"] if "bits_per_byte" in result else result[result["metric"]]


def table(entries: list[dict[str, Any]], kind: str) -> str:
    """A line per checkpoint, a column per source (kind "text") or task (kind "tasks")."""
    names = list(entries[-1][kind])
    heads = [name.removeprefix("validation ")[:13] for name in names]
    lines = [f"{'checkpoint':>14} {'tokens':>15}" + "".join(f"{head:>14}" for head in heads)]
    for entry in entries:
        line = f"{entry['checkpoint'][:14]:>14} {entry['tokens']:>15,}"
        for name in names:
            line += f"{value(entry[kind][name]):14.3f}" if name in entry[kind] else " " * 14
        lines.append(line)
    return "\n".join(lines)


def published_scores(path: str, entries: list[dict[str, Any]]) -> dict[str, list]:
    """Another run's scores in our tasks, as far as ours goes: {name: [(tokens, score), ...]}."""
    scores: dict[str, list] = {}
    try:
        # A .csv with the columns `tokens` and one per task; a score may be missing.
        lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
        for line in csv.DictReader(line for line in lines if not line.startswith("#")):
            for name in entries[-1]["tasks"]:
                if line.get(name) and float(line["tokens"]) <= entries[-1]["tokens"]:
                    scores.setdefault(name, []).append((float(line["tokens"]), float(line[name])))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"published = {path!r} cannot be read: {error!r}.")
    return scores


def report(model: LLaMA, entries: list[dict[str, Any]], sample: str, argv: list[str]) -> str:
    """What a run came to, and what to type next."""
    config, last, lines = model.config, entries[-1], []
    # Published weights say neither at which step nor on how many tokens.
    at = "" if last["step"] is None else f", step {last['step']}, {last['tokens']:,} tokens"
    lines.append(("checkpoint", f"{last['checkpoint']}{at}, {model.n_params:,} parameters"))
    steps = [r for r in checkpoint.read_metrics(config.run_dir).values() if "loss" in r]
    losses = [step["loss"] for step in steps]
    if losses and at:
        speed = statistics.median(step["tokens_per_s"] for step in steps)
        lines.append(("training", f"loss {statistics.fmean(losses[-20:]):.3f} (last 20 steps),"
                                  f" {speed:,.0f} tokens/s (median)"))
    for name, r in last["text"].items():
        perplexity = math.exp(min(r["loss"], 700.0))  # beyond that no float can hold it
        lines.append((name, f"loss {r['loss']:.3f}, perplexity {perplexity:.2f},"
                            f" {r['bits_per_byte']:.3f} bits per byte"))
    published = published_scores(config.published, entries)
    for name, r in last["tasks"].items():
        text = (f"{r['metric']} {value(r):.3f} ± {r[r['metric'] + '_se']:.3f} of {r['n']:,}"
                f" (chance {r['chance']:.3f})")
        if name in published:
            theirs = np.interp(last["tokens"], *zip(*published[name]))
            text += f", published at these tokens {theirs:.3f}"
        lines.append((name, text))
    lines.append(("sample", repr(sample)))
    # The same words again, so that what is typed next is about the same weights.
    again = shlex.join(["python", "eval.py", *argv])
    next_lines = [f'{again} --prompt="import "  # text from this model']
    if losses and at:
        next_lines += [
            f"python lookup.py {config.run_dir} --step=100  # the sequences step 100 learned from",
            f"python tools/report.py {config.run_dir}  # all of it on one page, with pictures",
            "make ablation  # three learning rates, two seeds each: what is more than chance"]
    return "\n".join([*(f"{name:>24}: {text}" for name, text in lines),
                      "Next:", *(f"  {line}" for line in next_lines)])


def stream_completion(model: LLaMA, tokenizer: Tokenizer, prompt: str, n: int,
                      temperature: float) -> None:
    """Print a prompt and n tokens after it, each character as soon as it is whole."""
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos_id]
    printed = tokenizer.decode(ids)
    print(printed, end="", flush=True)
    for token in model.stream([ids], n, temperature, top_p=0.95):
        ids = [*ids, int(token[0])]
        text = tokenizer.decode(ids)
        # U+FFFD at the end is half a character, whose other half the next token may bring.
        if not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(tokenizer.decode(ids)[len(printed) :])


def run_has_ended(config: Config) -> bool:
    """Whether the checkpoint of a run's last step is there."""
    data = load_data(config.data_dir)
    steps = sum(visit.steps for visit in data.schedule(config))
    found = checkpoint.list_checkpoints(config.run_dir)
    done = checkpoint.read_manifest(found[-1]).get("step", 0) if found else 0
    return done >= min(steps, config.max_steps or steps)


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    which = flags.checkpoints
    named = Path(which.split(",")[0])  # the first one, if they are paths
    config = checkpoint.with_network(config, named)
    if flags.stride > config.seq_len:
        raise UserError(f"--stride={flags.stride} is more than the window, {config.seq_len}"
                        " tokens (seq_len): some tokens would not be scored.")
    if flags.prompt:
        paths = checkpoint.select_checkpoints(config.run_dir, "last" if which == "all" else which)
        model, tokenizer = checkpoint.load_run(paths[-1], **{key: getattr(config, key) for key in (
            "device", "dtype", "kernels", "threads")})
        return stream_completion(model, tokenizer, flags.prompt, flags.tokens, flags.temperature)
    choose_kernels(config.kernels)
    if flags.text:
        paths = checkpoint.select_checkpoints(config.run_dir, which)
        tokenizer = open_tokenizer(paths[-1])
        evaluations = [text_evaluation(config, tokenizer, flags)]
    else:
        data = load_data(config.data_dir)
        tokenizer = data.tokenizer
        checkpoint.with_network(config, named, data)  # refuses another tokenizer
        if data.n_vocab > config.vocab_size:
            raise UserError(f"The tokenizer of {config.data_dir} has {data.n_vocab} token ids, the"
                            f" model of this config {config.vocab_size} (vocab_size).")
        evaluations = list_evaluations(config, data, flags)
    model, file = build_for_inference(config), Path(config.run_dir, "eval.jsonl")
    while flags.watch and not run_has_ended(config):
        if checkpoint.list_checkpoints(config.run_dir):
            paths = checkpoint.select_checkpoints(config.run_dir, which)
            # The processes need not wait for each other before the run is over.
            checkpoint.evaluate_checkpoints(file, model, paths, evaluations, finish=False)
        time.sleep(POLL_SECONDS)
    paths = checkpoint.select_checkpoints(config.run_dir, which)
    results = checkpoint.evaluate_checkpoints(file, model, paths, evaluations)
    # Of torchrun's processes the first one prints.
    if int(os.environ.get("RANK", 0)):
        return
    entries = by_checkpoint(results)
    for kind, title in (("text", "bits per byte"), ("tasks", "accuracy")):
        if entries[-1][kind]:
            print(f"{title}\n{table(entries, kind)}\n")
    # The sample is of the last one in the tables: a newer one may be damaged.
    newest = [path for path in paths if path.name == entries[-1]["checkpoint"]][-1]
    checkpoint.load_weights(model, newest)
    sample = continue_text(model, tokenizer, config.sample_prompt, flags.tokens, flags.temperature)
    print(report(model, entries, sample, argv))


if __name__ == "__main__":
    run_command(main)
