"""What published RL trainers compute, each from its own formulas in float64, one sample and step at a time.

Nothing of soar_mega is used here. x and x' are the states before and after a step from sigma s down to s', v the
velocity at x; `top` is the sampler's second sigma, which stands in for a sigma of 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class Step:
    """A step that was drawn: its states, and the velocity by which it was drawn."""

    x: Tensor
    following: Tensor
    drawn_by: Tensor
    s: float
    s_next: float
    top: float


def flow_sde(step: Step, v: Tensor, level: float) -> tuple[Tensor, Tensor, float, float]:
    """flow_grpo, UniRL, Flow-Factory, verl-omni: (log-probability, mean, std, sqrt(-dt))."""
    s, dt = step.s, step.s_next - step.s
    std = math.sqrt(s / (1 - (step.top if s == 1 else s))) * level
    mean = step.x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return gaussian(step.following, mean, std * math.sqrt(-dt)), mean, std, math.sqrt(-dt)


def dance(step: Step, v: Tensor, level: float) -> tuple[Tensor, Tensor, float, float]:
    """DanceGRPO."""
    s, ds = step.s, step.s_next - step.s
    clean = step.x - s * v
    score = -(step.x - clean * (1 - s)) / s**2
    mean = step.x + ds * v + (-0.5 * level**2 * score) * ds
    return gaussian(step.following, mean, level * math.sqrt(-ds)), mean, level, math.sqrt(-ds)


def cps(step: Step, v: Tensor, level: float) -> tuple[Tensor, Tensor, float, float]:
    """Coefficients-preserving sampling, as all of them have it: no constants in the log-probability."""
    std = step.s_next * math.sin(level * math.pi / 2)
    clean, noise = step.x - step.s * v, step.x + (1 - step.s) * v
    mean = clean * (1 - step.s_next) + noise * math.sqrt(step.s_next**2 - std**2)
    return -((step.following - mean) ** 2).mean(), mean, std, math.sqrt(step.s - step.s_next)


def gaussian(value: Tensor, mean: Tensor, std: float) -> Tensor:
    log_density = -((value - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return log_density.mean()


TRANSITIONS: dict[str, Callable[..., tuple[Tensor, Tensor, float, float]]] = {
    "flow_sde": flow_sde,
    "dance": dance,
    "cps": cps,
}


@dataclass
class Grpo:
    """A trainer's loss of one step: clipping, the ratio, and the distance from the reference."""

    variant: str
    level: float
    clip: float
    advantage_clip: float = math.inf
    guard: str = ""  # flow_grpo | flow_factory
    kl: str = ""  # mean | latents | velocity
    kl_beta: float = 0.0

    def loss(self, step: Step, v: Tensor, reference: Tensor, advantage: float) -> Tensor:
        transition = TRANSITIONS[self.variant]
        now, mean, std, root = transition(step, v, self.level)
        before, mean_before, _, _ = transition(step, step.drawn_by, self.level)
        change = now - before
        if self.guard == "flow_grpo":
            bias = (mean - mean_before).pow(2).mean() / (2 * (root * std) ** 2)
            ratio = torch.exp((change + bias) * (root * std))
        elif self.guard == "flow_factory":
            scale = root * std
            ratio = torch.exp(change * scale + (mean - mean_before).pow(2).mean() / (2 * scale))
        else:
            ratio = torch.exp(change)
        a = min(max(advantage, -self.advantage_clip), self.advantage_clip)
        loss = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - self.clip, 1 + self.clip))
        if self.guard == "flow_grpo":
            loss = loss / root**2
        if self.kl:
            of_mean = (mean - transition(step, reference, self.level)[1]).pow(2).mean()
            distance = {
                "mean": of_mean / (2 * std**2),
                "latents": of_mean,
                "velocity": (v - reference).pow(2).mean(),
            }[self.kl]
            loss = loss + self.kl_beta * distance
        return loss


@dataclass
class Nft:
    """DiffusionNFT's loss at one level; `clip` is 5 in all trainers."""

    beta: float
    kl_beta: float = 0.0
    clip: float = 5.0

    def loss(
        self, x0: Tensor, noise: Tensor, t: float, v: Tensor, old: Tensor, reference: Tensor, advantage: float
    ) -> Tensor:
        xt = (1 - t) * x0 + t * noise
        a = min(max(advantage, -self.clip), self.clip)
        r = min(max((a / self.clip) / 2 + 0.5, 0.0), 1.0)
        positive = self.beta * v + (1 - self.beta) * old
        negative = (1 + self.beta) * old - self.beta * v
        terms = []
        for prediction in (positive, negative):
            clean = xt - t * prediction
            weight = (clean - x0).abs().mean().detach().clamp(min=1e-5)
            terms.append(((clean - x0) ** 2 / weight).mean())
        policy = r * terms[0] / self.beta + (1 - r) * terms[1] / self.beta
        return policy * self.clip + self.kl_beta * (v - reference).pow(2).mean()


def nft_decay(step: int, kind: int) -> float:
    """DiffusionNFT's decay of the old policy after so many optimizer steps, of its decay types 1 and 2."""
    flat, rate, hold = {1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}[kind]
    return 0.0 if step < flat else min((step - flat) * rate, hold)


def advantages_of(
    rewards: np.ndarray, prompts: Sequence[int], std_of: Callable[[np.ndarray, np.ndarray], Any]
) -> np.ndarray:
    """(reward - mean of its prompt) / std_of(all rewards, those of the prompt)."""
    found, of = np.zeros(len(rewards)), np.array(prompts)
    for prompt in np.unique(of):
        group = rewards[of == prompt]
        found[of == prompt] = (group - group.mean()) / std_of(rewards, group)
    return found


def mix_grpo_advantages(
    rewards: Sequence[np.ndarray], weights: Sequence[float], prompts: Sequence[int]
) -> np.ndarray:
    """MixGRPO's `advantage_aggr`: each reward is normalised by itself, and their shares are those of the weights."""
    merged = np.zeros(len(prompts))
    for values, weight in zip(rewards, weights, strict=True):
        merged += advantages_of(values, prompts, _dance_std) * weight / sum(weights)
    return merged


def mix_grpo_windows(iterations: int, steps: int, size: int, every: int, stride: int) -> list[list[int]]:
    """MixGRPO's progressive windows: the stochastic steps of each of its iterations, rolled back at the end."""
    at, within, largest, windows = 0, 0, steps - 2, []
    for _ in range(iterations):
        windows.append(list(range(at, min(at + size, largest))))
        within += 1
        if within >= every:
            at, within = at + stride, 0
        if at > largest:
            at, within = 0, 0
    return windows


@dataclass
class Trainer:
    """A preset: its deviation of rewards, its loss, and whether samples without an advantage are left out."""

    std_of: Callable[[np.ndarray, np.ndarray], Any]
    loss: Any
    drops: bool = False


def _flow_grpo_std(everything: np.ndarray, group: np.ndarray) -> float:
    return np.std(everything) + 1e-4


def _flow_grpo_std_of_prompt(everything: np.ndarray, group: np.ndarray) -> float:
    return np.std(group) + 1e-4


def _unirl_std(everything: np.ndarray, group: np.ndarray) -> float:
    return np.std(everything, ddof=1) + 1e-8


def _flow_factory_std(everything: np.ndarray, group: np.ndarray) -> float:
    return max(np.std(everything), 1e-6)


def _flow_factory_std_of_prompt(everything: np.ndarray, group: np.ndarray) -> float:
    return max(np.std(group), 1e-6)


def _dance_std(everything: np.ndarray, group: np.ndarray) -> float:
    return np.std(group, ddof=1) + 1e-8


def _verl_std(everything: np.ndarray, group: np.ndarray) -> float:
    return np.std(everything, ddof=1) + 1e-4


def _flow_grpo(beta: float) -> Trainer:
    loss = Grpo("flow_sde", 0.7, 1e-4, 5.0, kl="mean", kl_beta=beta)
    return Trainer(_flow_grpo_std, loss, drops=True)


def _guard(clip: float) -> Trainer:
    return Trainer(_flow_grpo_std_of_prompt, Grpo("flow_sde", 0.7, clip, 5.0, guard="flow_grpo"), drops=True)


_FAST = Trainer(_flow_grpo_std, Grpo("cps", 0.8, 1e-5, 5.0), drops=True)
_DANCE = Trainer(_dance_std, Grpo("dance", 0.3, 1e-4, 5.0))
_NFT = Trainer(_flow_grpo_std, Nft(1.0, 1e-4))
_NFT_NEAR = Trainer(_flow_grpo_std, Nft(0.1, 1e-4))

TRAINERS: dict[str, Trainer] = {
    "flow_grpo_ocr": _flow_grpo(0.04),
    "flow_grpo_geneval": _flow_grpo(0.04),
    "flow_grpo_pickscore": _flow_grpo(0.01),
    "flow_grpo_clipscore": _flow_grpo(0.02),
    "flow_grpo_geneval_fast": _FAST,
    "flow_grpo_pickscore_fast": _FAST,
    "grpo_guard_ocr": _guard(2e-6),
    "grpo_guard_geneval": _guard(2e-6),
    "grpo_guard_pickscore": _guard(4e-6),
    "unirl_grpo": Trainer(_unirl_std, Grpo("flow_sde", 0.7, 1e-4)),
    "flow_factory_grpo": Trainer(_flow_factory_std, Grpo("flow_sde", 0.8, 1e-4, 5.0)),
    "flow_factory_grpo_fast": Trainer(_flow_factory_std, Grpo("cps", 0.8, 1e-4, 5.0)),
    "flow_factory_guard": Trainer(_flow_factory_std, Grpo("flow_sde", 0.8, 1e-4, 5.0, guard="flow_factory")),
    "dance_grpo": _DANCE,
    "dance_grpo_lora": _DANCE,
    "mix_grpo": Trainer(_dance_std, Grpo("flow_sde", 0.7, 1e-4, 5.0)),
    "verl_omni_ocr": Trainer(_verl_std, Grpo("cps", 0.8, 1e-5, 5.0)),
    "diffusion_nft_geneval": _NFT,
    "diffusion_nft_pickscore": _NFT,
    "diffusion_nft_hpsv2": _NFT,
    "diffusion_nft_ocr": _NFT_NEAR,
    "diffusion_nft_multi_reward": _NFT_NEAR,
    "unirl_nft": Trainer(_unirl_std, Nft(1.0)),
    "flow_factory_nft": Trainer(_flow_factory_std_of_prompt, Nft(1.0)),
}


def dpm2(velocity: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """DiffusionNFT's sampler: multistep DPM-Solver of order 2, whose first and last steps are of order 1."""
    clean_before: Tensor | None = None
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        clean = x - s * velocity(x, s)
        if clean_before is None or i == len(sigmas) - 2:
            x = (1 - t) * clean + t * (x - (1 - s) * clean) / s  # DDIM with eta 0
        else:
            lambdas = [
                math.inf if u == 0 else -math.inf if u == 1 else math.log(1 - u) - math.log(u)
                for u in (t, s, sigmas[i - 1])
            ]
            h, h_before = lambdas[0] - lambdas[1], lambdas[1] - lambdas[2]
            d0, d1 = clean, (clean - clean_before) / (h_before / h)
            factor = (1 - t) * (math.exp(-h) - 1)
            x = t / s * x - factor * d0 - 0.5 * factor * d1
        clean_before = clean
    return x
