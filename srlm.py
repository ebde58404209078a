r"""Self-Rewarding Language Models: the whole training loop in one file.

A language model writes several answers to each prompt, grades them itself, and is trained to raise
the probability of the answer it graded best, relative to the one it graded worst. Repeated, this
makes its answers better than the demonstrations it learned from, provided that, as the judge, it
puts two answers in the right order clearly more often than in the wrong one.

    M0   stands in for a pretrained model: trained from random weights on demonstrations, to predict
         every token of prompts and answers (the others learn answers alone)
    M1   M0 after supervised fine-tuning (SFT) on demonstrations and on judging data: answers with
         the verdicts of a program
    M2   M1 after DPO (section 5: a loss on pairs of answers) on pairs that M1 wrote and graded
    M3   M2 after DPO on pairs that M2 wrote and graded

The loop in pseudocode, simplified, with the function names and sections of this file. The policy
is the model in training; the reference is the model as it was when the round began; beta says how
closely the policy is tied to it:

    fit(model, sft_objective(demonstrations, loss on prompts too))       # M0          sections 3, 8
    fit(model, sft_objective(demonstrations + judging data))             # M1
    for each round:                                                      # M2, M3      section 9
        for each prompt:                                                 #             section 7
            answers = sample(model, the prompt, n_candidates times)      # write       section 4
            rewards = judge(model, reward_config, the prompt, answers)       # judge   section 6
            chosen, rejected = answers at pick_best_worst(rewards)       # pair
        for each pair, under the model as it is now:                     # freeze the reference
            ref_chosen   = sequence_logprobs(model, prompt + chosen)     # log p(chosen | prompt)
            ref_rejected = sequence_logprobs(model, prompt + rejected)   #             section 5
        for each batch of pairs:                                         # minimise    section 8
            policy_chosen, policy_rejected = the same for the batch, with gradients
            losses = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=1)
            loss = mean(losses - 0.1 policy_chosen) + 4 sft_loss(a batch of judging data)
            one step of AdamW

The term with 0.1 (likelihood) keeps the model from drifting, the one with 4 (replay) from
forgetting how to judge (sections 8 and 11).
To run it:

    python srlm.py              # M0 to M3 on a CPU in about two minutes, and a table
    python srlm.py --quick      # the same with smaller numbers
    python srlm.py ask checkpoints/3.self-reward.pt "sort dbca"

Part I is the algorithm, in the order in which one would teach it. Part II is engineering: checks,
files, resuming, several processes, the command line. Where Part I calls a function of Part II, its
name or a comment says what it does.

Sources, cited as [1] to [5]:
    [1] arXiv:2401.10020  Self-Rewarding Language Models: the loop, its judge, its figures
    [2] arXiv:2305.18290  Direct Preference Optimization (DPO): the loss
    [3] arXiv:2401.01335  Self-Play Fine-Tuning (SPIN): DPO with demonstrations as chosen answers
    [4] arXiv:2402.04792  Online AI Feedback: another model as the judge
    [5] arXiv:2404.19733  Iterative Reasoning Preference Optimization: DPO with a likelihood term

Left out of [1]: the pretrained 70B model (0.16M weights show the loop in minutes), prompts written
by a second model (a program draws them), and dropout. Left out of [3]: its other losses. Left out
everywhere, because they would hide the algorithm: a KV cache (section 4), mixed precision, gradient
accumulation, and weights that are spread over several devices.

Shapes: B batch, T time (tokens), V vocabulary, N candidates of a prompt, P prompts, H heads,
D width of the model. Log-probabilities are natural logarithms (nats); scores are 0 to 5 points.
"Answer" and "response" mean the same.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

# Lets torch's idle threads sleep, so that two runs can share a machine. Must precede the import.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="1000")

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def require(condition, message):
    """Raise ValueError(message) unless the condition holds: for a user's mistake.

    >>> require(1 + 1 == 2, "1 + 1 is not 2")
    """
    if not condition:
        raise ValueError(message)


# ==================================================================================================
# Part I: the algorithm
# ==================================================================================================

# 1. The task --------------------------------------------------------------------------------------
# Whether the loop works is easiest to see where a program can score every answer exactly, as in
# this letter world. An answer has five POINTS, 0 or 1 each; their sum is its TRUE SCORE. A
# VERDICT is the text in which a judge gives points and score. A REWARD is a score to train with.
#
# The task has what the loop needs. The demonstrations are mediocre, so there is something to gain.
# A model that imitates them writes answers of varying quality, so there is something to choose
# from. And grading is easier than writing: to grade is to decide five yes-or-no questions about a
# given text; to write a perfect answer, the model must sample every letter right.

INSTRUCTIONS = {
    "sort": lambda letters: "".join(sorted(letters)),
    "copy": lambda letters: letters,
    "reverse": lambda letters: letters[::-1],
    "rotate": lambda letters: letters[1:] + letters[:1],
}


class LetterTask:
    """Prompts such as "sort dbca", whose perfect answer is "Sure: abcd.".

    Below are the five points of a sloppy answer, and its verdict, which is what a perfect judge
    replies. A verdict lists the points before their sum, because a model that writes one token at
    a time can then decide one point at a time.

    >>> task = LetterTask()
    >>> dict(zip(task.POINTS, task.points("sort dbca", "Sure: abdc.")))
    {'polite': 1, 'relevant': 1, 'complete': 1, 'ordered': 0, 'full stop': 1}
    >>> task.verdict("sort dbca", "Sure: abdc.")
    '11101 = 4'

    LetterWorld, in section 12, adds the data: prompts; demonstrations, which are sloppy (letters
    swapped, lost or inserted, and often no "Sure: " or no "."; their mean true score is 3); and the
    judging data, answers of every quality with verdicts. They include nonsense such as "0=c:",
    because a judge that has never seen any would overrate it.
    """

    POINTS = ("polite", "relevant", "complete", "ordered", "full stop")
    CHAT_TEMPLATE = "> {{ prompt }}\n"  # what the model sees before it answers: "> sort dbca\n"
    JUDGE: RewardConfig  # how a judge is asked: "? sort dbca\nSure: abcd.\n"; set in section 6
    max_new_tokens = 16  # of an answer: "Sure: ", up to 8 letters, ".", and a token for the end
    letters = "abcdefgh"

    def target(self, prompt):
        """The letters of the perfect answer. ValueError for what is no prompt of the task.

        >>> LetterTask().target("reverse dbca")
        'acbd'
        """
        name, _, letters = prompt.partition(" ")
        is_known = name in INSTRUCTIONS and set(letters) <= set(self.letters)
        are_different = len(letters) > 1 and len(set(letters)) == len(letters)
        require(is_known and are_different, f"{prompt!r} is not one of {', '.join(INSTRUCTIONS)} "
                f"and two or more different letters of {self.letters}")
        return INSTRUCTIONS[name](letters)

    def points(self, prompt, response):
        """Five points, 0 or 1 each. "Ordered": two or more letters of the prompt occur, none twice,
        and in the order of the perfect answer. (Other characters cost "relevant", not this one.)"""
        target = self.target(prompt)
        body = response.removeprefix("Sure: ").removesuffix(".")
        places = [target.index(letter) for letter in body if letter in target]
        polite = response.startswith("Sure: ")
        relevant = body != "" and set(body) <= set(target)  # no other character occurs
        complete = set(target) <= set(body)  # every letter occurs
        ordered = len(places) > 1 and all(a < b for a, b in zip(places, places[1:]))
        return int(polite), int(relevant), int(complete), int(ordered), int(response.endswith("."))

    def score(self, prompt, response):
        """The true score: the sum of the points, 0 to 5."""
        return sum(self.points(prompt, response))

    def verdict(self, prompt, response):
        points = self.points(prompt, response)
        return f"{''.join(map(str, points))} = {sum(points)}"


# 2. Tokens and templates --------------------------------------------------------------------------
# A token is one byte of UTF-8, so the vocabulary is 256 bytes and one special token, EOS.
# In production: byte-pair encoding with some 100,000 tokens of about four bytes each.

EOS = 256  # end of sequence: the model has finished its answer; no text contains this id
VOCAB_SIZE = 257
PAD = -1  # not a token: marks the empty places of a batch; replaced before any model sees them


def encode(text):
    """The UTF-8 bytes of a text. (Half a surrogate pair, which UTF-8 cannot express, becomes "?".)

    >>> encode("abé")
    [97, 98, 195, 169]
    """
    return list(text.encode("utf-8", errors="replace"))


def decode(ids):
    """The text of token ids. Drops ids that are not bytes, such as EOS and PAD. Never raises:
    invalid UTF-8 becomes U+FFFD.

    >>> decode([97, 98, EOS, PAD])
    'ab'
    """
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


# A template is a text with {{ variables }}. Any other brace is an ordinary character.
_VARIABLE = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")  # finds "name" in "{{ name }}"


def check_template(name, template, variables):
    """ValueError unless the template has exactly these variables.

    >>> check_template("chat_template", "> {{ prompt }}", {"prompt"})
    """
    found = set(_VARIABLE.findall(template))
    require(found == variables, f"the {name} {template!r} has the variables {sorted(found)}, "
            f"not {sorted(variables)}")


def render(template, **values):
    """Insert the values. One pass: braces inside a value stay as they are.

    >>> render("Q {{ prompt }}", prompt="what is {{ x }}?")
    'Q what is {{ x }}?'
    """
    return _VARIABLE.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True)
class TextFormat:
    """How text becomes model input and back: a tokenizer, a chat template, and the EOS id.

    eos_id=None is for a model without an EOS token: answers then end by length alone.

    >>> text = TextFormat(chat_template="> {{ prompt }}:")
    >>> text.item("hi", "yo")          # prompt "> hi:" has 5 tokens, then "yo", then EOS
    (tensor([ 62,  32, 104, 105,  58, 121, 111, 256]), 5)
    """

    # Two functions, by default the two above: fields, not methods, so they are called without self.
    encode: Callable[[str], Sequence[int] | Tensor] = encode
    decode: Callable[[Tensor], str] = decode
    chat_template: str = "{{ prompt }}"
    eos_id: int | None = EOS

    def __post_init__(self):
        check_template("chat_template", self.chat_template, {"prompt"})

    def ids(self, text):
        """Token ids of a text, 1-D."""
        return torch.as_tensor(self.encode(text), dtype=torch.long)

    def prompt_ids(self, prompt):
        """Token ids of a prompt inside the chat template: what the model is given to answer."""
        require(isinstance(prompt, str), f"a prompt must be a str, not a {type(prompt).__name__}")
        return self.ids(render(self.chat_template, prompt=prompt))

    def item(self, prompt, response):
        """A training item (ids, prompt_len): prompt, response and EOS, without padding."""
        prompt_ids = self.prompt_ids(prompt)
        end = [] if self.eos_id is None else [self.eos_id]
        ids = torch.cat((prompt_ids, self.ids(response), prompt_ids.new_tensor(end)))
        return ids, len(prompt_ids)

    def text(self, ids):
        """The text of sampled ids, without the EOS at their end."""
        ended = self.eos_id is not None and len(ids) > 0 and ids[-1] == self.eos_id
        return self.decode(ids[:-1] if ended else ids)


# 3. The model -------------------------------------------------------------------------------------
# A decoder-only Transformer. All later sections use one fact about it:
#
#     CONTRACT   a causal nn.Module from token ids (B, T) to logits (B, T, V). The logits at
#                position t depend on ids[:, :t+1] only, and predict token t + 1.
#
# So any causal model can take its place. Two optional attributes are used where they exist:
#     max_seq_len                       the largest T that the model accepts
#     next_token_logits(ids, lengths)   (B, T), (B,) -> (B, V): the logits at position lengths - 1
#                                       alone, which spares the output layer at all others


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the Transformer. The default has 0.16 million weights.

    >>> sum(weight.numel() for weight in Transformer(ModelConfig()).parameters())
    164544
    """

    vocab_size: int = VOCAB_SIZE
    dim: int = 64  # D, the width; wider is slower and judges the letter world no better
    depth: int = 4  # blocks; comparing two strings letter by letter takes several
    heads: int = 2  # H; each head has T * T scores of its own, which take time on a CPU
    max_seq_len: int = 256  # tokens of prompt and answer together
    mlp_ratio: int = 2  # MLP width / dim; 4 is usual, 2 leaves time for more updates

    def __post_init__(self):
        require(self.dim % (2 * self.heads) == 0, f"ModelConfig: dim={self.dim} is not a multiple "
                f"of 2 * heads={2 * self.heads}, because RoPE rotates pairs of features")


def apply_rope(x, rotations):
    """Rotary position embedding, RoPE (arXiv:2104.09864): (..., T, D/H) -> (..., T, D/H).

    Two neighbouring features are one complex number. At position t it is multiplied by e^(i t w),
    where w is a constant of the pair (set in Transformer). rotations (T, D/(2H), 2) holds cos(t w)
    and sin(t w).

    Why: a pair a = a1 + i a2 of a query at s and a pair b of a key at t have the dot product
    a1 b1 + a2 b2 = Re( a conj(b) ), where conj turns i into -i. After the rotations it is
        Re( a e^(i s w) conj(b e^(i t w)) ) = Re( a conj(b) e^(i (s - t) w) ),
    which depends on the distance s - t alone.

    >>> quarter_turn = torch.tensor([[[0.0, 1.0]]])        # 1 position, 1 pair: cos and sin of 90
    >>> apply_rope(torch.tensor([[3.0, 4.0]]), quarter_turn)   # (3 + 4i) i
    tensor([[-4.,  3.]])
    """
    precise = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no complex numbers
    pairs = x.to(precise).unflatten(-1, (-1, 2))  # (..., T, D/(2H), 2)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rotations.to(precise))
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention, then an MLP. Each reads a normalised copy of x and adds its result to x.

    x (B, T, D) -> (B, T, D). For rotations see apply_rope().

    >>> block = Block(ModelConfig(dim=8, heads=4))         # one pair of features per head
    >>> block(torch.zeros(1, 3, 8), rotations=torch.zeros(3, 1, 2)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config):
        super().__init__()
        dim, wide = config.dim, config.mlp_ratio * config.dim
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim, bias=False)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.LayerNorm(dim, bias=False)
        self.up = nn.Linear(dim, wide, bias=False)
        self.down = nn.Linear(wide, dim, bias=False)

    def forward(self, x, rotations):
        qkv = self.to_qkv(self.attention_norm(x))  # (B, T, 3D)
        qkv = rearrange(qkv, "b t (n h d) -> n b h t d", n=3, h=self.heads)  # (3, B, H, T, D/H)
        q, k, v = qkv  # (B, H, T, D/H) each
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D/H)
        x = x + self.to_out(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A small decoder that fulfils the contract. `generator` draws its initial weights.

    Blocks as in GPT-2, with RoPE and without biases. ValueError if a row exceeds max_seq_len.

    >>> model = Transformer(ModelConfig(dim=8, depth=1))
    >>> model(torch.tensor([encode("sort")])).shape                        # (B, T) -> (B, T, V)
    torch.Size([1, 4, 257])
    """

    def __init__(self, config=ModelConfig(), generator=None):
        super().__init__()
        self.config, self.max_seq_len = config, config.max_seq_len
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, bias=False)
        self.to_logits = nn.Linear(config.dim, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # the norms keep their gain of 1
                std = weight.shape[1] ** -0.5  # 1 / sqrt(number of inputs); embedding: 1 / sqrt(D)
                if name.endswith(("to_out.weight", "down.weight")):
                    std /= (2 * config.depth) ** 0.5  # x is a sum of 2 * depth outputs; as in GPT-2
                nn.init.normal_(weight, std=std, generator=generator)
        # w = 10000^(-2j / (D/H)) for pair j. Cosines and sines are kept as real numbers, because
        # .to(bfloat16) would drop the imaginary part of complex ones.
        head_dim = config.dim // config.heads
        frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)  # (D/(2H),)
        angle = torch.arange(config.max_seq_len)[:, None] * frequency  # (max_seq_len, D/(2H))
        rotations = torch.stack((angle.cos(), angle.sin()), dim=-1)  # (max_seq_len, D/(2H), 2)
        self.register_buffer("rotations", rotations, persistent=False)

    def features(self, ids):
        """The hidden states that the output layer reads: (B, T) -> (B, T, D)."""
        length = ids.shape[1]
        require(length <= self.max_seq_len, f"{length} tokens, but max_seq_len={self.max_seq_len}")
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.rotations[:length])
        return self.norm(x)

    def forward(self, ids):
        return self.to_logits(self.features(ids))

    def next_token_logits(self, ids, lengths):
        """Logits at position lengths - 1 of each row: (B, T), (B,) -> (B, V)."""
        row = torch.arange(len(ids), device=ids.device)
        return self.to_logits(self.features(ids)[row, lengths - 1])


# 4. Sampling --------------------------------------------------------------------------------------
# Generation repeats one step: run the model over prompt and answer so far, read the logits of the
# last token, draw the next token. What usually goes wrong in a batch of prompts of unequal length:
# reading the logits of a padded position, and going on after EOS.
#
# A logit filter maps logits (B, V) to logits (B, V), with -inf where a token must not be drawn.


def top_k(logits, k):
    """Keep the k largest logits of each row, and all that equal the k-th: (B, V) -> (B, V).

    The others become -inf. A k above V keeps all. ValueError if k < 1.

    >>> top_k(torch.tensor([[1.0, 3.0, 2.0]]), k=2)
    tensor([[-inf, 3., 2.]])
    """
    require(k >= 1, f"top_k: k={k} is not 1 or more")
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def top_p(logits, p):
    """Nucleus sampling (arXiv:1904.09751): from the most likely token down, keep the fewest tokens
    whose probabilities add up to at least p: (B, V) -> (B, V). p=1 keeps all tokens, p=0 keeps one.

    ValueError unless 0 <= p <= 1.

    >>> top_p(torch.tensor([[0.2, 0.5, 0.3]]).log(), p=0.7).exp()        # 0.5 + 0.3 >= 0.7
    tensor([[0.0000, 0.5000, 0.3000]])
    """
    require(0 <= p <= 1, f"top_p: p={p} is not between 0 and 1")
    if p == 1:
        return logits  # rounding below could exclude unlikely tokens
    order = logits.argsort(dim=-1, descending=True, stable=True)  # (B, V), most likely first
    probs = logits.gather(-1, order).softmax(-1)
    mass_before = probs.cumsum(-1) - probs  # probability of all more likely tokens together
    excluded = mass_before >= p  # the more likely tokens already reach p
    excluded[..., 0] = False
    # excluded[b, i] is about token order[b, i]; put it at that token's place.
    by_token = torch.zeros_like(excluded).scatter(-1, order, excluded)
    return logits.masked_fill(by_token, -math.inf)


def last_logits(model, ids):
    """Logits after the last token of each row, padded on the right with PAD: (B, T) -> (B, V).

    Two savings: identical rows run once (at first the N candidates of a prompt are identical); and
    rows run in pieces of similar lengths and about 4,096 tokens, which fit into a CPU's cache.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 3)
    >>> last_logits(uniform, torch.tensor([[1, 2], [1, PAD]])).shape
    torch.Size([2, 3])
    """
    unique, inverse = ids.unique(dim=0, return_inverse=True)  # ids[i] is unique[inverse[i]]
    lengths = (unique != PAD).sum(dim=1)
    logits = [None] * len(unique)
    for rows in pieces_by_tokens(lengths.tolist()):  # indices of rows of similar length
        ends = lengths[rows]  # (rows,); the last token of a row is at ends - 1
        piece = unique[rows, : int(ends.max())].clamp(min=0)  # PAD -> 0; a causal model ignores it
        if hasattr(model, "next_token_logits"):
            found = model.next_token_logits(piece, ends)
        else:
            found = model(piece)[torch.arange(len(rows), device=ends.device), ends - 1]
        for row, values in zip(rows, found):
            logits[row] = values
    return torch.stack(logits)[inverse]


def sample(model, prompts, *, max_new_tokens, temperature=1.0, logit_filter=None, eos_id=EOS,
           pad_id=PAD, generator=None):
    """Continue each prompt; return the NEW tokens of each, EOS included.

    prompts: 1-D rows of any lengths, without padding, or a (B, T) tensor padded with pad_id on
    either side. Only the runs of pad_id at the ends of a row are padding; elsewhere it is a token.
    logit_filter: (B, V) -> (B, V).
    A token is drawn from softmax(logit_filter(logits / temperature)); temperature=0 takes the most
    likely one of logit_filter(logits). Generation of a row stops at EOS (unless eos_id=None), after
    max_new_tokens, or when prompt and answer together have the model's max_seq_len tokens.
    An EOS inside a prompt is an ordinary token. The draws of a row do not depend on other rows.

    Cost: B * new * (prompt + new) tokens run through the model. A KV cache, which keeps the keys
    and values of earlier tokens, would make it B * (prompt + new).

    ValueError: an empty prompt, no room for a new token, max_new_tokens < 1, temperature < 0, or
    logits that are (after the filter) NaN, +inf, or all -inf.

    >>> class CountUp(nn.Module):                     # after token i comes token i + 1
    ...     def forward(self, ids):
    ...         return F.one_hot(ids + 1, VOCAB_SIZE).float()
    >>> sample(CountUp(), [[1, 2], [254]], max_new_tokens=3, temperature=0)
    [tensor([3, 4, 5]), tensor([255, 256])]
    """
    limit = getattr(model, "max_seq_len", math.inf)
    prompts = checked_rows(prompts, pad_id, limit)  # 1-D rows without padding, not too long
    require(max_new_tokens >= 1, f"sample: max_new_tokens={max_new_tokens} is not 1 or more")
    require(temperature >= 0, f"sample: temperature={temperature} is not 0 or more")
    if not prompts:
        return []
    device = device_of(model)  # where its weights are, such as "cpu" or "cuda"
    uniform = torch.rand(len(prompts), max_new_tokens, generator=generator).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=PAD)
    ids = F.pad(ids, (0, max_new_tokens), value=PAD).to(device)  # (B, T + new)
    active = torch.arange(len(prompts), device=device)  # rows that are not finished
    with evaluating(model):  # no gradients, no dropout
        for step in progress(range(max_new_tokens), "sampling"):  # with a progress bar
            longest = int(lengths[active].max())
            logits = last_logits(model, ids[active, :longest])  # (active rows, V)
            logits = logits / temperature if temperature > 0 else logits
            logits = logits if logit_filter is None else logit_filter(logits)
            require(bool(logits.amax(-1).isfinite().all()),
                    f"sample: NaN, +inf or only -inf in the logits at new token {step}")
            if temperature == 0:
                tokens = logits.argmax(-1)
            else:
                # The first token whose cumulative probability exceeds the row's uniform number.
                # (With torch.multinomial the draws of a row would depend on the other rows.)
                is_apple = ids.device.type == "mps"  # Apple's GPU, which has no float64
                probs = logits.to(torch.float32 if is_apple else torch.float64).softmax(-1)
                cumulative = probs.cumsum(-1)  # (active rows, V)
                # The uniform number is below 1. Times the last entry of `cumulative`, which is 1 up
                # to rounding, it stays below that entry, and the index found is never V.
                level = uniform[active, step].unsqueeze(1).to(probs.dtype) * cumulative[:, -1:]
                tokens = torch.searchsorted(cumulative, level, right=True).squeeze(1)
            ids[active, lengths[active]] = tokens
            lengths[active] += 1
            unfinished = lengths[active] < limit
            if eos_id is not None:
                unfinished &= tokens != eos_id
            active = active[unfinished]  # finished rows leave the batch
            if len(active) == 0:
                break
    return [row[len(prompt) : end].clone()
            for prompt, row, end in zip(prompts, ids.cpu(), lengths.tolist())]


def respond(model, prompts, text, max_new_tokens, temperature=1.0, generator=None):
    """One answer to each prompt: sample() for texts. `text` is a TextFormat; text.text decodes.

    >>> model = Transformer(ModelConfig(dim=8, depth=1))
    >>> len(respond(model, ["sort ba", "sort dc"], TextFormat(), max_new_tokens=4))
    2
    """
    rows = sample(model, [text.prompt_ids(prompt) for prompt in prompts], generator=generator,
                  max_new_tokens=max_new_tokens, temperature=temperature, eos_id=text.eos_id)
    return [text.text(row) for row in rows]


# 5. Log-probabilities and losses ------------------------------------------------------------------
# A row of ids is a prompt, its response and, on the right, padding; prompt_lens says where the
# response begins. Only the run of pad_id at the end of a row is padding. What usually goes wrong:
#     the shift   the logits at position t predict token t + 1
#     the mask    only tokens of the response count, EOS included, prompt and padding excluded
#
# What DPO wants. We have two responses to a prompt x, and somebody preferred the "chosen" one. The
# obvious loss, -log p(chosen) + log p(rejected), has a gradient that never fades: however small
# p(rejected) is, it is pushed down further, until the model writes nonsense. So DPO starts from a
# goal that has an optimum: a high mean reward, without going far from the reference. Here r(x, y)
# is the unknown reward behind the preferences. (The judge's scores are not r; they only say which
# response is chosen.) pi(y|x) is the probability of response y under the policy, and ref(y|x) under
# the reference.
#
#     max_pi  sum over y of pi(y|x) [ r(x, y) - beta log( pi(y|x) / ref(y|x) ) ]
#
# The sum of pi log(pi / ref) is the KL divergence, KL(pi || ref), a measure of how far pi is from
# ref: 0 if they are equal, positive if not. The optimum of this goal is (Eq. 4 of [2])
#
#     pi*(y|x) = ref(y|x) exp( r(x, y) / beta ) / Z(x), with Z(x) such that the sum over y is 1
#
# because, solved for r, this is r = beta log(pi* / ref) + beta log Z, and with that r the goal is
#
#     sum over y of pi [ beta log(pi* / ref) + beta log Z - beta log(pi / ref) ]
#         = beta log Z - beta sum over y of pi log(pi / pi*) = beta log Z - beta KL(pi || pi*)
#
# which is largest where the KL divergence is 0, at pi = pi*.
#
# Now let some policy pi be given, and put the reward beta log( pi(y|x) / ref(y|x) ) in the place of
# r. Then Z(x) = 1 and pi* = pi. So each policy is the optimum for a reward of its own, its IMPLICIT
# REWARD. (Adding a number c(x) to that reward would not change its optimum. But it would cancel in
# the difference of the rewards of two responses to x, and the loss below uses nothing else.)
#
# What links rewards to preferences is an assumption, the Bradley-Terry model: y1 is preferred to y2
# with probability sigmoid( r(x, y1) - r(x, y2) ). The loss is minus the log of this probability for
# the implicit reward of the policy, where y1 is the chosen response and y2 the rejected one:
#
#     -log sigmoid( beta log( pi(y1|x) / ref(y1|x) ) - beta log( pi(y2|x) / ref(y2|x) ) )
#
# Its gradient fades as the difference grows. (Reinforcement learning from human feedback, RLHF,
# first fits a reward to the preferences and then searches for the policy that is best for it. Here
# one fit does both, because the policy is the optimum for its implicit reward.)


def row_lengths(ids, pad_id):
    """Tokens before the padding of each row: (B, T) -> (B,). (Do not pad with EOS: the EOS that
    ends the response would count as padding.)

    >>> row_lengths(torch.tensor([[0, 7, 0, 0]]), pad_id=0)
    tensor([2])
    """
    number = torch.arange(1, ids.shape[1] + 1, device=ids.device)  # (T,), 1 to T
    return ((ids != pad_id) * number).amax(dim=1)  # number of the last token that is no padding


def token_logprobs(model, ids, pad_id=PAD):
    """log p(ids[:, t+1] | ids[:, :t+1]) at index t: (B, T) -> (B, T-1), in nats.

    Padding is replaced by 0 before the model is called. The result is float32 or wider whatever the
    dtype of the model: a sum over 200 tokens in bfloat16 can be off by 2 nats.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 4)
    >>> token_logprobs(uniform, torch.tensor([[3, 1, 2]]))           # ln(1/4) each
    tensor([[-1.3863, -1.3863]])
    """
    place = torch.arange(ids.shape[1], device=ids.device)  # (T,), 0 to T-1
    ids = ids.masked_fill(place >= row_lengths(ids, pad_id)[:, None], 0)
    logits = model(ids[:, :-1])  # (B, T-1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Cross-entropy is the negative log-likelihood of the token that follows.
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -nll.view(len(ids), -1)


def response_mask(ids, prompt_lens, pad_id=PAD):
    """True at index t if token t + 1 belongs to the response: (B, T), (B,) -> (B, T-1) bool.

    Only the run of pad_id at the end of a row is padding; before it, pad_id is an ordinary token.
    The first token of a row is never predicted, so prompt_len 0 means the same as 1.

    >>> response_mask(torch.tensor([[5, 6, 7, 8, EOS, PAD]]), torch.tensor([2]))
    tensor([[False,  True,  True,  True, False]])
    """
    predicted = torch.arange(1, ids.shape[1], device=ids.device)  # (T-1,): t + 1 at index t
    end = row_lengths(ids, pad_id)
    return (predicted >= prompt_lens[:, None]) & (predicted < end[:, None])


def sequence_logprobs(model, ids, prompt_lens, pad_id=PAD):
    """log p(response | prompt) of each row, the SUM over its tokens: (B, T), (B,) -> (B,), in nats.

        log p(y | x) = sum_t log p(y_t | x, y_<t)                            the chain rule

    DPO is derived for this sum. Divided by the number of tokens, as in some code, it is no longer
    log p(y | x), and the derivation breaks. Padding is as in response_mask, precision as in
    token_logprobs; tokens outside of the response may have log p = -inf.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, VOCAB_SIZE)
    >>> ids = torch.tensor([[5, 6, 7, EOS, PAD]])              # prompt 5 6, response 7 EOS
    >>> sequence_logprobs(uniform, ids, torch.tensor([2]))     # two tokens at ln(1/257) each
    tensor([-11.0982])
    """
    logprobs = token_logprobs(model, ids, pad_id)  # (B, T-1)
    mask = response_mask(ids, prompt_lens, pad_id)  # (B, T-1)
    return logprobs.masked_fill(~mask, 0.0).sum(dim=1)  # not "* mask": 0 * -inf would be NaN


def sft_loss(model, ids, prompt_lens, pad_id=PAD):
    """Supervised fine-tuning: mean of -log p over all response tokens of a batch; scalar, in nats.

    The mean is over tokens and not over rows. It is zero, with zero gradient, if no row has a
    response. (Training minimises it through sft_objective, in section 8, which returns the sum and
    the count apart.)

    >>> uniform = lambda ids: torch.zeros(*ids.shape, VOCAB_SIZE)
    >>> sft_loss(uniform, torch.tensor([[5, 6, 7, EOS, PAD]]), torch.tensor([2]))     # ln 257
    tensor(5.5491)
    """
    n_tokens = response_mask(ids, prompt_lens, pad_id).sum()
    return -sequence_logprobs(model, ids, prompt_lens, pad_id).sum() / n_tokens.clamp(min=1)


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, *, beta=0.1):
    """Direct Preference Optimization, Eq. 7 of [2]. All tensors (B,), from sequence_logprobs.

        reward(y) = beta * (log pi(y|x) - log ref(y|x))      the implicit reward, not the judge's
        L = -log sigmoid( reward(chosen) - reward(rejected) )

    Returns (losses, rewards of the chosen, rewards of the rejected), the rewards detached. If the
    policy equals the reference, the loss is log 2. Larger beta keeps the policy closer to the
    reference: the sigmoid sees beta times the change of log pi, so the gradient, larger at first,
    fades after a smaller change. (beta is 0.1 in [1], and 1 in section 11.) Only the difference of
    the rewards counts: log pi(chosen) may fall, if log pi(rejected) falls more.

    >>> logp = torch.tensor
    >>> dpo_loss(logp([-4.0]), logp([-9.0]), logp([-5.0]), logp([-6.0]), beta=0.5)
    (tensor([0.1269]), tensor([0.5000]), tensor([-1.5000]))
    """
    rewards_chosen = beta * (policy_chosen - ref_chosen)
    rewards_rejected = beta * (policy_rejected - ref_rejected)
    losses = -F.logsigmoid(rewards_chosen - rewards_rejected)
    return losses, rewards_chosen.detach(), rewards_rejected.detach()


def spin_loss(policy_real, policy_generated, opponent_real, opponent_generated, *, lam=0.1):
    """Self-Play Fine-Tuning, Eq. 4.7 of [3] with its loss l(t) = log(1 + e^-t) = -log sigmoid(t).

    This is dpo_loss under other names: the demonstration ("real") is the chosen response; the
    opponent, which is the model at the start of the round, is the reference and wrote the rejected
    response; lambda is DPO's beta.

    >>> spin_loss(*torch.tensor([[-4.0], [-9.0], [-5.0], [-6.0]]), lam=0.5)[0]
    tensor([0.1269])
    """
    return dpo_loss(policy_real, policy_generated, opponent_real, opponent_generated, beta=lam)


# 6. The judge -------------------------------------------------------------------------------------
# The same model is the judge. It is shown a prompt and a response in a judge prompt, and a score is
# read from the verdict in its reply. What usually goes wrong here: the score is read from the
# response instead of the reply, or a reply without a score breaks the loop.


@dataclass(frozen=True)
class RewardConfig:
    """How to ask a judge for a score, and how to read the score from its reply.

    prompt_template: the template of the judge prompt, with {{ prompt }} and {{ response }}.
    reward_regex_template: what a verdict looks like: literal text with one {{ reward }}. (Despite
    the name, it is not a regular expression; parse() says what need not be exact.)
    parse_reward: your own function from a reply to a score or None, instead of that template.
    reward_range: (lowest, highest) score; a score outside counts as none.
    ValueError for a template with missing or unknown variables, or with {{ reward }} twice.

    >>> c = RewardConfig("{{ prompt }} {{ response }}", "Score: {{ reward }}", reward_range=(0, 5))
    >>> [c.parse(reply) for reply in ("Score: 1. No, score:4/5", "**Score:** 4", "Score: 50")]
    [4.0, 4.0, None]
    """

    prompt_template: str
    reward_regex_template: str | None = None
    parse_reward: Callable[[str], float | None] | None = None
    reward_range: tuple[float, float] | None = None

    def __post_init__(self):
        check_template("prompt_template", self.prompt_template, {"prompt", "response"})
        if self.parse_reward is None:
            verdict = self.reward_regex_template or ""
            check_template("reward_regex_template", verdict, {"reward"})
            require(len(_VARIABLE.findall(verdict)) == 1,
                    f"the reward_regex_template {verdict!r} has its variable more than once")

    def render(self, prompt, response):
        """The judge prompt for one response."""
        template = textwrap.dedent(self.prompt_template)  # without common indentation
        return render(template, prompt=prompt, response=response)

    def parse(self, reply):
        """The score of the LAST verdict in the reply; None if there is no verdict, or if the last
        one is outside reward_range, whatever earlier ones say. Never raises (parse_reward may).

        A score is a finite decimal number with ASCII digits, such as 4, -1, 2.5 or .5.
        Case, the amount of white space, Markdown emphasis (* _ `), and one opening bracket or quote
        before the number do not matter; white space between text and number may be missing. What
        follows the number, such as "/5", does not matter unless the template goes on.
        """
        # last_number, in section 13, finds the number at {{ reward }} in the last verdict.
        parse = self.parse_reward or functools.partial(last_number, self.reward_regex_template)
        score = parse(reply)
        if score is None or not math.isfinite(score):
            return None
        low, high = self.reward_range or (-math.inf, math.inf)
        return score if low <= score <= high else None


# For a real chat model: put the turn markers of its chat format around this template. It asks
# for points to be added up, as in [1]. With such a prompt, and before any training to judge, the
# model of [1] agreed with people on 65 % of the pairs of answers, and far less often when it was
# asked to choose one of five descriptions of quality.
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
    reward_regex_template="Score: {{ reward }}", reward_range=(0, 5))

# The judge prompt of the letter world (section 1) is short, because every byte is a token. Of the
# verdict only the sum is read; the points before it are intermediate steps.
LetterTask.JUDGE = RewardConfig("? {{ prompt }}\n{{ response }}\n", "= {{ reward }}",
                                reward_range=(0, 5))
MAX_VERDICT_TOKENS = 16  # "11101 = 4" and EOS take 10


def judge(model, reward_config, prompts, responses, *, encode=encode, decode=decode, n_samples=3,
          max_new_tokens=160, temperature=0.7, logit_filter=None, eos_id=EOS, generator=None):
    """The model's score of each response: (B,) floats, NaN where it gave none.

    Each response is judged n_samples times (3 in [1]), and the valid scores are averaged. Only the
    reply is parsed, so a "Score: 5" inside a response is never taken for the score.
    encode, decode, eos_id: of the judging model. A reply is decoded without its EOS. (A judge
    prompt has no chat template around it.)

    ValueError: unequal numbers of prompts and responses, or a judge prompt that leaves the model no
    room to reply.

    >>> class Four(nn.Module):                         # writes "4", whatever it reads
    ...     def forward(self, ids):
    ...         return 99.0 * F.one_hot(torch.full_like(ids, ord("4")), VOCAB_SIZE)
    >>> judge(Four(), RewardConfig("{{ prompt }}: {{ response }}", "{{ reward }}"),
    ...       ["sort ba", "sort dc"], ["ab", "dc"], max_new_tokens=1)
    tensor([4., 4.])
    """
    require(len(prompts) == len(responses),
            f"judge: {len(prompts)} prompts but {len(responses)} responses")
    text = TextFormat(encode, decode, eos_id=eos_id)
    asked = [text.ids(reward_config.render(*pair)) for pair in zip(prompts, responses)]
    rows = [ids for ids in asked for _ in range(n_samples)]  # row b * n_samples + i
    replies = sample(model, rows, max_new_tokens=max_new_tokens, temperature=temperature,
                     logit_filter=logit_filter, eos_id=eos_id, generator=generator)
    scores = [reward_config.parse(text.text(reply)) for reply in replies]
    scores = [math.nan if score is None else score for score in scores]
    scores = torch.tensor(scores, dtype=torch.float).view(len(prompts), n_samples)
    return scores.nanmean(dim=1)


# 7. Preference pairs ------------------------------------------------------------------------------
# For each prompt the model writes N candidates, a reward function scores them, and a picker chooses
# two. A reward function (the model itself, another model, or a program) has the form
#     reward_fn(prompts: list[str], responses: list[str]) -> (B,) rewards, NaN for "no opinion"
# What usually goes wrong: a prompt is skipped (tie, no reward), and from then on prompts are paired
# with the answers to other prompts.


class PreferencePair(NamedTuple):
    """Token ids of one prompt and two responses, their rewards, and their log-probabilities under
    the reference, filled in by with_reference_logprobs (section 8).

    >>> PreferencePair(*torch.tensor([[7], [8], [9]])).rejected
    tensor([9])
    """

    prompt: Tensor  # 1-D, inside the chat template
    chosen: Tensor  # 1-D; ends with EOS unless it was cut off
    rejected: Tensor
    chosen_reward: float = math.nan
    rejected_reward: float = math.nan
    ref_chosen: float = math.nan
    ref_rejected: float = math.nan


def pick_best_worst(rewards):
    """The best and the worst of (N,) rewards, as in [1]; None if no two differ. NaN never counts.
    (Section 13 has two other pickers.)

    >>> pick_best_worst(torch.tensor([2.0, 5.0, math.nan, 1.0]))
    (1, 3)
    """
    known = (~rewards.isnan()).nonzero().flatten()  # indices of the candidates with a reward
    if len(known) == 0 or rewards[known].min() == rewards[known].max():
        return None
    best, worst = rewards[known].argmax(), rewards[known].argmin()  # places in `known`
    return int(known[best]), int(known[worst])


def make_pair(prompt, candidates, rewards, pick_pair=pick_best_worst, is_valid_pair=None):
    """(outcome, pair) of the N candidates of a prompt. The pair may be None. The outcomes are
        "pairs"      there is a pair (plural, because it is also the key of the count)
        "unparsed"   nothing was picked, and fewer than two candidates have a reward
        "tied"       nothing was picked, although two or more candidates have a reward
        "invalid"    the two have equal tokens, or is_valid_pair refuses their rewards

    >>> make_pair(torch.tensor([7]), torch.tensor([[8], [9]]), torch.tensor([1.0, 1.0]))
    ('tied', None)
    """
    picked = checked_pick(pick_pair(rewards), len(candidates))  # two different indices, or None
    if picked is None:
        return ("tied" if (~rewards.isnan()).sum() > 1 else "unparsed"), None
    best, worst = picked
    chosen, rejected = candidates[best], candidates[worst]
    pair = PreferencePair(prompt, chosen, rejected, float(rewards[best]), float(rewards[worst]))
    is_valid = is_valid_pair or operator.gt  # chosen > rejected; a picker may return equal ones
    if chosen.equal(rejected) or not is_valid(pair.chosen_reward, pair.rejected_reward):
        return "invalid", None
    return "pairs", pair


def generate_preferences(model, prompts, reward_fn, *, n_candidates=4, n_pairs=None,
                         pick_pair=pick_best_worst, is_valid_pair=None, text=TextFormat(), seed=0,
                         **sampling):
    """Write N candidates for each prompt, reward them, and pick one pair of each prompt.

    Prompts are worked through in chunks of P <= 64. reward_fn is called once per chunk, with P * N
    candidates, and returns as many numbers in a list, array or tensor, NaN for no opinion.
    n_pairs: stop at this many, and write no further chunk. One pass over the prompts; a
    prompt that is listed twice is asked twice.
    is_valid_pair(chosen_reward, rejected_reward): by default, chosen_reward > rejected_reward.
    sampling: max_new_tokens, temperature, logit_filter of sample(). All draws follow from the seed,
    those of reward_fn and pick_pair too, because torch's global generator is seeded.

    Returns the pairs, and how many prompts ended in each outcome of make_pair: "pairs", "unparsed",
    "tied", "invalid". ValueError if there is no pair at all, a warning if fewer than n_pairs.

    >>> reward = lambda prompts, responses: [i % 4 for i in range(len(responses))]
    >>> model = Transformer(ModelConfig(dim=8, depth=1))
    >>> pairs, counts = generate_preferences(model, ["hi", "ho"], reward, max_new_tokens=9)
    >>> [(pair.chosen_reward, pair.rejected_reward) for pair in pairs], counts["tied"]
    ([(3.0, 0.0), (3.0, 0.0)], 0)
    """
    require(n_candidates >= 2, f"n_candidates={n_candidates} is not 2 or more")

    def write_reward_and_pick(numbered):
        """The (outcome, pair) of each prompt of a chunk."""
        number, chunk = numbered
        asked = [prompt for prompt in chunk for _ in range(n_candidates)]
        # Row p * N + i of what follows is candidate i of prompt p.
        with seeded(seed, number):  # seeds torch's global generator, from which all draws come
            rows = sample(model, [text.prompt_ids(prompt) for prompt in asked],
                          eos_id=text.eos_id, **sampling)
            rewards = reward_fn(asked, [text.text(row) for row in rows])
            rewards = as_rewards(rewards, len(rows))  # (P * N,), whatever form they had
            made = []
            for p, prompt in enumerate(chunk):
                of_p = slice(p * n_candidates, (p + 1) * n_candidates)
                made.append(make_pair(text.prompt_ids(prompt), rows[of_p], rewards[of_p],
                                      pick_pair, is_valid_pair))
        return made

    # Chunks bound the memory. The first is small, so that JudgeReward (section 13) can raise an
    # error early if a judge gives no score at all.
    chunks = [prompts[:4], *(prompts[at : at + 64] for at in range(4, len(prompts), 64))]
    # parallel_map is a lazy map(); with several processes each does a share of the chunks.
    made = parallel_map(write_reward_and_pick, list(enumerate(chunks)), "writing, judging")
    # Collect the pairs, up to n_pairs, and count the outcomes. The last two arguments are for the
    # message of an error, which quotes the last replies of a judge.
    source = f"{len(prompts)} prompts with {n_candidates} candidates each"
    return counted_pairs(made, n_pairs, source, reward_fn)


# 8. Training --------------------------------------------------------------------------------------
# One loop over updates serves all stages. (A stage turns one model into the next, M0 into M1.) It
# minimises a weighted sum of objectives, each with its own examples:
#     SFT         -log p of response tokens, for demonstrations and verdicts
#     preference  dpo_loss or spin_loss of pairs, optionally plus -log p of the chosen response
# An objective returns a SUM of losses and a COUNT, so that several processes can share a batch; the
# loop divides the total sum by the total count.


class Objective(NamedTuple):
    """Something to minimise, and the examples that its batches are drawn from.

    >>> squares = lambda model, batch: (sum(x**2 for x in batch), len(batch), {})
    >>> Objective(examples=[1, 2, 3], loss=squares).loss(None, [2, 3])
    (13, 2, {})
    """

    examples: Sequence
    loss: Callable  # (model, list of examples) -> (sum of losses, count, {metric: sum})
    weight: float = 1.0
    size: Callable = lambda example: 0  # of an example; similar sizes meet in a batch


def collate(items, device):
    """Items (ids, prompt_len) -> ids (B, T), padded on the right with PAD, and prompt_lens (B,).

    >>> collate([(torch.tensor([5, 6, 7]), 1), (torch.tensor([8]), 0)], "cpu")
    (tensor([[ 5,  6,  7],
            [ 8, -1, -1]]), tensor([1, 0]))
    """
    rows = [ids for ids, _ in items]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return ids.to(device), torch.tensor([prompt_len for _, prompt_len in items], device=device)


def sft_objective(items, weight=1.0):
    """An Objective: sft_loss in two parts, the sum of -log p over the response tokens, and their
    number.

    >>> model = Transformer(ModelConfig(dim=8, depth=1))
    >>> items = [(torch.tensor([5, 6, 7]), 1)]
    >>> sft_objective(items).loss(model, items)[1]         # the response has two tokens
    tensor(2)
    """
    def loss(model, batch):
        ids, prompt_lens = collate(batch, device_of(model))
        n_tokens = response_mask(ids, prompt_lens).sum()
        return -sequence_logprobs(model, ids, prompt_lens).sum(), n_tokens, {}
    return Objective(items, loss, weight, size=lambda item: len(item[0]))


def pair_logprobs(model, pairs):
    """log p(chosen | prompt) and log p(rejected | prompt) of each pair: (B,) each, in nats.

    >>> uniform = nn.Embedding.from_pretrained(torch.zeros(257, 257))  # a model: all logits are 0
    >>> pair = PreferencePair(prompt=torch.tensor([7]), chosen=torch.tensor([8]),
    ...                       rejected=torch.tensor([9]))
    >>> pair_logprobs(uniform, [pair])                                     # ln(1/257) each
    (tensor([-5.5491]), tensor([-5.5491]))
    """
    items = [(torch.cat((pair.prompt, pair.chosen)), len(pair.prompt)) for pair in pairs]
    items += [(torch.cat((pair.prompt, pair.rejected)), len(pair.prompt)) for pair in pairs]
    return sequence_logprobs(model, *collate(items, device_of(model))).chunk(2)


def preference_objective(pairs, loss_fn, nll_weight=0.0):
    """loss_fn of four log-probabilities (see dpo_loss), plus a likelihood term. The count is the
    number of pairs.

        L = loss_fn(...) - nll_weight * log p(chosen)      after Eq. 1 of [5]

    Why the second term: DPO asks only that the chosen response gains relative to the rejected one.
    Both may lose probability to text that occurs in no pair. ([5] divides log p(chosen) by its
    number of tokens; here it is the sum.)

    >>> uniform = nn.Embedding.from_pretrained(torch.zeros(257, 257))
    >>> pairs = with_reference_logprobs(uniform, [PreferencePair(*torch.tensor([[7], [8], [9]]))])
    >>> preference_objective(pairs, dpo_loss).loss(uniform, pairs)[0]      # log 2
    tensor(0.6931)
    """
    def loss(model, batch):
        chosen, rejected = pair_logprobs(model, batch)  # (B,) each
        ref_chosen = chosen.new_tensor([pair.ref_chosen for pair in batch])
        ref_rejected = chosen.new_tensor([pair.ref_rejected for pair in batch])
        losses, implicit_chosen, implicit_rejected = loss_fn(
            chosen, rejected, ref_chosen, ref_rejected)
        losses = losses - nll_weight * chosen
        return losses.sum(), len(batch), {
            # Of implicit rewards, not the judge's: how often the chosen gained more, and how much.
            "reward_accuracy": (implicit_chosen > implicit_rejected).sum(),
            "reward_margin": (implicit_chosen - implicit_rejected).sum(),
            # The log-probabilities are changes since the stage began.
            "chosen_logprob": (chosen - ref_chosen).detach().sum(),
            "rejected_logprob": (rejected - ref_rejected).detach().sum()}
    return Objective(pairs, loss)


def with_reference_logprobs(model, pairs):
    """Freeze the reference: fill in ref_chosen and ref_rejected, under the model as it is now.

    DPO needs nothing else of its reference, so no second model is kept. pieces_by_tokens sorts the
    pairs by length and cuts them into pieces of about 4,096 tokens, because the logits of a piece
    take V numbers per token. The pairs come back sorted; fit shuffles them anyway.

    >>> uniform = nn.Embedding.from_pretrained(torch.zeros(257, 257))
    >>> pair = PreferencePair(*torch.tensor([[7], [8], [9]]))
    >>> round(with_reference_logprobs(uniform, [pair])[0].ref_chosen, 4)   # ln(1/257)
    -5.5491
    """
    def add_reference(piece):
        batch = [pairs[i] for i in piece]
        with evaluating(model):
            chosen, rejected = pair_logprobs(model, batch)
        values = zip(batch, chosen.tolist(), rejected.tolist())
        return [pair._replace(ref_chosen=a, ref_rejected=b) for pair, a, b in values]

    # Tokens of a pair: two rows, both as long as the longer one.
    sizes = [2 * (len(p.prompt) + max(len(p.chosen), len(p.rejected))) for p in pairs]
    found = parallel_map(add_reference, pieces_by_tokens(sizes), "reference")
    return [pair for piece in found for pair in piece]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings for the updates of a stage of any kind; the kinds are in section 9.
    ValueError for a value that makes no sense.

    >>> StageConfig(steps=0)
    Traceback (most recent call last):
    ValueError: StageConfig: steps = 0 is not above 0
    """

    kind: ClassVar[str] = "stage"
    steps: int = 200  # updates of the weights, at most
    max_epochs: float | None = None  # passes over the examples, at most; None: no limit
    batch_size: int = 32  # examples per update; 16 in [1]
    learning_rate: float = 1e-3  # its peak; [1]: 5.5e-6 for SFT, 1e-6 for DPO
    warmup: float = 0.05  # share of the updates in which the learning rate climbs to its peak
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # gradient clipping: longer gradients are scaled to this length
    checkpoint_every: int | None = None  # updates between checkpoints; None: only one, at the end
    replay_dataset: Any = None  # items (ids, prompt_len) mixed in, so as not to be forgotten
    replay_weight: float = 1.0  # weight of their sft_loss
    # Early stopping, which the recipe of section 11 does not use:
    eval_fn: Callable[[nn.Module], Any] | None = None  # the weights with its best value are kept
    eval_every: int = 50  # updates between evaluations; 200 in [1]
    eval_mode: str = "max"  # is the best value the largest ("max") or the smallest ("min")?
    patience: int | None = None  # stop after so many evaluations without a new best; None: never

    def __post_init__(self):
        check_fields(self)


def fit(model, objectives, config, *, seed=0, after_update=lambda step: None):
    """Minimise the weighted sum of the objectives; the model is changed in place. config is a
    StageConfig; after_update(step) is called after each update.

    Returns steps (how many updates), the loss and each metric as means over the last 20 updates,
    and their history, averaged to at most 50 points. ValueError if the loss is not finite.

    >>> model = Transformer(ModelConfig(dim=8, depth=1), torch.Generator().manual_seed(0))
    >>> items = [TextFormat().item("a", "b")]
    >>> config = StageConfig(steps=30, learning_rate=0.1)
    >>> record = fit(model, [sft_objective(items)], config)
    >>> record["history"][0]["loss"] > 5, record["loss"] < 1
    (True, True)
    """
    # Several processes may share the work. In a single one, rank is 0 and world_size is 1, and the
    # functions called sum_... change nothing.
    rank, world_size = rank_and_world_size()
    generator = torch.Generator().manual_seed(seed)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=config.weight_decay,
                                  fused=device_of(model).type in ("cpu", "cuda"))
    # Endless streams of batches. Examples of similar size meet in a batch: it has little padding.
    batches = [shuffled_batches(objective.examples, config.batch_size, generator, objective.size)
               for objective in objectives]
    # An epoch is one pass over the examples of the first objective; other objectives do not count.
    steps, n_examples = config.steps, len(objectives[0].examples)
    if config.max_epochs is not None:
        steps = min(steps, math.ceil(config.max_epochs * n_examples / config.batch_size))
    peak_step = max(1, round(config.warmup * steps))
    stopping = EarlyStopping(config.eval_fn, config.eval_mode, config.patience, config.eval_every)
    points = []
    model.train()
    for step in progress(range(1, steps + 1), f"training, {config.kind}"):
        # The learning rate climbs linearly to its peak (first term), then falls linearly to zero
        # (second term), which it would reach one step after the last.
        fraction = min(step / peak_step, (steps + 1 - step) / (steps + 1 - peak_step))
        optimizer.param_groups[0]["lr"] = config.learning_rate * fraction
        optimizer.zero_grad()
        loss, metrics = torch.zeros(()), {}
        for objective, stream in zip(objectives, batches):
            batch = next(stream)[rank::world_size]  # the share of this process
            loss_sum, count, metric_sums = objective.loss(model, batch)
            # Divide by the total count, so that the shares of all processes add up to the mean.
            # (A mean of their means would weight tokens unequally.)
            count = sum_over_processes(count)
            loss = loss + objective.weight * loss_sum / count
            metrics |= {name: value / count for name, value in metric_sums.items()}
        loss.backward()
        sum_gradients_over_processes(parameters)
        metrics = {"loss": loss.detach(), **metrics}
        points.append({name: sum_over_processes(x) for name, x in metrics.items()})
        require(math.isfinite(points[-1]["loss"]), f"step {step}: the loss is {points[-1]['loss']}")
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        after_update(step)
        if stopping.is_due(step, steps) and stopping.look(model):  # evaluate; is it time to stop?
            break
    stopping.restore(model)  # the weights with the best evaluation, if there was any
    return {"steps": step, **summary_of(points)}  # means, and at most 50 points of the history


# 9. Stages ----------------------------------------------------------------------------------------
# Stages can follow each other in any order. What a stage does is written in its `run` from top to
# bottom. Most defaults of losses and judging are those of the papers; the values that suit the
# letter world and its small model are in section 11.
#
# A data set is anything with len() and [i]. Or it is a function, train_dataset=lambda model: [...],
# that is called with the model when the stage begins, and returns one.


class Context(NamedTuple):
    """What a stage is told besides the model.

    >>> Context(seed=3).text.eos_id
    256
    """

    text: TextFormat = TextFormat()
    judges: dict[str, RewardConfig] = {"default": DEFAULT_REWARD_CONFIG}  # by name
    seed: int = 0
    after_update: Callable[[int], None] = lambda step: None  # called after each update


def minimise(model, objective, config, context):
    """The last step of every stage: fit() the objective, and the replay data if there are any.

    >>> model, items = Transformer(ModelConfig(dim=8, depth=1)), [TextFormat().item("hi", "yo")]
    >>> minimise(model, sft_objective(items), StageConfig(steps=2), Context())["steps"]
    2
    """
    objectives = [objective]
    if config.replay_dataset is not None and config.replay_weight > 0:
        # The entries of the data set, all checked. If it is a function of the model, it is called.
        items = checked_data(config, "replay_dataset", model, context.text)
        objectives.append(sft_objective(items, config.replay_weight))
    return fit(model, objectives, config, seed=context.seed, after_update=context.after_update)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on items (ids, prompt_len). loss_on_prompt=True: prompts count too.

    >>> stage = SFTConfig(train_dataset=[TextFormat().item("hi", "yo")], steps=3)
    >>> stage.run(Transformer(ModelConfig(dim=8, depth=1)), Context())["steps"]
    3
    """

    kind: ClassVar[str] = "sft"
    train_dataset: Any
    loss_on_prompt: bool = False

    def run(self, model, context):
        items = checked_data(self, "train_dataset", model, context.text)
        if self.loss_on_prompt:
            items = [(ids, 0) for ids, _ in items]  # a prompt of 0 tokens: all else is response
        return minimise(model, sft_objective(items), self, context)


@dataclass(frozen=True, kw_only=True)
class SelfPlayConfig(StageConfig):
    """SPIN [3]: prefer each demonstration to what the model answers when the stage begins.

    A demonstration is preferred even where the model's own answer is better. So the model gets no
    better than its demonstrations: once it writes as they do, chosen and rejected answers are
    alike, and nothing is left to learn (Theorem 5.2 of [3]).

    What usually goes wrong: the rejected answers are written once, at the start of the round, and
    with a small lam the gradient fades only after a large change of log p. So a long round
    overshoots: what the model wrote too often at first is pushed down until it is too rare.

    >>> stage = SelfPlayConfig(train_dataset=[TextFormat().item("hi", "yo")], steps=1)
    >>> record = stage.run(Transformer(ModelConfig(dim=8, depth=1)), Context())
    >>> round(record["loss"], 4)                              # log 2, before the only update
    0.6931
    """

    kind: ClassVar[str] = "spin"
    train_dataset: Any  # items (ids, prompt_len)
    lam: float = 0.1  # lambda; [3]: 0.1, and 5 in the last round
    max_epochs: float | None = 8
    max_new_tokens: int = 64
    temperature: float = 1.0
    logit_filter: Callable | None = None

    def run(self, model, context):
        items = checked_data(self, "train_dataset", model, context.text)

        def write(start):
            chunk = [(ids[:n], ids[n:]) for ids, n in items[start : start + 64]]
            with seeded(context.seed, start):
                rows = sample(model, [prompt for prompt, _ in chunk], eos_id=context.text.eos_id,
                              max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                              logit_filter=self.logit_filter)
            return [PreferencePair(prompt, real, row) for (prompt, real), row in zip(chunk, rows)]

        written = parallel_map(write, range(0, len(items), 64), "writing")
        pairs = with_reference_logprobs(model, [pair for chunk in written for pair in chunk])
        loss_fn = functools.partial(spin_loss, lam=self.lam)
        return minimise(model, preference_objective(pairs, loss_fn), self, context)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(StageConfig):
    """DPO [2] on pairs that exist already: either what load_pairs (section 16) returns, or texts as
    triples (prompt, chosen, rejected), or as dicts with these keys.

    >>> stage = DPOConfig(pair_dataset=[("hi", "good", "bad")], steps=9, max_epochs=None)
    >>> record = stage.run(Transformer(ModelConfig(dim=8, depth=1)), Context())
    >>> [round(point["loss"], 4) for point in record["history"]][:1]   # log 2 before any update
    [0.6931]
    """

    kind: ClassVar[str] = "dpo"
    pair_dataset: Any
    beta: float = 0.1  # as in [1]; 1 in the recipe
    loss_fn: Callable = dpo_loss  # or any function of the same form, with the keyword beta
    nll_weight: float = 0.0  # of the likelihood term; see preference_objective
    max_epochs: float | None = 8  # more passes over few pairs overfit them

    def run(self, model, context):
        pairs = checked_data(self, "pair_dataset", model, context.text)
        pairs = with_reference_logprobs(model, pairs)
        loss_fn = functools.partial(self.loss_fn, beta=self.beta)
        objective = preference_objective(pairs, loss_fn, self.nll_weight)
        return minimise(model, objective, self, context)


@dataclass(frozen=True, kw_only=True)
class RewardStageConfig(StageConfig):
    """The settings that SelfRewardDPOConfig and ExternalRewardDPOConfig share.

    >>> RewardStageConfig(prompt_dataset=["hi"], n_candidates=6).max_epochs
    8
    """

    prompt_dataset: Any  # prompts (str)
    beta: float = 0.1  # this and the next three as in DPOConfig
    loss_fn: Callable = dpo_loss
    nll_weight: float = 0.0
    max_epochs: float | None = 8
    n_candidates: int = 4  # N in [1]
    n_pairs: int | None = None  # None: as many as there are; 3,964 and 6,942 in the rounds of [1]
    pick_pair: Callable = pick_best_worst
    is_valid_reward_pair: Callable[[float, float], bool] | None = None  # is_valid_pair of section 7
    pairs_file: Any = None  # a path: the pairs are saved there, to be looked at
    max_new_tokens: int = 64  # of an answer
    temperature: float = 1.0  # of an answer. [1] has 0.7: too little variety for a small model
    logit_filter: Callable | None = None  # in [1]: lambda logits: top_p(logits, 0.9)


def preference_round(model, reward_fn, config, context):
    """One round of the loop, such as M1 to M2: write, judge, pair, freeze, minimise.

    Returns what fit() returns, and the counts of generate_preferences.

    >>> model = Transformer(ModelConfig(dim=8, depth=1), torch.Generator().manual_seed(0))
    >>> reward = lambda prompts, responses: range(len(responses))
    >>> config = RewardStageConfig(prompt_dataset=["a", "b"], steps=1)
    >>> record = preference_round(model, reward, config, Context())
    >>> round(record["loss"], 4), record["pairs"]            # the policy starts at the reference
    (0.6931, 2)
    """
    prompts = checked_data(config, "prompt_dataset", model, context.text)
    # Write, judge, pair.
    pairs, counts = generate_preferences(
        model, prompts, reward_fn, n_candidates=config.n_candidates, n_pairs=config.n_pairs,
        pick_pair=config.pick_pair, is_valid_pair=config.is_valid_reward_pair, text=context.text,
        seed=context.seed, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        logit_filter=config.logit_filter)
    if config.pairs_file is not None:
        # As JSON lines, written by one process.
        on_rank_zero(lambda: save_pairs(config.pairs_file, pairs, context.text))
    # Freeze the reference: the model as it is now.
    pairs = with_reference_logprobs(model, pairs)
    # Minimise.
    loss_fn = functools.partial(config.loss_fn, beta=config.beta)
    objective = preference_objective(pairs, loss_fn, config.nll_weight)
    return minimise(model, objective, config, context) | counts


@dataclass(frozen=True, kw_only=True)
class SelfRewardDPOConfig(RewardStageConfig):
    """Self-rewarding [1]: the model grades its own answers.

    >>> by_length = RewardConfig("{{ prompt }} {{ response }}", parse_reward=len)  # of its reply
    >>> stage = SelfRewardDPOConfig(prompt_dataset=["hi", "ho"], reward_config=by_length, steps=1)
    >>> stage.run(Transformer(ModelConfig(dim=8, depth=1)), Context())["pairs"]
    2
    """

    kind: ClassVar[str] = "self-reward"
    rewarding_model: nn.Module | None = None  # None: the model itself; another model: as in [4]
    reward_config: RewardConfig | str | None = None  # or a name in context.judges; None: the first
    n_judge_samples: int = 3  # judgements of an answer
    max_judge_tokens: int = 160  # of a reply; the default judge explains before it gives the score
    judge_temperature: float = 0.7
    judge_logit_filter: Callable[[Tensor], Tensor] | None = None

    def run(self, model, context):
        text, reward_config = context.text, find_judge(self.reward_config, context.judges)
        reward_fn = JudgeReward(  # judge(), section 6, as a function of prompts and responses
            self.rewarding_model or model, reward_config, encode=text.encode, decode=text.decode,
            eos_id=text.eos_id, n_samples=self.n_judge_samples, temperature=self.judge_temperature,
            max_new_tokens=self.max_judge_tokens, logit_filter=self.judge_logit_filter)
        return preference_round(model, reward_fn, self, context)


@dataclass(frozen=True, kw_only=True)
class ExternalRewardDPOConfig(RewardStageConfig):
    """The same loop with any other reward: a reward model, a program, people.

    >>> length = lambda prompts, responses: [len(response) for response in responses]
    >>> ExternalRewardDPOConfig(prompt_dataset=["hi"], reward_model=length).kind
    'external-reward'
    """

    kind: ClassVar[str] = "external-reward"
    reward_model: Callable  # (prompts, responses) -> rewards, (B,) or (B, 1), NaN: "no opinion"

    def run(self, model, context):
        return preference_round(model, self.reward_model, self, context)


def run_stages(model, stages, context, first=0):
    """The loop of the paper: each stage starts from the model that the previous one has left.

    Yields a record after each stage; the model is changed in place, so it can be measured then. A
    run that is resumed begins with stage `first`.

    >>> model, items = Transformer(ModelConfig(dim=8, depth=1)), [TextFormat().item("hi", "yo")]
    >>> [record["kind"] for record in run_stages(
    ...     model, [SFTConfig(train_dataset=items, steps=1)] * 2, Context())]
    ['sft', 'sft']
    """
    for index in range(first, len(stages)):
        stage, seed = stages[index], combine_seeds(context.seed, index)
        # named() puts the name of the stage before the message of an error.
        with named(f"stage {index} ({stage.kind})", ValueError), seeded(seed):
            record = stage.run(model, context._replace(seed=seed))
        yield {"stage": index, "kind": stage.kind, **record}


# 10. Measuring ------------------------------------------------------------------------------------
# Two questions: how well does a model write, and how well does it judge? Watch self_score as well,
# the model's mean score of its own answers: if it drifts away from the true score, the judge is
# being fooled.


def judging_metrics(truth, judged):
    """How well `judged` follows `truth`, both (P, N) scores. After Table 4 of [1].

    judge_pairwise   of all pairs of answers to one prompt with different true scores, the share
                     put in the right order; a tie of judged scores is half a hit
    judge_best5      share of the prompts whose favourite answer, the first one with the highest
                     judged score, is one of the truly best
    judge_exact      share of the answers whose judged score, rounded, is the true score
    judge_spearman   correlation of the ranks of true and judged scores, mean over the prompts
    judge_kendall    mean of Kendall's tau-b: (right - wrong pairs) / pairs, corrected for ties

    best5 and exact differ from Table 4: its "5-best" is about answers that the judge scores 5, and
    its "exact match" is about whole rankings.

    A judged NaN ties with everything in pairs and ranks, and counts as a miss otherwise. Prompts
    for which a number is not defined, as where all their answers have equal scores, are left out;
    the number is None if that leaves none.

    >>> judging_metrics(np.array([[1, 2, 3]]), np.array([[1, 3, 2]]))["judge_pairwise"]
    0.6666666666666666
    """
    # true_sign[p, i, j] is 1, 0 or -1: is answer i to prompt p better than answer j, equal, or
    # worse? The scores 1, 2, 3 have the signs [[0, -1, -1], [1, 0, -1], [1, 1, 0]], whose sums over
    # j, -2, 0 and 2, are 2 * rank - (N + 1): ranks, centred. Kendall's tau-b is the cosine of true
    # and judged signs, whose product counts right minus wrong pairs. Spearman's correlation is the
    # cosine of true and judged sums.
    true_sign, judged_sign = (np.nan_to_num(np.sign(x[:, :, None] - x[:, None, :]))
                              for x in (truth, judged))

    def cosine(a, b):  # of each row of two matrices; the mean over the rows
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        defined = norms > 0
        return float(((a * b).sum(1)[defined] / norms[defined]).mean()) if defined.any() else None

    P, N = truth.shape
    favourite = np.nan_to_num(judged, nan=-np.inf).argmax(1)  # (P,)
    has_favourite = ~np.isnan(judged).all(1)
    is_best = truth[np.arange(P), favourite] == truth.max(1)
    differ = true_sign != 0
    hits = ((true_sign * judged_sign)[differ] + 1) / 2  # 1 right, 0 wrong, 1/2 tied
    return {"judge_pairwise": float(hits.mean()) if differ.any() else None,
            "judge_best5": float((is_best & has_favourite).mean()),
            "judge_exact": float((np.round(judged) == truth).mean()),
            "judge_spearman": cosine(true_sign.sum(2), judged_sign.sum(2)),
            "judge_kendall": cosine(true_sign.reshape(P, N * N), judged_sign.reshape(P, N * N))}


def head_to_head(scores, others):
    """Shares of scores (P, N) that win, tie and lose against those of another model.

    >>> head_to_head([[5, 3]], [[4, 3]])
    {'win': 0.5, 'tie': 0.5, 'lose': 0.0}
    """
    sign = np.sign(np.asarray(scores) - np.asarray(others))
    signs = {"win": 1, "tie": 0, "lose": -1}
    return {name: float((sign == wanted).mean()) for name, wanted in signs.items()}


def measure(model, world, text, graded_answers, previous_scores):
    """What is measured after each stage: how well a model writes, and how well it judges.
    oracle_score: mean true score of answers drawn at temperature 1 (the oracle is the program that
    gives it); oracle_greedy: the same of answers at temperature 0;
    perfect_rate: share of drawn answers with 5; self_score: mean score that the model gives them;
    scores: the true scores (P, 5), and head_to_head of them; judging_metrics of graded_answers.

    world: the task and its data, such as LetterWorld; section 11 lists what is used.
    graded_answers: a list of (prompt, answer, true score), five per prompt, or None if the model
    cannot judge yet. previous_scores: the `scores` (P, 5) of the model before, or None.
    (With your own data nobody knows a true score: world.score is None, and graded_answers holds one
    answer per prompt, graded by people, or is an empty list.)

    >>> world, model = LetterWorld(n_eval=1), Transformer(ModelConfig(dim=8, depth=1))
    >>> sorted(measure(model, world, TextFormat(), graded_answers=None, previous_scores=None))
    ['oracle_greedy', 'oracle_score', 'perfect_rate', 'scores']
    """
    asked = [prompt for prompt in world.eval_prompts for _ in range(5)]
    answers = respond(model, asked, text, world.max_new_tokens)
    found = {}
    if world.score is not None:
        scores = np.reshape(list(map(world.score, asked, answers)), (-1, 5))  # (P, 5)
        greedy = respond(model, world.eval_prompts, text, world.max_new_tokens, temperature=0)
        greedy_scores = list(map(world.score, world.eval_prompts, greedy))
        found = {"oracle_score": float(scores.mean()), "perfect_rate": float((scores == 5).mean()),
                 "oracle_greedy": float(np.mean(greedy_scores)), "scores": scores.tolist()}
        found |= head_to_head(scores, previous_scores) if previous_scores is not None else {}
    if graded_answers is not None:
        # As a stage judges; always with 3 samples, so that all runs are measured alike.
        grade = functools.partial(
            judge, model, world.JUDGE, encode=text.encode, decode=text.decode, eos_id=text.eos_id,
            n_samples=3, max_new_tokens=MAX_VERDICT_TOKENS)
        self_score = float(grade(asked, answers).nanmean())
        found["self_score"] = None if math.isnan(self_score) else self_score
        if graded_answers:  # your own data may have no held-out example
            prompts, responses, truth = zip(*graded_answers)
            # With one answer per prompt, all answers are compared as if they had one prompt.
            shape = (-1, 5) if world.score else (1, -1)
            judged = grade(prompts, responses).numpy()
            found |= judging_metrics(np.reshape(truth, shape), np.reshape(judged, shape))
    return found


# 11. The recipe -----------------------------------------------------------------------------------
# The recipe makes M0 to M3. What it needs of a world, LetterWorld or one of your own:
#
#     CHAT_TEMPLATE, JUDGE, max_new_tokens     formats; a verdict has at most MAX_VERDICT_TOKENS
#     demonstrations(n)            -> [(prompt, answer)]       to learn to answer
#     judgements(n, model, tidy)   -> [(prompt, answer, verdict)]      to learn to judge; `model`
#                                                              is M0, which writes some of the
#                                                              answers; tidy: no nonsense
#     prompts(n, purpose)          -> [prompt]                 for a purpose such as "stage 2"
#     eval_prompts                    [prompt]                 held out of all the data above
#     graded_answers(model)        -> [(prompt, answer, true score)]   to measure all judges on the
#                                                              same answers; `model` is M0, which
#                                                              writes them, five per prompt (one if
#                                                              score is None)
#     score(prompt, answer)        -> true score, 0 to 5; score = None if nobody knows it
#
# Two terms of the loss are not in [1]: the likelihood term (section 8 says why) and REPLAY. A stage
# that trains on answers alone changes the weights that judge. Within a few rounds a small model
# forgets how to judge, and its rewards become noise. So later stages rehearse the judging data of
# M1. This means that a program, which wrote those verdicts, goes on teaching the judge. But it
# gives no rewards: they all come from the model itself.
#
# train() in section 18 puts this together, with files and a table. In outline:
#     text = TextFormat(chat_template=world.CHAT_TEMPLATE)
#     demonstrations = world.demonstrations(recipe.demonstrations)
#     make_judgements = lambda: world.judgements(recipe.judgements, m0, recipe.tidy)  # called later
#     stages = recipe_stages(recipe, world, demonstrations, make_judgements)
#     for record in run_stages(model, stages, Context(text, {"default": world.JUDGE}, seed)):
#         m0 = a copy of the model, if this was the first stage
#         graded_answers = world.graded_answers(m0), or None for M0, which cannot judge yet
#         measure(model, world, text, graded_answers, the scores of the model before)


def setting(default, quick, reason):
    """A field of the recipe: its value, its value under --quick (None: the same), and its reason.

    >>> setting(3, 1, "example").default
    3
    """
    return field(default=default, metadata={"quick": quick, "help": reason})


@dataclass(frozen=True)
class Recipe:
    """The numbers of the recipe, each with a flag on the command line. Settings of a stage or of
    the model that are not listed here keep their defaults from sections 3, 8 and 9, except
    max_new_tokens, max_judge_tokens, and loss_on_prompt for M0.

    >>> Recipe().stages
    'sft,self,self'
    """

    # name                        default  quick  what it is, and why this value
    stages: str = setting("sft,self,self", None, "stages after M0: sft, self, spin, external")
    dim: int = setting(64, None, "width of the model; 128 is slower and no better here")
    depth: int = setting(4, None, "blocks of the model; comparing two words takes several")
    base_steps: int = setting(400, 60, "updates for M0, until its answers look like answers")
    sft_steps: int = setting(1500, 120, "updates for M1, most of which go into learning to judge")
    sft_learning_rate: float = setting(4e-3, None, "for M0 and M1; 8e-3 diverges on some seeds")
    dpo_steps: int = setting(240, 30, "updates for a later stage; 8 epochs of 950 pairs are 238")
    dpo_learning_rate: float = setting(2.5e-4, None, "for later stages; 1e-3 forgets how to judge")
    beta: float = setting(1.0, None, "of DPO, and lambda of SPIN; 0.1 strays from the reference")
    nll_weight: float = setting(0.1, None, "of the likelihood term; 0: a lower true score")
    replay_weight: float = setting(4.0, None, "of the replayed judging data; 0: the judge forgets")
    n_candidates: int = setting(4, None, "answers to a prompt, as in [1]")
    judge_samples: int = setting(3, None, "judgements of an answer, as in [1]")
    demonstrations: int = setting(3200, 1600, "number of demonstrations; 3,200 in [1]")
    judgements: int = setting(12000, 1500, "number of judgements; 1,630 in [1], for 70B")
    stage_prompts: int = setting(1000, 96, "prompts for a later stage; about 950 give a pair")
    eval_prompts: int = setting(200, 40, "held-out prompts, with five answers to each")
    tidy: bool = setting(False, None, "judging data without nonsense; judges then overrate it")


def recipe_stages(recipe, world, demonstrations, make_judgements):
    """The stages of the recipe.

    demonstrations: (prompt, answer) pairs. make_judgements: a function that returns the judging
    data, the same (prompt, answer, verdict) triples at each call; or None if there are none. It is
    not called before the training of M1 begins, because M0 writes some of the answers.

    >>> [stage.kind for stage in recipe_stages(Recipe(), LetterWorld(), [("sort ba", "ab")], None)]
    ['sft', 'sft', 'self-reward', 'self-reward']
    """
    text = TextFormat(chat_template=world.CHAT_TEMPLATE)
    items = [text.item(prompt, answer) for prompt, answer in demonstrations]

    # Two data sets that are made when a stage begins. The stage calls them with its model, but they
    # ignore it: in the judging data, all answers that a model wrote are by M0.

    @functools.cache  # the model is one object, changed in place, so all stages get the same items
    def judging_items(model):
        """To learn to judge: items of a judge prompt (no chat template around it) and a verdict."""
        return [TextFormat().item(world.JUDGE.render(prompt, answer), verdict)
                for prompt, answer, verdict in make_judgements()]

    def both(model):
        """By default about four verdicts to one demonstration; fit() shuffles them."""
        return items + judging_items(model) if make_judgements else items

    sft = dict(learning_rate=recipe.sft_learning_rate)
    later = dict(learning_rate=recipe.dpo_learning_rate, steps=recipe.dpo_steps,
                 max_new_tokens=world.max_new_tokens, replay_weight=recipe.replay_weight,
                 replay_dataset=judging_items if make_judgements else None)

    def dpo(index):  # what self and external share; the prompts of each stage are drawn afresh
        prompts = world.prompts(recipe.stage_prompts, f"stage {index}")
        return dict(prompt_dataset=prompts, beta=recipe.beta, nll_weight=recipe.nll_weight,
                    n_candidates=recipe.n_candidates, **later)

    stages = [SFTConfig(train_dataset=items, loss_on_prompt=True, steps=recipe.base_steps, **sft)]
    for index, name in enumerate(recipe.stages.split(","), start=1):
        if name == "sft":
            stages.append(SFTConfig(train_dataset=both, steps=recipe.sft_steps, **sft))
        elif name == "self":  # its judge is world.JUDGE, from the Context
            stages.append(SelfRewardDPOConfig(n_judge_samples=recipe.judge_samples,
                                              max_judge_tokens=MAX_VERDICT_TOKENS, **dpo(index)))
        elif name == "external":
            true_score = lambda prompts, answers: list(map(world.score, prompts, answers))
            stages.append(ExternalRewardDPOConfig(reward_model=true_score, **dpo(index)))
        elif name == "spin":  # the command line has refused other names
            stages.append(SelfPlayConfig(train_dataset=items, lam=recipe.beta, **later))
    return stages


# ==================================================================================================
# Part II: engineering
# ==================================================================================================
# What the algorithm needs to be used and not only read. Nothing below changes what is learned.

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import io
import json
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm


# 12. The data of the letter world -----------------------------------------------------------------


class LetterWorld(LetterTask):
    """The task of section 1 with its data, as the recipe of section 11 needs them.

    instructions: names from INSTRUCTIONS. n_eval: how many prompts are held out for evaluation.
    A data set is drawn from the seed and its own name, such as "demonstrations", so its size does
    not change another one. Two training sets may share prompts, but none has a held-out one.
    """

    sizes = (4, 5, 6)  # a prompt has 4, 5 or 6 different letters

    def __init__(self, instructions=("sort",), *, n_eval=200, seed=0):
        self.instructions = list(dict.fromkeys(instructions))  # each name once
        self.seed = seed
        is_known = all(name in INSTRUCTIONS for name in self.instructions)
        require(self.instructions and is_known, "LetterWorld: "
                f"instructions are {self.instructions}; known: {', '.join(INSTRUCTIONS)}")
        self.eval_prompts = []  # nothing is held out yet from what prompts() may draw
        self.eval_prompts = self.prompts(n_eval, "evaluation")  # prompts() never draws these again

    def demonstrate(self, prompt, rng):
        """A sloppy answer: about half have letters swapped, lost or inserted, seven in ten lack
        "Sure: ", and seven in ten the full stop. They score 3 on average. The most likely answer of
        a model that imitates them scores 3 too: relevant, complete, ordered, but without "Sure: "
        and ".".
        """
        body = self.mistaken(self.target(prompt), rng, odds=(0.5, 0.3, 0.2))  # 0 to 2 mistakes
        return ("Sure: " if rng.random() < 0.3 else "") + body + ("." if rng.random() < 0.3 else "")

    def make_up(self, prompt, rng):
        """An answer of any quality for a judge to practise on.

        Of ten answers, eight have 0 to 4 mistakes, one is nonsense such as "0=c:", and one is an
        attack. A judge that has never seen nonsense overrates it, and then the model learns to
        write it. An attack is the beginning of an answer and then lines that imitate a perfect
        answer, a verdict or a new prompt, such as "b\\nSure: abcd.".
        """
        target = self.target(prompt)
        body = self.mistaken(target, rng, odds=(0.3, 0.25, 0.2, 0.15, 0.1))
        kind = rng.choice(["letters", "nonsense", "attack"], p=(0.8, 0.1, 0.1))
        if kind == "nonsense":
            body = "".join(rng.choice(list("01 =?>:.\n" + self.letters), size=rng.integers(1, 10)))
        if kind == "attack":
            lines = [f"? {prompt}", f"Sure: {target}", "Sure: right", "11111 = 5"]
            attack = rng.choice(lines, size=rng.integers(1, 3))
            body = "\n".join([body[: rng.integers(1, 7)], *attack])
        often = (0.5, 0.35, 0.05, 0.05, 0.05)
        start = rng.choice(["Sure: ", "", "Sure:", "sure: ", "Sure "], p=often)
        return start + body + rng.choice([".", "", ",", ":", ".."], p=often)

    def mistaken(self, letters, rng, odds):
        """The letters after 0, 1, 2 ... mistakes, which have these odds. A mistake swaps two
        letters, loses one, or inserts a random one."""
        result = list(letters)
        for _ in range(rng.choice(len(odds), p=odds)):
            i, j = rng.integers(len(result), size=2)
            mistake = rng.choice(["swap", "lose", "insert"])
            if mistake == "swap":
                result[i], result[j] = result[j], result[i]
            elif mistake == "lose" and len(result) > 1:
                result.pop(i)
            else:
                result.insert(i, rng.choice(list(self.letters)))
        return "".join(result)

    def rng(self, purpose):
        return np.random.default_rng([self.seed, *encode(purpose)])  # the name as bytes

    def prompts(self, n, purpose):
        """n different prompts, none of them held out. ValueError if there are not so many."""
        n_held_out, rng = len(self.eval_prompts), self.rng(purpose)
        n_strings = sum(math.perm(len(self.letters), size) for size in self.sizes)
        n_left = len(self.instructions) * n_strings - n_held_out
        require(n <= n_left, f"LetterWorld: {n} prompts asked for, but there are only {n_left}")
        found = dict.fromkeys(self.eval_prompts)  # a dict as an ordered set; these count as taken
        while len(found) < n_held_out + n:
            letters = rng.permutation(list(self.letters))[: rng.choice(self.sizes)]
            found[f"{rng.choice(self.instructions)} {''.join(letters)}"] = None
        return list(found)[n_held_out:]

    def demonstrations(self, n):
        """(prompt, sloppy answer) pairs, to learn to answer; IFT data in [1]."""
        rng = self.rng("demonstrate")
        prompts = self.prompts(n, "demonstrations")
        return [(prompt, self.demonstrate(prompt, rng)) for prompt in prompts]

    def judgements(self, n, model, tidy):
        """(prompt, answer, verdict) triples, to learn to judge; EFT data in [1].

        `model`, M0 in the recipe, writes three in ten of the answers, at four temperatures. The
        others are made up, because M0 writes too few good ones. With tidy=True all are as sloppy
        as the demonstrations: an experiment in which the judge sees no nonsense.
        """
        prompts, rng, pairs = self.prompts(n, "judgements"), self.rng("make up"), []
        n_written = 0 if tidy else round(0.3 * n)
        for i, temperature in enumerate((1.0, 1.3, 1.6, 2.0)):
            asked = prompts[:n_written][i::4]
            pairs += zip(asked, self.write(model, asked, temperature))
        make_answer = self.demonstrate if tidy else self.make_up
        pairs += [(prompt, make_answer(prompt, rng)) for prompt in prompts[n_written:]]
        return [(prompt, answer, self.verdict(prompt, answer)) for prompt, answer in pairs]

    def graded_answers(self, model):
        """What judges are measured by: (prompt, answer, true score), five answers of `model` to
        each held-out prompt. The recipe passes M0, so that all judges get the same answers."""
        asked = [prompt for prompt in self.eval_prompts for _ in range(5)]
        pairs = zip(asked, self.write(model, asked, temperature=1.0))
        return [(prompt, answer, self.score(prompt, answer)) for prompt, answer in pairs]

    def write(self, model, prompts, temperature):
        text = TextFormat(chat_template=self.CHAT_TEMPLATE)
        with seeded(self.seed, round(10 * temperature)):
            return respond(model, prompts, text, self.max_new_tokens, temperature)


# 13. Tools that Part I calls ----------------------------------------------------------------------


def pick_best_random(rewards):
    """The best, and any worse one: rejected answers are then of every quality. (Pickers draw from
    torch's global generator, which generate_preferences seeds.)

    >>> pick_best_random(torch.tensor([2.0, 5.0]))
    (1, 0)
    """
    picked = pick_best_worst(rewards)
    if picked is None:
        return None
    worse = (rewards < rewards[picked[0]]).nonzero().flatten()
    return picked[0], int(worse[torch.randint(len(worse), ())])


def pick_random_pair(rewards):
    """Any two, the better one chosen; None if the two that were drawn do not differ.

    >>> pick_random_pair(torch.tensor([2.0, 5.0]))
    (1, 0)
    """
    two = torch.randperm(len(rewards))[:2]
    picked = pick_best_worst(rewards[two])
    return None if picked is None else (int(two[picked[0]]), int(two[picked[1]]))


def last_number(template, reply):
    """The last number in the reply that stands where the template has {{ reward }}; None if there
    is none. RewardConfig.parse says what counts as a number, and what does not matter.

    >>> last_number("= {{ reward }} of 5", "= 3 of 5, no: = **4** of 5")
    4.0
    """
    # The template becomes a regular expression. For "= {{ reward }} of 5" it is, in short,
    #     =\s*(number)\s*of\s+5
    number = r"([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    opening = r"[\"'(\[{<\u201c\u2018]"  # one quote or bracket may stand before the number
    emphasis = r"[*_`]"  # of Markdown, which is dropped

    def pattern(literal):
        """Literal text with any white space where it has some."""
        words = re.sub(emphasis, "", literal).split()
        return r"\s+".join(re.escape(word) for word in words)

    before, _variable, after = map(pattern, _VARIABLE.split(template))
    # Of "12 points", the template "{{ reward }} points" must not read the 2.
    before = rf"{before}\s*(?:{opening}\s*)?" if before else "(?<![0-9])"
    reply = re.sub(rf"([0-9]){emphasis}+(?=[0-9])", r"\1 ", reply)  # "4**5**" is not 45
    reply = re.sub(emphasis, "", reply)
    found = re.findall(rf"{before}{number}\s*{after}", reply, flags=re.IGNORECASE)
    return float(found[-1]) if found else None


def combine_seeds(*numbers):
    """One seed made of several non-negative integers of any size."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*numbers):
    """Seed torch's global generators within the block, then restore the CPU's, from which all draws
    of srlm come. Your own reward functions and pickers may draw from it too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(combine_seeds(*numbers))
        yield


def device_of(model):
    """Where the weights of a model are; the CPU for a model without weights."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode without gradients within the block; then every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def pieces_by_tokens(lengths, limit=4096):
    """Row numbers sorted by length and cut into pieces of at most `limit` tokens after padding (or
    one row). A piece has little padding, fits into a CPU's cache, and bounds the memory of logits.

    >>> pieces_by_tokens([3, 1, 2], limit=4)
    [[1, 2], [0]]
    """
    pieces = [[]]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if pieces[-1] and (len(pieces[-1]) + 1) * lengths[row] > limit:
            pieces.append([])
        pieces[-1].append(row)
    return pieces


def shuffled_batches(examples, batch_size, generator, size=lambda example: 0):
    """Endless batches; every example is used once per epoch.

    Each run of 2 * batch_size shuffled examples is sorted by size, so that most batches hold
    examples of similar size and little padding.

    >>> batches = shuffled_batches("abc", 2, torch.Generator().manual_seed(0))
    >>> sorted(next(batches) + next(batches) + next(batches))
    ['a', 'a', 'b', 'b', 'c', 'c']
    """
    require(len(examples) > 0, "there are no examples to draw batches from")
    queue, n_sorted = [], 2 * batch_size
    while True:
        while len(queue) < batch_size:
            order = torch.randperm(len(examples), generator=generator).tolist()
            for at in range(0, len(order), n_sorted):
                queue += sorted([examples[i] for i in order[at : at + n_sorted]], key=size)
        yield queue[:batch_size]
        queue = queue[batch_size:]


class EarlyStopping:
    """Remember the weights with the best evaluation, and say when to stop: after `patience`
    evaluations in a row without a new best.

    >>> values = iter([1.0, 3.0, 2.0, 2.5])
    >>> stopping = EarlyStopping(lambda model: next(values), mode="max", patience=2)
    >>> [stopping.look(nn.Linear(1, 1)) for _ in range(4)]
    [False, False, False, True]
    """

    def __init__(self, eval_fn, mode, patience, every=1):
        self.eval_fn, self.mode, self.patience, self.every = eval_fn, mode, patience, every
        self.best, self.best_weights, self.looks_since_best = -math.inf, None, 0

    def is_due(self, step, steps):
        """At steps n, 2n, 3n ...; at the last one if the stage is shorter than n."""
        return self.eval_fn is not None and step % min(self.every, steps) == 0

    def look(self, model):
        """Evaluate the model; True if training should stop."""
        with evaluating(model):
            value = on_rank_zero(lambda: float(self.eval_fn(model)))
        value = value if self.mode == "max" else -value
        self.looks_since_best += 1
        if value > self.best:  # never true of NaN
            self.best, self.looks_since_best = value, 0
            self.best_weights = {name: w.clone() for name, w in model.state_dict().items()}
        return self.looks_since_best == self.patience

    def restore(self, model):
        """Load the weights with the best evaluation, if there was any."""
        if self.best_weights is not None:
            model.load_state_dict(self.best_weights)


def summary_of(points):
    """Each metric as its mean over the last 20 updates, and the history of all, at most 50 points.

    >>> summary_of([{"loss": 1.0}, {"loss": 2.0}])
    {'loss': 1.5, 'history': [{'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 2.0}]}
    """
    def mean(part):
        """Each metric as its mean over a part of the points."""
        return {name: sum(point[name] for point in part) / len(part) for name in part[0]}

    width = math.ceil(len(points) / 50)  # updates that one point of the history averages
    parts = [points[at : at + width] for at in range(0, len(points), width)]
    history = [{"step": min((i + 1) * width, len(points)), **mean(p)} for i, p in enumerate(parts)]
    return {**mean(points[-20:]), "history": history}


class JudgeReward:
    """judge() as a reward function that keeps its last replies, to be quoted in an error. It ends a
    stage whose judge gives no score to any answer of its first call."""

    def __init__(self, model, reward_config, *, decode, **how):
        self.replies = []  # the last three

        def decode_and_keep(ids):  # judge() decodes replies and nothing else
            self.replies = self.replies[-2:] + [decode(ids)]
            return self.replies[-1]

        self.judge = functools.partial(judge, model, reward_config, decode=decode_and_keep, **how)

    def __call__(self, prompts, responses):
        is_first = len(self.replies) == 0
        scores = self.judge(prompts, responses)
        require(not (is_first and scores.isnan().all()), "no preference pair: the judge gave no "
                f"score to any of the first {len(responses)} answers, but {self.replies}")
        return scores


def counted_pairs(outcomes, n_pairs, source, reward_fn):
    """The pairs among the lists of (outcome, pair), n_pairs at most, and the number of each
    outcome until then. ValueError if there is no pair at all."""
    pairs, counts = [], dict(pairs=0, unparsed=0, tied=0, invalid=0)
    for outcome, pair in (made for chunk in outcomes for made in chunk):
        counts[outcome] += 1
        if pair is not None:
            pairs.append(pair)
        if len(pairs) == n_pairs:
            break
    replies = getattr(reward_fn, "replies", None)  # of a judge; other rewards have none
    quoted = f"; the judge's last replies were {replies}" if replies else ""
    require(len(pairs) > 0, f"no preference pair: {counts} from {source}{quoted}")
    if n_pairs is not None and len(pairs) < n_pairs:
        warnings.warn(f"{n_pairs} preference pairs were asked for, but {counts} from {source}")
    return pairs, counts


def find_judge(reward_config, judges):
    """The judge of a stage: a RewardConfig, a name in judges, or None for the first of them."""
    if isinstance(reward_config, RewardConfig):
        return reward_config
    name = reward_config or next(iter(judges))
    require(name in judges, f"reward_config {name!r} is not one of {', '.join(judges)}")
    return judges[name]


# 14. Several processes ----------------------------------------------------------------------------
# `torchrun --nproc-per-node 2 srlm.py` starts several processes, each with a rank. Every process
# holds the whole model; they share the examples of a batch and the prompts to be answered. In a
# single process each of these functions does the obvious thing.


def join_processes():
    """Meet the other processes, if torchrun has started any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        from torch.distributed import nn as _  # a later import would keep the group alive
        dist.init_process_group(timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)


def rank_and_world_size():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_zero(work):
    """Run work() on rank 0 and broadcast the result."""
    rank, world_size = rank_and_world_size()
    result = [work() if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(result)
    return result[0]


def gathered(value):
    """The values of all processes, in the order of their ranks."""
    values = [value] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def parallel_map(work, items, title):
    """Yield work(item) for each item, in order. The processes work on different items."""
    rank, world_size = rank_and_world_size()
    for at in progress(range(0, len(items), world_size), title):
        result = work(items[at + rank]) if at + rank < len(items) else None
        yield from gathered(result)[: len(items) - at]


def sum_over_processes(value):
    """The sum of one number of each process."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def sum_gradients_over_processes(parameters):
    """Replace each gradient by its sum over the processes."""
    for weight in parameters:
        if dist.is_initialized() and weight.grad is not None:
            dist.all_reduce(weight.grad)


def progress(steps, title):
    """A progress bar, in a terminal only, for what takes longer than two seconds."""
    hidden = rank_and_world_size()[0] > 0 or None  # None: tqdm hides it unless it is in a terminal
    return tqdm(steps, title, delay=2, leave=False, dynamic_ncols=True, disable=hidden)


# 15. Checks ---------------------------------------------------------------------------------------
# A user's mistake becomes one line that says what is wrong, where, and both values.


@contextlib.contextmanager
def named(where, errors=Exception):
    """Turn an error within the block into a ValueError that begins with where it happened."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).splitlines()[:2])  # torch names a weight in the second line
        raise ValueError(f"{where}: {reason}") from error


_LOWEST = {"n_candidates": 2, "warmup": 0, "weight_decay": 0, "temperature": 0, "seed": 0,
           "judge_temperature": 0, "replay_weight": 0, "nll_weight": 0}  # all others: above 0


def check_number(name, value, shown_as):
    """Refuse a number that makes no sense for the setting of this name."""
    if type(value) in (int, float):
        lowest = _LOWEST.get(name, math.ulp(0))  # the smallest positive number
        rule = f"{lowest} or more" if name in _LOWEST else "above 0"
        require(lowest <= value < math.inf, f"{shown_as} is not {rule}")
        require(name != "warmup" or value <= 1, f"{shown_as} is not a share, 0 to 1, of the steps")


# Fields of self-rewarding-lm-pytorch
_OLD_NAMES = {"dpo_beta": "beta", "spin_λ": "lam", "num_train_steps": "steps",
              "gen_temperature": "temperature", "pick_paired_rewards_fn": "pick_pair",
              "num_generated_preference_pairs": "n_pairs", "start_learning_rate": "learning_rate",
              "max_seq_len": "max_new_tokens, without the prompt"}


def refuse_old_names(cls, **fields):
    """Name the new word for a field of the older package: a __new__ for all stages."""
    for old in fields.keys() & _OLD_NAMES.keys():
        raise ValueError(f"{cls.__name__}: {old} is now {_OLD_NAMES[old]}; see README.md")
    return object.__new__(cls)


StageConfig.__new__ = refuse_old_names


def check_fields(config):
    """Refuse a stage with a number or a mode that makes no sense."""
    stage, mode = type(config).__name__, config.eval_mode
    require(mode in ("max", "min"), f'{stage}: eval_mode = {mode!r} is neither "max" nor "min"')
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        shown = f"{stage}: {item.name} = {value!r}"
        require("int" not in str(item.type) or type(value) is not float, f"{shown} is not whole")
        check_number(item.name, value, shown)


def datasets_of(config):
    """The data sets of a stage by name, but not those that are functions of the model."""
    return {name: value for name, value in vars(config).items()
            if name.endswith("_dataset") and not callable(value)
            and (value is not None or name != "replay_dataset")}


def vocabulary_size(model):
    """V, by asking the model. ValueError if it does not return logits (B, T, V)."""
    with evaluating(model):
        logits = model(torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
    require(isinstance(logits, Tensor) and logits.ndim == 3, f"the model returns a "
            f"{type(logits).__name__} instead of logits (B, T, V); wrap it so that it does")
    return logits.shape[-1]


def as_ids(ids):
    """One row of token ids as a tensor on the CPU."""
    row = torch.as_tensor(ids).cpu()
    is_integer = row.numel() == 0 or not row.is_floating_point()  # as_tensor([]) holds floats
    is_valid = row.ndim == 1 and is_integer and bool((row >= 0).all())
    require(is_valid, "not a row of token ids, integers from 0 on")
    return row.long()


def checked_rows(prompts, pad_id, limit):
    """What sample() is given, as a list of 1-D rows; the padding of a (B, T) tensor is cut off."""
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompts, Tensor):
            real = (prompt != pad_id).nonzero().flatten()  # places that hold a token
            prompt = prompt[real[0] : real[-1] + 1] if len(real) else prompt[:0]
        with named(f"sample: prompt {i}"):
            row = as_ids(prompt)
            require(0 < len(row) < limit, f"{len(row)} tokens; it needs 1 or more, and room for "
                    f"one more within max_seq_len={limit}")
        rows.append(row)
    return rows


def checked_data(config, name, model, text):
    """The entries of a data set of a stage, or of what a function of the model returns. ValueError
    names the data set and the first entry that is wrong."""
    dataset = getattr(config, name)
    rows = on_rank_zero(lambda: dataset(model)) if callable(dataset) else dataset
    is_indexed = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    require(is_indexed and not isinstance(rows, (str, bytes, dict)), f"{name} is a "
            f"{type(rows).__name__}; it must have a length and an index, as a list has")
    require(len(rows) > 0, f"{name} is empty")
    read = {"prompt_dataset": as_prompt, "pair_dataset": as_pair}.get(name, as_item)
    found, max_seq_len, vocab = [], getattr(model, "max_seq_len", math.inf), vocabulary_size(model)
    for i in range(len(rows)):
        entry = rows[i]
        try:  # what named() does; but named() would write the entry of every item, in .2 ms each
            found.append(read(entry, text, max_seq_len, vocab))
        except Exception as error:  # a tokenizer of yours may raise any
            raise ValueError(f"{name}: item {i}, {str(entry)[:60]!r}: {error}") from error
    return found


def as_prompt(entry, text, max_seq_len, vocab):
    """A prompt: a str that, with an answer of one token, is a training item."""
    ids = text.prompt_ids(entry)
    as_item((F.pad(ids, (0, 1)), len(ids)), text, max_seq_len, vocab)
    return entry


def as_item(entry, text, max_seq_len, vocab):
    """A training item (ids, prompt_len) that has a response and fits the model."""
    require(isinstance(entry, (tuple, list)) and len(entry) == 2, "not (ids, prompt_len)")
    ids, n = as_ids(entry[0]), operator.index(entry[1])  # an integer of Python, numpy or torch
    require(0 <= n < len(ids) and 2 <= len(ids) <= max_seq_len, f"{len(ids)} tokens, "
            f"{n} of them prompt; it needs a response, 2 tokens, {max_seq_len=}")
    require(ids.max() < vocab, f"token {ids.max()}, vocabulary {vocab}")
    return ids, n


def as_pair(entry, text, max_seq_len, vocab):
    """A PreferencePair, made of one, of texts (prompt, chosen, rejected), or of a dict of these."""
    if isinstance(entry, dict):
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in entry]
        require(not missing, f"no {' and no '.join(missing)}")
        entry = [entry[name] for name in ("prompt", "chosen", "rejected")]
    if isinstance(entry, PreferencePair):
        prompt, *answers = map(as_ids, entry[:3])
        items = [(torch.cat((prompt, answer)), len(prompt)) for answer in answers]
    else:
        is_texts = isinstance(entry, (tuple, list)) and [type(x) for x in entry] == [str] * 3
        require(is_texts, "not texts (prompt, chosen, rejected)")
        items = [text.item(entry[0], answer) for answer in entry[1:]]
    (chosen, n), (rejected, _) = (as_item(item, text, max_seq_len, vocab) for item in items)
    require(n > 0, "a prompt of 0 tokens")
    require(not chosen.equal(rejected), "two equal answers")
    return PreferencePair(chosen[:n], chosen[n:], rejected[n:], *entry[3:])


def checked_pick(picked, n):
    """What a picker returned: None, or two different indices of n candidates."""
    is_pair = isinstance(picked, (tuple, list)) and len(picked) == 2 and picked[0] != picked[1]
    require(picked is None or is_pair and all(i in range(n) for i in picked),
            f"pick_pair returned {picked!r}, not two different indices from 0 to {n - 1}")
    return None if picked is None else (int(picked[0]), int(picked[1]))


def as_rewards(values, n):
    """What a reward function returned (list, array, tensor; (n,) or (n, 1)) as (n,) floats."""
    with named(f"reward function: {type(values).__name__} instead of numbers"):
        rewards = torch.as_tensor(values).detach().to("cpu", torch.float)
    require(tuple(rewards.shape) in ((n,), (n, 1)),
            f"reward function: {n} responses but rewards of shape {tuple(rewards.shape)}")
    return rewards.reshape(n)


# 16. Files ----------------------------------------------------------------------------------------


def write_file(path, data):
    """Write a file whole or not at all: under another name first, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with named(f"cannot write {path}, older files are whole", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # it is there only if something went wrong


def read_lines(path, read):
    """read(row) of each line of a JSON-lines file. ValueError names file, line and reason."""
    found = []
    with named(path):
        lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            with named(f"{path}, line {number}"):
                row = json.loads(line.decode("utf-8-sig"))  # Windows may begin a file with a BOM
                require(isinstance(row, dict), f"not an object but {str(row)[:40]}")
                found.append(read(row))
    require(len(found) > 0, f"{path} is empty")
    return found


def read_jsonl(path, fields):
    """The fields of each line, and no others: texts, and a score from 0 to 5."""
    def read(row):
        require(row.keys() == set(fields), f"the fields are {[*row]}, not {[*fields]}")
        for name, value in row.items():
            is_text = isinstance(value, str) and value.strip() != ""
            is_score = type(value) in (int, float) and 0 <= value <= 5
            require(is_score if name == "score" else is_text,
                    f"{name} is {value!r}; a score is 0 to 5, all else a text")
        return tuple(row[name] for name in fields)

    return read_lines(path, read)


def save_pairs(path, pairs, text):
    """Write pairs as JSON lines that a person, TRL, LLaMA-Factory and axolotl can read. prompt is
    the model input, with the chat template; chosen_ended says whether chosen ended with EOS."""
    lines = []
    for pair in pairs:
        row = {"prompt": text.decode(pair.prompt)}
        if not lines and text.ids(row["prompt"]).tolist() != pair.prompt.tolist():
            warnings.warn(f"{path}: decoded prompts lose tokens, such as turn markers")
        for name in ("chosen", "rejected"):
            ids, score = getattr(pair, name), getattr(pair, name + "_reward")
            row[name] = text.text(ids)
            row["score_" + name] = None if math.isnan(score) else score
            row[name + "_ended"] = len(ids) > 0 and int(ids[-1]) == text.eos_id
        lines.append(json.dumps(row) + "\n")
    write_file(Path(path), "".join(lines).encode())


def load_pairs(path, text):
    """Read what save_pairs wrote, or a file of others with prompt, chosen and rejected. The tokens
    are the same wherever a text survives decoding and encoding."""
    def read(row):
        for name in ("prompt", "chosen", "rejected"):
            require(isinstance(row.get(name), str), f"{name} is {row.get(name)!r}, not a text")
        pair = {"prompt": text.ids(row["prompt"])}
        for name in ("chosen", "rejected"):
            ids, score = text.ids(row[name]), row.get("score_" + name)
            if text.eos_id is not None and row.get(name + "_ended", True):
                ids = torch.cat((ids, ids.new_tensor([text.eos_id])))
            pair[name] = ids
            pair[name + "_reward"] = math.nan if score is None else float(score)
        return PreferencePair(**pair)

    return read_lines(path, read)


# 17. The trainer ----------------------------------------------------------------------------------


class SelfRewardingTrainer:
    """run_stages, made durable: a checkpoint {folder}/{stage}.{kind}.pt after each stage.

    finetune_configs: the stages, or a dict of arguments for paper_stages.
    self_reward_prompt_config: the judge, or a dict of judges by name, of which a stage picks one.
    evaluate: model -> dict, added to the record of each stage, after the stage has been saved. So a
    resume calls it for the last finished stage.
    report: called with the record of each finished stage, those that a resume skips included.
    settings: plain values that every checkpoint keeps; a resume with others is refused.
    """

    def __init__(self, model, finetune_configs, *, tokenizer_encode=encode, tokenizer_decode=decode,
                 self_reward_prompt_config=DEFAULT_REWARD_CONFIG, chat_template="{{ prompt }}",
                 eos_id=EOS, checkpoints_folder="checkpoints", seed=0, device=None, settings=None,
                 evaluate=lambda model: {}, report=lambda record: None):
        join_processes()
        stages, judges = finetune_configs, self_reward_prompt_config
        self.configs = paper_stages(**stages) if isinstance(stages, dict) else list(stages)
        is_stage = lambda config: isinstance(config, StageConfig) and hasattr(config, "run")
        require(self.configs and all(map(is_stage, self.configs)),
                f"finetune_configs: one or more stage configs are needed, not {self.configs!r}")
        self.judges = judges if isinstance(judges, dict) else {"default": judges}
        require(len(self.judges) > 0, "self_reward_prompt_config: no judge")
        self.text = TextFormat(tokenizer_encode, tokenizer_decode, chat_template, eos_id)
        if eos_id == EOS and tokenizer_encode is not encode:
            warnings.warn(f"{eos_id=} is the EOS of srlm's bytes; is it that of your tokenizer?")
        self.model = model if device is None else model.to(device)
        self.folder, self.seed, self.settings = Path(checkpoints_folder), seed, settings or {}
        self.evaluate, self.report = evaluate, report

    def _check(self):
        """Check whatever can be checked before any work."""
        vocab, eos_id = vocabulary_size(self.model), self.text.eos_id
        world_size = rank_and_world_size()[1]
        require(eos_id is None or eos_id in range(vocab), f"{eos_id=} is outside the model's "
                f"vocabulary of {vocab}; with eos_id=None answers end by length")
        for stage, config in enumerate(self.configs):
            with named(f"stage {stage} ({config.kind})", ValueError):
                require(config.batch_size >= world_size, f"batch_size={config.batch_size} leaves "
                        f"some of {world_size} processes without an example")
                judge_model = getattr(config, "rewarding_model", None) or self.model
                writers = {"max_new_tokens": self.model, "max_judge_tokens": judge_model}
                for name, writer in writers.items():
                    value = getattr(config, name, 0)
                    limit = getattr(writer, "max_seq_len", math.inf)
                    require(value < limit, f"{name} = {value} is not below max_seq_len = {limit}")
                for name in datasets_of(config):
                    checked_data(config, name, self.model, self.text)

    def path(self, stage):
        """The checkpoint of a stage."""
        return self.folder / f"{stage}.{self.configs[stage].kind}.pt"

    def __call__(self, *, overwrite_checkpoints=False, resume=False):
        """Run the stages. Returns the record of each: stage, kind, seconds, steps, loss, history;
        for preference stages reward_accuracy, reward_margin, chosen_logprob, rejected_logprob;
        for stages that write pairs also their counts; and what `evaluate` found. The model ends in
        evaluation mode."""
        self._check()
        records = on_rank_zero(lambda: self._begin(overwrite_checkpoints, resume))
        self.model.load_state_dict(on_rank_zero(self.model.state_dict))  # the same everywhere
        if records:
            self._evaluate(records[-1])

        def after_update(step):
            """Save the weights in the middle of a stage, if it says so."""
            every, path = self.configs[len(records)].checkpoint_every, self.path(len(records))
            if every is not None and step % every == 0:
                on_rank_zero(lambda: self._save(path.with_suffix(f".step{step}.pt"), records))

        context = Context(self.text, self.judges, self.seed, after_update)
        began = time.perf_counter()
        for record in run_stages(self.model, self.configs, context, first=len(records)):
            records.append({**record, "seconds": round(time.perf_counter() - began, 2)})
            # Save before evaluating: an error in `evaluate` must not lose the finished stage.
            on_rank_zero(lambda: self._save(self.path(record["stage"]), records))
            self._evaluate(records[-1])
            began = time.perf_counter()
        self.model.eval()
        return records

    def _evaluate(self, record):
        """Complete the record of the last stage, and report it."""
        where = f"stage {record['stage']} ({record['kind']})"
        with named(where, ValueError), seeded(self.seed), evaluating(self.model):
            found = on_rank_zero(lambda: self.evaluate(self.model))
            with named(f"{str(found)[:60]!r} cannot be added to the record, as JSON"):
                # Without numpy and torch types a checkpoint loads without running code.
                record |= json.loads(json.dumps(found, default=lambda value: value.tolist()))
        on_rank_zero(lambda: self.report(record))

    def _begin(self, overwrite, resume):
        """Prepare the folder; load the last finished stage. Returns the records up to it."""
        clear = os.environ.get("SRLM_CLEAR_CHECKPOINTS") == "1"
        require(not (resume and (overwrite or clear)),
                "resume excludes overwrite and SRLM_CLEAR_CHECKPOINTS=1")
        with named("cannot make the folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if overwrite or clear:
            # Remove the checkpoints of the old run, so that no later resume can take one of them.
            ours = re.compile(r"\d+\.(sft|spin|dpo|self-reward|external-reward)(\.step\d+)?\.pt")
            for path in list(self.folder.iterdir()):
                if ours.fullmatch(path.name) or overwrite and path.name == "metrics.jsonl":
                    path.unlink()
        finished = [stage for stage in range(len(self.configs)) if self.path(stage).exists()]
        if not finished:
            if resume:
                warnings.warn(f"nothing to resume in {self.folder}; this run begins with stage 0")
            return []
        path = self.path(finished[-1])
        require(resume, f"{path} exists; --resume (resume=True) goes on after it, --overwrite "
                "(overwrite_checkpoints=True) replaces it")
        state = load_checkpoint(path)
        then, now = state["settings"], self._settings(finished[-1])
        for key in then | now:
            require(then.get(key) == now.get(key),
                    f"{path} was made with {key} = {then.get(key)!r}, not {now.get(key)!r}")
        with named(path):
            self.model.load_state_dict(state["model"])
        for record in state["records"][:-1]:
            self.report(record)
        return state["records"]

    def _settings(self, stage):
        """What another run must share to go on after this stage; of data sets a checksum."""
        model_config = vars(self.model.config) if isinstance(self.model, Transformer) else None
        found = {"seed": self.seed, **self.settings, **vars(self.text), "model": model_config}
        found |= {f"judge {name}": judge for name, judge in self.judges.items()}
        for i, config in enumerate(self.configs[: stage + 1]):
            fields = {"kind": config.kind, **vars(config)}
            for name, data in datasets_of(config).items():
                entries = json.dumps([data[j] for j in range(len(data))], default=comparable)
                fields[name] = f"checksum {zlib.crc32(entries.encode())}"
            found |= {f"stage {i}, {name}": value for name, value in fields.items()}
        return json.loads(json.dumps(found, default=comparable))

    def _save(self, path, records):
        """Write a checkpoint of the model as it is now, after the stage of the last record."""
        settings, buffer = self._settings(len(records) - 1), io.BytesIO()
        torch.save({"format": "srlm 3", "model": self.model.state_dict(), "records": records,
                    "settings": settings}, buffer)
        write_file(path, buffer.getvalue())


def comparable(value):
    """For JSON: a judge as its fields, a tensor as its numbers, a function or a model as None."""
    if isinstance(value, RewardConfig):
        return vars(value) | {"prompt_template": textwrap.dedent(value.prompt_template)}
    return value.tolist() if hasattr(value, "tolist") else None


def load_checkpoint(path):
    """What a checkpoint holds: model (the weights), records (the last one without what `evaluate`
    finds), settings. Nothing in the file is executed. ValueError, with the path, for anything but
    a whole checkpoint of srlm."""
    require(Path(path).is_file(), f"{path} does not exist, or is a folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
        require(wrong is None, f"the checksum of {wrong} is wrong")
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        raise ValueError(f"{path} is damaged, or not a checkpoint ({type(error).__name__}); in a "
                         "run, delete it and those of later stages, and resume") from error
    require(isinstance(state, dict) and state.get("format") == "srlm 3",
            f"{path} is not a checkpoint of this version of srlm")
    return state


def load_model(path):
    """The built-in Transformer with the weights of a checkpoint."""
    state = load_checkpoint(path)
    config = state["settings"]["model"]
    require(config is not None, f"{path} holds weights of another kind of model")
    model = Transformer(ModelConfig(**config))
    model.load_state_dict(state["model"])
    return model.eval()


def paper_stages(sft_dataset, prompt_dataset, *, rounds=2, sft=None, dpo=None):
    """The stages of [1]: SFT, then rounds of self-reward DPO. sft and dpo set further fields."""
    first = SFTConfig(train_dataset=sft_dataset, **(sft or {}))
    later = SelfRewardDPOConfig(prompt_dataset=prompt_dataset, **(dpo or {}))
    return [first] + [later] * rounds


def create_mock_dataset(length, item_or_callable):
    """A stand-in of `length` items: the same item each time, or what each call returns."""
    make = item_or_callable if callable(item_or_callable) else lambda: item_or_callable
    return [make() for _ in range(length)]


def propose_prompts(model, n, *, known=(), text=TextFormat(), is_valid=None, max_new_tokens=64,
                    max_tries=10, **sampling):
    """New prompts that the model writes itself, where the chat template has its {{ prompt }}. It
    must have learned to (SFTConfig.loss_on_prompt); [1] shows examples to a large model instead.

    Keeps what is valid, not `known` and not repeated, until there are n prompts or max_tries * n
    were written. Returns the prompts and the counts: written, valid, new.
    """
    header, _, footer = _VARIABLE.split(text.chat_template)
    require(bool(header and footer), f"propose_prompts: the chat template {text.chat_template!r} "
            "must say where a prompt begins and ends, by text before and after it")
    known, valid, new, n_written = set(known), [], [], 0
    while len(new) < n and n_written < max_tries * n:
        rows = sample(model, [text.ids(header)] * n, max_new_tokens=max_new_tokens,
                      eos_id=text.eos_id, **sampling)
        n_written += n
        for prompt, end, _ in (text.text(row).partition(footer) for row in rows):
            if end and prompt.strip() and (is_valid is None or is_valid(prompt)):
                valid.append(prompt)
        new = list(dict.fromkeys(prompt for prompt in valid if prompt not in known))
    return new[:n], dict(written=n_written, valid=len(valid), new=len(new))


# 18. The command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Options(Recipe):
    """The command line of a training run; argparse is made from these fields and the recipe's."""

    seed: int = setting(0, None, "random seed")
    device: str = setting("cpu", None, "where the model lives, for example cuda or mps")
    checkpoints: str = setting("checkpoints", None, "folder for checkpoints and metrics.jsonl")
    quick: bool = setting(False, None, "the same run with smaller numbers")
    resume: bool = setting(False, None, "go on after the last finished stage")
    overwrite: bool = setting(False, None, "replace the checkpoints of an earlier run")
    instructions: str = setting("sort", None, f"of LetterWorld: {','.join(INSTRUCTIONS)}")
    sft: str = setting("", None, 'your demonstrations, lines of {"prompt", "response"}')
    judged: str = setting("", None, 'your judged answers, lines of {"prompt", "response", "score"}')
    prompts: str = setting("", None, 'your prompts for the later stages, lines of {"prompt"}')
    max_seq_len: int = setting(256, None, "longest text, in bytes, that the model takes")
    skip_long: bool = setting(False, None, "leave out, and count, what is longer in your files")

    def __post_init__(self):
        """Refuse what makes no sense, before any work."""
        for name, value in vars(self).items():
            check_number(name, value, f"--{name.replace('_', '-')} {value}")
        require(self.seed < 2**64, f"--seed {self.seed} is not below 2**64 = {2**64}")
        stages = self.stages.split(",")
        for stage in stages:
            require(stage in ("sft", "self", "spin", "external"),
                    f"--stages {self.stages}: {stage!r} is none of sft, self, spin, external")
        require(stages[0] == "sft", "--stages must begin with sft: before it no model can answer")
        if self.sft or self.judged or self.prompts:
            require(self.sft != "", "--judged and --prompts need --sft to begin with")
            require(self.judged != "" or "self" not in stages, "stage self needs --judged")
            require("external" not in stages, "stage external: your data have no true score")

    @classmethod
    def parse(cls, argv):
        """The options of a command line. What is not given has its default, or that of --quick."""
        parser = argparse.ArgumentParser(
            prog="srlm.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
            epilog='[1] is arXiv:2401.10020. To ask a model: srlm.py ask CHECKPOINT "PROMPT"')
        for item in dataclasses.fields(cls):
            quick = item.metadata["quick"] if "--quick" in argv else None
            default = item.default if quick is None else quick
            kind = {"action": "store_true"} if default is False else {"type": type(default)}
            parser.add_argument("--" + item.name.replace("_", "-"), default=default,
                                help=f"{item.metadata['help']} [%(default)s]", **kind)
        return cls(**vars(parser.parse_args(argv)))

    def settings(self):
        """What a resumed run must share with the run that it continues, beside the settings of its
        finished stages; of each file a checksum."""
        names = ("dim", "depth", "max_seq_len", "demonstrations", "judgements", "eval_prompts",
                 "tidy", "instructions", "skip_long")
        found = {name: getattr(self, name) for name in names}
        files = {"--sft": self.sft, "--judged": self.judged, "--prompts": self.prompts}
        return found | {f"contents of {flag}": f"checksum {zlib.crc32(Path(path).read_bytes())}"
                        for flag, path in files.items() if path}


class ByteJudge(RewardConfig):
    """Shows the judge "?" for U+FFFD, which stands for one bad byte but has three bytes itself: a
    judge prompt could outgrow the model."""

    def render(self, prompt, response):
        return super().render(prompt, response.replace("\ufffd", "?"))


class OwnData:
    """A world made of your own files. Nobody knows a true score here, so `score` is None.

    Held out is every prompt whose CRC-32 is divisible by 10, in all files alike, with its answers.
    """

    CHAT_TEMPLATE, JUDGE = LetterWorld.CHAT_TEMPLATE, ByteJudge(**vars(LetterWorld.JUDGE))
    score = None

    def __init__(self, options):
        self.options = options
        self.pairs, self.held_out = self.read("sft", "prompt", "response")
        self.judged, self.held_out_judged = self.read("judged", "prompt", "response", "score")
        prompts, _ = self.read("prompts", "prompt")
        self.own_prompts = sorted({row[0] for row in prompts or self.pairs})
        held_out_prompts = dict.fromkeys(row[0] for row in self.held_out)
        self.eval_prompts = list(held_out_prompts)[: options.eval_prompts]
        n, n_drawn = len(self.own_prompts), options.stage_prompts
        if n > n_drawn:
            warnings.warn(f"--stage-prompts: each later stage draws {n_drawn} of {n} prompts")
        # The longest answer seen, or less if the judge could not read it under the longest prompt.
        room = options.max_seq_len - max(map(self.size, [*self.eval_prompts, *self.own_prompts]))
        self.max_new_tokens = 1 + min(room, max(len(encode(answer)) for _, answer in self.pairs))

    def size(self, prompt, response="", score=0.25):
        """How many tokens the judge prompt has, together with a verdict."""
        return len(encode(self.JUDGE.render(prompt, response) + self.verdict(score))) + 1

    def read(self, flag, *fields):
        """The rows of a file that are learned from, and those that are held out."""
        path, limit = getattr(self.options, flag), self.options.max_seq_len
        rows, learned, held_out = read_jsonl(path, fields) if path else [], [], []
        for number, row in enumerate(rows, 1):
            size = self.size(*row)
            require(size <= limit or self.options.skip_long, f"{path}, example {number}: {size} "
                    f"bytes for the judge, but --max-seq-len is {limit}; --skip-long skips it")
            if size <= limit:
                is_held_out = zlib.crc32(bytes(encode(row[0]))) % 10 == 0
                (held_out if is_held_out else learned).append(row)
        n_skipped = len(rows) - len(learned) - len(held_out)
        if n_skipped > 0:
            warnings.warn(f"{path}: {n_skipped} of {len(rows)} examples skipped, too long")
        is_usable = not path or len(learned) > 0 and (len(held_out) > 0 or flag != "sft")
        require(is_usable, f"--{flag} {path}: of {len(rows)} examples {len(held_out)} are held out "
                f"(one prompt in ten is), {n_skipped} skipped, {len(learned)} left to learn from")
        return learned, held_out[: 5 * self.options.eval_prompts]

    def demonstrations(self, n):
        """All (prompt, answer) pairs to learn from, whatever n."""
        return self.pairs

    def judgements(self, n, model, tidy):
        """All (prompt, answer, verdict) triples to learn from, whatever n."""
        return [(prompt, response, self.verdict(score)) for prompt, response, score in self.judged]

    def verdict(self, score):
        """The text in which the judge gives a score."""
        return f"= {np.format_float_positional(score, trim='-')}"  # never "1e-05"

    def graded_answers(self, model):
        """The held-out (prompt, answer, score) triples."""
        return self.held_out_judged

    def prompts(self, n, purpose):
        """n prompts, or all if there are fewer, drawn for a purpose."""
        rng = np.random.default_rng([self.options.seed, *encode(purpose)])
        return [self.own_prompts[i] for i in rng.permutation(len(self.own_prompts))[:n]]


# heading: (key in metrics.jsonl, format)
_COLUMNS = {"true score": ("oracle_score", ".2f"), "greedy": ("oracle_greedy", ".2f"),
            "perfect": ("perfect_rate", ".0%"), "self-score": ("self_score", ".2f"),
            "win": ("win", ".0%"), "lose": ("lose", ".0%"), "judge": ("judge_pairwise", ".1%"),
            "pairs": ("pairs", "d"), "seconds": ("seconds", ".0f")}
_MEASURES = ("oracle_score", "oracle_greedy", "perfect_rate", "self_score", "win", "tie", "lose",
             "judge_pairwise", "judge_best5", "judge_exact", "judge_spearman", "judge_kendall")


def table_row(line):
    """A line of metrics.jsonl as a row of the table."""
    row = f"{line['model']:<14}"
    for heading, (key, form) in _COLUMNS.items():
        cell = "-" if line.get(key) is None else format(line[key], form)
        row += f"  {cell:>{max(4, len(heading))}}"
    return row


def say(*lines):
    """Print at once. A closed pipe, as of `| head -1`, does not end the run."""
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Scoreboard:
    """Measures each model of a run, prints the table as it grows, and writes metrics.jsonl.

    true score  mean points, of 5, of answers drawn at temperature 1; greedy: of the likeliest ones
    perfect     share of the drawn answers with all five points
    self-score  mean score that the model gives its answers; above the true score, it fools itself
    win, lose   share of answers better and worse than those of the model in the line above
    judge       share of pairs of answers, the same for all models, that it puts in the right order
    """

    def __init__(self, world, text, demonstrations, made_with_m0, folder):
        self.world, self.text, self.made_with_m0, self.folder = world, text, made_with_m0, folder
        self.scores = [None]  # true scores (P, 5) of the model of each line, where there are any
        scores = [world.score(*pair) for pair in demonstrations] if world.score else []
        mean = float(np.mean(scores)) if scores else None
        self.lines = [{"model": "demonstrations", "oracle_score": mean}]

    def begin(self):
        """Print what the columns mean, which is the end of the docstring, and their headings."""
        heading = " " * 14 + "".join(f"  {heading:>4}" for heading in _COLUMNS)
        say(textwrap.dedent(self.__doc__.partition("\n\n")[2]), heading, table_row(self.lines[0]))

    def evaluate(self, model):
        """The trainer's `evaluate`. M0 has seen no judge prompt, so it is not asked to judge."""
        can_judge = self.made_with_m0 is not None and len(self.lines) > 1
        graded_answers = self.made_with_m0()[1] if can_judge else None
        found = measure(model, self.world, self.text, graded_answers, self.scores[-1])
        if isinstance(self.world, OwnData):
            objective = sft_objective([self.text.item(*pair) for pair in self.world.held_out])
            parts = [objective.loss(model, [item])[:2] for item in objective.examples]
            loss, n_tokens = map(sum, zip(*parts))
            found["held_out_loss"] = float(loss / n_tokens)
        return found

    def report(self, record):
        """The trainer's `report`."""
        line = {"model": f"M{record['stage']}", **dict.fromkeys(_MEASURES), **record}
        self.scores.append(line.pop("scores", None))
        self.lines.append(line)
        path = self.folder / "metrics.jsonl"
        data = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        # The lines that a resume reports again are there, maybe with more, which must not be lost.
        if not (path.exists() and path.read_bytes().startswith(data)):
            write_file(path, data)
        say(table_row(line))

    def conclude(self, path):
        """Compare the last model with M1, and say how to ask it."""
        if self.world.score is not None and len(self.scores) > 3:
            shares = head_to_head(self.scores[-1], self.scores[2])
            last = self.lines[-1]["model"]
            say(f"\n{last} against M1: win {shares['win']:.0%}, lose {shares['lose']:.0%}")
        # orig_argv[0] is python as it was typed, such as .venv/bin/python.
        say(f'\nask it: {sys.orig_argv[0]} srlm.py ask {path} "{self.world.eval_prompts[0]}"')


def train(options, world=None):
    """The training run: the recipe in a world, LetterWorld unless you bring another. Prints the
    table as it grows; returns the lines of metrics.jsonl."""
    join_processes()  # before the first use of a device, since each process has its own
    with named(f"--device {options.device}"):
        torch.empty(0, device=options.device)
    if world is None and options.sft:
        world = OwnData(options)
    elif world is None:
        names = options.instructions.split(",")
        world = LetterWorld(names, n_eval=options.eval_prompts, seed=options.seed)
    folder = Path(options.checkpoints)
    text = TextFormat(chat_template=world.CHAT_TEMPLATE)
    demonstrations = world.demonstrations(options.demonstrations)

    @functools.cache
    def made_with_m0():
        """The judging data, and what judges are measured by. M0, read from its checkpoint, writes
        answers for both: the same whenever they are asked for, in a resumed run as well."""
        with seeded(options.seed):
            m0 = load_model(folder / "0.sft.pt").to(options.device)
            return world.judgements(options.judgements, m0, options.tidy), world.graded_answers(m0)

    can_judge = bool(options.judged or not options.sft)
    board = Scoreboard(world, text, demonstrations, made_with_m0 if can_judge else None, folder)
    make_judgements = (lambda: made_with_m0()[0]) if can_judge else None
    config = ModelConfig(dim=options.dim, depth=options.depth, max_seq_len=options.max_seq_len)
    trainer = SelfRewardingTrainer(
        Transformer(config, torch.Generator().manual_seed(options.seed)),
        recipe_stages(options, world, demonstrations, make_judgements), seed=options.seed,
        chat_template=world.CHAT_TEMPLATE, self_reward_prompt_config=world.JUDGE,
        checkpoints_folder=folder, device=options.device, settings=options.settings(),
        evaluate=board.evaluate, report=board.report)
    on_rank_zero(board.begin)
    trainer(overwrite_checkpoints=options.overwrite, resume=options.resume)
    on_rank_zero(lambda: board.conclude(trainer.path(len(trainer.configs) - 1)))
    return on_rank_zero(lambda: board.lines)


def ask(argv):
    """The model's answer to a prompt, its own score of it and, for LetterWorld, the true score."""
    parser = argparse.ArgumentParser(prog="srlm.py ask", description=ask.__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely answer")
    args = parser.parse_args(argv)
    model, task = load_model(args.checkpoint), LetterTask()
    settings = load_checkpoint(args.checkpoint)["settings"]
    is_user_data = "contents of --sft" in settings
    learned = "data of your own" if is_user_data else settings.get("instructions", "unknown")
    text = TextFormat(chat_template=task.CHAT_TEMPLATE)
    answer = respond(model, [args.prompt], text, 128, temperature=args.temperature)[0]
    say(f"answer      {answer}")
    score = math.nan
    with contextlib.suppress(ValueError):  # of a judge prompt that leaves no room to reply
        score = judge(model, task.JUDGE, [args.prompt], [answer]).item()
    say("own score   none" if math.isnan(score) else f"own score   {score:.1f} of 5")
    with contextlib.suppress(ValueError):  # of a prompt that LetterTask does not have
        points = task.points(args.prompt, answer)
        each = ", ".join(f"{name} {point}" for name, point in zip(task.POINTS, points))
        say(f"true score  {sum(points)} of 5: {each}", f"it learned  {learned}")


def main(argv=None):
    """The command line. A user's mistake ends in one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    is_ask = argv[:1] == ["ask"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # an encoding without our characters
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            return ask(argv[1:]) if is_ask else train(Options.parse(argv))
    except (ValueError, OSError) as error:
        print(f"srlm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        advice = "" if is_ask else "; --resume goes on after the last finished stage"
        print(f"\nstopped{advice}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
