"""Recipes with published rules: what each counts as N or C, and where it was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from trainers.decoder_recipe import DecoderRecipe, Rates
from trainers.decoders import MUP, RELU2
from trainers.flops import params
from trainers.recipe import Count, Idle, Momentum, NotNegative, Positive, Share, outside
from trainers.shape import Architecture, Shape


@dataclass(frozen=True, kw_only=True)
class PorianBatch(DecoderRecipe):
    """Batch, warm-up and beta2 by model size: Porian et al. (2024, arXiv 2406.19146).

    Batch 160 x 2048 (N/108e6)^(2/3) tokens, warm-up over N tokens, beta2 0.95 from batches of
    524,288 tokens on, else 0.99.

    N is with the output head, without the embedding, as `precise_param_count_open_lm` counts in
    their code (formll/resolving-scaling-law-discrepancies): their smallest model has 5.17e6, of
    which its blocks are 0.33e6. OLMo's ladder takes the same constants with an N of its own.
    """

    reference_params: Positive = 108_462_080
    """Their model of width 640 and depth 15, at a vocabulary of 50,432."""
    reference_batch_tokens: Positive = 160 * 2048
    batch_exponent: float = 2 / 3
    large_batch_tokens: int = 524_288
    small_batch_beta2: Momentum = 0.99

    def size(self, shape: Shape) -> int:
        """See `DecoderRecipe.size`: with the head."""
        return params(shape).matmul

    def batch(self, shape: Shape) -> float:
        """Tokens a step."""
        ratio = self.size(shape) / self.reference_params
        return float(self.reference_batch_tokens * ratio**self.batch_exponent)

    @property
    def idle(self) -> tuple[Idle, ...]:
        """See `trainers.recipe.idle`: of two equal betas it does not matter which one holds."""
        if self.beta2 != self.small_batch_beta2:
            return super().idle
        because = f"beta2 and small_batch_beta2 are both {self.beta2:g}"
        return (*super().idle, Idle(names=("large_batch_tokens",), because=because))

    def second_beta(self, batch_tokens: int) -> float:
        """See `DecoderRecipe.second_beta`."""
        return self.beta2 if batch_tokens >= self.large_batch_tokens else self.small_batch_beta2

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        return outside("its batch is Porian et al.'s, fitted", N=(self.size(shape), 5e6, 9.1e8))


@dataclass(frozen=True, kw_only=True)
class LlamaAdamW(PorianBatch):
    """AdamW by model size: Porian et al. (2024), with their N (see `PorianBatch`).

    Rate 0.0047 (N/108e6)^(-1/3), fitted there at 5e6 to 9e8 parameters, at a rate that stays
    constant after warm-up and with weight decay of 1e-4 a step whatever the rate ("independent",
    Wortsman et al. 2023, arXiv 2309.14322). Decaying the rate is this recipe's own.
    """

    reference_rate: Positive = 0.0047
    rate_exponent: float = -1 / 3
    independent_decay: NotNegative = 1e-4
    """Of the weights, a step at the peak rate, whatever that is."""
    weight_decay: NotNegative = 0.0
    """Besides that."""

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """See `DecoderRecipe.rates`."""
        ratio = self.size(shape) / self.reference_params
        rate = self.reference_rate * ratio**self.rate_exponent
        return Rates(batch_tokens=self.batch(shape), matrix=rate, embedding=rate, head=rate)

    def weight_decay_at(self, peak: float) -> float:
        """See `DecoderRecipe.weight_decay_at`."""
        independent = self.independent_decay / peak if peak else 0.0  # no rate, which is refused
        return self.weight_decay + independent

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        return outside("Porian et al. fitted", N=(self.size(shape), 5e6, 9.1e8))


@dataclass(frozen=True, kw_only=True)
class StepLaw(DecoderRecipe):
    """Rate and batch by (N, D): Li et al. (2025, arXiv 2503.04715), N non-embedding.

    Rate 1.79 N^-0.713 D^0.307, batch 0.58 D^0.571 tokens. A replication with 1800 runs found
    another exponent of D: a prior, not a law.
    """

    rate_coefficient: Positive = 1.79
    rate_params_exponent: float = -0.713
    rate_tokens_exponent: float = 0.307
    batch_coefficient: Positive = 0.58
    batch_tokens_exponent: float = 0.571
    final_rate: Positive = 1e-5
    """At a horizon, whatever the peak: a tenth of the peak moves the best one, and the law was
    fitted without."""
    final_fraction: Share = 0.0
    """Of the peak, where that is more."""
    final_rates: ClassVar[tuple[str, ...]] = ("final_rate",)

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """See `DecoderRecipe.rates`."""
        by_params = self.size(shape) ** self.rate_params_exponent
        rate = self.rate_coefficient * by_params * tokens**self.rate_tokens_exponent
        batch = self.batch_coefficient * tokens**self.batch_tokens_exponent
        return Rates(batch_tokens=batch, matrix=rate, embedding=rate, head=rate)

    def final_fraction_at(self, peak: float) -> float:
        """See `DecoderRecipe.final_fraction_at`."""
        return min(1.0, max(self.final_fraction, self.final_rate / peak))

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        return outside("Step Law was fitted", N=(self.size(shape), 6e7, 1e9), D=(tokens, 2e9, 1e11))


@dataclass(frozen=True, kw_only=True)
class DeepSeek(DecoderRecipe):
    """Rate and batch by compute: Bi et al. (2024, arXiv 2401.02954), equation 1.

    Rate 0.3118 C^-0.1250, batch 0.2920 C^0.3271 tokens, C in FLOPs as their equation 2 counts them.
    """

    rate_coefficient: Positive = 0.3118
    rate_exponent: float = -0.1250
    batch_coefficient: Positive = 0.2920
    batch_exponent: float = 0.3271

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """See `DecoderRecipe.rates`."""
        c = self.flops(shape, tokens)
        rate = self.rate_coefficient * c**self.rate_exponent
        batch = self.batch_coefficient * c**self.batch_exponent
        return Rates(batch_tokens=batch, matrix=rate, embedding=rate, head=rate)

    def caution(self, shape: Shape, tokens: float) -> str | None:
        """See `Recipe.caution`."""
        return outside("DeepSeek fitted", C=(self.flops(shape, tokens), 1e17, 2e19))

    def flops(self, shape: Shape, tokens: float) -> float:
        """Training FLOPs by their count: without the head, and with all of attention.

        72 n d^2 + 12 n d l a token, n blocks of 12 d^2 parameters and l the context; of it we
        compute what the causal mask leaves.
        """
        attention = 12 * shape.depth * shape.width * shape.context
        return tokens * (6 * params(shape).non_embedding + attention)


@dataclass(frozen=True, kw_only=True)
class MuP(PorianBatch):
    """Rates transferred over widths: Yang et al. (2022, arXiv 2203.03466), table 3, for Adam.

    Matrices start at std ~ 1/sqrt(width), the head at zero; their rates are the base width's times
    base over width, the embedding's is the same at every width. Base rate and std: Dey et al.
    (2023, arXiv 2304.03208). Keep the head width, so that attention's scale stays what it is.
    """

    base_width: Count = 256
    base_rate: Positive = 6e-3
    weight_decay: NotNegative = 0.0
    architecture: Architecture = MUP
    ties: ClassVar[bool] = False

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """See `DecoderRecipe.rates`."""
        hidden, batch = self.base_rate * self.base_width / shape.width, self.batch(shape)
        return Rates(batch_tokens=batch, matrix=hidden, embedding=self.base_rate, head=hidden)


@dataclass(frozen=True, kw_only=True)
class Muon(PorianBatch):
    """Muon on block matrices (Jordan et al. 2024), AdamW on embedding and head.

    An update of a matrix has singular values of about 1, times sqrt(rows / columns), so one rate
    serves every width; the head's goes with 1/sqrt(width). Batch as `llama-adamw`.
    """

    optimizer: Literal["muon", "adamw"] = "muon"
    matrix_rate: Positive = 0.02
    embedding_rate: Positive = 0.2
    head_rate: Positive = 0.004
    """At width 768."""
    reference_width: Count = 768
    warmup_tokens_per_param: NotNegative = 0.2
    small_batch_beta2: Momentum = 0.95
    weight_decay: NotNegative = 0.0
    architecture: Architecture = RELU2
    ties: ClassVar[bool] = False

    def rates(self, shape: Shape, tokens: float) -> Rates:
        """See `DecoderRecipe.rates`."""
        return Rates(
            batch_tokens=self.batch(shape),
            matrix=self.matrix_rate,
            embedding=self.embedding_rate,
            head=self.head_rate * (shape.width / self.reference_width) ** -0.5,
        )
