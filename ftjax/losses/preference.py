"""Learning from pairs against a reference: DPO and its family, one loss or a weighted sum of several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ftjax.losses.diagnosis import diagnose, gradient_share
from ftjax.losses.divergences import DIVERGENCES, alpha
from ftjax.losses.options import check_beta
from ftjax.losses.pairs import PAIR_LOSSES, Pairs
from ftjax.losses.reference import reference_logps
from ftjax.losses.responses import likelihood, shared_weights, token_average, token_sum, token_weights
from ftjax.tree import nearest
from ftjax.types import Batch, Mean, Metrics, Scores, masked_mean


def preference(
    scores: Scores,
    batch: Batch,
    *,
    losses: Mapping[str, float] = {"sigmoid": 1.0},
    beta: float = 0.1,
    label_smoothing: float | None = None,
    tau: float | None = None,
    divergence: str = "reverse_kl",
    divergence_order: float | None = None,
    tail_weight: float = 1.0,
    nll_coef: float = 0.0,
    nll_per_token: bool = True,
    weigh: Callable[[Scores, Batch], Float[Array, " b"]] | None = None,
) -> tuple[Mean, Metrics]:
    """Return Σ_k c_k ℓ_k + c_nll · NLL, a mean over pairs.

    ℓ_k reads x = f'(π/π_ref) of the chosen and the rejected response; for plain DPO

    L = mean_i -log σ( β [log π(y_c)/π_ref(y_c) - log π(y_r)/π_ref(y_r)] )

    DPO: Rafailov et al., 2023, arXiv 2305.18290, equation 7. Several losses with weights and the NLL: MPO, Wang et al., 2024, arXiv
    2411.10442; DPO with the NLL: RPO, Pang et al., 2024, arXiv 2404.19733, equation 1. As in both papers the NLL is that of the chosen
    response per token, averaged over pairs. TRL averages it over the tokens of a micro-batch: there is no option for that, as it changes
    with the split. TRL also applies a divergence to the losses of Δ only, and ignores label smoothing in `sigmoid`; here both hold for
    every loss that takes them, and without either option the losses are TRL's.

    Args:
      scores: of the policy, `[b, 2, t]`, chosen first.
      batch: with `reference_logps`; a pair in which a response has no token counts nowhere.
      losses: names in `PAIR_LOSSES` and their weights.
      beta: > 0: how dear it is to leave the reference; rewards are β · log-ratio.
      label_smoothing: the probability that a label is wrong; each loss's own default if None.
      tau: temperature of `discopop`; its default if None.
      divergence: a name in `DIVERGENCES`: what holds the policy to its reference.
      divergence_order: of the divergence `alpha`; its default, ½, if None.
      tail_weight: in [0, 1], of the tokens beyond the shorter response's length: LD-DPO (its α).
      nll_coef: of the mean negative log-likelihood of the chosen responses.
      nll_per_token: whether that is divided by the response's length; CPO's paper does not.
      weigh: what each pair's loss is multiplied by, e.g. `wpo_weights`; the NLL is not.

    Returns:
      The loss, and the metrics of `diagnosis.diagnose`, with one `loss/NAME` for each loss where there are several, and `nll/share`, the
      NLL's part of the gradient, where it has a coefficient.

    Raises:
      ValueError: no reference, arrays that are no pairs, an unknown loss or divergence, an option that none of them has, a β that is not
        above 0, or `aot` with a divergence.

    Example:
      >>> pair = jnp.zeros((1, 2, 3))
      >>> batch = Batch(pair.astype(int), pair + 1, pair.astype(int), pair.astype(int) + 1, reference_logps=pair - 1)
      >>> loss, metrics = preference(Scores(logps=pair - 1), batch)
      >>> round(loss.value(), 4), metrics["rewards/accuracy"].value()
      (0.6931, 0.5)
    """
    reference = reference_logps("preference", batch)
    implicit = _implicit_reward(divergence, divergence_order)
    if "aot" in losses and divergence != "reverse_kl":
        raise ValueError(
            f"preference: 'aot' compares margins of the policy with those of the reference and never sees their ratio, so it has no "
            f"{divergence!r}: leave the divergence at 'reverse_kl', or take 'aot_unpaired'."
        )
    pairs = make_pairs(scores.logps, reference, batch.loss_mask, tail_weight=tail_weight)
    logratios = pairs.chosen, pairs.rejected

    def pair_loss(chosen: jax.Array, rejected: jax.Array) -> dict[str, jax.Array]:
        mapped = pairs._replace(chosen=implicit(chosen), rejected=implicit(rejected))
        return weighted_losses(mapped, losses, beta=beta, label_smoothing=label_smoothing, tau=tau)

    rewards = (beta * implicit(x) for x in logratios)
    parts = pair_loss(*logratios)
    weights = 1.0 if weigh is None else weigh(scores, batch)
    total = sum(parts.values()) * weights
    metrics = diagnose(scores, batch, *rewards, pairs.counted)
    if len(parts) > 1:
        metrics |= {f"loss/{name}": masked_mean(part, pairs.counted) for name, part in parts.items()}
    if nll_coef:
        total = total - nll_coef * likelihood(scores.logps[:, 0], batch.loss_mask[:, 0], per_token=nll_per_token)
        pull = jax.grad(lambda chosen: jnp.sum(sum(pair_loss(chosen, pairs.rejected).values()) * weights))(pairs.chosen)
        pulls = nll_coef * token_weights(pairs.chosen_length, per_token=nll_per_token)
        metrics["nll/share"] = gradient_share(pulls, jnp.abs(pull), pairs.counted)
    return masked_mean(total, pairs.counted), metrics


def _implicit_reward(divergence: str, order: float | None) -> Callable[[Float[Array, " b"]], Float[Array, " b"]]:
    """Return the map of a log-ratio that the divergence asks for."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"preference: there is no divergence {divergence!r}; nearest: {nearest(divergence, DIVERGENCES)}.")
    if order is None:
        return DIVERGENCES[divergence]
    if divergence != "alpha":
        raise ValueError(f"preference: divergence_order={order} is that of 'alpha', and {divergence!r} has none; set divergence='alpha'.")
    return partial(alpha, order=order)


def make_pairs(
    logps: Float[Array, "*b t"], reference: Float[Array, "*b t"], mask: Float[Array, "*b t"], *, tail_weight: float = 1.0
) -> Pairs:
    """Return the sums over tokens of pairs `[b, 2, t]`.

    Raises:
      ValueError: the arrays are no pairs.
    """
    if logps.ndim != 3 or logps.shape[1] != 2:
        raise ValueError(f"losses of pairs: expected log-probabilities [b, 2, t], chosen first, got {logps.shape}.")
    weights = mask if tail_weight == 1 else shared_weights(mask, tail_weight)
    policy, anchor = token_sum(logps, weights), token_sum(reference, weights)
    lengths = jnp.sum(mask, axis=-1)
    chosen_length, rejected_length = jnp.maximum(lengths, 1).T
    return Pairs(
        *(policy - anchor).T,
        chosen_length,
        rejected_length,
        policy[:, 0] - policy[:, 1],
        anchor[:, 0] - anchor[:, 1],
        jnp.all(lengths > 0, axis=-1).astype(mask.dtype),
    )


def weighted_losses(pairs: Pairs, losses: Mapping[str, float], *, beta: float, **options: float | None) -> dict[str, Float[Array, " b"]]:
    """Return `{name: weight · loss}`; an option goes to the losses that take it, and one that is None to none.

    Raises:
      ValueError: a name that is no loss of pairs, no positive β, or an option that none of the losses takes.
    """
    if not losses:
        raise ValueError(f"losses of pairs: name at least one of {', '.join(PAIR_LOSSES)}.")
    check_beta("losses of pairs", beta)
    given = {name: value for name, value in options.items() if value is not None}
    found, taken = {}, set()
    for name, weight in losses.items():
        if name not in PAIR_LOSSES:
            raise ValueError(f"losses of pairs: there is no {name!r}; nearest: {nearest(name, PAIR_LOSSES)}.")
        mine = given.keys() & inspect.signature(PAIR_LOSSES[name]).parameters.keys()
        taken |= mine
        found[name] = weight * PAIR_LOSSES[name](pairs, beta=beta, **{option: given[option] for option in mine})
    if unknown := sorted(given.keys() - taken):
        raise ValueError(f"losses of pairs: none of {', '.join(losses)} takes {unknown[0]}.")
    return found


def wpo_weights(scores: Scores, batch: Batch) -> Float[Array, " b"]:
    """Return π̃(y_c)·π̃(y_r), π̃ the mean-token likelihood over what the policy would give itself: pairs near the policy count more.

    w(y) = exp( mean_t [log π(y_t) - log Σ_v π(v)²] ), without a gradient: WPO, Zhou et al., 2024, arXiv 2406.11827, in its
    "sampled alignment". Needs `log_collision`.

    Raises:
      ValueError: `log_collision` was not scored.
    """
    if scores.log_collision is None:
        raise ValueError("wpo: log_collision was not scored: score with outputs=('logps', 'log_collision').")
    aligned = token_average(scores.logps - scores.log_collision, batch.loss_mask)
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(aligned, axis=-1)))


dpo = partial(preference, losses={"sigmoid": 1.0})
rpo = partial(preference, losses={"sigmoid": 1.0}, nll_coef=1.0)
mpo = partial(preference, losses={"sigmoid": 0.8, "bco_pair": 0.2}, nll_coef=1.0)
wpo = partial(preference, losses={"sigmoid": 1.0}, weigh=wpo_weights)
