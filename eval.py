"""Stage 3: bits per byte, perplexity, multiple-choice tasks; continue a prompt.

    python eval.py configs/amber_tiny.py                       # all that is not measured yet
    python eval.py configs/amber_tiny.py --checkpoints=last    # or =7, =0,4,9, or a path
    python eval.py configs/amber_tiny.py --prompt="def main("  # text from the newest checkpoint
    torchrun --nproc_per_node=8 eval.py configs/amber_7b.py    # the work is shared

Every result is a line of runs/NAME/eval.jsonl, written as soon as it is measured, and not measured
again. Prompts, few-shot examples, token ids and scores of the benchmarks are those of EleutherAI's
lm-evaluation-harness 0.4.13; docs/evaluation.md says where their files come from.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import checkpoint as ckpt
import kernels
from configs import Config, UserError, load, progress, read_regular, run_command
from data import Data, load_data, sha256_file
from model import KVCache, LLaMA, continue_text
from parallel import all_gather_object, build_for_inference, rank
from tokenizer import Tokenizer, open_tokenizer

MIN_SHARED = 0.1  # read a shared prefix once only if that saves this fraction of a batch's tokens


@dataclass
class Flags:
    """What eval.py takes beside the settings."""

    checkpoints: str = "all"  # "last", "7", "0,4,9" or paths; "all" = one per chunk
    sequences: int = 1000  # validation sequences of each source; 0 = all
    batch: int = 32  # sequences in memory at a time
    prompt: str = ""  # continue this text with the last of them, and nothing else
    tokens: int = 64  # of a continuation
    temperature: float = 0.8  # of a continuation; 0 = the likeliest token


@torch.no_grad()
def validate(model: LLaMA, data: Data, limit: int | None, batch: int,
             rank: int = 0, world: int = 1) -> dict[str, dict[str, float]]:
    """Loss (nats per token) and bits per byte of the first `limit` validation sequences of each
    source (None = all), any `batch` at a time. With world > 1 every process must call this."""
    # Training calls this too: it draws no random number and leaves the data order alone.
    token_bytes = data.tokenizer.token_bytes  # (V,)
    device = model.lm_head.weight.device
    results = {}
    for source in data.validation_sources:
        sequences = data.validation(source)["token_ids"][:limit]
        sums = []  # of each batch: nats, tokens, bytes
        for start in range(0, len(sequences), batch * world):
            mine = sequences[start + batch * rank :][:batch]
            # FSDP gathers the weights from all processes, so one that has no sequences left
            # computes too, on a sequence that does not count.
            ids = mine if len(mine) else sequences[:1]
            ids = torch.from_numpy(ids.astype(np.int64)).to(device)  # (B, T + 1)
            _, token_losses = model(ids[:, :-1], ids[:, 1:])  # (B, T)
            nats, targets = token_losses[: len(mine)].double().sum(), mine[:, 1:]
            sums.append([float(nats), targets.size, float(token_bytes[targets].sum())])
        gathered = all_gather_object(sums) if world > 1 else [sums]
        # fsum rounds once, at its end: the order of the batches and processes does not matter.
        nats, tokens, n_bytes = (math.fsum(column) for column in zip(*sum(gathered, [])))
        results[source] = text_figures(nats, tokens, n_bytes)
    return results


def text_figures(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """Nats per token, and bits per byte, which can be compared between tokenizers."""
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / n_bytes}


# ---- questions: the files of benchmarks, and how they become token ids


class Task(NamedTuple):
    metric: str  # the one that is reported: "acc", "acc_norm" (per character) or "mc2"
    split: str = ""  # the split whose questions are asked; "" = made here, without files
    num_fewshot: int = 0  # solved examples before a question
    fewshot_split: str = ""  # the split that these come from


TASKS = {
    "continuation": Task("acc"),
    "recall": Task("acc"),
    # The files of these must be downloaded. Shots are those of LLM360's evaluation of Amber.
    "arc_challenge": Task("acc_norm", "test", 25, "train"),
    "hellaswag": Task("acc_norm", "validation", 10, "train"),
    "mmlu": Task("acc", "test", 5, "dev"),
    "truthfulqa_mc1": Task("acc", "validation"),
    "truthfulqa_mc2": Task("mc2", "validation"),
    "piqa": Task("acc_norm", "validation"),
    "winogrande": Task("acc", "validation"),
    "boolq": Task("acc", "validation"),
    "openbookqa": Task("acc_norm", "test"),
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
    """An entry of a data set: (a context per choice, the choices, 1 where a choice is right)."""
    if task == "arc_challenge":
        context, choices = f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"]
        gold = doc["choices"]["label"].index(doc["answerKey"])
    elif task == "hellaswag":
        context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        # Many of these texts come from WikiHow, and still contain its markup.
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
        context = f"{TRUTHFULQA_PROMPT}\n\nQ: {doc['question']}\nA:"
        targets = doc[task.removeprefix("truthfulqa_") + "_targets"]
        choices, gold = targets["choices"], targets["labels"]
    elif task == "piqa":
        context = f"Question: {doc['goal']}\nAnswer:"
        choices, gold = [doc["sol1"], doc["sol2"]], doc["label"]
    elif task == "winogrande":
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


def find_tasks(config: Config) -> dict[str, list[list[Path]]]:
    """The tasks that `tasks` names, or all that are there, MMLU as its subjects: for each the files
    (SPLIT.jsonl or SPLIT-*.parquet) of its questions and of its examples."""
    tasks: dict[str, list[list[Path]]] = {}
    for name in config.tasks.split(",") if config.tasks else TASKS:
        if name not in TASKS:
            raise UserError(f"tasks: there is no {name!r}; there are {', '.join(TASKS)}.")
        task, folder = TASKS[name], Path(config.task_dir, name.partition("_mc")[0])
        if task.split and not config.tasks and not folder.is_dir():
            continue
        subjects = [""]
        if name == "mmlu":  # a result for each subject, because there are many questions
            subjects = sorted({p.parent.name for p in folder.glob("*/test[.-]*")} - {"all"}) or [""]
        for subject in subjects:
            files = tasks[f"{name}/{subject}".rstrip("/")] = []
            for split in (task.split, task.fewshot_split):
                found = [path for path in Path(folder, subject).glob(f"{split}[.-]*")
                         if split and path.suffix in (".jsonl", ".parquet")]
                if split and not found:
                    raise UserError(f"{Path(folder, subject)} has no {split}.jsonl and no {split}-*"
                                    ".parquet: docs/evaluation.md says where to get them.")
                files.append(sorted(found))
    return tasks


def read_docs(files: list[Path]) -> list[dict]:
    """The entries of .jsonl and .parquet files; .parquet needs the package pyarrow."""
    docs: list[dict] = []
    for file in files:
        if file.suffix == ".parquet":
            from pyarrow import parquet
            docs += parquet.ParquetFile(file).read().to_pylist()
        else:
            # Not splitlines: a JSON string may hold U+2028, which that takes for a line's end.
            lines = read_regular(file).decode().split("\n")
            docs += [json.loads(line) for line in lines if line.strip()]
    return docs


class Request(NamedTuple):
    ids: np.ndarray  # (length,) token ids; the model reads all but the last
    n: int  # of them, the last n are scored, each given all those before it


class Question(NamedTuple):
    requests: list[Request]  # one per choice
    lengths: np.ndarray  # of the choices, in characters
    gold: np.ndarray  # 1 where a choice is right, else 0


def build_questions(config: Config, data: Data, name: str,
                    files: list[list[Path]]) -> list[Question]:
    """The questions of a task, or of a subject of MMLU, ready to be scored; see `find_tasks`."""
    task_name, _, subject = name.partition("/")
    task = TASKS[task_name]
    if not task.split:
        return synthetic_questions(data, name)
    docs, pool = map(read_docs, files)
    header = MMLU_HEADER.format(subject.replace("_", " ")) if subject else ""
    random = Random(1234)  # the harness's seed, and one stream for all questions
    solved: list[str] = []  # the pool's questions, each with its right answer
    for doc in pool:
        contexts, choices, gold = format_doc(task_name, doc)
        solved.append(f"{contexts[gold.argmax()]} {choices[gold.argmax()]}\n\n")
    questions: list[Question] = []
    for doc in docs:
        prompt = header + "".join(solved[i] for i in draw_examples(task, pool, doc, random))
        contexts, choices, gold = format_doc(task_name, doc)
        requests = [encode_request(data.tokenizer, prompt + context, choice, config.seq_len)
                    for context, choice in zip(contexts, choices)]
        questions.append(Question(requests, np.array([len(c) for c in choices]), gold))
    return questions


def draw_examples(task: Task, pool: list[dict], doc: dict, random: Random) -> list[int]:
    """The numbers of the entries of the pool that are shown before a question."""
    n, everything = task.num_fewshot, range(len(pool))
    if task.fewshot_split != "train":
        return list(range(n))  # MMLU: the same five before all questions of a subject
    if task.split == "test":
        return random.sample(everything, n)
    # Where there is no test split (HellaSwag), the harness draws one example more, and leaves out
    # those that are the question itself.
    drawn = [i for i in random.sample(everything, n + 1) if pool[i] != doc]
    if len(drawn) < n:
        return random.sample([i for i in everything if pool[i] != doc], n)
    return drawn[:n]


def encode_request(tokenizer: Tokenizer, context: str, choice: str, window: int) -> Request:
    """Context and choice tokenized as one text; the ids after those of the context are scored."""
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


# ---- scoring: the log-likelihood of every choice, and everything that is measured with it


def log_likelihoods(model: LLaMA, questions: list[list[Request]], batch: int) -> list[np.ndarray]:
    """log p of the last n ids of each request given those before them, one array per question.
    batch: rows of a forward pass, at most; the choices of a question stay together."""
    # Questions of similar length share a batch, which saves padding; the longest come first, so
    # that a lack of memory shows at once.
    order = sorted(range(len(questions)), key=lambda i: -max(len(r.ids) for r in questions[i]))
    n_rows = max(len({r.ids[:-1].tobytes() for r in question}) for question in questions)
    size = max(1, batch // n_rows)  # questions of a batch
    values: dict[int, np.ndarray] = {}
    for start in progress(range(0, len(order), size), "batches"):
        numbers = order[start : start + size]
        values |= zip(numbers, score_batch(model, [questions[i] for i in numbers]))
    return [values[i] for i in range(len(questions))]


@torch.no_grad()
def score_batch(model: LLaMA, questions: list[list[Request]]) -> list[np.ndarray]:
    """`log_likelihoods` of a few questions, in one forward pass over R rows of up to T ids."""
    requests = [request for question in questions for request in question]
    rows: list[bytes] = []  # the ids that the model reads: all of a request but the last
    row_of: list[int] = []  # the row of each request
    n_rows: list[int] = []  # the number of rows of each question
    for question in questions:
        # Choices of one token (the letters of MMLU) are predicted from the same ids: from one row.
        reads = [request.ids[:-1].tobytes() for request in question]
        distinct = list(dict.fromkeys(reads))
        row_of += [len(rows) + distinct.index(read) for read in reads]
        rows += distinct
        n_rows.append(len(distinct))
    # Padded on the right, with anything: no position that counts attends to what follows it.
    tensors = [torch.frombuffer(bytearray(row), dtype=torch.int32) for row in rows]
    ids = pad_sequence(tensors, batch_first=True).to(model.lm_head.weight.device).long()  # (R, T)

    # The common prefix of a group of rows is computed once. A group is either all rows (MMLU: the
    # same five examples) or one question (ARC and HellaSwag: its own examples and the question).
    unscored = ids[:, : min(len(request.ids) - 1 - request.n for request in requests)]

    def shared_length(sizes: list[int]) -> int:
        """How many ids the rows of every group begin with alike; sizes: rows of each group."""
        same = torch.cat([group == group[:1] for group in unscored.split(sizes)]).all(dim=0)  # (T,)
        return int(same.int().cumprod(dim=0).sum())

    groups = max([len(rows)], n_rows, key=lambda s: (len(rows) - len(s)) * shared_length(s))
    shared = shared_length(groups)
    if (len(rows) - len(groups)) * shared <= MIN_SHARED * ids.numel():
        shared = 0
    cache = None
    if shared:
        cache = KVCache(model, len(groups), ids.shape[1])
        model.model(torch.stack([group[0, :shared] for group in ids.split(groups)]), cache)
        repeats = torch.tensor(groups, device=ids.device)  # (L, groups, T, K, h) -> (L, R, ...)
        cache.k, cache.v = (x.repeat_interleave(repeats, dim=1) for x in (cache.k, cache.v))
    hidden = model.model(ids[:, shared:], cache)  # (R, T - shared, D)

    # Logits are large, and only the scored positions need them: their states are lined up.
    states, targets = [], []
    for row, request in zip(row_of, requests):
        end = len(request.ids) - 1 - shared  # position i predicts id i + 1
        states.append(hidden[row, end - request.n : end])  # (n, D)
        targets.append(torch.from_numpy(request.ids[-request.n :]))
    x = torch.cat(states) * (model.config.logit_scale * model.config.width_scale)
    weight = model.lm_head.weight.to(x.dtype)
    _, losses = kernels.linear_cross_entropy(x, weight, torch.cat(targets).to(ids))
    parts = losses.double().cpu().split([request.n for request in requests])
    values = np.array([-float(part.sum()) for part in parts])  # one per request
    return np.split(values, np.cumsum([len(question) for question in questions])[:-1])


def score_questions(model: LLaMA, questions: list[Question], metric: str,
                    batch: int) -> dict[str, Any]:
    """A task's metrics with their standard errors; `metric` is the one that is reported."""
    points: dict[str, list[float]] = {"acc": [], "acc_norm": [], "mc2": []}
    log_p = log_likelihoods(model, [question.requests for question in questions], batch)
    for values, question in zip(log_p, questions):
        # NaN if any of the values is: argmax would hide it, and no result may have one.
        gold = question.gold + 0 * values.sum()
        points["acc"].append(gold[values.argmax()])
        # Per character, or short choices would have an advantage.
        points["acc_norm"].append(gold[(values / question.lengths).argmax()])
        points["mc2"].append(gold @ np.exp(values - np.logaddexp.reduce(values)))
    n, chance = len(questions), math.fsum(question.gold.mean() for question in questions)
    result: dict[str, Any] = {"metric": metric, "n": n, "chance": chance / n}
    for name in ("acc", "acc_norm") if metric == "acc_norm" else (metric,):
        result[name] = float(np.mean(points[name]))
        # The questions are a sample of those that could be asked: n - 1, as in the harness.
        deviation = np.std(points[name], ddof=1) if n > 1 else 0.0
        result[f"{name}_se"] = float(deviation) / math.sqrt(n)
    return result


def list_evaluations(config: Config, data: Data, flags: Flags) -> list[ckpt.Evaluation]:
    """Everything that is measured of a checkpoint, in parts small enough to be lost by a kill."""
    parts: list[ckpt.Evaluation] = []
    if data.validation_sources:
        limit = flags.sequences or None
        parts.append(ckpt.Evaluation("validation", [data.sha256, limit], lambda model: validate(
            model, data, limit, config.micro_batch_size)))
    # Tokenizing all questions takes minutes: only if a checkpoint needs them, once for all of them.
    tasks = find_tasks(config)
    questions = functools.cache(lambda name: build_questions(config, data, name, tasks[name]))
    for name, files in tasks.items():
        inputs = [*map(sha256_file, sum(files, [])), config.seq_len, data.sha256]
        # Of very few or short validation sequences no questions can be made.
        if any(files) or questions(name):
            parts.append(ckpt.Evaluation(name, inputs, lambda model, name=name: score_questions(
                model, questions(name), TASKS[name.partition("/")[0]].metric, flags.batch)))
    if not parts:
        raise UserError(f"There is nothing to measure: {config.data_dir} has no validation"
                        f" sequences, and task_dir ({config.task_dir}) no benchmarks.")
    return parts


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


def main(argv: list[str]) -> None:
    config, flags = load(argv, Flags)
    which = "last" if flags.prompt and flags.checkpoints == "all" else flags.checkpoints
    paths = ckpt.select_checkpoints(config.run_dir, which)[-1 if flags.prompt else 0 :]
    data = None if flags.prompt else load_data(config.data_dir, config.seq_len)
    tokenizer = data.tokenizer if data else open_tokenizer(paths[0])
    config = ckpt.with_network(config, paths, data and tokenizer)
    model, path = build_for_inference(config), paths[-1]
    if not flags.prompt:
        results = ckpt.evaluate_checkpoints(Path(config.run_dir, "eval.jsonl"), model, paths,
                                            list_evaluations(config, data, flags), tokenizer)
        if rank():
            return
        entries = by_checkpoint(results)
        last = entries[-1]
        for kind, title in (("text", "bits per byte"), ("tasks", "accuracy")):
            if last[kind]:
                print(f"{title}\n{table(entries, kind)}\n")
        at = "" if last["step"] is None else f", step {last['step']}, {last['tokens']:,} tokens"
        print(f"{'checkpoint':>24}: {last['checkpoint']}{at}, {model.n_params:,} parameters")
        for name, r in (last["text"] | last["tasks"]).items():
            print(f"{name:>24}: perplexity {math.exp(r['loss']):.2f}" if "loss" in r else
                  f"{name:>24}: {r['metric']} {value(r):.3f} ± {r[r['metric'] + '_se']:.3f}"
                  f" of {r['n']:,} (chance {r['chance']:.3f})")
        # The sample is of the last one in the tables: a newer one may be damaged.
        path = [r["path"] for r in results if r["checkpoint"] == last["checkpoint"]][-1]
    ckpt.load_weights(model, path)
    prompt = flags.prompt or config.sample_prompt
    text = continue_text(model, tokenizer, prompt, flags.tokens, flags.temperature)
    print(text if flags.prompt else f"{'sample':>24}: {text!r}")


if __name__ == "__main__":
    run_command(main)
