"""Operations to generate with MiniMax-M1 and with DeepSeek-R1, under every convention in which the claim is counted.

The MiniMax-M1 report (arXiv 2506.13585 §1) says that M1 takes under 50% of DeepSeek-R1's operations at 64K generated
tokens and about 25% at 100K, publishes no formula, and plots cumulative operations (Fig. 1, right). What the ratio is
depends on what is counted; every convention here is C(n) = a n + b n^2 for n tokens without a prompt, 1K = 1024.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m1.config.model import Model
from m1.planning.arithmetic import decode_flops, parameters, softmax_layers

#: Lengths of the published claim and of the table, in tokens.
LENGTHS = {"32K": 32 * 1024, "64K": 64 * 1024, "100K": 100 * 1024, "128K": 128 * 1024}


@dataclass(frozen=True)
class Curve:
    """C(n) = linear n + quadratic n^2 operations to generate n tokens."""

    linear: float
    quadratic: float

    def cumulative(self, tokens: float) -> float:
        return self.linear * tokens + self.quadratic * tokens * tokens

    def per_token(self, context: float) -> float:
        """Operations of the token at position `context`: the derivative."""
        return self.linear + 2 * self.quadratic * context


@dataclass(frozen=True)
class Convention:
    """One way of counting both models.

    Attributes:
        per_token: whether the ratio is of the token at length n, not of all n tokens.
    """

    name: str
    explanation: str
    ours: Curve
    peer: Curve
    per_token: bool = False

    def ratio(self, tokens: float) -> float:
        """Operations of the hybrid divided by those of DeepSeek-R1."""
        if self.per_token:
            return self.ours.per_token(tokens) / self.peer.per_token(tokens)
        return self.ours.cumulative(tokens) / self.peer.cumulative(tokens)


@dataclass(frozen=True)
class DeepSeekR1:
    """Sizes of DeepSeek-R1, which are those of DeepSeek-V3 (arXiv 2412.19437 §4.2 and its released configuration).

    Attributes:
        active: published parameters for one token.
    """

    layers: int = 61
    hidden: int = 7168
    heads: int = 128
    query_rank: int = 1536
    key_value_rank: int = 512
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    dense_layers: int = 3
    dense_ffn: int = 18432
    routed_experts: int = 256
    shared_experts: int = 1
    chosen_experts: int = 8
    expert_ffn: int = 2048
    vocab: int = 129_280
    active: float = 37e9

    def counted(self) -> tuple[float, float]:
        """Total and active parameters from the sizes, both with embedding and head, without norms and biases."""
        query = self.query_rank * (self.hidden + self.heads * (self.nope_dim + self.rope_dim))
        key_value = self.hidden * (self.key_value_rank + self.rope_dim)
        key_value += self.key_value_rank * self.heads * (self.nope_dim + self.value_dim)
        attention = self.layers * (query + key_value + self.heads * self.value_dim * self.hidden)
        sparse, expert = self.layers - self.dense_layers, 3 * self.hidden * self.expert_ffn
        common = attention + self.dense_layers * 3 * self.hidden * self.dense_ffn
        common += sparse * (self.routed_experts * self.hidden + self.shared_experts * expert)
        common += 2 * self.vocab * self.hidden
        return common + sparse * self.routed_experts * expert, common + sparse * self.chosen_experts * expert


def conventions(model: Model) -> list[Convention]:
    """Every way of counting, most natural first; the digitised curves of the report only say something of MiniMax-M1.

    A head attends to a token with 2 d_qk operations for the score and 2 d_v for the value. Summed over a generation,
    half of that times n^2 remains. DeepSeek-R1 has d_qk = 128 + 64 and d_v = 128; decoders absorb its up-projections
    and then work on the compressed cache, d_qk = 512 + 64 and d_v = 512.
    """
    peer = DeepSeekR1()
    pairs = softmax_layers(model) * model.num_attention_heads
    peer_pairs = peer.layers * peer.heads
    dim, peer_qk = model.head_dim, peer.nope_dim + peer.rope_dim
    step = decode_flops(model, 0)
    ours = Curve(step.linear + step.lightning, pairs * 2 * dim)
    plain = Curve(2 * peer.active, peer_pairs * (peer_qk + peer.value_dim))
    absorbed = Curve(2 * peer.active, peer_pairs * (2 * peer.key_value_rank + peer.rope_dim))
    with_head = Curve(ours.linear + step.head, ours.quadratic)
    peer_embedding = peer.vocab * peer.hidden
    peer_with_head = Curve(2 * (peer.counted()[1] - peer_embedding), plain.quadratic)
    # What fits the report's own figure: scores counted once for the causal half, values for every pair.
    figure_style = Curve(ours.linear, pairs * 3 * dim)
    peer_figure_style = Curve(plain.linear, peer_pairs * (peer_qk + 2 * peer.value_dim))
    found = [
        Convention("cumulative", "2 x active parameters, attention of every head to what came before", ours, plain),
        Convention("cumulative, absorbed", "DeepSeek-R1 on its compressed cache, as decoders run it", ours, absorbed),
        Convention("last token", "the token at length n alone", ours, plain, per_token=True),
        Convention("last token, absorbed", "the same on the compressed cache", ours, absorbed, per_token=True),
        Convention("with LM head", "cumulative, both heads counted, from the models' sizes", with_head, peer_with_head),
        Convention("figure style", "values of every pair, scores of the causal half", figure_style, peer_figure_style),
    ]
    if round(parameters(model).total / 1e9) == 456:
        # Digitised from the vector curves of the report's Fig. 1 (fit residual below 0.05%).
        drawn, peer_drawn = Curve(1.0455e11, 1.964e5), Curve(7.542e10, 3.498e6)
        found.append(Convention("figure itself", "curves fitted to the report's Fig. 1", drawn, peer_drawn))
    return found


def figure(model: Model, path: Path, name: str) -> Path:
    """Cumulative operations of both models over the length, and the ratio under every convention, as PNG.

    Args:
        name: of the hybrid, for the legend.
    """
    from matplotlib.ticker import FuncFormatter, MultipleLocator, PercentFormatter

    from m1 import figures

    every = conventions(model)
    lengths = [1024 * k for k in range(1, 129)]
    kilo = [n / 1024 for n in lengths]
    with figures.pair(path, 11.0, 4.4) as (_, left, right):
        plain, absorbed = every[0], every[1]
        lines = [
            (f"{name}", plain.ours, figures.COLOURS[0], "-"),
            ("DeepSeek-R1, per head", plain.peer, figures.COLOURS[1], "-"),
            ("DeepSeek-R1, compressed cache", absorbed.peer, figures.COLOURS[1], "--"),
        ]
        for label, curve, colour, style in lines:
            values = [curve.cumulative(n) / 1e16 for n in lengths]
            left.plot(kilo, values, style, color=colour)
            left.annotate(
                label, (kilo[-1], values[-1]), (-4, 5), textcoords="offset points", ha="right", color=colour, fontsize=9
            )
        left.set(xlabel="generated tokens (K = 1024)", ylabel="operations (10$^{16}$)", title="Operations to generate")
        left.set(xlim=(0, 132), ylim=(0, None))
        for index, convention in enumerate(every):
            style = "--" if convention.per_token else "-"
            ratios = [convention.ratio(n) for n in lengths]
            right.plot(kilo, ratios, style, color=figures.COLOURS[index], label=convention.name)
        for length, claim in ((64, 0.5), (100, 0.25)):
            right.plot([length], [claim], "kv", markersize=6, zorder=5)
        right.annotate("report: under 50% at 64K", (64, 0.5), (7, 3), textcoords="offset points", fontsize=8)
        right.annotate(
            "report: about 25% at 100K", (100, 0.245), (104, 0.145), ha="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6},
        )  # fmt: skip
        right.set(xlabel="generated tokens (K = 1024)", title=f"{name} as a share of DeepSeek-R1")
        right.set(xlim=(0, 132), ylim=(0, 1.0))
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.legend(loc="upper right", ncols=2)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MultipleLocator(16))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}K" if value else "0"))
    return path
