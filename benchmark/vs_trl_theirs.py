"""TRL's side of vs_trl.py: runs in TRL's own environment, one optimiser step for each line on standard input.

Argument: a JSON object with `algorithm` (nash, ipo), `model` (folder), `prompts` (.jsonl file), `batch_size`
and `gradient_checkpointing`. Each input line is {"new_tokens": N}; each output line what that step took.
Whatever TRL prints goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from types import SimpleNamespace

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

settings = json.loads(sys.argv[1])
answers, sys.stdout = sys.stdout, sys.stderr
NASH = settings["algorithm"] == "nash"
if NASH:
    from trl.experimental.nash_md import NashMDConfig as Config
    from trl.experimental.nash_md import NashMDTrainer as Trainer
    from trl.experimental.nash_md.nash_md_trainer import GeometricMixtureWrapper
else:
    from trl.experimental.online_dpo import OnlineDPOConfig as Config
    from trl.experimental.online_dpo import OnlineDPOTrainer as Trainer

vader = SentimentIntensityAnalyzer()
measured: dict = {}  # of the step under way


def answer(**fields) -> None:
    print(json.dumps(fields), file=answers, flush=True)


class LexiconRewardModel:
    """VADER in the shape that NashMDTrainer asks of a reward model: token ids to "hidden states", and those
    to scores."""

    __name__ = "vader"
    base_model_prefix = "lexicon"

    def lexicon(self, input_ids, **_):
        texts = tokenizer.batch_decode(input_ids)
        replies = [text.rpartition("<|im_start|>assistant\n")[2] for text in texts]
        scores = torch.tensor([vader.polarity_scores(reply)["compound"] for reply in replies])
        return SimpleNamespace(last_hidden_state=scores[:, None, None].expand(*input_ids.shape, 1))

    def score(self, hidden):
        return 4 * hidden  # as judges.LEXICON_SCALE


def vader_reward(completions, **_) -> list[float]:
    """VADER as OnlineDPOTrainer's reward function."""
    return [vader.polarity_scores(completion[0]["content"])["compound"] for completion in completions]


def note_cache() -> None:
    """Note how many places the mixture's KV cache holds beside how many its rows have: are they one
    model's?"""
    forward = GeometricMixtureWrapper.forward

    def noting(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        measured["mixture_cache_length"] = cache.get_seq_length() if cache is not None else 0
        measured["mixture_row_length"] = kwargs["attention_mask"].shape[1]
        return outputs

    GeometricMixtureWrapper.forward = noting


class Timed(Trainer):
    """TRL's trainer, its rows in order, its sampling timed, its lengths noted."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def _generate_completions(self, model, prompts):  # NashMDTrainer
        start = time.perf_counter()
        outputs = super()._generate_completions(model, prompts)
        measured["sampling"] = time.perf_counter() - start
        return outputs

    def _compute_rewards(self, model_data, mixture_data, context_length):  # NashMDTrainer
        measured["prompt_tokens"] = int(model_data["attention_mask"][:, :context_length].sum())
        measured["new_tokens"] = sum(
            int(data["attention_mask"][:, context_length:].sum()) for data in (model_data, mixture_data)
        )
        return super()._compute_rewards(model_data, mixture_data, context_length)

    def _generate(self, model, prompts, images=None):  # OnlineDPOTrainer
        start = time.perf_counter()
        outputs = super()._generate(model, prompts, images)
        measured["sampling"] = time.perf_counter() - start
        _, prompt_mask, _, completion_mask, _ = outputs
        measured["prompt_tokens"] = int(prompt_mask[: len(prompts)].sum())
        measured["new_tokens"] = int(completion_mask.sum())
        return outputs


class StepOnRequest(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        length = json.loads(line)["new_tokens"]
        for config in (trainer.generation_config, trainer.generation_kwargs):
            config.update(
                max_new_tokens=length, min_new_tokens=length
            )  # no early end: equal work on both sides
        measured.clear()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
        answer(seconds=time.perf_counter() - self.start, peak_memory_bytes=memory, **measured)


if NASH:
    note_cache()
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
model = AutoModelForCausalLM.from_pretrained(settings["model"])
with open(settings["prompts"]) as file:
    rows = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in file])
config = Config(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=settings["batch_size"],
    gradient_checkpointing=settings["gradient_checkpointing"],
    max_steps=10**6,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
    **({} if NASH else {"loss_type": "ipo"}),
)
trainer = Timed(
    model=model,
    reward_funcs=LexiconRewardModel() if NASH else vader_reward,
    args=config,
    train_dataset=rows,
    processing_class=tokenizer,
    callbacks=[StepOnRequest()],
)
answer(
    versions={
        name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers", "accelerate")
    },
    weights=str(next(model.parameters()).dtype),
    autocast=str(trainer.accelerator.mixed_precision),
    kv_cache=bool(trainer.generation_config.use_cache),
    attention=model.config._attn_implementation,
    optimiser=str(config.optim),
    threads=torch.get_num_threads(),
)
trainer.train()
