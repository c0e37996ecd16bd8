"""The ledger's rows that nobody has run here, and what a GPU would run instead: commands with reckoned hours.

Nothing in this file is measured. Hours are reckoned for one H200 from the sizes: training computes 10 FLOPs a
weight and token (6, 2 recomputed by checkpointing, 2 for the reference) at 35 % of 989 TFLOP/s; a decoding
step reads the weights at half of 4.8 TB/s and takes 5 ms for caches and launches. Evaluation and the judge's
own time come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ledger import NOT_TESTED, Claim

FLOPS, BYTES, LAUNCH = 0.35 * 989e12, 0.5 * 4.8e12, 0.005


@dataclass(frozen=True)
class Job:
    """A run on a GPU, by its sizes."""

    what: str
    commands: tuple[str, ...]
    judge: str  # who judges, and which data
    weights: float
    rows: int  # trained, prompts with their replies
    tokens: int  # of such a row
    replies: int  # sampled
    at_once: int
    reply: int  # decoding steps of a batch
    runs: int = 1  # settings × seeds of that size
    models: int = 1  # that decode: 2 for a mixture

    def hours(self) -> int:
        """Of all runs, rounded up."""
        training = 10 * self.weights * self.rows * self.tokens / FLOPS
        steps = self.replies / self.at_once * self.reply
        sampling = steps * self.models * (2 * self.weights / BYTES + LAUNCH)
        return math.ceil(self.runs * (training + sampling) / 3600)


ULTRAFEEDBACK, PAIRRM = 61_134, "PairRM, UltraFeedback"
JOBS = {
    "selm": Job(
        "SELM and iterative DPO, Llama-3-8B, all weights, three seeds each",
        ("python selm.py --model llama3-8b --lora-rank 0 --optimizer-states bfloat16",
         "python selm.py --model llama3-8b --lora-rank 0 --optimizer-states bfloat16 --alpha 0"),
        f"{PAIRRM}; then AlpacaEval 2 and MT-Bench, whose judge is GPT-4 (evaluate.py writes their files)",
        8e9, ULTRAFEEDBACK, 1300, ULTRAFEEDBACK, 248, 600, runs=6,
    ),
    "zephyr": Job(
        "SELM and iterative DPO, Zephyr-7B-SFT, one offline epoch first, three seeds each",
        ("python selm.py --model zephyr-7b --lora-rank 0 --optimizer-states bfloat16",
         "python selm.py --model zephyr-7b --lora-rank 0 --optimizer-states bfloat16 --alpha 0"),
        f"{PAIRRM}; then AlpacaEval 2 and MT-Bench",
        7e9, ULTRAFEEDBACK, 1300, ULTRAFEEDBACK, 248, 600, runs=6,
    ),
    "alpha": Job(
        "the sweep of α, Llama-3-8B by LoRA: 1e-4, 1e-3, 1e-2, three seeds each",
        ("python selm.py --model llama3-8b --alpha 0.01",),
        PAIRRM,
        8e9, ULTRAFEEDBACK, 1300, ULTRAFEEDBACK, 248, 600, runs=9,
    ),
    "table": Job(
        "IPO-MD, online-IPO, DPO, SLiC, Nash-MD-PG and RLHF, TL;DR, 30,000 steps, three seeds each",
        ("python ipo_md.py --model pythia-1b-tldr", "python ipo_md.py --model pythia-1b-tldr --beta 0",
         "python ipo_md.py --model pythia-1b-tldr --beta 0 --loss dpo --tau 5",
         "python ipo_md.py --model pythia-1b-tldr --beta 0 --loss slic --tau 10",
         "python nash_md.py --model pythia-1b-tldr --max-steps 30000 --epochs 9",
         "python nash_md.py --model pythia-1b-tldr --objective rlhf --tau 0.05 --max-steps 30000 --epochs 9"),
        "a pairwise model of the 92,820 TL;DR comparisons (preference_model.py --kind pairwise; "
        "then --judge pairwise:RUN/model, for RLHF a reward model of the same pairs), and another "
        "that only scores (evaluate.py)",
        1e9, 960_000, 470, 1_920_000, 64, 64, runs=18, models=2,
    ),
    "nash": Job(
        "Nash-MD-PG over β, Nash-EMA-PG and RLHF, 10,000 steps",
        ("python nash_md.py --model pythia-1b-tldr --beta 0.25",
         "python nash_md.py --model pythia-1b-tldr --opponent ema",
         "python nash_md.py --model pythia-1b-tldr --objective rlhf --tau 0.05"),
        "the same; the paper's judge, PaLM 2, is not public",
        1e9, 320_000, 420, 640_000, 64, 64, runs=9, models=2,
    ),
    "afd": Job(
        "the four constructions, Gemma-2B, HH-RLHF harmless and helpful, three seeds each",
        ("python afd.py --model gemma-2b --dataset hh-harmless --demonstrations gpt4.jsonl"
         " --extrapolate best-of-n --pairs init-sft init-demo sft-demo preference --preferences data"
         " --max-n 50",),
        "GPT-4's demonstrations for HH-RLHF's prompts, and the golden reward models "
        "(Ray2333/gpt2-large-harmless-reward_model, weqweasdas/RM-Gemma-7B)",
        2.5e9, 420_000, 300, 250_000, 256, 128, runs=6,
    ),
    "spin": Job(
        "SPIN, Llama-3-8B by LoRA, 50,000 demonstrations, four iterations of two epochs",
        ("python spin.py --model llama3-8b --demonstrations ultrachat.jsonl --iterations 4"
         " --policy-epochs 2",),
        "UltraChat's demonstrations; then MT-Bench and the Open LLM Leaderboard's tasks",
        8e9, 400_000, 800, 200_000, 248, 500,
    ),
}  # fmt: skip


ROWS: list[Claim] = []


def untested(paper: str, name: str, where: str, says: str, by: str, job: str, more: str = "") -> None:
    """Enters a row: its job on a GPU, and what is missing besides hours."""
    run = JOBS[job]
    takes = (
        f"some {run.hours()} GPU hours (reckoned, {run.runs} run{'s' * (run.runs > 1)}); {more or run.judge}"
    )
    outcome = NOT_TESTED, takes
    ROWS.append(Claim(name, paper, says, where, tuple(by.split()), run.commands[0], lambda results: outcome))


untested("selm", "selm_llama", "experiments, AlpacaEval 2 and MT-Bench",
         "Llama-3-8B-Instruct: 34.67 and 8.25 after three iterations, iterative DPO 33.17 and 8.18.",
         "selm.py:RECIPES cleanalign/benchmarks.py:length_controlled_win_rate", "selm")  # fmt: skip
untested("selm", "selm_zephyr", "experiments, AlpacaEval 2 and MT-Bench",
         "Zephyr-7B-SFT: 24.25 and 7.61, iterative DPO 22.19 and 7.46; the edge appears late.",
         "selm.py:RECIPES cleanalign/benchmarks.py:length_controlled_win_rate", "zephyr")  # fmt: skip
untested("selm", "selm_alpha_on_text", "experiments, ablation of α",
         "On a 7-8B model α moves the reward distribution of what is sampled.",
         "selm.py:selm_loss", "alpha")  # fmt: skip
untested("selm", "selm_ranks_offline_replies", "Appendix D",
         "Ranking the own answer among the data set's two beats comparing it with the reference's only.",
         "selm.py:data_set_responses", "zephyr")  # fmt: skip
untested("ipo", "ipo_table", "experiments, side-by-side table",
         "IPO and IPO-MD beat DPO, SLiC, Nash-MD-PG (.59 to .62) and RL (.78, .79), judged side by side.",
         "ipo_md.py:preference_loss nash_md.py:nash_md_loss evaluate.py:main", "table")  # fmt: skip
untested("ipo", "ipo_md_equals_ipo", "experiments, side-by-side table",
         "IPO-MD is no worse than online-IPO (.515, sd .024).",
         "ipo_md.py:collect evaluate.py:main", "table")  # fmt: skip
untested("nash", "nash_tldr", "experiments, TL;DR",
         "On summaries Nash-MD-PG at β = .125 has the best win rate against RLHF.",
         "nash_md.py:nash_md_loss evaluate.py:main", "nash")  # fmt: skip
untested("nash", "nash_other_judge", "experiments, side by side by PaLM 2",
         "A larger model that trained nobody confirms the order.",
         "nash_md.py:main evaluate.py:main", "nash",
         "a judge as strong as PaLM 2 that is not trained on (`--judge openai:MODEL`)")  # fmt: skip
untested("afd", "afd_harmless", "experiments, harmless",
         "`init-sft` beats `preference`, `init-demo` and `sft-demo` rank below chance (GPT-2, Gemma-2B).",
         "afd.py:reward_pairs afd.py:compare_rewards", "afd")  # fmt: skip
untested("afd", "afd_helpful", "experiments, helpful",
         "`init-sft` and `preference` lead, the heterogeneous pairs stay above chance.",
         "afd.py:reward_pairs afd.py:compare_rewards", "afd")  # fmt: skip
untested("spin", "spin_leaderboard", "experiments",
         "Iterations improve a 7B SFT model on the Open LLM Leaderboard and MT-Bench.",
         "spin.py:main", "spin")  # fmt: skip
