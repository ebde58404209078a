r"""Self-Rewarding Language Models: the whole training loop in one file.

A language model writes several answers to a prompt, grades them itself through a judge prompt, and
is trained to prefer the answer that it graded best to the one that it graded worst. Repeat. In the
small world built into this file the true score of every answer is known, and the answers end up
better than the demonstrations that the model was first taught from.

    python srlm.py              # about two minutes on a laptop CPU: M0, M1, M2, M3
    python srlm.py --quick      # the same path with smaller numbers
    python srlm.py ask checkpoints/3.self-reward.pt "sort dbca"

Sources, cited below by number:
  [1] arXiv:2401.10020  Self-Rewarding Language Models (Yuan et al.): the loop, its judge, figures
  [2] arXiv:2305.18290  Direct Preference Optimization (Rafailov et al.): the loss
  [3] arXiv:2401.01335  Self-Play Fine-Tuning, SPIN (Chen et al.): the same loss, data against self
  [4] arXiv:2402.04792  Online AI Feedback (Guo et al.): another model as the judge
  [5] arXiv:2404.19733  Iterative RPO (Pang et al.): DPO that keeps hold of the chosen answers

Left out, and why: a KV cache and mixed precision hide the algorithm; dropout, so that the DPO loss
starts at exactly log 2; a pretrained model, since any causal one fits (section 2 says how).

Shapes: B batch, T time (tokens), V vocabulary, N candidates of one prompt, P prompts, H heads,
D width of the model.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import re
import sys
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm


def _require(condition: bool, complaint: str) -> None:
    """Wrong input gets one line that says what is wrong and where."""
    if not condition:
        raise ValueError(complaint)


def _bar(steps: Sequence, what: str) -> tqdm:
    """A progress bar for whatever takes longer than two seconds, where a terminal shows it."""
    hidden = _processes()[0] > 0 or None  # None: tqdm shows it in a terminal alone
    return tqdm(steps, what, delay=2, leave=False, dynamic_ncols=True, disable=hidden)


# Several processes, as torchrun starts them, share the work out by the five functions that follow.
# In a process that is alone they do nothing, and may be skipped at a first reading.


def _join_processes() -> None:
    """Meets the other processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from now on
        from torch.distributed import nn as _  # if imported later, it would keep the group alive
        dist.init_process_group(timeout=datetime.timedelta(days=1))  # gloo on CPU, nccl on CUDA
        atexit.register(dist.destroy_process_group)


def _processes() -> tuple[int, int]:
    """(which process this is, of how many); process 0 is the main one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _on_main(work: Callable[[], Any]) -> Any:
    """What work() returns, which the main process does, and tells the others."""
    rank, n = _processes()
    result = [work() if rank == 0 else None]
    if n > 1:
        dist.broadcast_object_list(result)
    return result[0]


def _shared(work: Callable[[Any], Any], pieces: Sequence, what: str) -> list:
    """[work(piece) for piece in pieces]: each process does its share, and gets the whole."""
    rank, n = _processes()
    shares = [[work(piece) for piece in _bar(pieces[rank::n], what)]]
    if n > 1:
        mine, shares = shares[0], [None] * n
        dist.all_gather_object(shares, mine)
    return [shares[i % n][i // n] for i in range(len(pieces))]


def _sum(*tensors: Tensor) -> None:
    """Puts in the place of each tensor its sum over the processes."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


# ================================================================================================
# 1. Text and tokens
# ================================================================================================
# A token is one byte of UTF-8. Two ids lie beyond the bytes, so that no text can contain them.
# In production: a learned vocabulary of some 100,000 pieces, about four bytes each.

EOS = 256  # end of sequence: the model says that its answer is complete
PAD = 257  # fills up the short rows of a batch; no model ever sees it
VOCAB_SIZE = 258


def encode(text: str) -> list[int]:
    """UTF-8 bytes of the text. (A lone surrogate, which is no character, becomes "?".)"""
    return list(text.encode("utf-8", errors="replace"))


def decode(ids: Sequence[int] | Tensor) -> str:
    """The text of the ids, special ones dropped. Never raises: what is no UTF-8 becomes U+FFFD."""
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


# ================================================================================================
# 2. The model
# ================================================================================================
# All later sections ask one thing of a model, the CONTRACT: a causal nn.Module from ids (B, T) to
# logits (B, T, V), where the logits at position t depend on ids[:, :t+1] and on nothing later.
# Padding is always on the right and replaced by a valid id, so a causal model needs no mask for it.
# Two extras are used where a model has them:
#   max_seq_len                       the longest T that it takes
#   next_token_logits(ids, lengths)   (B, T), (B,) -> (B, V), the logits at position lengths - 1;
#                                     the seam where a KV cache would go


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the built-in Transformer; the default has 0.16 million parameters."""

    vocab_size: int = VOCAB_SIZE
    dim: int = 64  # D, the width of the residual stream
    depth: int = 4  # blocks; to compare two words letter by letter takes several
    heads: int = 2  # H; few and wide, since on a CPU attention costs by the head
    max_seq_len: int = 256  # tokens, prompt and answer together
    mlp_ratio: int = 2  # width of the MLP, in multiples of dim

    def __post_init__(self):
        _require(self.dim % (2 * self.heads) == 0,
                 f"ModelConfig: dim={self.dim} is no multiple of 2 * heads={2 * self.heads}")


class Block(nn.Module):
    """Attention, then an MLP, each reading a normalised copy of the stream x and adding to it.

    In production: RMSNorm, a wider MLP with a gate, keys shared by several queries. At this size, a
    narrow MLP and more updates in the same time teach a better judge.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, dim, wide = config.heads, config.dim, config.mlp_ratio * config.dim
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim, bias=False)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, wide, bias=False)
        self.down = nn.Linear(wide, dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor, read: Tensor | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); or -> (B, 1, D) where `read` (B,) says the one position of each
        row that anybody will read. turns (T, D/2H): the rotary angles as complex numbers."""
        qkv = self.to_qkv(self.attention_norm(x))
        qkv = rearrange(qkv, "b t (n h d) -> n b h t d", n=3, h=self.heads)  # (3, B, H, T, D/H)
        # Rotary positions: two features make a complex number, which its position turns. The dot
        # product of a query and a key then depends on how far apart they are, not on where.
        pairs = torch.view_as_complex(qkv[:2].unflatten(-1, (-1, 2)))  # (2, B, H, T, D/2H)
        q, k = torch.view_as_real(pairs * turns).flatten(-2)  # (B, H, T, D/H) each
        if read is None:
            mixed = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        else:
            row = torch.arange(len(x), device=x.device)
            x, q = x[row, read, None], q[row, :, read, None]  # (B, 1, D), (B, H, 1, D/H)
            past = torch.arange(k.shape[2], device=x.device) <= read[:, None]  # (B, T)
            mixed = F.scaled_dot_product_attention(q, k, qkv[2], attn_mask=past[:, None, None])
        x = x + self.to_out(rearrange(mixed, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A small decoder that fulfils the contract; `generator` draws its initial weights."""

    def __init__(self, config=ModelConfig(), generator: torch.Generator | None = None):
        super().__init__()
        self.config, self.max_seq_len = config, config.max_seq_len
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.to_logits = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # the gains of the norms stay at one
                fan_in = config.dim if name.startswith("embedding") else weight.shape[1]
                adds = name.endswith(("to_out.weight", "down.weight"))  # start small, being many
                nn.init.normal_(weight, std=(fan_in * (2 * config.depth if adds else 1)) ** -0.5,
                                generator=generator)
        speed = 10_000.0 ** -torch.linspace(0, 1, config.dim // config.heads // 2)  # radians
        angle = torch.arange(config.max_seq_len)[:, None] * speed
        turns = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
        self.register_buffer("turns", turns, persistent=False)  # real: .to(dtype) keeps both parts

    def _hidden(self, ids: Tensor, read: Tensor | None = None) -> Tensor:
        _require(ids.shape[1] <= self.max_seq_len,
                 f"Transformer: {ids.shape[1]} tokens, but max_seq_len={self.max_seq_len}")
        x, turns = self.embedding(ids), torch.view_as_complex(self.turns[: ids.shape[1]])
        for block in self.blocks[:-1]:
            x = block(x, turns)
        return self.norm(self.blocks[-1](x, turns, read))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V)."""
        return self.to_logits(self._hidden(ids))

    def next_token_logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """ids (B, T), lengths (B,) -> (B, V): forward(ids)[row, length - 1] for less, since the
        last block and the vocabulary are computed for that one position alone."""
        return self.to_logits(self._hidden(ids, read=lengths - 1)).squeeze(1)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _frozen(model: nn.Module):
    """Evaluation mode and no gradients inside; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# ================================================================================================
# 3. Sampling
# ================================================================================================
# A logit filter maps logits (B, V) to logits (B, V), with -inf where a token must not be drawn.


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k largest logits of each row, and what ties with the k-th: (B, V) -> (B, V)."""
    _require(k >= 1, f"top_k: k must be at least 1, got {k}")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest most likely tokens whose probabilities reach p: (B, V) -> (B, V).

    Nucleus sampling, arXiv:1904.09751. The most likely token survives even where p is 0.
    """
    _require(0 <= p <= 1, f"top_p: p must lie between 0 and 1, got {p}")
    order = logits.argsort(dim=-1, descending=True, stable=True)
    probs = logits.gather(-1, order).softmax(-1)
    excluded = probs.cumsum(-1) - probs >= p  # the tokens before it suffice already
    excluded[..., 0] = False
    return logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -math.inf)


def _as_rows(prompts: Sequence[Sequence[int] | Tensor] | Tensor, pad_id: int) -> list[Tensor]:
    """The prompts as 1-D tensors; of a row of a padded (B, T) tensor what the padding encloses."""
    if not isinstance(prompts, Tensor):
        return [torch.as_tensor(prompt, dtype=torch.long).cpu() for prompt in prompts]
    real = [(row != pad_id).nonzero().flatten().tolist() or [1, 0] for row in prompts]  # or empty
    return [row[at[0] : at[-1] + 1].cpu() for row, at in zip(prompts, real)]


def _next_token_logits(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, T), (B,) -> (B, V), in pieces of some thousand tokens: small enough for the cache of a
    CPU, and none padded beyond its own longest row."""
    read = getattr(model, "next_token_logits", None) or (
        lambda ids, lengths: model(ids)[torch.arange(len(ids), device=ids.device), lengths - 1])
    pieces = (tensor.split(max(1, 4096 // ids.shape[1])) for tensor in (ids, lengths))
    return torch.cat([read(piece[:, : int(n.max())], n) for piece, n in zip(*pieces)])


def sample(model: nn.Module, prompts: Sequence[Sequence[int] | Tensor] | Tensor, *,
           max_new_tokens: int, temperature: float = 1.0,
           logit_filter: Callable[[Tensor], Tensor] | None = None, eos_id: int | None = EOS,
           pad_id: int = PAD, generator: torch.Generator | None = None) -> list[Tensor]:
    """Continues each prompt; returns the NEW tokens of each, with its EOS if one was drawn.

    prompts: 1-D id sequences of any lengths, or a (B, T) tensor padded left or right with pad_id;
    an EOS inside is an ordinary token. A row ends at EOS (eos_id=None: never there), after
    max_new_tokens, or where the model's max_seq_len is full. Token probabilities are
    softmax(logit_filter(logits / temperature)); temperature 0 takes the most likely token. All
    noise is drawn first, one uniform number per row and step, so no row depends on its neighbours.
    Raises ValueError for an empty prompt, one without room to go on, and NaN or infinite logits.

    Cost: every new token runs the model over its whole row, B * new * (prompt + new) tokens in all.
    A KV cache would run B * (prompt + new), at the price of memory and bookkeeping.
    """
    prompts, limit = _as_rows(prompts, pad_id), getattr(model, "max_seq_len", math.inf)
    _require(max_new_tokens >= 1, f"sample: max_new_tokens = {max_new_tokens}, not 1 or more")
    _require(temperature >= 0, f"sample: temperature = {temperature}, not 0 or more")
    for i, prompt in enumerate(prompts):
        _require(0 < len(prompt) < limit, f"sample: prompt {i} has {len(prompt)} tokens; it needs "
                 f"one, and room for one more within max_seq_len={limit}")
    if not prompts:
        return []
    device, noise = _device_of(model), torch.rand(len(prompts), max_new_tokens, generator=generator)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths meet
    prompts, noise = [prompts[i] for i in order], noise[order].to(device)
    start = [len(prompt) for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # causal: what fills up is not seen
    ids = F.pad(ids, (0, max_new_tokens)).to(device)  # (B, longest + new)
    lengths = torch.tensor(start, device=device)
    # Rows with equal prompts, as candidates and judgements have, stay twins until their draws
    # differ. Twins bear one number and share one pass through the model.
    number: dict[tuple, int] = {}
    twin = [number.setdefault(tuple(prompt.tolist()), len(number)) for prompt in prompts]
    twin, rows = torch.tensor(twin, device=device), torch.arange(len(prompts), device=device)
    with _frozen(model):
        for step in _bar(range(max_new_tokens), "sampling"):  # rows (R,) go on; twin (R,) in 0..G-1
            one = rows.new_zeros(int(twin.max()) + 1).scatter_(0, twin, rows)  # (G,) a row of each
            logits = _next_token_logits(model, ids[one], lengths[one])  # (G, V)
            logits = logits / temperature if temperature > 0 else logits
            logits = logits if logit_filter is None else logit_filter(logits)
            _require(bool(logits.amax(-1).isfinite().all()),
                     f"sample: NaN or infinite logits at new token {step}")
            if temperature == 0:
                token = logits.argmax(-1)[twin]  # (R,)
            else:  # the first token at which the cumulated probability exceeds the noise
                cumulated = logits.double().softmax(-1).cumsum(-1)[twin]  # (R, V)
                level = noise[rows, step, None] * cumulated[:, -1:]
                token = torch.searchsorted(cumulated, level, right=True).squeeze(1)
            ids[rows, lengths[rows]] = token
            lengths[rows] += 1
            going = lengths[rows] < limit
            if eos_id is not None:
                going &= token != eos_id
            rows = rows[going]
            if len(rows) == 0:
                break
            _, twin = torch.unique((twin * logits.shape[1] + token)[going], return_inverse=True)
    new = [row[a:b].clone() for row, a, b in zip(ids.cpu(), start, lengths.tolist())]
    return [new[place] for place in np.argsort(order)]


# ================================================================================================
# 4. Log-probabilities and losses
# ================================================================================================
# A row of ids holds a prompt, its response and, on the right, padding; prompt_lens says where the
# response begins. The shift (logits at t speak of token t + 1) and the mask (only the response
# counts) are settled here once, and every loss goes through sequence_logprobs.


def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """log p(ids[:, t+1] | ids[:, :t+1]) for every t: ids (B, T) -> (B, T-1), in nats."""
    logits = model(ids[:, :-1])  # (B, T-1, V)
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -nll.view(len(ids), -1)


def _lengths(ids: Tensor, pad_id: int) -> Tensor:
    """Tokens before the padding, which is the run of pad_id at the end: (B, T) -> (B,)."""
    return ((ids != pad_id) * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(dim=1)


def response_mask(ids: Tensor, prompt_lens: Tensor, pad_id: int = PAD) -> Tensor:
    """True where ids[:, t+1], which is predicted at t, belongs to the response: -> (B, T-1) bool.

    EOS belongs to it, padding does not: "p p r r EOS PAD" with prompt_len 2 gives F T T T F. The
    very first token has nothing before it to be predicted from, so prompt_len 0 means 1.
    """
    predicted = torch.arange(1, ids.shape[1], device=ids.device)
    return (predicted >= prompt_lens[:, None]) & (predicted < _lengths(ids, pad_id)[:, None])


def sequence_logprobs(model: nn.Module, ids: Tensor, prompt_lens: Tensor,
                      pad_id: int = PAD) -> Tensor:
    """log p(response | prompt), the SUM over its tokens: ids (B, T), prompt_lens (B,) -> (B,).

    The sum, as in [2] and [3]. A mean over tokens, which some code takes, is not the log of any
    probability, and the derivation of DPO no longer holds for it.
    """
    padding = torch.arange(ids.shape[1], device=ids.device) >= _lengths(ids, pad_id)[:, None]
    logprobs = token_logprobs(model, ids.masked_fill(padding, 0))  # (B, T-1)
    return logprobs.masked_fill(~response_mask(ids, prompt_lens, pad_id), 0).sum(dim=1)


def sft_loss(model: nn.Module, ids: Tensor, prompt_lens: Tensor, pad_id: int = PAD) -> Tensor:
    """Supervised fine-tuning: mean negative log-likelihood per response token, in nats; scalar.

    Zero, with zero gradient, where no row has a response.
    """
    n_tokens = response_mask(ids, prompt_lens, pad_id).sum()
    return -sequence_logprobs(model, ids, prompt_lens, pad_id).sum() / n_tokens.clamp(min=1)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor,
             ref_rejected: Tensor, *, beta: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Preference Optimization, Eq. 7 of [2]; all tensors (B,), from sequence_logprobs.

        L = -log sigmoid( beta log pi(y_w|x)/ref(y_w|x) - beta log pi(y_l|x)/ref(y_l|x) )

    y_w is the chosen, y_l the rejected response. Returns the losses and the implicit rewards
    beta log pi/ref of chosen and rejected, detached. At pi = ref the loss is log 2. Only the
    difference counts: the log-probability of the chosen response may well fall.
    """
    rewards_chosen = beta * (policy_chosen - ref_chosen)
    rewards_rejected = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(rewards_chosen - rewards_rejected)
    return losses, rewards_chosen.detach(), rewards_rejected.detach()


def spin_loss(policy_real: Tensor, policy_generated: Tensor, opponent_real: Tensor,
              opponent_generated: Tensor, *, lam: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Self-play fine-tuning, Eq. 4.7 of [3] with its logistic l(t) = log(1 + exp(-t)).

    The SAME function as dpo_loss, seen from another paper: the demonstration is the chosen
    response, the opponent (the model as the round began) is the reference and wrote the rejected
    one. Beware of the letters: SPIN's lambda is DPO's beta.
    """
    return dpo_loss(policy_real, policy_generated, opponent_real, opponent_generated, beta=lam)


# ================================================================================================
# 5. The judge
# ================================================================================================
# A judge is a model that is shown a prompt and a response and replies with a verdict in words, from
# which a score is read. Templates hold {{ variables }}; any other brace is an ordinary character.
# A model judges better than it writes where checking is easier than doing; on this difference the
# whole loop lives, and it ends when the difference does.

_VARIABLE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_NUMBER = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"


def _checked_template(name: str, template: str, needs: Sequence[str]) -> str:
    """The template, dedented; ValueError where its variables are not those that it needs."""
    template = textwrap.dedent(template)
    found = _VARIABLE.findall(template)
    for variable in {*needs, *found}:
        in_template = f"{{{{ {variable} }}}} in the {name} {template!r}"
        _require(variable in needs, f"unknown variable {in_template}; known: {', '.join(needs)}")
        _require(variable in found, f"there is no {in_template}")
        _require(variable != "reward" or found.count(variable) == 1, f"more than one {in_template}")
    return template


def _render(template: str, **values: str) -> str:
    """One pass: braces that come in with a value stay as they are."""
    return _VARIABLE.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True)
class RewardConfig:
    """How to ask a judge for a score, and how to read the score out of its reply.

    prompt_template: what the judge is shown, with {{ prompt }} and {{ response }}.
    reward_regex_template: what its verdict looks like, with one {{ reward }} and otherwise literal
        text, in which case does not matter and any run of white space equals any other.
    parse_reward: your own reading of the reply, instead of that template.
    Raises ValueError, with the template, for a missing, repeated or unknown variable.
    """

    prompt_template: str
    reward_regex_template: str
    parse_reward: Callable[[str], float | None] | None = None

    def __post_init__(self):
        needs = {"prompt_template": ["prompt", "response"], "reward_regex_template": ["reward"]}
        for name, variables in needs.items():
            object.__setattr__(self, name, _checked_template(name, getattr(self, name), variables))

    def render(self, prompt: str, response: str) -> str:
        """The judge prompt for one response."""
        return _render(self.prompt_template, prompt=prompt, response=response)

    def parse(self, reply: str) -> float | None:
        """The reward in the LAST match of the reply, None where there is none. Never raises, unless
        your own parse_reward does."""
        if self.parse_reward is not None:
            return self.parse_reward(reply)
        before, after = (r"\s+".join(map(re.escape, re.split(r"\s+", literal)))
                         for literal in _VARIABLE.split(self.reward_regex_template.strip())[::2])
        # A number must not be entered in its middle: 12 is not 2, and the search stays linear.
        found = re.findall((before or "(?<![0-9])") + _NUMBER + after, reply, flags=re.IGNORECASE)
        reward = float(found[-1]) if found else math.nan
        return reward if math.isfinite(reward) else None


DEFAULT_REWARD_CONFIG = RewardConfig(
    prompt_template="""
    Below are a user's request and an assistant's answer. Grade the answer by adding up points,
    each of which is earned on its own:

    - 1 point if the answer is about what was asked, even where it is incomplete.
    - 1 point if it covers most of the request, although something is still missing.
    - 1 point if it does all that was asked and could be used as it stands.
    - 1 point if it is written for this user: clear, well ordered, to the point.
    - 1 point if an expert would find nothing to add, to cut or to correct.

    Request: {{ prompt }}

    Answer: {{ response }}

    First explain your grade in at most 100 words. Then end with one line of the form
    Score: <total points, 0 to 5>
    """,
    reward_regex_template="Score: {{ reward }}")
"""For a real chat model. Additive, after the idea of Figure 2 of [1]: adding up points agreed with
people on 65 % of the pairs of answers, choosing one of five descriptions on 27 %."""


def _text_of(ids: Tensor, decode: Callable, eos_id: int | None) -> str:
    """The text of sampled ids without the EOS that may end them."""
    return decode(ids[:-1] if eos_id is not None and len(ids) and ids[-1] == eos_id else ids)


def judge(model: nn.Module, reward_config: RewardConfig, prompts: Sequence[str],
          responses: Sequence[str], *, encode: Callable = encode, decode: Callable = decode,
          n_samples: int = 3, max_new_tokens: int = 160, temperature: float = 0.7,
          logit_filter: Callable | None = None, eos_id: int | None = EOS,
          is_valid_reward: Callable[[float], bool] | None = None,
          generator: torch.Generator | None = None,
          on_reply: Callable[[str], None] | None = None) -> Tensor:
    """The model's score of each response: (B,) float, NaN where it gave none.

    Every response is judged n_samples times (3 in [1]), all in one batch. Replies without a score,
    or with one that is not valid, are dropped, and the others averaged. Only the judge's own words
    are parsed, so a response that says "Score: 5" earns nothing by it. on_reply is shown each
    reply. Raises ValueError where a judge prompt leaves the model no room to reply.
    """
    _require(len(prompts) == len(responses),
             f"judge: {len(prompts)} prompts but {len(responses)} responses")
    asked = [torch.as_tensor(encode(reward_config.render(*pair)), dtype=torch.long)
             for pair in zip(prompts, responses)]
    replies = sample(model, [ids for ids in asked for _ in range(n_samples)], eos_id=eos_id,
                     max_new_tokens=max_new_tokens, temperature=temperature,
                     logit_filter=logit_filter, generator=generator)
    rewards = []
    for reply in (_text_of(ids, decode, eos_id) for ids in replies):
        reward = reward_config.parse(reply)
        valid = reward is not None and math.isfinite(reward)
        valid = valid and (is_valid_reward is None or is_valid_reward(reward))
        rewards.append(reward if valid else math.nan)
        if on_reply is not None:
            on_reply(reply)
    return torch.tensor(rewards, dtype=torch.float).view(len(prompts), n_samples).nanmean(dim=1)


# ================================================================================================
# 6. Preference pairs
# ================================================================================================
# Wherever rewards come from (the model itself, another model, a program), there is one interface:
#     reward_fn(prompts: list[str], responses: list[str]) -> (B,), with NaN for "no opinion"


class PreferencePair(NamedTuple):
    prompt: Tensor  # ids of the model input, 1-D
    chosen: Tensor  # ids of the better response
    rejected: Tensor  # ids of the worse one
    chosen_reward: float
    rejected_reward: float


def pick_best_worst(rewards: Tensor) -> tuple[int, int] | None:
    """The best against the worst of (N,) rewards, as in [1]; None where no two differ."""
    known = (~rewards.isnan()).nonzero().flatten()
    if len(known) == 0 or rewards[known].min() == rewards[known].max():
        return None
    return int(known[rewards[known].argmax()]), int(known[rewards[known].argmin()])


def pick_best_random(rewards: Tensor) -> tuple[int, int] | None:
    """The best against any worse one, so that the rejected are of every quality."""
    if (picked := pick_best_worst(rewards)) is None:
        return None
    worse = (rewards < rewards[picked[0]]).nonzero().flatten()
    return picked[0], int(worse[torch.randint(len(worse), ())])


def pick_random_pair(rewards: Tensor) -> tuple[int, int] | None:
    """Any two, the better one chosen; None where the two that were drawn do not differ."""
    two = torch.randperm(len(rewards))[:2]
    picked = pick_best_worst(rewards[two])
    return picked and (int(two[picked[0]]), int(two[picked[1]]))


@dataclass(frozen=True)
class TextFormat:
    """How text becomes model input and back."""

    encode: Callable[[str], Sequence[int] | Tensor] = encode
    decode: Callable[[Tensor], str] = decode
    chat_template: str = "{{ prompt }}"  # how an instruction becomes model input
    eos_id: int | None = EOS
    pad_id: int = PAD  # at the end of a training item it counts for nothing

    def __post_init__(self):
        _checked_template("chat_template", self.chat_template, ["prompt"])

    def _ids(self, text: str) -> Tensor:
        return torch.as_tensor(self.encode(text), dtype=torch.long)

    def prompt_ids(self, prompt: str) -> Tensor:
        _require(isinstance(prompt, str), f"a prompt is a text, not a {type(prompt).__name__}")
        return self._ids(_render(self.chat_template, prompt=prompt))

    def item(self, prompt: str, response: str) -> tuple[Tensor, int]:
        """A training item (ids, prompt_len): prompt, response and EOS."""
        ids, end = self.prompt_ids(prompt), [] if self.eos_id is None else [self.eos_id]
        return torch.cat((ids, self._ids(response), ids.new_tensor(end))), len(ids)

    def text(self, ids: Tensor) -> str:
        return _text_of(ids, self.decode, self.eos_id)


def respond(model: nn.Module, prompts: Sequence[str], text: TextFormat, max_new_tokens: int,
            temperature: float = 1.0) -> list[str]:
    """One response to each prompt."""
    rows = sample(model, [text.prompt_ids(prompt) for prompt in prompts], eos_id=text.eos_id,
                  max_new_tokens=max_new_tokens, temperature=temperature)
    return [text.text(row) for row in rows]


def _seed_of(*numbers: int) -> int:
    """One seed made of all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def _seeded(*numbers: int):
    """Whatever torch draws on the CPU inside, in the sampler as in a user's own function, follows
    from the numbers; after it, torch's generator goes on as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(*numbers))
        yield


def _as_rewards(values: Any, n: int) -> Tensor:
    """What a reward function returned (list, array, tensor; (n,) or (n, 1)) as (n,) floats."""
    try:
        rewards = torch.as_tensor(values).detach().to("cpu", torch.float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"reward function: {type(values).__name__} instead of numbers") from error
    _require(tuple(rewards.shape) in ((n,), (n, 1)),
             f"reward function: {n} responses but rewards of shape {tuple(rewards.shape)}")
    return rewards.reshape(n)


def generate_preferences(
        model: nn.Module, prompts: Sequence[str], reward_fn: Callable, *,
        n_pairs: int | None = None, n_candidates: int = 4, pick_pair: Callable = pick_best_worst,
        is_valid_pair: Callable[[float, float], bool] | None = None, max_passes: int = 1,
        text: TextFormat = TextFormat(), seed: int = 0, replies: Sequence[str] = (), **sampling,
) -> tuple[list[PreferencePair], dict[str, int]]:
    """Writes N candidates for each prompt, rewards them, and picks one pair of each prompt.

    Each of at most max_passes passes visits every prompt once, until there are n_pairs pairs (None:
    as many as come up). A pair counts if chosen and rejected differ in tokens and
    is_valid_pair(chosen_reward, rejected_reward), which is chosen > rejected by default; `sampling`
    (max_new_tokens, temperature, logit_filter) is for sample().

    Returns the pairs and the counts of visits: pairs, unparsed (fewer than two candidates got a
    reward), tied (no two differ) and invalid (the pair was refused). Fewer pairs than asked for is
    a warning; none at all is a ValueError, which also quotes what reward_fn put into `replies`.
    """
    _require(n_candidates >= 2, f"n_candidates must be at least 2, got {n_candidates}")
    is_valid_pair = is_valid_pair or (lambda chosen, rejected: chosen > rejected)

    size = 64  # prompts that are visited at once; their noise is their own, whoever visits them

    def visit(where: tuple[int, int]) -> list[PreferencePair | str]:
        a_pass, at = where
        some, outcomes = prompts[at : at + size], []
        with _seeded(seed, a_pass, at):
            ids = [text.prompt_ids(prompt) for prompt in some]
            rows = sample(model, [row for row in ids for _ in range(n_candidates)],
                          **{"eos_id": text.eos_id, **sampling})
            many = [prompt for prompt in some for _ in range(n_candidates)]
            rewards = _as_rewards(reward_fn(many, [text.text(row) for row in rows]), len(rows))
            for i, mine in enumerate(rewards.split(n_candidates)):
                if (picked := pick_pair(mine)) is None:
                    outcomes.append("tied" if (~mine.isnan()).sum() > 1 else "unparsed")
                    continue
                pair = PreferencePair(ids[i], *(rows[i * n_candidates + j] for j in picked),
                                      *(float(mine[j]) for j in picked))
                valid = not pair.chosen.equal(pair.rejected) and is_valid_pair(*pair[3:])
                outcomes.append(pair if valid else "invalid")
        return outcomes

    visits = [(a_pass, at) for a_pass in range(max_passes) for at in range(0, len(prompts), size)]
    pairs, counts, done = [], dict(pairs=0, unparsed=0, tied=0, invalid=0), 0
    while done < len(visits) and (n_pairs is None or len(pairs) < n_pairs):
        if done * max_passes >= len(visits) and not pairs:
            break  # a whole pass was in vain
        enough = len(visits) if n_pairs is None else math.ceil((n_pairs - len(pairs)) / size)
        some = _shared(visit, visits[done : done + enough], "writing and judging")
        for outcome in sum(some, []):
            counts[outcome if isinstance(outcome, str) else "pairs"] += 1
            pairs += [] if isinstance(outcome, str) else [outcome]
        done += enough
    said = "of {} prompts with {} candidates each: {}".format(
        len(prompts), n_candidates, ", ".join(f"{count} {key}" for key, count in counts.items()))
    quoted = f"; the judge said, for example, {list(replies)}" if replies else ""
    _require(bool(pairs), f"no preference pair came {said}{quoted}")
    if n_pairs is not None and len(pairs) < n_pairs:
        warnings.warn(f"{n_pairs} preference pairs were asked for; {said}", stacklevel=2)
    return pairs[:n_pairs], counts | {"pairs": len(pairs[:n_pairs])}


def propose_prompts(model: nn.Module, n: int, *, known: Sequence[str] = (),
                    text: TextFormat = TextFormat(), is_valid: Callable[[str], bool] | None = None,
                    max_new_tokens: int = 64, max_tries: int = 10, **sampling: Any,
                    ) -> tuple[list[str], dict[str, int]]:
    """New prompts that the model writes itself, where the chat template has its {{ prompt }}; it
    must have learnt to (SFTConfig.loss_on_prompt). [1] shows eight examples to a large model.

    Keeps what is valid, not `known` and not repeated, until there are n or max_tries * n were
    written. Returns the prompts and the counts: written, valid, new.
    """
    header, _, footer = _VARIABLE.split(text.chat_template)
    _require(bool(header and footer), f"propose_prompts: the chat template {text.chat_template!r} "
             "must say where a prompt begins and ends, by text before and after it")
    start = torch.as_tensor(text.encode(header), dtype=torch.long)
    found, counts = dict.fromkeys(known), dict(written=0, valid=0, new=0)
    while counts["new"] < n and counts["written"] < max_tries * n:
        for row in sample(model, [start] * n, max_new_tokens=max_new_tokens, eos_id=text.eos_id,
                          **sampling):
            prompt, end, _ = text.text(row).partition(footer)
            valid = bool(end and prompt.strip()) and (is_valid is None or is_valid(prompt))
            new = valid and prompt not in found
            counts = {key: counts[key] + more for key, more in zip(counts, (1, valid, new))}
            found |= {prompt: None} if new else {}
    return list(found)[len(set(known)) :][:n], counts


def save_pairs(path: str | Path, pairs: Sequence[PreferencePair]) -> None:
    """Writes the pairs as one .npz: all tokens in a row, the lengths, and the rewards (n, 2)."""
    arrays = {"rewards": np.array([pair[3:] for pair in pairs])}
    for i, key in enumerate(("prompt", "chosen", "rejected")):
        arrays[key] = torch.cat([pair[i] for pair in pairs]).numpy()
        arrays[key + "_lengths"] = np.array([len(pair[i]) for pair in pairs])
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    _write(Path(path), buffer.getvalue())


def load_pairs(path: str | Path) -> list[PreferencePair]:
    """Reads what save_pairs wrote; ValueError, with the path, for anything else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = [np.split(file[key], file[key + "_lengths"].cumsum()[:-1])
                       for key in ("prompt", "chosen", "rejected")]
            return [PreferencePair(*map(torch.from_numpy, rows), *map(float, rewards))
                    for *rows, rewards in zip(*columns, file["rewards"], strict=True)]
    except Exception as error:  # numpy raises half a dozen kinds for damaged files
        raise ValueError(f"{path} is no file of preference pairs ({error})") from error


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: under another name first, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(f"cannot write {path}: {error.strerror}; older files are whole") from error


# ================================================================================================
# 7. Stages
# ================================================================================================
# A stage minimises a weighted sum of terms, each a mean over a data set of its own:
#     sft              sft_loss of demonstrations
#     spin             spin_loss of demonstrations against the model's own answers      [+ replay]
#     self-reward      dpo_loss of pairs that the model wrote and graded        [+ nll] [+ replay]
#     external-reward  dpo_loss of pairs that the model wrote, somebody graded  [+ nll] [+ replay]
# Nll is -log p(chosen). Replay is the sft_loss of what must not be forgotten: to train on answers
# alone moves the weights that judge as well, and a model of this size soon loses its judgement, and
# with it its reward.
# One loop, `fit`, minimises any such sum. In production: weights and optimiser in many shards,
# gradients accumulated over several batches, bfloat16, and a look at the pairs by a person.


class Term(NamedTuple):
    weight: float
    size: int  # of the data set
    loss: Callable[[list[int]], tuple[Tensor, Tensor]]  # indices -> (sum of losses, of how many)


class Run(NamedTuple):
    """What a stage is told about the run that it is part of."""

    model: nn.Module
    text: TextFormat
    judges: dict[str, RewardConfig]
    seed: int  # of this stage


def create_mock_dataset(length: int, item_or_callable: Any) -> list:
    """A stand-in of `length` items: the same item each time, or what each call returns."""
    make = item_or_callable if callable(item_or_callable) else lambda: item_or_callable
    return [make() for _ in range(length)]


def collate(items: Sequence[tuple[Tensor, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Items (ids, prompt_len) -> ids (B, T), padded on the right with -1, and prompt_lens (B,)."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True, padding_value=-1)
    return ids.to(device), torch.tensor([prompt_len for _, prompt_len in items], device=device)


def _data(dataset: Any, run: Run) -> Sequence:
    """A data set is a sequence, or a function of the model as it is when the stage begins."""
    dataset = _on_main(lambda: dataset(run.model)) if callable(dataset) else dataset
    _require(len(dataset) > 0, "the data set is empty")
    return dataset


def _items(dataset: Any, run: Run) -> list[tuple[Tensor, int]]:
    """Training items as (ids without padding, prompt_len), each of which must fit the model."""
    items, limit = [], getattr(run.model, "max_seq_len", math.inf)
    for i, (ids, prompt_len) in enumerate(_data(dataset, run)):
        ids, prompt_len = torch.as_tensor(ids, dtype=torch.long).cpu(), int(prompt_len)
        ids = ids[: int(_lengths(ids[None], run.text.pad_id))] if len(ids) else ids
        _require(0 <= prompt_len < len(ids) <= limit,
                 f"training item {i}: {len(ids)} tokens, of them {prompt_len} prompt; it needs a "
                 f"response and must fit max_seq_len={limit}")
        items.append((ids, prompt_len))
    return items


def _sft_term(items: Sequence[tuple[Tensor, int]], run: Run, weight: float = 1.0) -> Term:
    def loss(indices: list[int]) -> tuple[Tensor, Tensor]:
        ids, prompt_lens = collate([items[i] for i in indices], _device_of(run.model))
        n_tokens = response_mask(ids, prompt_lens, -1).sum()
        return sft_loss(run.model, ids, prompt_lens, -1) * n_tokens, n_tokens
    return Term(weight, len(items), loss)


def _preference_term(better: Sequence, worse: Sequence, loss_fn: Callable, run: Run) -> Term:
    """Items to prefer to other items, by a loss of four log-probabilities such as dpo_loss.

    The reference is the model as it is now. All that the loss needs of it are its log-
    probabilities; they are computed here, once, so no second model is held and none can drift.
    """
    def logprobs(indices: Sequence[int]) -> Tensor:
        batch = [side[i] for side in (better, worse) for i in indices]
        return sequence_logprobs(run.model, *collate(batch, _device_of(run.model)), -1).view(2, -1)

    with _frozen(run.model):
        pieces = [range(len(better))[at : at + 64] for at in range(0, len(better), 64)]
        ref = _shared(lambda piece: logprobs(piece).cpu(), pieces, "reference")
        ref = torch.cat(ref, dim=1).to(_device_of(run.model))  # (2, n)

    def loss(indices: list[int]) -> tuple[Tensor, Tensor]:
        losses, _, _ = loss_fn(*logprobs(indices), *ref[:, indices])
        return losses.sum(), losses.new_tensor(len(indices))
    return Term(1.0, len(better), loss)


_AT_LEAST = dict(
    steps=1, batch_size=1, eval_every=1, patience=1, checkpoint_every=1, n_candidates=2, n_pairs=1,
    n_judge_samples=1, max_new_tokens=1, max_judge_tokens=1, max_passes=1, temperature=0,
    judge_temperature=0, warmup=0, weight_decay=0, replay_weight=0, nll_weight=0)


@dataclass(frozen=True, kw_only=True)
class _StageConfig:
    """What all stages share. The paper trains 70 billion parameters, this file 0.16 million."""

    kind: ClassVar[str]
    steps: int = 200  # updates of the weights
    batch_size: int = 32  # items, or pairs, an update; 16 in [1]
    learning_rate: float = 1e-3  # the highest; [1]: 5.5e-6 for SFT, 1e-6 for DPO
    warmup: float = 0.05  # share of the steps in which the rate climbs to it; then it falls to zero
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # longer gradients are cut to this length
    eval_fn: Callable[[nn.Module], Any] | None = None  # the weights with its best value are kept
    eval_every: int = 50  # updates; 200 in [1]
    eval_mode: str = "max"  # whether the best value is the largest, "max", or the smallest, "min"
    patience: int | None = None  # evaluations without a new best that end the stage; None: no end
    checkpoint_every: int | None = None  # updates; None: one checkpoint, at the end of the stage

    def __post_init__(self):
        for name, value in vars(self).items():
            here, least = f"{type(self).__name__}: {name}", _AT_LEAST.get(name)
            if least is not None and value is not None:
                _require(least <= value < math.inf, f"{here} = {value!r}, not {least} or more")
            if name in ("learning_rate", "max_grad_norm", "beta", "lam"):
                _require(0 < value < math.inf, f"{here} = {value!r}, not above 0")
            if name.endswith("_dataset") and value is not None and not callable(value):
                _require(len(value) > 0, f"{here} is empty")
            if name == "eval_mode":
                _require(value in ("max", "min"), f'{here} = {value!r}, neither "max" nor "min"')


@dataclass(frozen=True, kw_only=True)
class SFTConfig(_StageConfig):
    """Supervised fine-tuning on demonstrations."""

    kind: ClassVar[str] = "sft"
    train_dataset: Any  # items (ids, prompt_len), or a function of the model that returns them
    loss_on_prompt: bool = False  # True: learn to write prompts as well, as a base model does

    def terms(self, run: Run) -> tuple[list[Term], dict]:
        items = _items(self.train_dataset, run)
        items = [(ids, 0) for ids, _ in items] if self.loss_on_prompt else items
        return [_sft_term(items, run)], {}


@dataclass(frozen=True, kw_only=True)
class _WritingStageConfig(_StageConfig):
    """What the stages share in which the model learns from answers that it wrote."""

    max_new_tokens: int = 64  # of an answer
    temperature: float = 1.0  # 0.7 in [1]; a small model has no variety to spare
    logit_filter: Callable | None = None  # in [1]: lambda logits: top_p(logits, 0.9)
    replay_dataset: Any = None  # items that it must not forget; not in [1], whose judge is larger
    replay_weight: float = 1.0  # of their sft_loss

    def sampling(self, run: Run) -> dict[str, Any]:
        return dict(max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                    logit_filter=self.logit_filter, eos_id=run.text.eos_id)

    def replay(self, run: Run) -> list[Term]:
        if self.replay_dataset is None or self.replay_weight == 0:
            return []
        return [_sft_term(_items(self.replay_dataset, run), run, self.replay_weight)]


@dataclass(frozen=True, kw_only=True)
class SelfPlayConfig(_WritingStageConfig):
    """SPIN [3]: prefer the demonstrations to what the model answers as the stage begins."""

    kind: ClassVar[str] = "spin"
    train_dataset: Any  # items (ids, prompt_len), or a function of the model that returns them
    lam: float = 0.1  # lambda; [3]: 0.1, and 5 in the last round; below 1, LetterWorld overshoots

    def terms(self, run: Run) -> tuple[list[Term], dict]:
        items = _items(self.train_dataset, run)
        prompts = [ids[:prompt_len] for ids, prompt_len in items]

        def write(at: int) -> list[Tensor]:
            with _seeded(run.seed, at):
                return sample(run.model, prompts[at : at + 64], **self.sampling(run))

        rows = sum(_shared(write, range(0, len(items), 64), "writing"), [])
        own = [(torch.cat((prompt, row)), len(prompt)) for prompt, row in zip(prompts, rows)]
        loss_fn = functools.partial(spin_loss, lam=self.lam)
        return [_preference_term(items, own, loss_fn, run), *self.replay(run)], {}


@dataclass(frozen=True, kw_only=True)
class _RewardStageConfig(_WritingStageConfig):
    """What the two DPO stages share: the model writes, somebody grades."""

    prompt_dataset: Any  # instructions (str), or a function of the model that returns them
    beta: float = 0.1  # as in [1]; the larger, the closer the model stays to its reference
    nll_weight: float = 0.0  # of -log p(chosen), a sum; Eq. 1 of [5] has a mean, [1] has none
    n_candidates: int = 4  # N in [1]
    n_pairs: int | None = None  # None: as many as come up; 3,964 and 6,942 in [1]
    max_passes: int = 1  # over the prompts, as many as n_pairs takes; all if that is None
    pick_pair: Callable = pick_best_worst
    is_valid_reward: Callable[[float], bool] | None = None  # another reward counts as none
    is_valid_reward_pair: Callable[[float, float], bool] | None = None  # (chosen, rejected)
    pairs_file: str | Path | None = None  # where the pairs are saved, to be looked at

    def terms(self, run: Run) -> tuple[list[Term], dict]:
        replies: deque[str] = deque(maxlen=3)
        pairs, counts = generate_preferences(
            run.model, _data(self.prompt_dataset, run), self.reward_fn(run, replies), seed=run.seed,
            n_pairs=self.n_pairs, n_candidates=self.n_candidates, max_passes=self.max_passes,
            pick_pair=self.pick_pair, is_valid_pair=self.is_valid_reward_pair, text=run.text,
            replies=replies, **self.sampling(run))
        if self.pairs_file is not None:
            _on_main(lambda: save_pairs(self.pairs_file, pairs))
        better, worse = ([(torch.cat((pair.prompt, getattr(pair, side))), len(pair.prompt))
                          for pair in pairs] for side in ("chosen", "rejected"))

        # DPO asks only that the chosen gain on the rejected. Both may lose, to text that no pair
        # speaks of. A little likelihood of the chosen, after Eq. 1 of [5], prevents this.
        def loss_fn(chosen: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            losses, *rewards = dpo_loss(chosen, *others, beta=self.beta)
            return losses - self.nll_weight * chosen, *rewards

        return [_preference_term(better, worse, loss_fn, run), *self.replay(run)], counts


@dataclass(frozen=True, kw_only=True)
class SelfRewardDPOConfig(_RewardStageConfig):
    """Self-rewarding [1]: the model grades its own answers."""

    kind: ClassVar[str] = "self-reward"
    rewarding_model: nn.Module | None = None  # None: itself; another model is the annotator of [4]
    reward_config: RewardConfig | str | None = None  # or the name of one; None: the trainer's first
    n_judge_samples: int = 3  # judgements that are averaged, 3 in [1]
    max_judge_tokens: int = 160  # of a reply; the default judge explains before it gives the score
    judge_temperature: float = 0.7
    judge_logit_filter: Callable[[Tensor], Tensor] | None = None

    def reward_fn(self, run: Run, replies: deque) -> Callable:
        config = self.reward_config or next(iter(run.judges))
        if isinstance(config, str):
            _require(config in run.judges, f"reward_config {config!r}, not of {list(run.judges)}")
            config = run.judges[config]
        return functools.partial(
            judge, self.rewarding_model or run.model, config, encode=run.text.encode,
            decode=run.text.decode, eos_id=run.text.eos_id, n_samples=self.n_judge_samples,
            max_new_tokens=self.max_judge_tokens, temperature=self.judge_temperature,
            logit_filter=self.judge_logit_filter, is_valid_reward=self.is_valid_reward,
            on_reply=replies.append)


@dataclass(frozen=True, kw_only=True)
class ExternalRewardDPOConfig(_RewardStageConfig):
    """The same with any other reward: a reward model, a program, people."""

    kind: ClassVar[str] = "external-reward"
    reward_model: Callable  # (prompts, responses) -> rewards, (B,) or (B, 1), NaN for "no opinion"

    def reward_fn(self, run: Run, replies: deque) -> Callable:
        def reward(prompts: list[str], responses: list[str]) -> Tensor:
            try:
                rewards = _as_rewards(self.reward_model(prompts, responses), len(responses))
            except Exception as error:
                raise ValueError(f"reward_model: {type(error).__name__}: {error}") from error
            is_valid = self.is_valid_reward or (lambda reward: True)
            return torch.tensor([r if is_valid(r) else math.nan for r in rewards.tolist()])
        return reward


def paper_stages(sft_dataset: Any, prompt_dataset: Any, *, rounds: int = 2, sft: dict | None = None,
                 dpo: dict | None = None) -> list[_StageConfig]:
    """The recipe of [1], SFT and then rounds of self-reward DPO; sft and dpo set further fields."""
    return [SFTConfig(train_dataset=sft_dataset, **(sft or {}))] + [
        SelfRewardDPOConfig(prompt_dataset=prompt_dataset, **(dpo or {})) for _ in range(rounds)]


def _batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of indices; none comes again before all have come."""
    queue: list[int] = []
    while True:
        while len(queue) < batch_size:
            queue += torch.randperm(size, generator=generator).tolist()
        yield queue[:batch_size]
        queue = queue[batch_size:]


def fit(model: nn.Module, terms: Sequence[Term], config: _StageConfig, *, seed: int = 0,
        save: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Minimises the weighted sum of the terms; returns {"loss" (mean of the last 20), "steps"}.

    With config.eval_fn, the weights that it liked best are put back at the end; `patience` of its
    evaluations in a row without a new best end the stage. save(step) is called at every
    checkpoint_every-th step. A loss that is not finite is a ValueError that names the step.
    """
    generator, (rank, n_processes) = torch.Generator().manual_seed(seed), _processes()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    draws = [_batches(term.size, config.batch_size, generator) for term in terms]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), fused=True,
                                  weight_decay=config.weight_decay)
    best, best_weights, since_best, losses = -math.inf, None, 0, deque(maxlen=20)
    model.train()
    for step in _bar(range(1, config.steps + 1), f"training, {config.kind}"):
        schedule = min(step / max(1, config.warmup * config.steps), 1 - (step - 1) / config.steps)
        optimizer.param_groups[0]["lr"] = config.learning_rate * schedule
        loss = torch.zeros((), device=_device_of(model), requires_grad=True)
        for term, draw in zip(terms, draws):
            mine = next(draw)[rank::n_processes]
            total, count = term.loss(mine) if mine else (0, 0)
            count = torch.tensor(float(count))
            _sum(count)  # of all processes, whose shares may be uneven
            loss = loss + term.weight * total / count
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        value = torch.tensor(loss.item())
        _sum(value, *(weight.grad for weight in weights))
        _require(bool(value.isfinite()), f"step {step}: the loss is {value.item()}")
        nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        losses.append(value.item())
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            save(step)
        if config.eval_fn is not None and step % config.eval_every == 0:
            with _frozen(model):
                score = _on_main(lambda: float(config.eval_fn(model)))
            score, since_best = score if config.eval_mode == "max" else -score, since_best + 1
            if score > best:
                best, since_best = score, 0
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            if since_best == config.patience:
                break
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return {"loss": sum(losses) / len(losses), "steps": step}


def _plain(values: dict) -> dict:
    """The same without numpy or torch types: a checkpoint must load without running any code."""
    return json.loads(json.dumps(values, default=lambda value: value.tolist()))


class SelfRewardingTrainer:
    """Runs stages in the order given, of any kinds and any number.

    finetune_configs: the stages, or a dict of arguments for paper_stages.
    self_reward_prompt_config: the judge, or a dict of judges by name, of which a stage picks one.
    evaluate: model -> dict, which is added to the record of each stage.
    report: called with the record of each finished stage, those that a resume skips included.
    settings: plain values that every checkpoint keeps; resuming with others is refused.
    Stage i leaves a checkpoint {checkpoints_folder}/{i}.{kind}.pt.
    """

    def __init__(self, model: nn.Module, finetune_configs: Sequence[_StageConfig] | dict, *,
                 tokenizer_encode: Callable = encode, tokenizer_decode: Callable = decode,
                 self_reward_prompt_config: RewardConfig | dict = DEFAULT_REWARD_CONFIG,
                 chat_template: str = "{{ prompt }}", eos_id: int | None = EOS, pad_id: int = PAD,
                 checkpoints_folder: str | Path = "checkpoints", seed: int = 0,
                 device: str | torch.device | None = None, settings: dict | None = None,
                 evaluate: Callable[[nn.Module], dict] = lambda model: {},
                 report: Callable[[dict], None] = lambda record: None):
        _join_processes()
        stages, judges = finetune_configs, self_reward_prompt_config
        self.configs = paper_stages(**stages) if isinstance(stages, dict) else list(stages)
        _require(len(self.configs) > 0 and all(isinstance(c, _StageConfig) for c in self.configs),
                 f"finetune_configs: one or more stage configs, please, not {self.configs!r}")
        limit = getattr(model, "max_seq_len", math.inf)
        for stage, config in enumerate(self.configs):
            for name in ("max_new_tokens", "max_judge_tokens"):
                _require(getattr(config, name, 0) < limit, f"stage {stage} ({config.kind}): {name} "
                         f"= {getattr(config, name, 0)} leaves no room, max_seq_len = {limit}")
        self.judges = judges if isinstance(judges, dict) else {"default": judges}
        self.text = TextFormat(tokenizer_encode, tokenizer_decode, chat_template, eos_id, pad_id)
        self.model = model if device is None else model.to(device)
        self.folder, self.seed, self.settings = Path(checkpoints_folder), seed, settings or {}
        self.evaluate, self.report = evaluate, report

    def path(self, stage: int) -> Path:
        """The checkpoint of a stage."""
        return self.folder / f"{stage}.{self.configs[stage].kind}.pt"

    def __call__(self, *, overwrite_checkpoints: bool = False, resume: bool = False) -> list[dict]:
        """Runs the stages; returns a record of each: stage, kind, seconds, loss, steps, for a DPO
        stage also pairs, unparsed, tied and invalid, and what `evaluate` found."""
        records = _on_main(lambda: self._begin(overwrite_checkpoints, resume))
        self.model.load_state_dict(_on_main(self.model.state_dict))  # the same bits everywhere
        for stage, config in list(enumerate(self.configs))[len(records) :]:
            began, seed = time.perf_counter(), _seed_of(self.seed, stage)
            save = lambda step: _on_main(lambda: self._save(
                self.path(stage).with_suffix(f".step{step}.pt"), records))
            try:
                with _seeded(seed):
                    terms, counts = config.terms(Run(self.model, self.text, self.judges, seed))
                    fitted = fit(self.model, terms, config, seed=seed, save=save)
                with _seeded(self.seed), _frozen(self.model):
                    found = _on_main(lambda: self.evaluate(self.model))
            except ValueError as error:
                raise ValueError(f"stage {stage} ({config.kind}): {error}") from error
            seconds = round(time.perf_counter() - began, 2)
            records.append(_plain({"stage": stage, "kind": config.kind, "seconds": seconds,
                                   **fitted, **counts, **found}))
            _on_main(lambda: self._finish(stage, records))
        return records

    def _finish(self, stage: int, records: list[dict]) -> None:
        """From here on, a resume goes on after this stage; no later one of an older run is left."""
        self._save(self.path(stage), records)
        for later in range(stage + 1, len(self.configs)):
            self.path(later).unlink(missing_ok=True)
        self.report(records[-1])

    def _begin(self, overwrite: bool, resume: bool) -> list[dict]:
        """Prepares the folder; after a resume the model is that of the last finished stage, and the
        records up to it are returned."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        if os.environ.get("SRLM_CLEAR_CHECKPOINTS") == "1":
            ours = re.compile(r"\d+\.(sft|spin|self-reward|external-reward)(\.step\d+)?\.pt")
            for path in filter(lambda path: ours.fullmatch(path.name), self.folder.iterdir()):
                path.unlink()
        for path in map(self.path, range(len(self.configs))):
            _require(resume or overwrite or not path.exists(),
                     f"{path} exists; resume goes on after it, overwrite replaces it")
        records = self._resume() if resume else []
        for record in records:
            self.report(record)
        return records

    def _settings(self) -> dict[str, Any]:
        """All plain values that the run depends on, to be compared when it is resumed."""
        flat = {"seed": self.seed, **self.settings}
        for stage, config in enumerate(self.configs):
            flat[f"stage {stage}, kind"] = config.kind
            flat |= {f"stage {stage}, {name}": value for name, value in vars(config).items()
                     if isinstance(value, (int, float, str, type(None)))}
        return _plain(flat)

    def _save(self, path: Path, records: list[dict]) -> None:
        config = getattr(self.model, "config", None)
        shape = dataclasses.asdict(config) if isinstance(config, ModelConfig) else None
        torch.save({"format": "srlm 1", "model": self.model.state_dict(), "model_config": shape,
                    "records": records, "settings": self._settings()}, buffer := io.BytesIO())
        _write(path, buffer.getvalue())

    def _resume(self) -> list[dict]:
        """Loads the last whole checkpoint; returns the records up to it ([] without any)."""
        for stage in reversed(range(len(self.configs))):
            if not (path := self.path(stage)).exists():
                continue
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                aside = path.with_name(path.name + ".damaged")
                os.replace(path, aside)
                warnings.warn(f"{error}; it is now {aside.name}, and stage {stage} runs again")
                continue
            now = self._settings()
            for key, then in state["settings"].items():
                later = re.match(r"stage (\d+)", key)  # what follows this stage may be planned anew
                _require(later is not None and int(later[1]) > stage or now.get(key) == then,
                         f"{path} was made with {key} = {then!r}, not {now.get(key)!r}")
            _load_weights(self.model, state, path)
            return state["records"]
        return []


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds: model (the weights), model_config, records, settings. Nothing in the
    file is executed. ValueError, with the path, for anything but a whole checkpoint of srlm."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error
    _require(isinstance(state, dict) and state.get("format") == "srlm 1",
             f"{path} is no checkpoint of srlm")
    return state


def _load_weights(model: nn.Module, state: dict[str, Any], path: str | Path) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:  # with a line for each weight
        raise ValueError(f"{path} holds weights of another model, shape {state['model_config']}: "
                         f"{str(error).splitlines()[1].strip()}") from error


def load_model(path: str | Path) -> Transformer:
    """The built-in Transformer with the weights of a checkpoint."""
    state = load_checkpoint(path)
    _require(state["model_config"] is not None, f"{path} holds weights of another kind of model")
    model = Transformer(ModelConfig(**state["model_config"]))
    _load_weights(model, state, path)
    return model.eval()


# ================================================================================================
# 8. A world small enough to grade
# ================================================================================================
# Whether answers get better, people or a larger model must say in real life. Here a program knows:
# instructions about a few letters, and a rubric of five points. It makes the seed data, as the
# annotators of [1] did, and it measures. It never speaks to a self-reward stage.
#
# The loop needs three things of a world, and this one has them: a demonstrator who is mediocre, so
# that there is something to gain; variety in what a model of him writes, so that the best of four
# answers beats their mean; and a rubric that a small model can learn to apply.

INSTRUCTIONS: dict[str, Callable[[str], str]] = {
    "sort": lambda letters: "".join(sorted(letters)),
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters[::-1],
    "rotate": lambda letters: letters[1:] + letters[:1],
}


class LetterWorld:
    """Prompts like "sort dbca", whose perfect answer is "Sure: abcd.", and a score of 0 to 5.

    The demonstrator is sloppy. Half of its answers have wrong letters, and most lack the "Sure: "
    and the full stop, so its typical answer scores three; who imitates it stays there, and so
    does who takes its most likely answer. All that is drawn follows from the seed.
    """

    POINTS = ("polite", "relevant", "complete", "ordered", "full stop")
    CHAT_TEMPLATE = "> {{ prompt }}\n"
    JUDGE = RewardConfig("? {{ prompt }}\n{{ response }}\n", "= {{ reward }}")
    max_new_tokens = 16  # of an answer

    letters, sizes = "abcdefgh", (4, 5, 6)  # a prompt has 4, 5 or 6 different ones

    def __init__(self, instructions: Sequence[str] = ("sort",), *, n_eval=200, seed=0):
        self.instructions, self.seed = list(instructions), seed
        _require(bool(self.instructions) and set(self.instructions) <= set(INSTRUCTIONS),
                 f"LetterWorld: instructions {self.instructions}; known: {', '.join(INSTRUCTIONS)}")
        self.eval_prompts: list[str] = []  # while they are drawn; none of them occurs in training
        self.eval_prompts = self.prompts(n_eval, "evaluation")

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *encode(purpose)])

    def prompts(self, n: int, purpose: str) -> list[str]:
        """n different instructions, none of them an evaluation prompt."""
        words = sum(math.perm(len(self.letters), size) for size in self.sizes)
        left = len(self.instructions) * words - len(self.eval_prompts)
        _require(n <= left, f"LetterWorld: {n} prompts wanted, but there are {left}")
        rng, found = self._rng(purpose), dict.fromkeys(self.eval_prompts)
        while len(found) < n + len(self.eval_prompts):
            letters = rng.permutation(list(self.letters))[: rng.choice(self.sizes)]
            found[f"{rng.choice(self.instructions)} {''.join(letters)}"] = None
        return list(found)[len(self.eval_prompts) :]

    def target(self, prompt: str) -> str:
        """The letters of the perfect answer; ValueError for what is no prompt of this world."""
        name, _, letters = prompt.partition(" ")
        different = len(set(letters)) == len(letters) > 1 and set(letters) <= set(self.letters)
        _require(name in INSTRUCTIONS and different, f"{prompt!r} is no LetterWorld prompt: one of "
                 f"{', '.join(INSTRUCTIONS)}, a space, different letters of {self.letters}")
        return INSTRUCTIONS[name](letters)

    def is_valid(self, prompt: str) -> bool:
        """Whether it is a prompt that this world could give."""
        with contextlib.suppress(ValueError):
            name, size = prompt.partition(" ")[0], len(self.target(prompt))
            return name in self.instructions and size in self.sizes
        return False

    def points(self, prompt: str, response: str) -> tuple[int, ...]:
        """The five points, 0 or 1 each; each can be lost alone."""
        target, body = self.target(prompt), response.removeprefix("Sure: ").removesuffix(".")
        places = [target.index(letter) for letter in body if letter in target]
        return (int(response.startswith("Sure: ")),  # polite
                int(body != "" and set(body) <= set(target)),  # relevant: no other letter
                int(set(body) >= set(target)),  # complete: all of them
                int(len(places) > 1 and all(a < b for a, b in zip(places, places[1:]))),  # ordered
                int(response.endswith(".")))  # full stop

    def score(self, prompt: str, response: str) -> int:
        """The true score, 0 to 5."""
        return sum(self.points(prompt, response))

    def verdict(self, prompt: str, response: str) -> str:
        """What a perfect judge replies: the five points, one by one, and then their sum."""
        points = self.points(prompt, response)
        return f"{''.join(map(str, points))} = {sum(points)}"

    def _slip(self, body: str, rng: np.random.Generator) -> str:
        """One slip of the pen: two letters swapped, one lost, or a stray one put in."""
        letters, slip, (i, j) = list(body), rng.integers(3), rng.integers(len(body), size=2)
        if slip == 0:
            letters[i], letters[j] = letters[j], letters[i]
        elif slip == 1 and len(letters) > 1:
            letters.pop(i)
        else:
            letters.insert(i, rng.choice(list(self.letters)))
        return "".join(letters)

    def demonstrate(self, prompt: str, rng: np.random.Generator) -> str:
        """A sloppy answer."""
        body = self.target(prompt)
        for _ in range(rng.choice(3, p=(0.5, 0.3, 0.2))):
            body = self._slip(body, rng)
        return ("Sure: " if rng.random() < 0.3 else "") + body + ("." if rng.random() < 0.3 else "")

    def make_up(self, prompt: str, rng: np.random.Generator) -> str:
        """An answer of any quality, nonsense included, for a judge to practise on."""
        body = self.target(prompt)
        for _ in range(rng.choice(5, p=(0.3, 0.25, 0.2, 0.15, 0.1))):
            body = self._slip(body, rng)
        if rng.random() < 0.1:
            body = "".join(rng.choice(list("01 =?>:." + self.letters), size=rng.integers(1, 10)))
        often = (0.5, 0.35, 0.05, 0.05, 0.05)
        return (rng.choice(["Sure: ", "", "Sure:", "sure: ", "Sure "], p=often) + body
                + rng.choice([".", "", ",", ":", ".."], p=often))

    def demonstrations(self, n: int) -> list[tuple[str, str]]:
        """Seed data to follow instructions, "IFT" in [1]: (prompt, sloppy answer)."""
        rng = self._rng("demonstrate")
        prompts = self.prompts(n, "demonstrations")
        return [(prompt, self.demonstrate(prompt, rng)) for prompt in prompts]

    def judgements(self, n: int, model: nn.Module, tidy: bool) -> list[tuple[str, str, str]]:
        """Seed data to judge, "EFT" in [1]: (prompt, answer, verdict).

        As in [1], answers of a model are graded, three in ten, at rising temperatures. The others
        are made up, since that model writes too few good ones. `tidy`: nothing but the
        demonstrator's own kind of answers. A judge that has seen no nonsense is fooled by it.
        """
        prompts, rng, pairs = self.prompts(n, "judgements"), self._rng("make up"), []
        text, n_own = TextFormat(chat_template=self.CHAT_TEMPLATE), 0 if tidy else round(0.3 * n)
        for i, temperature in enumerate((1.0, 1.3, 1.6, 2.0)):
            some = prompts[:n_own][i::4]
            with _seeded(self.seed, i):
                pairs += zip(some, respond(model, some, text, self.max_new_tokens, temperature))
        write = self.demonstrate if tidy else self.make_up
        pairs += [(prompt, write(prompt, rng)) for prompt in prompts[n_own:]]
        return [(*pair, self.verdict(*pair)) for pair in pairs]

    def to_judge(self, model: nn.Module) -> list[tuple[str, str, int]]:
        """What judges are measured by: a model's five answers to each evaluation prompt, scored."""
        prompts = [prompt for prompt in self.eval_prompts for _ in range(5)]
        text = TextFormat(chat_template=self.CHAT_TEMPLATE)
        with _seeded(self.seed):
            answers = respond(model, prompts, text, self.max_new_tokens)
        return [(*pair, self.score(*pair)) for pair in zip(prompts, answers)]


# ================================================================================================
# 9. Evaluation
# ================================================================================================
# Two axes: how well a model writes, and how well it judges. Watch a third number, the distance of
# the score that it gives itself from the true one: where it grows, the judge is being fooled.


def judging_metrics(truth: np.ndarray, judged: np.ndarray) -> dict[str, float | None]:
    """How well `judged` follows `truth`, both (P, N): the five columns of Table 4 in [1].

    Three of them are made of s_ij = sign(x_i - x_j), taken within each prompt: pairwise accuracy
    over the pairs that truly differ; Kendall's tau-b, the cosine of the two sign tables; and
    Spearman's rho, the cosine of their row sums, which are the ranks about their mean. A judged
    NaN (no score) ties with everything; a tie is half a hit; exact means after rounding. None
    where nothing is defined.
    """
    s, t = (np.nan_to_num(np.sign(x[:, :, None] - x[:, None, :])) for x in (truth, judged))

    def cosine(a: np.ndarray, b: np.ndarray) -> float | None:  # (P, K), the mean over P
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return float(((a * b).sum(1)[norms > 0] / norms[norms > 0]).mean()) if norms.any() else None

    best = np.nan_to_num(judged, nan=-np.inf).argmax(1)  # (P,) the judge's favourite
    return {"judge_pairwise": float(((s * t)[s != 0].mean() + 1) / 2) if s.any() else None,
            "judge_best5": float((truth[np.arange(len(truth)), best] == truth.max(1)).mean()),
            "judge_exact": float((np.round(judged) == truth).mean()),
            "judge_spearman": cosine(s.sum(2), t.sum(2)),
            "judge_kendall": cosine(s.reshape(len(s), -1), t.reshape(len(t), -1))}


def head_to_head(scores: Any, others: Any) -> dict[str, float]:
    """Shares of scores (P, N) that win, tie and lose against those of another model."""
    sign = np.sign(np.asarray(scores) - np.asarray(others))
    return {key: float((sign == of).mean()) for key, of in (("win", 1), ("tie", 0), ("lose", -1))}


# ================================================================================================
# 10. Command line
# ================================================================================================
# train() is the recipe of [1] in this world: a base model M0; M1, which has learnt to answer and to
# judge from seed data; M2 and M3, each by DPO on what its predecessor wrote and graded.


def _option(default: Any, text: str, quick: Any = None) -> Any:
    """A field of Options: its default, its help, and its value under --quick if that differs."""
    return field(default=default, metadata={"help": text, "quick": quick or default})


@dataclass(frozen=True)
class Options:
    """The command line of a training run; argparse is made from these fields."""

    stages: str = _option("sft,self,self", "comma-separated, of sft, self, spin, external")
    seed: int = _option(0, "whatever is drawn follows from it")
    device: str = _option("cpu", "where the model lives, for example cuda")
    checkpoints: str = _option("checkpoints", "folder for checkpoints and metrics.jsonl")
    quick: bool = _option(False, "the same path with smaller numbers")
    resume: bool = _option(False, "go on after the last finished stage")
    overwrite: bool = _option(False, "replace the checkpoints of an earlier run")
    sft: str = _option("", 'your demonstrations, lines of {"prompt", "response"}')
    judged: str = _option("", 'your judged answers, lines of {"prompt", "response", "score"}')
    prompts: str = _option("", 'your prompts for the later stages, lines of {"prompt"}')
    propose: bool = _option(False, "let M0 write the prompts for the later stages")
    instructions: str = _option("sort", f"what LetterWorld asks for, of {','.join(INSTRUCTIONS)}")
    replay_weight: float = _option(4.0, "how much later stages rehearse judging; 0: they forget")
    nll_weight: float = _option(0.1, "how much DPO imitates the chosen answers; 0: it may drift")
    tidy: bool = _option(False, "judging data without nonsense: a judge that can be fooled")
    base_steps: int = _option(400, "updates for M0", 60)
    sft_steps: int = _option(1500, "updates for M1", 120)
    dpo_steps: int = _option(200, "updates for each later stage", 30)
    demonstrations: int = _option(3200, "size of LetterWorld's IFT data", 1600)
    judgements: int = _option(12000, "size of LetterWorld's EFT data", 1500)
    stage_prompts: int = _option(800, "prompts for each later stage", 64)
    eval_prompts: int = _option(200, "held-out prompts to measure on", 40)
    max_seq_len: int = _option(256, "longest text, in bytes, that the model takes")
    skip_long: bool = _option(False, "leave out, and count, what is longer in your files")

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name in ("seed", "replay_weight", "nll_weight") else 1
            fine = type(value) not in (int, float) or least <= value < math.inf
            _require(fine, f"--{name.replace('_', '-')} is {value}, not {least} or more")
        stages, own = self.stages.split(","), self.sft or self.judged or self.prompts
        for stage in stages:
            _require(stage in ("sft", "self", "spin", "external"),
                     f"--stages: {stage!r} is none of sft, self, spin, external")
        _require(stages[0] == "sft", "--stages must begin with sft: before, no model can answer")
        _require(not own or self.sft != "", "--judged and --prompts need --sft, to begin with")
        _require(not own or self.judged != "" or "self" not in stages, "stage self needs --judged")
        _require(not own or "external" not in stages, "stage external has no oracle for your data; "
                 "in Python, ExternalRewardDPOConfig takes any reward")

    @classmethod
    def parse(cls, argv: Sequence[str]) -> Options:
        parser = argparse.ArgumentParser(prog="srlm.py", description=__doc__.split("\n\n")[1],
                                         epilog='To ask a model: srlm.py ask CHECKPOINT ["PROMPT"]')
        for item in dataclasses.fields(cls):
            of = {"action": "store_true"} if item.default is False else {"type": type(item.default)}
            parser.add_argument("--" + item.name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=f"{item.metadata['help']} [{item.default}]", **of)
        given = vars(parser.parse_args(argv))
        quick = {item.name: item.metadata["quick"] for item in dataclasses.fields(cls)}
        return cls(**((quick if "quick" in given else {}) | given))


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[tuple]:
    """The fields of each object of a JSON-lines file (UTF-8). ValueError with file, line and
    reason: not JSON, a missing or unknown field, no text, a score outside 0 to 5."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            _require(isinstance(row, dict), f"not an object but {line[:40]!r}")
            for name in dict.fromkeys([*row, *fields]):
                _require(name in fields, f"unknown field {name!r}; known: {', '.join(fields)}")
                _require(name in row, f"no field {name!r}")
                value, is_score = row[name], name == "score"
                fine = (type(value) in (int, float) and 0 <= value <= 5 if is_score else
                        isinstance(value, str) and value.strip() != "")
                _require(fine, f"{name} is {value!r}, no {'score, 0 to 5' if is_score else 'text'}")
        except ValueError as error:  # a JSONDecodeError is one, too
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(tuple(row[name] for name in fields))
    _require(len(rows) > 0, f"{path}: no examples")
    return rows


class OwnData:
    """The user's files in the place of LetterWorld, without an oracle. One of ten prompts is held
    out of the demonstrations and of the judged answers, with all that answers it, to measure on."""

    score, is_valid = None, None

    def __init__(self, options: Options):
        def judge_bytes(prompt: str, response: str) -> int:  # with a byte to spare, and a verdict
            return len(encode(LetterWorld.JUDGE.render(prompt, response))) + 9

        def read(path: str, *fields: str) -> tuple[list, list]:
            rows, limit = read_jsonl(path, fields) if path else [], options.max_seq_len
            sizes = [judge_bytes(row[0], "".join(row[1:2])) for row in rows]
            for number, size in enumerate(sizes, 1):
                _require(size <= limit or options.skip_long, f"{path}, example {number}: {size} "
                         f"bytes for the judge, but --max-seq-len is {limit}; --skip-long skips it")
            short = [row for row, size in zip(rows, sizes) if size <= limit]
            if len(short) < len(rows):
                warnings.warn(f"{path}: {len(rows) - len(short)} of {len(rows)} examples skipped, "
                              f"taking the judge more than {limit} bytes")
            held_out = set(list(dict.fromkeys(row[0] for row in short))[::10])
            return ([row for row in short if row[0] not in held_out],
                    [row for row in short if row[0] in held_out][: 5 * options.eval_prompts])

        self.pairs, self.held_out = read(options.sft, "prompt", "response")
        self.judged, self.held_out_judged = read(options.judged, "prompt", "response", "score")
        prompts = sum(read(options.prompts, "prompt"), []) or self.pairs
        _require(len(self.pairs) > 0, f"{options.sft}: {len(self.held_out)} examples fit, of the "
                 "prompt that is held out to measure on; none is left to learn from")
        held_out = dict.fromkeys(pair[0] for pair in self.held_out)
        self.eval_prompts = list(held_out)[: options.eval_prompts]
        self.own_prompts = sorted({prompt[0] for prompt in prompts} - set(held_out))
        # The longest answer seen; less if the judge could not read it under the longest prompt.
        longest = max(judge_bytes(prompt, "") for prompt in [*held_out, *self.own_prompts])
        self.max_new_tokens = 1 + min(options.max_seq_len - longest,
                                      max(len(encode(pair[1])) for pair in self.pairs))

    def demonstrations(self, n: int) -> list[tuple[str, str]]:
        return self.pairs

    def judgements(self, n: int, model: nn.Module, tidy: bool) -> list[tuple[str, str, str]]:
        return [(prompt, response, f"= {score:g}") for prompt, response, score in self.judged]

    def to_judge(self, model: nn.Module) -> list[tuple[str, str, float]]:
        return self.held_out_judged

    def prompts(self, n: int, purpose: str) -> list[str]:
        order = np.random.default_rng(encode(purpose)).permutation(len(self.own_prompts))
        return [self.own_prompts[i] for i in order[:n]]


_COLUMNS = {  # heading: (key in metrics.jsonl, format)
    "true score": ("oracle_score", ".2f"), "greedy": ("oracle_greedy", ".2f"),
    "perfect": ("perfect_rate", ".0%"), "self-score": ("self_score", ".2f"), "win": ("win", ".0%"),
    "lose": ("lose", ".0%"), "judge": ("judge_pairwise", ".1%"), "pairs": ("pairs", "d"),
    "seconds": ("seconds", ".0f")}
_KEYS = ("stage", "kind", "model", "seconds", "loss", "oracle_score", "oracle_greedy",
         "perfect_rate", "self_score", "win", "tie", "lose", "judge_pairwise", "judge_best5",
         "judge_exact", "judge_spearman", "judge_kendall")
_LEGEND = """\
true score  mean points, of 5, of answers drawn at temperature 1; greedy: of the likeliest answers
perfect     share of the drawn answers with all five points
self-score  mean score that the model gives its own answers; above the true one, it fools itself
win, lose   share of answers better and worse than those of the model in the line above
judge       share of pairs of answers, the same for all models, that it puts in the right order
"""


def _table_row(line: dict) -> str:
    row = f"{line['model']:<14}"
    for heading, (key, form) in _COLUMNS.items():
        cell = "-" if line.get(key) is None else format(line[key], form)
        row += f"  {cell:>{max(4, len(heading))}}"
    return row


def train(options: Options) -> list[dict]:
    """The training run: M0 (SFT on whole texts), M1 (SFT on answers and verdicts), later stages.
    Prints the table as it grows; returns the lines of metrics.jsonl."""
    _join_processes()  # before the first use of a device, for each has its own
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        complaint = str(error).splitlines()[0]
        raise ValueError(f"--device {options.device}: {complaint}") from error
    world: Any = OwnData(options) if options.sft else LetterWorld(
        options.instructions.split(","), n_eval=options.eval_prompts, seed=options.seed)
    pairs, prompts = world.demonstrations(options.demonstrations), world.eval_prompts
    text, folder = TextFormat(chat_template=LetterWorld.CHAT_TEMPLATE), Path(options.checkpoints)
    items, can_judge = [text.item(*pair) for pair in pairs], bool(options.judged or not options.sft)
    # M0 writes answers to be judged: some that M1 learns from, others that all are measured by. It
    # is read from its checkpoint, so that a run that was cut off and resumed has the same ones.
    base = functools.cache(lambda: load_model(folder / "0.sft.pt").to(options.device))
    to_judge = functools.cache(lambda: list(zip(*world.to_judge(base()))))
    verdicts = functools.cache(lambda: [
        TextFormat().item(LetterWorld.JUDGE.render(prompt, response), verdict) for prompt, response,
        verdict in world.judgements(options.judgements, base(), options.tidy)])

    n_later = options.stages.count(",")  # stages after M1

    @functools.cache
    def proposed() -> list[str]:
        known = [pair[0] for pair in pairs] + prompts
        with _seeded(options.seed, 1):
            found, counts = propose_prompts(base(), options.stage_prompts * n_later, text=text,
                                            known=known, is_valid=world.is_valid)
        print("prompts by M0: {written} written, {valid} valid, {new} new".format(**counts))
        return found

    def prompts_of(stage: int, model: nn.Module) -> list[str]:
        if options.propose:  # each later stage gets its share
            return proposed()[stage - 2 :: n_later]
        return world.prompts(options.stage_prompts, f"stage {stage}")

    judging = dict(is_valid_reward=lambda reward: 0 <= reward <= 5)
    dpo = dict(learning_rate=2.5e-4, steps=options.dpo_steps, max_new_tokens=world.max_new_tokens,
               replay_dataset=lambda model: verdicts(),
               replay_weight=options.replay_weight if can_judge else 0)
    configs: list = [SFTConfig(train_dataset=items, loss_on_prompt=True, learning_rate=4e-3,
                               steps=options.base_steps)]
    for name in options.stages.split(","):
        new = dict(prompt_dataset=functools.partial(prompts_of, len(configs)), beta=1.0,
                   nll_weight=options.nll_weight, **dpo)
        configs.append(
            SFTConfig(train_dataset=lambda model: items + verdicts(), learning_rate=4e-3,
                      steps=options.sft_steps) if name == "sft" else
            SelfPlayConfig(train_dataset=items, lam=1.0, **dpo) if name == "spin" else
            SelfRewardDPOConfig(max_judge_tokens=16, **judging, **new) if name == "self" else
            ExternalRewardDPOConfig(reward_model=lambda *x: list(map(world.score, *x)), **new))

    all_scores: list = []  # true scores (P, 5) of every model so far
    lines: list[dict] = [{"model": "demonstrations", "oracle_score": None}]
    if world.score is not None:
        lines[0]["oracle_score"] = float(np.mean([world.score(*pair) for pair in pairs]))

    def measure(model: nn.Module) -> dict:
        """Both axes of [1]: how well the model writes, and how well it judges."""
        grade = functools.partial(judge, model, LetterWorld.JUDGE, max_new_tokens=16, **judging)
        many = [prompt for prompt in prompts for _ in range(5)]
        responses = respond(model, many, text, world.max_new_tokens)
        judges = can_judge and len(all_scores) > 0  # M0 has never seen a judge prompt
        found = {"self_score": float(grade(many, responses).nanmean())} if judges else {}
        if world.score is None:
            batch = collate([text.item(*pair) for pair in world.held_out], _device_of(model))
            found["held_out_loss"] = float(sft_loss(model, *batch, -1))
        else:
            scores = np.reshape(list(map(world.score, many, responses)), (-1, 5))
            greedy = respond(model, prompts, text, world.max_new_tokens, temperature=0)
            greedy = float(np.mean(list(map(world.score, prompts, greedy))))
            found |= {"oracle_score": float(scores.mean()), "oracle_greedy": greedy,
                      "perfect_rate": float((scores == 5).mean()), "scores": scores.tolist()}
            found |= head_to_head(scores, all_scores[-1]) if all_scores else {}
        if judges:
            asked, answers, truth = to_judge()
            shape = (-1, 5) if world.score else (1, -1)  # without an oracle: all in one comparison
            own = grade(asked, answers).numpy()
            found |= judging_metrics(np.reshape(truth, shape), np.reshape(own, shape))
        return {key: None if value != value else value for key, value in found.items()}  # no NaN

    def report(record: dict) -> None:
        line = {**dict.fromkeys(_KEYS), **record, "model": f"M{record['stage']}"}
        all_scores.append(line.pop("scores", None))
        lines.append(line)
        _write(folder / "metrics.jsonl", "\n".join([*map(json.dumps, lines), ""]).encode())
        print(_table_row(line), flush=True)

    model = Transformer(ModelConfig(max_seq_len=options.max_seq_len),
                        torch.Generator().manual_seed(options.seed))
    may_differ = ("stages", "device", "checkpoints", "quick", "resume", "overwrite")
    trainer = SelfRewardingTrainer(
        model, configs, chat_template=text.chat_template, checkpoints_folder=folder,
        self_reward_prompt_config=LetterWorld.JUDGE, seed=options.seed, device=options.device,
        settings={key: value for key, value in vars(options).items() if key not in may_differ},
        evaluate=measure, report=report)
    heading = " " * 14 + "".join(f"  {heading:>4}" for heading in _COLUMNS)
    _on_main(lambda: print(_LEGEND, heading, _table_row(lines[0]), sep="\n", flush=True))
    trainer(overwrite_checkpoints=options.overwrite, resume=options.resume)

    def conclude() -> list[dict]:
        if world.score is not None and len(configs) > 2:
            shares = head_to_head(all_scores[-1], all_scores[1])
            last = lines[-1]["model"]
            print(f"\n{last} against M1: win {shares['win']:.0%}, lose {shares['lose']:.0%}")
        print(f'\nask it: python srlm.py ask {trainer.path(len(configs) - 1)} "{prompts[0]}"')
        return lines
    return _on_main(conclude)


def ask(argv: Sequence[str]) -> None:
    """The model's answer to a prompt, its own score of it and, for LetterWorld, the true score."""
    parser = argparse.ArgumentParser(prog="srlm.py ask", description=ask.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt", nargs="?", help="without it: a conversation, one prompt a line")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer")
    args = parser.parse_args(argv)
    model, world = load_model(args.checkpoint), LetterWorld(list(INSTRUCTIONS))
    text = TextFormat(chat_template=world.CHAT_TEMPLATE)

    def answer(prompt: str) -> None:
        response = respond(model, [prompt], text, 128, temperature=args.temperature)[0]
        print(f"answer      {response}")
        own = judge(model, world.JUDGE, [prompt], [response], is_valid_reward=lambda r: 0 <= r <= 5)
        print("own score   none" if own.isnan() else f"own score   {float(own):.1f} of 5")
        with contextlib.suppress(ValueError):  # of a prompt that is none of LetterWorld
            points = world.points(prompt, response)
            named = ", ".join(map("{} {}".format, world.POINTS, points))
            print(f"true score  {sum(points)} of 5: {named}")

    if args.prompt is not None:
        return answer(args.prompt)
    print('One prompt a line, such as "sort dbca"; an empty line ends.')
    while prompt := input("> ").strip():
        try:
            answer(prompt)
        except ValueError as error:
            print(error)


def main(argv: Sequence[str] | None = None) -> list[dict] | None:
    """The command line. A user's mistake ends in one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with warnings.catch_warnings():  # which puts back how they are shown
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return ask(argv[1:]) if argv[:1] == ["ask"] else train(Options.parse(argv))
    except ValueError as error:
        print(f"srlm: {error}", file=sys.stderr)
        sys.exit(2)
    except EOFError:
        return None
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on after the last finished stage", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
