"""The games, played: how algorithms move a policy over three completions, computed beforehand for a page.

    python docs/play.py              # writes docs/games.html, about a minute on one core

docs/games.html is one file that works without a network: a student chooses a game, an algorithm, its two
knobs and a start, and watches the policy cross the triangle. The page computes nothing. Every path in it was
walked here, by plain gradient descent on a table of logits, along the exact expected gradient of the
functions that train language models: `ipo_md.preference_loss`, `nash_md.nash_md_loss` (with `nash_md.EMA`)
and `selm.selm_loss`. The games and the resting points are those of docs/theory.py.

Step sizes. Each loss has a scale of its own, so the step is chosen for each such that all of them leave the
reference at the same speed, `SPEED` · π(y) · [(Pπ)(y) − P(π, π)]; with it online-IPO and Nash-MD's self-play
are one path. `selm` renews its reference every `ITERATION` steps.

Shapes: B paths walked at once, 3 completions, 9 pairs of them, K frames kept of each path.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import theory

import afd
import ipo_md
import nash_md
import selm
from cleanalign import games

HERE = Path(__file__).resolve().parent
TEMPLATE, PAGE = HERE / "play.html", HERE / "games.html"

SPEED, STEPS, ITERATION, FRAMES = 0.2, 1000, 40, 140
SHARE, NATS, GAP = 10_000, 2_000, 10_000  # whole numbers of the page: one unit of a share, a nat, an excess
TAUS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
FIRST = torch.arange(3).repeat_interleave(3)  # (9,) y of every pair
SECOND = torch.arange(3).repeat(3)  # (9,) y' of every pair


def frames() -> list[int]:
    """(K,) the steps that are kept: all of the first, when a policy is quick, fewer later."""
    return [round(STEPS * (k / (FRAMES - 1)) ** 1.5) for k in range(FRAMES)]


# ---------------------------------------------------------------------------------------------
# what can be chosen
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Game:
    """A judge over three completions and the reference policy, with words for the page."""

    key: str
    name: str
    corners: tuple[str, str, str]
    about: str
    preference: torch.Tensor  # (3, 3) P
    reference: torch.Tensor  # (3,) μ
    scalar: torch.Tensor | None = None  # (3,) the rewards behind P, where there are any

    def reward(self) -> torch.Tensor:
        """(3,) the scalar that RLHF gets: Bradley-Terry fitted to the judge's verdicts on the reference's
        pairs, by the loss that trains reward models (`afd.discriminator_loss`); its mean is 0."""
        score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        weights = theory.pairs(self.reference).flatten() * self.preference.flatten()  # y is preferred to y'
        optimiser = torch.optim.LBFGS(
            [score], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def loss():
            optimiser.zero_grad()
            each = [afd.discriminator_loss(score[i][None], score[j][None], "bradley-terry")
                    for i, j in zip(FIRST, SECOND, strict=True)]  # fmt: skip
            value = (weights * torch.stack(each)).sum()
            value.backward()
            return value

        optimiser.step(loss)
        return (score - score.mean()).detach()

    def starts(self) -> dict[str, torch.Tensor]:
        """(3,) each: where a path may begin."""
        corners = dict(zip(self.corners, torch.eye(3, dtype=torch.float64), strict=True))
        near = {f"near {name}": 0.07 + 0.79 * corner for name, corner in corners.items()}
        far = {f"hardly any {name}": 0.465 - 0.395 * corner for name, corner in corners.items()}
        return {"the reference μ": self.reference, "the middle": theory.UNIFORM, **near, **far}


def all_games() -> list[Game]:
    """The games of the page."""
    vector, mu = theory.vector, theory.MU
    rewards, far = vector(0, 1, 2), vector(0, 0.5, 2)
    made = [
        Game("rps", "Rock-paper-scissors", ("rock", "scissors", "paper"),
             "Rock beats scissors, scissors beat paper, paper beats rock, always. Whatever a policy settles "
             "on, another answer beats it: no scalar reward can say that.", theory.rock_paper_scissors(), mu),
        Game("dice", "The 5/9 dice", ("die A", "die B", "die C"),
             "Three dice, A {2, 4, 9}, B {1, 6, 8}, C {3, 5, 7}: each beats the next five times in nine, and "
             "the last beats the first. The same cycle, softly.", theory.dice_game(), mu),
        Game("bt", "Bradley-Terry", ("reward 0", "reward 1", "reward 2"),
             "Each answer has a reward, and p(y ≻ y′) = σ(r − r′): the judges that a reward model can "
             "express. The reference likes the worst answer best.",
             theory.bradley_terry(rewards), mu, rewards),
        Game("bandit", "The bandit", ("arm 1, r = 0", "arm 2, r = ½", "arm 3, r = 2"),
             "Bradley-Terry again, but the best of three arms is one that the reference hardly ever tries, "
             "once in fifty. Who finds it?", theory.bradley_terry(far), vector(0.58, 0.4, 0.02), far),
    ]  # fmt: skip
    for seed in (0, 1, 2):
        preference, reference = theory.random_game(3, seed)
        made.append(Game(f"random{seed}", f"Random, seed {seed}", ("answer 1", "answer 2", "answer 3"),
                         "Preferences and reference drawn at random: no symmetry that could flatter an "
                         "algorithm.",
                         preference, reference))  # fmt: skip
    return made


@dataclass(frozen=True)
class Knob:
    """A slider: its symbol, what it does, its values."""

    symbol: str
    about: str
    values: tuple[float, ...]


TAU = Knob("τ", "price of a nat of KL from the reference", TAUS)
MIX = Knob("β", "the reference's share in the mixture", (0.0, 0.125, 0.25, 0.5, 0.75, 1.0))


@dataclass(frozen=True)
class Family:
    """Paths that one function of this file walks, over a grid of two knobs."""

    key: str
    knobs: tuple[Knob, ...]

    def grid(self) -> list[tuple[float, ...]]:
        """Every setting of the knobs, the last one fastest."""
        return list(itertools.product(*(knob.values for knob in self.knobs)))


FAMILIES = {
    family.key: family
    for family in (
        Family("ipo", (TAU, MIX)),
        Family("dpo", (TAU,)),
        Family("nash", (TAU, MIX)),
        Family("ema", (TAU, Knob("decay", "how much of the average each step keeps", (0.9, 0.98, 0.995)))),
        Family("rlhf", (TAU,)),
        Family("selm", (Knob("β", "the tie to the last iteration's policy", (0.1, 0.3, 1.0)),
                        Knob("α", "the exploration term; 0 is iterative DPO", (0.0, 0.1, 0.3, 1.0)))),
    )
}  # fmt: skip
ALGORITHMS = (  # (key, name, family, fixed value of the second knob or None, script, what it does)
    ("online-ipo", "Online-IPO", "ipo", 0.0, "ipo_md.py",
     "Two answers of the policy, the judge's p, and a squared loss that pulls their log-ratio to (p − ½)/τ. "
     "It rests at the regularised Nash equilibrium."),
    ("ipo-md", "IPO-MD", "ipo", None, "ipo_md.py",
     "Online-IPO's loss on answers of the mixture π^(1−β) μ^β. It rests where that mixture, not the policy, "
     "is an equilibrium, at the higher temperature τ/(1−β)."),
    ("dpo", "Online DPO", "dpo", None, "ipo_md.py",
     "DPO's logistic loss on the policy's own answers. Under Bradley-Terry preferences it rests where RLHF "
     "does; elsewhere it rests at no equilibrium of this game."),
    ("nash-md", "Nash-MD", "nash", None, "nash_md.py",
     "A policy gradient against the mixture π^(1−β) μ^β. It rests where IPO-MD does, on another path. At β = "
     "1 it learns the best response to the reference."),
    ("ema", "Nash-EMA", "ema", None, "nash_md.py",
     "The same gradient against a slow average of the policy's own weights. If it comes to rest, it rests at "
     "the regularised Nash; an opponent that lags can keep it turning."),
    ("self-play", "Self-play", "nash", 0.0, "nash_md.py",
     "The same gradient against the policy itself. Its expected path is online-IPO's, to the last digit."),
    ("rlhf", "RLHF", "rlhf", None, "nash_md.py",
     "The same gradient on a scalar reward, fitted beforehand to the judge's verdicts on the reference's "
     "answers. Where preferences go in a circle, the scalar puts one answer on top all the same."),
    ("selm", "SELM", "selm", None, "selm.py",
     "Iterative DPO with α: pairs of the last iteration's policy, which is also the reference, and a term "
     "that lowers what that policy already says. Labels are hard, and nothing holds it near μ for good."),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# the paths: descent on the scripts' own losses, B paths at a time
# ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What B paths of one family walk on."""

    preference: torch.Tensor  # (B, 9) P, flattened
    reference: torch.Tensor  # (B, 3) log μ
    reward: torch.Tensor  # (B, 3) RLHF's scalar
    start: torch.Tensor  # (B, 3) log of the first policy
    first: torch.Tensor  # (B,) the first knob
    second: torch.Tensor  # (B,) the second, 0 where there is none


def each_pair(
    loss: Callable, columns: tuple[torch.Tensor, ...], knobs: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """(B, 9) a script's loss of each of a path's pairs. It is called as the script calls it, with a batch,
    here of one pair: `vmap` goes over pairs and paths. Columns are (B, 9) or (B, 9, 1), knobs (B,)."""

    def one(*tensors):
        return loss(*(x[None] for x in tensors[: len(columns)]), *tensors[len(columns) :])

    axes = (0,) * len(columns) + (None,) * len(knobs)
    return torch.func.vmap(torch.func.vmap(one, in_dims=axes))(*columns, *knobs)


def expected(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ over paths of each one's expected loss; nothing differentiates through the sampling."""
    return (weights.detach() * losses).sum()


def mixed(policy: torch.Tensor, batch: Batch, beta: torch.Tensor) -> torch.Tensor:
    """(B, 3) π^(1−β) μ^β, normalised, of log-probs."""
    share = beta[:, None]
    return torch.softmax((1 - share) * policy + share * batch.reference, -1).detach()


def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, 9) the chance of every pair, y from a (B, 3) and y' from b."""
    return a[:, FIRST] * b[:, SECOND]


def preference_step(kind: str) -> Callable:
    """Expected `ipo_md.preference_loss` on pairs of the mixture; for dpo, β is 0."""

    def loss(*tensors):
        return ipo_md.preference_loss(*tensors, kind)

    def step(policy, batch, _):
        mu, tau = batch.reference, batch.first
        columns = policy[:, FIRST], policy[:, SECOND], mu[:, FIRST], mu[:, SECOND], batch.preference
        sampler = mixed(policy, batch, batch.second)
        scale = tau / 4 if kind == "ipo" else 1 / (2 * tau)
        return expected(each_pair(loss, columns, (tau,)), scale[:, None] * both(sampler, sampler))

    return step


def policy_gradient(policy: torch.Tensor, batch: Batch, preference: torch.Tensor, opponent: torch.Tensor):
    """Expected `nash_md.nash_md_loss` of y ~ π against y' ~ opponent (B, 3); preference is (B, 9)."""
    tokens = policy[:, FIRST, None], batch.reference[:, FIRST, None]  # completions of one token
    columns = *tokens, torch.ones_like(tokens[0]), preference
    return expected(each_pair(nash_md.nash_md_loss, columns, (batch.first,)), both(policy.exp(), opponent))


def nash_step(policy, batch, _):
    """Nash-MD-PG against the mixture; at β = 0 self-play, at 1 the best response to μ."""
    return policy_gradient(policy, batch, batch.preference, mixed(policy, batch, batch.second))


def ema_step(policy, batch, state):
    """Nash-EMA-PG: the opponent is the script's own average of the logits."""
    return policy_gradient(policy, batch, batch.preference, torch.softmax(state["ema"].weights[0], -1))


def rlhf_step(policy, batch, _):
    """The same loss with the scalar reward in the preference's place."""
    return policy_gradient(policy, batch, batch.reward[:, FIRST], policy.exp())


def selm_step(policy, batch, state):
    """Expected `selm.selm_loss` for K = 2: two answers of π_t, the one the judge prefers chosen, ties
    dropped, y_s either of the two; π_t is the reference."""
    old = state["reference"]  # (B, 3) log π_t
    weights = both(old.exp(), old.exp()) * (batch.preference != 0.5)
    weights = weights / weights.sum(-1, keepdim=True) / (2 * batch.first[:, None])  # the step's scale: 1/(2β)
    wins = batch.preference > 0.5
    chosen, rejected = torch.where(wins, FIRST, SECOND), torch.where(wins, SECOND, FIRST)  # (B, 9)

    pair = [x.gather(1, side) for x in (policy, old) for side in (chosen, rejected)]
    total = 0
    for own in (chosen, rejected):
        columns = *pair, policy.gather(1, own), old.gather(1, own)
        losses = each_pair(selm.selm_loss, columns, (batch.first, batch.second))
        total = total + 0.5 * expected(losses, weights)
    return total


STEP = {"ipo": preference_step("ipo"), "dpo": preference_step("dpo"), "nash": nash_step, "ema": ema_step,
        "rlhf": rlhf_step, "selm": selm_step}  # fmt: skip


def walk(family: str, batch: Batch, steps: int = STEPS) -> torch.Tensor:
    """(steps + 1, B, 3) the policies of every path, after each step of gradient descent."""
    logits = batch.start.clone()
    optimiser = SimpleNamespace(masters=[logits])
    state = {"ema": nash_md.EMA(optimiser, batch.second[:, None]), "reference": logits.log_softmax(-1)}
    path = [logits.softmax(-1)]
    for step in range(steps):
        if step % ITERATION == 0:
            state["reference"] = logits.log_softmax(-1)
        variable = logits.detach().requires_grad_()
        loss = STEP[family](torch.log_softmax(variable, -1), batch, state)
        logits -= SPEED * torch.autograd.grad(loss, variable)[0]
        if family == "ema":
            state["ema"].update()
        path.append(logits.softmax(-1))
    return torch.stack(path)


def batch_of(family: Family, chosen: list[Game]) -> Batch:
    """All games × settings of the knobs × starts, the last one fastest: the order of the page's data."""
    rows = []
    for game in chosen:
        reward = game.reward()
        for setting in family.grid():
            first, second = (*setting, 0.0)[:2]
            for start in game.starts().values():
                knobs = theory.vector(first), theory.vector(second)
                rows.append((game.preference.flatten(), game.reference.log(), reward, start.log(), *knobs))
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Batch(*columns[:4], columns[4][:, 0], columns[5][:, 0])


def rest(game: Game, family: str, first: float, second: float) -> torch.Tensor | None:
    """(3,) where the expected path comes to rest, by the formulae of docs/theory.md; None where none is
    known, for SELM."""
    preference, mu = game.preference, game.reference
    if family == "rlhf":
        return theory.rlhf_optimum(game.reward(), mu, first)
    if family == "ema":
        return theory.regularised_nash(preference, mu, first) if settles()[game.key, first, second] else None
    if family in ("ipo", "nash"):
        if second == 1:
            return theory.offline_ipo_optimum(preference, mu, mu, first)
        return theory.ipo_md_fixed_point(preference, mu, first, second)
    if family != "dpo":
        return None
    return dpo_rest(game, first) if game.scalar is None else theory.rlhf_optimum(game.scalar, mu, first)


@cache
def settles() -> dict[tuple, bool]:
    """Whether Nash-EMA is seen to settle at the Nash, for (game, τ, decay): within .01 of it during
    the last `STEPS` of six times as many, from the reference. With a slow average it may circle for ever."""
    chosen, family = all_games(), FAMILIES["ema"]
    batch, found = batch_of(family, chosen), {}
    first_starts = slice(None, None, len(chosen[0].starts()))  # the reference
    batch = Batch(*(getattr(batch, part.name)[first_starts] for part in fields(batch)))
    late = walk(family.key, batch, 6 * STEPS)[-STEPS:]  # (STEPS, games × settings, 3)
    for n, (game, (tau, decay)) in enumerate(itertools.product(chosen, family.grid())):
        nash = theory.regularised_nash(game.preference, game.reference, tau)
        found[game.key, tau, decay] = bool((late[:, n] - nash).abs().max() < 0.01)
    return found


def dpo_rest(game: Game, tau: float) -> torch.Tensor | None:
    """(3,) where the expected gradient of online DPO vanishes, by damped Newton on log(π/μ), from τ = 1 down;
    None if that finds no such point."""
    small, ratio = 1e-6 * torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    temperature = 1.0
    while True:
        loss = theory.online_preference_loss(game.preference, game.reference, temperature, "dpo")

        def field(ratio, loss=loss, temperature=temperature):
            policy = torch.softmax(
                game.reference.log() + ratio, -1
            )  # its factor vanishes at every corner: out
            return theory.gradient(loss, policy.log()) / policy / temperature + ratio.mean()

        for _ in range(50):
            value = field(ratio)
            if value.norm() < 1e-12:
                break
            jacobian = torch.stack([(field(ratio + step) - field(ratio - step)) / 2e-6 for step in small], 1)
            step, damping = torch.linalg.solve(jacobian, value), 1.0
            while damping > 1e-6 and not field(ratio - damping * step).norm() <= value.norm():
                damping /= 2
            ratio = ratio - damping * step
        if temperature == tau:
            return torch.softmax(game.reference.log() + ratio, -1) if field(ratio).norm() < 1e-9 else None
        cooler = max(tau, 0.7 * temperature)
        ratio, temperature = ratio * temperature / cooler, cooler


def exploitability(preference: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
    """(...,) what the best answer wins against a policy (..., 3) beyond a tie, by `cleanalign.games`."""
    flat = [
        games.mixture_exploitability(preference.tolist(), row) for row in policies.reshape(-1, 3).tolist()
    ]
    return torch.tensor(flat, dtype=torch.float64).view(policies.shape[:-1])


# ---------------------------------------------------------------------------------------------
# the page
# ---------------------------------------------------------------------------------------------


def numbers(chosen: list[Game], family: Family) -> torch.Tensor:
    """(B, 4, K) whole numbers of every path of a family at the kept frames: the first two shares, KL(π‖μ),
    exploitability."""
    paths = walk(family.key, batch_of(family, chosen))[frames()].transpose(0, 1)  # (B, K, 3)
    per_game, parts = len(paths) // len(chosen), []
    for game, part in zip(chosen, paths.split(per_game), strict=True):
        kl = torch.special.xlogy(part, part / game.reference).sum(-1)
        excess = exploitability(game.preference, part)
        parts.append(torch.stack([SHARE * part[..., 0], SHARE * part[..., 1], NATS * kl, GAP * excess], 1))
    return torch.cat(parts).round().to(torch.int64)


def packed(values: torch.Tensor) -> bytes:
    """(..., K) whole numbers as bytes: second differences along the last axis, their signs folded in, seven
    bits a byte."""
    steps = torch.diff(values, dim=-1, prepend=torch.zeros_like(values[..., :1]))
    turns = torch.diff(steps, dim=-1, prepend=torch.zeros_like(values[..., :1]))
    out = bytearray()
    for turn in turns.flatten().tolist():
        folded = 2 * turn if turn >= 0 else -2 * turn - 1
        while folded > 127:
            out.append(128 | folded & 127)
            folded >>= 7
        out.append(folded)
    return bytes(out)


def described(game: Game) -> dict:
    """A game as the page shows it, its resting points with it: one for each family and setting."""

    def point(policy):
        if policy is None:
            return None
        kl, excess = theory.kl(policy, game.reference).item(), exploitability(game.preference, policy).item()
        return [round(x, 6) for x in (*policy.tolist(), kl, excess)]

    flat, unique = games.nash(game.preference.tolist())
    taus = sorted({tau for family in FAMILIES.values() for tau in family.knobs[0].values})
    return {
        "key": game.key, "name": game.name, "corners": game.corners, "about": game.about,
        "P": [[round(p, 6) for p in row] for row in game.preference.tolist()],
        "mu": [round(p, 6) for p in game.reference.tolist()],
        "reward": [round(r, 4) for r in game.reward().tolist()],
        "flat": point(theory.vector(*flat).clamp(min=1e-12)) if unique else None,
        "nash": {f"{tau:g}": point(theory.regularised_nash(game.preference, game.reference, tau))
                 for tau in taus},
        "starts": [[name, [round(p, 6) for p in start.tolist()]] for name, start in game.starts().items()],
        "rest": {key: [point(rest(game, key, *(*setting, 0.0)[:2])) for setting in family.grid()]
                 for key, family in FAMILIES.items()},
    }  # fmt: skip


def data(chosen: list[Game]) -> dict:
    """Everything the page shows. `paths` is base64 of deflated `packed` numbers, family after family."""
    stream = b"".join(packed(numbers(chosen, family)) for family in FAMILIES.values())
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = squeezer.compress(stream) + squeezer.flush()
    return {
        "games": [described(game) for game in chosen],
        "families": {key: [vars(knob) for knob in family.knobs] for key, family in FAMILIES.items()},
        "algorithms": [dict(zip(("key", "name", "family", "fixed", "script", "about"), row))
                       for row in ALGORITHMS],
        "frames": frames(), "units": [SHARE, SHARE, NATS, GAP], "torch": torch.__version__.split("+")[0],
        "paths": base64.b64encode(deflated).decode(),
    }  # fmt: skip


def page(content: dict) -> str:
    """The template with the data in it, and a policy that lets only its own script run, without a network."""
    text = TEMPLATE.read_text()
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    block = json.dumps(content, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return text.replace("SCRIPT_HASH", digest).replace("PAGE_DATA", block)


def main() -> None:
    """Write docs/games.html."""
    torch.set_num_threads(1)  # tensors of a few thousand entries: a second thread only waits
    PAGE.write_text(page(data(all_games())))
    print(f"{PAGE.relative_to(HERE.parent)}  {PAGE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
