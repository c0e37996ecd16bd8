"""AlpacaEval's and MT-Bench's files: questions read, answers and verdicts written as the official tools take
them.

AlpacaEval (package alpaca_eval) reads a JSON list of answers, and writes one of annotations; MT-Bench
(FastChat, package fschat) reads JSON lines in data/mt_bench/ under its working folder.
"""

from __future__ import annotations

import json
import numbers
import time
from pathlib import Path

from cleanalign.data import Row, prompt_text
from cleanalign.errors import UserError, optional_import, require
from cleanalign.kept import fingerprint

QUESTIONS = {  # --benchmark: where a user finds its questions
    "alpaca_eval": "alpaca_eval.json of the hub's data set tatsu-lab/alpaca_eval (805 instructions)",
    "mt_bench": "fastchat/llm_judge/data/mt_bench/question.jsonl of FastChat's repository (80 questions)",
}
# where FastChat's judge looks for them, from its working folder
MODEL_ANSWERS = Path("data/mt_bench/model_answer")
MT_BENCH_TEMPERATURE = {  # by category, FastChat's temperature_config; .7 elsewhere
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}

# --- AlpacaEval ---


def alpaca_rows(path: Path) -> list[Row]:
    """Rows of AlpacaEval's JSON: a list of objects with
    `instruction` and, where they are answers, `output`."""
    require(path.is_file(), f"{path}: no such file.")
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}.") from error
    fine = (
        isinstance(objects, list)
        and objects
        and all(isinstance(o, dict) and "instruction" in o for o in objects)
    )
    require(fine, f"{path}: not AlpacaEval's format, a list of objects with instruction and output.")
    return [
        Row(f"{path.name}:{i}", o["instruction"], response=o.get("output")) for i, o in enumerate(objects)
    ]


def alpaca_outputs(name: str, rows: list[Row], replies: list[str]) -> list[dict]:
    """Answers as `alpaca_eval --model_outputs` reads them."""
    pairs = zip(rows, replies, strict=True)
    return [{"instruction": prompt_text(row.prompt), "output": y, "generator": name} for row, y in pairs]


def alpaca_annotations(names: tuple[str, str], rows: list[Row], replies: tuple, p: list[float], judge: str):
    """Verdicts as AlpacaEval keeps them: preference 1 is for output_1, the baseline's, 2 for output_2, the
    model's.

    names, replies: the baseline's and the model's. p: (N,) p(model ≻ baseline).
    """
    columns = zip(rows, replies[0], replies[1], p, strict=True)
    return [
        {
            "instruction": prompt_text(row.prompt),
            "output_1": baseline,
            "generator_1": names[0],
            "output_2": model,
            "generator_2": names[1],
            "annotator": judge,
            "preference": 1 + preference,
        }
        for row, baseline, model, preference in columns
    ]


def length_controlled_win_rate(annotations: list[dict]) -> dict:
    """What alpaca_eval's own `get_length_controlled_winrate` says, in per cent. It fetches the difficulty of
    the 805 instructions from the hub. Raises `UserError` where that fails."""
    metrics = optional_import("alpaca_eval.metrics", "'cleanalign[alpaca]'")
    try:
        told = metrics.get_length_controlled_winrate(annotations, save_weights_dir=None)
    except Exception as error:  # the hub's, pandas' and scikit-learn's own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--length-controlled: alpaca_eval ended with {type(error).__name__}: {first}"
        ) from error
    return {key: float(value) for key, value in told.items() if isinstance(value, numbers.Real)}


# --- MT-Bench ---


def mt_bench_questions(path: Path) -> list[dict]:
    """FastChat's question.jsonl. Raises `UserError` for another file."""
    require(path.is_file(), f"--dataset {path}: no such file.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(), which knows other ends
        questions = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"--dataset {path}: not JSON lines: {error}.") from error
    fine = [isinstance(q, dict) and "question_id" in q and len(q.get("turns", ())) == 2 for q in questions]
    require(
        bool(fine) and all(fine),
        f"--dataset {path}: not MT-Bench's format, question_id and two turns a line.",
    )
    return sorted(questions, key=lambda question: question["question_id"])


def mt_bench_temperature(question: dict) -> float:
    """FastChat's temperature for a question's category."""
    return MT_BENCH_TEMPERATURE.get(question.get("category"), 0.7)


def mt_bench_line(name: str, question: dict, turns: list[str]) -> dict:
    """A model's answers to a question, a line of FastChat's model_answer files."""
    return {
        "question_id": question["question_id"],
        "answer_id": fingerprint(name, question["question_id"], turns)[:22],
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }
